"""Calls reward functions as TRL calls them, and sums their rewards.

    rollouts -> score -> Scores(total, by_name)

A function is called with keyword arguments alone, one entry per completion in each list:

    prompts              messages, or strings where the data set's prompts are strings
    completions          `[{"role": "assistant", "content": text}]`, or strings likewise
    completion_ids       token ids, with the closing one
    <column>             every other column of the data set

and, if it names them or takes `**kwargs`, with

    trainer_state        a `transformers.TrainerState`: `global_step`, `max_steps`
    log_metric           `log_metric(name, value)`: its mean in a step is the metric `logged/<name>`
    log_extra            `log_extra(column, values)`: a value per completion, for completions.jsonl
    generation_prompts   what the chat template put after the last message, `<think>` for example
    group_size           completions per question; those of a question are neighbours

It returns a number per completion, or None where it does not apply. It may be `async`. It gets
copies, so it may change lists, messages and arrays (but all completions of a question share its
pictures).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cppo.rollouts.rollout import Rollouts
from cppo.train.progress import as_json
from cppo.train.reward_call import Call, Retry
from cppo.train.reward_functions import (
    RewardError,
    RewardFunction,
    check_signature,
    metric_name,
    reward_name,
)

__all__ = [
    "RewardError",
    "RewardFunction",
    "Scores",
    "check_signature",
    "merge_scores",
    "metric_name",
    "reward_name",
    "score",
]


class Scores(NamedTuple):
    """What the reward functions say of B completions.

    total: (B,) fp64, the weighted sum of the rewards that apply; NaN where none does.
    by_name: {function: (B,) fp64}; NaN where the function does not apply.
    logged: {name: the numbers that functions passed to `log_metric`}.
    extra: {column: B values that functions passed to `log_extra`}, as JSON has them.
    """

    total: Tensor
    by_name: dict[str, Tensor]
    logged: dict[str, list[float]]
    extra: dict[str, list[Any]]


def score(
    functions: Sequence[RewardFunction],
    weights: Sequence[float],
    rollouts: Rollouts,
    *,
    state: Any = None,
    timeout: float | None = None,
    retries: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Scores:
    """Rewards of every completion.

    A None is left out of the sum; where all functions return None there is no reward, and the
    completion takes part in nothing (as in TRL >= 1.16).

    Args:
        functions, weights: as many of both.
        state: the `trainer_state` that functions get.
        timeout: seconds that a function may take for all completions. None: no limit.
        retries: times that a function which raises is called again, a second later, then two, four
            and so on. One that takes too long or returns something wrong is not.
        say: is told of every retry.
    Raises: RewardError naming the function, and the question and completion if one is to blame.
    """
    retry = Retry(retries, say)
    calls = [Call(function, rollouts, state, timeout, retry) for function in functions]
    started = [call.start() for call in calls]  # async functions run while the others are called
    by_name = {
        metric_name(call.function): torch.tensor(call.finish(begun), dtype=torch.float64)
        for call, begun in zip(calls, started, strict=True)
    }
    rewards = torch.stack(list(by_name.values()))
    total = (rewards.nan_to_num(0.0) * torch.tensor(list(weights))[:, None].double()).sum(0)
    total = total.masked_fill(rewards.isnan().all(0), math.nan)
    logged: dict[str, list[float]] = {}
    extra: dict[str, list[Any]] = {}
    for call in calls:
        for name, values in call.log.metrics.items():
            logged.setdefault(name, []).extend(values)
        extra |= {name: as_json(values) for name, values in call.log.columns.items()}
    return Scores(total, by_name, logged, extra)


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of several rollouts as one, in the order of `merge`."""
    columns = dict.fromkeys(column for part in parts for column in part.extra)
    names = dict.fromkeys(name for part in parts for name in part.logged)
    return Scores(
        torch.cat([part.total for part in parts]),
        {name: torch.cat([part.by_name[name] for part in parts]) for name in parts[0].by_name},
        {name: [x for part in parts for x in part.logged.get(name, [])] for name in names},
        {
            column: [
                value
                for part in parts
                for value in part.extra.get(column, [None] * len(part.total))
            ]
            for column in columns
        },
    )
