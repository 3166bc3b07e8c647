"""From the rewards of a step to the completions that its update runs on.

    rewards of all processes -> advantages -> prune -> choose groups
    -> cut the surplus of dynamic allocation -> weights, where chance has pruned

Every process computes the same from the rewards of all processes, so that "batch" means the whole
batch and the number of processes changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cppo import reference
from cppo.ops.advantages import advantages_and_prune
from cppo.options.trainer import CPPOConfig
from cppo.seeds import seed_from


def select_completions(
    rewards: Tensor, config: CPPOConfig, step: int, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Advantages and the completions that stay after pruning, of the groups that are chosen.

    Args:
        rewards: (B,) fp64 on the CPU, completions of a question are neighbours; NaN where no reward
            function applies: such a completion is in no mean and no std, has A = 0, never stays.
        step: of the run; what chance decides depends on it and on the seed.
        lengths: (B,) tokens of each completion.
    Returns: (B,) fp32 advantages, (K,) int64 ascending.
    """
    generator = torch.Generator().manual_seed(seed_from(config.seed, "prune", step))
    options: dict[str, Any] = {
        "scale": config.scale_rewards,
        "scope": config.prune_scope,
        "prune": config.prune,
        "drop_zero": config.drop_zero_variance,
        "advantages_of": config.advantages_of,
        "lengths": lengths,
    }
    scored = ~rewards.isnan()
    sizes = config.group_size, config.prune_rate
    if scored.all():
        advantages, kept = advantages_and_prune(rewards, *sizes, **options, generator=generator)
    else:
        # Only the specification has a mask.
        options |= {"noise": torch.rand(len(rewards), generator=generator), "mask": scored}
        advantages, kept = reference.advantages_and_prune(rewards, *sizes, **options)
    return advantages, kept[_in_chosen_groups(rewards, config)[kept]]


def _in_chosen_groups(rewards: Tensor, config: CPPOConfig) -> Tensor:
    """(B,) bool: the completions of the groups that `group_top_p` keeps."""
    if config.group_top_p is None:
        return torch.ones_like(rewards, dtype=torch.bool)
    size = config.group_size
    groups = reference.select_groups(rewards, size, config.group_top_p, ~rewards.isnan())
    chosen = torch.zeros(len(rewards) // size, dtype=torch.bool).index_fill(0, groups, True)
    return chosen.repeat_interleave(size)


def without_surplus(kept: Tensor, advantages: Tensor, config: CPPOConfig, step: int) -> Tensor:
    """At most `batch_size` of the completions, where dynamic allocation draws too many."""
    if not config.dynamic_allocation:
        return kept
    if config.prune != "unbiased":
        return cut_surplus(kept, advantages, config.group_size, config.batch_size)
    generator = torch.Generator().manual_seed(seed_from(config.seed, "surplus", step))
    return cut_by_chance(kept, config.batch_size, generator)


def cut_surplus(kept: Tensor, advantages: Tensor, group_size: int, batch_size: int) -> Tensor:
    """Takes completions out until `batch_size` are left, evenly over the questions.

    The question with the most completions left (of several the last) gives up the one with its
    smallest |advantage| (of several the last): what dynamic allocation draws too much is cut the
    same way every time.

    Args:
        kept: (K,) int64 ascending. advantages: (B,). batch_size: completions that may stay.
    Returns: (min(K, batch_size),) int64 ascending.
    """
    groups: dict[int, list[int]] = {}
    for index in kept.tolist():
        groups.setdefault(index // group_size, []).append(index)
    size = advantages.abs().tolist()
    for _ in range(len(kept) - batch_size):
        members = max(groups.items(), key=lambda item: (len(item[1]), item[0]))[1]
        members.remove(min(members, key=lambda i: (size[i], -i)))
    left = sorted(index for members in groups.values() for index in members)
    return torch.tensor(left, dtype=torch.int64, device=kept.device)


def cut_by_chance(kept: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """`batch_size` of the completions, evenly over the questions, each of the same probability."""
    if len(kept) <= batch_size:
        return kept
    start = torch.rand((), generator=generator, dtype=torch.float64)
    return kept[((torch.arange(batch_size) + start) * (len(kept) / batch_size)).long()]


def unbiased_weights(
    kept: Tensor,
    num_pruned: int,
    advantages: Tensor,
    of_all: Sequence[Tensor],
    config: CPPOConfig,
) -> Tensor:
    """What makes the gradient of completions kept by chance that of all of them, in the mean.

    A completion stays with probability p, and with batch_size / num_pruned when the surplus is cut.
    Its weight is one over both, times what the loss divides by of the kept completions over what it
    would divide by of all (completions, or tokens with reduction = "dapo"): so the loss divides, as
    with the other rules, by what it sees, and the weights are 1 on average. Exact with one
    optimizer step per pass; with several, as far as these are of one size.

    Args:
        kept: (K,) what the update runs on.
        num_pruned: completions that pruning kept, before the surplus was cut.
        advantages: (B,).
        of_all: rewards, truncated and lengths, (B,) each.
    Returns: (B,) fp32; 0 of what is not kept.
    """
    rewards, truncated, lengths = of_all
    scored = ~rewards.isnan()
    # What an update without pruning would run on.
    trained = scored & _in_chosen_groups(rewards, config)
    if config.mask_overlong:
        trained &= ~truncated
    if config.drop_zero_variance:
        trained &= advantages != 0
    counts = lengths.double() if config.loss.reduction == "dapo" else torch.ones_like(rewards)
    share = counts[kept].sum() / counts[trained].sum().clamp(min=1)
    if config.dynamic_allocation:
        share = share * max(1.0, num_pruned / config.batch_size)
    sizes = config.group_size, config.prune_rate, config.prune_scope
    own = reference.prune_weights(advantages, kept, *sizes, mask=scored) * share
    weights = torch.zeros(len(rewards), dtype=torch.float64).index_put((kept,), own)
    return weights.float()
