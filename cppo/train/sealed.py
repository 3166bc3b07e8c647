"""What the files of a checkpoint must hold: written last, compared before anything is read.

`trainer.json` has the size and the checksum (XXH3, 128 bits) of every other file, and its own.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash

SUMMARY = "trainer.json"
_CHUNK = 1 << 22  # bytes that are read at a time for a checksum
# Suffixes of what transformers, peft and processors look for in a folder.
_LOADED = {".safetensors", ".bin", ".pt", ".pth", ".json", ".py", ".model", ".jinja"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read. The message names the file and a way out."""


def is_whole(path: Path) -> bool:
    """Whether a folder has the last file of a checkpoint. Raises CheckpointError if none can say.

    A folder that may not be entered is not passed over: it may be the newest one.
    """
    try:
        return (path / SUMMARY).is_file()
    except OSError as error:
        raise CheckpointError(f"cppo: {path} cannot be read ({error.strerror})") from error


def read_summary(path: str | Path) -> dict[str, Any]:
    """step, metric, options and files of a checkpoint, without loading tensors.

    Raises: CheckpointError if `path` is no checkpoint, or if its `trainer.json` is damaged.
    """
    file = Path(path) / SUMMARY
    if not is_whole(Path(path)):
        raise CheckpointError(f"cppo: {path} is not a checkpoint of cppo (it has no {SUMMARY})")
    try:
        summary = json.loads(file.read_bytes())
        whole = type(summary["step"]) is int and type(summary["metric"]) in (int, float, type(None))
        if "checksum" in summary or "files" in summary:
            whole = whole and summary.get("checksum") == _checksum(summary)
    except OSError as error:
        raise CheckpointError(f"cppo: {file} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"cppo: {file} is damaged: it is not what was written") from error
    if not whole:
        raise CheckpointError(f"cppo: {file} is damaged: it is not what was written")
    return summary


def read_tensors(file: Path) -> Any:
    """What `torch.save` wrote, and nothing that could run code. Raises CheckpointError."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises whatever its first wrong byte leads to
        raise CheckpointError(f"cppo: {file} cannot be read ({cause(error)})") from error


def write_tensors(value: Any, file: Path) -> None:
    """Writes what `read_tensors` reads. Raises CheckpointError."""
    try:
        torch.save(value, file)
    except Exception as error:  # torch raises several kinds of errors for a full disk
        words = cause(error, file.parent)
        raise CheckpointError(f"cppo: {file} could not be written ({words})") from error


def compare(path: Path, summary: dict[str, Any], contents: bool) -> None:
    """Raises CheckpointError for the first file that is not what a summary says of it.

    A file besides that a loader could take for one of them is refused, too.
    """
    files = summary.get("files", {})

    def damage(name: str) -> str | None:
        file, expected = path / name, files[name]
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                return f"{file} is damaged: {size} bytes, {expected['bytes']} in {SUMMARY}"
            if contents and _hash(file) != expected["checksum"]:
                return f"{file} is damaged: its checksum is not that in {SUMMARY}"
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
        return None

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(damage, sorted(files)):
            if found:
                raise CheckpointError(f"cppo: {found}")
    for file in sorted(path.rglob("*")) if files else ():
        name = file.relative_to(path).as_posix()
        if file.suffix.lower() in _LOADED and name not in (*files, SUMMARY):
            raise CheckpointError(
                f"cppo: {file} is not of this checkpoint ({SUMMARY} does not list it), and may be "
                "loaded in place of what is: move it elsewhere"
            )


def seal(folder: Path, summary: dict[str, Any]) -> None:
    """Flushes all files of a folder to disk, then writes its summary with what they hold."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as pool:  # a disk and a processor can work at the same time
        flushed = pool.map(flush, files)
        hashes = list(pool.map(_hash, files))
        list(flushed)
    held = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "checksum": digest}
        for path, digest in zip(files, hashes, strict=True)
    }
    summary = json.loads(json.dumps({**summary, "files": held}))
    sealed = json.dumps({**summary, "checksum": _checksum(summary)}, indent=1)
    (folder / SUMMARY).write_text(sealed + "\n")
    for path in (folder / SUMMARY, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush(path)


def flush(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _checksum(summary: dict[str, Any]) -> str:
    """The checksum of a summary's content but for itself, whatever its spaces and order."""
    content = {name: value for name, value in summary.items() if name != "checksum"}
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cause(error: Exception, folder: Path | None = None) -> str:
    """An error in a few words; with what is free in a folder, where it may be a full disk."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    words = f"{error}".strip().split("\n")[0] or type(error).__name__
    if folder is None or isinstance(error, CheckpointError) or not folder.is_dir():
        return words
    return f"{words}; {shutil.disk_usage(folder).free / 1e6:.3g} MB are free there"
