"""A backend in plain PyTorch: what has to be written to add one, and nothing else.

`cppo.fused.loss` composes the loss; these are the primitives that it is made of, for packed logits.
Their derivatives are autograd's of the specification, so none is written by hand here.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from cppo import reference
from cppo.fused.backend import Backend
from cppo.fused.fakes import accumulator
from cppo.fused.schema import COEFFICIENTS, CONTRASTS, SAVED, from_text


def _places(places: Tensor | None, rows: Tensor) -> Tensor:
    return rows if places is None else places[rows]


def _where(mask: Tensor | None, count: int) -> Tensor:
    """The rows that a mask names."""
    return torch.arange(count) if mask is None else mask.reshape(-1).nonzero()[:, 0]


def _gradient(outputs: Any, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    given = [(y, g) for y, g in zip(outputs, upstream, strict=True) if y.requires_grad]
    if not given:
        return [torch.zeros_like(x) for x in inputs]
    ys, gs = zip(*given, strict=True)
    found = torch.autograd.grad(ys, inputs, gs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def token_stats(logits, targets, mask, places, temperature, inplace):
    dtype, count = accumulator(logits), targets.numel()
    at = _where(mask, count)
    rows = logits.flatten(0, -2)[_places(places, at)].to(dtype)
    logps, entropy, saved = (torch.zeros(*n, count, dtype=dtype) for n in ((), (), (len(SAVED),)))
    logps[at], entropy[at] = reference.token_stats(rows, targets.reshape(-1)[at], temperature)
    return logps.view(targets.shape), entropy.view(targets.shape), saved


def token_stats_backward(d_logps, d_entropy, logits, targets, mask, places, saved, temperature):
    gradient, dtype = torch.zeros_like(logits), accumulator(logits)
    at = _where(mask, targets.numel())
    rows = logits.flatten(0, -2)[_places(places, at)].to(dtype).requires_grad_()
    upstream = [
        torch.zeros(len(at), dtype=dtype) if given is None else given.reshape(-1)[at].to(dtype)
        for given in (d_logps, d_entropy)
    ]
    found = reference.token_stats(rows, targets.reshape(-1)[at], temperature)
    (of_rows,) = _gradient(found, [rows], upstream)
    counts = (upstream[0] != 0) | (upstream[1] != 0)
    of_rows = of_rows.masked_fill(~counts[:, None], 0)
    gradient.view(-1, logits.shape[-1])[_places(places, at)] = of_rows.to(logits.dtype)
    return gradient


def token_stats_backward_(d_logps, d_entropy, logits, *rest):
    logits.copy_(token_stats_backward(d_logps, d_entropy, logits, *rest))


def perception_mask(anchor_entropy, negative_entropy, fraction, mask, cu_seqlens):
    return reference.perception_mask(anchor_entropy, negative_entropy, fraction, mask, cu_seqlens)


def _three(views, places, at: Tensor) -> list[Tensor]:
    dtype = accumulator(views[0])
    pairs = zip(views, (None, *places), strict=True)
    return [view.flatten(0, -2)[_places(place, at)].to(dtype) for view, place in pairs]


def _margin(views: list[Tensor], temperature: float) -> Tensor:
    return reference._full_margin(*(reference._log_softmax(view, temperature) for view in views))


def contrast(anchor, positive, negative, mask, positive_places, negative_places, temperature):
    at = _where(mask, mask.numel())
    views = _three((anchor, positive, negative), (positive_places, negative_places), at)
    found = torch.zeros(len(CONTRASTS), mask.numel(), dtype=accumulator(anchor))
    found[CONTRASTS.index("margin"), at] = _margin(views, temperature)
    return found


def contrast_backward(
    anchor, positive, negative, targets, of_positive, of_negative, saved, contrasts, coefficients,
    temperature, detach_anchor,
):  # fmt: skip
    views, places = (anchor, positive, negative), (of_positive, of_negative)
    gradients = [torch.zeros_like(view) for view in views]
    flat = [gradient.view(-1, gradient.shape[-1]) for gradient in gradients]
    own = (coefficients[0] != 0) | (coefficients[1] != 0)
    given = (anchor, targets, own, None, saved, temperature)
    gradients[0].copy_(token_stats_backward(coefficients[0], coefficients[1], *given))
    at = (coefficients[2] != 0).nonzero()[:, 0]
    rows = [row.requires_grad_() for row in _three(views, places, at)]
    used = [rows[0].detach() if detach_anchor else rows[0], *rows[1:]]
    found = _gradient([_margin(used, temperature)], rows, [coefficients[2, at]])
    for gradient, place, of_rows in zip(flat, (None, *places), found, strict=True):
        gradient[_places(place, at)] += of_rows.to(gradient.dtype)
    return tuple(gradients)


def contrast_backward_(anchor, positive, negative, *rest):
    gradients = contrast_backward(anchor, positive, negative, *rest)
    for view, gradient in zip((anchor, positive, negative), gradients, strict=True):
        view.copy_(gradient)


def loss_terms(
    logps, entropy, positive_logps, negative_logps, margin, selected, advantages, old_logps,
    ref_logps, weights, removed_logps, mask, cu_seqlens, denominators, config,
):  # fmt: skip
    options, count = from_text(config), advantages.numel()
    per_policy, per_contrast = denominators.tolist()
    at = _where(mask, logps.numel())
    owner = torch.repeat_interleave(torch.arange(count), cu_seqlens.diff())[at]
    views = [logps, entropy, positive_logps, negative_logps]
    rows = [None if v is None else v[at].clone().requires_grad_() for v in views]
    margins = None if margin is None else margin[at].clone().requires_grad_()

    def mean(values: Tensor) -> Tensor:
        return reference._reduce(values, owner, count, options.reduction, per_policy)

    logp, h = rows[:2]
    old = logp.detach() if old_logps is None else old_logps[at].to(logp)
    policy, clipped = reference.policy_loss(
        logp,
        advantages.to(logp)[owner],
        old,
        owner,
        count,
        options,
        None if weights is None else weights[at].to(logp),
    )
    nothing = logp.new_zeros(())
    terms = [mean(policy), mean(h), mean(clipped.to(logp)), nothing, nothing]
    loss = terms[0]
    if options.entropy_coef:
        loss = loss - options.entropy_coef * terms[1]
    if ref_logps is not None:
        terms[3] = mean(reference._k3(ref_logps[at].to(logp) - logp, options.kl_clamp))
        loss = loss + options.kl_coef * terms[3]
    if removed_logps is not None:
        terms[4] = mean(reference._k3(removed_logps[at].to(logp) - logp, bound=10))
        loss = loss - options.papo_coef * terms[4]
    cpl = _contrastive(logp, rows[2:], margins, selected, at, owner, count, options)
    terms.append(cpl / per_contrast)
    loss = loss + options.cpl_coef * terms[5]
    inputs = [logp, h, rows[2] if margins is None else margins, rows[3]]
    given = [x for x in inputs if x is not None]
    found = iter(_gradient([loss], given, [torch.ones_like(loss)]))

    coefficients = logps.new_zeros(len(COEFFICIENTS), logps.numel())
    for row, x in enumerate(inputs):
        if x is not None:
            coefficients[row, at] = next(found)
    return loss.detach(), torch.stack([term.detach() for term in terms]), coefficients


def _contrastive(logp, views, margins, selected, at, owner, count, options) -> Tensor:
    """Sum of the contrastive terms, over completions of their means with "sequence"."""
    if margins is None and views[0] is None:
        return logp.new_zeros(())
    chosen = selected[at]
    if margins is None:
        anchor = logp.detach() if options.detach_anchor else logp
        of = [reference._divergence(view, anchor, options.divergence) for view in views]
        margins = of[0] - of[1]
    cpl = torch.nn.functional.softplus(margins[chosen] / options.tau)
    if options.cpl_reduction == "sequence":
        cpl = reference._mean_per_completion(cpl, owner[chosen], count)
    return cpl.sum()


# Inside an op of torch.library there is no autograd; in a thread of its own there is.
_thread = ThreadPoolExecutor(1)


def _with_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: _thread.submit(function, *arguments).result()


PRIMITIVES = {
    function.__name__: _with_autograd(function)
    for function in (
        *(token_stats, token_stats_backward, token_stats_backward_, perception_mask),
        *(contrast, contrast_backward, contrast_backward_, loss_terms),
    )
}


def backend() -> Backend:
    """The backend; once per process, for `torch.library` keeps what it was told."""
    return Backend("cppo_plain", PRIMITIVES)
