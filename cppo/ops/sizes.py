"""What a kernel that trusts its arguments asks of them, whoever calls it.

The public ops check what they are given, in the words of their callers. Their kernels are ops too
(`torch.ops.cppo_triton.*`, and those on hidden states) and can be called by anybody: with a size
that does not fit, a kernel would read and write where nothing is. The compiled extension has the
same checks in C++.

Values cost a wait for the device: those of cu_seqlens and of advantages are looked at where that is
free (`may_read`). Targets need no look: a kernel ignores one outside the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from cppo.ops.checks import check_cu_seqlens, may_read
from cppo.ops.library import CONFIG_FIELDS

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _require(holds: bool, op: str, name: str, expected: str, tensor: Tensor) -> None:
    if not holds:
        raise ValueError(
            f"cppo.{op}: {name} must be {expected}, got {tuple(tensor.shape)} {tensor.dtype} "
            f"on {tensor.device}"
        )


def _check_logits(op: str, name: str, logits: Tensor) -> None:
    fits = logits.ndim in (2, 3) and logits.shape[-1] > 0 and logits.dtype in _FLOATS
    _require(fits, op, name, "floating (T, V) or (B, L, V) with V >= 1", logits)


def _check_each(op: str, like: Tensor, count: int, **tensors: Tensor | None) -> None:
    """One entry per row, on the device of `like`."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        fits = tensor.numel() == count and tensor.device == like.device
        _require(fits, op, name, f"of {count} entries on {like.device}", tensor)
        if name in ("mask", "selected"):
            _require(tensor.dtype == torch.bool, op, name, "bool", tensor)
        elif name == "targets":
            real = tensor.dtype.is_floating_point or tensor.dtype.is_complex
            _require(not real, op, name, "of integers", tensor)
        else:
            _require(tensor.dtype in _FLOATS, op, name, "floating", tensor)


def _check_kept(op: str, like: Tensor, shape: tuple[int, int], **tensors: Tensor) -> None:
    """What a forward left to its backward, in the dtype of the statistics."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    for name, tensor in tensors.items():
        fits = tuple(tensor.shape) == shape and tensor.dtype == dtype
        fits = fits and tensor.device == like.device
        _require(
            fits, op, name, f"{shape} {dtype} on {like.device}, as the forward left it", tensor
        )


def _check_completions(
    op: str, rows: Tensor, advantages: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    if cu_seqlens is None:
        _require(rows.ndim == 2, op, "rows", "(B, L) without cu_seqlens", rows)
        count = rows.shape[0]
    else:
        same = cu_seqlens.device == rows.device
        _require(same, op, "cu_seqlens", f"on {rows.device}", cu_seqlens)
        check_cu_seqlens(op, cu_seqlens, rows.numel())
        count = cu_seqlens.numel() - 1
    if advantages is not None:
        _check_each(op, rows, count, advantages=advantages)


def _check_views(
    op: str,
    anchor: Tensor,
    views: dict[str, Tensor | None],
    advantages: Tensor,
    cu_seqlens: Tensor | None,
    gating: bool,
) -> None:
    for name, view in views.items():
        if view is None:
            continue
        same = view.ndim == anchor.ndim and view.shape[1:] == anchor.shape[1:]
        same = same and view.dtype == anchor.dtype and view.device == anchor.device
        _require(same, op, name, f"(rows, {anchor.shape[1:]}) like the anchor", view)
        if len(view) == len(anchor):
            continue
        _require(gating, op, name, f"of all {len(anchor)} rows without gating", view)
        if may_read(advantages, cu_seqlens):
            looks = advantages > 0
            counted = looks if cu_seqlens is None else cu_seqlens.diff()[looks]
            _require(len(view) == int(counted.sum()), op, name, "of the rows with A > 0", view)


def _check_fraction(op: str, fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"cppo.{op}: fraction must be in [0, 1], got {fraction}")


def _token_stats(logits: Tensor, targets: Tensor, mask: Tensor | None, *_: Any) -> None:
    op = "token_stats"
    _check_logits(op, "logits", logits)
    _check_each(op, logits, logits.shape[:-1].numel(), targets=targets, mask=mask)


def _token_stats_backward(
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    *_: Any,
) -> None:
    _token_stats(logits, targets, mask)
    op, count = "token_stats", targets.numel()
    _check_each(op, logits, count, grad_logps=grad_logps, grad_entropy=grad_entropy)
    _check_kept(op, logits, (3, count), saved=saved)


def _perception_mask(
    anchor_entropy: Tensor,
    negative_entropy: Tensor,
    fraction: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    op, count = "perception_mask", anchor_entropy.numel()
    given = {"anchor_entropy": anchor_entropy, "negative_entropy": negative_entropy}
    _check_each(op, anchor_entropy, count, **given, mask=mask)
    _check_completions(op, anchor_entropy, None, cu_seqlens)
    _check_fraction(op, fraction)


def _cppo_loss(
    anchor: Tensor,
    positive: Tensor | None,
    negative: Tensor | None,
    targets: Tensor,
    advantages: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_items: Tensor | None,
    *options: Any,
    op: str = "cppo_loss",
) -> None:
    count = anchor.shape[:-1].numel()
    _check_logits(op, "anchor", anchor)
    _check_each(
        op, anchor, count, targets=targets, old_logps=old_logps, ref_logps=ref_logps, mask=mask
    )
    _check_completions(op, targets, advantages, cu_seqlens)
    _check_each(op, anchor, 4, num_items=num_items)
    config = dict(zip(CONFIG_FIELDS, options, strict=False))
    _check_fraction(op, config["fraction"])
    views = {"positive": positive, "negative": negative}
    _check_views(op, anchor, views, advantages, cu_seqlens, config["gating"])


def _cppo_loss_backward(
    grad_loss: Tensor,
    anchor: Tensor,
    positive: Tensor | None,
    negative: Tensor | None,
    targets: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    coefficients: Tensor,
    temperature: float,
    divergence: str,
    gating: bool,
    detach_anchor: bool,
) -> None:
    op, count = "cppo_loss", anchor.shape[:-1].numel()
    _check_logits(op, "anchor", anchor)
    _check_each(op, anchor, 1, grad_loss=grad_loss)
    _check_each(op, anchor, count, targets=targets)
    _check_completions(op, targets, advantages, cu_seqlens)
    _check_kept(op, anchor, (8, count), saved=saved)
    _check_kept(op, anchor, (4, count), coefficients=coefficients)
    views = {"positive": positive, "negative": negative}
    _check_views(op, anchor, views, advantages, cu_seqlens, gating)


def _loss_terms(
    logps: Tensor,
    entropy: Tensor,
    positive_logps: Tensor | None,
    negative_logps: Tensor | None,
    margin: Tensor | None,
    selected: Tensor,
    advantages: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor,
    *_: Any,
) -> None:
    op = "loss_terms"
    given = {
        "logps": logps,
        "entropy": entropy,
        "positive_logps": positive_logps,
        "negative_logps": negative_logps,
        "margin": margin,
        "selected": selected,
        "old_logps": old_logps,
        "ref_logps": ref_logps,
    }
    _check_each(op, logps, logps.numel(), **given)
    _check_completions(op, logps, advantages, cu_seqlens)


def _check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    fits = weight.ndim == 2 and weight.shape[0] > 0 and weight.shape[1] == hidden.shape[-1]
    fits = fits and weight.dtype == hidden.dtype and weight.device == hidden.device
    _require(fits, op, "weight", f"(V, {hidden.shape[-1]}) like hidden", weight)
    if bias is not None:
        fits = bias.shape == weight.shape[:1] and bias.dtype == weight.dtype
        _require(fits, op, "bias", f"({len(weight)},) like weight", bias)
        _check_each(op, weight, len(weight), bias=bias)


def _linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    *_: Any,
) -> None:
    op = "linear_token_stats"
    _check_logits(op, "hidden", hidden)
    _check_head(op, hidden, weight, bias)
    _check_each(op, hidden, hidden.shape[:-1].numel(), targets=targets, mask=mask)


def _linear_token_stats_backward(
    grad_logps: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, *rest: Any
) -> None:
    _linear_token_stats(hidden, *rest)
    count = hidden.shape[:-1].numel()
    given = {"grad_logps": grad_logps, "grad_entropy": grad_entropy}
    _check_each("linear_token_stats", hidden, count, **given)


def _linear_cppo_loss(
    anchor: Tensor,
    positive: Tensor | None,
    negative: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> None:
    _check_logits("linear_cppo_loss", "anchor", anchor)
    _check_head("linear_cppo_loss", anchor, weight, bias)
    _cppo_loss(anchor, positive, negative, *rest, op="linear_cppo_loss")


def _linear_cppo_loss_backward(
    grad_loss: Tensor,
    anchor: Tensor,
    positive: Tensor | None,
    negative: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    coefficients: Tensor,
    temperature: float,
    divergence: str,
    gating: bool,
    *_: Any,
) -> None:
    op, count = "linear_cppo_loss", anchor.shape[:-1].numel()
    _check_logits(op, "anchor", anchor)
    _check_head(op, anchor, weight, bias)
    _check_each(op, anchor, 1, grad_loss=grad_loss)
    _check_each(op, anchor, count, targets=targets, mask=mask)
    _check_completions(op, targets, advantages, cu_seqlens)
    _check_kept(op, anchor, (4, count), coefficients=coefficients)
    views = {"positive": positive, "negative": negative}
    _check_views(op, anchor, views, advantages, cu_seqlens, gating)


CHECKS: dict[str, Callable[..., None]] = {
    "token_stats": _token_stats,
    "token_stats_backward": _token_stats_backward,
    "token_stats_backward_": _token_stats_backward,
    "perception_mask": _perception_mask,
    "cppo_loss": _cppo_loss,
    "cppo_loss_backward": _cppo_loss_backward,
    "cppo_loss_backward_": _cppo_loss_backward,
    "loss_terms": _loss_terms,
    "linear_token_stats": _linear_token_stats,
    "linear_token_stats_backward": _linear_token_stats_backward,
    "linear_cppo_loss": _linear_cppo_loss,
    "linear_cppo_loss_backward": _linear_cppo_loss_backward,
    "linear_cppo_loss_gradients": _linear_cppo_loss,
}


def checked(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher of a schema, after a look at the sizes, dtypes and devices of its tensors."""
    check = CHECKS[name]

    @wraps(launch)
    def launch_checked(*arguments: Any) -> Any:
        check(*arguments)
        return launch(*arguments)

    return launch_checked
