"""What test_distributed runs on two processes: python tests/two_processes.py FOLDER PART.

Part "update": one update on fixed rollouts, each process on its half of the questions; the weights
go to FOLDER/weights.pt. Part "train": a run of two steps. Part "uneven": groups over processes that
do not divide, and a process with nothing left to learn.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from trainer_cases import (
    fixed_batch,
    fixed_rollouts,
    questions_for,
    small_run,
    text_rows,
    tiny,
    trainer_for,
    weights_of,
)

from cppo.progress import PhaseTimer
from cppo.step import Batch
from cppo.trainer import CPPOTrainer

FAMILIES = ("text", "qwen2_5_vl")
UPDATE = dict(
    batch_size=16, kl_coef=0.2, cpl_coef=0.5, optimizer_steps=2, num_iterations=2,
    max_tokens_per_microbatch=250, max_grad_norm=0.5, learning_rate=1e-2,
)  # fmt: skip


def noise(completions: list[str], **columns: Any) -> list[float]:
    """A reward that depends on the completion alone and differs within groups."""
    return [random.Random(text).random() for text in completions]


def dimmed(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return 0.9 * pixels + 0.05


def darkened(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return 0.2 * pixels


def updated(folder: Path, family: str, rank: int, world_size: int) -> tuple[Any, Any]:
    """A trainer after one update on its share of four questions, and the update's metrics."""
    model, processor = tiny(family, dtype=torch.float64)
    # Views that do not depend on a seed: a question's number differs between the processes.
    views = dict(positive_views=(dimmed,), negative_views=(darkened,))
    trainer = CPPOTrainer(
        model,
        noise,
        text_rows(),
        config=small_run(folder, **UPDATE, **views),
        processor=processor,
    )
    whole = fixed_rollouts(trainer.model, processor, questions_for(family), group_size=4)
    share = 4 // world_size
    own = slice(rank * share, (rank + 1) * share)
    rows = slice(own.start * 4, own.stop * 4)
    width = whole.prompts.input_ids.shape[1]
    lengths = whole.completion_mask[rows].sum(1).tolist()
    rollouts = fixed_rollouts(
        trainer.model, processor, questions_for(family)[own], group_size=4, lengths=lengths
    )
    ids = rollouts.input_ids.clone()
    prompt = rollouts.prompts.input_ids.shape[1]
    ids[:, prompt:] = whole.input_ids[rows, width : width + ids.shape[1] - prompt]
    rollouts.input_ids.copy_(ids)
    advantages = fixed_batch(whole, dtype=torch.float64).advantages[rows]
    kept = torch.arange(4 * share)
    metrics = trainer.update(Batch(rollouts, advantages, kept), PhaseTimer())
    return trainer, metrics


def update(folder: Path) -> None:
    for family in FAMILIES:
        trainer, metrics = updated(folder, family, own_rank(), 2)
        weights = weights_of(trainer.model)
        for value in weights.values():
            other = value.clone()
            dist.broadcast(other, 0)
            assert torch.equal(other, value), "the processes' weights differ"
        if trainer.processes.rank == 0:
            torch.save({"weights": weights, "metrics": metrics}, folder / f"{family}.pt")


def own_rank() -> int:
    return int(os.environ["RANK"])


def train(folder: Path) -> None:
    eval_rows = text_rows(3)
    options = dict(rewards=noise, prune_rate=0.5, eval_rows=eval_rows, trackers=("tensorboard",))
    trainer = trainer_for(folder, **options)
    rank = trainer.processes.rank
    assert trainer.processes.size == 2 and rank == own_rank()
    seen = []
    score = trainer.make_batch

    def watch(rollouts: Any, rewards: torch.Tensor) -> Batch:
        batch = score(rollouts, rewards)
        seen.append([rollouts.question_of(row).columns["answer"] for row in range(len(rewards))])
        return batch

    trainer.make_batch = watch  # type: ignore[method-assign]
    trainer.train()
    digest = sum(value.double().sum().item() for value in weights_of(trainer.model).values())
    (folder.parent / f"rank{rank}.json").write_text(json.dumps({"seen": seen, "sum": digest}))


def uneven(folder: Path) -> None:
    words = []
    for options in (
        dict(batch_size=7),
        dict(batch_size=12, dynamic_allocation=False),
    ):
        try:
            trainer_for(folder, **options)
        except ValueError as error:
            words.append(str(error))
    rank = own_rank()

    def equal_on_one(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions) if rank == 1 else noise(completions)

    options = dict(rewards=equal_on_one, drop_zero_variance=True)
    trainer = trainer_for(folder / "one", **options)
    trainer.train()

    def equal(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    nothing = trainer_for(folder / "none", rewards=equal, drop_zero_variance=True)
    nothing.train()
    if rank == 0:
        told = {"words": words, "one": trainer.history, "none": nothing.history}
        (folder / "uneven.json").write_text(json.dumps(told))


if __name__ == "__main__":
    for part in sys.argv[2:]:
        {"update": update, "train": train, "uneven": uneven}[part](Path(sys.argv[1]) / part)
    if dist.is_initialized():
        dist.destroy_process_group()
