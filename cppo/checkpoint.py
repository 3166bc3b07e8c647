"""Checkpoints: a folder is either whole or not there.

Everything is written to a hidden folder beside the final one, flushed to disk, and renamed; a run
killed at any moment leaves the earlier checkpoints as they were. What is best and what is last is
read off the folders, there is no pointer that could disagree with them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PREFIX = "checkpoint-"
_STATE = "trainer.pt"
_SUMMARY = "trainer.json"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = Path(output_dir).glob(f"{_PREFIX}*")
    steps = {path: path.name.removeprefix(_PREFIX) for path in found}
    whole = [p for p, step in steps.items() if step.isdigit() and (p / _SUMMARY).is_file()]
    return sorted(whole, key=lambda path: int(steps[path]))


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run."""
    return next(reversed(checkpoints(output_dir)), None)


def best_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint with the highest evaluation metric (of several the newest)."""
    measured = [
        (summary["metric"], path)
        for path in checkpoints(output_dir)
        if (summary := read_summary(path))["metric"] is not None
    ]
    return max(measured)[1] if measured else None


def read_summary(path: str | Path) -> dict[str, Any]:
    """step, metric and the options of a checkpoint, without loading tensors."""
    return json.loads((Path(path) / _SUMMARY).read_text())


def read_state(path: str | Path) -> dict[str, Any]:
    """Optimizer, schedule, data position and metrics of a checkpoint.

    Raises: ValueError if `path` is no whole checkpoint.
    """
    if not (Path(path) / _SUMMARY).is_file():
        raise ValueError(f"cppo: {path} is not a checkpoint of cppo (it has no {_SUMMARY})")
    return torch.load(Path(path) / _STATE, map_location="cpu", weights_only=True)


def write_checkpoint(
    output_dir: str | Path,
    step: int,
    save_model: Callable[[Path], None],
    state: dict[str, Any],
    summary: dict[str, Any],
    keep: int,
) -> Path:
    """Writes one checkpoint atomically, then drops the old ones that nobody needs.

    Args:
        save_model: writes model and processor into the folder it is given.
        state: tensors and numbers for `read_state`.
        summary: JSON for `read_summary`; "metric" is what best means.
        keep: the newest so many stay, and the best.
    Returns: the folder.
    """
    final = Path(output_dir) / f"{_PREFIX}{step:06d}"
    partial = final.with_name(f".{final.name}.partial")
    for stale in Path(output_dir).glob(f".{_PREFIX}*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(partial)
    torch.save(state, partial / _STATE)
    (partial / _SUMMARY).write_text(json.dumps({"step": step, **summary}, indent=1) + "\n")
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    replaced = final.with_name(f".{final.name}.replaced.partial")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    newest, best = checkpoints(output_dir)[-keep:], best_checkpoint(output_dir)
    for path in checkpoints(output_dir):
        if path not in newest and path not in (best, final):
            shutil.rmtree(path)
    return final


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
