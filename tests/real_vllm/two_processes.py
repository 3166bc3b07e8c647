"""What the tests run on two processes: torchrun tests/real_vllm/two_processes.py FOLDER [ADDRESS].

Each process has vLLM in it, or both share the server at the address.
"""

import dataclasses
import json
import sys
from pathlib import Path

from test_engine import OPTIONS, Case, trainer
from trainer_cases import weights_of

if __name__ == "__main__":
    folder, *address = sys.argv[1:]
    options = {}
    if address:
        server = dataclasses.replace(OPTIONS, address=address[0])
        options = {"engine": "vllm_server", "vllm": server}
    run = trainer(Case("text"), Path(folder) / "run", max_steps=3, **options)
    run.train()
    found = {name: p.double().sum().item() for name, p in weights_of(run.model).items()}
    rows = [row for row in run.history if "loss" in row]
    words = json.dumps({"weights": found, "rows": rows})
    (Path(folder) / f"{run.processes.rank}.json").write_text(words)
    run.engine.close()
