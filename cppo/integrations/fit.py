"""How an adapter says what of the trainer it adapts still is what it was written for."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple


class Fit(NamedTuple):
    """Whether one part of an adapter fits the installed trainer, and why."""

    part: str
    fits: bool
    why: str

    def __str__(self) -> str:
        return f"{self.part}: {'fits' if self.fits else 'does not fit'} ({self.why})"


def parameters(function: Any) -> list[str]:
    """Names of the parameters of a function; none if there is no function."""
    return list(inspect.signature(function).parameters) if function else []
