"""Advantages and pruning in one launch.

Specification: `cppo.reference.advantages_and_prune`. One program per unit u (a question, or the
whole batch), in fp64:

    mean_g = sum r / G,  A_i = (r_i - mean_g) / (std + eps),  0 within the rounding of the mean
    rank_i = number of j in u that come before i: larger score, or equal score and lower index
    score  = |A|, -|A| or noise;  i stays if rank_i < keep, at the place that counts such j < i

Scores are turned into integers of the same order, so that a NaN has a rank too. Counting ranks is
O(n^2), but compiles in a second where two sorts in registers take half a minute.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# One program would count the ranks of a longer unit for too long.
LONGEST_UNIT = 4096
CHUNK = 1024


@triton.jit
def _std_of_all(rewards_ptr, total, CHUNK: tl.constexpr):
    column = tl.arange(0, CHUNK)
    sums = tl.zeros((CHUNK,), tl.float64)
    for first in range(0, total, CHUNK):
        sums += tl.load(rewards_ptr + first + column, first + column < total, 0.0)
    mean = tl.sum(sums, 0) / total
    squares = tl.zeros((CHUNK,), tl.float64)
    for first in range(0, total, CHUNK):
        inside = first + column < total
        delta = tl.load(rewards_ptr + first + column, inside, 0.0) - mean
        squares += tl.where(inside, delta * delta, 0.0)
    return tl.sqrt(tl.sum(squares, 0) / (total - 1))


@triton.jit
def _key(value, PRUNE: tl.constexpr):
    """int64 in the order of the score; a NaN is the largest."""
    score = value.to(tl.float64)
    if PRUNE != "random":
        score = tl.abs(score)
    if PRUNE == "largest":
        score = -score
    bits = score.to(tl.int64, bitcast=True)
    ordered = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    return tl.where(score == score, ordered, 0x7FFFFFFFFFFFFFFF)


@triton.jit
def _store_kept(
    score_ptr, kept_ptr, unit, unit_size, keep, PRUNE: tl.constexpr, BLOCK: tl.constexpr
):
    local = tl.arange(0, BLOCK)
    inside = local < unit_size
    first = unit * unit_size
    key = _key(tl.load(score_ptr + first + local, inside, 0.0), PRUNE)
    rank = tl.zeros((BLOCK,), tl.int32)
    for other in range(unit_size):
        other_key = _key(tl.load(score_ptr + first + other), PRUNE)
        rank += (other_key > key) | ((other_key == key) & (other < local))
    stays = inside & (rank < keep)
    place = tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(kept_ptr + unit * keep + place, first + local, stays)


@triton.jit
def _prune_completions_kernel(
    score_ptr, kept_ptr, unit_size, keep, PRUNE: tl.constexpr, BLOCK: tl.constexpr
):
    unit = tl.program_id(0).to(tl.int64)
    _store_kept(score_ptr, kept_ptr, unit, unit_size, keep, PRUNE, BLOCK)


@triton.jit
def _advantages_and_prune_kernel(
    rewards_ptr,
    noise_ptr,
    advantages_ptr,
    kept_ptr,
    total,
    group_size,
    unit_size,
    keep,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    PRUNE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, BLOCK)
    inside = local < unit_size
    at = unit * unit_size + local
    group_ptr = rewards_ptr + at // group_size * group_size
    mean = tl.zeros((BLOCK,), tl.float64)
    largest = tl.zeros((BLOCK,), tl.float64)
    for member in range(group_size):
        reward = tl.load(group_ptr + member, inside, 0.0)
        mean += reward
        largest = tl.maximum(largest, tl.abs(reward))
    mean = mean / group_size
    centred = tl.load(rewards_ptr + at, inside, 0.0) - mean
    advantage = centred
    if SCALE == "group" and group_size > 1:
        squares = tl.zeros((BLOCK,), tl.float64)
        for member in range(group_size):
            delta = tl.load(group_ptr + member, inside, 0.0) - mean
            squares += delta * delta
        advantage = centred / (tl.sqrt(squares / (group_size - 1)) + EPS)
    if SCALE == "batch" and total > 1:
        advantage = centred / (_std_of_all(rewards_ptr, total, CHUNK) + EPS)
    # Within the rounding error of the mean a difference is zero, and no advantage (2^-52).
    is_zero = tl.abs(centred) <= largest * group_size * 2.220446049250313e-16
    advantage = tl.where(is_zero, 0.0, advantage).to(tl.float32)
    tl.store(advantages_ptr + at, advantage, inside)

    if PRUNE != "nothing":
        # The scores of the other completions are read back from where this program put them.
        tl.debug_barrier()
        score_ptr = noise_ptr if PRUNE == "random" else advantages_ptr
        _store_kept(score_ptr, kept_ptr, unit, unit_size, keep, PRUNE, BLOCK)


def _num_warps(unit_size: int) -> int:
    return 4 if unit_size <= 1024 else 16


def group_advantages(rewards: Tensor, group_size: int, scale: str, eps: float) -> Tensor:
    # Nothing stays: there is no second result.
    return advantages_and_prune(rewards, group_size, group_size, 0, scale, eps, "nothing", None)[0]


def advantages_and_prune(
    rewards: Tensor,
    group_size: int,
    unit_size: int,
    keep: int,
    scale: str,
    eps: float,
    prune: str,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    total = rewards.shape[0]
    advantages = rewards.new_empty(total, dtype=torch.float32)
    kept = rewards.new_empty(total // unit_size * keep, dtype=torch.int64)
    if total == 0:
        return advantages, kept
    rewards = rewards.double().contiguous()
    _advantages_and_prune_kernel[(total // unit_size,)](
        rewards_ptr=rewards,
        noise_ptr=rewards if noise is None else noise.contiguous(),
        advantages_ptr=advantages,
        kept_ptr=kept,
        total=total,
        group_size=group_size,
        unit_size=unit_size,
        keep=keep,
        EPS=eps,
        SCALE=scale,
        PRUNE=prune,
        BLOCK=triton.next_power_of_2(unit_size),
        CHUNK=CHUNK,
        num_warps=_num_warps(unit_size),
    )
    return advantages, kept


def prune_completions(
    advantages: Tensor, unit_size: int, keep: int, prune: str, noise: Tensor | None
) -> Tensor:
    scores = noise if prune == "random" and noise is not None else advantages
    units = scores.shape[0] // unit_size
    kept = scores.new_empty(units * keep, dtype=torch.int64)
    if units:
        _prune_completions_kernel[(units,)](
            score_ptr=scores.contiguous(),
            kept_ptr=kept,
            unit_size=unit_size,
            keep=keep,
            PRUNE=prune,
            BLOCK=triton.next_power_of_2(unit_size),
            num_warps=_num_warps(unit_size),
        )
    return kept
