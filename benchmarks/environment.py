"""What a reader needs to judge or repeat a measured row."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch


def environment() -> dict[str, str]:
    """Device, versions, commit and date."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": f"{_cpu()}, {torch.get_num_threads()} of {os.cpu_count()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "cppo": importlib.metadata.version("cppo"),
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
