"""What a reader needs to judge or repeat a measured row."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import cppo

HERE = Path(__file__).resolve().parent


def results_folder() -> Path:
    """`benchmarks/results` in a clone, else `cppo-bench` in the working directory."""
    for folder in (HERE / "results", Path.cwd() / "benchmarks" / "results"):
        if folder.is_dir():
            return folder
    return Path.cwd() / "cppo-bench"


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Device, versions, commit and date."""
    commit = os.environ.get("GIT_COMMIT", "")  # of a copy without its history
    if not commit:
        git = ["git", "-C", str(HERE), "describe", "--always", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "cppo": cppo.__version__,
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def device_name(device: torch.device | str = "cpu") -> str:
    """The accelerator's name, or the processor's with its instruction set and the threads in use.

    A processor's name may be no more than its maker's: "AMD EPYC" has AVX-512 or not.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{_cpu()} {vectors}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def file_stem(device: torch.device | str = "cpu") -> str:
    """A file name for the rows of this device: `cpu_amd_epyc_avx512_2_of_2_threads`."""
    words = re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_")
    return f"{torch.device(device).type}_{words}"


def version(package: str) -> str:
    """The installed version of a distribution, or '' without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def load_per_core() -> float:
    """Other work on this machine: above about 0.25 CPU timings are not to be trusted."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
