"""Which tokens of a completion are perception tokens: an exact k-th largest, without a sort.

Specification: `cppo.reference.perception_mask`. Per completion, over its valid tokens,

    dH = H_negative - H_anchor,  dH > 0 where it exceeds the rounding error of an entropy
    score = dH / (H_negative + 1e-6) where dH > 0,  c of them
    k = max(1, floor(fraction c)),  selected = dH > 0 and score >= k-th largest score

One program per completion. A score's bits, made unsigned and of the order of the score, are
searched from the top, 8 at a time: the histogram of the next 8 bits among the scores that share
the bits found so far says which 8 bits the k-th largest has. So the threshold is exact after 4
passes over the completion (8 in fp64), ties stay in, and counts are integers: the same bits in
every run, for a completion of any length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cppo.reference import ENTROPY_ERROR
from cppo.triton_kernels.launch import bytes_of, contiguous, kernel, launch, tl_accumulator

BLOCK = 2048
# One thread per bin of the histogram.
NUM_WARPS = 8
# Of an entropy H, times 1 + H.
ERROR = tl.constexpr(ENTROPY_ERROR)


@triton.jit
def _rises_and_keys(anchor_ptr, negative_ptr, mask_ptr, row, end, ACC: tl.constexpr):
    """Whether the entropy of each token rises, and its score as an unsigned integer."""
    inside = row < end
    if mask_ptr is not None:
        inside = inside & (tl.load(mask_ptr + row, inside, 0) != 0)
    anchor = tl.load(anchor_ptr + row, inside, 0.0).to(ACC)
    negative = tl.load(negative_ptr + row, inside, 0.0).to(ACC)
    rise = negative - anchor
    rises = inside & (rise > ERROR * (1 + negative))
    if ACC == tl.float64:
        score = rise / (negative + 1e-6)
    else:
        # The quotient of the reference to the last bit.
        score = tl.div_rn(rise, negative + 1e-6)
    # -0 equals 0; the bits of negative scores run the other way; a NaN is sorted above infinity.
    score = tl.where(score == 0, 0.0, score)
    is_number = score == score
    if ACC == tl.float64:
        bits = score.to(tl.int64, bitcast=True)
        bits = tl.where(bits < 0, ~bits, bits ^ -0x8000000000000000)
        key = tl.where(is_number, bits, -1).to(tl.uint64, bitcast=True)
    else:
        bits = score.to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, ~bits, bits ^ -0x80000000)
        key = tl.where(is_number, bits, -1).to(tl.uint32, bitcast=True)
    return rises, is_number, key


@triton.jit
def _number_that_rise(
    anchor_ptr, negative_ptr, mask_ptr, start, end, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.arange(0, BLOCK)
    counts = tl.zeros((BLOCK,), tl.int32)
    for first in range(start, end, BLOCK):
        rises, _, _ = _rises_and_keys(anchor_ptr, negative_ptr, mask_ptr, first + column, end, ACC)
        counts += rises.to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def _largest_key(
    anchor_ptr, negative_ptr, mask_ptr, start, end, rank, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """The `rank`-th largest key of the tokens of [start, end) that rise."""
    passes: tl.constexpr = 8 if ACC == tl.float64 else 4
    column = tl.arange(0, BLOCK)
    digits = tl.arange(0, 256)
    threshold = tl.full((), 0, tl.uint64 if ACC == tl.float64 else tl.uint32)
    for i in range(passes):
        shift = (passes - 1 - i) * 8
        histogram = tl.zeros((256,), tl.int32)
        for first in range(start, end, BLOCK):
            rises, _, key = _rises_and_keys(
                anchor_ptr, negative_ptr, mask_ptr, first + column, end, ACC
            )
            digit = key >> shift.to(key.dtype)
            # In two steps: a shift by the whole width is undefined.
            candidate = rises & ((digit >> 8) == threshold)
            histogram += tl.histogram((digit & 255).to(tl.int32), 256, candidate)
        at_least = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram
        # The largest digit that `rank` of the candidates reach.
        found = tl.sum((at_least >= rank).to(tl.int32), 0) - 1
        rank -= tl.sum(tl.where(digits == found + 1, at_least, 0), 0)
        threshold = (threshold << 8) | found.to(threshold.dtype)
    return threshold


@kernel
def _perception_mask_kernel(
    anchor_ptr,
    negative_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    selected_ptr,
    length: tl.int64,
    fraction: tl.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    completion = tl.program_id(0)
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + completion).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + completion + 1).to(tl.int64)
    else:
        start = completion.to(tl.int64) * length
        end = start + length
    count = _number_that_rise(anchor_ptr, negative_ptr, mask_ptr, start, end, ACC, BLOCK)
    rank = tl.maximum(1, tl.floor(count.to(tl.float64) * fraction).to(tl.int32))
    threshold = tl.full((), 0, tl.uint64 if ACC == tl.float64 else tl.uint32)
    if count > 0:
        threshold = _largest_key(anchor_ptr, negative_ptr, mask_ptr, start, end, rank, ACC, BLOCK)
    column = tl.arange(0, BLOCK)
    for first in range(start, end, BLOCK):
        row = first + column
        rises, is_number, key = _rises_and_keys(anchor_ptr, negative_ptr, mask_ptr, row, end, ACC)
        selected = rises & is_number & (key >= threshold)
        tl.store(selected_ptr + row, selected.to(tl.uint8), row < end)


def perception_mask(
    anchor_entropy: Tensor,
    negative_entropy: Tensor,
    fraction: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    selected = torch.empty(anchor_entropy.shape, dtype=torch.bool, device=anchor_entropy.device)
    num_completions = selected.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if num_completions:
        launch(
            _perception_mask_kernel,
            num_completions,
            NUM_WARPS,
            anchor_ptr=anchor_entropy.contiguous(),
            negative_ptr=negative_entropy.contiguous(),
            mask_ptr=bytes_of(mask),
            cu_seqlens_ptr=contiguous(cu_seqlens),
            selected_ptr=selected.view(torch.uint8),
            length=selected.shape[-1],
            fraction=fraction,
            ACC=tl_accumulator(anchor_entropy, negative_entropy),
            BLOCK=BLOCK,
        )
    return selected
