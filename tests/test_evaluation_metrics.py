"""pass@k, majority votes and standard errors, against their definitions by enumeration."""

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cppo.train.estimators import majority, mean_over_questions, pass_at_k, powers_of_two

VERDICTS = st.lists(st.booleans(), min_size=1, max_size=8)


def equal(answer, other):
    return answer == other


@given(VERDICTS, st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(verdicts, data):
    k = data.draw(st.integers(1, len(verdicts)))
    subsets = [any(subset) for subset in itertools.combinations(verdicts, k)]
    found = pass_at_k(len(verdicts), sum(verdicts), k)
    assert found == pytest.approx(statistics.fmean(subsets), abs=1e-15)


def test_pass_at_k_by_hand_and_for_large_counts():
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs hold the one that is right
    assert pass_at_k(5, 0, 5) == 0.0 and pass_at_k(5, 1, 5) == 1.0
    assert pass_at_k(10_000, 1, 1) == 1e-4
    assert pass_at_k(10_000, 1, 5_000) == 0.5  # C(10000, 5000) has 3,009 digits


@pytest.mark.parametrize("counts", [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5), (0, 0, 1)])
def test_pass_at_k_refuses_other_counts(counts):
    with pytest.raises(ValueError, match="1 <= k <= samples, got samples"):
        pass_at_k(*counts)


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=8))
def test_the_majority_is_the_mode(answers):
    """Where the answers that are the same are right together, as with most rewards."""
    voters = [answer for answer in answers if answer is not None]
    modes = statistics.multimode(voters) if voters else []
    expected = modes.count("a") / len(modes) if modes else 0.0
    right = [answer == "a" for answer in answers]
    assert majority(answers, right, equal) == pytest.approx(expected)
    order = list(range(len(answers)))
    random.Random(0).shuffle(order)
    shuffled = majority([answers[i] for i in order], [right[i] for i in order], equal)
    assert shuffled == pytest.approx(expected)


def test_the_majority_by_hand():
    def close(answer, other):
        return abs(float(answer) - float(other)) < 0.1

    assert majority(["1", "2", "1.05", "3"], [False, True, False, False], close) == 0.0
    assert majority(["1", "2", "1.05", "2.0"], [False, True, False, True], close) == 0.5
    # Answers that are the same may be judged differently: one was cut, say, behind its box.
    assert majority(["7", "7", "7", "8"], [True, True, False, False], close) == 2 / 3
    assert majority([None, None], [False, False], close) == 0.0
    assert majority([None, "5", None], [False, True, False], close) == 1.0


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20))
def test_the_standard_error_is_that_of_a_mean(values):
    mean, error = mean_over_questions(values)
    assert mean == pytest.approx(statistics.fmean(values))
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-12)


def test_the_standard_error_says_how_far_means_of_other_questions_are():
    generator = random.Random(0)
    draws = [[float(generator.random() < 0.3) for _ in range(50)] for _ in range(2000)]
    means = [mean_over_questions(values) for values in draws]
    spread = statistics.stdev(mean for mean, _ in means)
    assert statistics.fmean(error for _, error in means) == pytest.approx(spread, rel=0.05)


def test_one_question_has_no_error_and_none_is_refused():
    assert mean_over_questions([0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="needs a question"):
        mean_over_questions([])


def test_powers_of_two_end_with_all_samples():
    assert [powers_of_two(n) for n in (1, 2, 4, 6)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 6]]
