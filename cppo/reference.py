"""The executable specification: every op in plain PyTorch, in the order of the flow.

    rewards -> advantages -> prune -> pack -> (forward) -> token statistics -> perception mask
    -> loss -> gradients

Papers: completion pruning (Lin et al. 2025, arXiv 2503.22342) and contrastive perception
(Rezaei et al. 2026, arXiv 2601.00501). Every other backend is held to these functions in fp64:
nothing here casts down, `_promote` only lifts bf16 and fp16 to fp32. Arguments are
assumed valid; the public functions in `cppo.ops` check them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import is_autocast_available

from cppo.options.loss import LossConfig
from cppo.options.trainer import kept_per_unit
from cppo.records import Dependency, LossOutput, NumItems, TokenStats, Views


def _promote(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Advantages and pruning


def _std(values: Tensor, scored: Tensor, dim: int | None = None) -> Tensor:
    """The n-1 standard deviation of the scored values; 0 of a single one."""

    def total(x: Tensor) -> Tensor:
        return x.sum() if dim is None else x.sum(dim, keepdim=True)

    count = total(scored.double())
    centred = (values - total(values * scored) / count.clamp(min=1)) * scored
    return (total(centred.square()) / (count - 1).clamp(min=1)).sqrt()


def _centred(rewards: Tensor, scored: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(Q, G) rewards, and rewards minus the mean of their question; 0 where there is none."""
    groups = rewards.double().masked_fill(~scored, 0.0).view(-1, group_size)
    scored = scored.view(-1, group_size)
    mean = groups.sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp(min=1)
    # Within the rounding error of the mean a difference is zero, and no advantage (equal rewards).
    error = group_size * 2.0**-52 * groups.abs().amax(1, keepdim=True)
    centred = groups - mean
    return groups, centred.masked_fill(~scored | (centred.abs() <= error), 0.0)


def group_advantages(
    rewards: Tensor,
    group_size: int,
    scale: str = "group",
    eps: float = 1e-4,
    mask: Tensor | None = None,
) -> Tensor:
    """A = (r - mean_g(r)) / (std_g(r) + eps), computed in fp64, returned in fp32: (B,).

    Where `mask` (B,) is False a completion has no reward: A = 0, and neither mean nor std sees it.
    """
    scored = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    groups, centred = _centred(rewards, scored, group_size)
    scored = scored.view(-1, group_size)
    if scale == "group":
        centred = centred / (_std(groups, scored, dim=1) + eps)
    elif scale == "batch":
        centred = centred / (_std(groups, scored) + eps)
    return centred.flatten().float()


# A probability of staying is in proportion to |A|, but to no less than this share of the mean |A|.
INCLUSION_FLOOR = 0.1


def _by_variance(rewards: Tensor, scored: Tensor, keep: int) -> Tensor:
    """(U, n) bool: the i highest and m - i lowest rewards, m = `keep`, of the largest variance.

    The step from i to i + 1 trades the reward `low` for `high`, and the variance grows where
    high + low > mean_i + mean_(i+1). The left side falls with i and the right side rises: the best
    i is behind the last step that gains. Of equal variances the smaller i >= 1.
    """
    count = scored.sum(1, keepdim=True)
    keeps = count.clamp(max=keep)
    rewards = rewards.double().masked_fill(~scored, -math.inf)
    ranked = rewards.sort(1, descending=True).values
    step = torch.arange(min(keep, rewards.shape[1]), device=rewards.device)
    high = ranked[:, : len(step)].masked_fill(step >= keeps, 0.0)
    low = ranked.gather(1, (count - keeps + step).clamp(max=rewards.shape[1] - 1))
    low = low.masked_fill(step >= keeps, 0.0)
    # Sums, not means: of the i highest and m - i lowest, before and after the step.
    after = low.sum(1, keepdim=True) + (high - low).cumsum(1)
    before = after - (high - low)
    # What is within the rounding error of the means is equal.
    error = 4 * count * 2.0**-52 * ranked.masked_fill(ranked.isinf(), 0.0).abs().amax(1, True)
    gains = keeps * (high + low) - (before + after) > keeps * error
    gains = (gains | (step == 0)) & (step < keeps)
    split = gains.long().cumprod(1).sum(1, keepdim=True)
    # Of equal rewards, some of which stay, the lower index: `above` larger ones and `upto` - 1
    # further equal ones are in front of the last of them.
    falling = -ranked
    above = torch.searchsorted(falling, -rewards)
    upto = torch.searchsorted(falling, -rewards, right=True)
    equal = upto - above
    taken = torch.minimum((split - above).clamp(min=0), equal)
    taken = taken + torch.minimum((upto - (count - keeps + split)).clamp(min=0), equal)
    rank = rewards.sort(dim=1, descending=True, stable=True).indices.argsort(1)
    return rank - above < taken


def inclusion_probabilities(
    advantages: Tensor, unit_size: int, keep: int, mask: Tensor | None = None
) -> Tensor:
    """(B,) fp64: the probability with which `prune="unbiased"` keeps each completion.

    p_i = min(1, c w_i), w_i = max(|A_i|, a tenth of the unit's mean |A|), with the c that makes
    them sum up to `keep`; all equal where every A is 0.
    """
    scored = torch.ones_like(advantages, dtype=torch.bool) if mask is None else mask.bool()
    scored = scored.view(-1, unit_size)
    size = advantages.double().abs().view(-1, unit_size).masked_fill(~scored, 0.0)
    count = scored.sum(1, keepdim=True)
    keeps = count.clamp(max=keep)
    total = size.sum(1, keepdim=True)
    weight = torch.maximum(size, INCLUSION_FLOOR * total / count.clamp(min=1))
    weight = weight.masked_fill(total == 0, 1.0).masked_fill(~scored, 0.0)
    # Those with c w >= 1 stay for certain; c is of the others.
    ranked = weight.sort(1, descending=True).values
    tail = ranked.flip(1).cumsum(1).flip(1)
    left = keeps - torch.arange(unit_size, device=advantages.device)
    certain = (left > 0) & (left * ranked >= tail)
    num_certain = certain.long().cumprod(1).sum(1, keepdim=True)
    rest = F.pad(tail, (0, 1)).gather(1, num_certain)
    p = weight * ((keeps - num_certain) / rest)
    p = torch.where(keeps >= count, 1.0, p.clamp(max=1))
    return p.masked_fill(~scored, 0.0).flatten()


def _by_chance(p: Tensor, noise: Tensor) -> Tensor:
    """(U, n) bool: systematic sampling, one number in [0, 1) of each unit decides for all of it.

    Completion i stays where u, u + 1, u + 2, ... hit its part [P_(i-1), P_i) of the line from 0 to
    P_n = m; P is the running sum of p.
    """
    hits = (p.cumsum(1) - noise.double()).ceil().clamp(min=0)
    return hits.diff(dim=1, prepend=torch.zeros_like(hits[:, :1])) > 0


def prune_score(
    prune: str, noise: Tensor | None, rewards: Tensor | None, lengths: Tensor | None
) -> Tensor | None:
    """(B,) what a rule needs beside the advantages; None: nothing.

    "random" and "unbiased" need the noise, "variance" the rewards; "shortest" ranks by -length and
    "efficiency" by reward per token. A completion without tokens counts as one token.
    """
    if prune in ("random", "unbiased"):
        return noise
    if prune == "variance":
        assert rewards is not None
        return rewards.double()
    if prune == "shortest":
        assert lengths is not None
        return -lengths.double()
    if prune == "efficiency":
        assert lengths is not None and rewards is not None
        return rewards.double() / lengths.double().clamp(min=1)
    return None


def prune_completions(
    advantages: Tensor,
    group_size: int,
    prune_rate: float,
    scope: str = "group",
    prune: str = "smallest",
    drop_zero: bool = False,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    rewards: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Indices of the completions that stay, ascending: (K,) int64.

    Of a unit those with the largest score, of equal ones the lower index. The score: |A|
    ("smallest" are dropped), -|A| ("largest"), `noise` ("random"), -`lengths` ("shortest"),
    `rewards` / `lengths` ("efficiency"); or 1 for what `_by_variance` ("variance": PODS, arXiv
    2504.13818) or `_by_chance` ("unbiased") keeps, else 0. All of those are (B,), and `noise` is in
    [0, 1). Where `mask` (B,) is False a completion has no reward and never stays.
    """
    unit_size = group_size if scope == "group" else advantages.numel()
    if advantages.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=advantages.device)
    keep = kept_per_unit(unit_size, prune_rate)
    advantages = advantages.double()
    given = prune_score(prune, noise, rewards, lengths)
    scored = torch.ones_like(advantages, dtype=torch.bool) if mask is None else mask.bool()
    if given is None:
        score = advantages.abs() if prune == "smallest" else -advantages.abs()
    elif prune == "variance":
        score = _by_variance(given.view(-1, unit_size), scored.view(-1, unit_size), keep)
    elif prune == "unbiased":
        p = inclusion_probabilities(advantages, unit_size, keep, mask)
        score = _by_chance(p.view(-1, unit_size), given.view(-1, unit_size)[:, :1])
    else:
        score = given
    score = score.double().flatten()
    if mask is not None:
        score = score.masked_fill(~scored, -math.inf)
    ranked = score.view(-1, unit_size).sort(dim=1, descending=True, stable=True).indices
    in_unit = ranked[:, :keep].sort(dim=1).values
    first = torch.arange(0, advantages.numel(), unit_size, device=advantages.device)
    kept = (first[:, None] + in_unit).flatten()
    if mask is not None:
        kept = kept[scored[kept]]
    return kept[advantages[kept] != 0] if drop_zero else kept


def prune_weights(
    advantages: Tensor,
    kept: Tensor,
    group_size: int,
    prune_rate: float,
    scope: str = "group",
    prune: str = "unbiased",
    mask: Tensor | None = None,
) -> Tensor:
    """(K,) fp64: 1 / p of each completion that "unbiased" kept; ones for the other rules."""
    if prune != "unbiased" or advantages.numel() == 0:
        return torch.ones_like(kept, dtype=torch.float64)
    unit_size = group_size if scope == "group" else advantages.numel()
    keep = kept_per_unit(unit_size, prune_rate)
    return 1 / inclusion_probabilities(advantages, unit_size, keep, mask)[kept]


def advantages_of_kept(
    rewards: Tensor, kept: Tensor, group_size: int, scale: str = "group", eps: float = 1e-4
) -> Tensor:
    """(B,) fp32 advantages whose mean and std are of the kept rewards; 0 of the others."""
    stays = torch.zeros_like(rewards, dtype=torch.bool).index_fill(0, kept, True)
    return group_advantages(rewards, group_size, scale, eps, stays)


def advantages_and_prune(
    rewards: Tensor,
    group_size: int,
    prune_rate: float,
    scale: str = "group",
    eps: float = 1e-4,
    scope: str = "group",
    prune: str = "smallest",
    drop_zero: bool = False,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    advantages_of: str = "sampled",
) -> tuple[Tensor, Tensor]:
    """All of the above: advantages (B,) fp32 and kept (K,) int64.

    With `advantages_of="kept"` the advantages are worked out once more, from the kept rewards;
    `drop_zero` looks at those.
    """
    advantages = group_advantages(rewards, group_size, scale, eps, mask)
    again = advantages_of == "kept"
    options = (scope, prune, drop_zero and not again, noise, mask, rewards, lengths)
    kept = prune_completions(advantages, group_size, prune_rate, *options)
    if again:
        advantages = advantages_of_kept(rewards, kept, group_size, scale, eps)
        kept = kept[advantages[kept] != 0] if drop_zero else kept
    return advantages, kept


def select_groups(
    rewards: Tensor, group_size: int, top_p: float, mask: Tensor | None = None
) -> Tensor:
    """Indices of the groups that stay, ascending: (Q',) int64 (RAGEN-2, arXiv 2604.06268).

    The fewest groups whose variances (divided by n) sum up to at least top_p of the sum over all;
    of equal ones, to 32 bits, the lower index. A group without variance never stays.
    """
    scored = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    count = scored.view(-1, group_size).sum(1).clamp(min=1)
    centred = _centred(rewards, scored, group_size)[1]
    variance = centred.square().sum(1) / count
    # Equal is what agrees to 32 bits: those of [1, 1, 0] and [1, 0, 0] are rounded apart.
    order = ((variance.view(torch.int64) + 2**19) >> 20).sort(descending=True, stable=True).indices
    ranked = variance[order]
    total = ranked.cumsum(0)
    # A sum within rounding of what is asked for is enough.
    enough = top_p * total[-1:] * (1 - len(total) * 2.0**-52)
    stays = total - ranked < enough if top_p < 1 else ranked > 0
    return order[stays & (ranked > 0)].sort().values


# Packing and planning


def pack_completions(
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    kept: Tensor,
    per_token: Sequence[Tensor] = (),
    lengths: tuple[Sequence[int], Sequence[int]] | None = None,
) -> tuple[Any, ...]:
    """The kept completions without their padding, as the fields of a `PackedBatch`.

    Returns input_ids, position_ids, cu_seqlens, rows, targets, row_cu_seqlens, token_index,
    target_index, the per-token tensors at the targets, max_seqlen, and the place in `kept` of the
    first completion whose first token is marked as a response (-1: none). A response token is
    attended, marked in `completion_mask`, and has a predecessor. `lengths` (tokens and response
    tokens of the kept completions) follow from the masks; a backend may be spared finding out.
    """
    attended = attention_mask[kept].bool()
    position = attended.cumsum(1) - 1
    marked = attended & completion_mask[kept].bool()
    response = marked & (position > 0)
    orphans = (marked & (position == 0)).any(1).nonzero()
    length = input_ids.shape[1]
    flat_index = kept[:, None] * length + torch.arange(length, device=kept.device)
    token_index, target_index = flat_index[attended], flat_index[response]
    flat_ids = input_ids.flatten()

    def cumulative(mask: Tensor) -> Tensor:
        return F.pad(mask.sum(1).cumsum(0), (1, 0)).int()

    rows = response[attended].nonzero()[:, 0] - 1
    cu_seqlens = cumulative(attended)
    return (
        flat_ids[token_index],
        position[attended],
        cu_seqlens,
        rows,
        flat_ids[target_index],
        cumulative(response),
        token_index,
        target_index,
        [value.flatten()[target_index] for value in per_token],
        int(cu_seqlens.diff().max()) if len(kept) else 0,
        int(orphans[0, 0]) if len(orphans) else -1,
    )


def unpack(
    values: Sequence[Tensor], target_index: Tensor, num_completions: int, length: int
) -> list[Tensor]:
    """(T,) values at their flat positions in the padded batch, zero elsewhere: (B, L) each."""

    def place(value: Tensor) -> Tensor:
        flat = value.new_zeros(num_completions * length)
        return flat.index_put((target_index,), value).view(num_completions, length)

    return [place(value) for value in values]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def plan_microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing: bins of at most `max_tokens`, ordered by their first index."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in _longest_first(lengths):
        place = next((b for b, free in enumerate(room) if lengths[i] <= free), None)
        if place is None:
            bins.append([])
            room.append(max_tokens)
            place = len(bins) - 1
        bins[place].append(i)
        room[place] -= lengths[i]
    return sorted(sorted(members) for members in bins)


def balance_ranks(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Longest first to the rank with the fewest tokens; counts differ by at most one."""
    base, extra = divmod(len(lengths), world_size)
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    totals = [0] * world_size
    for i in _longest_first(lengths):
        larger = sum(len(members) > base for members in ranks)
        has_room = [
            r
            for r, members in enumerate(ranks)
            if len(members) < base or (len(members) == base and larger < extra)
        ]
        rank = min(has_room, key=lambda r: totals[r])
        ranks[rank].append(i)
        totals[rank] += lengths[i]
    return [sorted(members) for members in ranks]


def questions_needed(batch_size: int, group_size: int, prune_rate: float) -> int:
    """Dynamic allocation: questions whose kept completions fill a batch of `batch_size`."""
    return math.ceil(batch_size / kept_per_unit(group_size, prune_rate))


# Token statistics


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(_promote(logits) / temperature, dim=-1)


def _stats(logp_all: Tensor, targets: Tensor) -> TokenStats:
    """logp of each target and H = -sum_v p_v log p_v, from (T, V) log-probabilities."""
    logps = logp_all.gather(-1, targets[:, None])[:, 0]
    # p log p -> 0 where p does; the product alone may be 0 * -inf, and so may its derivative.
    probabilities = logp_all.exp()
    finite = logp_all.masked_fill(probabilities == 0, 0.0)
    return TokenStats(logps, -(probabilities * finite).sum(-1))


def token_stats(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> TokenStats:
    """Log-probability of the target and entropy of every row of (..., V); zero where masked."""
    return _token_stats(lambda rows: rows, logits, targets, temperature, mask)


def _token_stats(
    project: Callable[[Tensor], Tensor],
    rows: Tensor,
    targets: Tensor,
    temperature: float,
    mask: Tensor | None,
) -> TokenStats:
    """`project` maps the rows that count to their logits: a masked NaN reaches no gradient."""
    valid = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.bool()
    logp_all = _log_softmax(project(rows[valid]), temperature)
    logps, entropy = _stats(logp_all, targets[valid].long())

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(valid.shape).masked_scatter(valid, values)

    return TokenStats(spread(logps), spread(entropy))


def _product(hidden: Tensor, weight: Tensor, logits_dtype: str) -> Tensor:
    """hidden @ weight^T: "input" in their dtype, "fp32" with the sums as they are.

    The gradients are the same, those of the product in their dtype.
    """
    kind = hidden.device.type
    # Autocast would round what is promoted; a meta device has none.
    exactly = torch.autocast(kind, enabled=False) if is_autocast_available(kind) else nullcontext()
    with exactly:
        rounded = _promote(F.linear(hidden, weight))
        if logits_dtype == "input" or hidden.dtype == rounded.dtype:
            return rounded
        exact = F.linear(_promote(hidden.detach()), _promote(weight.detach()))
    return rounded + (exact - rounded.detach())  # exact, to the last bit


def _linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None = None,
    suppressed: Tensor | None = None,
    logits_dtype: str = "fp32",
) -> Tensor:
    logits = _product(hidden, weight, logits_dtype)
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:  # what it rules out stays ruled out
            logits = logits.masked_fill(bias.isneginf(), -torch.inf)
    return logits if suppressed is None else logits.index_fill(-1, suppressed, -torch.inf)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    softcap: float | None = None,
    suppressed: Tensor | None = None,
    logits_dtype: str = "fp32",
) -> TokenStats:
    """`token_stats` of z = hidden @ weight^T + bias, or of softcap * tanh(z / softcap).

    Of the tokens `suppressed` (K,) z is -inf, capped or not. `logits_dtype="input"` rounds the
    product of bf16 or fp16 to that dtype, as nn.Linear does; "fp32" does not.
    """

    def project(rows: Tensor) -> Tensor:
        return _linear(rows, weight, bias, softcap, suppressed, logits_dtype)

    return _token_stats(project, hidden, targets, temperature, mask)


# Perception mask

# The rounding error of an entropy H of the fused ops in fp32 is below this, times 1 + H. (Eager
# PyTorch on a CPU is off by up to 6e-5 at V = 151,936.) fp64 is held to the same number, so that
# no dtype selects by its rounding alone. What is within rounding of a threshold, this one or the
# k-th score, may still be selected in one dtype or by one backend and not in another.
ENTROPY_ERROR = 2.0**-17


def _completion_of_row(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """(T,) index of the completion that each packed row belongs to."""
    row = torch.arange(num_rows, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)


def perception_mask(
    anchor_entropy: Tensor,
    negative_entropy: Tensor,
    fraction: float = 0.5,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The share `fraction` of a completion's tokens whose entropy rises most under the negative.

    dH = H_neg - H_anchor, score = relu(dH) / (H_neg + 1e-6); the threshold is the k-th largest
    score among the c tokens with dH > 0, k = max(1, floor(fraction * c)); ties stay in. A dH below
    the rounding error of an entropy counts as 0: which tokens it would select is chance.
    """
    anchor_entropy = _promote(anchor_entropy.detach())
    negative_entropy = _promote(negative_entropy.detach())
    if cu_seqlens is not None:
        # Packed: the same selection on the padded rectangle, read back at the rows.
        num_rows = anchor_entropy.numel()
        owner = _completion_of_row(cu_seqlens, num_rows)
        column = torch.arange(num_rows, device=owner.device) - cu_seqlens[owner]
        width = int(cu_seqlens.diff().max()) if num_rows else 0
        shape = (cu_seqlens.numel() - 1, width)

        def padded(values: Tensor) -> Tensor:
            return values.new_zeros(shape).index_put((owner, column), values)

        valid = torch.ones_like(owner, dtype=torch.bool) if mask is None else mask.bool()
        selected = perception_mask(
            padded(anchor_entropy), padded(negative_entropy), fraction, padded(valid)
        )
        return selected[owner, column]
    rise = negative_entropy - anchor_entropy
    rises = rise > ENTROPY_ERROR * (1 + negative_entropy)
    if mask is not None:
        rises &= mask.bool()
    if rises.numel() == 0:
        return rises
    score = (rise.clamp(min=0) / (negative_entropy + 1e-6)).masked_fill(~rises, -math.inf)
    k = (rises.sum(1).double() * fraction).floor().long().clamp(min=1)
    threshold = score.sort(dim=1, descending=True).values.gather(1, k[:, None] - 1)
    return rises & (score >= threshold)


# Losses


def _k3(log_ratio: Tensor, bound: float | None) -> Tensor:
    """The k3 estimate e^d - d - 1 of a KL divergence from d, the log of a ratio; at most `bound`.

    Source: http://joschu.net/blog/kl-approx.html. d is clamped so that e^d stays finite.
    """
    d = log_ratio.clamp(-20, 20)
    estimate = d.exp() - d - 1
    return estimate if bound is None else estimate.clamp(max=bound)


def _divergence(logps: Tensor, anchor_logps: Tensor, kind: str) -> Tensor:
    """Divergence of a view from the anchor, estimated on the sampled token."""
    if kind == "k1":
        return anchor_logps - logps
    # The authors' bound: one token cannot carry the contrast.
    return _k3(logps - anchor_logps, bound=10)


def _full_margin(anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """KL(anchor || positive) - KL(anchor || negative) from (T, V) log-probabilities."""
    probabilities = anchor.exp()
    ratio = (negative - positive).masked_fill(probabilities == 0, 0.0)
    return (probabilities * ratio).sum(-1)


def contrastive_loss(
    views_logp_all: tuple[Tensor, Tensor, Tensor],
    views_logps: tuple[Tensor, Tensor, Tensor],
    selected: Tensor,
    config: LossConfig,
) -> Tensor:
    """softplus((div(a, p) - div(a, n)) / tau) at the selected rows: (number selected,).

    Anchor, positive and negative: their (T, V) log-probabilities, and (T,) those of the targets.
    """
    if config.divergence == "full":
        anchor, positive, negative = (x[selected] for x in views_logp_all)
        anchor = anchor.detach() if config.detach_anchor else anchor
        margin = _full_margin(anchor, positive, negative)
    else:
        anchor, positive, negative = (x[selected] for x in views_logps)
        anchor = anchor.detach() if config.detach_anchor else anchor
        margin = _divergence(positive, anchor, config.divergence) - _divergence(
            negative, anchor, config.divergence
        )
    return F.softplus(margin / config.tau)


def _in_exact_steps(values: Tensor) -> Tensor:
    """fp64, to a multiple of 2^-36: their sum is exact, in whatever order a GPU adds them."""
    return (values.double() * 2.0**36).round() * 2.0**-36


# At most e^20 is an importance weight that has no other bound.
LARGEST_LOG_WEIGHT = 20.0


def importance_weights(
    old_logps: Tensor,
    sampling_logps: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: LossConfig = LossConfig(),  # noqa: B008  (frozen)
) -> Tensor:
    """What corrects each token for the engine that sampled it: like old_logps, zero where masked.

    d = old_logp - sampling_logp of a token, or its sum over the completion; 0 where the engine gave
    NaN. Truncated e^d is clamp(e^d, min, max), masked e^d is 0 outside of them.
    """
    correction = config.importance_correction
    old_logps, sampling_logps = _promote(old_logps.detach()), _promote(sampling_logps.detach())
    valid = torch.ones_like(old_logps, dtype=torch.bool) if mask is None else mask.bool()
    d = torch.where(valid & ~sampling_logps.isnan(), old_logps - sampling_logps, 0.0)
    if correction in ("none", "bypass"):
        return valid.to(d)
    if correction.startswith("sequence"):
        exact = _in_exact_steps(d)
        if cu_seqlens is None:
            total = exact.sum(1, keepdim=True).expand_as(d)
        else:
            owner = _completion_of_row(cu_seqlens, d.numel())
            total = _sum_per_completion(exact, owner, cu_seqlens.numel() - 1)[owner]
        d = total.to(d)
    weights = d.clamp(max=LARGEST_LOG_WEIGHT).exp()
    low, high = config.correction_min, config.correction_max
    if correction.endswith("truncate"):
        weights = weights.clamp(low, high)
    else:
        weights = weights.masked_fill((weights < low) | (weights > high), 0.0)
    return weights.masked_fill(~valid, 0.0)


# Completions whose dependencies differ by less depend on the image alike (VPPO's code).
LEAST_SPREAD = 1e-6


def visual_dependency(
    old_logps: Tensor,
    removed_logps: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    fraction: float = 0.4,
    floor: float = 0.9,
    of_all: Tensor | None = None,
) -> Dependency:
    """VPPO's weights of tokens, m (b + (1 - b) s / mean(s)) with b = `floor` (arXiv 2510.09285).

    S = min(e^d - d - 1, 10) of a token, d = removed_logp - old_logp. m is 1 at the
    ceil(fraction n) tokens of a completion with the largest S, of equal ones the first. s is the
    completion's mean S, of which the least and the largest among `of_all` become 0 and 1; the mean
    is over all of these. A completion with a NaN among its removed logps, or without a token, has
    no part in them and weights of 1.
    """
    shape, count = old_logps.shape, len(old_logps) if cu_seqlens is None else len(cu_seqlens) - 1
    dtype = torch.promote_types(_promote(old_logps).dtype, removed_logps.dtype)
    old, removed = old_logps.detach().double().flatten(), removed_logps.detach().double().flatten()
    valid = torch.ones_like(old, dtype=torch.bool) if mask is None else mask.bool().flatten()
    bounds = cu_seqlens
    if bounds is None:
        bounds = torch.arange(count + 1, device=old.device) * old_logps.shape[1]
    owner = _completion_of_row(bounds, old.numel())
    d = removed - old
    per_token = _k3(torch.where(valid & ~d.isnan(), d, 0.0), bound=10)

    tokens, without = (
        _sum_per_completion(rows.long(), owner, count) for rows in (valid, valid & removed.isnan())
    )
    own = _sum_per_completion(_in_exact_steps(per_token), owner, count) / tokens
    own = own.masked_fill(without > 0, math.nan)
    # In each completion the largest S first: a stable sort by S, then one by completion.
    order = per_token.masked_fill(~valid, -1.0).sort(descending=True, stable=True).indices
    order = order[owner[order].sort(stable=True).indices]
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    rank -= bounds[:-1][owner]
    learns = rank < (tokens.double() * fraction - 1e-6).ceil().clamp(min=1)[owner]
    weights = learns * _dependency_factors(own, own if of_all is None else of_all, floor)[owner]
    weights = weights.masked_fill(without[owner] > 0, 1.0).masked_fill(~valid, 0.0)
    return Dependency(weights.to(dtype).view(shape), per_token.to(dtype).view(shape), own)


def _dependency_factors(own: Tensor, of_all: Tensor, floor: float) -> Tensor:
    """b + (1 - b) s / mean(s) of the mean S of completions; 1 where all are alike."""
    of_all = F.pad(of_all.detach().to(own), (0, 1), value=math.nan)  # never empty
    unknown = of_all.isnan()
    low = of_all.masked_fill(unknown, math.inf).amin()
    spread = of_all.masked_fill(unknown, -math.inf).amax() - low
    mean = of_all.nanmean()
    # s is (S - low) / spread, and so is its mean.
    factors = floor + (1 - floor) * (own - low) / (mean - low)
    return torch.where((spread > LEAST_SPREAD) & ~own.isnan(), factors, 1.0)


def correct(
    logps: Tensor,
    old_logps: Tensor | None,
    sampling_logps: Tensor | None,
    token_weights: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    config: LossConfig,
) -> tuple[Tensor | None, Tensor | None]:
    """The old logps of the ratio, None: its own; and what multiplies its surrogate, None: 1.

    Each like `logps`, the policy's own, which stand in for old ones that are not given.
    """
    if config.importance_correction == "none":
        return old_logps, token_weights
    assert sampling_logps is not None
    logps = logps.detach()
    if config.importance_correction == "bypass":
        return torch.where(sampling_logps.isnan(), logps, sampling_logps), token_weights
    old = logps if old_logps is None else old_logps
    weights = importance_weights(old, sampling_logps, mask, cu_seqlens, config)
    return old_logps, weights if token_weights is None else weights * token_weights


def where_known(removed_logps: Tensor, logps: Tensor) -> Tensor:
    """The logps without the image; the own ones, which are equal, where there are none (NaN)."""
    return torch.where(removed_logps.isnan(), logps.detach(), removed_logps)


def policy_loss(
    logps: Tensor,
    advantages: Tensor,
    old_logps: Tensor,
    owner: Tensor,
    num_completions: int,
    config: LossConfig,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate per row (T,), and where the clip stops the gradient (T,) bool.

    -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) times `weights` (T,); with dual_clip, at
    most -dual_clip A where A < 0.
    """
    log_ratio = logps - old_logps
    if config.importance == "sequence":
        log_ratio = _mean_per_completion(log_ratio, owner, num_completions)[owner]
    low, high = 1 - config.clip_low, 1 + config.clip_high
    ratio = log_ratio.detach().exp()
    clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    bound = ratio.clamp(low, high)
    if config.dual_clip is not None:
        beyond = (ratio > config.dual_clip) & (advantages < 0)
        clipped |= beyond
        bound = bound.masked_fill(beyond, config.dual_clip)
    # Rows without a gradient stay out of exp: where it overflows they would get 0 * inf.
    constant = clipped | (advantages == 0)
    if weights is not None:
        constant |= weights == 0
    ratio = log_ratio.masked_fill(constant, 0.0).exp()
    surrogate = torch.where(clipped, bound, ratio) * advantages
    return -surrogate if weights is None else -surrogate * weights, clipped


def _sum_per_completion(values: Tensor, owner: Tensor, num_completions: int) -> Tensor:
    return values.new_zeros(num_completions).index_add(0, owner, values)


def _mean_per_completion(values: Tensor, owner: Tensor, num_completions: int) -> Tensor:
    count = torch.bincount(owner, minlength=num_completions).clamp(min=1)
    return _sum_per_completion(values, owner, num_completions) / count


def _reduce(
    per_row: Tensor,
    owner: Tensor,
    num_completions: int,
    reduction: str,
    denominator: float | Tensor,
) -> Tensor:
    if reduction == "grpo":
        per_row = _mean_per_completion(per_row, owner, num_completions)
    return (per_row.sum() / denominator).to(per_row)


def _at_least_one(count: float | Tensor) -> float | Tensor:
    """A denominator that an empty batch cannot make zero."""
    return count.double().clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _exact(count: Any) -> Any:
    """A count of the caller: fp64, of which nobody asks a gradient."""
    return count.detach().double() if isinstance(count, Tensor) else count


def _denominators(
    num_rows: int,
    num_completions: int,
    num_selected: Tensor,
    max_length: int,
    num_items: int | float | Tensor | NumItems | None,
    config: LossConfig,
) -> tuple[float | Tensor, float | Tensor]:
    """What the policy terms and the contrastive term are divided by."""

    def policy(completions: int | Tensor, tokens: int | Tensor) -> int | Tensor:
        return {
            "grpo": completions,
            "dapo": tokens,
            "dr_grpo": completions * (config.max_length or max_length),
        }[config.reduction]

    own = _at_least_one(policy(num_completions, num_rows))
    per_sequence = config.cpl_reduction == "sequence"
    own_cpl = _at_least_one(num_completions if per_sequence else num_selected)
    if num_items is None:
        return own, own_cpl
    if isinstance(num_items, NumItems):
        num_items = NumItems(*map(_exact, num_items))
        whole = _at_least_one(policy(num_items.completions, num_items.tokens))
        if per_sequence:
            return whole, _at_least_one(num_items.completions)
        if num_items.selected is not None:
            return whole, _at_least_one(num_items.selected)
    else:
        whole = _exact(num_items)
    # Only the share of the whole is known: the part's contrastive mean is weighted by it.
    return whole, own_cpl * (whole / own)


def metric_scale(
    num_rows: int | Tensor,
    num_completions: int,
    longest: int | Tensor,
    num_items: int | float | Tensor | NumItems | None,
    config: LossConfig,
) -> float | Tensor:
    """What turns a part of the loss into a mean over completions or tokens, as metrics are.

    "dr_grpo" divides the loss by completions x max_length, which is more than there are tokens.
    """
    if config.reduction != "dr_grpo":
        return 1.0
    completions: int | Tensor = num_completions
    tokens: int | Tensor = num_rows
    if isinstance(num_items, NumItems):
        completions, tokens = num_items.completions, num_items.tokens
    length = config.max_length or longest
    return _at_least_one(completions * length) / _at_least_one(tokens)


def _cppo_loss(
    project: Callable[[Tensor], Tensor],
    views: Views,
    targets: Tensor,
    advantages: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    sampling_logps: Tensor | None,
    token_weights: Tensor | None,
    removed_logps: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_items: int | float | Tensor | NumItems | None,
    config: LossConfig,
) -> LossOutput:
    """The loss on rows in either layout; `project` maps a view's rows to their logits."""
    valid = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.bool()
    num_completions = advantages.numel()
    if cu_seqlens is None:
        completion = torch.arange(num_completions, device=targets.device)[:, None].expand_as(valid)
        longest = targets.shape[1]
    else:
        completion = _completion_of_row(cu_seqlens, targets.numel())
        longest = int(cu_seqlens.diff().max()) if num_completions else 0
    owner = completion[valid]
    logp_all = _log_softmax(project(views.anchor[valid]), config.temperature)
    logps, entropy = _stats(logp_all, targets[valid].long())

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(valid.shape).masked_scatter(valid, values.detach())

    advantage = advantages.to(logps)[owner]
    given = (old_logps, sampling_logps, token_weights, mask, cu_seqlens)
    old_logps, weights = correct(spread(logps), *given, config)
    old = logps.detach() if old_logps is None else old_logps[valid].to(logps)
    weights = None if weights is None else weights[valid].to(logps)
    per_row, clipped = policy_loss(logps, advantage, old, owner, num_completions, config, weights)
    metrics = {"policy_loss": per_row, "entropy": entropy, "clip_fraction": clipped.to(logps)}
    if config.entropy_coef:
        per_row = per_row - config.entropy_coef * entropy
    if ref_logps is not None:
        kl = _k3(ref_logps[valid].to(logps) - logps, config.kl_clamp)
        metrics["kl"] = kl
        per_row = per_row + config.kl_coef * kl
    if removed_logps is not None:
        # The authors' bound: depending on the image even more earns a token nothing.
        depends = _k3(where_known(removed_logps[valid].to(logps), logps) - logps, bound=10)
        metrics["papo/kl"] = depends
        per_row = per_row - config.papo_coef * depends

    selected = torch.zeros_like(owner, dtype=torch.bool)
    cpl = logps.new_zeros(0)
    if views.negative is not None:
        gated = advantages > 0 if config.gating else torch.ones_like(advantages, dtype=torch.bool)
        in_view = gated[completion]
        rows, use = valid & in_view, gated[owner]
        compact = valid[gated] if cu_seqlens is None else valid[in_view]

        def view_logp_all(view: Tensor) -> Tensor:
            # A view comes whole, or as the rows of the completions with A > 0 alone.
            at = rows if view.shape[0] == targets.shape[0] else compact
            return _log_softmax(project(view[at]), config.temperature)

        negative_all = view_logp_all(views.negative)
        negative = _stats(negative_all, targets[rows].long())
        counts = torch.bincount(owner[use], minlength=num_completions)
        selected[use] = config.perception == "cpl_all" or perception_mask(
            entropy[use],
            negative.entropy,
            config.fraction,
            cu_seqlens=F.pad(counts.cumsum(0), (1, 0)),
        )
        if views.positive is not None:
            positive_all = view_logp_all(views.positive)
            positive = _stats(positive_all, targets[rows].long())
            cpl = contrastive_loss(
                (logp_all[use], positive_all, negative_all),
                (logps[use], positive.logps, negative.logps),
                selected[use],
                config,
            )

    policy_denominator, cpl_denominator = _denominators(
        logps.numel(), num_completions, selected.sum(), longest, num_items, config
    )

    def reduce(values: Tensor) -> Tensor:
        return _reduce(values, owner, num_completions, config.reduction, policy_denominator)

    loss = reduce(per_row)
    scale = metric_scale(logps.numel(), num_completions, longest, num_items, config)
    metrics = {
        name: (reduce(values).detach() * (1.0 if name == "policy_loss" else scale)).to(logps)
        for name, values in metrics.items()
    }
    if views.positive is not None:
        if config.cpl_reduction == "sequence":
            cpl = _mean_per_completion(cpl, owner[selected], num_completions)
        cpl_loss = (cpl.sum() / cpl_denominator).to(logps)
        metrics["cpl_loss"] = cpl_loss.detach()
        loss = loss + config.cpl_coef * cpl_loss
    if views.negative is not None:
        metrics["perception_share"] = (selected.sum() / max(int(use.sum()), 1)).to(logps)
        metrics["num_selected"] = selected.sum()

    return LossOutput(loss, spread(logps), spread(entropy), spread(selected), metrics)


def _as_views(rows: Tensor | Views) -> Views:
    return rows if isinstance(rows, Views) else Views(rows)


def cppo_loss(
    logits: Tensor | Views,
    targets: Tensor,
    advantages: Tensor,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    removed_logps: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: int | float | Tensor | NumItems | None = None,
    config: LossConfig = LossConfig(),  # noqa: B008  (frozen)
) -> LossOutput:
    """policy + kl_coef * KL + cpl_coef * CPL - entropy_coef * H, from logits."""
    return _cppo_loss(
        lambda rows: rows,
        _as_views(logits),
        targets,
        advantages,
        old_logps,
        ref_logps,
        sampling_logps,
        token_weights,
        removed_logps,
        mask,
        cu_seqlens,
        num_items,
        config,
    )


def linear_cppo_loss(
    hidden: Tensor | Views,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    bias: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    removed_logps: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: int | float | Tensor | NumItems | None = None,
    config: LossConfig = LossConfig(),  # noqa: B008  (frozen)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    suppressed: Tensor | None = None,
    logits_dtype: str = "fp32",
) -> LossOutput:
    """`cppo_loss` of logit_scale * z, with z as in `linear_token_stats`."""
    config = replace(config, temperature=config.temperature / logit_scale)
    return _cppo_loss(
        lambda rows: _linear(rows, weight, bias, softcap, suppressed, logits_dtype),
        _as_views(hidden),
        targets,
        advantages,
        old_logps,
        ref_logps,
        sampling_logps,
        token_weights,
        removed_logps,
        mask,
        cu_seqlens,
        num_items,
        config,
    )
