"""How an adapter says what of the trainer it adapts still is what it was written for."""

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
    """Version of a package and its first two numbers; "" and none if it is not installed."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "", ()
    return version, tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def parameters(function: Any) -> list[str]:
    """Names of the parameters of a function; none if there is no function."""
    return list(inspect.signature(function).parameters) if function else []
