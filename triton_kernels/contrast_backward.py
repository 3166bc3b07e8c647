"""The gradients of three views of a row from those of its contrast and of the anchor's statistics.

With D, x, s and pi as in `contrast`, for a row whose D has a gradient:

    dD/dz_a = pi_a (ln pi_n - ln pi_p - D),  dD/dz_p = pi_p - pi_a,  dD/dz_n = pi_a - pi_n

and on top of it the anchor's own gradient, that of `token_stats_backward`. Of any other row only
the anchor is read. `detach_anchor` leaves dD/dz_a out.
"""

from __future__ import annotations

import contextlib
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from cppo.fused.schema import ARGUMENTS
from cppo.triton_kernels.contrast import rows_of_views
from cppo.triton_kernels.launch import (
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
from cppo.triton_kernels.token_stats_backward import store_gradient, store_zeros


@triton.jit
def _store_gradients_at(column, inside, logits, gradients, stats, g, target, scale, inverse_t):
    a_ptr, p_ptr, n_ptr = logits
    da_ptr, dp_ptr, dn_ptr = gradients
    m_a, m_p, m_n, inverse_a, inverse_p, inverse_n, mean, offset = stats
    g_logp, g_entropy, g_margin, g_anchor = g
    a = tl.load(a_ptr + column, inside).to(scale.dtype)
    x = exponent(a, m_a, scale)
    pi_a = tl.exp2(x) * inverse_a
    above_p = tl.load(p_ptr + column, inside).to(scale.dtype) - m_p
    above_n = tl.load(n_ptr + column, inside).to(scale.dtype) - m_n
    pi_p = tl.exp2(above_p * scale) * inverse_p
    pi_n = tl.exp2(above_n * scale) * inverse_n
    # offset = ln s_n - ln s_p + D, so that this is pi_a (ln pi_n - ln pi_p - D).
    rise = tl.where(pi_a == 0.0, 0.0, (above_n - above_p) * inverse_t - offset)
    d_anchor = pi_a * (g_anchor * rise - (g_logp + g_entropy * (x * LN2 - mean)))
    d_anchor += tl.where(column == target, g_logp, 0.0)
    dtype: tl.constexpr = da_ptr.dtype.element_ty
    tl.store(da_ptr + column, rounded(d_anchor, dtype), inside)
    tl.store(dp_ptr + column, rounded(g_margin * (pi_p - pi_a), dtype), inside)
    tl.store(dn_ptr + column, rounded(g_margin * (pi_a - pi_n), dtype), inside)


@triton.jit
def _store_gradients(
    columns, logits, gradients, stats, g, target, scale, inverse_t, TILE: tl.constexpr
):
    first, last, whole = columns
    column = tl.arange(0, TILE)
    for start in range(first, whole, TILE):
        _store_gradients_at(
            start + column, None, logits, gradients, stats, g, target, scale, inverse_t
        )
    if whole < last:
        column = whole + column
        _store_gradients_at(
            column, column < last, logits, gradients, stats, g, target, scale, inverse_t
        )


@kernel
def _contrast_backward_kernel(
    anchor_ptr,
    positive_ptr,
    negative_ptr,
    d_anchor_ptr,
    d_positive_ptr,
    d_negative_ptr,
    targets_ptr,
    positive_places_ptr,
    negative_places_ptr,
    saved_ptr,
    contrasts_ptr,
    coefficients_ptr,
    num_rows: tl.int64,
    length: tl.int64,
    anchor_stride_b: tl.int64,
    anchor_stride_l: tl.int64,
    positive_stride_b: tl.int64,
    positive_stride_l: tl.int64,
    negative_stride_b: tl.int64,
    negative_stride_l: tl.int64,
    d_anchor_stride_b: tl.int64,
    d_anchor_stride_l: tl.int64,
    d_positive_stride_b: tl.int64,
    d_positive_stride_l: tl.int64,
    d_negative_stride_b: tl.int64,
    d_negative_stride_l: tl.int64,
    vocabulary: tl.int32,
    chunk: tl.int32,
    splits: tl.int32,
    scale: tl.float64,
    inverse_temperature: tl.float64,
    DETACH_ANCHOR: tl.constexpr,
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
    p_row = place_of(positive_places_ptr, row)
    n_row = place_of(negative_places_ptr, row)
    a_ptr = row_pointer(anchor_ptr, row, length, anchor_stride_b, anchor_stride_l, ALIGNMENT)
    da_ptr = row_pointer(d_anchor_ptr, row, length, d_anchor_stride_b, d_anchor_stride_l, ALIGNMENT)
    dp_ptr = row_pointer(
        d_positive_ptr, p_row, length, d_positive_stride_b, d_positive_stride_l, ALIGNMENT
    )
    dn_ptr = row_pointer(
        d_negative_ptr, n_row, length, d_negative_stride_b, d_negative_stride_l, ALIGNMENT
    )
    # Per logit, not per scaled logit.
    inverse_t = as_scalar(inverse_temperature, ACC)
    g_logp = tl.load(coefficients_ptr + row) * inverse_t
    g_entropy = tl.load(coefficients_ptr + num_rows + row) * inverse_t
    g_margin = tl.load(coefficients_ptr + 2 * num_rows + row) * inverse_t
    target = tl.load(targets_ptr + row)
    scale_acc = as_scalar(scale, ACC)
    m_a = tl.load(saved_ptr + row)
    s_a = tl.load(saved_ptr + num_rows + row)
    mean = tl.load(saved_ptr + 2 * num_rows + row)
    if g_margin != 0:
        m_p = tl.load(contrasts_ptr + row)
        s_p = tl.load(contrasts_ptr + num_rows + row)
        m_n = tl.load(contrasts_ptr + 2 * num_rows + row)
        s_n = tl.load(contrasts_ptr + 3 * num_rows + row)
        offset = tl.log(s_n) - tl.log(s_p) + tl.load(contrasts_ptr + 4 * num_rows + row)
        p_ptr = row_pointer(
            positive_ptr, p_row, length, positive_stride_b, positive_stride_l, ALIGNMENT
        )
        n_ptr = row_pointer(
            negative_ptr, n_row, length, negative_stride_b, negative_stride_l, ALIGNMENT
        )
        g_anchor = g_margin
        if DETACH_ANCHOR:
            g_anchor = tl.zeros_like(g_margin)
        _store_gradients(
            columns,
            (a_ptr, p_ptr, n_ptr),
            (da_ptr, dp_ptr, dn_ptr),
            (m_a, m_p, m_n, 1.0 / s_a, 1.0 / s_p, 1.0 / s_n, mean, offset),
            (g_logp, g_entropy, g_margin, g_anchor),
            target,
            scale_acc,
            inverse_t,
            TILE,
        )
    else:
        if (g_logp != 0) | (g_entropy != 0):
            row_values = (target, m_a, 1.0 / s_a, mean, g_logp, g_entropy, scale_acc)
            store_gradient(a_ptr, da_ptr, columns, row_values, TILE)
        else:
            store_zeros(da_ptr, columns, TILE)
        # A new gradient with places is zero from the start.
        if INPLACE or positive_places_ptr is None:
            if p_row >= 0:
                store_zeros(dp_ptr, columns, TILE)
        if INPLACE or negative_places_ptr is None:
            if n_row >= 0:
                store_zeros(dn_ptr, columns, TILE)


def _launch(given: Any, gradients: tuple[Tensor, ...], inplace: bool) -> None:
    """given: the `ARGUMENTS`."""
    if given.targets.numel() == 0:
        return
    views = {name: getattr(given, name) for name in ("anchor", "positive", "negative")}
    written = dict(zip(("d_anchor", "d_positive", "d_negative"), gradients, strict=True))
    launch_gradient(
        _contrast_backward_kernel,
        "contrast_backward",
        rows_of_views(views | written),
        given.targets.numel(),
        given.temperature,
        targets_ptr=given.targets.contiguous(),
        positive_places_ptr=contiguous(given.positive_places),
        negative_places_ptr=contiguous(given.negative_places),
        saved_ptr=given.saved,
        contrasts_ptr=given.contrasts,
        coefficients_ptr=given.coefficients.contiguous(),
        DETACH_ANCHOR=given.detach_anchor,
        INPLACE=inplace,
    )


def contrast_backward(*arguments: Any) -> tuple[Tensor, ...]:
    given = ARGUMENTS["contrast_backward"](*arguments)
    gradients = (
        new_gradient(given.anchor),
        new_gradient(given.positive, given.positive_places),
        new_gradient(given.negative, given.negative_places),
    )
    _launch(given, gradients, inplace=False)
    return gradients


def contrast_backward_(*arguments: Any) -> None:
    given = ARGUMENTS["contrast_backward_"](*arguments)
    with contextlib.ExitStack() as stack:
        views = (given.anchor, given.positive, given.negative)
        gradients = tuple(stack.enter_context(written_over(view)) for view in views)
        _launch(given, gradients, inplace=True)
