"""What a kernel that trusts its arguments asks of them, whoever calls it.

The public ops check what they are given, in the words of their callers. Their kernels are ops too
(`torch.ops.cppo_triton.*`, and those on hidden states) and can be called by anybody: with a size
that does not fit, a kernel would read and write where nothing is. The compiled extension has the
same checks in C++.

Values cost a wait for the device: those of cu_seqlens and of advantages are looked at where that is
free (`may_read`). Targets need no look: a kernel ignores one outside the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from cppo.ops.checks import check_cu_seqlens, may_read
from cppo.ops.library import COEFFICIENTS, LOSS_SAVED, STATS_SAVED

# The tensor whose rows the others belong to: with columns of its own, or one entry per row.
_LEADING = ("logits", "anchor", "hidden", "anchor_entropy", "logps")
_PER_ROW = (
    *("targets", "mask", "selected", "logps", "entropy", "positive_logps", "negative_logps"),
    *("margin", "old_logps", "ref_logps", "grad_logps", "grad_entropy"),
    *("anchor_entropy", "negative_entropy"),
)
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


def _check(op: str, given: dict[str, Any]) -> None:
    """Checks the arguments of any op by their names, which mean the same in all of them."""
    name = next(name for name in _LEADING if name in given)
    rows = given[name]
    has_columns = name in _LEADING[:3]
    if has_columns:
        _check_logits(op, name, rows)
    if "weight" in given:
        _check_head(op, rows, given["weight"], given["bias"])
    count = rows.shape[:-1].numel() if has_columns else rows.numel()
    _check_each(op, rows, count, **{name: given.get(name) for name in _PER_ROW})
    # The whole, or completions, tokens and selected (`num_items_tensor`).
    _check_each(op, rows, 4, num_items=given.get("num_items"))
    _check_each(op, rows, 1, grad_loss=given.get("grad_loss"))
    if "cu_seqlens" in given:
        shaped = given.get("targets", rows)
        _check_completions(op, shaped, given.get("advantages"), given["cu_seqlens"])
    if "saved" in given:
        kept = LOSS_SAVED if name == "anchor" else STATS_SAVED
        _check_kept(op, rows, (len(kept), count), saved=given["saved"])
    if "coefficients" in given:
        _check_kept(op, rows, (len(COEFFICIENTS), count), coefficients=given["coefficients"])
    if not 0 <= given.get("fraction", 0) <= 1:
        raise ValueError(f"cppo.{op}: fraction must be in [0, 1], got {given['fraction']}")
    if "positive" in given:
        views = {view: given[view] for view in ("positive", "negative")}
        _check_views(op, rows, views, given["advantages"], given["cu_seqlens"], given["gating"])


def _check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    fits = weight.ndim == 2 and weight.shape[0] > 0 and weight.shape[1] == hidden.shape[-1]
    fits = fits and weight.dtype == hidden.dtype and weight.device == hidden.device
    _require(fits, op, "weight", f"(V, {hidden.shape[-1]}) like hidden", weight)
    if bias is not None:
        fits = bias.shape == weight.shape[:1] and bias.dtype == weight.dtype
        _require(fits, op, "bias", f"({len(weight)},) like weight", bias)
        _check_each(op, weight, len(weight), bias=bias)


def checked(name: str, schema: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher of a schema, after a look at the sizes, dtypes and devices of its tensors."""
    arguments_of_schema = schema.partition(" -> ")[0].strip("()").split(", ")
    names = [argument.split(" ")[-1] for argument in arguments_of_schema]
    op = re.sub(r"_(backward_?|gradients)$", "", name)

    @wraps(launch)
    def launch_checked(*arguments: Any) -> Any:
        _check(op, dict(zip(names, arguments, strict=True)))
        return launch(*arguments)

    return launch_checked
