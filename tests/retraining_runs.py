"""The runs that test_retraining trains again: their settings, and what is recorded of them.

As a script it is one process of several: python tests/retraining_runs.py FOLDER SETTING...
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from retraining import Completion, Outcome, Run, Weights
from torch import Tensor
from trainer_cases import VIEWS, image, noise, small_run, tiny

from cppo.model.prompts import tokenizer_of
from cppo.options.trainer import LoraConfig
from cppo.train import algorithm
from cppo.train.trainer import CPPOTrainer

# Every coefficient is large, so that an error of 1 % in it shows.
ONE_PROCESS: dict[str, dict[str, Any]] = {
    "text": dict(prune_rate=0.5, temperature=0.8),
    "dapo": dict(
        reduction="dapo", batch_size=12, prune_rate=0.25, max_tokens_per_microbatch=90,
        share_prompts=True, weight_decay=2.0, max_grad_norm=0.05,
    ),
    "several passes": dict(
        reduction="dr_grpo", scale_rewards="none", num_iterations=2, optimizer_steps=2,
        clip_low=0.1, clip_high=0.15, dual_clip=1.3,
    ),
    "kl": dict(
        kl_coef=0.5, entropy_coef=0.5, lr_scheduler="linear", warmup_steps=1, max_steps=4,
        scale_rewards="batch", gradient_checkpointing=True,
    ),
    "gspo": dict(
        importance="sequence", num_iterations=2, clip_low=0.01, clip_high=0.02,
        lr_scheduler="cosine",
    ),
    "lora": dict(lora=LoraConfig(r=4, alpha=8), learning_rate=1e-2, kl_coef=0.5),
    "vision": dict(
        family="qwen2_5_vl", prune_rate=0.5, cpl_coef=0.5, max_tokens_per_microbatch=200,
    ),
    "vision, whole vocabulary": dict(
        family="qwen3_vl", divergence="full", cpl_reduction="token", gating=False, cpl_coef=0.5,
        detach_anchor=True,
    ),
    "vision, k1": dict(
        family="qwen2_vl", divergence="k1", cpl_coef=0.5, kl_coef=0.5, freeze_vision_tower=True,
    ),
    "vision, lora": dict(
        family="qwen3_vl", lora=LoraConfig(r=4, alpha=8), cpl_coef=0.5, num_iterations=2,
        share_prompts=True,
    ),
    "every token": dict(family="qwen2_5_vl", perception="cpl_all", cpl_coef=0.5, prune_rate=0.5),
    "vppo": dict(
        family="qwen2_5_vl", perception="vppo", vppo_floor=0.5, prune_rate=0.5, batch_size=16,
        max_tokens_per_microbatch=200,
    ),
    "vppo, several passes": dict(
        family="qwen3_vl", perception="vppo", vppo_floor=0.0, vppo_fraction=0.2, reduction="dapo",
        num_iterations=2, optimizer_steps=2, kl_coef=0.5, batch_size=16,
    ),
    "papo": dict(family="qwen2_5_vl", perception="papo", papo_coef=30.0, prune_rate=0.5),
    "papo, entropies": dict(
        family="qwen2_vl", perception="papo", papo_coef=30.0, papo_entropy_coef=0.5,
        entropy_coef=-0.3, reduction="dr_grpo", num_iterations=2, max_tokens_per_microbatch=200,
    ),
}  # fmt: skip
TWO_PROCESSES: dict[str, dict[str, Any]] = {
    "vision": dict(
        family="qwen2_5_vl", reduction="dapo", prune_rate=0.5, cpl_coef=0.5, kl_coef=0.5,
        num_iterations=2,
    ),
    "vppo": dict(
        family="qwen2_5_vl", perception="vppo", vppo_floor=0.5, prune_rate=0.5, optimizer_steps=2,
        batch_size=16,
    ),
    "text": dict(prune_rate=0.5, temperature=0.8, entropy_coef=0.5),
    "batch scale": dict(prune_rate=0.5, scale_rewards="batch"),
}  # fmt: skip


def text_rows() -> list[dict[str, Any]]:
    """Prompts of very different lengths."""
    return [{"prompt": f"What is {i} + {i}?" + " Why?" * (7 * (i % 3))} for i in range(8)]


def image_rows(blind: bool) -> list[dict[str, Any]]:
    """Prompts with one or two images, and where `blind` some without any."""
    sizes = [[(48, 24)], [(24, 72), (72, 48)], [] if blind else [(48, 48)], [(96, 72)]]
    return [
        {
            "prompt": f"What do you see, {i}?",
            "images": [image(*size, seed=10 * i + k) for k, size in enumerate(own)],
        }
        for i, own in enumerate(sizes * 2)
    ]


# What VIEWS, perturbations of an image in [0, 1], make of the pixel values that the tiny models'
# processor hands out, 2 * image - 1. Random ones would have to be recorded.


def dimmed_values(values: Tensor) -> Tensor:
    return 0.9 * values


def darkened_values(values: Tensor) -> Tensor:
    return 0.2 * values - 0.8


def prepared(options: dict[str, Any], folder: Path) -> tuple[CPPOTrainer, Run]:
    """A trainer before its run of three fp32 steps, and what is known of the run by then."""
    own = dict(max_steps=3, max_completion_tokens=12, learning_rate=3e-3, log_completions=0)
    own |= VIEWS | options
    family = own.pop("family", "text")
    config = small_run(folder, **own)
    model, processor = tiny(family)
    # Many characters end a completion, so that the lengths differ.
    closing = tokenizer_of(processor).convert_tokens_to_ids(list("aeiou0123456789"))
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, *closing]
    plain = copy.deepcopy(model).double()
    # The token mean of the contrast is that of a micro-batch, which has images or has none.
    blind = config.loss.cpl_reduction == "sequence"
    rows = text_rows() if family == "text" else image_rows(blind)
    trainer = CPPOTrainer(model, noise, rows, config=config, processor=processor)
    views = (dimmed_values, darkened_values)
    return trainer, Run(config, plain, trained(trainer), list(trainer.suppressed), views)


def trained(trainer: CPPOTrainer) -> Weights:
    """The trained weights by their names in the plain model, in fp64."""
    return {name: p.detach().double() for name, p in _trained_parameters(trainer).items()}


def _trained_parameters(trainer: CPPOTrainer) -> dict[str, Tensor]:
    named = trainer.model.named_parameters()
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): p
        for name, p in named
        if p.requires_grad
    }


def completed(trainer: CPPOTrainer, run: Run) -> Outcome:
    """Lets the trainer run, puts its completions into `run.steps`, and returns where it ended.

    All that this file knows of the inside of a trainer is here and in `completions_of`.
    """
    select = algorithm.select

    def recording(policy: Any, rollouts: Any, rewards: Tensor, *others: Any) -> Any:
        run.steps.append(completions_of(rollouts, rewards))
        return select(policy, rollouts, rewards, *others)

    with patch.object(algorithm, "select", recording):
        trainer.train()
    state = trainer.optimizer.state
    moments = {n: state[p]["exp_avg"].double() for n, p in _trained_parameters(trainer).items()}
    norms = [row["grad_norm"] for row in trainer.history if "grad_norm" in row]
    return Outcome(trained(trainer), moments, norms)


def completions_of(rollouts: Any, rewards: Tensor) -> list[Completion]:
    """Every row of the rollouts without its padding, with the images of its question."""
    images, completions = rollouts.prompts.images, []
    for row, reward in enumerate(rewards.tolist()):
        ids, is_answer = rollouts.input_ids[row], rollouts.completion_mask[row]
        is_prompt = rollouts.attention_mask[row] & ~is_answer
        seen: tuple[Tensor, ...] = ()
        if images is not None and images.per_question[row // rollouts.group_size]:
            own = images.of([row // rollouts.group_size])
            seen = (own.joined("pixel_values").double(), own.joined("image_grid_thw"))
        completions.append(Completion(ids[is_prompt], ids[is_answer], reward, *seen))
    return completions


if __name__ == "__main__":
    for setting in sys.argv[2:]:
        folder = Path(sys.argv[1]) / setting
        own_trainer, own_run = prepared(TWO_PROCESSES[setting], folder)
        outcome = completed(own_trainer, own_run)
        told = {"steps": own_run.steps, "outcome": outcome}
        torch.save(told, folder.with_name(f"{setting} {os.environ['RANK']}.pt"))
    dist.destroy_process_group()
