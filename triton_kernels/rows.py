"""What every kernel on rows of logits shares: online statistics and the addresses of rows.

A row of logits z / temperature is summarised, relative to its maximum m and in base 2, by

    x = (z - m) * log2(e) / temperature,  sum = sum_v 2^x,  weighted = sum_v 2^x x

and two such summaries of parts of a row are one: with shift = (m - m_new) * log2(e) / temperature,

    sum' = 2^shift sum,  weighted' = 2^shift (weighted + shift * sum)

Every lane of a program holds a summary of its own and meets the others once, at the end of the
row: the loop over the vocabulary has no barrier, and a lane rescales once per WIDTH logits. A part
without a finite logit has m = -inf and sum = 0; LOWEST keeps its shift finite, so that 0 * -inf
never arises. Summaries of tiles of a row compose by `merge_lanes`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2.0))
# 2^LOWEST is 0 in fp32 and fp64 alike, and LOWEST * 0 is 0.
LOWEST = tl.constexpr(-16384.0)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def as_scalar(value, ACC: tl.constexpr):
    """A float argument in the dtype ACC. The interpreter passes a Python float, which lacks .to."""
    return (tl.full((), 1.0, tl.float64) * value).to(ACC)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """In the dtype that is stored, rounded to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        # The interpreter truncates; compiled code rounds.
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(DTYPE)


@triton.jit
def row_pointer(base_ptr, row, length, stride_b, stride_l, ALIGNMENT: tl.constexpr):
    """Start of row `row` of (B, length, V); 64-bit, since rows * V soon exceeds 2^31."""
    row = row.to(tl.int64)
    row_ptr = base_ptr + (row // length) * stride_b + (row % length) * stride_l
    if ALIGNMENT:
        row_ptr = tl.multiple_of(row_ptr, 16)
    return row_ptr


@triton.jit
def place_of(places_ptr, row):
    """The row of a view where a row of the batch lies, -1 for nowhere; without places, the same."""
    if places_ptr is not None:
        return tl.load(places_ptr + row)
    else:
        return row


@triton.jit
def or_zero(maximum):
    """What is subtracted from logits: the maximum, or 0 where there is no finite logit."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def exponent(tile, base, scale):
    """(tile - base) * scale, finite where the logit is -inf; a NaN stays."""
    return tl.maximum((tile - base) * scale, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def fold(m, s, w, tile, scale):
    """The summary (m, s, w) of each lane with the lane's logits `tile` (LANES, WIDTH) added."""
    new_m = tl.maximum(m, tl.max(tile, 1))
    base = or_zero(new_m)
    shift = exponent(m, base, scale)
    decay = tl.exp2(shift)
    x = exponent(tile, base[:, None], scale)
    e = tl.exp2(x)
    return new_m, decay * s + tl.sum(e, 1), decay * (w + shift * s) + tl.sum(e * x, 1)


@triton.jit
def merge_lanes(m, s, w, scale):
    """One summary of all lanes."""
    new_m = tl.max(m, 0)
    shift = exponent(m, or_zero(new_m), scale)
    decay = tl.exp2(shift)
    return new_m, tl.sum(decay * s, 0), tl.sum(decay * (w + shift * s), 0)


@triton.jit
def columns_of(
    part, chunk, vocabulary, TILE: tl.constexpr, WIDTH: tl.constexpr, ALIGNMENT: tl.constexpr
):
    """[first, last) of a part of a row, and where its whole tiles end.

    Whole tiles are loaded without a mask. The mask of the last one is the same for WIDTH
    neighbours where rows are aligned, which the compiler must be told to load 16 bytes at once.
    """
    first = tl.multiple_of(part * chunk, TILE)
    last = tl.minimum(first + chunk, vocabulary)
    if ALIGNMENT == 2:
        last = tl.multiple_of(last, WIDTH)
    return first, last, first + (last - first) // TILE * TILE


@triton.jit
def tile_columns(LANES: tl.constexpr, WIDTH: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The columns (LANES, WIDTH) of a tile; a thread has whole lanes.

    A lane reads 16 bytes at once. Where rows do not allow that, logits are read one by one, and
    neighbouring threads read neighbours.
    """
    lane = tl.arange(0, LANES)[:, None]
    place = tl.arange(0, WIDTH)[None, :]
    if ALIGNMENT == 0:
        return place * LANES + lane
    else:
        return lane * WIDTH + place


@triton.jit
def row_statistics(
    row_ptr,
    columns,
    scale,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Summary (m, s, w) of the columns of a row, as `columns_of` gives them."""
    first, last, whole = columns
    column = tile_columns(LANES, WIDTH, ALIGNMENT)
    m = tl.full((LANES,), float("-inf"), ACC)
    s = tl.zeros((LANES,), ACC)
    w = tl.zeros((LANES,), ACC)
    for start in range(first, whole, LANES * WIDTH):
        m, s, w = fold(m, s, w, tl.load(row_ptr + start + column).to(ACC), scale)
    if whole < last:
        inside = whole + column < last
        tile = tl.load(row_ptr + whole + column, inside, float("-inf")).to(ACC)
        m, s, w = fold(m, s, w, tile, scale)
    return merge_lanes(m, s, w, scale)
