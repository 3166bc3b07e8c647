"""Checkpoints: a folder is either whole or not there.

Everything is written to a hidden folder beside the final one, flushed to disk, and renamed; a run
killed at any moment leaves the earlier checkpoints as they were. What is best and what is last is
read off the folders, there is no pointer that could disagree with them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cppo.config import CPPOConfig

_PREFIX = "checkpoint-"
_STATE = "trainer.pt"
_SUMMARY = "trainer.json"
# What may change when a run is resumed: how long it goes on and what is written.
_MAY_CHANGE = {
    "max_steps",
    "output_dir",
    "eval_every",
    "eval_samples",
    "eval_greedy",
    "save_every",
    "keep_checkpoints",
    "best_metric",
    "log_every",
    "log_completions",
    "trackers",
    "reward_timeout",
    "skip_bad_questions",
    "resume_with_changes",
}


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


def run_options(config: CPPOConfig, num_processes: int) -> dict[str, Any]:
    """What decides the course of a run, under dotted names, as JSON gives it back."""
    options = {"processes": num_processes, **_flat(dataclasses.asdict(config))}
    # A perturbation may be a function: its name, repr has the address in memory.
    named = json.dumps(options, default=lambda value: getattr(value, "__qualname__", repr(value)))
    return json.loads(named)


def check_options(path: str | Path, now: dict[str, Any], data: dict[str, Any]) -> list[str]:
    """Resuming with other options would be another run under the name of the old one.

    Args:
        now: the options of this run, as of `run_options`.
        data: what it is trained on, in words; `resume_with_changes` allows differences here.
    Returns: the differences of `data` that are allowed, in words.
    Raises: ValueError naming everything that changed, its old and its new value. What the
        checkpoint does not know, because an older version wrote it, cannot be compared.
    """
    was = read_summary(path)["options"]

    def changes(now: dict[str, Any]) -> list[str]:
        return [
            f"{name} (was {was[name]!r}, is {value!r})"
            for name, value in sorted(now.items())
            if name in was and was[name] != value and name not in _MAY_CHANGE
        ]

    options, others = changes(now), changes(data)
    if options or (others and not now["resume_with_changes"]):
        hint = "" if options else "; resume_with_changes=True goes on all the same"
        raise ValueError(
            f"cppo.CPPOTrainer: the run of {path} must be resumed with the options, data and "
            f"rewards it was started with, changed: {', '.join(options + others)}{hint}"
        )
    return others


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
