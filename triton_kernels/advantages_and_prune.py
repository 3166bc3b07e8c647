"""Advantages and pruning in one launch.

Specification: `cppo.reference.advantages_and_prune`. One program per unit u (a question, or the
whole batch), in fp64:

    mean_g = sum r / G,  A_i = (r_i - mean_g) / (std + eps),  0 within the rounding of the mean
    rank_i = number of j in u that come before i: larger score, or equal score and lower index
    score  = |A|, -|A| or one that is given;  i stays if rank_i < keep, at the place that counts
             such j < i
    "variance" and "unbiased" choose in their own way, see below

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
    if PRUNE == "smallest" or PRUNE == "largest":
        score = tl.abs(score)
    if PRUNE == "largest":
        score = -score
    score = tl.where(score == 0, 0.0, score)  # -0.0 has other bits
    bits = score.to(tl.int64, bitcast=True)
    ordered = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    return tl.where(score == score, ordered, 0x7FFFFFFFFFFFFFFF)


@triton.jit
def _rank(score_ptr, first, unit_size, PRUNE: tl.constexpr, BLOCK: tl.constexpr):
    """How many scores of the unit are larger, and equal, and equal with a lower index."""
    local = tl.arange(0, BLOCK)
    key = _key(tl.load(score_ptr + first + local, local < unit_size, 0.0), PRUNE)
    above = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    before = tl.zeros((BLOCK,), tl.int32)
    for other in range(unit_size):
        other_key = _key(tl.load(score_ptr + first + other), PRUNE)
        is_equal = other_key == key
        above += other_key > key
        equal += is_equal
        before += is_equal & (other < local)
    return above, equal, before


@triton.jit
def _of_largest_variance(score_ptr, first, unit_size, keep, BLOCK: tl.constexpr):
    """Which completions stay by "variance"; csrc/prune_rules.h has the same steps."""
    local = tl.arange(0, BLOCK)
    inside = local < unit_size
    above, equal, before = _rank(score_ptr, first, unit_size, "variance", BLOCK)
    rank = tl.where(inside, above + before, BLOCK)
    reward = tl.load(score_ptr + first + local, inside, 0.0).to(tl.float64)
    largest = tl.max(tl.abs(reward), 0)
    error = 4.0 * keep * largest * unit_size * 2.220446049250313e-16
    total = tl.sum(tl.where(inside & (rank >= unit_size - keep), reward, 0.0), 0)
    split = 0
    gains = True
    while (split < keep) & gains:
        high = tl.sum(tl.where(rank == split, reward, 0.0), 0)
        low = tl.sum(tl.where(rank == unit_size - keep + split, reward, 0.0), 0)
        after = total + (high - low)
        gains = (split == 0) | (keep * (high + low) - (total + after) > error)
        split += gains.to(tl.int32)
        total = after
    first_taken = tl.minimum(tl.maximum(split - above, 0), equal)
    last_taken = tl.minimum(tl.maximum(above + equal - (unit_size - keep + split), 0), equal)
    return before < first_taken + last_taken


@triton.jit
def _store_by_chance(
    advantages_ptr, score_ptr, kept_ptr, unit, unit_size, keep, BLOCK: tl.constexpr
):
    """Stores what stays by "unbiased"; csrc/prune_rules.h has the same steps."""
    local = tl.arange(0, BLOCK)
    inside = local < unit_size
    first = unit * unit_size
    size = tl.abs(tl.load(advantages_ptr + first + local, inside, 0.0).to(tl.float64))
    total = tl.sum(size, 0)
    floor = tl.where(total == 0, 1.0, 0.1 * total / unit_size)
    weight = tl.where(inside, tl.where(size > floor, size, floor), 0.0)
    certain = 0
    scale = keep / tl.sum(weight, 0)
    found = tl.sum((scale * weight >= 1).to(tl.int32), 0)
    while found > certain:
        certain = found
        scale = (keep - certain) / tl.sum(tl.where(scale * weight >= 1, 0.0, weight), 0)
        found = tl.sum((scale * weight >= 1).to(tl.int32), 0)
    chance = tl.load(score_ptr + first).to(tl.float64)
    sums = chance * 0
    taken = 0
    for i in range(unit_size):
        own = tl.abs(tl.load(advantages_ptr + first + i).to(tl.float64))
        p = scale * tl.where(own > floor, own, floor)
        sums += tl.where((p < 1) & (keep < unit_size), p, 1.0)
        takes = (taken < keep) & ((sums > chance + taken) | (unit_size - i == keep - taken))
        tl.store(kept_ptr + unit * keep + taken, first + i, takes)
        taken += takes.to(tl.int32)


@triton.jit
def _store_kept(
    advantages_ptr,
    score_ptr,
    kept_ptr,
    unit,
    unit_size,
    keep,
    PRUNE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if PRUNE == "unbiased":
        _store_by_chance(advantages_ptr, score_ptr, kept_ptr, unit, unit_size, keep, BLOCK)
    else:
        local = tl.arange(0, BLOCK)
        inside = local < unit_size
        first = unit * unit_size
        if PRUNE == "variance":
            stays = inside & _of_largest_variance(score_ptr, first, unit_size, keep, BLOCK)
        else:
            ranked_ptr = score_ptr if PRUNE == "score" else advantages_ptr
            above, equal, before = _rank(ranked_ptr, first, unit_size, PRUNE, BLOCK)
            stays = inside & (above + before < keep)
        place = tl.cumsum(stays.to(tl.int32), 0) - 1
        tl.store(kept_ptr + unit * keep + place, first + local, stays)


@triton.jit
def _prune_completions_kernel(
    advantages_ptr,
    score_ptr,
    kept_ptr,
    unit_size,
    keep,
    PRUNE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    _store_kept(advantages_ptr, score_ptr, kept_ptr, unit, unit_size, keep, PRUNE, BLOCK)


@triton.jit
def _advantages_and_prune_kernel(
    rewards_ptr,
    score_ptr,
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
        # The advantages of the other completions are read back from where this program put them.
        tl.debug_barrier()
        _store_kept(advantages_ptr, score_ptr, kept_ptr, unit, unit_size, keep, PRUNE, BLOCK)


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
    score: Tensor | None,
) -> tuple[Tensor, Tensor]:
    total = rewards.shape[0]
    advantages = rewards.new_empty(total, dtype=torch.float32)
    kept = rewards.new_empty(total // unit_size * keep, dtype=torch.int64)
    if total == 0:
        return advantages, kept
    rewards = rewards.double().contiguous()
    _advantages_and_prune_kernel[(total // unit_size,)](
        rewards_ptr=rewards,
        score_ptr=rewards if score is None else score.contiguous(),
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
    advantages: Tensor, unit_size: int, keep: int, prune: str, score: Tensor | None
) -> Tensor:
    units = advantages.shape[0] // unit_size
    kept = advantages.new_empty(units * keep, dtype=torch.int64)
    if units:
        advantages = advantages.contiguous()
        _prune_completions_kernel[(units,)](
            advantages_ptr=advantages,
            score_ptr=advantages if score is None else score.contiguous(),
            kept_ptr=kept,
            unit_size=unit_size,
            keep=keep,
            PRUNE=prune,
            BLOCK=triton.next_power_of_2(unit_size),
            num_warps=_num_warps(unit_size),
        )
    return kept
