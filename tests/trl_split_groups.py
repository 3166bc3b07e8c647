"""What test_integrations_trl_split runs: torchrun tests/trl_split_groups.py FOLDER.

A question's completions lie on several processes, or one process has no image. The weights, the
metrics and the rows of every case go to FOLDER/<case>.pt.
"""

from __future__ import annotations

import dataclasses
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from trainer_cases import assert_same_everywhere, weights_of
from trl import GRPOConfig
from trl_cases import CPPO, folder_of, logged, noise, rows_of, watched_run

from cppo.integrations.trl import check
from cppo.options.trainer import LossConfig

PRUNED = CPPO(prune_rate=0.75, loss=LossConfig(cpl_coef=0))
LOOKING = dataclasses.replace(
    PRUNED, prune_rate=0.5, loss=LossConfig(cpl_coef=1.0, cpl_reduction="sequence")
)


def uneven(completions: list[Any], prompts: list[Any], **columns: Any) -> list[float]:
    """Equal rewards for half of the questions."""
    draws = [random.Random(prompt[-1]["content"]).random() for prompt in prompts]
    values = zip(noise(completions), draws, strict=True)
    return [value if draw < 0.5 else 0.1 for value, draw in values]


# Eight completions of two questions: four processes have two rows each, two micro-batches of one.
# Plain steps of one micro-batch on one process.
CASES: dict[str, dict[str, Any]] = {
    "grpo": dict(loss_type="grpo"),
    "dapo": dict(loss_type="dapo"),
    "dr_grpo": dict(loss_type="dr_grpo", cppo=dataclasses.replace(PRUNED, early=False)),
    # Before 1.15, TRL's mean of the distance to the reference is over padding, too.
    "luspo": dict(loss_type="luspo", importance_sampling_level="sequence", beta=0.0),
    "random": dict(cppo=dataclasses.replace(PRUNED, prune="random")),
    "drop": dict(
        cppo=dataclasses.replace(PRUNED, drop_zero_variance=True, max_refills=0), rewards=uneven
    ),
    "vision": dict(family="qwen2_5_vl", cppo=LOOKING),
    "shared": dict(family="qwen2_5_vl", cppo=dataclasses.replace(LOOKING, share_prompts=True)),
}
METRICS = ("cppo/kept_share", "cppo/equal_share", "reward")


def run(name: str, processes: int) -> Any:
    """A trainer after its run, and what passed it."""
    case = {"family": "text", "cppo": PRUNED, "num_iterations": 2, "max_steps": 2, **CASES[name]}
    parts = 2 if processes > 1 else 1
    return watched_run(
        per_device_train_batch_size=8 // processes // parts,
        gradient_accumulation_steps=parts,
        ddp_backend="gloo" if processes > 1 else None,
        **case,
    )


def one_sided() -> Any:
    """Two questions, one with an image; each process has one of them."""
    prompt = [{"role": "user", "content": "What is the sum of the digits?"}]
    images = (rows_of("qwen2_5_vl", 1)[0]["images"], [])
    rows = [{"prompt": prompt, "images": each} for each in images]
    trainer, _ = watched_run(
        "qwen2_5_vl",
        LOOKING,
        rows=Dataset.from_list(rows),
        per_device_train_batch_size=4,
        gradient_checkpointing=False,
        log_multimodal=False,  # TRL gathers the images of those alone that have some
        ddp_backend="gloo",
        max_steps=4,
        num_iterations=1,
    )
    return trainer


def refilled() -> Any:
    """Each process has one question, which is drawn anew where its rewards are equal."""
    options = dataclasses.replace(PRUNED, drop_zero_variance=True, max_refills=4)
    trainer, seen = watched_run(
        cppo=options,
        rewards=uneven,
        per_device_train_batch_size=4,
        ddp_backend="gloo",
        max_steps=4,
        num_iterations=1,
    )
    assert all(rollout["advantages"].all() for rollout in seen["rollouts"])
    return trainer


def agreed(trainer: Any) -> dict[str, torch.Tensor]:
    """The weights, which must be those of every process."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = weights_of(model)
    assert_same_everywhere(weights)
    return weights


def save(name: str, folder: Path) -> None:
    processes = int(os.environ["WORLD_SIZE"])
    trainer, seen = run(name, processes)
    metrics = {metric: logged(trainer, metric) for metric in METRICS}
    micro = [[len(each["advantages"]) for each in seen["micro"]]] * processes
    dist.all_gather_object(micro, micro[0])
    weights = agreed(trainer)
    if dist.get_rank() == 0:
        torch.save({"weights": weights, "metrics": metrics, "micro": micro}, folder / f"{name}.pt")


if __name__ == "__main__":
    for family in ("text", "qwen2_5_vl"):
        folder_of(family)  # once there is a process group, only the first one saves
    for case in CASES:
        save(case, Path(sys.argv[1]))
    if dist.get_world_size() == 2 and check()[-1].fits:
        agreed(more := refilled())
        assert 0 < max(logged(more, "cppo/refills")) <= 4
        assert logged(more, "cppo/kept_share") == [0.25] * 4
        assert logged(more, "cppo/equal_share") == [0.0] * 4
    # Older TRL waits for the images of all processes whenever one has some.
    if dist.get_world_size() == 2 and hasattr(GRPOConfig, "log_multimodal"):
        shares = logged(one := one_sided(), "cppo/gated_share")
        agreed(one)
        assert len(shares) == 4 and all(0 < share <= 0.5 for share in shares), shares
        assert any(value > 0 for value in logged(one, "cppo/cpl_loss"))
    dist.barrier()  # gloo aborts in a process that the others leave in the midst of a collective
    dist.destroy_process_group()
