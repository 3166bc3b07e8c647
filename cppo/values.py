"""Checks of values and words of messages that options, ops, rewards and the command line share."""

from __future__ import annotations

import difflib
import numbers
import sys
from collections.abc import Iterable
from typing import Any


def is_number(value: Any) -> bool:
    """Whether a value is a real number. True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_finite_number(value: Any) -> bool:
    """Whether a value is a real number that a float can hold; neither infinite nor NaN."""
    return is_number(value) and abs(value) <= sys.float_info.max


def one_of(choices: Iterable[str]) -> str:
    """The words "one of 'a', 'b'" for messages."""
    return "one of " + ", ".join(repr(choice) for choice in choices)


def nearest(name: Any, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is spelt most like `name`; None if none is alike.

    Args:
        cutoff: how alike they must be, in [0, 1]; as in `difflib.get_close_matches`.
    """
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)), None)


def suggestion(name: Any, known: Iterable[str]) -> str:
    """The words "; did you mean 'x'?" for a misspelt name, or an empty text."""
    close = nearest(name, known)
    return "" if close is None else f"; did you mean {close!r}?"


def unknown(what: str, name: Any, known: Iterable[str]) -> str:
    """The message for a name that is none of `known`, with the nearest one and all of them."""
    names = list(known)
    hint = suggestion(name, names)
    return f"unknown {what} {name!r}{hint} (allowed: {', '.join(names)})"
