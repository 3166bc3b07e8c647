"""What a run is trained on, in words that a resumed run can compare.

A checkpoint knows the position in the data set and nothing of its rows. The fingerprints stand
among its options, so that a run which goes on with other rows or other rewards is refused.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import inspect
import uuid
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import Any

import torch

from cppo.questions.stream import Dataset

# Rows that are looked at, spread evenly from first to last: reading pictures takes time.
_ROWS = 20_000
_ROWS_WITH_PICTURES = 256
_DEPTH = 2  # of objects in objects: what a client of a server holds changes by itself
_ENTRIES = 1 << 16  # of a larger tensor as many are looked at, spread evenly


def of_dataset(dataset: Dataset) -> str:
    """The number of rows and a digest of them: of all up to 20,000, of 256 if they have pictures.

    Of larger data sets as many are looked at, spread evenly from first to last.
    """
    count = len(dataset)
    limit = _ROWS_WITH_PICTURES if count and _has_pictures(_row(dataset, 0)) else _ROWS
    sample = min(count, limit)
    digest = _Digest()
    for place in (i * (count - 1) // max(sample - 1, 1) for i in range(sample)):
        digest.add(_row(dataset, place))
    return f"{count} rows, digest {digest.text}"


def _row(dataset: Dataset, place: int) -> Any:
    try:
        return dataset[place]
    except ValueError as error:  # a row that cannot be read, which the run may leave out
        return str(error)


def _has_pictures(row: Any) -> bool:
    return isinstance(row, Mapping) and any(row.get(name) is not None for name in _PICTURES)


_PICTURES = ("image", "images")


def of_function(function: Any) -> str:
    """Where a reward function comes from, what it was made with, and a digest of both.

    What it was made with are the arguments of a partial, the attributes of an object, closed-over
    variables and defaults, and of its own file the constants and functions that it names. The
    source of cppo's own functions is not looked at: they may get better between two versions.
    """
    fixed = ""
    if isinstance(function, functools.partial):
        arguments = [words(value) for value in function.args]
        arguments += [f"{key}={words(value)}" for key, value in function.keywords.items()]
        fixed = f"({', '.join(arguments)})"
    elif dataclasses.is_dataclass(function):
        fields = ((f.name, getattr(function, f.name)) for f in dataclasses.fields(function))
        fixed = f"({', '.join(f'{name}={words(value)}' for name, value in fields)})"
    inner = function.func if isinstance(function, functools.partial) else function
    kind = inner if inspect.isroutine(inner) else type(inner)
    name = f"{kind.__module__ or ''}:{kind.__qualname__}"  # no module: made by exec
    if _is_ours(kind):
        return name + fixed
    digest = _Digest()
    digest.add(function)
    return f"{name}{fixed}, digest {digest.text}"


def of_text(text: Any) -> str:
    """A digest of a long text, such as a chat template."""
    return f"digest {hashlib.sha256(repr(text).encode()).hexdigest()[:12]}"


def words(value: Any) -> str:
    """A value for people: its `repr`, or where that may hold an address, its type's name."""
    return repr(value) if _is_plain(value) else getattr(value, "__name__", type(value).__name__)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(entry) for key, entry in value.items())
    return isinstance(value, _PLAIN)


_PLAIN = (
    *(str, bytes, bytearray, bool, int, float, complex, type(None), type(Ellipsis), range),
    *(Decimal, Fraction, datetime.date, datetime.time, datetime.timedelta, uuid.UUID, PurePath),
)


class _Digest:
    """A digest of values that is the same in every process."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen: set[int] = set()

    @property
    def text(self) -> str:
        return self._hash.hexdigest()[:12]

    def add(self, value: Any, depth: int = 0) -> None:
        """Adds a value and what it holds; of an object its type and its attributes."""
        if isinstance(value, _PLAIN):
            self._mark(f"{type(value).__qualname__} {value!r}")
        elif isinstance(value, Mapping):
            self._mark(f"mapping {len(value)}")
            for key in sorted(value, key=repr):
                self.add(key, depth)
                self.add(value[key], depth)
        elif isinstance(value, (list, tuple)):
            self._mark(f"sequence {len(value)}")
            for entry in value:
                self.add(entry, depth)
        elif isinstance(value, (set, frozenset)):
            self._mark(f"set {sorted(map(repr, value))}")
        elif isinstance(value, torch.Tensor):
            self._mark(f"{value.dtype} {tuple(value.shape)}")
            flat = value.detach().reshape(-1)
            self.add(flat[:: max(1, len(flat) // _ENTRIES)].double().cpu().numpy(), depth)
        elif hasattr(value, "tobytes"):  # a PIL image or a numpy array
            looks = [getattr(value, name, "") for name in ("dtype", "shape", "size", "mode")]
            self._mark(f"bytes {looks}")
            self._hash.update(value.tobytes())
        elif id(value) not in self._seen:
            self._seen.add(id(value))
            self._add_object(value, depth)

    def _mark(self, text: str) -> None:
        self._hash.update(text.encode(errors="surrogatepass") + b"\0")

    def _add_object(self, value: Any, depth: int) -> None:
        if isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.add(part, depth)
        elif inspect.ismethod(value):
            self.add(value.__func__, depth)
            self.add(value.__self__, depth)
        elif inspect.isfunction(value):
            self._add_function(value, depth)
        elif inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
            self._mark(getattr(value, "__qualname__", value.__name__))
            if inspect.isclass(value) and not _is_ours(value):
                self._mark(_source(value))
        else:
            self._mark(type(value).__qualname__)
            if not _is_ours(type(value)):
                self._mark(_source(type(value)))
            if depth < _DEPTH:
                self.add(getattr(value, "__dict__", {}), depth + 1)

    def _add_function(self, function: Any, depth: int) -> None:
        self._mark(function.__qualname__)
        code = function.__code__
        cells = [value for cell in function.__closure__ or () for value in _content(cell)]
        for part in (cells, function.__defaults__, function.__kwdefaults__):
            self.add(part, depth)
        if _is_ours(function):
            return
        self._mark(_source(function))
        if function.__name__ == "<lambda>":  # its line may hold another one
            self._hash.update(code.co_code)
            self._mark(f"{code.co_names} {[c for c in code.co_consts if _is_plain(c)]}")
        for name in _names(code):
            value = function.__globals__.get(name)
            if _is_plain(value) or getattr(value, "__module__", None) == function.__module__:
                self.add(value, depth)


def _names(code: Any) -> list[str]:
    """Globals that a function and the functions inside it name."""
    inner = [part for part in code.co_consts if inspect.iscode(part)]
    return list(dict.fromkeys([*code.co_names, *(name for part in inner for name in _names(part))]))


def _content(cell: Any) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # empty: the function has not come so far
        return []


def _is_ours(value: Any) -> bool:
    return (value.__module__ or "").split(".")[0] == "cppo"


def _source(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):  # typed into an interpreter, or built in
        return ""
