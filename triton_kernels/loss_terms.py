"""The loss, its derivatives and its sums from the statistics of the rows; no logits here.

Per row, with A of its completion, rho = exp(logp - old) (per completion its geometric mean),
w = 1 / (denominator [x tokens of the completion]):

    policy = -min(rho A, clip(rho) A),  d policy / d logp = -rho A where no clip binds
    KL = min(k3(ref - logp), kl_clamp),  d k3(d) / d d = e^d - 1 inside the clamps
    CPL = softplus(margin / tau) where selected,  d CPL / d margin = sigmoid(margin / tau) / tau
    loss = sum w (policy + kl_coef KL - entropy_coef H) + cpl_coef sum CPL / selected

`_loss_kernel` has one program per completion, `_finish_kernel` adds the completions up in one
order. What they divide by is counted here, or given (`loss_terms`: a part of a batch).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cppo.config import LossConfig
from cppo.triton_kernels import rows
from cppo.triton_kernels.rows import as_scalar, completion_rows

# Rows per step of a program: two per thread, so that the sums stay in registers.
BLOCK = 512
CHUNK = 1024
# What is summed over rows: the loss without the contrastive term, the metrics, and that term.
NUM_SUMS = 6


# Kernels


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
def _counted_denominators(
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
def _denominators(
    counts_ptr,
    num_selected,
    num_items_ptr,
    num_completions,
    max_length,
    given,
    REDUCTION: tl.constexpr,
    CPL_REDUCTION: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Those that are given, where nothing was counted."""
    if counts_ptr is None:
        policy, contrast = given
        return as_scalar(policy, tl.float64), as_scalar(contrast, tl.float64)
    else:
        return _counted_denominators(
            counts_ptr,
            num_selected,
            num_items_ptr,
            num_completions,
            max_length,
            REDUCTION,
            CPL_REDUCTION,
            CHUNK,
        )


@triton.jit
def _num_selected(selected_ptr, start, end, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(start, end, BLOCK):
        row = first + column
        count += (tl.load(selected_ptr + row, row < end, 0) != 0).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _k3(logp, anchor, bound):
    """k3 estimate with d = logp - anchor, at most `bound`, and its derivative by d."""
    d = logp - anchor
    clamped = tl.where(d < -20.0, -20.0, tl.where(d > 20.0, 20.0, d))
    ratio = tl.exp(clamped)
    value = ratio - clamped - 1.0
    inside = (tl.abs(d) <= 20.0) & (value <= bound)
    return tl.where(value > bound, bound, value), tl.where(inside, ratio - 1.0, 0.0)


@triton.jit
def _divergence(logp, anchor, DIVERGENCE: tl.constexpr):
    """Divergence of a view on the sampled token, and its derivative by logp - anchor."""
    if DIVERGENCE == "k1":
        return anchor - logp, tl.zeros_like(logp) - 1.0
    else:
        return _k3(logp, anchor, 10.0)


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
    policy_denominator: tl.float64,
    contrast_denominator: tl.float64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    kl_coef: tl.float64,
    kl_clamp: tl.float64,
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
    count = end - start
    if counts_ptr is not None:
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
        (policy_denominator, contrast_denominator),
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
    if CPL_REDUCTION == "sequence" and positive_ptr is not None:
        own = _num_selected(selected_ptr, start, end, BLOCK)
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
            kl, slope = _k3(ref, logp, as_scalar(kl_clamp, ACC))
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
    policy_denominator: tl.float64,
    contrast_denominator: tl.float64,
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
        (policy_denominator, contrast_denominator),
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
    share = tl.full((), 0.0, tl.float64)
    if counts_ptr is not None:
        num_looks = _sum_column(counts_ptr + 1, 3, num_completions, tl.int64, CHUNK)
        share = num_selected.to(tl.float64) / tl.maximum(num_looks, 1).to(tl.float64)
    tl.store(metrics_ptr + 4, cpl)
    tl.store(metrics_ptr + 5, share)
    tl.store(loss_ptr, loss)
    tl.store(num_selected_ptr, num_selected.to(tl.int64))


# Launchers


class Statistics(NamedTuple):
    """Of every row; `positive` is the margin with the full divergence. None: no such view."""

    logps: Tensor
    entropy: Tensor
    positive: Tensor | None
    negative: Tensor | None
    selected: Tensor  # bool


class Completions(NamedTuple):
    """What the loss takes besides statistics; contiguous."""

    advantages: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None
    mask: Tensor | None  # uint8
    cu_seqlens: Tensor | None
    length: int  # of every completion, without cu_seqlens


class Counts(NamedTuple):
    """From which the denominators are counted; `given`: they themselves, and no counts."""

    of_rows: Tensor | None = None  # (B, 3) int64: valid, read, length
    selected: Tensor | None = None  # (B,) int32
    num_items: Tensor | None = None  # (4,) fp64
    given: tuple[float, float] = (1.0, 1.0)


def launch_loss(
    statistics: Statistics,
    completions: Completions,
    counts: Counts,
    config: LossConfig,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics (6,) and number of selected rows; writes the coefficients (4, R)."""
    logps, num_completions = statistics.logps, completions.advantages.numel()

    def new(*size: int, dtype: torch.dtype = logps.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=logps.device)

    sums = new(num_completions, NUM_SUMS, dtype=torch.float64)
    shared = {
        "counts_ptr": counts.of_rows,
        "selected_counts_ptr": counts.selected,
        "num_items_ptr": counts.num_items,
        "policy_denominator": counts.given[0],
        "contrast_denominator": counts.given[1],
        "sums_ptr": sums,
        "num_completions": num_completions,
        "max_length": config.max_length or 0,
        "cpl_coef": config.cpl_coef,
        "REDUCTION": config.reduction,
        "CPL_REDUCTION": config.cpl_reduction,
        "CHUNK": CHUNK,
        "NUM_SUMS": NUM_SUMS,
    }
    if num_completions:
        rows.launch(
            _loss_kernel,
            num_completions,
            8,
            logps_ptr=logps,
            entropy_ptr=statistics.entropy,
            positive_ptr=statistics.positive,
            negative_ptr=statistics.negative,
            selected_ptr=rows.bytes_of(statistics.selected),
            mask_ptr=completions.mask,
            old_logps_ptr=completions.old_logps,
            ref_logps_ptr=completions.ref_logps,
            advantages_ptr=completions.advantages,
            cu_seqlens_ptr=completions.cu_seqlens,
            coefficients_ptr=coefficients,
            num_rows=logps.numel(),
            length=completions.length,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip or 0.0,
            kl_coef=config.kl_coef,
            kl_clamp=math.inf if config.kl_clamp is None else config.kl_clamp,
            entropy_coef=config.entropy_coef,
            tau=config.tau,
            HAS_DUAL_CLIP=config.dual_clip is not None,
            IMPORTANCE=config.importance,
            DIVERGENCE=config.divergence,
            DETACH_ANCHOR=config.detach_anchor,
            ACC=rows.tl_accumulator(logps),
            BLOCK=BLOCK,
            **shared,
        )
    loss, metrics, num_selected = new(), new(6), new(dtype=torch.int64)
    rows.launch(
        _finish_kernel,
        1,
        4,
        loss_ptr=loss,
        metrics_ptr=metrics,
        num_selected_ptr=num_selected,
        HAS_CPL=statistics.positive is not None,
        **shared,
    )
    return loss, metrics, num_selected


def loss_terms(
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
    policy_denominator: float,
    contrast_denominator: float,
    *options: float | str | bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of packed rows that all count, its metrics and the coefficients (4, R)."""
    coefficients = torch.empty(4, logps.numel(), dtype=logps.dtype, device=logps.device)
    contiguous = rows.contiguous
    statistics = Statistics(
        logps.contiguous(),
        entropy.contiguous(),
        contiguous(positive_logps if margin is None else margin),
        contiguous(negative_logps),
        selected.contiguous(),
    )
    completions = Completions(
        advantages.contiguous(),
        contiguous(old_logps),
        contiguous(ref_logps),
        None,
        cu_seqlens.contiguous(),
        0,
    )
    counts = Counts(given=(policy_denominator, contrast_denominator))
    config = LossConfig(*options)  # type: ignore[arg-type]
    loss, metrics, _ = launch_loss(statistics, completions, counts, config, coefficients)
    return loss, metrics, coefficients
