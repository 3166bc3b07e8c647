"""Options of the rewards, checked with one wording."""

from __future__ import annotations

from typing import Any


def require(name: str, **checks: tuple[bool, str, Any]) -> None:
    """Raise ValueError for the first option of {name: (holds, expected, value)} that is wrong."""
    for option, (holds, expected, value) in checks.items():
        if not holds:
            raise ValueError(f"cppo.rewards.{name}: {option} must be {expected}, got {value!r}")


def is_count(value: Any) -> bool:
    """Whether a value is a whole number >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
