"""What a reader needs to judge or repeat a measured row, and the folder that rows go to."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

import cppo

HERE = Path(__file__).resolve().parent
ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")  # those that LD_PRELOAD usually names


def results_folder(record: bool = False) -> Path:
    """`./cppo-bench`; with `record` the folder of a clone whose rows are committed."""
    if not record:
        return Path.cwd() / "cppo-bench"
    for folder in (HERE / "results", Path.cwd() / "benchmarks" / "results"):
        if folder.is_dir():
            return folder
    raise ValueError("--record: benchmarks/results is not here; run this in a clone of cppo")


def add_record_option(parser: argparse.ArgumentParser) -> None:
    """`--record`, which every command that writes rows has."""
    words = "write over the committed rows in benchmarks/results, not to ./cppo-bench"
    parser.add_argument("--record", action="store_true", help=words)


def experiment_parser(text: str | None, smoke: str = "") -> argparse.ArgumentParser:
    """A command that writes rows: with `--record`, and `--smoke` where there are words on it.

    Args:
        text: the script's own; its first line says what the command does.
    """
    parser = argparse.ArgumentParser(description=(text or "").splitlines()[0])
    if smoke:
        parser.add_argument("--smoke", action="store_true", help=smoke)
    add_record_option(parser)
    return parser


def data_folder() -> Path:
    """Where the data sets are: CPPO_DATA_DIR, else `../shared/data` beside the clone."""
    return Path(os.environ.get("CPPO_DATA_DIR", HERE.parents[1] / "shared" / "data"))


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Device, allocator, versions, commit and date."""
    commit = os.environ.get("GIT_COMMIT", "")  # of a copy without its history
    if not commit:
        git = ["git", "-C", str(HERE), "describe", "--always", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": device_name(device),
        "allocator": "torch" if _is_cuda(device) else allocator(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "cppo": cppo.__version__,
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def current(device: torch.device | str) -> AbstractContextManager[Any]:
    """Makes a GPU the current one: on that one events are recorded, and peers launch kernels."""
    return torch.cuda.device(device) if _is_cuda(device) else nullcontext()


def allocator() -> str:
    """The library that gives this process its memory: "system" unless another is loaded."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if maps.exists() else ""
    return next((name for name in ALLOCATORS if f"lib{name}" in loaded), "system")


def device_name(device: torch.device | str = "cpu") -> str:
    """The accelerator's name, or the processor's with its instruction set and threads in use.

    The processor's own name may say too little: "AMD EPYC" comes with AVX-512 and without.
    """
    if _is_cuda(device):
        return torch.cuda.get_device_name(device)
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{_cpu()} {vectors}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def file_stem(device: torch.device | str = "cpu") -> str:
    """A file name for the rows of this device: `cpu_amd_epyc_avx512_2_of_2_threads`.

    Times under two allocators cannot be compared, so a preloaded one is part of the name.
    """
    words = f"{torch.device(device).type} {device_name(device)}"
    if not _is_cuda(device) and allocator() != "system":
        words += f" {allocator()}"
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


def version(package: str) -> str:
    """The installed version of a distribution, or '' without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def load_per_core() -> float:
    """Other work on this machine: above about 0.25 CPU timings are not to be trusted."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def _is_cuda(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
