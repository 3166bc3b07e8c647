"""What N samples of each question say: pass@k, the majority's answer, and the error of a mean.

Plain functions of counts and votes. Counts are whole numbers, so pass@k is exact up to the last
division.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class Mean(NamedTuple):
    """A mean over questions and its standard error; the error of one question is not known."""

    value: float
    error: float | None


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the probability that k of n samples, drawn without replacement, hold a right one.

    1 - C(n - c, k) / C(n, k) with n samples of which c are right: the unbiased estimator of Chen et
    al. 2021 (arXiv 2107.03374, equation 1). It is the mean over all subsets of k samples.

    Args:
        samples: n >= 1, completions of the question.
        right: c in [0, n].
        k: in [1, n].
    Raises: ValueError for counts outside of these.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(
            "cppo.train.estimators.pass_at_k: 0 <= right <= samples and 1 <= k <= samples, got "
            f"samples {samples}, right {right}, k {k}"
        )
    every = math.comb(samples, k)
    return (every - math.comb(samples - right, k)) / every


def majority(
    answers: Sequence[str | None], right: Sequence[bool], same: Callable[[str, str], bool]
) -> float:
    """Return the probability that the answer with most votes is right (maj@N, self-consistency).

    An answer joins the first group whose first answer is the same, else it founds one. The largest
    group wins. Of several that are equally large each wins as often as the others, so their mean
    counts. A group is as right as the mean of its members. Wang et al. 2022, arXiv 2203.11171.

    Args:
        answers: of N samples; None has no vote.
        right: whether each sample is right.
        same: whether two answers are the same.
    Returns: a number in [0, 1]; 0 where nobody votes.
    """
    groups: list[tuple[str, list[bool]]] = []
    for answer, is_right in zip(answers, right, strict=True):
        if answer is None:
            continue
        for first, members in groups:
            if first == answer or same(answer, first):
                members.append(is_right)
                break
        else:
            groups.append((answer, [is_right]))
    most = max((len(members) for _, members in groups), default=0)
    tied = [statistics.fmean(members) for _, members in groups if len(members) == most]
    return statistics.fmean(tied) if tied else 0.0


def mean_over_questions(values: Sequence[float]) -> Mean:
    """Return the mean of a value per question, and the standard error of that mean.

    s / sqrt(Q), with s the standard deviation (n - 1) of the Q values. The samples of a question
    are not independent of each other, so a question is one observation however often it was asked
    (clustered standard errors: Miller 2024, arXiv 2411.00640, section 2.2).

    Args: values: at least one, the mean of each question's samples.
    Raises: ValueError for no values.
    """
    if not values:
        raise ValueError("cppo.train.estimators.mean_over_questions: needs a question, got none")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Mean(mean, None)
    spread = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Mean(mean, math.sqrt(spread / len(values)))


def without_spreads(names: Iterable[str]) -> list[str]:
    """Return those of an evaluation's metrics that are no std over the passes.

    A std stands beside its mean; a reward may well be called `..._std` itself.
    """
    names = list(names)
    spreads = {f"{name}_std" for name in names}
    return [name for name in names if name not in spreads]


def powers_of_two(most: int) -> list[int]:
    """Return 1, 2, 4, ... up to `most`, and `most` itself."""
    powers = [2**i for i in range(most.bit_length()) if 2**i < most]
    return [*powers, most]
