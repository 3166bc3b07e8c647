"""What a run is trained on, in words that a resumed run can compare.

A checkpoint holds the position in the data set but none of its rows. The fingerprints are stored
with its options, so that a run which resumes with other rows or other rewards is refused.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import inspect
import re
import sys
import sysconfig
import uuid
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePath
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
    except Exception as error:  # of other people's code, whose words may hold an address
        return type(error).__name__


def _bytes(value: Any) -> bytes:
    """Of a picture or an array; of a picture that cannot be decoded, why."""
    try:
        found: bytes = value.tobytes()
        return found
    except Exception as error:  # the run says it of the row, or may leave it out
        return type(error).__name__.encode()


def _has_pictures(row: Any) -> bool:
    return isinstance(row, Mapping) and any(row.get(name) is not None for name in _PICTURES)


_PICTURES = ("image", "images")


def of_function(function: Any) -> str:
    """Where a reward function comes from, what it was made with, and a digest of both.

    What it was made with are the arguments of a partial, the attributes of an object, closed-over
    variables, defaults, and the globals, functions and classes that it names, followed through all
    files of one's own. Of installed packages only names count, and of cppo's own functions, which
    may get better between two versions. State that a function changes while it runs counts as it
    is when the run begins.
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
    if function is kind and is_ours(kind):
        return name
    digest = _Digest(of_code=True)
    digest.add(function)
    return f"{name}{fixed}, digest {digest.text}"


def is_ours(function: Any) -> bool:
    """Whether a function, or the one inside a partial, or an object's class, ships here."""
    inner = function.func if isinstance(function, functools.partial) else function
    kind = inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner)
    return (getattr(kind, "__module__", "") or "").split(".")[0] == "cppo"


def of_text(text: Any) -> str:
    """A digest of a long text, such as a chat template."""
    return f"digest {hashlib.sha256(repr(text).encode()).hexdigest()[:12]}"


def words(value: Any) -> str:
    """A value for people: its `repr`, or where that may hold an address, its type's name."""
    if not _is_plain(value):
        return getattr(value, "__name__", type(value).__name__)
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(words, value))) + "}"
    if isinstance(value, float) and value.is_integer():
        return repr(int(value))  # 1.0 and 1 are one argument
    return repr(value)


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
    """A digest of values that is the same in every process.

    Args:
        of_code: whether the values are those of a function, for which 1 and 1.0 are the same.
    """

    def __init__(self, *, of_code: bool = False) -> None:
        self._hash = hashlib.sha256()
        self._of_code = of_code
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # so that no id is given twice

    @property
    def text(self) -> str:
        return self._hash.hexdigest()[:12]

    def add(self, value: Any, depth: int = 0) -> None:
        """Adds a value and what it holds; of an object its type and its attributes."""
        if isinstance(value, _PLAIN):
            is_number = self._of_code and isinstance(value, float)
            is_number = is_number or (self._of_code and type(value) is int)
            self._mark(words(value) if is_number else f"{type(value).__qualname__} {value!r}")
        elif isinstance(value, re.Pattern):
            self._mark(f"pattern {value.pattern!r} {value.flags}")
        elif isinstance(value, Mapping):
            self._mark(f"mapping {len(value)}")
            for key in sorted(value, key=words):
                self.add(key, depth)
                self.add(value[key], depth)
        elif isinstance(value, (list, tuple)):
            self._mark(f"sequence {len(value)}")
            for entry in value:
                self.add(entry, depth)
        elif isinstance(value, (set, frozenset)):
            self._mark(f"set {sorted(map(words, value))}")
        elif isinstance(value, torch.Tensor):
            self._mark(f"{value.dtype} {tuple(value.shape)}")
            flat = value.detach().reshape(-1)
            self.add(flat[:: max(1, len(flat) // _ENTRIES)].double().cpu().numpy(), depth)
        elif getattr(getattr(value, "dtype", None), "hasobject", False):  # as pandas reads lists
            # Its bytes are addresses in memory.
            self.add(value.tolist(), depth)
        elif hasattr(value, "tobytes"):  # a PIL image or a numpy array
            looks = [getattr(value, name, "") for name in ("dtype", "shape", "size", "mode")]
            self._mark(f"bytes {looks}")
            self._hash.update(_bytes(value))
        elif id(value) not in self._seen:
            self._seen.add(id(value))
            self._alive.append(value)
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
        elif inspect.isclass(value):
            self._add_class(value, depth)
        elif inspect.isroutine(value) or inspect.ismodule(value):
            self._mark(getattr(value, "__qualname__", value.__name__))
        elif inspect.isfunction(inner := getattr(value, "__wrapped__", None)):  # of lru_cache
            self.add(inner, depth)
        else:
            self.add(type(value), depth)
            if depth < _DEPTH:
                self.add(_attributes(value), depth + 1)

    def _add_class(self, kind: type, depth: int) -> None:
        self._mark(kind.__qualname__)
        if _is_installed(kind):
            return
        self._mark(_source(kind))
        for base in kind.__bases__:
            self.add(base, depth)
        for part in vars(kind).values():
            part = getattr(part, "__func__", getattr(part, "fget", part))
            if inspect.isfunction(part):
                self.add(part, depth)

    def _add_function(self, function: Any, depth: int) -> None:
        self._mark(function.__qualname__)
        for cell in function.__closure__ or ():
            for value in _content(cell):
                self.add(value, depth)
        if _is_installed(function):
            return
        code = function.__code__
        for part in (function.__defaults__, function.__kwdefaults__, vars(function)):
            self.add(part, depth)
        self._mark(_source(function))
        if function.__name__ == "<lambda>":  # its line may hold another one
            self._hash.update(code.co_code)
            self._mark(f"{code.co_names} {[c for c in code.co_consts if _is_plain(c)]}")
        for name in _names(code):
            if name in function.__globals__:
                self.add(function.__globals__[name], depth)


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds, in its dictionary and in its slots."""
    slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ())]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return found | dict(getattr(value, "__dict__", {}))


def _names(code: Any) -> list[str]:
    """Globals that a function and the functions inside it name."""
    inner = [part for part in code.co_consts if inspect.iscode(part)]
    return list(dict.fromkeys([*code.co_names, *(name for part in inner for name in _names(part))]))


def _content(cell: Any) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # empty: the function has not come so far
        return []


def _is_installed(value: Any) -> bool:
    """Whether a function or a class is of cppo, of Python or of an installed package."""
    module = value.__module__ or ""
    if module.split(".")[0] in ("cppo", "builtins"):
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:  # of an interpreter, or made by exec
        return module in sys.builtin_module_names
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(Path(file).is_relative_to(folder) for folder in folders if folder)


def _source(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):  # typed into an interpreter, or built in
        return ""
