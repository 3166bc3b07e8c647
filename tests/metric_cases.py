"""A run that remembers what it sampled and trained on, and its metrics worked out from that."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any
from unittest.mock import patch

from trainer_cases import noise, trainer_for

from cppo.rewards import completion_text
from cppo.train import algorithm
from cppo.train.batch import Batch


def reward(completions: list[Any], log_metric: Any, **columns: Any) -> list[float | None]:
    """Applies to every completion but those that begin with a vowel; named like another metric."""
    texts = [completion_text(completion) for completion in completions]
    for text in texts:
        log_metric("letters", len(text))
    return [None if text[:1] in "aeiou" else len(text) % 3 for text in texts]


def recorded_run(folder: Path, family: str = "text", **options: Any) -> dict[str, Any]:
    """A run of two steps: its metrics, and of every step what an outsider could have written down.

    Of this process alone: `completions`, one record each, `selected` perception tokens, `entropy`,
    the sum over kept completions of their mean entropy and over their tokens.
    """
    defaults = dict(rewards=[noise, reward], reward_weights=(1.0, 0.25), prune_rate=0.5)
    trainer = trainer_for(folder, family, **{**defaults, **options})
    steps: list[dict[str, Any]] = []
    select, microbatch_loss = algorithm.select, algorithm.microbatch_loss

    def watch_batch(*arguments: Any) -> Batch:
        batch = select(*arguments)
        records = [record(batch, row) for row in range(len(batch.rollouts.texts))]
        steps.append({"completions": records, "selected": 0, "entropy": [], "tokens": []})
        return batch

    def watch_loss(*arguments: Any) -> Any:
        output = microbatch_loss(*arguments)
        packed = arguments[1].pack(arguments[2])
        lengths = packed.row_cu_seqlens.diff().tolist()
        steps[-1]["entropy"] += [own.sum().item() for own in output.entropy.split(lengths)]
        steps[-1]["tokens"] += lengths
        steps[-1]["selected"] += int(output.perception_mask.sum())
        return output

    with patch.multiple(algorithm, select=watch_batch, microbatch_loss=watch_loss):
        trainer.train()
    return {"steps": steps, "history": trainer.history, "gating": trainer.config.loss.gating}


def record(batch: Batch, row: int) -> dict[str, Any]:
    rollouts = batch.rollouts
    question = rollouts.question_of(row)
    return {
        "text": rollouts.texts[row],
        "tokens": len(rollouts.completion_ids[row]),
        "truncated": bool(rollouts.truncated[row]),
        "advantage": batch.advantages[row].item(),
        "kept": row in batch.kept.tolist(),
        "images": len(question.images),
    }


def expected_metrics(steps: list[dict[str, Any]], group_size: int = 4) -> dict[str, float]:
    """The metrics of one step from the records of all processes."""
    rows = [row for step in steps for row in step["completions"]]
    first = noise([row["text"] for row in rows])
    second = reward([row["text"] for row in rows], lambda *_: None)
    sums = [a + 0.25 * (b or 0.0) for a, b in zip(first, second, strict=True)]
    groups = [sums[i : i + group_size] for i in range(0, len(sums), group_size)]
    kept = [row for row in rows if row["kept"]]
    return {
        "reward/mean": statistics.fmean(sums),
        "reward/std": statistics.fmean(statistics.pstdev(group) for group in groups),
        "reward/zero_variance_share": statistics.fmean(len(set(g)) == 1 for g in groups),
        "reward/scored_share": 1.0,
        "reward/noise": statistics.fmean(first),
        "reward/reward_reward": statistics.fmean(x for x in second if x is not None),
        "logged/letters": statistics.fmean(len(row["text"]) for row in rows),
        "kept_share": len(kept) / len(rows),
        "completion/tokens": statistics.fmean(row["tokens"] for row in rows),
        "completion/max_tokens": max(row["tokens"] for row in rows),
        "completion/truncated_share": statistics.fmean(row["truncated"] for row in rows),
        "tokens/sampled": sum(row["tokens"] for row in rows),
        "tokens/trained": sum(row["tokens"] for row in kept),
    }


def expected_entropy(steps: list[dict[str, Any]], reduction: str) -> float:
    """Mean over completions of the token mean, or mean over tokens."""
    sums = [value for step in steps for value in step["entropy"]]
    lengths = [length for step in steps for length in step["tokens"]]
    if reduction == "grpo":
        return statistics.fmean(s / n for s, n in zip(sums, lengths, strict=True))
    return sum(sums) / sum(lengths)


def expected_perception_share(steps: list[dict[str, Any]], gating: bool) -> float:
    """Selected tokens among those of kept completions whose perturbed views run."""
    gated = sum(
        row["tokens"]
        for step in steps
        for row in step["completions"]
        if row["kept"] and row["images"] and (row["advantage"] > 0 or not gating)
    )
    selected = sum(step["selected"] for step in steps)
    return selected / gated if gated else math.nan


def assert_metrics(row: dict[str, float], steps: list[dict[str, Any]]) -> None:
    for name, value in expected_metrics(steps).items():
        assert abs(row[name] - value) <= 1e-6 * max(1.0, abs(value)), (name, row[name], value)
