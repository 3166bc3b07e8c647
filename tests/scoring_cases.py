"""Rollouts of two questions that the tests of reward functions share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from trainer_cases import fixed_rollouts, questions_for, tiny

from cppo.rewards import completion_text
from cppo.rollouts.rollout import Rollouts
from cppo.train.scoring import Scores, score


def strings(rollouts: Rollouts) -> Rollouts:
    """The same rollouts of a data set whose prompts are strings."""
    questions = [q._replace(is_conversational=False) for q in rollouts.prompts.questions]
    prompts = dataclasses.replace(rollouts.prompts, questions=questions)
    return dataclasses.replace(rollouts, prompts=prompts)


@functools.cache
def conversations() -> Rollouts:
    """Completions of 1, 2, 3 and 4 letters."""
    model, tokenizer = tiny("text")
    return fixed_rollouts(model, tokenizer, questions_for("text", 2), lengths=[1, 2, 3, 4])


def lengths(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion_text(text))) for text in completions]


def scores_of(rollouts: Rollouts, *functions: Any, **options: Any) -> Scores:
    return score(list(functions), [1.0] * len(functions), rollouts, **options)
