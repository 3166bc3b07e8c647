"""The training loss from logits: statistics, selection, loss and per-row coefficients; backward.

Specification: `cppo.reference.cppo_loss`; the arithmetic of the loss is in `loss_terms`.

Launches: the rows of each completion and their places in compact views (`_plan_kernel`); one read
of the anchor and of the negative where A > 0; the selection; the positive where it is selected
(with divergence="full" all three in one pass instead); the loss and its derivative by every
statistic; the sums over completions. The backward reads a row of logits only if one of its
derivatives is not zero. Nothing waits for the host.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cppo.config import LossConfig
from cppo.triton_kernels import rows
from cppo.triton_kernels.full_divergence import launch_full_gradient, launch_full_statistics
from cppo.triton_kernels.loss_terms import BLOCK, Completions, Counts, Statistics, launch_loss
from cppo.triton_kernels.perception_mask import launch_selection
from cppo.triton_kernels.rows import completion_rows
from cppo.triton_kernels.token_stats import (
    StatisticsOutputs,
    launch_gradient,
    launch_statistics,
)

# Which rows are read


@triton.jit(
    do_not_specialize=(
        "advantages_ptr",
        "cu_seqlens_ptr",
        "mask_ptr",
        "looks_ptr",
        "view_row_ptr",
        "counts_ptr",
        "length",
        "gating",
    )
)
def _plan_kernel(
    advantages_ptr,
    cu_seqlens_ptr,
    mask_ptr,
    looks_ptr,
    view_row_ptr,
    counts_ptr,
    length: tl.int64,
    gating: tl.int32,
    BLOCK: tl.constexpr,
):
    """Per row: is its perturbed row read, where does it lie in a compact view (-1: nowhere).
    Per completion: valid rows, rows that are read, length."""
    completion = tl.program_id(0)
    start, end = completion_rows(cu_seqlens_ptr, completion, length)
    is_positive = (tl.load(advantages_ptr + completion) > 0).to(tl.int32)
    looks = tl.where(gating != 0, is_positive, 1)
    column = tl.arange(0, BLOCK)
    # Rows of the completions with A > 0 before this one.
    before = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, completion, BLOCK):
        other = first + column
        earlier = other < completion
        size = tl.full((BLOCK,), 1, tl.int64) * length
        if cu_seqlens_ptr is not None:
            size = tl.load(cu_seqlens_ptr + other + 1, earlier, 0).to(tl.int64)
            size -= tl.load(cu_seqlens_ptr + other, earlier, 0).to(tl.int64)
        counts = earlier & (tl.load(advantages_ptr + other, earlier, 0.0) > 0)
        before += tl.where(counts, size, 0)
    place = tl.sum(before, 0) - start
    num_valid = tl.zeros((BLOCK,), tl.int64)
    for first in range(start, end, BLOCK):
        row = first + column
        valid = row < end
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + row, valid, 0) != 0)
        num_valid += valid.to(tl.int64)
        tl.store(looks_ptr + row, tl.where(valid, looks, 0).to(tl.uint8), row < end)
        tl.store(view_row_ptr + row, tl.where(is_positive != 0, place + row, -1), row < end)
    count = tl.sum(num_valid, 0)
    tl.store(counts_ptr + completion * 3, count)
    tl.store(counts_ptr + completion * 3 + 1, tl.where(looks != 0, count, 0))
    tl.store(counts_ptr + completion * 3 + 2, end - start)


class _Plan(NamedTuple):
    looks: Tensor  # (R,) uint8
    view_row: Tensor  # (R,) int64
    counts: Tensor  # (B, 3) int64


def _plan(
    targets: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gating: bool,
) -> _Plan:
    def new(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=targets.device)

    num_rows, num_completions = targets.numel(), advantages.numel()
    plan = _Plan(
        new(num_rows, dtype=torch.uint8),
        new(num_rows, dtype=torch.int64),
        new(num_completions, 3, dtype=torch.int64),
    )
    if num_completions:
        rows.launch(
            _plan_kernel,
            num_completions,
            8,
            advantages_ptr=advantages,
            cu_seqlens_ptr=cu_seqlens,
            mask_ptr=mask,
            looks_ptr=plan.looks,
            view_row_ptr=plan.view_row,
            counts_ptr=plan.counts,
            length=targets.shape[-1],
            gating=int(gating),
            BLOCK=BLOCK,
        )
    return plan


# Launchers


def _view_row(view: Tensor, anchor: Tensor, plan: _Plan) -> Tensor | None:
    """Where the view's rows lie: None for a whole view, which has as many as the anchor."""
    return None if view.shape[0] == anchor.shape[0] else plan.view_row


class _Selection(NamedTuple):
    selected: Tensor  # shape of targets, bool
    counts: Tensor | None  # (B,) int32


def _select(
    entropy: Tensor,
    negative_entropy: Tensor,
    plan: _Plan,
    cu_seqlens: Tensor | None,
    fraction: float,
) -> _Selection:
    selected = torch.empty(entropy.shape, dtype=torch.bool, device=entropy.device)
    counts = plan.counts.new_empty(plan.counts.shape[0], dtype=torch.int32)
    launch_selection(
        entropy,
        negative_entropy,
        plan.looks,
        cu_seqlens,
        fraction,
        selected.view(torch.uint8),
        counts,
        counts.numel(),
    )
    return _Selection(selected, counts)


def cppo_loss(
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
) -> tuple[Tensor, ...]:
    """`options`: the fields of LossConfig, and `inplace`, which only autograd reads."""
    config = LossConfig(*options[:-1])
    acc = rows.accumulator(anchor)

    def new(*size: int, dtype: torch.dtype = acc) -> Tensor:
        return torch.empty(size, dtype=dtype, device=anchor.device)

    targets, advantages = targets.contiguous(), advantages.contiguous()
    reads, cu_seqlens = rows.bytes_of(mask), rows.contiguous(cu_seqlens)
    num_rows = targets.numel()
    plan = _plan(targets, advantages, reads, cu_seqlens, config.gating)
    logps, entropy = new(*targets.shape), new(*targets.shape)
    coefficients = new(4, num_rows)
    # Zero where a view is not needed: the result has the same bits in every run.
    saved = torch.zeros(8, num_rows, dtype=acc, device=anchor.device)
    selection = _Selection(torch.zeros(targets.shape, dtype=torch.bool, device=anchor.device), None)
    of_positive = of_negative = None

    if positive is not None and negative is not None and config.divergence == "full":
        negative_entropy = new(num_rows)
        launch_full_statistics(
            (anchor, positive, negative),
            targets,
            reads,
            plan.looks,
            plan.view_row,
            config.temperature,
            (logps, entropy, negative_entropy, saved),
        )
        selection = _select(entropy, negative_entropy, plan, cu_seqlens, config.fraction)
        of_positive = saved[7]
    else:
        outputs = StatisticsOutputs(logps, entropy, saved[0], saved[1], saved[2])
        launch_statistics(anchor, targets, reads, None, config.temperature, outputs)
        if negative is not None:
            of_negative, negative_entropy = new(num_rows), new(num_rows)
            place = _view_row(negative, anchor, plan)
            outputs = StatisticsOutputs(of_negative, negative_entropy, saved[5], saved[6], None)
            launch_statistics(negative, targets, plan.looks, place, config.temperature, outputs)
            selection = _select(entropy, negative_entropy, plan, cu_seqlens, config.fraction)
        if positive is not None:
            of_positive = new(num_rows)
            place = _view_row(positive, anchor, plan)
            outputs = StatisticsOutputs(of_positive, None, saved[3], saved[4], None)
            selected = rows.bytes_of(selection.selected)
            launch_statistics(positive, targets, selected, place, config.temperature, outputs)

    completions = Completions(
        advantages,
        rows.contiguous(old_logps),
        rows.contiguous(ref_logps),
        reads,
        cu_seqlens,
        targets.shape[-1],
    )
    loss, metrics, num_selected = launch_loss(
        Statistics(logps, entropy, of_positive, of_negative, selection.selected),
        completions,
        Counts(plan.counts, selection.counts, num_items),
        config,
        coefficients,
    )
    return loss, logps, entropy, selection.selected, metrics, num_selected, saved, coefficients


def _backward(
    grad_loss: Tensor,
    views: tuple[Tensor, Tensor | None, Tensor | None],
    gradients: tuple[Tensor, Tensor, Tensor],
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
    anchor, positive, negative = views
    targets, advantages = targets.contiguous(), advantages.contiguous()
    is_full = divergence == "full" and positive is not None and negative is not None
    is_compact = any(v is not None and v.shape[0] != anchor.shape[0] for v in views)
    plan = None
    if is_full or is_compact:
        plan = _plan(targets, advantages, None, rows.contiguous(cu_seqlens), gating)
    if is_full:
        assert plan is not None and positive is not None and negative is not None
        launch_full_gradient(
            grad_loss,
            (anchor, positive, negative),
            gradients,
            targets,
            plan.view_row,
            saved,
            coefficients,
            temperature,
            detach_anchor,
        )
        return
    # Per view: its derivatives by logp and entropy, and its max, sum and mean.
    entropy_of = (coefficients[1], None, None)
    statistics = (
        (saved[0], saved[1], saved[2]),
        (saved[3], saved[4], None),
        (saved[5], saved[6], None),
    )
    for i, (view, gradient) in enumerate(zip(views, gradients, strict=True)):
        if view is None:
            continue
        launch_gradient(
            view,
            gradient,
            targets,
            None,
            None if plan is None else _view_row(view, anchor, plan),
            (coefficients[(0, 2, 3)[i]], entropy_of[i], grad_loss),
            statistics[i],
            temperature,
        )


def cppo_loss_backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    views = (anchor, positive, negative)
    gradients = tuple(
        anchor.new_empty(0) if view is None else rows.new_gradient(view) for view in views
    )
    row_inputs = (targets, advantages, cu_seqlens, saved, coefficients)
    options = (temperature, divergence, gating, detach_anchor)
    _backward(grad_loss, views, gradients, *row_inputs, *options)
    return gradients


def cppo_loss_backward_(
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
    views = (anchor, positive, negative)
    row_inputs = (targets, advantages, cu_seqlens, saved, coefficients)
    options = (temperature, divergence, gating, detach_anchor)
    with contextlib.ExitStack() as stack:
        gradients = tuple(
            anchor.new_empty(0) if view is None else stack.enter_context(rows.written_over(view))
            for view in views
        )
        _backward(grad_loss, views, gradients, *row_inputs, *options)
