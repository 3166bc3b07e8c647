"""What `cppo eval` says of its completions: means with their errors, pass@k and maj@N."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cppo.rewards.reading import Reading
from cppo.train.estimators import (
    Mean,
    majority,
    mean_over_questions,
    pass_at_k,
    without_spreads,
)

Row = Mapping[str, Any]


class Measure(NamedTuple):
    """A number of the table.

    Fields: mode ("sampled" or "greedy"); metric ("boxed", "boxed/pass@4", "tokens"); samples per
        question; mean; std, over the passes; error, the standard error over the questions. None
        where there is one pass or one question.
    """

    mode: str
    metric: str
    samples: int
    mean: float
    std: float | None = None
    error: float | None = None


class Verdicts(NamedTuple):
    """Which completions are right.

    Fields: metric: the reward that says so; right: the least that a right one earns, None where
        that is not known and rewards must be 0 or 1; reading: how it reads answers, if it does.
    """

    metric: str
    right: float | None
    reading: Reading | None


def means(rows: Sequence[Row], metrics: Mapping[str, float]) -> list[Measure]:
    """The means of `cppo.train.evaluate.evaluate`, with standard errors over the questions."""
    found = []
    for key in without_spreads(metrics):
        value = metrics[key]
        mode, metric = key.split("/", 1)
        own = by_question(rows, mode)
        each = [_mean_of(samples, metric) for samples in own]
        known = [mean for mean in each if not math.isnan(mean)]
        samples = max(map(len, own))
        error = mean_over_questions(known).error
        found.append(Measure(mode, metric, samples, value, metrics.get(f"{key}_std"), error))
    return found


def by_question(rows: Sequence[Row], mode: str) -> list[list[Row]]:
    """The completions of each question, in the order in which they were sampled."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        if row["mode"] == mode:
            groups.setdefault(row["question"], []).append(row)
    return list(groups.values())


def _mean_of(samples: Sequence[Row], metric: str) -> float:
    values = [row["tokens"] if metric == "tokens" else row["rewards"][metric] for row in samples]
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def unclear(rows: Sequence[Row], verdicts: Verdicts) -> float | None:
    """A reward of which nobody has said whether it is a right answer's; None if there is none."""
    if verdicts.right is not None:
        return None
    values = (row["rewards"][verdicts.metric] for row in rows if row["mode"] == "sampled")
    return next((value for value in values if not math.isnan(value) and value not in (0, 1)), None)


def of_samples(rows: Sequence[Row], verdicts: Verdicts, ks: Sequence[int]) -> list[Measure]:
    """pass@k for each k, and maj@N where the reward says what an answer is.

    A completion to which the reward does not apply takes no part; a question with less than k
    others takes none in pass@k.
    """
    groups = [
        [row for row in own if not math.isnan(row["rewards"][verdicts.metric])]
        for own in by_question(rows, "sampled")
    ]
    groups = [own for own in groups if own]
    if not groups:
        return []
    right = [[_is_right(row, verdicts) for row in own] for own in groups]
    samples = max(map(len, groups))
    found = {}
    for k in ks:
        values = [pass_at_k(len(own), sum(own), k) for own in right if len(own) >= k]
        if values:
            found[f"pass@{k}"] = mean_over_questions(values)
    if verdicts.reading is not None and samples > 1:
        votes = zip(groups, right, strict=True)
        found[f"maj@{samples}"] = mean_over_questions(
            [_majority(own, flags, verdicts.reading) for own, flags in votes]
        )
    return [_measure(f"{verdicts.metric}/{name}", samples, mean) for name, mean in found.items()]


def _measure(metric: str, samples: int, mean: Mean) -> Measure:
    return Measure("sampled", metric, samples, mean.value, None, mean.error)


def _is_right(row: Row, verdicts: Verdicts) -> bool:
    least = 1.0 if verdicts.right is None else verdicts.right
    return bool(row["rewards"][verdicts.metric] >= least - 1e-9)


def _majority(rows: Sequence[Row], right: Sequence[bool], reading: Reading) -> float:
    answers = [reading.extract(row["completion"], row["generation_prompt"]) for row in rows]
    return majority(answers, right, reading.same)
