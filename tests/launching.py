"""Scripts of this folder on several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def torchrun(script: str, *arguments: str, processes: int = 2, **variables: str) -> str:
    """Runs a script on several gloo processes; returns what they said, or fails with it."""
    path, quiet = (
        Path(__file__).with_name(script),
        {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        + [str(processes), str(path), *arguments],
        cwd=path.parent,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | quiet | {"DS_ACCELERATOR": "cpu"} | variables,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout
