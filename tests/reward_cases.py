"""What the tests of rewards share: one completion's reward, and cases written side by side."""

from __future__ import annotations

from typing import Any

import pytest

from cppo import rewards


def one(function: Any, completion: Any, gold: Any = "42", **columns: Any) -> Any:
    """The reward of a single completion."""
    (reward,) = function([completion], prompts=["?"], answer=[gold], **columns)
    assert reward is None or type(reward) is float
    return reward


def reward_of(name: str) -> Any:
    """The reward of a name; the test is skipped where its package is not installed."""
    if name.startswith("math"):
        pytest.importorskip("math_verify", reason="the extra 'math' is not installed")
    return getattr(rewards, name)


def spread(table: dict[Any, str]) -> list[tuple[Any, ...]]:
    """The cases of {what is expected: "text ; text"}: (text, *expected)."""
    cases = []
    for expected, texts in table.items():
        rest = expected if isinstance(expected, tuple) else (expected,)
        cases += [(text, *rest) for text in texts.split(" ; ")]
    return cases


def pairs(table: dict[Any, str]) -> list[tuple[str, str, Any]]:
    """The cases of {expected: "answer ~ gold ; answer ~ gold"}: (answer, gold, expected)."""
    return [
        (*case.split(" ~ "), expected)
        for expected, cases in table.items()
        for case in cases.split(" ; ")
    ]
