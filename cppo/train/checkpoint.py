"""Checkpoints: a folder is either whole or absent, and states what every file must hold.

Everything is written to a hidden folder beside the final one, flushed to disk, and renamed; a run
killed at any moment leaves the earlier checkpoints as they were. Which one is best, and which is
last, is read off the folders; there is no pointer that could disagree with them.

    checkpoint-000040/
        model.safetensors, config.json, tokenizer.json, ...   for plain transformers
        trainer.pt      optimizer, schedule, position in the data, metrics
        trainer.json    step, metric, options; size and checksum (XXH3, 128 bits) of every other
                        file, and its own

`trainer.json` is written last. Its files are compared with it before a checkpoint is read.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cppo.train.sealed import (
    SUMMARY,
    CheckpointError,
    cause,
    compare,
    flush,
    is_whole,
    read_summary,
    read_tensors,
    seal,
    write_tensors,
)

_PREFIX = "checkpoint-"
_STATE = "trainer.pt"
# A name with this end belongs to something that is half written or half removed.
PARTIAL = ".partial"
_REPLACED = f".replaced{PARTIAL}"


# Finding


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first; a folder half copied is none."""
    return [path for path in _named(output_dir) if is_whole(path)]


def incomplete(output_dir: str | Path) -> list[Path]:
    """Folders with the name of a checkpoint that lack its last file."""
    return [path for path in _named(output_dir) if not is_whole(path)]


def _named(output_dir: str | Path) -> list[Path]:
    found = Path(output_dir).glob(f"{_PREFIX}*")
    there = [path for path in found if step_of(path) is not None and path.is_dir()]
    return sorted(there, key=lambda path: step_of(path) or 0)


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's name gives; None for the name of something else."""
    digits = path.name.removeprefix(_PREFIX)
    return int(digits) if path.name.startswith(_PREFIX) and digits.isdecimal() else None


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run."""
    return next(reversed(checkpoints(output_dir)), None)


def best_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint with the highest evaluation metric (of several the newest).

    Those that were measured otherwise than the newest are left out, and damaged ones too, with a
    warning.
    """
    found = [(own, path) for path, own in _readable(output_dir) if own["metric"] is not None]
    if not found:
        return None
    newest = measure(found[-1][0])
    return max((own["metric"], path) for own, path in found if measure(own) == newest)[1]


def measure(summary: Mapping[str, Any]) -> list[Any]:
    """What decides which metric a summary has: equal lists mean that metrics can be compared."""
    return [summary.get("options", {}).get(n) for n in ("best_metric", "eval_dataset", "rewards")]


def _readable(output_dir: str | Path) -> list[tuple[Path, dict[str, Any]]]:
    """Checkpoints with their summaries, oldest first, less those that cannot be read."""
    found = []
    for path in checkpoints(output_dir):
        try:
            found.append((path, read_summary(path)))
        except CheckpointError as error:
            warnings.warn(f"{error}; it is left out", stacklevel=3)
    return found


# Reading


def check_files(path: str | Path, *, contents: bool = True) -> dict[str, Any]:
    """Compares every file of a checkpoint with what was written; returns its summary.

    A file besides that a loader could take for one of them is refused: `model.safetensors` beside
    the shards of a large model would be loaded in their place.

    A checkpoint of a version that did not write the sizes passes; what it lacks is found when its
    weights are loaded.

    Args:
        contents: whether to read the files and compare their checksum; else their sizes alone.
    Raises: CheckpointError naming the first file that differs, and the newest checkpoint beside it
        that is whole.
    """
    path = Path(path)
    try:
        summary = read_summary(path)
        if step_of(path) not in (None, summary["step"]):
            raise CheckpointError(f"cppo: {path / SUMMARY} is of step {summary['step']}")
        compare(path, summary, contents)
    except CheckpointError as error:
        if not os.path.isfile(path / SUMMARY):
            raise
        raise CheckpointError(f"{error}; {_way_out(path)}") from error
    return summary


def read_state(path: str | Path) -> dict[str, Any]:
    """Optimizer, schedule, data position and metrics of a checkpoint.

    Raises: CheckpointError if `path` is no checkpoint, or if its `trainer.pt` cannot be read.
    """
    read_summary(path)
    return read_tensors(Path(path) / _STATE)


def _way_out(damaged: Path) -> str:
    """What can be done about a damaged checkpoint."""
    for path in reversed(_named(damaged.parent)):
        if path.resolve() == damaged.resolve():
            continue
        try:
            compare(path, read_summary(path), contents=True)
        except CheckpointError:
            continue
        later = step_of(path), step_of(damaged)
        extra = ""
        if None not in later and later[0] < later[1]:  # type: ignore[operator]
            extra = ", with overwrite (it removes the damaged one)"
        return f"the newest whole checkpoint beside it is {path}: resume from that one{extra}"
    return "no other checkpoint beside it is whole: restore the file, or start anew with overwrite"


# Writing


def write_checkpoint(
    output_dir: str | Path,
    step: int,
    save_model: Callable[[Path], None],
    state: dict[str, Any],
    summary: dict[str, Any],
    keep: int,
    *,
    expected_bytes: int = 0,
    files: Mapping[str, Path] | None = None,
) -> Path:
    """Writes one checkpoint atomically, then drops the old ones that nobody needs.

    Args:
        save_model: writes model and processor into the folder it is given.
        state: tensors and numbers for `read_state`.
        summary: JSON for `read_summary`; "metric" is what best means.
        keep: the newest so many stay, and the best.
        expected_bytes: what the checkpoint will take; a disk with less room is not begun on.
        files: more files of the same disk, which are moved into it, by their names there.
    Returns: the folder.
    Raises: CheckpointError if it could not be written. Earlier checkpoints are as they were, and
        nothing half written stays.
    """
    folder = Path(output_dir)
    final = folder / f"{_PREFIX}{step:06d}"
    partial = final.with_name(f".{final.name}{PARTIAL}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        free = shutil.disk_usage(folder).free
        if free < expected_bytes:
            raise OSError(
                f"it takes about {expected_bytes / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
            )
        partial.mkdir()
        save_model(partial)
        write_tensors(state, partial / _STATE)
        for name, path in (files or {}).items():
            path.rename(partial / name)
        seal(partial, {"step": step, **summary})
        _replace(final, partial)
    except Exception as error:  # safetensors and torch raise errors of their own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        newest = last_checkpoint(folder) or "none"
        raise CheckpointError(
            f"cppo: the checkpoint of step {step} could not be written to {folder} "
            f"({cause(error, folder)}); the newest one there is {newest}"
        ) from error
    _drop_old(folder, final, keep)
    return final


def remove_leftovers(output_dir: str | Path) -> None:
    """Removes what an earlier process had half written or half removed. No other may be writing."""
    recover(output_dir)
    for path in Path(output_dir).glob(f".{_PREFIX}*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # a file or a link of that name; a folder is gone
            path.unlink()


def recover(output_dir: str | Path) -> None:
    """Gives a checkpoint its name back, if a run was killed while it put another in its place."""
    for path in Path(output_dir).glob(f".{_PREFIX}*{_REPLACED}"):
        whole = path.with_name(path.name[1:].removesuffix(_REPLACED))
        if not whole.exists():
            with suppress(OSError):  # another process of the same run was faster
                path.rename(whole)


def _replace(final: Path, partial: Path) -> None:
    """Gives a whole checkpoint its name, in place of one that has it.

    What has the name and is no checkpoint may be all that is left of one: it gets another name.
    """
    replaced = final.with_name(f".{final.name}{_REPLACED}")
    if is_whole(final):
        final.rename(replaced)
    elif os.path.lexists(final):
        kept = _free_name(final)
        final.rename(kept)
        warnings.warn(f"cppo: {final} was no whole checkpoint, it is now {kept}", stacklevel=3)
    try:
        partial.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _free_name(final: Path) -> Path:
    name, number = f"{final.name}.incomplete", 1
    while os.path.lexists(final.with_name(name)):
        number += 1
        name = f"{final.name}.incomplete-{number}"
    return final.with_name(name)


def _drop_old(folder: Path, written: Path, keep: int) -> None:
    whole = [(path, bool(summary.get("unfinished"))) for path, summary in _readable(folder)]
    newest = [path for path, is_unfinished in whole if not is_unfinished][-keep:]
    for path, _ in whole:
        if path not in (*newest, written, best_checkpoint(folder)):
            # Renamed first: a kill must not leave half of it under its name.
            hidden = path.with_name(f".{path.name}{PARTIAL}")
            path.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)
