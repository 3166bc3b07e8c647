"""What every kernel on rows of logits shares: online statistics, row addresses, launch shapes.

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

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2.0))
# 2^LOWEST is 0 in fp32 and fp64 alike, and LOWEST * 0 is 0.
LOWEST = tl.constexpr(-16384.0)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# Helpers of kernels


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


@triton.jit
def target_logit(row_ptr, target, vocabulary, ACC: tl.constexpr):
    """The logit of the target; NaN where the target lies outside the vocabulary."""
    inside = (target >= 0) & (target < vocabulary)
    return tl.load(row_ptr + target, inside, float("nan")).to(ACC)


@triton.jit
def token_statistics(m, s, w, z_target, inverse_temperature, ACC: tl.constexpr):
    """(log-probability of the target, entropy, mean of x in nats) from a row's summary.

    Without a finite logit the first two are NaN: m = -inf.
    """
    mean = w / s * LN2
    log_sum = tl.log(s)
    # In fp64, once per row: x of the target may be large and 1 / temperature is rounded.
    x_target = ((z_target - m).to(tl.float64) * inverse_temperature).to(ACC)
    return x_target - log_sum, log_sum - mean, mean


@triton.jit
def completion_rows(cu_seqlens_ptr, completion, length):
    """[start, end) of a completion's rows: packed by cu_seqlens, or `length` rows each."""
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + completion).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + completion + 1).to(tl.int64)
    else:
        start = completion.to(tl.int64) * length
        end = start + length
    return start, end


# Launching


class Rows(NamedTuple):
    """A view of logits as kernels see it: row r starts at (r // length, r % length) strides."""

    tensor: Tensor
    length: int
    stride_b: int
    stride_l: int

    @property
    def alignment(self) -> int:
        """1: every row starts at a multiple of 16 bytes; 2: and is one long. 0: neither."""
        size = self.tensor.element_size()
        if self.tensor.data_ptr() % 16 or self.stride_b * size % 16 or self.stride_l * size % 16:
            return 0
        return 1 if self.tensor.shape[-1] * size % 16 else 2


def as_rows(logits: Tensor) -> Rows:
    """(B, L, V) or (T, V) without a copy, unless the vocabulary is strided."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.ndim == 2:
        return Rows(logits, max(1, logits.shape[0]), 0, logits.stride(0))
    return Rows(logits, max(1, logits.shape[1]), logits.stride(0), logits.stride(1))


def accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def tl_accumulator(*tensors: Tensor) -> tl.dtype:
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return tl.float64 if is_double else tl.float32


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Of a GPU. In the interpreter programs run one after the other: 1."""
    if device.type != "cuda":
        return 1
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


# Programs per multiprocessor that keep enough loads in flight; with fewer rows, rows are split.
PROGRAMS_PER_MULTIPROCESSOR = 8
MAX_SPLITS = 64


class Shape(NamedTuple):
    """The tile of a program: LANES x WIDTH logits by num_warps warps."""

    lanes: int
    width: int
    num_warps: int

    @property
    def size(self) -> int:
        return self.lanes * self.width


# The one table of launch shapes: loads of 16 bytes in flight per thread and tensor, and warps.
# The fastest of five to ten on an H200; the next ones are within 3 %.
_SHAPES = {
    "statistics": (4, 8),
    "gradient": (1, 8),
    "margin": (2, 4),
    "margin_gradient": (1, 8),
}
# Programs that write read as much: one after the other in memory, in pieces of 16 KiB, they reach
# 97 % of a copy's rate on an H200, and 92 % with a row each.
_TILES_PER_WRITER = 4


def launch_shape(kind: str, tensor: Tensor) -> Shape:
    loads, num_warps = _SHAPES[kind]
    return Shape(loads * 32 * num_warps, 16 // tensor.element_size(), num_warps)


class Split(NamedTuple):
    """Rows are cut into `splits` parts of `chunk` columns, a multiple of the tile."""

    splits: int
    chunk: int


def _cdiv(a: int, b: int) -> int:
    # Triton's own takes ten times as long.
    return -(-a // b)


def split_rows(num_rows: int, vocabulary: int, shape: Shape, device: torch.device) -> Split:
    """One program per row, or several where the rows alone would leave the GPU idle."""
    wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device)
    tiles = _cdiv(vocabulary, shape.size)
    splits = max(1, min(MAX_SPLITS, _cdiv(wanted, max(1, num_rows)), tiles))
    tiles_per_split = _cdiv(tiles, splits)
    return Split(_cdiv(tiles, tiles_per_split), tiles_per_split * shape.size)


def split_for_writing(vocabulary: int, shape: Shape) -> Split:
    """Several programs per row, each of a few tiles."""
    chunk = _TILES_PER_WRITER * shape.size
    return Split(_cdiv(vocabulary, chunk), chunk)


class _Parameters(NamedTuple):
    """The names of a kernel's parameters: all in order, tensors (`x_ptr`), constants (`X`)."""

    every: tuple[str, ...]
    tensors: tuple[str, ...]
    constants: tuple[str, ...]


@functools.cache
def _parameters(names: tuple[str, ...]) -> _Parameters:
    pointers = tuple(name for name in names if name.endswith("_ptr"))
    return _Parameters(names, pointers, tuple(name for name in names if name.isupper()))


# {what a launch depends on: the compiled kernel}
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, programs: int, num_warps: int, **arguments: Any) -> None:
    """Launches so many programs of a kernel that is specialised on no number.

    Triton looks up what it compiled by the value of every argument, which takes as long as many of
    these kernels do. Here it depends on constants, on which tensors are given, and on their dtypes
    alone.
    """
    names = _parameters(tuple(kernel.arg_names))
    tensors = [arguments[name] for name in names.tensors]
    key = (
        id(kernel),
        num_warps,
        next(tensor for tensor in tensors if tensor is not None).get_device(),
        *[arguments[name] for name in names.constants],
        *[None if tensor is None else tensor.dtype for tensor in tensors],
    )
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*[arguments[name] for name in names.every])
        return
    compiled = kernel[programs, 1, 1](**arguments, num_warps=num_warps)
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Upstream gradients may be expanded; they are one number per row."""
    return None if tensor is None else tensor.contiguous()


def new_gradient(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@contextlib.contextmanager
def written_over(logits: Tensor) -> Iterator[Tensor]:
    """Where a gradient that replaces `logits` is written: they themselves, if kernels can."""
    if logits.stride(-1) == 1 or logits.shape[-1] == 1:
        yield logits
        return
    gradient = new_gradient(logits)
    yield gradient
    logits.copy_(gradient)


def bytes_of(mask: Tensor | None) -> Tensor | None:
    """A bool tensor as contiguous uint8, which kernels load without conversions."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def run_args(temperature: float) -> dict[str, Any]:
    return {"scale": LOG2E / temperature, "inverse_temperature": 1.0 / temperature}
