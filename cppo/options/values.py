"""Checks of values, and wording of messages, for options, ops, rewards and the command line."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from typing import Any, Self

from cppo.options import foreign_names


def is_number(value: Any) -> bool:
    """Whether a value is a real number. True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_finite_number(value: Any) -> bool:
    """Whether a value is a real number that a float can hold; neither infinite nor NaN."""
    if not is_number(value):
        return False
    plain = value if isinstance(value, (int, float)) else float(value)
    # Comparisons, unlike math.isfinite, take an integer of any size, and torch.compile traces them.
    return abs(plain) <= sys.float_info.max


def one_of(choices: Iterable[str]) -> str:
    """The words "one of 'a', 'b'" for messages."""
    return "one of " + ", ".join(repr(choice) for choice in choices)


def nearest(name: Any, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is spelt most like `name`, whatever its capitals; None if none is alike.

    Args:
        cutoff: how alike they must be, in [0, 1]; as in `difflib.get_close_matches`.
    """
    names = {one.lower(): one for one in reversed([*known])}
    close = difflib.get_close_matches(str(name).lower(), list(names), n=1, cutoff=cutoff)
    return names[close[0]] if close else None


def suggestion(name: Any, known: Iterable[str]) -> str:
    """The words "; did you mean 'x'?" for a misspelt name, or an empty text."""
    close = nearest(name, known)
    return "" if close is None else f"; did you mean {close!r}?"


def unknown(what: str, name: Any, known: Iterable[str]) -> str:
    """The message for a name that is none of `known`, with the nearest one and all of them."""
    names = list(known)
    hint = suggestion(name, names)
    return f"unknown {what} {name!r}{hint} (allowed: {', '.join(names)})"


def _plain(value: Any) -> Any:
    """A list as a tuple, and a scalar of NumPy or torch as Python's own number."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if isinstance(value, (int, float, str, type(None))):  # first: torch.compile asks no further
        return value
    return value.item() if getattr(value, "shape", None) == () else value


def _meant(cls: Any, name: str, value: Any) -> str:
    """What an option is called that `cls` does not have: words that follow a message."""
    if found := foreign_names.answer(name, value):
        ours = found[1].replace("trainer.loss.", "LossConfig.")
        return "; " + ours.replace("trainer.", "CPPOConfig.")
    for one in fields(cls):
        inner = one.default_factory
        if inner is not MISSING and hasattr(inner(), name):
            return f"; it is one of {cls.__name__}.{one.name}, a {type(inner()).__name__}"
    return suggestion(name, [one.name for one in fields(cls)])


class CheckedFields:
    """A frozen dataclass whose errors name the class, the field, what is allowed and what came."""

    def __new__(cls, *_: Any, **options: Any) -> Self:
        # Python's own error would name neither our word for it nor one that is spelt alike.
        for name, value in options.items():
            if name not in cls.__dataclass_fields__:  # type: ignore[attr-defined]
                raise TypeError(f"{cls.__name__} has no option {name!r}{_meant(cls, name, value)}")
        return super().__new__(cls)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _take_plain(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]
            self._set(one.name, _plain(getattr(self, one.name)))

    def _fail(self, name: str, expected: str) -> None:
        value = getattr(self, name)
        raise ValueError(f"{type(self).__name__}.{name} must be {expected}, got {value!r}")

    def _one_of(self, name: str, choices: Sequence[str]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in choices:
            self._fail(name, one_of(choices))

    def _number(
        self,
        *names: str,
        at_least: float = -math.inf,
        above: float = -math.inf,
        at_most: float = math.inf,
        below: float = math.inf,
    ) -> None:
        for name in names:
            value = getattr(self, name)
            if is_finite_number(value) and at_least <= value <= at_most and above < value < below:
                continue
            bounds = ((">=", at_least), (">", above), ("<=", at_most), ("<", below))
            words = [f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound)]
            self._fail(name, "a number " + " and ".join(words))

    def _integer(self, *names: str, at_least: int) -> None:
        for name in names:
            value = getattr(self, name)
            is_one = hasattr(value, "__index__") and not isinstance(value, bool)
            if not is_one or operator.index(value) < at_least:
                self._fail(name, f"an integer >= {at_least}")
            if operator.index(value) >= 2**63:  # torch has 64 bits for them
                self._fail(name, f"an integer >= {at_least} and < 2**63")
            self._set(name, operator.index(value))

    def _boolean(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                self._fail(name, "true or false")
