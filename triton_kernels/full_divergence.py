"""The vocabulary-wide divergence: three views in one pass, and its gradient for all three.

Specification: `cppo.reference.contrastive_loss` with divergence="full". With x_v = z_v - max z,
s = sum_v e^x_v and pi = e^x / s of the anchor a, the positive p and the negative n, the anchor's
log-probabilities cancel in the difference of the two divergences:

    D = KL(a || p) - KL(a || n) = E_a[x_n - x_p] + ln s_p - ln s_n
    dD/dz_a = pi_a (ln pi_n - ln pi_p - D),  dD/dz_p = pi_p - pi_a,  dD/dz_n = pi_a - pi_n

The expectation is accumulated like the entropy, relative to the maxima of all three views so far:
when they move, sum_v e^x_a (x_n - x_p) moves by the anchor's sum times the drift of the difference.
It is a sum of logits, which the temperature divides at the end: scaled to powers of two first, a
logit of finfo.min in one view alone would be -inf.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cppo.triton_kernels import rows
from cppo.triton_kernels.rows import (
    LN2,
    LOWEST,
    as_scalar,
    columns_of,
    exponent,
    merge_lanes,
    or_zero,
    rounded,
    row_pointer,
    row_statistics,
    target_logit,
    tile_columns,
    token_statistics,
)
from cppo.triton_kernels.token_stats import store_gradient, store_zeros, upstream


@triton.jit
def _fold(anchor, positive, negative, d, tile_a, tile_p, tile_n, scale):
    """The summaries (m, s, w) of each lane, and d, with a tile of each view added."""
    m_a, s_a, w_a = anchor
    m_p, s_p, w_p = positive
    m_n, s_n, w_n = negative
    new_a = tl.maximum(m_a, tl.max(tile_a, 1))
    new_p = tl.maximum(m_p, tl.max(tile_p, 1))
    new_n = tl.maximum(m_n, tl.max(tile_n, 1))
    base_a, base_p, base_n = or_zero(new_a), or_zero(new_p), or_zero(new_n)
    drift = (or_zero(m_n) - base_n) - (or_zero(m_p) - base_p)

    shift = exponent(m_a, base_a, scale)
    decay = tl.exp2(shift)
    x = exponent(tile_a, base_a[:, None], scale)
    e = tl.exp2(x)
    above_p = tile_p - base_p[:, None]
    above_n = tile_n - base_n[:, None]
    # Where the anchor excludes a token, the other views may too: inf - inf counts nothing.
    rise = tl.where(e == 0.0, 0.0, e * (above_n - above_p))
    d = decay * (d + drift * s_a) + tl.sum(rise, 1)
    w_a = decay * (w_a + shift * s_a) + tl.sum(e * x, 1)
    s_a = decay * s_a + tl.sum(e, 1)

    decay = tl.exp2(exponent(m_p, base_p, scale))
    x_p = tl.maximum(above_p * scale, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    s_p = decay * s_p + tl.sum(tl.exp2(x_p), 1)

    shift = exponent(m_n, base_n, scale)
    decay = tl.exp2(shift)
    x_n = tl.maximum(above_n * scale, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(x_n)
    w_n = decay * (w_n + shift * s_n) + tl.sum(e * x_n, 1)
    s_n = decay * s_n + tl.sum(e, 1)
    return (new_a, s_a, w_a), (new_p, s_p, w_p), (new_n, s_n, w_n), d


@triton.jit
def _merge(anchor, positive, negative, d, scale):
    """One summary of all lanes of each view, and d."""
    m_a, s_a, w_a = anchor
    m_p, s_p, w_p = positive
    m_n, s_n, w_n = negative
    base_p, base_n = or_zero(tl.max(m_p, 0)), or_zero(tl.max(m_n, 0))
    drift = (or_zero(m_n) - base_n) - (or_zero(m_p) - base_p)
    decay = tl.exp2(exponent(m_a, or_zero(tl.max(m_a, 0)), scale))
    d = tl.sum(decay * (d + drift * s_a), 0)
    return (
        merge_lanes(m_a, s_a, w_a, scale),
        merge_lanes(m_p, s_p, w_p, scale),
        merge_lanes(m_n, s_n, w_n, scale),
        d,
    )


@triton.jit
def _load(row_ptr, column, inside, ACC: tl.constexpr):
    if inside is None:
        return tl.load(row_ptr + column).to(ACC)
    else:
        return tl.load(row_ptr + column, inside, float("-inf")).to(ACC)


@triton.jit
def _fold_tile(summaries, rows_ptr, column, inside, scale):
    anchor, positive, negative, d = summaries
    a_ptr, p_ptr, n_ptr = rows_ptr
    return _fold(
        anchor,
        positive,
        negative,
        d,
        _load(a_ptr, column, inside, scale.dtype),
        _load(p_ptr, column, inside, scale.dtype),
        _load(n_ptr, column, inside, scale.dtype),
        scale,
    )


@triton.jit
def _three_row_statistics(
    rows_ptr,
    columns,
    scale,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Summaries of the columns of three rows, and d; as `row_statistics`."""
    first, last, whole = columns
    column = tile_columns(LANES, WIDTH, ALIGNMENT)
    m = tl.full((LANES,), float("-inf"), ACC)
    zeros = tl.zeros((LANES,), ACC)
    summaries = ((m, zeros, zeros), (m, zeros, zeros), (m, zeros, zeros), zeros)
    for start in range(first, whole, LANES * WIDTH):
        summaries = _fold_tile(summaries, rows_ptr, start + column, None, scale)
    if whole < last:
        column = whole + column
        summaries = _fold_tile(summaries, rows_ptr, column, column < last, scale)
    anchor, positive, negative, d = summaries
    return _merge(anchor, positive, negative, d, scale)


@triton.jit
def _store_row(
    row, a_ptr, anchor, positive, negative, d, targets_ptr, outputs, vocabulary, inverse_temperature
):
    """The statistics of the anchor, and of the other views unless `positive` is None."""
    logps_ptr, entropy_ptr, negative_entropy_ptr, saved_ptr, num_rows = outputs
    m_a, s_a, w_a = anchor
    z_target = target_logit(a_ptr, tl.load(targets_ptr + row), vocabulary, s_a.dtype)
    logp, entropy, mean = token_statistics(m_a, s_a, w_a, z_target, inverse_temperature, s_a.dtype)
    tl.store(logps_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    tl.store(saved_ptr + row, m_a)
    tl.store(saved_ptr + num_rows + row, s_a)
    tl.store(saved_ptr + 2 * num_rows + row, mean)
    if positive is not None:
        m_p, s_p, _ = positive
        m_n, s_n, w_n = negative
        log_p, log_n = tl.log(s_p), tl.log(s_n)
        tl.store(negative_entropy_ptr + row, log_n - w_n / s_n * LN2)
        tl.store(saved_ptr + 3 * num_rows + row, m_p)
        tl.store(saved_ptr + 4 * num_rows + row, s_p)
        tl.store(saved_ptr + 5 * num_rows + row, m_n)
        tl.store(saved_ptr + 6 * num_rows + row, s_n)
        rise = d / s_a * as_scalar(inverse_temperature, s_a.dtype)
        tl.store(saved_ptr + 7 * num_rows + row, rise + log_p - log_n)


_RUNTIME = (
    "anchor_ptr",
    "positive_ptr",
    "negative_ptr",
    "targets_ptr",
    "mask_ptr",
    "looks_ptr",
    "view_row_ptr",
    "partial_ptr",
    "logps_ptr",
    "entropy_ptr",
    "negative_entropy_ptr",
    "saved_ptr",
    "num_rows",
    "positive_is_compact",
    "negative_is_compact",
    "length",
    "anchor_stride_b",
    "anchor_stride_l",
    "positive_stride_b",
    "positive_stride_l",
    "negative_stride_b",
    "negative_stride_l",
    "vocabulary",
    "chunk",
    "splits",
)


@triton.jit(do_not_specialize=_RUNTIME)
def _full_statistics_kernel(
    anchor_ptr,
    positive_ptr,
    negative_ptr,
    targets_ptr,
    mask_ptr,
    looks_ptr,
    view_row_ptr,
    partial_ptr,
    logps_ptr,
    entropy_ptr,
    negative_entropy_ptr,
    saved_ptr,
    num_rows: tl.int64,
    positive_is_compact: tl.int32,
    negative_is_compact: tl.int32,
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
    ALIGNMENT: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // splits).to(tl.int64)
    columns = columns_of(program % splits, chunk, vocabulary, LANES * WIDTH, WIDTH, ALIGNMENT)
    outputs = (logps_ptr, entropy_ptr, negative_entropy_ptr, saved_ptr, num_rows)
    reads = True
    if mask_ptr is not None:
        reads = tl.load(mask_ptr + row) != 0
    looks = tl.load(looks_ptr + row) != 0
    a_ptr = row_pointer(anchor_ptr, row, length, anchor_stride_b, anchor_stride_l, ALIGNMENT)
    if looks:
        place = tl.load(view_row_ptr + row)
        p_row = tl.where(positive_is_compact != 0, place, row)
        n_row = tl.where(negative_is_compact != 0, place, row)
        rows_ptr = (
            a_ptr,
            row_pointer(
                positive_ptr, p_row, length, positive_stride_b, positive_stride_l, ALIGNMENT
            ),
            row_pointer(
                negative_ptr, n_row, length, negative_stride_b, negative_stride_l, ALIGNMENT
            ),
        )
        anchor, positive, negative, d = _three_row_statistics(
            rows_ptr, columns, as_scalar(scale, ACC), ACC, LANES, WIDTH, ALIGNMENT
        )
        if SPLIT:
            at = partial_ptr + program.to(tl.int64) * 10
            tl.store(at + 9, d)
            for i in tl.static_range(3):
                tl.store(at + i, anchor[i])
                tl.store(at + 3 + i, positive[i])
                tl.store(at + 6 + i, negative[i])
        else:
            _store_row(
                row,
                a_ptr,
                anchor,
                positive,
                negative,
                d,
                targets_ptr,
                outputs,
                vocabulary,
                inverse_temperature,
            )
    elif reads:
        alone = row_statistics(a_ptr, columns, as_scalar(scale, ACC), ACC, LANES, WIDTH, ALIGNMENT)
        if SPLIT:
            at = partial_ptr + program.to(tl.int64) * 10
            for i in tl.static_range(3):
                tl.store(at + i, alone[i])
        else:
            _store_row(
                row,
                a_ptr,
                alone,
                None,
                None,
                None,
                targets_ptr,
                outputs,
                vocabulary,
                inverse_temperature,
            )
    elif not SPLIT:
        tl.store(logps_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)


@triton.jit
def _load_parts(partial_ptr, row, splits, which, MAX_SPLITS: tl.constexpr):
    part = tl.arange(0, MAX_SPLITS)
    at = partial_ptr + (row * splits + part) * 10 + which * 3
    return (
        tl.load(at, part < splits, float("-inf")),
        tl.load(at + 1, part < splits, 0.0),
        tl.load(at + 2, part < splits, 0.0),
    )


@triton.jit(do_not_specialize=_RUNTIME)
def _merge_full_statistics_kernel(
    anchor_ptr,
    targets_ptr,
    mask_ptr,
    looks_ptr,
    partial_ptr,
    logps_ptr,
    entropy_ptr,
    negative_entropy_ptr,
    saved_ptr,
    num_rows: tl.int64,
    length: tl.int64,
    anchor_stride_b: tl.int64,
    anchor_stride_l: tl.int64,
    vocabulary: tl.int32,
    splits: tl.int32,
    scale: tl.float64,
    inverse_temperature: tl.float64,
    ACC: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    outputs = (logps_ptr, entropy_ptr, negative_entropy_ptr, saved_ptr, num_rows)
    reads = True
    if mask_ptr is not None:
        reads = tl.load(mask_ptr + row) != 0
    a_ptr = row_pointer(anchor_ptr, row, length, anchor_stride_b, anchor_stride_l, 0)
    anchor = _load_parts(partial_ptr, row, splits, 0, MAX_SPLITS)
    if tl.load(looks_ptr + row) != 0:
        part = tl.arange(0, MAX_SPLITS)
        d = tl.load(partial_ptr + (row * splits + part) * 10 + 9, part < splits, 0.0)
        merged, positive, negative, d = _merge(
            anchor,
            _load_parts(partial_ptr, row, splits, 1, MAX_SPLITS),
            _load_parts(partial_ptr, row, splits, 2, MAX_SPLITS),
            d,
            as_scalar(scale, ACC),
        )
        _store_row(
            row,
            a_ptr,
            merged,
            positive,
            negative,
            d,
            targets_ptr,
            outputs,
            vocabulary,
            inverse_temperature,
        )
    elif reads:
        m, s, w = anchor
        _store_row(
            row,
            a_ptr,
            merge_lanes(m, s, w, as_scalar(scale, ACC)),
            None,
            None,
            None,
            targets_ptr,
            outputs,
            vocabulary,
            inverse_temperature,
        )
    else:
        tl.store(logps_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)


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


@triton.jit(
    do_not_specialize=(
        "grad_loss_ptr",
        "anchor_gradient_ptr",
        "positive_gradient_ptr",
        "negative_gradient_ptr",
        "coefficients_ptr",
        *(
            f"{view}_gradient_stride_{axis}"
            for view in ("anchor", "positive", "negative")
            for axis in "bl"
        ),
        *_RUNTIME,
    )
)
def _full_backward_kernel(
    grad_loss_ptr,
    anchor_ptr,
    positive_ptr,
    negative_ptr,
    anchor_gradient_ptr,
    positive_gradient_ptr,
    negative_gradient_ptr,
    targets_ptr,
    view_row_ptr,
    saved_ptr,
    coefficients_ptr,
    num_rows: tl.int64,
    positive_is_compact: tl.int32,
    negative_is_compact: tl.int32,
    length: tl.int64,
    anchor_stride_b: tl.int64,
    anchor_stride_l: tl.int64,
    positive_stride_b: tl.int64,
    positive_stride_l: tl.int64,
    negative_stride_b: tl.int64,
    negative_stride_l: tl.int64,
    anchor_gradient_stride_b: tl.int64,
    anchor_gradient_stride_l: tl.int64,
    positive_gradient_stride_b: tl.int64,
    positive_gradient_stride_l: tl.int64,
    negative_gradient_stride_b: tl.int64,
    negative_gradient_stride_l: tl.int64,
    vocabulary: tl.int32,
    chunk: tl.int32,
    splits: tl.int32,
    scale: tl.float64,
    inverse_temperature: tl.float64,
    DETACH_ANCHOR: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // splits).to(tl.int64)
    columns = columns_of(program % splits, chunk, vocabulary, TILE, WIDTH, ALIGNMENT)
    place = tl.load(view_row_ptr + row)
    p_row = tl.where(positive_is_compact != 0, place, row)
    n_row = tl.where(negative_is_compact != 0, place, row)
    a_ptr = row_pointer(anchor_ptr, row, length, anchor_stride_b, anchor_stride_l, ALIGNMENT)
    da_ptr = row_pointer(
        anchor_gradient_ptr,
        row,
        length,
        anchor_gradient_stride_b,
        anchor_gradient_stride_l,
        ALIGNMENT,
    )
    dp_ptr = row_pointer(
        positive_gradient_ptr,
        p_row,
        length,
        positive_gradient_stride_b,
        positive_gradient_stride_l,
        ALIGNMENT,
    )
    dn_ptr = row_pointer(
        negative_gradient_ptr,
        n_row,
        length,
        negative_gradient_stride_b,
        negative_gradient_stride_l,
        ALIGNMENT,
    )
    g_logp = upstream(coefficients_ptr, row, grad_loss_ptr, ACC)
    g_entropy = upstream(coefficients_ptr + num_rows, row, grad_loss_ptr, ACC)
    g_margin = upstream(coefficients_ptr + 2 * num_rows, row, grad_loss_ptr, ACC)
    # Per logit, not per scaled logit.
    inverse_t = as_scalar(inverse_temperature, ACC)
    g_logp *= inverse_t
    g_entropy *= inverse_t
    g_margin *= inverse_t
    target = tl.load(targets_ptr + row)
    scale_acc = as_scalar(scale, ACC)
    m_a = tl.load(saved_ptr + row)
    s_a = tl.load(saved_ptr + num_rows + row)
    mean = tl.load(saved_ptr + 2 * num_rows + row)
    if g_margin != 0:
        m_p = tl.load(saved_ptr + 3 * num_rows + row)
        s_p = tl.load(saved_ptr + 4 * num_rows + row)
        m_n = tl.load(saved_ptr + 5 * num_rows + row)
        s_n = tl.load(saved_ptr + 6 * num_rows + row)
        offset = tl.log(s_n) - tl.log(s_p) + tl.load(saved_ptr + 7 * num_rows + row)
        logits = (
            a_ptr,
            row_pointer(
                positive_ptr, p_row, length, positive_stride_b, positive_stride_l, ALIGNMENT
            ),
            row_pointer(
                negative_ptr, n_row, length, negative_stride_b, negative_stride_l, ALIGNMENT
            ),
        )
        gradients = (da_ptr, dp_ptr, dn_ptr)
        stats = (m_a, m_p, m_n, 1.0 / s_a, 1.0 / s_p, 1.0 / s_n, mean, offset)
        g_anchor = g_margin
        if DETACH_ANCHOR:
            g_anchor = tl.zeros_like(g_margin)
        g = (g_logp, g_entropy, g_margin, g_anchor)
        first, last, whole = columns
        column = tl.arange(0, TILE)
        for start in range(first, whole, TILE):
            _store_gradients_at(
                start + column, None, logits, gradients, stats, g, target, scale_acc, inverse_t
            )
        if whole < last:
            column = whole + column
            _store_gradients_at(
                column, column < last, logits, gradients, stats, g, target, scale_acc, inverse_t
            )
    else:
        if (g_logp != 0) | (g_entropy != 0):
            row_values = (target, m_a, 1.0 / s_a, mean, g_logp, g_entropy, scale_acc)
            store_gradient(a_ptr, da_ptr, columns, row_values, TILE)
        else:
            store_zeros(da_ptr, columns, TILE)
        if p_row >= 0:
            store_zeros(dp_ptr, columns, TILE)
        if n_row >= 0:
            store_zeros(dn_ptr, columns, TILE)


# Launchers


def _view_args(name: str, view: rows.Rows) -> dict[str, object]:
    return {
        f"{name}_ptr": view.tensor,
        f"{name}_stride_b": view.stride_b,
        f"{name}_stride_l": view.stride_l,
    }


def _nonempty(view: Tensor, anchor: Tensor) -> Tensor:
    """A view without rows is never read, but a null pointer has no alignment to speak of."""
    return view if view.shape[0] else anchor


def launch_full_statistics(
    views: tuple[Tensor, Tensor, Tensor],
    targets: Tensor,
    mask: Tensor | None,
    looks: Tensor,
    view_row: Tensor,
    temperature: float,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Statistics of the anchor's rows, and of all views where `looks`.

    Args:
        views: anchor, positive and negative, whole or compact.
        targets, mask, looks, view_row: (R,); mask None: all.
        outputs: logps, entropy, the negative's entropy (R,) and saved (8, R).
    """
    num_rows, vocabulary = targets.numel(), views[0].shape[-1]
    if num_rows == 0:
        return
    anchor, positive, negative = (rows.as_rows(_nonempty(view, views[0])) for view in views)
    shape = rows.launch_shape("margin", views[0])
    split = rows.split_rows(num_rows, vocabulary, shape, targets.device)
    is_split = split.splits > 1
    saved = outputs[3]
    common = {
        **_view_args("anchor", anchor),
        "targets_ptr": targets,
        "mask_ptr": mask,
        "looks_ptr": looks,
        "partial_ptr": saved.new_empty(num_rows * split.splits * 10) if is_split else None,
        "logps_ptr": outputs[0],
        "entropy_ptr": outputs[1],
        "negative_entropy_ptr": outputs[2],
        "saved_ptr": saved,
        "num_rows": num_rows,
        "length": anchor.length,
        "vocabulary": vocabulary,
        "splits": split.splits,
        "ACC": rows.tl_accumulator(views[0]),
        **rows.run_args(temperature),
    }
    rows.launch(
        _full_statistics_kernel,
        num_rows * split.splits,
        shape.num_warps,
        **common,
        **_view_args("positive", positive),
        **_view_args("negative", negative),
        view_row_ptr=view_row,
        positive_is_compact=int(views[1].shape[0] != views[0].shape[0]),
        negative_is_compact=int(views[2].shape[0] != views[0].shape[0]),
        chunk=split.chunk,
        ALIGNMENT=min(view.alignment for view in (anchor, positive, negative)),
        SPLIT=is_split,
        LANES=shape.lanes,
        WIDTH=shape.width,
    )
    if is_split:
        rows.launch(
            _merge_full_statistics_kernel, num_rows, 1, **common, MAX_SPLITS=rows.MAX_SPLITS
        )


def launch_full_gradient(
    grad_loss: Tensor,
    views: tuple[Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
    targets: Tensor,
    view_row: Tensor,
    saved: Tensor,
    coefficients: Tensor,
    temperature: float,
    detach_anchor: bool,
) -> None:
    """Writes the gradients of the three views, which may be written over their logits."""
    num_rows, vocabulary = targets.numel(), views[0].shape[-1]
    if num_rows == 0:
        return
    anchor, positive, negative = (rows.as_rows(_nonempty(view, views[0])) for view in views)
    targets_of = [rows.as_rows(_nonempty(g, gradients[0])) for g in gradients]
    shape = rows.launch_shape("margin_gradient", views[0])
    split = rows.split_for_writing(vocabulary, shape)
    rows.launch(
        _full_backward_kernel,
        num_rows * split.splits,
        shape.num_warps,
        grad_loss_ptr=grad_loss,
        **_view_args("anchor", anchor),
        **_view_args("positive", positive),
        **_view_args("negative", negative),
        **_view_args("anchor_gradient", targets_of[0]),
        **_view_args("positive_gradient", targets_of[1]),
        **_view_args("negative_gradient", targets_of[2]),
        targets_ptr=targets,
        view_row_ptr=view_row,
        saved_ptr=saved,
        coefficients_ptr=coefficients,
        num_rows=num_rows,
        positive_is_compact=int(views[1].shape[0] != views[0].shape[0]),
        negative_is_compact=int(views[2].shape[0] != views[0].shape[0]),
        length=anchor.length,
        vocabulary=vocabulary,
        chunk=split.chunk,
        splits=split.splits,
        DETACH_ANCHOR=detach_anchor,
        ALIGNMENT=min(view.alignment for view in (anchor, positive, negative, *targets_of)),
        ACC=rows.tl_accumulator(views[0]),
        TILE=shape.size,
        WIDTH=shape.width,
        **rows.run_args(temperature),
    )
