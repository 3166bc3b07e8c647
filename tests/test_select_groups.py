"""The groups that hold most of the reward variance."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cppo
from cppo import reference

numbers = st.integers(-3, 3) | st.integers(-50, 50)


def chosen_by_hand(rewards: list[list[int]], top_p: Fraction) -> list[int]:
    variances = []
    for own in rewards:
        mean = Fraction(sum(own), len(own))
        variances.append(sum((reward - mean) ** 2 for reward in own) / len(own))
    order = sorted(range(len(rewards)), key=lambda q: (-variances[q], q))
    stays: list[int] = []
    for q in order:
        if sum(variances[i] for i in stays) >= top_p * sum(variances):
            break
        stays.append(q)
    return sorted(stays)


@given(
    st.lists(st.lists(numbers, min_size=3, max_size=3), max_size=7),
    st.sampled_from([Fraction(0), Fraction(1, 2), Fraction(3, 4), Fraction(7, 8), Fraction(1)]),
)
@settings(max_examples=200, deadline=None)
def test_the_fewest_groups_that_hold_the_share_of_the_variance(rewards, top_p):
    flat = torch.tensor(rewards, dtype=torch.float64).flatten() / 7
    ours = cppo.select_groups(flat, 3, top_p=float(top_p))
    assert ours.tolist() == chosen_by_hand(rewards, top_p) and ours.dtype == torch.int64


def test_groups_by_hand():
    # Variances 0.25, 0, 0.1875 and 1 (divided by n), as in the release: 1.25 of 1.4375 is 87 %.
    rewards = torch.tensor([0, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 0, 2, 0, 2.0])
    assert cppo.select_groups(rewards, 4, top_p=0.6).tolist() == [3]
    assert cppo.select_groups(rewards, 4, top_p=0.85).tolist() == [0, 3]
    assert cppo.select_groups(rewards, 4, top_p=0.9).tolist() == [0, 2, 3]
    assert cppo.select_groups(rewards, 4, top_p=1).tolist() == [0, 2, 3]
    assert cppo.select_groups(torch.tensor([0, 1, 2, 3.0]), 2, top_p=0.5).tolist() == [0]
    assert cppo.select_groups(torch.full((6,), 0.1), 3, top_p=1).tolist() == []
    assert cppo.select_groups(torch.empty(0), 3, top_p=1).tolist() == []
    unscored = torch.tensor([True, True, False, False])
    assert reference.select_groups(torch.tensor([0, 1, 0, 9.0]), 2, 1.0, unscored).tolist() == [0]


@pytest.mark.parametrize(
    ("group_size", "top_p", "message"),
    [
        (4, 1.5, "top_p must be a number in [0, 1], got 1.5"),
        (4, -0.1, "got -0.1"),
        (3, 0.5, "a multiple of group_size = 3 values, got 8"),
    ],
)
def test_bad_options(group_size, top_p, message):
    with pytest.raises(ValueError, match=rf"^cppo\.select_groups: .*{re.escape(message)}"):
        cppo.select_groups(torch.rand(8), group_size, top_p=top_p)


def test_equal_variances_are_equal_however_they_are_rounded():
    # 2 / 9 each, of which fp64 makes two numbers; 1 of n and n - 1 of n right answers.
    for first, second in (([2, 2, 1], [1, 0, 0]), ([1, 0, 0], [2, 2, 1])):
        groups = cppo.select_groups(torch.tensor([*first, *second, 3, 3, 3]), 3, top_p=0.4)
        assert groups.tolist() == [0]
    for size in range(3, 40):
        one = [1.0] + [0.0] * (size - 1)
        other = [0.0] + [1.0] * (size - 1)
        for pair in (one + other, other + one):
            assert cppo.select_groups(torch.tensor(pair), size, top_p=0.4).tolist() == [0]


def test_a_share_of_one_keeps_the_smallest_variance():
    rewards = torch.tensor([0, 1, 0, 1e-9, 5, 5], dtype=torch.float64)
    assert cppo.select_groups(rewards, 2, top_p=1.0).tolist() == [0, 1]
    assert cppo.select_groups(rewards, 2, top_p=0.99).tolist() == [0]
