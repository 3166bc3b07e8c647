"""What a step reports, from its rollouts and from its update."""

from __future__ import annotations

from torch import Tensor

from cppo.config import CPPOConfig
from cppo.processes import Processes
from cppo.step import Batch

# What the micro-batches of all processes add up to. Which are there depends on the options.
_SUMMED = (
    *("loss", "policy_loss", "entropy", "clip_fraction", "kl", "cpl_loss", "num_selected"),
    *("microbatches", "computed_tokens"),
)


def rollout_metrics(batch: Batch, rewards: Tensor, by_name: dict[str, Tensor]) -> dict[str, float]:
    rollouts = batch.rollouts
    lengths = rollouts.completion_mask.sum(1).float()
    groups = rewards.view(-1, rollouts.group_size)
    metrics = {
        "reward/mean": rewards.mean().item(),
        "reward/std": groups.std(1, correction=0).mean().item(),
        "reward/zero_variance_share": (groups == groups[:, :1]).all(1).float().mean().item(),
        "kept_share": len(batch.kept) / len(rewards),
        "completion/tokens": lengths.mean().item(),
        "completion/max_tokens": lengths.max().item(),
        "completion/truncated_share": rollouts.truncated.float().mean().item(),
        "tokens/sampled": lengths.sum().item(),
        "tokens/trained": rollouts.completion_mask[batch.kept].sum().item(),
    }
    return metrics | {f"reward/{name}": values.mean().item() for name, values in by_name.items()}


def update_metrics(
    total: dict[str, float], updates: int, batch: Batch, config: CPPOConfig, processes: Processes
) -> dict[str, float]:
    """Means over the optimizer steps of what the micro-batches summed up to in `total`.

    `microbatch_fill` is the share of their token budget that the micro-batches use.
    """
    looking = batch.kept[batch.advantages[batch.kept] > 0]
    looking_tokens = config.num_iterations * batch.rollouts.completion_mask[looking].sum().item()
    sums = processes.sum([*(total.get(name, 0.0) for name in _SUMMED), looking_tokens])
    # A process without perturbed views reports none of their metrics; another one may.
    counts = processes.sum([float(name in total) for name in _SUMMED])
    seen = {n: s for n, s, count in zip(_SUMMED, sums, counts, strict=False) if count}
    selected = seen.pop("num_selected", None)
    parts, computed = seen.pop("microbatches", 0), seen.pop("computed_tokens", 0)
    metrics = {"loss": 0.0} | {name: value / max(updates, 1) for name, value in seen.items()}
    if selected is not None:
        metrics["perception_share"] = selected / max(sums[-1], 1)
    if parts:
        metrics["microbatch_fill"] = computed / (parts * config.max_tokens_per_microbatch)
    return metrics | {"grad_norm": total.get("grad_norm", 0.0) / max(updates, 1)}


def over_processes(own: dict[str, float], processes: Processes) -> dict[str, float]:
    """The mean of each process's metrics; token counts are summed."""
    sums = processes.sum(list(own.values()))
    return {
        name: total if name.startswith("tokens/") else total / processes.size
        for name, total in zip(own, sums, strict=True)
    }
