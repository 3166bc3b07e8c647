"""The loss of the statistics of rows, and its derivative by each of them; no logits here.

Per row, with A of its completion, rho = exp(logp - old) (per completion its geometric mean),
w = 1 / (denominator [x tokens of the completion]):

    policy = -min(rho A, clip(rho) A),  d policy / d logp = -rho A where no clip binds
    KL = min(k3(ref - logp), kl_clamp),  d k3(d) / d d = e^d - 1 inside the clamps
    CPL = softplus(margin / tau) where selected,  d CPL / d margin = sigmoid(margin / tau) / tau
    loss = sum w (v policy + kl_coef KL - papo_coef min(k3(removed - logp), 10) - entropy_coef H)
           + cpl_coef sum CPL / selected

with v = `weights`. A mean of log-ratios couples the rows of a completion: each moves it by 1 / n,
which moves all of them, so that the derivative by each logp has the mean of v in place of v.

`_loss_kernel` has one program per completion, `_finish_kernel` adds them up in one order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cppo.fused.schema import COEFFICIENTS, TERMS, from_text
from cppo.triton_kernels.launch import bytes_of, contiguous, kernel, launch, tl_accumulator
from cppo.triton_kernels.rows import as_scalar

# Rows per step of a program: two per thread, so that the sums stay in registers.
BLOCK = 512
CHUNK = 1024
_CONSTANTS = ("IMPORTANCE", "REDUCTION", "DIVERGENCE", "CPL_REDUCTION", "DETACH_ANCHOR")
NUM_TERMS = tl.constexpr(len(TERMS))


@triton.jit
def _named(mask_ptr, row, end):
    """The rows before `end` that a mask names; all of them without one."""
    named = row < end
    if mask_ptr is not None:
        named = named & (tl.load(mask_ptr + row, named, 0) != 0)
    return named


@triton.jit
def _count(mask_ptr, start, end, BLOCK: tl.constexpr):
    """How many rows of a completion a mask names, at least 1, in fp64."""
    column = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(start, end, BLOCK):
        count += _named(mask_ptr, first + column, end).to(tl.int32)
    return tl.maximum(tl.sum(count, 0), 1).to(tl.float64)


@triton.jit
def _old_logp(old_logps_ptr, row, valid, logp):
    """The logp of the policy that sampled: this one, where nothing else is known."""
    if old_logps_ptr is not None:
        return tl.load(old_logps_ptr + row, valid, 0.0).to(logp.dtype)
    else:
        return logp


@triton.jit
def _means(logps_ptr, old_logps_ptr, weights_ptr, mask_ptr, start, end, count, BLOCK: tl.constexpr):
    """Of a completion: the mean log-ratio, and the mean weight where there are weights."""
    column = tl.arange(0, BLOCK)
    log_ratios = tl.zeros((BLOCK,), tl.float64)
    weights = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, end, BLOCK):
        row = first + column
        valid = _named(mask_ptr, row, end)
        logp = tl.load(logps_ptr + row, valid, 0.0)
        log_ratios += (logp - _old_logp(old_logps_ptr, row, valid, logp)).to(tl.float64)
        if weights_ptr is not None:
            weights += tl.load(weights_ptr + row, valid, 0.0).to(logp.dtype).to(tl.float64)
    return tl.sum(log_ratios, 0) / count, tl.sum(weights, 0) / count


@triton.jit
def _weighted(value, weight):
    """0 of a weight of 0, whatever it weighs: a ratio may have overflowed."""
    return tl.where(weight != 0, value * weight, 0.0)


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
def _policy(log_ratio, advantage, clip_low, clip_high, dual_clip):
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
def _contrast(statistics, row, selected, logp, tau, weight, DIVERGENCE: tl.constexpr):
    """CPL of the selected rows, and its derivatives by the logps of positive, negative and anchor.

    With the full divergence the first is by the margin, which is there, and the others are zero.
    """
    positive_ptr, negative_ptr = statistics
    positive = tl.load(positive_ptr + row, selected, 0.0)
    if DIVERGENCE == "full":
        cpl, slope = _softplus(positive / tau)
        nothing = tl.zeros_like(slope)
        return cpl, slope * weight, nothing, nothing
    else:
        negative = tl.load(negative_ptr + row, selected, 0.0)
        to_positive, positive_slope = _divergence(positive, logp, DIVERGENCE)
        to_negative, negative_slope = _divergence(negative, logp, DIVERGENCE)
        cpl, slope = _softplus((to_positive - to_negative) / tau)
        slope = slope * weight
        by_anchor = slope * (negative_slope - positive_slope)
        return cpl, slope * positive_slope, -slope * negative_slope, by_anchor


@triton.jit
def _where(condition, value):
    """As a part of a sum over rows: in fp64, zero elsewhere."""
    return tl.where(condition, value, 0.0).to(tl.float64)


@kernel
def _loss_kernel(
    logps_ptr,
    entropy_ptr,
    positive_ptr,
    negative_ptr,
    selected_ptr,
    mask_ptr,
    old_logps_ptr,
    ref_logps_ptr,
    weights_ptr,
    removed_logps_ptr,
    advantages_ptr,
    cu_seqlens_ptr,
    denominators_ptr,
    coefficients_ptr,
    sums_ptr,
    num_rows: tl.int64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    kl_coef: tl.float64,
    kl_clamp: tl.float64,
    entropy_coef: tl.float64,
    papo_coef: tl.float64,
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
):
    completion = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + completion).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + completion + 1).to(tl.int64)
    count = _count(mask_ptr, start, end, BLOCK)
    # Of a row in the sum over its completion, and of that sum.
    share = tl.full((), 1.0, tl.float64)
    if REDUCTION == "grpo":
        share = 1.0 / count
    weight = (share / tl.load(denominators_ptr)).to(ACC)
    cpl_share = tl.full((), 1.0, tl.float64)
    if CPL_REDUCTION == "sequence" and positive_ptr is not None:
        cpl_share = 1.0 / _count(selected_ptr, start, end, BLOCK)
    cpl_weight = (cpl_share / tl.load(denominators_ptr + 1) * cpl_coef / tau).to(ACC)

    advantage = tl.zeros((BLOCK,), ACC) + tl.load(advantages_ptr + completion).to(ACC)
    if IMPORTANCE == "sequence":
        mean_log_ratio, mean_weight = _means(
            logps_ptr, old_logps_ptr, weights_ptr, mask_ptr, start, end, count, BLOCK
        )
    column = tl.arange(0, BLOCK)
    sum_policy = tl.zeros((BLOCK,), tl.float64)
    sum_entropy = tl.zeros((BLOCK,), tl.float64)
    sum_clipped = tl.zeros((BLOCK,), tl.float64)
    sum_kl = tl.zeros((BLOCK,), tl.float64)
    sum_papo = tl.zeros((BLOCK,), tl.float64)
    sum_cpl = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, end, BLOCK):
        row = first + column
        inside = row < end
        valid = _named(mask_ptr, row, end)
        logp = tl.load(logps_ptr + row, valid, 0.0)
        entropy = tl.load(entropy_ptr + row, valid, 0.0)
        log_ratio = logp - _old_logp(old_logps_ptr, row, valid, logp)
        if IMPORTANCE == "sequence":
            log_ratio = tl.zeros((BLOCK,), ACC) + mean_log_ratio.to(ACC)
        bound = dual_clip if HAS_DUAL_CLIP else None
        policy, d_logp, clipped = _policy(log_ratio, advantage, clip_low, clip_high, bound)
        if weights_ptr is not None:
            of_row = tl.load(weights_ptr + row, valid, 0.0).to(ACC)
            policy = _weighted(policy, of_row)
            d_logp = _weighted(d_logp, mean_weight.to(ACC) if IMPORTANCE == "sequence" else of_row)
        if ref_logps_ptr is not None:
            ref = tl.load(ref_logps_ptr + row, valid, 0.0).to(ACC)
            kl, slope = _k3(ref, logp, as_scalar(kl_clamp, ACC))
            d_logp -= slope * as_scalar(kl_coef, ACC)
            sum_kl += _where(valid, kl)
        if removed_logps_ptr is not None:
            removed = tl.load(removed_logps_ptr + row, valid, 0.0).to(ACC)
            depends, slope = _k3(removed, logp, 10.0)
            d_logp += slope * as_scalar(papo_coef, ACC)
            sum_papo += _where(valid, depends)
        sum_policy += _where(valid, policy)
        sum_entropy += _where(valid, entropy)
        sum_clipped += _where(valid & clipped, 1.0)

        d_logp *= weight
        d_positive = tl.zeros((BLOCK,), ACC)
        d_negative = tl.zeros((BLOCK,), ACC)
        if positive_ptr is not None:
            selected = valid & _named(selected_ptr, row, end)
            statistics = (positive_ptr, negative_ptr)
            cpl, d_positive, d_negative, d_anchor = _contrast(
                statistics, row, selected, logp, as_scalar(tau, ACC), cpl_weight, DIVERGENCE
            )
            sum_cpl += _where(selected, cpl)
            d_positive = tl.where(selected, d_positive, 0.0)
            d_negative = tl.where(selected, d_negative, 0.0)
            if not DETACH_ANCHOR:
                d_logp += tl.where(selected, d_anchor, 0.0)
        d_entropy = tl.zeros((BLOCK,), ACC) - as_scalar(entropy_coef, ACC) * weight
        tl.store(coefficients_ptr + row, tl.where(valid, d_logp, 0.0), inside)
        tl.store(coefficients_ptr + num_rows + row, tl.where(valid, d_entropy, 0.0), inside)
        tl.store(coefficients_ptr + 2 * num_rows + row, d_positive, inside)
        tl.store(coefficients_ptr + 3 * num_rows + row, d_negative, inside)

    # In the order of TERMS.
    at = sums_ptr + completion * NUM_TERMS
    tl.store(at, tl.sum(sum_policy, 0) * share)
    tl.store(at + 1, tl.sum(sum_entropy, 0) * share)
    tl.store(at + 2, tl.sum(sum_clipped, 0) * share)
    tl.store(at + 3, tl.sum(sum_kl, 0) * share)
    tl.store(at + 4, tl.sum(sum_papo, 0) * share)
    tl.store(at + 5, tl.sum(sum_cpl, 0) * cpl_share)


@triton.jit
def _term(sums_ptr, which, num_completions, CHUNK: tl.constexpr):
    """The sum of a term over completions."""
    column = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), tl.float64)
    for first in range(0, num_completions, CHUNK):
        at = first + column
        total += tl.load(sums_ptr + at * NUM_TERMS + which, at < num_completions, 0.0)
    return tl.sum(total, 0)


@kernel
def _finish_kernel(
    sums_ptr,
    denominators_ptr,
    loss_ptr,
    metrics_ptr,
    num_completions: tl.int32,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    papo_coef: tl.float64,
    cpl_coef: tl.float64,
    CHUNK: tl.constexpr,
):
    """The loss and its terms: sums over completions, always in the same order."""
    denominator = tl.load(denominators_ptr)
    policy = _term(sums_ptr, 0, num_completions, CHUNK) / denominator
    entropy = _term(sums_ptr, 1, num_completions, CHUNK) / denominator
    clipped = _term(sums_ptr, 2, num_completions, CHUNK) / denominator
    kl = _term(sums_ptr, 3, num_completions, CHUNK) / denominator
    papo = _term(sums_ptr, 4, num_completions, CHUNK) / denominator
    cpl = _term(sums_ptr, 5, num_completions, CHUNK) / tl.load(denominators_ptr + 1)
    loss = policy + kl_coef * kl - papo_coef * papo + cpl_coef * cpl
    # An infinite entropy must not become 0 * inf where there is no entropy term.
    if entropy_coef != 0:
        loss -= entropy_coef * entropy
    tl.store(loss_ptr, loss)
    tl.store(metrics_ptr, policy)
    tl.store(metrics_ptr + 1, entropy)
    tl.store(metrics_ptr + 2, clipped)
    tl.store(metrics_ptr + 3, kl)
    tl.store(metrics_ptr + 4, papo)
    tl.store(metrics_ptr + 5, cpl)


def loss_terms(
    logps: Tensor,
    entropy: Tensor,
    positive_logps: Tensor | None,
    negative_logps: Tensor | None,
    margin: Tensor | None,
    selected: Tensor | None,
    advantages: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    weights: Tensor | None,
    removed_logps: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    denominators: Tensor,
    config: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = from_text(config)
    num_rows, num_completions = logps.numel(), advantages.numel()

    def new(*size: int, dtype: torch.dtype = logps.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=logps.device)

    loss, metrics, coefficients = new(), new(len(TERMS)), new(len(COEFFICIENTS), num_rows)
    sums = new(num_completions, NUM_TERMS.value, dtype=torch.float64)
    denominators = denominators.contiguous()
    rows = dict(logps=logps, entropy=entropy, old_logps=old_logps, ref_logps=ref_logps)
    rows |= dict(positive=positive_logps if margin is None else margin, negative=negative_logps)
    rows |= dict(weights=weights, removed_logps=removed_logps)
    coefs = {f"{x}_coef": getattr(options, f"{x}_coef") for x in ("kl", "entropy", "papo", "cpl")}
    if num_completions:
        launch(
            _loss_kernel,
            num_completions,
            8,
            **{f"{name}_ptr": contiguous(values) for name, values in rows.items()},
            selected_ptr=bytes_of(selected),
            mask_ptr=bytes_of(mask),
            advantages_ptr=advantages.contiguous(),
            cu_seqlens_ptr=cu_seqlens.contiguous(),
            denominators_ptr=denominators,
            coefficients_ptr=coefficients,
            sums_ptr=sums,
            num_rows=num_rows,
            clip_low=options.clip_low,
            clip_high=options.clip_high,
            dual_clip=options.dual_clip or 0.0,
            **coefs,
            kl_clamp=math.inf if options.kl_clamp is None else options.kl_clamp,
            tau=options.tau,
            HAS_DUAL_CLIP=options.dual_clip is not None,
            **{name: getattr(options, name.lower()) for name in _CONSTANTS},
            ACC=tl_accumulator(logps),
            BLOCK=BLOCK,
        )
    launch(
        _finish_kernel,
        1,
        4,
        sums_ptr=sums,
        denominators_ptr=denominators,
        loss_ptr=loss,
        metrics_ptr=metrics,
        num_completions=num_completions,
        **coefs,
        CHUNK=CHUNK,
    )
    return loss, metrics, coefficients
