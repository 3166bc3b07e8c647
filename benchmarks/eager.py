"""Plain eager PyTorch, as a user writes it: log_softmax, entropy, gather and KL per view, autograd.

`view_stats` and `contrastive_loss` are the whole competitor: the first is what other libraries
replace (their per-token log-probabilities and entropies), the second the arithmetic on (B, L)
tensors that every competitor shares. Entropies only select tokens here, so no graph is kept for
them, and the positive view's is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cppo.options.trainer import LossConfig
from cppo.records import Views
from cppo.reference import ENTROPY_ERROR

# (rows, targets, with_entropy) -> log-probabilities of the targets and entropies (or None)
Stats = Callable[[Tensor, Tensor, bool], "tuple[Tensor, Tensor | None]"]
Outputs = dict[str, Tensor]


def view_stats(logits: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and, without a gradient, the entropy of each row."""
    logp_all = torch.log_softmax(logits.float(), dim=-1)
    logps = logp_all.gather(-1, targets[..., None])[..., 0]
    if not with_entropy:
        return logps, None
    with torch.no_grad():
        entropy = -(logp_all.exp() * logp_all).sum(-1)
    return logps, entropy


def token_stats(logits: Tensor, targets: Tensor) -> Outputs:
    """Both statistics with their gradients."""
    logp_all = torch.log_softmax(logits.float(), dim=-1)
    logps = logp_all.gather(-1, targets[..., None])[..., 0]
    return {"logps": logps, "entropy": -(logp_all.exp() * logp_all).sum(-1)}


def linear_token_stats(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    return token_stats(F.linear(hidden, weight), targets)


def select_tokens(
    entropy: Tensor, negative_entropy: Tensor, looks: Tensor, fraction: float
) -> Tensor:
    """(B, L) bool: in each completion that looks, the tokens whose entropy rises most."""
    rise = negative_entropy - entropy
    rises = (rise > ENTROPY_ERROR * (1 + negative_entropy)) & looks[:, None]
    score = torch.where(rises, rise / (negative_entropy + 1e-6), -torch.inf)
    count = (fraction * rises.sum(1)).floor().long().clamp(min=1)
    threshold = score.sort(dim=1, descending=True).values.gather(1, count[:, None] - 1)
    return rises & (score >= threshold)


def policy_loss(
    logps: Tensor, advantages: Tensor, config: LossConfig, mask: Tensor | None = None
) -> Tensor:
    """The clipped surrogate, on-policy: mean over completions of the token mean."""
    ratio = (logps - logps.detach()).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    surrogate = torch.min(ratio * advantages[:, None], clipped * advantages[:, None])
    if mask is None:
        return -surrogate.mean(1).mean()
    return -((surrogate * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def _k3(logps: Tensor, anchor_logps: Tensor) -> Tensor:
    d = (logps - anchor_logps).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)


def contrastive_loss(
    stats: Stats,
    views: Views,
    targets: Tensor,
    advantages: Tensor,
    config: LossConfig,
    looking: Tensor | None = None,
    mask: Tensor | None = None,
) -> Outputs:
    """Policy loss plus contrast on the sampled token.

    Without `looking` it is the authors' scheme: every row of all three views, and a mask over the
    results. With it (indices, A > 0) the perturbed views hold only those completions. `mask` (B, L)
    marks the response tokens of padded rows.
    """
    logps, entropy = stats(views.anchor, targets, True)
    loss = policy_loss(logps, advantages, config, mask)
    assert entropy is not None
    if views.positive is None or views.negative is None:
        return {"loss": loss, "logps": logps, "entropy": entropy}
    if looking is None:
        looks = advantages > 0 if config.gating else torch.ones_like(advantages, dtype=torch.bool)
        own_targets, own_logps, own_entropy = targets, logps, entropy
    else:
        looks = torch.ones_like(looking, dtype=torch.bool)
        own_targets, own_logps, own_entropy = targets[looking], logps[looking], entropy[looking]
    positive, _ = stats(views.positive, own_targets, False)
    negative, negative_entropy = stats(views.negative, own_targets, True)
    assert negative_entropy is not None
    if mask is not None:
        # No rise at a padded token.
        own_mask = mask if looking is None else mask[looking]
        own_entropy = own_entropy.masked_fill(~own_mask, torch.inf)
    selected = select_tokens(own_entropy, negative_entropy, looks, config.fraction)
    margin = _k3(positive, own_logps) - _k3(negative, own_logps)
    outputs = {"loss": loss, "logps": logps, "entropy": entropy}
    return _with_contrast(outputs, margin, selected, looking, config)


def _with_contrast(
    outputs: Outputs, margin: Tensor, selected: Tensor, looking: Tensor | None, config: LossConfig
) -> Outputs:
    cpl = F.softplus(margin / config.tau).where(selected, 0.0)
    if config.cpl_reduction == "sequence":
        cpl = (cpl.sum(1) / selected.sum(1).clamp(min=1)).sum() / len(outputs["logps"])
    else:
        cpl = cpl.sum() / selected.sum().clamp(min=1)
    loss = outputs["loss"] + config.cpl_coef * cpl
    if looking is not None:
        selected = torch.zeros_like(outputs["logps"], dtype=torch.bool).index_put(
            (looking,), selected
        )
    return {**outputs, "loss": loss, "perception_mask": selected}


def full_divergence_loss(
    views: Views, targets: Tensor, advantages: Tensor, config: LossConfig
) -> Outputs:
    """The contrast over the whole vocabulary, KL(a || p) - KL(a || n), where A > 0."""
    anchor = torch.log_softmax(views.anchor.float(), dim=-1)
    logps = anchor.gather(-1, targets[..., None])[..., 0]
    with torch.no_grad():
        entropy = -(anchor.exp() * anchor).sum(-1)
    loss = policy_loss(logps, advantages, config)
    assert views.positive is not None and views.negative is not None
    looking = (advantages > 0).nonzero()[:, 0]
    positive = torch.log_softmax(views.positive[looking].float(), dim=-1)
    negative = torch.log_softmax(views.negative[looking].float(), dim=-1)
    with torch.no_grad():
        negative_entropy = -(negative.exp() * negative).sum(-1)
    looks = torch.ones_like(looking, dtype=torch.bool)
    selected = select_tokens(entropy[looking], negative_entropy, looks, config.fraction)
    margin = (anchor[looking].exp() * (negative - positive)).sum(-1)
    outputs = {"loss": loss, "logps": logps, "entropy": entropy}
    return _with_contrast(outputs, margin, selected, looking, config)


def looking_part(views: Views, advantages: Tensor) -> tuple[Views, Tensor]:
    """The perturbed views of the completions with A > 0 alone, and which these are."""
    looking = (advantages > 0).nonzero()[:, 0]
    perturbed: list[Any] = [None if view is None else view[looking] for view in views[1:]]
    return Views(views.anchor, *perturbed), looking
