"""What test_distributed runs on two or four processes: python tests/two_processes.py FOLDER PART.

Part "update": one update on fixed rollouts, each process with its share of the questions; weights
and what was exchanged go to FOLDER. Part "train": a run of two steps. Part "uneven": groups over
processes that do not divide, and a process with nothing left to learn. Part "metrics": a run whose
metrics are worked out anew.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from metric_cases import recorded_run
from trainer_cases import (
    VIEWS,
    assert_same_everywhere,
    fixed_batch,
    fixed_rollouts,
    noise,
    questions_for,
    small_run,
    text_rows,
    tiny,
    trainer_for,
    weights_of,
)

from cppo.rollouts.rollout import take_questions
from cppo.train import algorithm
from cppo.train.algorithm import cppo_update
from cppo.train.balance import balanced
from cppo.train.batch import Batch
from cppo.train.progress import PhaseTimer
from cppo.train.trainer import CPPOTrainer

FAMILIES = ("text", "qwen2_5_vl")
UPDATE = dict(
    batch_size=16, kl_coef=0.2, cpl_coef=0.5, optimizer_steps=2, num_iterations=2,
    max_tokens_per_microbatch=250, max_grad_norm=0.5, learning_rate=1e-2,
)  # fmt: skip


def updated(folder: Path, family: str, own: Sequence[int]) -> tuple[Any, Any, Batch]:
    """A trainer after one update, its metrics, and the batch of the questions `own` of four."""
    model, processor = tiny(family, dtype=torch.float64)
    # Views that do not depend on a seed: a question's number differs between the processes.
    trainer = CPPOTrainer(
        model, noise, text_rows(), config=small_run(folder, **UPDATE, **VIEWS), processor=processor
    )
    whole = fixed_rollouts(trainer.model, processor, questions_for(family), group_size=4)
    rows = torch.tensor([4 * q + i for q in own for i in range(4)], dtype=torch.int64)
    advantages = fixed_batch(whole, dtype=torch.float64).advantages[rows]
    batches: list[Batch] = []
    update = trainer.new_update(PhaseTimer(), batches.append)

    def keep_all(values: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return values, torch.arange(len(values))

    with patch.object(algorithm, "select_completions", keep_all):
        cppo_update(update, take_questions(whole, own), advantages)
    return trainer, update.metrics(), batches[0]


def dealt(folder: Path, own: Sequence[int]) -> Any:
    """A trainer after the update on the questions `own` of four, chosen and dealt as in a step.

    How many completions of a process stay differs, and so would the optimizer steps they are dealt
    to, if each process dealt its own.
    """
    model, processor = tiny("text", dtype=torch.float64)
    options = dict(prune_rate=0.5, prune_scope="batch", optimizer_steps=2, mask_overlong=True)
    trainer = CPPOTrainer(
        model,
        noise,
        text_rows(),
        config=small_run(folder, learning_rate=1e-2, dynamic_allocation=False, **options),
        processor=processor,
    )
    whole = fixed_rollouts(trainer.model, processor, questions_for("text"), group_size=4)
    rewards = torch.arange(16, dtype=torch.float64).mul(0.7).sin()
    rewards[torch.tensor([1, 6, 8, 9, 10, 11])] = math.nan
    whole.truncated[4] = True
    rows = torch.tensor([4 * q + i for q in own for i in range(4)], dtype=torch.int64)
    update = trainer.new_update(PhaseTimer(), lambda batch: None)
    cppo_update(update, take_questions(whole, own), rewards[rows])
    return trainer


def deal(folder: Path) -> None:
    trainer = dealt(folder, SHARES[2][own_rank()])
    if trainer.processes.rank == 0:
        torch.save(weights_of(trainer.model), folder / "weights.pt")


# Which of the four questions each process has sampled.
SHARES = {2: ([0, 1], [2, 3]), 4: ([0, 1, 3], [2], [], [])}


def update(folder: Path) -> None:
    size = int(os.environ["WORLD_SIZE"])
    for family in FAMILIES if size == 2 else FAMILIES[:1]:
        trainer, metrics, batch = updated(folder, family, SHARES[size][own_rank()])
        weights = weights_of(trainer.model)
        assert_same_everywhere(weights)
        even = balanced(batch, trainer.processes)
        tokens = [trainer.processes.gather(sum(one.lengths(one.kept))) for one in (batch, even)]
        groups = trainer.processes.gather(_whole_groups(even))
        if trainer.processes.rank == 0:
            told = {"weights": weights, "metrics": metrics, "tokens": tokens, "groups": groups}
            torch.save(told, folder / f"{family}.pt")


def _whole_groups(batch: Batch) -> list[list[int]]:
    """The kept places within the group, of each question that the process ends up with."""
    places: dict[int, list[int]] = {}
    for row in batch.kept.tolist():
        places.setdefault(row // 4, []).append(row % 4)
    return list(places.values())


def own_rank() -> int:
    return int(os.environ["RANK"])


def train(folder: Path) -> None:
    eval_rows = text_rows(3)
    options = dict(rewards=noise, prune_rate=0.5, eval_rows=eval_rows, trackers=("tensorboard",))
    trainer = trainer_for(folder, **options)
    rank = trainer.processes.rank
    assert trainer.processes.size == 2 and rank == own_rank()
    seen = []
    select = algorithm.select

    def watch(policy: Any, rollouts: Any, rewards: torch.Tensor, *others: Any) -> Batch:
        seen.append([rollouts.question_of(row).columns["answer"] for row in range(len(rewards))])
        return select(policy, rollouts, rewards, *others)

    with patch.object(algorithm, "select", watch):
        trainer.train()
    digest = sum(value.double().sum().item() for value in weights_of(trainer.model).values())
    (folder.parent / f"rank{rank}.json").write_text(json.dumps({"seen": seen, "sum": digest}))


def uneven(folder: Path) -> None:
    words = []
    try:
        trainer_for(folder, batch_size=12, dynamic_allocation=False)
    except ValueError as error:
        words.append(str(error))
    rank = own_rank()

    def equal_on_one(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions) if rank == 1 else noise(completions)

    options = dict(rewards=equal_on_one, drop_zero_variance=True, max_refills=0)
    trainer = trainer_for(folder / "one", **options)
    trainer.train()

    def equal(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    nothing = trainer_for(folder / "none", rewards=equal, drop_zero_variance=True)
    nothing.train()
    filled = trainer_for(folder / "filled", **{**options, "max_refills": 2})
    filled.train()
    if rank == 0:
        told = {"words": words, "one": trainer.history, "none": nothing.history}
        told["filled"] = filled.history
        (folder / "uneven.json").write_text(json.dumps(told))


def metrics(folder: Path) -> None:
    options = dict(reduction="dr_grpo", batch_size=16, max_completion_tokens=9)
    told = recorded_run(folder / "run", "qwen2_5_vl", **options)
    torch.save(told, folder / f"{own_rank()}.pt")


PARTS = {"update": update, "deal": deal, "train": train, "uneven": uneven, "metrics": metrics}

if __name__ == "__main__":
    for part in sys.argv[2:]:
        PARTS[part](Path(sys.argv[1]) / part)
    if dist.is_initialized():
        dist.destroy_process_group()
