"""What test_engine runs on two processes: torchrun tests/real_vllm/two_processes.py FOLDER."""

import json
import sys
from pathlib import Path

from test_engine import Case, trainer
from trainer_cases import weights_of

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run = trainer(Case("text"), folder / "run", max_steps=3)
    run.train()
    found = {name: p.double().sum().item() for name, p in weights_of(run.model).items()}
    rows = [row for row in run.history if "loss" in row]
    rank = run.processes.rank
    (folder / f"{rank}.json").write_text(json.dumps({"weights": found, "rows": rows}))
    run.engine.close()
