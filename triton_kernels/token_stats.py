"""Log-probability of the target and entropy of every row of logits, and their gradient.

Specification: `cppo.reference.token_stats`. With m = max_v logit_v, x_v = (logit_v - m) / T,
s = sum_v e^x_v, mean = sum_v e^x_v x_v / s and pi_v = e^x_v / s:

    logp = x_y - ln s,  H = ln s - mean
    d logp / d logit_v = (1[v = y] - pi_v) / T,  d H / d logit_v = -pi_v (x_v - mean) / T

Forward: one read of each row that counts; m, s and mean are kept. Backward: one read and one
write, both upstream gradients summed in registers; where they are zero, zeros are written and
nothing is read. With few rows several programs share one, and a second launch merges what they
found, always in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cppo.triton_kernels import rows
from cppo.triton_kernels.rows import (
    LN2,
    as_scalar,
    columns_of,
    exponent,
    merge_lanes,
    rounded,
    row_pointer,
    row_statistics,
    target_logit,
    token_statistics,
)

# Nothing that changes from step to step is compiled in; alignment is one constant, ALIGNMENT.
_RUNTIME = (
    "logits_ptr",
    "targets_ptr",
    "reads_ptr",
    "view_row_ptr",
    "partial_ptr",
    "logps_ptr",
    "entropy_ptr",
    "max_ptr",
    "sum_ptr",
    "mean_ptr",
    "length",
    "stride_b",
    "stride_l",
    "vocabulary",
    "chunk",
    "splits",
)


@triton.jit
def _store_statistics(
    row,
    m,
    s,
    w,
    row_ptr,
    targets_ptr,
    logps_ptr,
    entropy_ptr,
    max_ptr,
    sum_ptr,
    mean_ptr,
    vocabulary,
    inverse_temperature,
    ACC: tl.constexpr,
):
    z_target = target_logit(row_ptr, tl.load(targets_ptr + row), vocabulary, ACC)
    logp, entropy, mean = token_statistics(m, s, w, z_target, inverse_temperature, ACC)
    tl.store(logps_ptr + row, logp)
    tl.store(max_ptr + row, m)
    tl.store(sum_ptr + row, s)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)


@triton.jit
def _store_nothing(row, logps_ptr, entropy_ptr, max_ptr, sum_ptr, mean_ptr):
    tl.store(logps_ptr + row, 0.0)
    tl.store(max_ptr + row, 0.0)
    tl.store(sum_ptr + row, 0.0)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, 0.0)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, 0.0)


@triton.jit(do_not_specialize=_RUNTIME)
def _token_stats_kernel(
    logits_ptr,
    targets_ptr,
    reads_ptr,
    view_row_ptr,
    partial_ptr,
    logps_ptr,
    entropy_ptr,
    max_ptr,
    sum_ptr,
    mean_ptr,
    length: tl.int64,
    stride_b: tl.int64,
    stride_l: tl.int64,
    vocabulary: tl.int32,
    chunk: tl.int32,
    splits: tl.int32,
    scale: tl.float64,
    inverse_temperature: tl.float64,
    ALIGNMENT: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // splits).to(tl.int64)
    reads = True
    if reads_ptr is not None:
        reads = tl.load(reads_ptr + row) != 0
    if reads:
        place = row
        if view_row_ptr is not None:
            place = tl.load(view_row_ptr + row)
        row_ptr = row_pointer(logits_ptr, place, length, stride_b, stride_l, ALIGNMENT)
        columns = columns_of(program % splits, chunk, vocabulary, LANES * WIDTH, WIDTH, ALIGNMENT)
        m, s, w = row_statistics(
            row_ptr, columns, as_scalar(scale, ACC), ACC, LANES, WIDTH, ALIGNMENT
        )
        if SPLIT:
            at = partial_ptr + program.to(tl.int64) * 3
            tl.store(at, m)
            tl.store(at + 1, s)
            tl.store(at + 2, w)
        else:
            _store_statistics(
                row,
                m,
                s,
                w,
                row_ptr,
                targets_ptr,
                logps_ptr,
                entropy_ptr,
                max_ptr,
                sum_ptr,
                mean_ptr,
                vocabulary,
                inverse_temperature,
                ACC,
            )
    elif not SPLIT:
        _store_nothing(row, logps_ptr, entropy_ptr, max_ptr, sum_ptr, mean_ptr)


@triton.jit(do_not_specialize=_RUNTIME)
def _merge_token_stats_kernel(
    logits_ptr,
    targets_ptr,
    reads_ptr,
    view_row_ptr,
    partial_ptr,
    logps_ptr,
    entropy_ptr,
    max_ptr,
    sum_ptr,
    mean_ptr,
    length: tl.int64,
    stride_b: tl.int64,
    stride_l: tl.int64,
    vocabulary: tl.int32,
    splits: tl.int32,
    scale: tl.float64,
    inverse_temperature: tl.float64,
    ACC: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    reads = True
    if reads_ptr is not None:
        reads = tl.load(reads_ptr + row) != 0
    if reads:
        place = row
        if view_row_ptr is not None:
            place = tl.load(view_row_ptr + row)
        part = tl.arange(0, MAX_SPLITS)
        at = partial_ptr + (row * splits + part) * 3
        m = tl.load(at, part < splits, float("-inf"))
        s = tl.load(at + 1, part < splits, 0.0)
        w = tl.load(at + 2, part < splits, 0.0)
        m, s, w = merge_lanes(m, s, w, as_scalar(scale, ACC))
        _store_statistics(
            row,
            m,
            s,
            w,
            row_pointer(logits_ptr, place, length, stride_b, stride_l, 0),
            targets_ptr,
            logps_ptr,
            entropy_ptr,
            max_ptr,
            sum_ptr,
            mean_ptr,
            vocabulary,
            inverse_temperature,
            ACC,
        )
    else:
        _store_nothing(row, logps_ptr, entropy_ptr, max_ptr, sum_ptr, mean_ptr)


@triton.jit
def store_zeros(row_ptr, columns, TILE: tl.constexpr):
    first, last, whole = columns
    column = tl.arange(0, TILE)
    zeros = tl.zeros((TILE,), row_ptr.dtype.element_ty)
    for start in range(first, whole, TILE):
        tl.store(row_ptr + start + column, zeros)
    if whole < last:
        tl.store(row_ptr + whole + column, zeros, whole + column < last)


@triton.jit
def _store_gradient_tile(logits_row, gradient_row, column, inside, row):
    target, m, inverse_sum, mean, g_logp, g_entropy, scale = row
    # What is loaded outside of the row does not matter.
    x = exponent(tl.load(logits_row + column, inside).to(scale.dtype), m, scale)
    gradient = -(tl.exp2(x) * inverse_sum) * (g_logp + g_entropy * (x * LN2 - mean))
    gradient += tl.where(column == target, g_logp, 0.0)
    tl.store(gradient_row + column, rounded(gradient, gradient_row.dtype.element_ty), inside)


@triton.jit
def store_gradient(logits_row, gradient_row, columns, row, TILE: tl.constexpr):
    """g_logp T d logp / d logit + g_entropy T d H / d logit at the columns of a row.

    row: target, m, 1 / s, mean, g_logp, g_entropy, scale.
    """
    first, last, whole = columns
    column = tl.arange(0, TILE)
    for start in range(first, whole, TILE):
        _store_gradient_tile(logits_row, gradient_row, start + column, None, row)
    if whole < last:
        at = whole + column
        _store_gradient_tile(logits_row, gradient_row, at, at < last, row)


@triton.jit
def upstream(gradient_ptr, row, grad_loss_ptr, ACC: tl.constexpr):
    """The upstream gradient of a row, 0 where there is none, times that of the loss."""
    gradient = tl.full((), 0.0, ACC)
    if gradient_ptr is not None:
        gradient = tl.load(gradient_ptr + row).to(ACC)
        if grad_loss_ptr is not None:
            gradient = gradient * tl.load(grad_loss_ptr).to(ACC)
    return gradient


@triton.jit(
    do_not_specialize=(
        "gradient_ptr",
        "grad_logps_ptr",
        "grad_entropy_ptr",
        "grad_loss_ptr",
        "gradient_stride_b",
        "gradient_stride_l",
        *_RUNTIME,
    )
)
def _token_stats_backward_kernel(
    logits_ptr,
    gradient_ptr,
    targets_ptr,
    reads_ptr,
    view_row_ptr,
    grad_logps_ptr,
    grad_entropy_ptr,
    grad_loss_ptr,
    max_ptr,
    sum_ptr,
    mean_ptr,
    length: tl.int64,
    stride_b: tl.int64,
    stride_l: tl.int64,
    gradient_stride_b: tl.int64,
    gradient_stride_l: tl.int64,
    vocabulary: tl.int32,
    chunk: tl.int32,
    splits: tl.int32,
    scale: tl.float64,
    inverse_temperature: tl.float64,
    ALIGNMENT: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // splits).to(tl.int64)
    columns = columns_of(program % splits, chunk, vocabulary, TILE, WIDTH, ALIGNMENT)
    place = row
    if view_row_ptr is not None:
        place = tl.load(view_row_ptr + row)
    if place >= 0:
        gradient_row = row_pointer(
            gradient_ptr, place, length, gradient_stride_b, gradient_stride_l, ALIGNMENT
        )
        reads = True
        if reads_ptr is not None:
            reads = tl.load(reads_ptr + row) != 0
        g_logp = upstream(grad_logps_ptr, row, grad_loss_ptr, ACC)
        g_entropy = upstream(grad_entropy_ptr, row, grad_loss_ptr, ACC)
        if reads & ((g_logp != 0) | (g_entropy != 0)):
            mean = tl.full((), 0.0, ACC)
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + row)
            logits_row = row_pointer(logits_ptr, place, length, stride_b, stride_l, ALIGNMENT)
            row_values = (
                tl.load(targets_ptr + row),
                tl.load(max_ptr + row),
                1.0 / tl.load(sum_ptr + row),
                mean,
                g_logp * as_scalar(inverse_temperature, ACC),
                g_entropy * as_scalar(inverse_temperature, ACC),
                as_scalar(scale, ACC),
            )
            store_gradient(logits_row, gradient_row, columns, row_values, TILE)
        else:
            store_zeros(gradient_row, columns, TILE)


# Launchers


class StatisticsOutputs(NamedTuple):
    """Where the statistics of a view's rows go; None: not wanted."""

    logps: Tensor
    entropy: Tensor | None
    max: Tensor
    sum: Tensor
    mean: Tensor | None


def launch_statistics(
    logits: Tensor,
    targets: Tensor,
    reads: Tensor | None,
    view_row: Tensor | None,
    temperature: float,
    outputs: StatisticsOutputs,
) -> None:
    """Statistics of the rows of one view.

    Args:
        logits: (B, L, V) or (T, V). targets: (R,) contiguous.
        reads: (R,) uint8, the rows to read; None: all. Others get 0.
        view_row: (R,) int64, where row r lies in a compact view; None: at r.
        outputs: (R,) each, contiguous.
    """
    num_rows, vocabulary = targets.numel(), logits.shape[-1]
    if num_rows == 0 or logits.shape[0] == 0:
        for output in outputs:
            if output is not None:
                output.zero_()
        return
    view = rows.as_rows(logits)
    shape = rows.launch_shape("statistics", logits)
    split = rows.split_rows(num_rows, vocabulary, shape, logits.device)
    is_split = split.splits > 1
    partial = outputs.sum.new_empty(num_rows * split.splits * 3) if is_split else None
    common = {
        "logits_ptr": view.tensor,
        "targets_ptr": targets,
        "reads_ptr": reads,
        "view_row_ptr": view_row,
        "partial_ptr": partial,
        "logps_ptr": outputs.logps,
        "entropy_ptr": outputs.entropy,
        "max_ptr": outputs.max,
        "sum_ptr": outputs.sum,
        "mean_ptr": outputs.mean,
        "length": view.length,
        "stride_b": view.stride_b,
        "stride_l": view.stride_l,
        "vocabulary": vocabulary,
        "splits": split.splits,
        "ACC": rows.tl_accumulator(logits),
        **rows.run_args(temperature),
    }
    rows.launch(
        _token_stats_kernel,
        num_rows * split.splits,
        shape.num_warps,
        **common,
        chunk=split.chunk,
        ALIGNMENT=view.alignment,
        SPLIT=is_split,
        LANES=shape.lanes,
        WIDTH=shape.width,
    )
    if is_split:
        rows.launch(_merge_token_stats_kernel, num_rows, 1, **common, MAX_SPLITS=rows.MAX_SPLITS)


def launch_gradient(
    logits: Tensor,
    gradient: Tensor,
    targets: Tensor,
    reads: Tensor | None,
    view_row: Tensor | None,
    upstreams: tuple[Tensor | None, Tensor | None, Tensor | None],
    statistics: tuple[Tensor, Tensor, Tensor | None],
    temperature: float,
) -> None:
    """Writes the gradient of one view, which may be written over its logits.

    Args:
        logits: (B, L, V) or (T, V). gradient: like logits, last stride 1. targets: (R,).
        reads, view_row: as in `launch_statistics`; a row at -1 is not in the view.
        upstreams: of logps (R,), of the entropy (R,), and of the loss, 0-dim; None: 0, 0 and 1.
        statistics: max, sum and mean (R,); mean may be None without a gradient of the entropy.
    """
    num_rows, vocabulary = targets.numel(), logits.shape[-1]
    if num_rows == 0 or logits.shape[0] == 0:
        return
    view, target = rows.as_rows(logits), rows.as_rows(gradient)
    shape = rows.launch_shape("gradient", logits)
    split = rows.split_for_writing(vocabulary, shape)
    grad_logps, grad_entropy, grad_loss = upstreams
    maximum, total, mean = statistics
    rows.launch(
        _token_stats_backward_kernel,
        num_rows * split.splits,
        shape.num_warps,
        logits_ptr=view.tensor,
        gradient_ptr=target.tensor,
        targets_ptr=targets,
        reads_ptr=reads,
        view_row_ptr=view_row,
        grad_logps_ptr=grad_logps,
        grad_entropy_ptr=grad_entropy,
        grad_loss_ptr=grad_loss,
        max_ptr=maximum,
        sum_ptr=total,
        mean_ptr=mean,
        length=view.length,
        stride_b=view.stride_b,
        stride_l=view.stride_l,
        gradient_stride_b=target.stride_b,
        gradient_stride_l=target.stride_l,
        vocabulary=vocabulary,
        chunk=split.chunk,
        splits=split.splits,
        ALIGNMENT=min(view.alignment, target.alignment),
        ACC=rows.tl_accumulator(logits),
        TILE=shape.size,
        WIDTH=shape.width,
        **rows.run_args(temperature),
    )


def token_stats(
    logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, inplace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    def new(*size: int) -> Tensor:
        return logits.new_empty(size, dtype=rows.accumulator(logits))

    logps, entropy, saved = new(*targets.shape), new(*targets.shape), new(3, targets.numel())
    outputs = StatisticsOutputs(logps, entropy, saved[0], saved[1], saved[2])
    reads = rows.bytes_of(mask)
    launch_statistics(logits, targets.contiguous(), reads, None, temperature, outputs)
    return logps, entropy, saved


def _backward(
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    gradient: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    temperature: float,
) -> None:
    launch_gradient(
        logits,
        gradient,
        targets.contiguous(),
        rows.bytes_of(mask),
        None,
        (rows.contiguous(grad_logps), rows.contiguous(grad_entropy), None),
        (saved[0], saved[1], saved[2]),
        temperature,
    )


def token_stats_backward(
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    temperature: float,
) -> Tensor:
    gradient = rows.new_gradient(logits)
    _backward(grad_logps, grad_entropy, logits, gradient, targets, mask, saved, temperature)
    return gradient


def token_stats_backward_(
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    temperature: float,
) -> None:
    with rows.written_over(logits) as gradient:
        _backward(grad_logps, grad_entropy, logits, gradient, targets, mask, saved, temperature)
