"""Log-probability of the target and entropy of every row of logits.

Specification: `cppo.reference.token_stats`. With m = max_v logit_v, x_v = (logit_v - m) / T,
s = sum_v e^x_v and mean = sum_v e^x_v x_v / s:

    logp = x_y - ln s,  H = ln s - mean

One read of each row that counts; m, s and mean are kept for the backward.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cppo.fused.schema import SAVED
from cppo.triton_kernels.launch import (
    accumulator,
    as_rows,
    bytes_of,
    contiguous,
    kernel,
    launch_statistics,
)
from cppo.triton_kernels.rows import (
    LN2,
    as_scalar,
    columns_of,
    merge_lanes,
    place_of,
    row_pointer,
    row_statistics,
)

# m, s and the sum whose quotient with s is the mean.
NUM_SUMS = tl.constexpr(3)


@triton.jit
def _merge_parts(partial_ptr, row, splits, scale, LANES: tl.constexpr):
    part = tl.arange(0, LANES)
    at = partial_ptr + (row * splits + part) * NUM_SUMS
    m = tl.load(at, part < splits, float("-inf"))
    s = tl.load(at + 1, part < splits, 0.0)
    w = tl.load(at + 2, part < splits, 0.0)
    return merge_lanes(m, s, w, scale)


@triton.jit
def _store(row, outputs, num_rows, logp, entropy, m, s, mean):
    logps_ptr, entropy_ptr, saved_ptr = outputs
    tl.store(logps_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    tl.store(saved_ptr + row, m)
    tl.store(saved_ptr + num_rows + row, s)
    tl.store(saved_ptr + 2 * num_rows + row, mean)


@triton.jit
def _store_statistics(
    row, outputs, num_rows, m, s, w, row_ptr, target, vocabulary, inverse_temperature
):
    """What a row's summary says; NaN where its target lies outside of the vocabulary.

    Without a finite logit all is NaN: m = -inf.
    """
    inside = (target >= 0) & (target < vocabulary)
    z_target = tl.load(row_ptr + target, inside, float("nan")).to(s.dtype)
    mean = w / s * LN2
    log_sum = tl.log(s)
    # In fp64, once per row: x of the target may be large and 1 / temperature is rounded.
    x_target = ((z_target - m).to(tl.float64) * inverse_temperature).to(s.dtype)
    _store(row, outputs, num_rows, x_target - log_sum, log_sum - mean, m, s, mean)


@kernel
def _token_stats_kernel(
    logits_ptr,
    targets_ptr,
    mask_ptr,
    places_ptr,
    partial_ptr,
    logps_ptr,
    entropy_ptr,
    saved_ptr,
    num_rows: tl.int64,
    length: tl.int64,
    logits_stride_b: tl.int64,
    logits_stride_l: tl.int64,
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
    outputs = (logps_ptr, entropy_ptr, saved_ptr)
    reads = True
    if mask_ptr is not None:
        reads = tl.load(mask_ptr + row) != 0
    if reads:
        place = place_of(places_ptr, row)
        row_ptr = row_pointer(
            logits_ptr, place, length, logits_stride_b, logits_stride_l, ALIGNMENT
        )
        if STEP == "merge":
            m, s, w = _merge_parts(partial_ptr, row, splits, as_scalar(scale, ACC), LANES)
        else:
            part = program % splits
            columns = columns_of(part, chunk, vocabulary, LANES * WIDTH, WIDTH, ALIGNMENT)
            m, s, w = row_statistics(
                row_ptr, columns, as_scalar(scale, ACC), ACC, LANES, WIDTH, ALIGNMENT
            )
        if STEP == "part":
            at = partial_ptr + program.to(tl.int64) * NUM_SUMS
            tl.store(at, m)
            tl.store(at + 1, s)
            tl.store(at + 2, w)
        else:
            target = tl.load(targets_ptr + row)
            _store_statistics(
                row, outputs, num_rows, m, s, w, row_ptr, target, vocabulary, inverse_temperature
            )
    elif STEP != "part":
        _store(row, outputs, num_rows, 0.0, 0.0, 0.0, 0.0, 0.0)


def token_stats(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    places: Tensor | None,
    temperature: float,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches; `inplace` is for autograd alone."""

    def new(*size: int) -> Tensor:
        return logits.new_empty(size, dtype=accumulator(logits))

    num_rows = targets.numel()
    logps, entropy, saved = new(*targets.shape), new(*targets.shape), new(len(SAVED), num_rows)
    if num_rows == 0 or logits.shape[0] == 0:
        return logps.zero_(), entropy.zero_(), saved.zero_()
    launch_statistics(
        _token_stats_kernel,
        "token_stats",
        {"logits": as_rows(logits)},
        num_rows,
        NUM_SUMS.value,
        temperature,
        targets_ptr=targets.contiguous(),
        mask_ptr=bytes_of(mask),
        places_ptr=contiguous(places),
        logps_ptr=logps,
        entropy_ptr=entropy,
        saved_ptr=saved,
    )
    return logps, entropy, saved
