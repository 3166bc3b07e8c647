"""The algorithm: one update of the policy on sampled and scored completions.

    rewards -> advantages -> prune -> pack -> forward the views -> token statistics
    -> perception mask -> loss -> gradients

`cppo_update` is all of it, in the order of the two papers (arXiv 2503.22342, 2601.00501); `select`
and `microbatch_loss` are its two halves. The rest is in other modules: `batch` cuts the completions
into micro-batches, and `update` has the optimizer, the other processes, the clock, and the journal
of a run that may be stopped.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from cppo.model.forward import lm_head
from cppo.ops.loss import linear_cppo_loss
from cppo.options.trainer import CPPOConfig
from cppo.records import LossOutput, NumItems
from cppo.rollouts.rollout import Rollouts
from cppo.seeds import seed_from
from cppo.train.batch import Batch
from cppo.train.mismatch import mismatch
from cppo.train.perception import removed_entropy
from cppo.train.policy import Policy
from cppo.train.processes import Processes
from cppo.train.selection import select_completions, unbiased_weights, without_surplus
from cppo.train.update import Update
from cppo.train.views import forward_views


def cppo_update(run: Update, rollouts: Rollouts, rewards: Tensor) -> None:
    """Trains the policy on the completions that pruning keeps. Collective.

    Args:
        run: the policy, and what surrounds its update.
        rollouts: B completions of this process, those of a question next to each other.
        rewards: (B,), NaN where a completion has none.
    """
    config = run.policy.config
    # Rewards -> advantages -> prune.
    batch = select(run.policy, rollouts, rewards, run.step, run.processes)
    batch = run.prepared(batch)
    # Pack -> forward the views -> token statistics -> perception mask -> loss -> gradients, which
    # add up over the micro-batches of an optimizer step.
    for completions, num_items in run.optimizer_steps(batch):
        for part in batch.microbatches(completions, config.max_tokens_per_microbatch):
            run.add_gradient(microbatch_loss, batch, part, num_items)


def select(
    policy: Policy, rollouts: Rollouts, rewards: Tensor, step: int, processes: Processes
) -> Batch:
    """Rewards -> advantages -> prune: the completions of this process that are kept. Collective."""
    config = policy.config
    # A = (r - mean) / std within a question; of each question, the completions with the largest |A|
    # are kept. Every process works this out from the rewards of all.
    of_all, own = processes.joined(rewards, rollouts.truncated, rollouts.lengths)
    everyones, truncated, lengths = of_all
    advantages, pruned = select_completions(everyones, config, step, lengths)
    kept = without_surplus(pruned, advantages, config, step)
    if config.mask_overlong:
        kept = kept[~truncated[kept]]
    per_token = {}
    if config.prune == "unbiased":
        weights = unbiased_weights(kept, len(pruned), advantages, of_all, config)[own]
        weights = weights.to(rollouts.input_ids.device)[:, None]
        per_token["token_weights"] = weights.expand_as(rollouts.input_ids).contiguous()
    places = ((own.start <= kept) & (kept < own.stop)).nonzero()[:, 0]
    return Batch(
        rollouts,
        advantages[own],
        kept[places] - own.start,
        suppressed=policy.suppressed,
        seed=seed_from(config.seed, "views", step, processes.rank),
        per_token=per_token,
        share_prompts=config.share_prompts and policy.ways.packed,
        ways=policy.ways,
        places=places,
    )


def microbatch_loss(
    model: nn.Module,
    batch: Batch,
    completions: Tensor,
    num_items: NumItems,
    config: CPPOConfig,
    processor: Any,
) -> LossOutput:
    """Pack -> forward the views -> token statistics -> perception mask -> loss.

    Args:
        completions: a part of `batch.microbatches`.
        num_items: sizes of the whole whose parts add up to its loss.
    """
    # The completions are one stream without padding. All of them run under their own images. With
    # contrastive perception, those with A > 0 also run under the positive and the negative view.
    hidden, packed = forward_views(model, batch, completions, config, processor)
    # One fused op, in tiles of logits: log-probability and entropy of each token in each view; the
    # perception mask, of the tokens whose entropy rises most in the negative view; the clipped
    # policy loss of all tokens, and the contrastive loss of the selected ones.
    head = lm_head(model, batch.suppressed, hidden.anchor.dtype)
    removed = removed_entropy(model, batch, packed, num_items, config, processor)
    removed_logps = packed.per_token.get("removed_logps") if removed is None else removed.logps
    # "dr_grpo" divides by the same length in every micro-batch.
    max_length = config.loss.max_length or config.max_completion_tokens
    output = linear_cppo_loss(
        hidden,
        targets=packed.targets,
        advantages=batch.to_device(batch.advantages[completions]),
        **head._asdict(),
        old_logps=packed.per_token.get("old_logps"),
        ref_logps=packed.per_token.get("ref_logps"),
        sampling_logps=packed.per_token.get("sampling_logps"),
        token_weights=packed.per_token.get("token_weights"),
        removed_logps=removed_logps,
        cu_seqlens=packed.row_cu_seqlens,
        num_items=num_items,
        config=dataclasses.replace(config.loss, max_length=max_length),
    )
    metrics = output.metrics | mismatch(output.logps, packed, config.loss)
    if removed is None:
        return output._replace(metrics=metrics)
    metrics["papo/entropy"] = removed.metrics["entropy"]
    for name in metrics.keys() & {"head_gemm_rows"}:
        metrics[name] = metrics[name] + removed.metrics[name]
    return output._replace(loss=output.loss + removed.loss, metrics=metrics)
