"""Rewards for lengths and repetitions: hand-computed values, groups, units and worded errors."""

import math

import numpy as np
import pytest
from reward_cases import one

from cppo import rewards


def box(length, value=42):
    """A completion of `length` characters with a boxed value."""
    return rf"\boxed{{{value}}}".rjust(length, ".")


def test_length_is_relative_to_the_group():
    # Group 1: lengths 10, 20, 30, the longest wrong; group 2: 100, 200, 200 (on its own scale).
    texts = [box(10), box(20), box(30, 7), box(100, 7), box(200), box(200)]
    columns = {"prompts": ["a"] * 6, "answer": ["42"] * 6}
    expected = [0.5, 0.0, -0.5, 0.0, -0.5, -0.5]
    assert rewards.Length()(texts, group_size=3, **columns) == expected
    assert rewards.Length(group_size=3)(texts, **columns) == expected
    assert rewards.Length(group_size=2)(texts, group_size=3, **columns) == expected
    assert rewards.Length()([box(10)] * 3, answer=["42"] * 3, group_size=3) == [0.0] * 3
    assert rewards.Length()([], answer=[], group_size=3) == []


def test_neighbouring_groups_of_equal_questions_are_two():
    # The same words and answer twice, with other images: each group has its own scale.
    texts = [box(10), box(20), box(100), box(200)]
    columns = {"prompts": ["Find x."] * 4, "answer": ["42"] * 4, "images": [1, 1, 2, 2]}
    assert rewards.Length()(texts, group_size=2, **columns) == [0.5, -0.5, 0.5, -0.5]


def test_questions_are_no_group_by_their_words():
    # One group whose prompts differ, as multi-turn rollouts have them.
    columns = {"prompts": ["a", "b"], "answer": ["42", "42"]}
    assert rewards.Length()([box(10), box(20)], group_size=2, **columns) == [0.5, -0.5]


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        (4, None, r"needs to know which rows are one question's: `group_size`"),
        (3, 2, "rows must be a multiple of group_size = 2, got 3"),
        (4, 0, "group_size must be a whole number >= 1, got 0"),
        (4, 2.0, "group_size must be a whole number >= 1, got 2.0"),
    ],
)
def test_bad_groups(rows, given, message):
    with pytest.raises(ValueError, match=f"cppo.rewards.length: {message}"):
        rewards.Length()([box(10)] * rows, answer=["42"] * rows, group_size=given)


def test_length_in_tokens():
    texts, ids = [box(10), box(10)], [[1] * 4, [1] * 8]
    function = rewards.Length(unit="tokens", group_size=2)
    assert function(texts, answer=["42"] * 2, completion_ids=ids) == [0.5, -0.5]
    with pytest.raises(ValueError, match="unit 'tokens' needs `completion_ids`"):
        function(texts, answer=["42"] * 2)


@pytest.mark.parametrize(
    ("length", "value", "expected"),
    [(100, 42, 0.75), (200, 42, 0.5), (300, 42, 0.5), (100, 7, -0.75), (200, 7, -0.5)],
)
def test_cosine_length(length, value, expected):
    function = rewards.CosineLength(max_length=200)
    assert one(function, box(length, value)) == pytest.approx(expected)


def test_cosine_length_at_a_third():
    # cos(pi / 3) = 1/2: three quarters of the way from the end value back to the start value.
    assert one(rewards.CosineLength(max_length=300), box(100)) == pytest.approx(0.875)


def test_an_answer_in_an_unfinished_thought_is_wrong_for_lengths_too():
    text = r"<think>\boxed{42}"
    assert one(rewards.CosineLength(max_length=10**9), text) == pytest.approx(-1.0)
    columns = {"answer": ["42"] * 2, "generation_prompts": "<think>", "group_size": 2}
    assert rewards.Length()([box(10), box(20)], **columns) == [0.0, -0.5]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], 0.0),
        ([1, 2], 0.0),
        ([1, 2, 3, 4], 0.0),
        ([1, 2, 1, 2], -1 / 3),  # (1, 2), (2, 1), (1, 2): two distinct of three
        ([1, 1, 1, 1], -2 / 3),
        ([7] * 101, -0.99),
        (np.array([1, 2, 1, 2]), -1 / 3),
    ],
)
def test_repetition_penalty(ids, expected):
    function = rewards.RepetitionPenalty(ngram_size=2)
    assert one(function, "x", completion_ids=[ids]) == pytest.approx(expected)


def test_repetition_penalty_needs_no_white_space():
    # Two characters of Chinese, eight times: 16 tokens, 14 trigrams of which two are distinct.
    text, ids = "\u4f60\u597d" * 8, [5, 6] * 8
    assert one(rewards.RepetitionPenalty(), text, completion_ids=[ids]) == pytest.approx(-12 / 14)
    by_characters = rewards.RepetitionPenalty(unit="characters")
    assert one(by_characters, text) == pytest.approx(-12 / 14)
    with pytest.raises(ValueError, match="repetition_penalty: unit 'tokens' needs `completion_id"):
        one(rewards.RepetitionPenalty(), text)


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0), (75, 0), (80, -0.2), (100, -1), (101, -1)]
)
def test_overlong(length, expected):
    function = rewards.Overlong(max_length=100, buffer=25)
    assert one(function, "x", completion_ids=[[0] * length]) == pytest.approx(expected)
    assert math.copysign(1, one(function, "x", completion_ids=[[0]])) == 1  # no -0.0
