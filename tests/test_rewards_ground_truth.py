"""What a row may hold as its ground truth, and in which words anything else is refused."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from cppo.rewards.ground_truth import accepted_answers


@pytest.mark.parametrize(
    ("value", "accepted"),
    [
        ("4", ["4"]),
        (" two words\n", ["two words"]),
        (np.str_("x"), ["x"]),
        (4, ["4"]),
        (-3, ["-3"]),
        (2**70, ["1180591620717411303424"]),
        (4.0, ["4", "4.0"]),
        (np.float32(4), ["4", "4.0"]),
        (-0.0, ["0", "0.0"]),
        (0.1 + 0.2, ["0.3"]),
        (1 / 3, ["0.333333333333333"]),
        (1e22, ["1e+22"]),
        (np.int64(7), ["7"]),
        (np.float32(0.1), ["0.1"]),
        (np.float32(1 / 3), ["0.333333333333333"]),
        (np.float16(2 / 3), ["0.666666666666667"]),
        (np.float32(123456.7), ["123456.7"]),
        (np.float32(2**0.5), ["1.4142135"]),
        (np.float16(65504), ["65504", "65504.0"]),
        (10**400, ["1" + "0" * 400]),
        (np.array(5), ["5"]),
        (torch.tensor(5), ["5"]),
        (Decimal("1.50"), ["1.50"]),
        (Fraction(1, 2), ["1/2"]),
        (["4", "four"], ["4", "four"]),
        (("4", 4, " 4 "), ["4"]),
        ({"a"}, ["a"]),
        (np.array(["4", "four"]), ["4", "four"]),
        (np.array([1, 2]), ["1", "2"]),
        (torch.tensor([1, 2]), ["1", "2"]),
        (np.array(["4", 5], dtype=object), ["4", "5"]),
    ],
)
def test_accepted_answers(value, accepted):
    assert accepted_answers(value) == accepted


@pytest.mark.parametrize(
    "value", [None, "", "  \n", [], (), np.array([]), [None], ["4", None], ["4", " "]]
)
def test_a_missing_ground_truth(value):
    with pytest.raises(ValueError, match=r"^has no ground truth, got "):
        accepted_answers(value)


@pytest.mark.parametrize(
    "value",
    [
        *(True, False, np.True_, [True]),
        *(float("nan"), float("inf"), np.float32("-inf"), Decimal("NaN"), ["4", float("nan")]),
        *({}, {"answer": "4"}, [{"answer": "4"}], [["4"]], np.array([[1]]), [["4"], "5"]),
        *(b"4", 1j, object(), np.datetime64("2020")),
    ],
)
def test_what_cannot_be_a_ground_truth(value):
    with pytest.raises(ValueError, match=r"^has a ground truth that is not a string, a finite num"):
        accepted_answers(value)
