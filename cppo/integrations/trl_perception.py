"""VPPO in a rollout of TRL, and PAPO in a micro-batch: what the removing view alone says.

TRL has no weights of tokens, but advantages of tokens: VPPO's weights are multiplied into these
when the rollout is pruned. PAPO's term is added to TRL's loss, reduced as `loss_type` says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import cppo
from cppo import reference
from cppo.integrations.trl_options import averages_rows, loss_type
from cppo.integrations.trl_rows import Batch, loss_mask, per_completion, take_rows
from cppo.integrations.trl_views import Forwards, anchor_of, removing_view


def _looking(trainer: Any, batch: Batch, counts: Tensor) -> tuple[Tensor, Tensor] | None:
    """Which rows have an image and count, and those that run: at least one, if another process has.

    None if no process has any: all of them run the forward or none does.
    """
    images = torch.tensor(batch.get("num_images") or [0] * len(counts), device=counts.device)
    looks = (images > 0) & counts
    if not trainer.accelerator.gather(looks.sum()[None]).any():
        return None
    return looks, looks.nonzero()[:, 0] if looks.any() else images.argmax()[None]


def weigh(trainer: Any, batch: Batch) -> Batch:
    """A rollout whose advantages are (K, T), those of VPPO (arXiv 2510.09285).

    Specification: `cppo.visual_dependency`, over the rollouts of all processes.
    """
    advantages, options = batch["advantages"], trainer.cppo.loss
    found = None
    if "cppo_seed" in batch:
        found = _looking(trainer, batch, per_completion(advantages) != 0)
    if found is None:
        return batch
    looks, rows = found
    part = take_rows(batch, rows)
    old = part.get("old_per_token_logps")
    old = trainer._old_logps(part) if old is None else old
    view = removing_view(trainer, trainer._call_of(part), batch, rows)
    removed = trainer._forward(view)[0]
    mask = loss_mask(batch).bool()
    of_rows = torch.full((2, *mask.shape), math.nan, dtype=old.dtype, device=old.device)
    of_rows[:, rows] = torch.stack([old, removed])
    of_rows[1, ~looks] = math.nan
    sizes = {"mask": mask, "fraction": options.vppo_fraction, "floor": options.vppo_floor}
    gather = trainer.accelerator.gather
    of_all = gather(cppo.visual_dependency(*of_rows, **sizes).per_completion)
    dependency = cppo.visual_dependency(*of_rows, **sizes, of_all=of_all)
    weights, seen = dependency.token_weights, mask & looks[:, None]
    sums = torch.stack([dependency.per_token[seen].sum(), (weights[seen] > 0).sum(), seen.sum()])
    total, learn, tokens = gather(sums[None]).sum(0).tolist()
    log = trainer._metrics["train"]
    log["cppo/vppo_dependency"].append(total / max(tokens, 1))
    log["cppo/vppo_token_share"].append(learn / max(tokens, 1))
    log["cppo/vppo_largest_factor"].append(gather(weights.max()).max().item())
    spread = advantages if advantages.dim() == 2 else advantages[:, None]
    return batch | {"advantages": spread * weights}


def papo(trainer: Any, inputs: Batch, forwards: Forwards) -> Tensor | float:
    """PAPO's term of a micro-batch (arXiv 2507.06448), as it is added to TRL's loss."""
    call, anchor = anchor_of(inputs, forwards, type(trainer).__name__)
    options, log = trainer.cppo.loss, trainer._metrics["train"]
    weight = inputs.get(
        "cppo_weight", torch.ones(len(inputs["advantages"]), device=anchor[0].device)
    )
    found = _looking(trainer, inputs, weight > 0)
    if found is None:
        return 0.0
    looks, rows = found
    view = removing_view(trainer, take_rows(call, rows), inputs, rows)
    with torch.set_grad_enabled(options.penalises_removed):
        removed, entropies, *_ = trainer._forward(view)
    depends = reference._k3(removed.detach() - anchor[0][rows], bound=10)
    mask = loss_mask(inputs)
    seen = (mask[rows] * looks[rows, None]).to(depends)
    per_token = options.papo_entropy_coef * entropies - options.papo_coef * depends
    loss = torch.zeros_like(anchor[0]).index_add(0, rows, (per_token * seen).to(anchor[0]))
    sums = torch.stack([(depends * seen).sum(), (entropies * seen).sum(), seen.sum()]).detach()
    of_depends, of_entropies, tokens = trainer.accelerator.gather(sums[None]).sum(0).tolist()
    log["cppo/papo_kl"].append(of_depends / max(tokens, 1))
    if options.penalises_removed:
        log["cppo/papo_entropy"].append(of_entropies / max(tokens, 1))
    term = _reduced(trainer, loss, mask, inputs)
    # Rows that only fill up are among those that a mean over rows divides by.
    return term * weight.max() if averages_rows(trainer) else term


def _reduced(trainer: Any, per_token: Tensor, mask: Tensor, inputs: Batch) -> Tensor:
    """A sum over tokens, zero where masked, divided as TRL divides its KL term."""
    kind, rows = loss_type(trainer), len(mask)
    steps = trainer.current_gradient_accumulation_steps
    if kind in ("grpo", "sapo"):
        return (per_token.sum(1) / mask.sum(1).clamp(min=1)).sum() / rows / steps
    if kind == "bnpo":
        return per_token.sum() / mask.sum().clamp(min=1) / steps
    if kind == "dr_grpo":
        return per_token.sum() / (rows * trainer.max_completion_length) / steps
    if kind == "luspo":
        return per_token.sum() / rows / steps
    items = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
    return per_token.sum() / (items * steps / trainer.args.steps_per_generation)
