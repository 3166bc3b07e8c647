"""Checkpoints: a folder is either whole or not there, and an output folder holds one run.

Everything is written to a hidden folder beside the final one, flushed to disk, and renamed; a run
killed at any moment leaves the earlier checkpoints as they were. What is best and what is last is
read off the folders, there is no pointer that could disagree with them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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


# What a run, its evaluations and its report write beside the checkpoints; the tracker's files are
# those of TensorBoard, the one tracker that writes into the output folder.
_WRITTEN = (
    *("metrics.jsonl", "completions.jsonl", "metrics.partial", "completions.partial"),
    *("config.yaml", "eval.csv", "summary.json", "report.html"),
    *("cppo/**/events.out.tfevents.*", "cppo/**/hparams.yml"),
    f".{_PREFIX}*.partial",
)


@dataclass(frozen=True)
class Claim:
    """What `claim_output_dir` decided.

    start: the checkpoint to go on from; None for a fresh start. old: what `clear` removes, nothing
    but what an earlier run wrote.
    """

    start: Path | None
    old: tuple[Path, ...] = ()

    def clear(self) -> None:
        """Removes the earlier run's files. Of several processes the first alone calls it."""
        for path in self.old:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def claim_output_dir(
    output_dir: str | Path,
    resume_from: str | Path | None = None,
    *,
    overwrite: bool = False,
    needed: Sequence[str | Path] = (),
    ways: str = "resume it, overwrite it, or choose another folder",
) -> Claim:
    """Decides how a run may begin to write into a folder, so that no folder holds two runs.

    Nothing is written or removed here: every process may ask, as long as none has begun to write.

    Args:
        output_dir: the folder; it need not exist.
        resume_from: a checkpoint folder; "auto": the newest one in `output_dir`, a fresh start if
            there is none; None: a fresh start.
        overwrite: what is in the way may go, by `Claim.clear`: the whole earlier run, or where a
            checkpoint of it is resumed, the later ones.
        needed: folders that the run will read, such as the weights that it starts from.
        ways: what the user can do about a refusal, in the words of the caller.
    Returns: where to start, and what to remove before anything is written.
    Raises: ValueError if `output_dir` is a file or holds a run (a checkpoint, or rows in
        metrics.jsonl) that would go on beside the new one, if `resume_from` is no checkpoint, or
        if `overwrite` would remove something `needed`.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cppo: output_dir must be a folder, got the file {folder}")
    start = last_checkpoint(folder) if resume_from == "auto" else resume_from
    start = None if start is None else Path(start)
    if start is not None and not (start / _SUMMARY).is_file():
        raise ValueError(f"cppo: {start} is not a checkpoint of cppo (it has no {_SUMMARY})")
    there, found = checkpoints(folder), ""
    if start is not None and start.resolve().parent == folder.resolve():
        step = read_summary(start)["step"]
        old = [path for path in there if read_summary(path)["step"] > step]
        if old:
            found = f"{old[-1].name}, which is later than {start.name}"
    else:
        old = [*there, *(path for pattern in _WRITTEN for path in folder.glob(pattern))]
        rows = folder / "metrics.jsonl"
        if there:
            found = there[-1].name
        elif rows.is_file() and rows.stat().st_size:
            found = "a run without a checkpoint (its metrics.jsonl has rows)"
    if not found:
        return Claim(start)
    if overwrite:
        lost = {path.resolve() for path in old}
        for name in needed:
            if lost & {Path(name).resolve(), *Path(name).resolve().parents}:
                raise ValueError(f"cppo: {name} is needed, overwriting {folder} would remove it")
        return Claim(start, tuple(old))
    if resume_from == "auto" and start is None:
        return Claim(None)  # the run that ended before its first checkpoint begins again
    raise ValueError(f"cppo: output_dir {folder} already holds {found}: {ways}")


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
    Raises: ValueError naming everything that changed, its old and its new value.
    """
    # An option that an older version did not have had its default's effect.
    was = {**run_options(CPPOConfig(), 1), **read_summary(path)["options"]}

    def changes(names: Iterable[str], now: dict[str, Any]) -> list[str]:
        return [
            f"{name} (was {was.get(name)!r}, is {now.get(name)!r})"
            for name in sorted(names)
            if was.get(name) != now.get(name)
        ]

    options = changes((was.keys() | now.keys()) - data.keys() - _MAY_CHANGE, now)
    others = changes(was.keys() & data.keys(), data)
    if options or (others and not now["resume_with_changes"]):
        hint = "" if options else "; resume_with_changes=True goes on all the same"
        raise ValueError(
            f"cppo.CPPOTrainer: the run of {path} must be resumed with the options it was "
            f"started with, data and rewards included, changed: {', '.join(options + others)}{hint}"
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
