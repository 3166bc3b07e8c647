"""The checks that options, ops, rewards and the command line share."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cppo.values import is_finite_number, is_number, nearest, one_of, suggestion, unknown


@pytest.mark.parametrize(
    "value, finite, number",
    [
        (0, True, True),
        (-1.5, True, True),
        (np.float32(2), True, True),
        (math.inf, False, True),
        (math.nan, False, True),
        (10**400, False, True),
        (True, False, False),
        ("1", False, False),
        (None, False, False),
        (1j, False, False),
    ],
)
def test_numbers(value: object, finite: bool, number: bool) -> None:
    assert (is_finite_number(value), is_number(value)) == (finite, number)


def test_words() -> None:
    assert one_of(("a", "b")) == "one of 'a', 'b'"
    assert nearest("acuracy", ["format", "accuracy"]) == "accuracy"
    assert nearest("length", ["format", "accuracy"]) is None
    assert suggestion("acuracy", ["accuracy"]) == "; did you mean 'accuracy'?"
    assert suggestion(3, ["accuracy"]) == ""
    words = "unknown reward 'acuracy'; did you mean 'accuracy'? (allowed: format, accuracy)"
    assert unknown("reward", "acuracy", iter(["format", "accuracy"])) == words
