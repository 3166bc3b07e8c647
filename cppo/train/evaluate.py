"""Held-out accuracy: the greedy completion, and the mean over N sampled ones (avg@N)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.utils import set_seed
from torch import nn
from transformers import TrainerState

from cppo.model.prompts import encode_questions
from cppo.options.trainer import CPPOConfig
from cppo.questions import Question
from cppo.rollouts.engine import Engine
from cppo.rollouts.rollout import Rollouts, sample_completions
from cppo.seeds import seed_from
from cppo.train.arguments import reward_list, reward_weights
from cppo.train.checkpoint import read_summary
from cppo.train.draws import check_room, longest_sequence
from cppo.train.scoring import RewardFunction, Scores, score


@dataclass(frozen=True)
class Evaluation:
    """metrics: {"sampled/<reward>": mean, ...}; completions: one row per completion."""

    metrics: dict[str, float]
    completions: list[dict[str, Any]]


class Share(NamedTuple):
    """The part of the questions that a process has; `gather` returns what every process has."""

    rank: int = 0
    size: int = 1
    gather: Callable[[list[Any]], list[list[Any]]] = lambda rows: [rows]


_WHOLE = Share()


class FinishedBatches(Protocol):
    """Keeps the rows of each batch, so that an evaluation that was killed need not repeat them."""

    def rows_of(self, mode: str, ids: Sequence[int]) -> list[dict[str, Any]] | None:
        """The rows of a batch that an earlier evaluation has finished; None without them."""

    def add(self, rows: list[dict[str, Any]], questions: Sequence[Question]) -> None:
        """Keeps the rows of a batch that was sampled from these questions."""


def state_of(checkpoint: Path | None, config: CPPOConfig) -> TrainerState:
    """The `trainer_state` of rewards at a checkpoint, or with None before training.

    Where `num_epochs` says how long a run is, `max_steps` is 0 before it has begun.
    """
    if checkpoint is None:
        return TrainerState(max_steps=0 if config.num_epochs else config.steps())
    summary = read_summary(checkpoint)
    finished = summary["step"] - bool(summary.get("unfinished"))
    steps = summary.get("options", {}).get("max_steps")
    return TrainerState(global_step=finished, max_steps=steps or 0)


def evaluate(
    model: nn.Module,
    processor: Any,
    reward_functions: Sequence[RewardFunction],
    questions: Sequence[Question],
    *,
    config: CPPOConfig,
    suppressed: Sequence[int] = (),
    share: Share = _WHOLE,
    state: Any = None,
    engine: Engine | None = None,
    finished: FinishedBatches | None = None,
) -> Evaluation:
    """Rewards of a set of questions, each process taking its share.

    Metrics are `sampled/<reward>` and `greedy/<reward>` for each function and `reward` for their
    weighted sum, over the completions to which they apply; with N > 1 samples
    `sampled/<reward>_std` is the std over the N passes. `state` is the `trainer_state` of rewards.

    Args:
        questions: taken by number, a batch at a time.
        engine: samples. The caller has brought it the model's weights (`Engine.sync`). None: the
            built-in loop.
        finished: knows the batches that need not be sampled again, and keeps the others.
    Raises: QuestionError for a prompt that leaves no room for a completion; EngineError if the
        engine cannot sample; ValueError for two reward functions of one name.
    """
    own = range(share.rank, len(questions), share.size)
    weights = reward_weights(reward_list(reward_functions), config)
    limit = longest_sequence(model, config)
    rows: list[dict[str, Any]] = []
    for mode, temperature, samples, ids in _batches(own, config):
        known = finished.rows_of(mode, ids) if finished else None
        if known is not None:
            rows += known
            continue
        set_seed(seed_from(config.seed, "eval", mode, ids[0]) % 2**32)
        kwargs = config.chat_template_kwargs or {}
        prompts = encode_questions(model, processor, [questions[i] for i in ids], kwargs)
        tokens = prompts.attention_mask.sum(1).tolist()
        for question, count in zip(prompts.questions, tokens, strict=True):
            check_room(question, count, config, limit)
        rollouts = sample_completions(
            model,
            processor,
            prompts,
            group_size=samples,
            max_new_tokens=config.max_completion_tokens,
            temperature=temperature,
            suppressed=suppressed,
            batch_size=config.generation_batch_size,
            engine=engine,
        )
        # A reward may be a model with an arithmetic of its own, which it has in training.
        with torch.autocast(rollouts.input_ids.device.type, enabled=False):
            scores = score(
                reward_functions,
                weights,
                rollouts,
                state=state,
                timeout=config.reward_timeout,
                retries=config.reward_retries,
            )
        new = _rows(mode, ids, rollouts, scores)
        if finished:
            finished.add(new, prompts.questions)
        rows += new
    rows = [row for part in share.gather(rows) for row in part]
    return Evaluation(_summary(rows), rows)


def _batches(
    own: Sequence[int], config: CPPOConfig
) -> Iterator[tuple[str, float | None, int, Sequence[int]]]:
    """(mode, temperature, samples of a question, the questions' numbers) of every batch."""
    sampled = ("sampled", config.loss.temperature, config.eval_samples)
    modes = [sampled, ("greedy", None, 1)] if config.eval_greedy else [sampled]
    for mode, temperature, samples in modes:
        per_batch = max(1, config.generation_batch_size // samples)
        for start in range(0, len(own), per_batch):
            yield mode, temperature, samples, own[start : start + per_batch]


def _rows(
    mode: str, ids: Sequence[int], rollouts: Rollouts, scores: Scores
) -> list[dict[str, Any]]:
    """A row per completion; `ids` are the numbers of the questions."""
    lengths = rollouts.completion_mask.sum(1).tolist()
    samples, rewards = rollouts.group_size, {"reward": scores.total, **scores.by_name}
    return [
        {
            "mode": mode,
            "question": ids[i // samples],
            "sample": i % samples,
            "answer": rollouts.question_of(i).columns.get("answer"),
            "completion": text,
            "generation_prompt": rollouts.generation_prompt_of(i),
            "tokens": lengths[i],
            "truncated": bool(rollouts.truncated[i]),
            "rewards": {name: values[i].item() for name, values in rewards.items()},
        }
        for i, text in enumerate(rollouts.texts)
    ]


def _summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        own = [row for row in rows if row["mode"] == mode]
        passes = sorted({row["sample"] for row in own})
        for name in own[0]["rewards"]:
            means = []
            for sample in passes:
                rewards = [r["rewards"][name] for r in own if r["sample"] == sample]
                known = [reward for reward in rewards if not math.isnan(reward)]
                means += [statistics.fmean(known)] if known else []
            if means:
                metrics[f"{mode}/{name}"] = statistics.fmean(means)
            if len(means) > 1:
                metrics[f"{mode}/{name}_std"] = statistics.stdev(means)
        metrics[f"{mode}/tokens"] = statistics.fmean(row["tokens"] for row in own)
    return metrics
