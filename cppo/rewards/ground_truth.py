"""The ground truth of a row: the answers that are accepted, each as a string."""

from __future__ import annotations

import math
import numbers
from collections.abc import Set
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np


def accepted_answers(value: Any) -> list[str]:
    """Return the answers that a row's ground truth accepts, in order, as stripped strings.

    Args:
        value: a string; an int, float, Decimal, Fraction or a number of NumPy; or several of these
            in a list, tuple, set or one-dimensional array, of which any one is right. A whole float
            is accepted as "3" and as "3.0", another float with the 15 digits that it is good for;
            a shorter float of NumPy is read as `widened` reads it.
    Returns: at least one string, none of them blank.
    Raises: ValueError for everything else: None, blank text, NaN and infinities, dictionaries,
        nested or empty lists, bytes. A bool is refused because nothing says whether a completion
        has to write "True", "true" or "yes": the row should hold that word. The message is the
        predicate of a sentence whose subject is the row: `f"row {row} {error}"`.
    """
    if isinstance(value, str) or not _is_collection(value):
        return _spellings(value, value)
    entries = list(value)
    if not entries:
        raise ValueError(f"has no ground truth, got {value!r}")
    found = [spelling for entry in entries for spelling in _spellings(entry, value)]
    return list(dict.fromkeys(found))


def widened(number: Any) -> float:
    """Return the double that a float of 16 or 32 bits stands for: 0.1, 1/3.

    That is its own shortest decimal; or, if that is as long as the type allows, the simplest
    fraction that is stored as the same float.
    """
    kind = type(number)
    digits = str(number).partition("e")[0].replace(".", "").strip("-0")
    if float(number).is_integer():
        return float(number)
    if len(digits) > np.finfo(kind).precision:
        for most in (10, int(float(np.finfo(kind).eps) ** -0.4)):
            simple = Fraction(float(number)).limit_denominator(most)
            if kind(float(simple)) == number:
                return float(simple)
    return float(str(number))


def _is_collection(value: Any) -> bool:
    if isinstance(value, (list, tuple, Set)):
        return True
    return hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0


def _spellings(entry: Any, value: Any) -> list[str]:
    """The spellings of one accepted answer of the ground truth `value`."""
    if isinstance(entry, str):
        if not entry.strip():
            raise ValueError(f"has no ground truth, got {value!r}")
        return [entry.strip()]
    if hasattr(entry, "__array__") and getattr(entry, "ndim", None) == 0:
        entry = np.asarray(entry)[()]  # an array or tensor without axes holds one value
    if entry is None:
        raise ValueError(f"has no ground truth, got {value!r}")
    if isinstance(entry, Decimal) and entry.is_finite():
        return [str(entry)]
    if isinstance(entry, np.floating) and np.isfinite(entry) and entry.dtype.itemsize < 8:
        entry = widened(entry)
    if isinstance(entry, numbers.Rational) and not isinstance(entry, bool):
        return [str(entry)]
    if isinstance(entry, numbers.Real) and not isinstance(entry, bool):
        number = float(entry)
        if number.is_integer() and abs(number) < 2**53:
            return [str(int(number)), f"{int(number)}.0"]
        if math.isfinite(number):
            return [f"{entry:.15g}" if isinstance(entry, float) else str(entry)]
    raise ValueError(
        "has a ground truth that is not a string, a finite number or a list of these, "
        f"got {value!r:.200}"
    )
