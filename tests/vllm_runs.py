"""Runs on several processes, for the tests with a real vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_SCRIPT = Path(__file__).parent / "real_vllm" / "two_processes.py"


def on_two_processes(folder: Path, *address: str) -> None:
    """Trains on two processes, which must agree, with weights that are right in every step."""
    paths = os.pathsep.join([str(_SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(_SCRIPT), str(folder), *address],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=folder,  # not the repository's root: its triton_kernels would shadow vLLM's
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert first["weights"] == second["weights"] and len(first["rows"]) == 3
    assert max(row["mismatch/max"] for row in first["rows"]) < 1e-4
