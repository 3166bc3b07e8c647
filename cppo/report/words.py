"""Numbers, times and options as people read them."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any

from cppo.options.values import is_finite_number

NOTHING = "\u2013"
_LARGEST = 1e100  # what a chart can still place


def finite(value: Any) -> float | None:
    """A value of a row as a float; None for what is no number that can be drawn."""
    if not is_finite_number(value) or abs(value) > _LARGEST:
        return None
    return float(value)


def number(value: float) -> str:
    """Three digits, and all of those before the point: "0.378", "1,234"."""
    if abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(value: float) -> str:
    """A share in percent: "78.3 %", "0.39 %"."""
    if abs(value) >= 10:
        return f"{100 * value:,.0f} %"
    return f"{100 * value:.{3 if abs(value) >= 0.1 else 2}g} %"


def points(change: float) -> str:
    """The difference of two shares: "+12.5 points"."""
    return f"{100 * change:+.1f} points"


def duration(seconds: float) -> str:
    """A length of time in its two largest units: "3 min 12 s"."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    for small, large, size in (("s", "min", 60), ("min", "h", 60), ("h", "d", 24)):
        if whole < size:
            return f"{whole} {small}"
        rest, upper = whole % size, whole // size
        if large == "d" or upper < {"min": 60, "h": 24}[large]:
            return f"{upper:,} {large} {rest} {small}" if rest else f"{upper:,} {large}"
        whole = upper
    return f"{whole} d"


def moment(text: Any) -> str:
    """An ISO time as "29 Nov 2026, 06:12"; what is none stays as it is."""
    try:
        at = datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return NOTHING if text is None else str(text)
    return f"{at.day} {at:%b %Y, %H:%M}"


def now() -> str:
    """This moment in ISO form, with the offset of its time zone."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def count(value: int, what: str) -> str:
    """ "1 step", "12 steps"."""
    return f"{value:,} {what}" if value == 1 else f"{value:,} {what}s"


def option(value: Any) -> str:
    """The value of an option as it is written in YAML."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(option, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {option(one)}" for key, one in value.items()) + "}"
    return str(value)


def flat(options: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def axis_of_time(longest: float) -> tuple[float, str]:
    """What seconds are divided by on an axis up to `longest`, and the name of the unit."""
    if longest < 180:
        return 1.0, "seconds"
    return (60.0, "minutes") if longest < 180 * 60 else (3600.0, "hours")


def mean(values: list[float]) -> float:
    """The mean of at least one value."""
    return math.fsum(values) / len(values)
