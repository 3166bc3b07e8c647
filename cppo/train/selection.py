"""From the rewards of a step to the completions that its update runs on.

    rewards of all processes -> advantages -> prune -> cut the surplus of dynamic allocation

Every process works all of it out alike, on the rewards of all, so that "batch" means the batch and
the number of processes changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cppo import reference
from cppo.config import CPPOConfig
from cppo.ops.advantages import advantages_and_prune
from cppo.seeds import seed_from


def select_completions(rewards: Tensor, config: CPPOConfig, step: int) -> tuple[Tensor, Tensor]:
    """Advantages and the completions that stay after pruning.

    Args:
        rewards: (B,) fp64 on the CPU, completions of a question are neighbours; NaN where no reward
            function applies: such a completion is in no mean and no std, has A = 0, never stays.
        step: of the run; what `prune="random"` draws depends on it and on the seed.
    Returns: (B,) fp32 advantages, (K,) int64 ascending.
    """
    generator = torch.Generator().manual_seed(seed_from(config.seed, "prune", step))
    options: dict[str, Any] = {
        "scale": config.scale_rewards,
        "scope": config.prune_scope,
        "prune": config.prune,
        "drop_zero": config.drop_zero_variance,
    }
    scored = ~rewards.isnan()
    sizes = config.group_size, config.prune_rate
    if scored.all():
        return advantages_and_prune(rewards, *sizes, **options, generator=generator)
    # Only the specification has a mask.
    noise = torch.rand(len(rewards), generator=generator)
    return reference.advantages_and_prune(rewards, *sizes, **options, noise=noise, mask=scored)


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
