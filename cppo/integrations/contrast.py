"""Contrastive perception from log-probabilities and entropies alone.

`cppo.cppo_loss` takes logits and `cppo.linear_cppo_loss` hidden states; a trainer with its own
fused LM head exposes neither.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import cppo
from cppo import reference
from cppo.options.loss import CONTRAST, REMOVING
from cppo.options.trainer import LossConfig
from cppo.records import Views

# Fields of LossConfig that say how images are contrasted; the trainer decides the others.
FIELDS = ("cpl_coef", *CONTRAST)
# And those of VPPO and PAPO.
REMOVING_FIELDS = tuple(name for own in REMOVING.values() for name in own)
DIVERGENCES = ("k3", "k1")  # "full" needs the whole vocabulary


class Contrast(NamedTuple):
    """The contrastive perception loss and the tokens that it acts on, (R, T) bool."""

    loss: Tensor
    selected: Tensor


def contrastive_perception(
    logps: Views,
    anchor_entropy: Tensor,
    negative_entropy: Tensor,
    mask: Tensor,
    num_completions: int,
    config: LossConfig,
) -> Contrast:
    """The contrastive perception loss (arXiv 2601.00501) of completions seen under three views.

    Specification: `cppo.reference.perception_mask` and `cppo.reference.contrastive_loss`, reduced
    as in `cppo.reference.cppo_loss`.
    Args:
        logps: (R, T) log-probabilities of the sampled tokens under each view; gradients flow.
        anchor_entropy, negative_entropy: (R, T) in nats; no gradients flow.
        mask: (R, T) bool, the tokens that may be selected.
        num_completions: what "sequence" divides by: the completions of the micro-batch, those with
            A <= 0 included. "token" divides by the number of selected tokens.
        config: its fields in `FIELDS` but cpl_coef; divergence is one of `DIVERGENCES`.
    Returns: Contrast(loss, selected); the loss is exactly 0, with a graph, if nothing is selected.
    """
    assert logps.positive is not None and logps.negative is not None
    selected = mask
    if config.perception != "cpl_all":
        selected = cppo.perception_mask(
            anchor_entropy, negative_entropy, fraction=config.fraction, mask=mask
        )
    views = (logps.anchor, logps.positive, logps.negative)
    values = reference.contrastive_loss(views, views, selected, config)
    if config.cpl_reduction == "token":
        return Contrast(values.sum() / selected.sum().clamp(min=1), selected)
    per_token = torch.zeros_like(logps.anchor).masked_scatter(selected, values)
    per_completion = per_token.sum(1) / selected.sum(1).clamp(min=1)
    return Contrast(per_completion.sum() / num_completions, selected)
