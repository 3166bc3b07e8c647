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

from cppo.fused.fakes import accumulator
from cppo.fused.head import dtype_of_logits
from cppo.fused.schema import COEFFICIENTS, CONTRASTS, SAVED, from_text
from cppo.ops.checks import (
    FLOATS,
    LOGITS_DTYPES,
    check_choice,
    check_cu_seqlens,
    check_suppressed,
    may_read,
)

# The tensor whose rows the others belong to: with columns of its own, or one entry per row.
_LEADING = ("logits", "anchor", "hidden", "anchor_entropy", "logps")
_PER_ROW = (
    *("targets", "mask", "selected", "logps", "entropy", "positive_logps", "negative_logps"),
    *("margin", "old_logps", "ref_logps", "sampling_logps", "token_weights", "weights"),
    *("removed_logps", "grad_logps", "grad_entropy"),
    *("anchor_entropy", "negative_entropy", "places", "positive_places", "negative_places"),
)
# What a forward leaves to its backward has so many rows.
_KEPT = {
    "saved": len(SAVED),
    "saved_anchor": len(SAVED),
    "contrasts": len(CONTRASTS),
    "coefficients": len(COEFFICIENTS),
}


def _require(holds: bool, op: str, name: str, expected: str, tensor: Tensor) -> None:
    if not holds:
        raise ValueError(
            f"cppo.{op}: {name} must be {expected}, got {tuple(tensor.shape)} {tensor.dtype} "
            f"on {tensor.device}"
        )


def _check_logits(op: str, name: str, logits: Tensor) -> None:
    fits = logits.ndim in (2, 3) and logits.shape[-1] > 0 and logits.dtype in FLOATS
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
        elif name.endswith("places"):
            _require(tensor.dtype == torch.int64, op, name, "int64", tensor)
        else:
            _require(tensor.dtype in FLOATS, op, name, "floating", tensor)


def _check_kept(op: str, like: Tensor, shape: tuple[int, int], name: str, tensor: Tensor) -> None:
    """What a forward left to its backward, in the dtype of the statistics."""
    dtype = accumulator(like)
    fits = tuple(tensor.shape) == shape and tensor.dtype == dtype and tensor.device == like.device
    expected = f"{shape} {dtype} on {like.device}, as the forward left it"
    _require(fits, op, name, expected, tensor)


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


def _check_view(op: str, anchor: Tensor, name: str, view: Tensor) -> None:
    same = view.ndim == anchor.ndim and view.shape[1:] == anchor.shape[1:]
    same = same and view.dtype == anchor.dtype and view.device == anchor.device
    _require(same, op, name, f"(rows, {anchor.shape[1:]}) like the anchor", view)


def _check_whole_or_compact(
    op: str,
    anchor: Tensor,
    views: dict[str, Tensor | None],
    advantages: Tensor,
    cu_seqlens: Tensor | None,
    gating: bool,
) -> None:
    """A view has all rows, or those of gated completions."""
    for name, view in views.items():
        if view is None or len(view) == len(anchor):
            continue
        _require(gating, op, name, f"of all {len(anchor)} rows without gating", view)
        if may_read(advantages, cu_seqlens):
            gated = advantages > 0
            counted = gated if cu_seqlens is None else cu_seqlens.diff()[gated]
            _require(len(view) == int(counted.sum()), op, name, "of the rows with A > 0", view)


def _check_places(
    op: str, name: str, places: Tensor | None, logits: Tensor, given: dict[str, Any]
) -> None:
    """No place is past the last row of the logits, and a row that is read has one."""
    mask = given.get("mask")
    if places is None or not places.numel() or not may_read(places, mask):
        return
    rows = logits.shape[:-1].numel()
    _require(int(places.max()) < rows, op, name, f"below {rows}, the rows there are", places)
    if "mask" not in given:
        mask = given["coefficients"][COEFFICIENTS.index("positive_logp")] != 0  # rows of the margin
    if mask is not None:
        places = places.reshape(-1)[mask.reshape(-1)]
    fits = not places.numel() or int(places.min()) >= 0
    _require(fits, op, name, "those of rows that are there, where the mask is True", places)


def _check(op: str, given: dict[str, Any]) -> None:
    """Checks the arguments of any op by their names, which mean the same in all of them."""
    name = next(name for name in _LEADING if name in given)
    rows = given[name]
    has_columns = name in _LEADING[:3]
    if has_columns:
        _check_logits(op, name, rows)
    if "weight" in given:
        _check_head(op, rows, given["weight"], given["bias"], given["suppressed"])
    count = rows.shape[:-1].numel() if has_columns else rows.numel()
    if given.get("places") is not None:
        count = given["targets"].numel()
    _check_each(op, rows, count, **{name: given.get(name) for name in _PER_ROW})
    _check_each(op, rows, 2, denominators=given.get("denominators"))
    _check_each(op, rows, 1, grad_loss=given.get("grad_loss"))
    if "cu_seqlens" in given:
        shaped = given.get("targets", rows)
        _check_completions(op, shaped, given.get("advantages"), given["cu_seqlens"])
    for kept, size in _KEPT.items():
        if kept in given:
            _check_kept(op, rows, (size, count), kept, given[kept])
    if given.get("kept_logits") is not None:
        _check_kept_logits(op, rows, given)
    if not 0 <= given.get("fraction", 0) <= 1:
        raise ValueError(f"cppo.{op}: fraction must be in [0, 1], got {given['fraction']}")
    check_choice(op, "logits_dtype", given.get("logits_dtype", "fp32"), LOGITS_DTYPES)
    config = from_text(given["config"]) if "config" in given else None
    views: dict[str, Tensor | None] = {
        view: given[view] for view in ("positive", "negative") if view in given
    }
    for view, logits in views.items():
        if logits is not None:
            _check_view(op, rows, view, logits)
    if "advantages" in given and views and config is not None:
        whole = (given["advantages"], given["cu_seqlens"], config.gating)
        _check_whole_or_compact(op, rows, views, *whole)
        for view, logits in views.items():
            if f"saved_{view}" in given and logits is not None:
                is_contrast = view == "positive" and config.divergence == "full"
                shape = (len(CONTRASTS if is_contrast else SAVED), count)
                _check_kept(op, rows, shape, f"saved_{view}", given[f"saved_{view}"])
    _check_given_places(op, rows, given)


def _check_kept_logits(op: str, hidden: Tensor, given: dict[str, Any]) -> None:
    weight, logits, saved = given["weight"], given["kept_logits"], given["kept_saved"]
    dtype = dtype_of_logits(weight, given["bias"], given["softcap"], given["logits_dtype"])
    shape = (given["targets"].numel(), len(weight))
    fits = tuple(logits.shape) == shape and logits.dtype == dtype and logits.device == hidden.device
    _require(fits, op, "kept_logits", f"{shape} {dtype} on {hidden.device}", logits)
    if saved is None:
        raise ValueError(f"cppo.{op}: kept_saved must be given with kept_logits, got None")
    _check_kept(op, hidden, (len(SAVED), shape[0]), "kept_saved", saved)


def _check_given_places(op: str, rows: Tensor, given: dict[str, Any]) -> None:
    _check_places(op, "places", given.get("places"), rows, given)
    for view in ("positive", "negative"):
        places = given.get(f"{view}_places")
        if places is not None:
            _check_places(op, f"{view}_places", places, given[view], given)
        elif f"{view}_places" in given:
            _require(len(given[view]) == len(rows), op, view, f"of {len(rows)} rows", given[view])


def _check_head(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, suppressed: Tensor | None
) -> None:
    fits = weight.ndim == 2 and weight.shape[0] > 0 and weight.shape[1] == hidden.shape[-1]
    fits = fits and weight.dtype == hidden.dtype and weight.device == hidden.device
    _require(fits, op, "weight", f"(V, {hidden.shape[-1]}) like hidden", weight)
    if bias is not None:
        fits = bias.shape == weight.shape[:1] and bias.dtype == weight.dtype
        _require(fits, op, "bias", f"({len(weight)},) like weight", bias)
        _check_each(op, weight, len(weight), bias=bias)
    if suppressed is not None:
        fits = suppressed.dtype == torch.int64 and suppressed.device == weight.device
        _require(fits, op, "suppressed", f"int64 on {weight.device}", suppressed)
        check_suppressed(op, suppressed, len(weight))


def checked(name: str, schema: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher of a schema, after a look at the sizes, dtypes and devices of its tensors."""
    arguments_of_schema = schema.partition(" -> ")[0].strip("()").split(", ")
    names = [argument.split(" ")[-1] for argument in arguments_of_schema]
    op = re.sub(r"_backward_?$", "", name)

    @wraps(launch)
    def launch_checked(*arguments: Any) -> Any:
        _check(op, dict(zip(names, arguments, strict=True)))
        return launch(*arguments)

    return launch_checked
