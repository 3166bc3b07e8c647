"""vLLM under TRL: its importance weights on the rows that are left."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cppo.integrations.trl_rows import Batch, loss_mask


def is_postponed(trainer: Any, generate: Any) -> bool:
    """Whether the importance weights of vLLM can wait for the pruning.

    They cannot if the rollout is not TRL's own: whoever changed it may read them.
    Args: generate: the `_generate_and_score_completions` behind the mixin.
    """
    return (
        getattr(trainer, "use_vllm", False)
        and trainer.vllm_importance_sampling_correction
        and generate.__func__.__module__.startswith("trl.")
    )


def correct(trainer: Any, batch: Batch) -> None:
    """Add TRL's importance weights and its metrics of them to a pruned rollout.

    As in TRL's documentation of vllm_importance_sampling_mode: e^d, where d is the difference of
    the old and the sampling log-probability of a token, or its sum over a completion; truncated it
    is clamped to the bounds, masked it is 0 outside of them. A token that vLLM gave no
    log-probability has d = 0. `cppo.importance_weights` sums a completion exactly; this sums as TRL
    does, so that early and late pruning have the same bits.
    """
    mask, mode = loss_mask(batch), trainer.vllm_importance_sampling_mode
    low, high = (getattr(trainer, f"vllm_importance_sampling_clip_{x}") for x in ("min", "max"))
    difference = batch["old_per_token_logps"] - batch["sampling_per_token_logps"]
    weights = (difference * mask).nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        weights = weights.sum(-1, keepdim=True)
    weights = weights.exp()
    if mode.endswith("truncate"):
        weights = weights.clamp(low, high)
    else:
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        weights = weights.masked_fill((weights < low) | (weights > high), 0.0)
    batch["importance_sampling_ratio"] = weights
    # One per completion, but not of the rows that only fill up; or one per token.
    rows = batch.get("cppo_weight", torch.ones_like(batch["advantages"])) > 0
    _log(
        trainer,
        difference.abs()[mask.bool()],
        weights[rows] if mode.startswith("sequence") else weights[mask.bool()],
    )


def _log(trainer: Any, differences: Tensor, weights: Tensor) -> None:
    """TRL's metrics "sampling/...", over all processes."""
    log, gather = trainer._metrics["train"], trainer.accelerator.gather

    def add(name: str, values: Tensor, over: str) -> None:
        mine = getattr(values, over)() if values.numel() else values.new_tensor(math.nan)
        everyones = gather(mine)
        everyones = everyones[~everyones.isnan()]
        value = getattr(everyones, over)().item() if len(everyones) else 0.0
        log[f"sampling/{name}/{over}"].append(value)

    for over in ("mean", "max"):
        add("sampling_logp_difference", differences[~differences.isnan()], over)
    for over in ("min", "mean", "max"):
        add("importance_sampling_ratio", weights, over)
