"""An output folder holds one run, and one process at a time writes into it."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from cppo.options.trainer import WRITTEN_BY_A_RUN
from cppo.train.checkpoint import (
    PARTIAL,
    check_files,
    checkpoints,
    last_checkpoint,
    recover,
    remove_leftovers,
    step_of,
)

_LOCK = ".lock"
# What a run, its evaluations and its report write beside the checkpoints; the tracker's files are
# those of TensorBoard, the one tracker that writes into the output folder.
_WRITTEN = (
    *("metrics.jsonl", "completions.jsonl", "held_out.jsonl", "run.jsonl"),
    *("metrics.partial", "completions.partial", "held_out.partial", "run.partial"),
    *("config.yaml", "eval.csv", "summary.json", "report.html", "report.partial"),
    *("predictions_*.jsonl", "predictions_*.jsonl.partial", "predictions_*.jsonl.new"),
    *("cppo/**/events.out.tfevents.*", "cppo/**/hparams.yml"),
    ".checkpoint-*.partial",
)


@dataclass(frozen=True)
class Claim:
    """What `claim_output_dir` decided; of several processes the first alone carries it out.

    start: the checkpoint to go on from; None for a fresh start. old: what `clear` removes, nothing
    but what an earlier run wrote.
    """

    folder: Path
    start: Path | None = None
    old: tuple[Path, ...] = ()

    def lock(self) -> Callable[[], None]:
        """Locks the folder for the caller.

        Returns: what ends the lock, and nobody else's.
        Raises: ValueError if another run writes there, be it of this process, or if the folder
            cannot be written.
        """
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            return _lock(self.folder)

    def clear(self) -> None:
        """Removes the earlier run's files, and what was half written when it was killed."""
        with writing_to(self.folder):
            remove_leftovers(self.folder)
            for path in (*self.old, *self.folder.glob(f".journal-*{PARTIAL}")):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns what a disk or its rights refuse into a ValueError that names the folder."""
    try:
        yield
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        raise ValueError(
            f"cppo: output_dir {folder} cannot be written to ({error.strerror}{name})"
        ) from error


def claim_output_dir(
    output_dir: str | Path,
    resume_from: str | Path | None = None,
    *,
    overwrite: bool = False,
    needed: Sequence[str | Path] = (),
    writes_config: bool = False,
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
        writes_config: whether the run will write a config.yaml; one of the user's own is kept.
        ways: what the user can do about a refusal, in the words of the caller.
    Returns: where to start, and what to remove before anything is written.
    Raises: ValueError if `output_dir` is a file or holds a run (a checkpoint, or rows in
        metrics.jsonl) that would go on beside the new one, if `resume_from` is no checkpoint, or
        if `overwrite` would remove something `needed`; if something there cannot be read.
    """
    folder = Path(output_dir)
    with writing_to(folder):
        return _claim(folder, resume_from, overwrite, needed, writes_config, ways)


def _claim(
    folder: Path,
    resume_from: str | Path | None,
    overwrite: bool,
    needed: Sequence[str | Path],
    writes_config: bool,
    ways: str,
) -> Claim:
    recover(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cppo: output_dir must be a folder, got the file {folder}")
    start = last_checkpoint(folder) if resume_from == "auto" else resume_from
    start = None if start is None else Path(start)
    if start is not None:
        step = check_files(start, contents=False)["step"]
    there, found = checkpoints(folder), ""
    if start is not None and start.resolve().parent == folder.resolve():
        old = [path for path in there if (step_of(path) or 0) > step]
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
        if writes_config and start is None:
            _check_config(folder / "config.yaml")
        return Claim(folder, start)
    if overwrite:
        lost = {path.resolve() for path in old}
        for name in needed:
            if lost & {Path(name).resolve(), *Path(name).resolve().parents}:
                raise ValueError(f"cppo: {name} is needed, overwriting {folder} would remove it")
        return Claim(folder, start, tuple(old))
    if resume_from == "auto" and start is None:
        return Claim(folder)  # the run that ended before its first checkpoint begins again
    raise ValueError(f"cppo: output_dir {folder} already holds {found}: {ways}")


def _check_config(path: Path) -> None:
    """Raises ValueError for a config.yaml that no run has written."""
    if path.exists() and not path.read_text(errors="replace").startswith(WRITTEN_BY_A_RUN):
        raise ValueError(
            f"cppo: {path} is a configuration of your own, in whose place the run would write its "
            "own: choose another trainer.output_dir, or give the file another name"
        )


# The lock: `flock` belongs to the open file. This process may open and close it once more, as a
# copy of the folder does; and the lock ends with the process.

_HELD: dict[Path, int] = {}
_GUARD = threading.Lock()


def _lock(folder: Path) -> Callable[[], None]:
    """Takes the lock; returns what ends it. Raises ValueError if it is taken."""
    key = folder.resolve()
    with _GUARD:
        # On some network disks a lock belongs to the process, and ends if it opens the file again.
        if key in _HELD:
            raise _in_use(folder, f"process {os.getpid()}, which is this one")
        file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 1000).decode(errors="replace").strip()
            os.close(file)
            raise _in_use(folder, holder or "another process") from None
        except OSError:  # a file system without locks: the claim alone must do
            pass
        _HELD[key] = file
    words = f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n"
    with suppress(OSError):  # of a full disk: the lock is held without its holder's name
        os.ftruncate(file, 0)
        os.write(file, words.encode())
    return partial(_release, key, file)


def has_lock(folder: Path) -> bool:
    """Whether the lock's file is there; it goes with a folder that somebody removes."""
    return (folder / _LOCK).exists()


def is_in_use(folder: Path) -> bool:
    """Whether a run writes into a folder now; where there are no locks, whether it says so."""
    if folder.resolve() in _HELD:
        return True
    try:
        # The name of a holder stays after one that was killed, and goes with a copy of the folder.
        with (folder / _LOCK).open("rb") as file:
            if not file.read(1) or fcntl is None:
                return file.tell() > 0
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or none that may be read
        pass
    return False


def _in_use(folder: Path, holder: str) -> ValueError:
    return ValueError(
        f"cppo: output_dir {folder} is in use by {holder}: wait for its end, or choose another "
        "folder"
    )


def _release(key: Path, file: int) -> None:
    with _GUARD:
        if _HELD.get(key) != file:  # in a forked child, whose parent holds it
            return
        del _HELD[key]
        with suppress(OSError):
            os.ftruncate(file, 0)
        os.close(file)


def _forget() -> None:
    """In a forked child, which with the file open would hold the lock beyond its parent's end."""
    global _GUARD
    _GUARD = threading.Lock()  # another thread may have held it
    for file in _HELD.values():
        os.close(file)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
