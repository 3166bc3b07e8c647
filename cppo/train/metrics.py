"""What a step reports; docs/metrics.md says what each number is.

A number is kept as its parts (a sum and a count) until the processes are combined, so that a run
on several processes reports what one process would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cppo.options.trainer import CPPOConfig
from cppo.questions import Question, question_text, thumbnails
from cppo.train.batch import Batch
from cppo.train.mismatch import LARGEST, mismatch_metrics
from cppo.train.processes import Processes
from cppo.train.scoring import Scores

# What the micro-batches of all processes add up to. Which are there depends on the options.
_OF_LOSS = (
    *("loss", "policy_loss", "entropy", "clip_fraction", "kl", "cpl_loss"),
    *("papo/kl", "papo/entropy"),
)


class Mean(NamedTuple):
    """A sum and the number of its terms."""

    total: float
    terms: float


class Total(NamedTuple):
    """A sum over the processes."""

    value: float


class Largest(NamedTuple):
    """The largest over the processes."""

    value: float


Metric = Mean | Total | Largest


def over_processes(own: Mapping[str, Metric], processes: Processes) -> dict[str, float]:
    """The numbers of all processes together; a mean of nothing is left out. Collective."""
    parts = processes.gather(dict(own))
    names = dict.fromkeys(name for part in parts for name in part)
    combined = {name: _combined([part[name] for part in parts if name in part]) for name in names}
    return {name: value for name, value in combined.items() if value is not None}


def _combined(parts: Sequence[Metric]) -> float | None:
    if isinstance(parts[0], Largest):
        return max(part.value for part in parts if isinstance(part, Largest))
    if isinstance(parts[0], Total):
        return sum(part.value for part in parts if isinstance(part, Total))
    means = [part for part in parts if isinstance(part, Mean)]
    count = sum(part.terms for part in means)
    return sum(part.total for part in means) / count if count else None


def _mean(values: Tensor) -> Mean:
    """Of the entries that are numbers."""
    known = values[~values.isnan()].double()
    return Mean(known.sum().item(), len(known))


def rollout_metrics(batch: Batch, scores: Scores) -> dict[str, Metric]:
    """What was sampled, how it was rewarded, and how much of it is trained on."""
    rollouts, rewards = batch.rollouts, scores.total
    everything = torch.arange(len(rewards))
    lengths = torch.tensor(batch.response_lengths(everything))
    groups = [own[~own.isnan()] for own in rewards.split(rollouts.group_size)]
    groups = [own for own in groups if len(own)]
    stds = [own.std(correction=0).item() for own in groups]
    # By the advantages: rewards that differ by their rounding are equal.
    still = [bool((own == 0).all()) for own in batch.advantages.split(rollouts.group_size)]
    scored = [not bool(own.isnan().all()) for own in rewards.split(rollouts.group_size)]
    equal = [a for a, has_rewards in zip(still, scored, strict=True) if has_rewards]
    metrics: dict[str, Metric] = {
        "reward/mean": _mean(rewards),
        "reward/std": Mean(sum(stds), len(groups)),
        "reward/zero_variance_share": Mean(sum(equal), len(groups)),
        "reward/scored_share": Mean((~rewards.isnan()).sum().item(), len(rewards)),
        "kept_share": Mean(len(batch.kept), len(rewards)),
        "completion/tokens": _mean(lengths.double()),
        "completion/max_tokens": Largest(lengths.max().item()),
        "completion/truncated_share": _mean(rollouts.truncated.double()),
        "tokens/sampled": Total(lengths.sum().item()),
        "tokens/trained": Total(lengths[batch.kept].sum().item()),
    }
    metrics |= {f"reward/{name}": _mean(values) for name, values in scores.by_name.items()}
    return metrics | {
        f"logged/{name}": Mean(sum(values), len(values)) for name, values in scores.logged.items()
    }


def completion_rows(batch: Batch, scores: Scores, step: int, count: int) -> list[dict[str, Any]]:
    """Some completions of a step, evenly chosen, as rows of completions.jsonl."""
    rollouts, kept = batch.rollouts, set(batch.kept.tolist())
    total = len(rollouts.texts)
    count = min(count, total)
    chosen = range(0, total, max(1, total // max(count, 1)))[:count]

    def row(i: int) -> dict[str, Any]:
        reward, question = scores.total[i].item(), rollouts.question_of(i)
        known = {
            "step": step,
            "question": question.messages,
            "answer": question.columns.get("answer"),
            "completion": rollouts.texts[i],
            "reward": None if math.isnan(reward) else reward,
            "advantage": batch.advantages[i].item(),
            "kept": i in kept,
        }
        # What a reward function logs never takes the place of what the trainer says.
        extra = {column: values[i] for column, values in scores.extra.items()}
        return {**known, **{f"logged/{n}" if n in known else n: v for n, v in extra.items()}}

    return [row(i) for i in chosen]


def held_out_rows(
    completions: Sequence[Mapping[str, Any]], questions: Sequence[Question], step: int, count: int
) -> list[dict[str, Any]]:
    """The first completion of each of the first `count` questions, as rows of held_out.jsonl.

    Those of step 0 have the question's images as well, small ones.

    Args:
        completions: of an evaluation, as of `cppo.train.evaluate.Evaluation`.
        questions: that were asked.
        step: after which.
    """
    shown = [row for row in completions if row["question"] < count and row["sample"] == 0]
    return [
        {
            "step": step,
            "mode": row["mode"],
            "question": row["question"],
            "text": question_text(questions[row["question"]].messages),
            **({} if step else {"images": thumbnails(questions[row["question"]].images)}),
            "answer": row["answer"],
            "completion": row["completion"],
            "tokens": row["tokens"],
            "rewards": {n: None if math.isnan(r) else r for n, r in row["rewards"].items()},
        }
        for row in shown
    ]


def update_metrics(
    total: Mapping[str, float], updates: int, config: CPPOConfig, processes: Processes
) -> dict[str, float]:
    """Means over the optimizer steps of what the micro-batches added up to in `total`.

    `microbatch_fill` is the share of their token budget that the micro-batches use,
    `perception_share` the selected tokens among those of completions whose perturbed views ran,
    `perturbed_views` how many of these ran, for each completion of an optimizer step.
    """
    parts = {n: Largest(value) if n in LARGEST else Total(value) for n, value in total.items()}
    sums = over_processes(parts, processes)
    metrics = {"loss": 0.0}
    metrics |= {name: sums[name] / max(updates, 1) for name in _OF_LOSS if name in sums}
    if sums.get("gated_tokens"):
        metrics["perception_share"] = sums["num_selected"] / sums["gated_tokens"]
    if sums.get("completions"):
        metrics["perturbed_views"] = sums["views"] / sums["completions"]
    if "head_gemm_rows" in sums:
        metrics["head_gemm_rows"] = sums["head_gemm_rows"] / max(updates, 1)
    if sums.get("microbatches"):
        budget = sums["microbatches"] * config.max_tokens_per_microbatch
        metrics["microbatch_fill"] = sums["computed_tokens"] / budget
    return metrics | mismatch_metrics(sums)
