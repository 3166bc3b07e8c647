"""The contrast of three views over the whole vocabulary: a difference of two divergences.

Specification: `cppo.reference.contrastive_loss` with divergence="full". With x_v = z_v - max z,
s = sum_v e^x_v and pi = e^x / s of the anchor a, the positive p and the negative n, the anchor's
log-probabilities cancel in the difference:

    D = KL(a || p) - KL(a || n) = E_a[x_n - x_p] + ln s_p - ln s_n

The expectation is accumulated like an entropy, relative to the maxima of all three views so far:
when they move, sum_v e^x_a (x_n - x_p) moves by the anchor's sum times the drift of the difference.
It is a sum of logits, which the temperature divides at the end: scaled to powers of two first, a
logit of finfo.min in one view alone would be -inf.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cppo.fused.schema import CONTRASTS
from cppo.triton_kernels.launch import (
    Rows,
    accumulator,
    as_rows,
    bytes_of,
    contiguous,
    kernel,
    launch_statistics,
)
from cppo.triton_kernels.rows import (
    LOWEST,
    as_scalar,
    columns_of,
    exponent,
    or_zero,
    place_of,
    row_pointer,
    tile_columns,
)

# Maximum and sum of each view, and d = sum_v e^x_a (z_n - z_p relative to their maxima).
NUM_SUMS = tl.constexpr(7)


@triton.jit
def _fold(summary, tile_a, tile_p, tile_n, scale):
    """The summary of each lane with a tile of each view added."""
    m_a, s_a, m_p, s_p, m_n, s_n, d = summary
    new_a = tl.maximum(m_a, tl.max(tile_a, 1))
    new_p = tl.maximum(m_p, tl.max(tile_p, 1))
    new_n = tl.maximum(m_n, tl.max(tile_n, 1))
    base_a, base_p, base_n = or_zero(new_a), or_zero(new_p), or_zero(new_n)
    drift = (or_zero(m_n) - base_n) - (or_zero(m_p) - base_p)

    decay = tl.exp2(exponent(m_a, base_a, scale))
    e = tl.exp2(exponent(tile_a, base_a[:, None], scale))
    above_p = tile_p - base_p[:, None]
    above_n = tile_n - base_n[:, None]
    # Where the anchor excludes a token, the other views may too: inf - inf counts nothing.
    rise = tl.where(e == 0.0, 0.0, e * (above_n - above_p))
    d = decay * (d + drift * s_a) + tl.sum(rise, 1)
    s_a = decay * s_a + tl.sum(e, 1)

    x_p = tl.maximum(above_p * scale, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    s_p = tl.exp2(exponent(m_p, base_p, scale)) * s_p + tl.sum(tl.exp2(x_p), 1)
    x_n = tl.maximum(above_n * scale, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    s_n = tl.exp2(exponent(m_n, base_n, scale)) * s_n + tl.sum(tl.exp2(x_n), 1)
    return new_a, s_a, new_p, s_p, new_n, s_n, d


@triton.jit
def _merge(summary, scale):
    """One summary of all lanes."""
    m_a, s_a, m_p, s_p, m_n, s_n, d = summary
    new_a, new_p, new_n = tl.max(m_a, 0), tl.max(m_p, 0), tl.max(m_n, 0)
    base_p, base_n = or_zero(new_p), or_zero(new_n)
    drift = (or_zero(m_n) - base_n) - (or_zero(m_p) - base_p)
    decay = tl.exp2(exponent(m_a, or_zero(new_a), scale))
    d = tl.sum(decay * (d + drift * s_a), 0)
    s_a = tl.sum(decay * s_a, 0)
    s_p = tl.sum(tl.exp2(exponent(m_p, base_p, scale)) * s_p, 0)
    s_n = tl.sum(tl.exp2(exponent(m_n, base_n, scale)) * s_n, 0)
    return new_a, s_a, new_p, s_p, new_n, s_n, d


@triton.jit
def _fold_columns(summary, rows_ptr, column, inside, scale):
    a_ptr, p_ptr, n_ptr = rows_ptr
    other = None if inside is None else float("-inf")
    tile_a = tl.load(a_ptr + column, inside, other).to(scale.dtype)
    tile_p = tl.load(p_ptr + column, inside, other).to(scale.dtype)
    tile_n = tl.load(n_ptr + column, inside, other).to(scale.dtype)
    return _fold(summary, tile_a, tile_p, tile_n, scale)


@triton.jit
def _row_contrast(
    rows_ptr,
    columns,
    scale,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Summary of the columns of three rows; as `row_statistics`."""
    first, last, whole = columns
    column = tile_columns(LANES, WIDTH, ALIGNMENT)
    m = tl.full((LANES,), float("-inf"), ACC)
    zeros = tl.zeros((LANES,), ACC)
    summary = (m, zeros, m, zeros, m, zeros, zeros)
    for start in range(first, whole, LANES * WIDTH):
        summary = _fold_columns(summary, rows_ptr, start + column, None, scale)
    if whole < last:
        column = whole + column
        summary = _fold_columns(summary, rows_ptr, column, column < last, scale)
    return _merge(summary, scale)


@triton.jit
def _merge_parts(partial_ptr, row, splits, scale, LANES: tl.constexpr):
    part = tl.arange(0, LANES)
    inside = part < splits
    at = partial_ptr + (row * splits + part) * NUM_SUMS
    summary = (
        tl.load(at, inside, float("-inf")),
        tl.load(at + 1, inside, 0.0),
        tl.load(at + 2, inside, float("-inf")),
        tl.load(at + 3, inside, 0.0),
        tl.load(at + 4, inside, float("-inf")),
        tl.load(at + 5, inside, 0.0),
        tl.load(at + 6, inside, 0.0),
    )
    return _merge(summary, scale)


@kernel
def _contrast_kernel(
    anchor_ptr,
    positive_ptr,
    negative_ptr,
    mask_ptr,
    positive_places_ptr,
    negative_places_ptr,
    partial_ptr,
    contrasts_ptr,
    num_rows: tl.int64,
    length: tl.int64,
    anchor_stride_b: tl.int64,
    anchor_stride_l: tl.int64,
    positive_stride_b: tl.int64,
    positive_stride_l: tl.int64,
    negative_stride_b: tl.int64,
    negative_stride_l: tl.int64,
    vocabulary: tl.int32,
    chunk: tl.int32,
    splits: tl.int32,
    scale: tl.float64,
    inverse_temperature: tl.float64,
    STEP: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program if STEP == "merge" else program // splits).to(tl.int64)
    if tl.load(mask_ptr + row) != 0:
        if STEP == "merge":
            summary = _merge_parts(partial_ptr, row, splits, as_scalar(scale, ACC), LANES)
        else:
            part = program % splits
            columns = columns_of(part, chunk, vocabulary, LANES * WIDTH, WIDTH, ALIGNMENT)
            p_row = place_of(positive_places_ptr, row)
            n_row = place_of(negative_places_ptr, row)
            rows_ptr = (
                row_pointer(anchor_ptr, row, length, anchor_stride_b, anchor_stride_l, ALIGNMENT),
                row_pointer(
                    positive_ptr, p_row, length, positive_stride_b, positive_stride_l, ALIGNMENT
                ),
                row_pointer(
                    negative_ptr, n_row, length, negative_stride_b, negative_stride_l, ALIGNMENT
                ),
            )
            summary = _row_contrast(
                rows_ptr, columns, as_scalar(scale, ACC), ACC, LANES, WIDTH, ALIGNMENT
            )
        if STEP == "part":
            at = partial_ptr + program.to(tl.int64) * NUM_SUMS
            for i in tl.static_range(NUM_SUMS):
                tl.store(at + i, summary[i])
        else:
            _, s_a, m_p, s_p, m_n, s_n, d = summary
            rise = d / s_a * as_scalar(inverse_temperature, ACC)
            tl.store(contrasts_ptr + row, m_p)
            tl.store(contrasts_ptr + num_rows + row, s_p)
            tl.store(contrasts_ptr + 2 * num_rows + row, m_n)
            tl.store(contrasts_ptr + 3 * num_rows + row, s_n)
            tl.store(contrasts_ptr + 4 * num_rows + row, rise + tl.log(s_p) - tl.log(s_n))


def rows_of_views(views: dict[str, Tensor]) -> dict[str, Rows]:
    """The views as rows. One without any is never read, but a null pointer has no alignment."""
    anchor = views["anchor"]
    return {name: as_rows(view if view.shape[0] else anchor) for name, view in views.items()}


def contrast(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    mask: Tensor,
    positive_places: Tensor | None,
    negative_places: Tensor | None,
    temperature: float,
) -> Tensor:
    num_rows, size = mask.numel(), (len(CONTRASTS), mask.numel())
    contrasts = torch.zeros(size, dtype=accumulator(anchor), device=anchor.device)
    if num_rows:
        launch_statistics(
            _contrast_kernel,
            "contrast",
            rows_of_views({"anchor": anchor, "positive": positive, "negative": negative}),
            num_rows,
            NUM_SUMS.value,
            temperature,
            mask_ptr=bytes_of(mask),
            positive_places_ptr=contiguous(positive_places),
            negative_places_ptr=contiguous(negative_places),
            contrasts_ptr=contrasts,
        )
    return contrasts
