"""VPPO and PAPO in an update: what the removing view alone says of the kept completions.

Both need log-probabilities under one perturbed view. They are computed once, before the update and
without a gradient. VPPO turns them into weights of the tokens (arXiv 2510.09285), PAPO into a term
of the loss (arXiv 2507.06448). PAPO's penalty on the entropy without the image has a gradient: with
it the view runs in every micro-batch, which then computes the log-probabilities too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from cppo.model.forward import lm_head
from cppo.ops.loss import linear_cppo_loss
from cppo.ops.packed_batch import PackedBatch
from cppo.ops.visual_dependency import visual_dependency
from cppo.options.trainer import CPPOConfig, LossConfig
from cppo.records import LossOutput, NumItems
from cppo.train.batch import Batch
from cppo.train.journal import Once
from cppo.train.metrics import Largest, Mean, Metric
from cppo.train.policy import Policy
from cppo.train.processes import Processes
from cppo.train.views import anchor_hidden, logps_of, removed_hidden


def to_compare(batch: Batch, loss: LossConfig) -> Tensor:
    """The kept completions that run under the removing view before the update."""
    # With a penalty on its entropy the view runs in the micro-batches.
    return batch.kept[:0] if loss.penalises_removed else batch.compared(batch.kept, loss)


def compared(
    policy: Policy, batch: Batch, old_logps: Tensor | None, once: Once, processes: Processes
) -> tuple[dict[str, Tensor], dict[str, Metric]]:
    """What the loss takes per token, (B, L) each by its name there, and metrics. Collective.

    Args:
        old_logps: (B, L) of the policy before the update; None: computed where they are needed.
    """
    config, model = policy.config, policy.model
    chosen = to_compare(batch, config.loss)

    def logps(hidden_of: Callable[[PackedBatch], Tensor]) -> Tensor:
        return logps_of(model, batch, chosen, config, once, hidden_of)

    removed = logps(lambda own: removed_hidden(model, batch, own, config, policy.processor))
    without = torch.ones(len(removed), dtype=torch.bool)
    without[chosen] = False
    removed.masked_fill_(batch.to_device(without)[:, None], math.nan)
    if config.loss.perception == "papo":
        return {"removed_logps": removed}, {}
    if old_logps is None:
        old_logps = logps(partial(anchor_hidden, model, batch))
    return _weights(batch, old_logps, removed, config, processes)


def _weights(
    batch: Batch, old_logps: Tensor, removed_logps: Tensor, config: CPPOConfig, processes: Processes
) -> tuple[dict[str, Tensor], dict[str, Metric]]:
    """VPPO's: least, largest and mean dependency are of an optimizer step of all processes."""
    rollouts, loss = batch.rollouts, config.loss
    mask = rollouts.attention_mask.bool() & rollouts.completion_mask.bool()
    weights, dependency = torch.ones_like(old_logps), torch.zeros_like(old_logps)
    for completions in batch.dealt(config.optimizer_steps):
        rows = batch.to_device(completions)
        weigh = partial(
            visual_dependency,
            old_logps[rows],
            removed_logps[rows],
            mask=mask[rows],
            fraction=loss.vppo_fraction,
            floor=loss.vppo_floor,
        )
        found = weigh()
        if processes.size > 1:
            everyones = processes.gather(found.per_completion.tolist())
            of_all = torch.tensor(sum(everyones, []), dtype=torch.float64)
            found = weigh(of_all=batch.to_device(of_all))
        weights[rows], dependency[rows] = found.token_weights, found.per_token
    tokens = mask & ~removed_logps.isnan()
    tokens[batch.to_device(torch.isin(torch.arange(len(mask)), batch.kept, invert=True))] = False
    learn = weights[tokens]
    metrics: dict[str, Metric] = {}
    if len(learn):
        metrics["vppo/dependency"] = Mean(dependency[tokens].sum().item(), len(learn))
        metrics["vppo/token_share"] = Mean((learn > 0).sum().item(), len(learn))
        metrics["vppo/largest_factor"] = Largest(learn.max().item())
    return {"token_weights": weights}, metrics


def removed_entropy(
    model: nn.Module,
    batch: Batch,
    packed: PackedBatch,
    num_items: NumItems,
    config: CPPOConfig,
    processor: object,
) -> LossOutput | None:
    """PAPO's penalty on the entropy of a micro-batch without its images, and the logps there.

    None where there is no penalty or no image. It is the loss of no advantage.
    """
    loss = config.loss
    if not loss.penalises_removed or not batch.have_images(packed.kept).all():
        return None
    hidden = removed_hidden(model, batch, packed, config, processor)
    return linear_cppo_loss(
        hidden,
        targets=packed.targets,
        advantages=hidden.new_zeros(len(packed.kept)),
        **lm_head(model, batch.suppressed, hidden.dtype)._asdict(),
        cu_seqlens=packed.row_cu_seqlens,
        num_items=num_items,
        config=LossConfig(
            temperature=loss.temperature,
            reduction=loss.reduction,
            max_length=loss.max_length or config.max_completion_tokens,
            entropy_coef=-loss.papo_entropy_coef,
        ),
    )
