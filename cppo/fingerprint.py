"""What a run is trained on, in words that a resumed run can compare.

A checkpoint knows the position in the data set and nothing of its rows. The fingerprints stand
among its options, so that a run which goes on with other rows or other rewards is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

from cppo.questions.stream import Dataset

_SAMPLED_ROWS = 64


def of_dataset(dataset: Dataset) -> str:
    """The number of rows and a digest of up to 64 of them, spread evenly from first to last."""
    count = len(dataset)
    sample = min(count, _SAMPLED_ROWS)
    places = [i * (count - 1) // max(sample - 1, 1) for i in range(sample)]
    digest = hashlib.sha256()
    for place in places:
        try:
            row = dataset[place]
        except ValueError as error:  # a row that cannot be read, which the run may leave out
            row = str(error)
        _add(digest, row)
    return f"{count} rows, digest {digest.hexdigest()[:12]}"


def of_function(function: Any) -> str:
    """Where a reward function comes from, what it was made with, and a digest of its source.

    The source of cppo's own functions is not looked at: they may get better between two versions.
    """
    fixed = ""
    if isinstance(function, functools.partial):
        fixed = f"{function.args!r}{function.keywords!r}"
        function = function.func
    kind = function if inspect.isroutine(function) else type(function)
    module = kind.__module__ or ""  # of a function made by exec
    name = f"{module}:{kind.__qualname__}"
    if dataclasses.is_dataclass(function):
        fixed += repr(function)
    if module.split(".")[0] == "cppo":
        return name + fixed
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # typed into an interpreter, or built in
        return name + fixed
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    return f"{name}{fixed}, source {digest}"


def of_text(text: Any) -> str:
    """A digest of a long text, such as a chat template."""
    return f"digest {hashlib.sha256(repr(text).encode()).hexdigest()[:12]}"


def _add(digest: Any, value: Any) -> None:
    """Adds a value of a row: nested mappings and sequences, numbers, texts, bytes, pictures."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _add(digest, str(key))
            _add(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for entry in value:
            _add(digest, entry)
    elif isinstance(value, (bytes, bytearray)):
        digest.update(value)
    elif hasattr(value, "tobytes"):  # a PIL image or a numpy array
        digest.update(f"{getattr(value, 'size', '')}{getattr(value, 'mode', '')}".encode())
        digest.update(value.tobytes())
    else:
        # The address of an object would differ in the next process.
        plain = isinstance(value, (str, int, float, bool, type(None)))
        digest.update((repr(value) if plain else type(value).__qualname__).encode())
    digest.update(b"\0")
