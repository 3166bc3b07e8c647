"""The training loss from logits: statistics, selection, loss and per-row coefficients; backward.

Specification: `cppo.reference.cppo_loss`. Per row, with A of its completion, rho = exp(logp - old)
(per completion its geometric mean), w = 1 / (denominator [x tokens of the completion]):

    policy = -min(rho A, clip(rho) A),  d policy / d logp = -rho A where no clip binds
    KL = k3(ref - logp),  d k3(d) / d d = e^d - 1 inside the clamps
    CPL = softplus(margin / tau) where selected,  d CPL / d margin = sigmoid(margin / tau) / tau
    loss = sum w (policy + kl_coef KL - entropy_coef H) + cpl_coef sum CPL / selected

Launches: the rows of each completion and their places in compact views (`_plan_kernel`); one read
of the anchor and of the negative where A > 0; the selection; the positive where it is selected
(with divergence="full" all three in one pass instead); the loss and its derivative by every
statistic (`_loss_kernel`, one program per completion); the sums over completions. The backward
reads a row of logits only if one of its derivatives is not zero. Nothing waits for the host.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cppo.triton_kernels import rows
from cppo.triton_kernels.full_divergence import launch_full_gradient, launch_full_statistics
from cppo.triton_kernels.perception_mask import launch_selection
from cppo.triton_kernels.rows import as_scalar, completion_rows
from cppo.triton_kernels.token_stats import (
    StatisticsOutputs,
    launch_gradient,
    launch_statistics,
)

# Rows per step of a program: two per thread, so that the sums stay in registers.
BLOCK = 512
CHUNK = 1024
# What is summed over rows: the loss without the contrastive term, the metrics, and that term.
NUM_SUMS = tl.constexpr(6)


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
        _plan_kernel[(num_completions,)](
            advantages_ptr=advantages,
            cu_seqlens_ptr=cu_seqlens,
            mask_ptr=mask,
            looks_ptr=plan.looks,
            view_row_ptr=plan.view_row,
            counts_ptr=plan.counts,
            length=targets.shape[-1],
            gating=int(gating),
            BLOCK=BLOCK,
            num_warps=8,
        )
    return plan


# The loss and its derivatives by the statistics of the rows


@triton.jit
def _sum_column(ptr, stride, count, DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    column = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), DTYPE)
    for first in range(0, count, CHUNK):
        at = first + column
        total += tl.load(ptr + at * stride, at < count, 0).to(DTYPE)
    return tl.sum(total, 0)


@triton.jit
def _longest(counts_ptr, num_completions, CHUNK: tl.constexpr):
    column = tl.arange(0, CHUNK)
    longest = tl.zeros((CHUNK,), tl.int64)
    for first in range(0, num_completions, CHUNK):
        at = first + column
        length = tl.load(counts_ptr + at * 3 + 2, at < num_completions, 0)
        longest = tl.maximum(longest, length)
    return tl.max(longest, 0)


@triton.jit
def _denominators(
    counts_ptr,
    num_selected,
    num_items_ptr,
    num_completions,
    max_length,
    REDUCTION: tl.constexpr,
    CPL_REDUCTION: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What the policy terms and the contrastive term are divided by, in fp64."""
    completions = num_completions.to(tl.float64)
    per_completion = tl.full((), 1.0, tl.float64)
    own = completions
    if REDUCTION == "dapo":
        own = _sum_column(counts_ptr, 3, num_completions, tl.int64, CHUNK).to(tl.float64)
    if REDUCTION == "dr_grpo":
        longest = max_length
        if max_length == 0:
            longest = _longest(counts_ptr, num_completions, CHUNK)
        per_completion = longest.to(tl.float64)
        own = completions * per_completion
    own = tl.maximum(own, 1.0)
    own_cpl = tl.maximum(num_selected.to(tl.float64), 1.0)
    if CPL_REDUCTION == "sequence":
        own_cpl = tl.maximum(completions, 1.0)
    if num_items_ptr is not None:
        # NaN stands for what was not given.
        whole = tl.load(num_items_ptr)
        all_completions = tl.load(num_items_ptr + 1)
        tokens = tl.load(num_items_ptr + 2)
        selected = tl.load(num_items_ptr + 3)
        counted = tl.maximum(all_completions * per_completion, 1.0)
        if REDUCTION == "dapo":
            counted = tl.maximum(tokens, 1.0)
        in_parts = whole != whole
        whole = tl.where(in_parts, counted, whole)
        # Only the share of the whole is known: the part's contrastive mean is weighted by it.
        own_cpl = own_cpl * (whole / own)
        own = whole
        if CPL_REDUCTION == "sequence":
            own_cpl = tl.where(in_parts, tl.maximum(all_completions, 1.0), own_cpl)
        else:
            is_given = in_parts & (selected == selected)
            own_cpl = tl.where(is_given, tl.maximum(selected, 1.0), own_cpl)
    return own, own_cpl


@triton.jit
def _k3(logp, anchor):
    """k3 estimate with d = logp - anchor, and its derivative by d; both clamped."""
    d = logp - anchor
    clamped = tl.where(d < -20.0, -20.0, tl.where(d > 20.0, 20.0, d))
    ratio = tl.exp(clamped)
    value = ratio - clamped - 1.0
    inside = (tl.abs(d) <= 20.0) & (value <= 10.0)
    return tl.where(value > 10.0, 10.0, value), tl.where(inside, ratio - 1.0, 0.0)


@triton.jit
def _divergence(logp, anchor, DIVERGENCE: tl.constexpr):
    """Divergence of a view on the sampled token, and its derivative by logp - anchor."""
    if DIVERGENCE == "k1":
        return anchor - logp, tl.zeros_like(logp) - 1.0
    else:
        return _k3(logp, anchor)


@triton.jit
def _softplus(x):
    """softplus and its derivative; log1p by Kahan's quotient, exact where e^-|x| is small."""
    e = tl.exp(-tl.abs(x))
    one_more = 1.0 + e
    is_small = one_more == 1.0
    quotient = tl.log(one_more) * (e / tl.where(is_small, 1.0, one_more - 1.0))
    derivative = tl.where(x >= 0, 1.0, e) / one_more
    return tl.maximum(x, 0.0) + tl.where(is_small, e, quotient), derivative


@triton.jit
def _policy(
    log_ratio,
    advantage,
    clip_low,
    clip_high,
    dual_clip,
):
    """Clipped surrogate, its derivative by logp, and where a clip stops it."""
    dtype: tl.constexpr = log_ratio.dtype
    low = as_scalar(1.0 - clip_low, dtype)
    high = as_scalar(1.0 + clip_high, dtype)
    ratio = tl.exp(log_ratio)
    clipped = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
    bound = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    if dual_clip is not None:
        beyond = (ratio > as_scalar(dual_clip, dtype)) & (advantage < 0)
        clipped = clipped | beyond
        bound = tl.where(beyond, as_scalar(dual_clip, dtype), bound)
    # Selected, not multiplied: where the ratio overflows that would be 0 * inf.
    learns = (clipped == 0) & (advantage != 0)
    ratio = tl.where(learns, ratio, 1.0)
    surrogate = tl.where(clipped, bound, ratio) * advantage
    return -surrogate, tl.where(learns, -ratio * advantage, 0.0), clipped


@triton.jit
def _valid_rows(mask_ptr, row, end):
    valid = row < end
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + row, valid, 0) != 0)
    return valid


@triton.jit
def _mean_log_ratio(
    logps_ptr, old_logps_ptr, mask_ptr, start, end, count, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, end, BLOCK):
        row = first + column
        valid = _valid_rows(mask_ptr, row, end)
        logp = tl.load(logps_ptr + row, valid, 0.0)
        old = logp
        if old_logps_ptr is not None:
            old = tl.load(old_logps_ptr + row, valid, 0.0).to(ACC)
        total += (logp - old).to(tl.float64)
    return (tl.sum(total, 0) / tl.maximum(count, 1).to(tl.float64)).to(ACC)


@triton.jit(
    do_not_specialize=(
        "logps_ptr",
        "entropy_ptr",
        "positive_ptr",
        "negative_ptr",
        "selected_ptr",
        "mask_ptr",
        "old_logps_ptr",
        "ref_logps_ptr",
        "advantages_ptr",
        "cu_seqlens_ptr",
        "num_items_ptr",
        "counts_ptr",
        "selected_counts_ptr",
        "coefficients_ptr",
        "sums_ptr",
        "num_rows",
        "num_completions",
        "length",
        "max_length",
    )
)
def _loss_kernel(
    logps_ptr,
    entropy_ptr,
    positive_ptr,
    negative_ptr,
    selected_ptr,
    mask_ptr,
    old_logps_ptr,
    ref_logps_ptr,
    advantages_ptr,
    cu_seqlens_ptr,
    num_items_ptr,
    counts_ptr,
    selected_counts_ptr,
    coefficients_ptr,
    sums_ptr,
    num_rows: tl.int64,
    num_completions: tl.int32,
    length: tl.int64,
    max_length: tl.int64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    cpl_coef: tl.float64,
    tau: tl.float64,
    HAS_DUAL_CLIP: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    REDUCTION: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    CPL_REDUCTION: tl.constexpr,
    DETACH_ANCHOR: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_SUMS: tl.constexpr,
):
    completion = tl.program_id(0)
    start, end = completion_rows(cu_seqlens_ptr, completion, length)
    count = tl.load(counts_ptr + completion * 3)
    num_selected = tl.full((), 0, tl.int32)
    if selected_counts_ptr is not None:
        num_selected = _sum_column(selected_counts_ptr, 1, num_completions, tl.int32, CHUNK)
    denominator, cpl_denominator = _denominators(
        counts_ptr,
        num_selected,
        num_items_ptr,
        num_completions,
        max_length,
        REDUCTION,
        CPL_REDUCTION,
        CHUNK,
    )
    # Of a row in the sum over its completion, and of that sum.
    share = tl.full((), 1.0, tl.float64)
    if REDUCTION == "grpo":
        share = 1.0 / tl.maximum(count, 1).to(tl.float64)
    weight = (share / denominator).to(ACC)
    cpl_share = tl.full((), 1.0, tl.float64)
    if CPL_REDUCTION == "sequence" and selected_counts_ptr is not None:
        own = tl.load(selected_counts_ptr + completion)
        cpl_share = 1.0 / tl.maximum(own, 1).to(tl.float64)
    cpl_weight = (cpl_share / cpl_denominator * cpl_coef / tau).to(ACC)

    advantage = tl.zeros((BLOCK,), ACC) + tl.load(advantages_ptr + completion).to(ACC)
    mean_log_ratio = tl.full((), 0.0, ACC)
    if IMPORTANCE == "sequence":
        mean_log_ratio = _mean_log_ratio(
            logps_ptr, old_logps_ptr, mask_ptr, start, end, count, ACC, BLOCK
        )
    column = tl.arange(0, BLOCK)
    sum_loss = tl.zeros((BLOCK,), tl.float64)
    sum_policy = tl.zeros((BLOCK,), tl.float64)
    sum_entropy = tl.zeros((BLOCK,), tl.float64)
    sum_clipped = tl.zeros((BLOCK,), tl.float64)
    sum_kl = tl.zeros((BLOCK,), tl.float64)
    sum_cpl = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, end, BLOCK):
        row = first + column
        valid = _valid_rows(mask_ptr, row, end)
        logp = tl.load(logps_ptr + row, valid, 0.0)
        entropy = tl.load(entropy_ptr + row, valid, 0.0)
        old = logp
        if old_logps_ptr is not None:
            old = tl.load(old_logps_ptr + row, valid, 0.0).to(ACC)
        log_ratio = logp - old
        if IMPORTANCE == "sequence":
            log_ratio = tl.zeros((BLOCK,), ACC) + mean_log_ratio
        bound = dual_clip if HAS_DUAL_CLIP else None
        policy, d_logp, clipped = _policy(log_ratio, advantage, clip_low, clip_high, bound)
        loss = policy
        # An infinite entropy must not become 0 * inf where there is no entropy term.
        if entropy_coef != 0:
            loss -= entropy * as_scalar(entropy_coef, ACC)
        if ref_logps_ptr is not None:
            ref = tl.load(ref_logps_ptr + row, valid, 0.0).to(ACC)
            kl, slope = _k3(ref, logp)
            loss += kl * as_scalar(kl_coef, ACC)
            d_logp -= slope * as_scalar(kl_coef, ACC)
            sum_kl += tl.where(valid, kl, 0.0).to(tl.float64)
        sum_loss += tl.where(valid, loss, 0.0).to(tl.float64)
        sum_policy += tl.where(valid, policy, 0.0).to(tl.float64)
        sum_entropy += tl.where(valid, entropy, 0.0).to(tl.float64)
        sum_clipped += tl.where(valid & clipped, 1.0, 0.0).to(tl.float64)

        d_logp *= weight
        d_positive = tl.zeros((BLOCK,), ACC)
        d_negative = tl.zeros((BLOCK,), ACC)
        if positive_ptr is not None:
            selected = valid & (tl.load(selected_ptr + row, row < end, 0) != 0)
            positive = tl.load(positive_ptr + row, selected, 0.0)
            margin = positive
            if DIVERGENCE != "full":
                negative = tl.load(negative_ptr + row, selected, 0.0)
                to_positive, positive_slope = _divergence(positive, logp, DIVERGENCE)
                to_negative, negative_slope = _divergence(negative, logp, DIVERGENCE)
                margin = to_positive - to_negative
            cpl, slope = _softplus(margin / as_scalar(tau, ACC))
            sum_cpl += tl.where(selected, cpl, 0.0).to(tl.float64)
            slope = slope * cpl_weight
            d_positive = slope
            if DIVERGENCE != "full":
                d_positive = slope * positive_slope
                d_negative = tl.where(selected, -slope * negative_slope, 0.0)
                if not DETACH_ANCHOR:
                    both = slope * (negative_slope - positive_slope)
                    d_logp += tl.where(selected, both, 0.0)
            d_positive = tl.where(selected, d_positive, 0.0)
        d_entropy = tl.zeros((BLOCK,), ACC) - as_scalar(entropy_coef, ACC) * weight
        inside = row < end
        tl.store(coefficients_ptr + row, tl.where(valid, d_logp, 0.0), inside)
        tl.store(coefficients_ptr + num_rows + row, tl.where(valid, d_entropy, 0.0), inside)
        tl.store(coefficients_ptr + 2 * num_rows + row, d_positive, inside)
        tl.store(coefficients_ptr + 3 * num_rows + row, d_negative, inside)

    at = sums_ptr + completion * NUM_SUMS
    tl.store(at, tl.sum(sum_loss, 0) * share)
    tl.store(at + 1, tl.sum(sum_policy, 0) * share)
    tl.store(at + 2, tl.sum(sum_entropy, 0) * share)
    tl.store(at + 3, tl.sum(sum_clipped, 0) * share)
    tl.store(at + 4, tl.sum(sum_kl, 0) * share)
    tl.store(at + 5, tl.sum(sum_cpl, 0) * cpl_share)


@triton.jit(
    do_not_specialize=(
        "sums_ptr",
        "counts_ptr",
        "selected_counts_ptr",
        "num_items_ptr",
        "loss_ptr",
        "metrics_ptr",
        "num_selected_ptr",
        "num_completions",
        "max_length",
    )
)
def _finish_kernel(
    sums_ptr,
    counts_ptr,
    selected_counts_ptr,
    num_items_ptr,
    loss_ptr,
    metrics_ptr,
    num_selected_ptr,
    num_completions: tl.int32,
    max_length: tl.int64,
    cpl_coef: tl.float64,
    HAS_CPL: tl.constexpr,
    REDUCTION: tl.constexpr,
    CPL_REDUCTION: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_SUMS: tl.constexpr,
):
    """The sums over completions, in one order: loss, metrics, number of selected rows."""
    num_selected = tl.full((), 0, tl.int32)
    if selected_counts_ptr is not None:
        num_selected = _sum_column(selected_counts_ptr, 1, num_completions, tl.int32, CHUNK)
    denominator, cpl_denominator = _denominators(
        counts_ptr,
        num_selected,
        num_items_ptr,
        num_completions,
        max_length,
        REDUCTION,
        CPL_REDUCTION,
        CHUNK,
    )
    loss = _sum_column(sums_ptr, NUM_SUMS, num_completions, tl.float64, CHUNK) / denominator
    for i in tl.static_range(1, 5):
        metric = _sum_column(sums_ptr + i, NUM_SUMS, num_completions, tl.float64, CHUNK)
        tl.store(metrics_ptr + i - 1, metric / denominator)
    cpl = _sum_column(sums_ptr + 5, NUM_SUMS, num_completions, tl.float64, CHUNK)
    cpl = cpl / cpl_denominator
    if HAS_CPL:
        loss += cpl * cpl_coef
    num_looks = _sum_column(counts_ptr + 1, 3, num_completions, tl.int64, CHUNK)
    share = num_selected.to(tl.float64) / tl.maximum(num_looks, 1).to(tl.float64)
    tl.store(metrics_ptr + 4, cpl)
    tl.store(metrics_ptr + 5, share)
    tl.store(loss_ptr, loss)
    tl.store(num_selected_ptr, num_selected.to(tl.int64))


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
    temperature: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    importance: str,
    reduction: str,
    max_length: int | None,
    kl_coef: float,
    entropy_coef: float,
    cpl_coef: float,
    divergence: str,
    tau: float,
    fraction: float,
    gating: bool,
    detach_anchor: bool,
    cpl_reduction: str,
    inplace: bool,
) -> tuple[Tensor, ...]:
    acc = rows.accumulator(anchor)

    def new(*size: int, dtype: torch.dtype = acc) -> Tensor:
        return torch.empty(size, dtype=dtype, device=anchor.device)

    targets, advantages = targets.contiguous(), advantages.contiguous()
    reads, cu_seqlens = rows.bytes_of(mask), rows.contiguous(cu_seqlens)
    num_rows, num_completions = targets.numel(), advantages.numel()
    plan = _plan(targets, advantages, reads, cu_seqlens, gating)
    logps, entropy = new(*targets.shape), new(*targets.shape)
    coefficients = new(4, num_rows)
    # Zero where a view is not needed: the result has the same bits in every run.
    saved = torch.zeros(8, num_rows, dtype=acc, device=anchor.device)
    selection = _Selection(torch.zeros(targets.shape, dtype=torch.bool, device=anchor.device), None)
    of_positive = of_negative = None

    if positive is not None and negative is not None and divergence == "full":
        negative_entropy = new(num_rows)
        launch_full_statistics(
            (anchor, positive, negative),
            targets,
            reads,
            plan.looks,
            plan.view_row,
            temperature,
            (logps, entropy, negative_entropy, saved),
        )
        selection = _select(entropy, negative_entropy, plan, cu_seqlens, fraction)
        of_positive = saved[7]
    else:
        outputs = StatisticsOutputs(logps, entropy, saved[0], saved[1], saved[2])
        launch_statistics(anchor, targets, reads, None, temperature, outputs)
        if negative is not None:
            of_negative, negative_entropy = new(num_rows), new(num_rows)
            place = _view_row(negative, anchor, plan)
            outputs = StatisticsOutputs(of_negative, negative_entropy, saved[5], saved[6], None)
            launch_statistics(negative, targets, plan.looks, place, temperature, outputs)
            selection = _select(entropy, negative_entropy, plan, cu_seqlens, fraction)
        if positive is not None:
            of_positive = new(num_rows)
            place = _view_row(positive, anchor, plan)
            outputs = StatisticsOutputs(of_positive, None, saved[3], saved[4], None)
            selected = rows.bytes_of(selection.selected)
            launch_statistics(positive, targets, selected, place, temperature, outputs)

    sums = new(num_completions, 6, dtype=torch.float64)
    shared = {
        "counts_ptr": plan.counts,
        "selected_counts_ptr": selection.counts,
        "num_items_ptr": num_items,
        "sums_ptr": sums,
        "num_completions": num_completions,
        "max_length": max_length or 0,
        "cpl_coef": cpl_coef,
        "REDUCTION": reduction,
        "CPL_REDUCTION": cpl_reduction,
        "CHUNK": CHUNK,
        "NUM_SUMS": 6,
    }
    if num_completions:
        _loss_kernel[(num_completions,)](
            logps_ptr=logps,
            entropy_ptr=entropy,
            positive_ptr=of_positive,
            negative_ptr=of_negative,
            selected_ptr=rows.bytes_of(selection.selected),
            mask_ptr=reads,
            old_logps_ptr=rows.contiguous(old_logps),
            ref_logps_ptr=rows.contiguous(ref_logps),
            advantages_ptr=advantages,
            cu_seqlens_ptr=cu_seqlens,
            coefficients_ptr=coefficients,
            num_rows=num_rows,
            length=targets.shape[-1],
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=0.0 if dual_clip is None else dual_clip,
            kl_coef=kl_coef,
            entropy_coef=entropy_coef,
            tau=tau,
            HAS_DUAL_CLIP=dual_clip is not None,
            IMPORTANCE=importance,
            DIVERGENCE=divergence,
            DETACH_ANCHOR=detach_anchor,
            ACC=rows.tl_accumulator(anchor),
            BLOCK=BLOCK,
            num_warps=8,
            **shared,
        )
    loss, metrics, num_selected = new(), new(6), new(dtype=torch.int64)
    _finish_kernel[(1,)](
        loss_ptr=loss,
        metrics_ptr=metrics,
        num_selected_ptr=num_selected,
        HAS_CPL=positive is not None,
        num_warps=4,
        **shared,
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
