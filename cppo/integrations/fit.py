"""Whether the installed trainer is still what an adapter was written for, in words."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from typing import Any as AnyTrainer
else:
    AnyTrainer = object  # the base of a mixin: whatever trainer it is put before


class Fit(NamedTuple):
    """Whether one part of an adapter fits the installed trainer, and why."""

    part: str
    fits: bool
    why: str

    def __str__(self) -> str:
        return f"{self.part}: {'fits' if self.fits else 'does not fit'} ({self.why})"


def installed(package: str) -> tuple[str, tuple[int, ...]]:
    """Return a package's version and its first two numbers; "" and () if it is not installed."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "", ()
    return version, tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def parameters(function: Any) -> list[str]:
    """Return the names of a function's parameters; none if there is no function."""
    return list(inspect.signature(function).parameters) if function else []


def mismatch(function: Any, wanted: str) -> str:
    """Return how a function's first parameters differ from those wanted, "" if they do not.

    Args: wanted: names, separated by spaces.
    """
    found, names = parameters(function), wanted.split()
    return "" if found[: len(names)] == names else f"expected ({wanted}), found ({' '.join(found)})"
