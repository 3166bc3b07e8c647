"""The user's own code, by its place: "my_reward.py:function", "package.module:function".

A file is relative to the working directory, and may import the files beside it. A module is found
as from a script, with the working directory on `sys.path`, but after everything installed: a file
of the user's named `json.py` or `datasets.py` never replaces the real module.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from cppo.options.values import suggestion

_FILES: dict[Path, ModuleType] = {}  # every file that was run, by its resolved path


def is_place(name: Any) -> bool:
    """Return whether a name in a configuration is a place, not the name of something shipped."""
    return isinstance(name, str) and (":" in name or name.endswith(".py"))


def load_object(place: str, what: str) -> Any:
    """Return the function, class or other callable at a place.

    Specification: "FILE.py:NAME" runs the file, only once even if it is named again or by another
    path. Its module has the file's name, with a number appended if another module has that name.
    "MODULE:NAME" imports the module. NAME may be dotted: "Rewards.exact".
    Args:
        place: where it is.
        what: what it is for, in messages: "reward".
    Raises: ValueError if the file, the module or the name does not exist (with the nearest that
        does), or if the code does not run (with file and line); TypeError if it is not callable.
    """
    source, _, name = place.rpartition(":")
    try:
        is_file = source.endswith(".py")
        if not source or not name or (source.startswith(".") and not is_file):
            hint = _file_hint(source) if source else ""
            raise _NotThere(f"it must be FILE.py:NAME or package.module:NAME{hint}")
        module = _run_file(source) if is_file else _import_module(source)
        found: Any = module
        for part in name.split("."):
            found = _attribute(found, part, source)
    except _NotThere as error:
        raise ValueError(f"cannot import the {what} {place!r}: {error}") from error.__cause__
    if not callable(found):
        shown = (repr(found).splitlines() or [""])[0]
        raise TypeError(f"the {what} {place!r} must be a function, got {shown:.80}")
    return found


class _NotThere(Exception):
    """Why there is nothing at a place, in words."""


def _run_file(name: str) -> ModuleType:
    path = Path(name).expanduser().resolve()
    if path in _FILES:
        return _FILES[path]
    if not path.is_file():
        beside = path.parent.glob("*.py") if path.parent.is_dir() else ()
        raise _NotThere(f"there is no file {path}{suggestion(path.name, (p.name for p in beside))}")
    for folder in (Path.cwd(), path.parent):
        _add_to_path(folder)
    module_name = next(name for name in _names(path) if _means(name, path))
    if module_name in sys.modules:
        return _FILES.setdefault(path, sys.modules[module_name])
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    # Before it runs, because dataclasses and pickle look a class up by its module's name.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        if isinstance(error, (Exception, SystemExit)):
            raise _NotThere(_words(error, path)) from error
        raise
    return _FILES.setdefault(path, module)


def _names(path: Path) -> Iterable[str]:
    """Names for the module of a file, the best first."""
    stem = re.sub(r"\W", "_", path.stem)
    return (stem if number == 1 else f"{stem}_{number}" for number in itertools.count(1))


def _means(name: str, path: Path) -> bool:
    """Whether a module's name is free or already belongs to this file."""
    module = sys.modules.get(name)
    if module is not None:
        origin = getattr(module, "__file__", None) or "built-in"
    else:
        spec = importlib.util.find_spec(name)
        origin = str(path) if spec is None else spec.origin or "namespace"
    return Path(origin).resolve() == path


def _import_module(name: str) -> ModuleType:
    try:
        is_installed = importlib.util.find_spec(name.partition(".")[0]) is not None
    except (ImportError, ValueError):  # a module that was made by hand
        is_installed = name.partition(".")[0] in sys.modules
    if not is_installed:
        _add_to_path(Path.cwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise _NotThere(
                f"there is no module {missing!r}, neither installed nor in the working directory "
                f"{Path.cwd()}{_file_hint(name)}"
            ) from error
        raise _NotThere(_words(error, None)) from error


def _add_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()


def _attribute(owner: Any, name: str, source: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError as error:
        named = getattr(owner, "__file__", None) or getattr(owner, "__name__", source)
        near = suggestion(name, (n for n in dir(owner) if callable(getattr(owner, n, None))))
        if not near and not source.endswith(".py"):
            near = _file_hint(source)
        raise _NotThere(f"{named} has no {name!r}{near}") from error


def _file_hint(module: str) -> str:
    """A hint where such a file exists: its suffix is missing, or a module hides it."""
    file = module if Path(f"{module}.py").is_file() else module.replace(".", "/")
    return f"; for the file write {file}.py:NAME" if Path(f"{file}.py").is_file() else ""


def _words(error: BaseException, path: Path | None) -> str:
    """What went wrong while a file or module ran, with the line of the user's code."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<frozen")
    ]
    own = [frame for frame in frames if path and Path(frame.filename) == path] or frames
    where = f"{own[-1].filename}, line {own[-1].lineno}: " if own else ""
    first = (str(error).splitlines() or [""])[0]
    return f"{where}{type(error).__name__}: {first}".rstrip(": ")
