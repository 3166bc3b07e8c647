"""The gradient of rows of logits from the gradients of their log-probability and entropy.

With x_v, s, mean and the target y as in `token_stats`, and pi_v = e^x_v / s:

    d logp / d logit_v = (1[v = y] - pi_v) / T,  d H / d logit_v = -pi_v (x_v - mean) / T

One read and one write of a row, both upstream gradients summed in registers. Where both are zero,
zeros are written and nothing is read.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from cppo.fused.schema import ARGUMENTS
from cppo.triton_kernels.launch import (
    as_rows,
    bytes_of,
    contiguous,
    kernel,
    launch_gradient,
    new_gradient,
    written_over,
)
from cppo.triton_kernels.rows import (
    LN2,
    as_scalar,
    columns_of,
    exponent,
    place_of,
    rounded,
    row_pointer,
)


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
def _upstream(gradient_ptr, row, ACC: tl.constexpr):
    """The upstream gradient of a row, 0 where there is none."""
    if gradient_ptr is not None:
        return tl.load(gradient_ptr + row).to(ACC)
    else:
        return tl.full((), 0.0, ACC)


@kernel
def _token_stats_backward_kernel(
    logits_ptr,
    gradient_ptr,
    targets_ptr,
    mask_ptr,
    places_ptr,
    grad_logps_ptr,
    grad_entropy_ptr,
    saved_ptr,
    num_rows: tl.int64,
    length: tl.int64,
    logits_stride_b: tl.int64,
    logits_stride_l: tl.int64,
    gradient_stride_b: tl.int64,
    gradient_stride_l: tl.int64,
    vocabulary: tl.int32,
    chunk: tl.int32,
    splits: tl.int32,
    scale: tl.float64,
    inverse_temperature: tl.float64,
    INPLACE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    TILE: tl.constexpr = LANES * WIDTH
    program = tl.program_id(0)
    row = (program // splits).to(tl.int64)
    columns = columns_of(program % splits, chunk, vocabulary, TILE, WIDTH, ALIGNMENT)
    place = place_of(places_ptr, row)
    if place >= 0:
        gradient_row = row_pointer(
            gradient_ptr, place, length, gradient_stride_b, gradient_stride_l, ALIGNMENT
        )
        reads = True
        if mask_ptr is not None:
            reads = tl.load(mask_ptr + row) != 0
        g_logp = _upstream(grad_logps_ptr, row, ACC)
        g_entropy = _upstream(grad_entropy_ptr, row, ACC)
        if reads & ((g_logp != 0) | (g_entropy != 0)):
            logits_row = row_pointer(
                logits_ptr, place, length, logits_stride_b, logits_stride_l, ALIGNMENT
            )
            row_values = (
                tl.load(targets_ptr + row),
                tl.load(saved_ptr + row),
                1.0 / tl.load(saved_ptr + num_rows + row),
                tl.load(saved_ptr + 2 * num_rows + row),
                g_logp * as_scalar(inverse_temperature, ACC),
                g_entropy * as_scalar(inverse_temperature, ACC),
                as_scalar(scale, ACC),
            )
            store_gradient(logits_row, gradient_row, columns, row_values, TILE)
        elif INPLACE or places_ptr is None:  # else it is zero from the start
            store_zeros(gradient_row, columns, TILE)


def _launch(given: Any, gradient: Tensor, inplace: bool) -> None:
    """given: the `ARGUMENTS`."""
    if given.targets.numel() == 0 or given.logits.shape[0] == 0:
        return
    launch_gradient(
        _token_stats_backward_kernel,
        "token_stats_backward",
        {"logits": as_rows(given.logits), "gradient": as_rows(gradient)},
        given.targets.numel(),
        given.temperature,
        targets_ptr=given.targets.contiguous(),
        mask_ptr=bytes_of(given.mask),
        places_ptr=contiguous(given.places),
        grad_logps_ptr=contiguous(given.grad_logps),
        grad_entropy_ptr=contiguous(given.grad_entropy),
        saved_ptr=given.saved,
        INPLACE=inplace,
    )


def token_stats_backward(*arguments: Any) -> Tensor:
    given = ARGUMENTS["token_stats_backward"](*arguments)
    gradient = new_gradient(given.logits, given.places)
    _launch(given, gradient, inplace=False)
    return gradient


def token_stats_backward_(*arguments: Any) -> None:
    given = ARGUMENTS["token_stats_backward_"](*arguments)
    with written_over(given.logits) as gradient:
        _launch(given, gradient, inplace=True)
