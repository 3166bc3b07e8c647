"""The ops on hidden states: the loss and the statistics of the logits of an LM head.

Nothing of the loss is here: `cppo.fused.loss` composes it, `cppo.fused.head_tiles` makes the logits
a tile at a time, and here the batch is cut into parts whose logits fit one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cppo.fused.batch import ANCHOR, Batch, flat, is_compact
from cppo.fused.head import Head
from cppo.fused.head_tiles import HeadTiles, is_whole
from cppo.fused.hidden import Hidden
from cppo.fused.loss import OF_ENTROPY, OF_LOGP, Terms, batch_of, outputs, terms
from cppo.fused.schema import COEFFICIENTS, SAVED, from_text
from cppo.options.loss import LossConfig
from cppo.records import Views


def _hidden(given: Any, views: Views, batch: Batch, wants: list[bool]) -> Hidden:
    logits = (given.softcap, given.logits_dtype)
    head = Head(given.weight, given.bias, given.suppressed, *logits, *wants[3:])
    rows = [None if view is None else view.reshape(-1, view.shape[-1]) for view in views]
    return Hidden(head, rows, batch.places(views), wants)


def _sums_before(counts: Tensor | None, bounds: Tensor) -> Tensor:
    """Of each bound the number of rows before it that count."""
    if counts is None:
        return bounds
    sums = counts.cumsum(0)
    return torch.cat([sums.new_zeros(1), sums])[bounds]


class Part(NamedTuple):
    """A range of completions.

    first: its first row in the batch. sizes: how many of its rows count, and how many are gated.
    num_earning: how many rows of completions that earn may have a gradient. fits: whether the
    logits of all of these rows fit a tile.
    """

    batch: Batch
    first: int
    sizes: tuple[int, int]
    num_earning: int
    fits: bool


def _earns(batch: Batch, config: LossConfig) -> Tensor | None:
    """(B,) bool, the completions whose anchor may have a gradient; None: all of them.

    Where A = 0 the clipped loss has none: of a question whose rewards are equal, for one.
    """
    contrasts = batch.gated is not None and not config.gating
    depends = batch.removed_logps is not None and config.papo_coef
    if config.kl_coef or config.entropy_coef or depends or contrasts:
        return None
    return batch.advantages != 0


def _learning(batch: Batch, config: LossConfig) -> Tensor | None:
    """(T,) bool, the rows that count, but for those that `token_weights` take the gradient from.

    None: all rows. A mean of log-ratios couples rows: there each has the weights of all.
    """
    if batch.token_weights is None or config.importance == "sequence":
        return batch.mask
    learning = batch.token_weights != 0
    if batch.gated is not None and config.cpl_coef:
        learning = learning | batch.gated  # that may be perception tokens
    return learning if batch.mask is None else learning & batch.mask


def _parts(batch: Batch, room: int | None, config: LossConfig) -> Iterator[Part]:
    """The batch in ranges of completions whose logits fit `room` rows; None: in one."""
    bounds = batch.cu_seqlens.long()
    counted, earns = _sums_before(batch.mask, bounds), _earns(batch, config)
    gated = torch.zeros_like(bounds) if batch.gated is None else _sums_before(batch.gated, bounds)
    earning = counted
    if earns is not None:
        learning = _learning(batch, config)
        of_learning = counted if learning is batch.mask else _sums_before(learning, bounds)
        earning = F.pad((of_learning.diff() * earns).cumsum(0), (1, 0))
    # The one wait for the device before the first product.
    ends, counts, gates, earnings = torch.stack([bounds, counted, gated, earning]).tolist()
    for first, last in _ranges([a + b for a, b in zip(counts, gates, strict=True)], room):
        rows = slice(ends[first], ends[last])
        sizes = counts[last] - counts[first], gates[last] - gates[first]
        fits = room is not None and sum(sizes) <= room
        num_earning = earnings[last] - earnings[first]
        part = batch.of(slice(first, last), rows)
        yield Part(part, rows.start, sizes, num_earning, fits)


def _earning_rows(part: Part, config: LossConfig) -> Tensor | None:
    """(T,) bool, the rows of the part that count of completions that earn; None: all that count."""
    earns = _earns(part.batch, config)
    if earns is None or part.num_earning == part.sizes[0]:
        return None
    lengths, size = part.batch.cu_seqlens.diff(), len(part.batch.targets)
    rows = earns.repeat_interleave(lengths, output_size=size)
    learning = _learning(part.batch, config)
    return rows if learning is None else rows & learning


def _ranges(sums: list[int], room: int | None) -> list[tuple[int, int]]:
    """The fewest ranges of completions that hold at most `room` rows each, or one completion.

    Args:
        sums: rows before each completion, and of all.
        room: None: no bound.
    Of so few, the largest is as small as can be: each is a pass over the gradient of the weight.
    """
    if room is None:
        return [(0, len(sums) - 1)]
    fewest = len(_filled_up(sums, room))
    sizes = range(-(-sums[-1] // fewest), room)
    largest = bisect_left(sizes, True, key=lambda size: len(_filled_up(sums, size)) <= fewest)
    return _filled_up(sums, sizes[largest] if largest < len(sizes) else room)


def _filled_up(sums: list[int], room: int) -> list[tuple[int, int]]:
    """Ranges from the first completion on, each with as many as have room."""
    ends, last = [0], len(sums) - 1
    while not ends[1:] or ends[-1] < last:
        fitting = bisect_right(sums, sums[ends[-1]] + room) - 1
        ends.append(min(last, max(fitting, ends[-1] + 1)))
    return list(pairwise(ends))


def linear_cppo_loss(kernels: Any, given: Any) -> Any:
    """The op of this name; given: its `ARGUMENTS`."""
    config, views = from_text(given.config), Views(given.anchor, given.positive, given.negative)
    gating = config.gating if views.negative is not None else None
    batch = batch_of(given, gating)
    hidden = _hidden(given, views, batch, given.wants)
    found, num_resident, head = [], 0, hidden.head
    for part in _parts(batch, head.rows_per_tile if given.resident else None, config):
        tiles = HeadTiles(kernels, hidden, *part[:3], given.temperature, keeps=part.fits)
        found.append(terms(kernels, tiles, given.denominators, given.per_selected, config))
        if given.resident:
            rows = tiles.rows_that_may(_earning_rows(part, config), part.num_earning)
            tiles.backward(found[-1].coefficients, rows)
            num_resident += part.sizes[0]
    whole, multiplied = _joined(found), hidden.rows_multiplied
    if not given.resident:
        multiplied += _backward_rows(whole.coefficients, config, views, given.wants)
    # Filled, not copied: a copy from the host waits for it.
    work = given.targets.new_zeros(2, dtype=torch.int64)
    work[0], work[1] = multiplied, num_resident
    inputs = (*views, given.weight, given.bias)
    wants = given.wants if given.resident else [False] * len(inputs)
    gradients = hidden.gradients(inputs, wants, head.accumulator)
    return *outputs(batch, given.targets.shape, whole), work, whole.coefficients, *gradients


def _joined(found: list[Terms]) -> Terms:
    """The terms of the whole batch from those of its parts."""
    if len(found) == 1:
        return found[0]
    selected = [part.selected for part in found if part.selected is not None]
    return Terms(
        torch.stack([part.loss for part in found]).sum(),
        torch.stack([part.metrics for part in found]).sum(0),
        torch.cat([part.coefficients for part in found], 1),
        torch.cat([part.logps for part in found]),
        torch.cat([part.entropy for part in found]),
        torch.cat(selected) if selected else None,
        found[0].saved,
    )


def _backward_rows(
    coefficients: Tensor, config: LossConfig, views: Views, wants: list[bool]
) -> Tensor:
    """Rows that a recomputing backward will multiply, once for each product."""
    products = [1 + wants[view] + wants[3] for view in range(3)]
    counts = [coefficients[OF_LOGP[view]] != 0 for view in range(3)]
    counts[ANCHOR] = counts[ANCHOR] | (coefficients[OF_ENTROPY[ANCHOR]] != 0)
    if config.divergence == "full" and views.positive is not None:
        own = counts[ANCHOR] if config.detach_anchor else counts[ANCHOR] & ~counts[1]
        return counts[1].sum() * sum(products) + own.sum() * products[ANCHOR]
    return torch.stack([n.sum() * k for n, k in zip(counts, products, strict=True)]).sum()


def linear_cppo_loss_backward(kernels: Any, given: Any) -> Any:
    """The gradients of the recompute plan; given: its `ARGUMENTS`."""
    config, views = from_text(given.config), Views(given.anchor, given.positive, given.negative)
    batch = batch_of(given, config.gating if is_compact(views) else None)
    hidden = _hidden(given, views, batch, given.wants)
    tiles = HeadTiles(kernels, hidden, batch, 0, (0, 0), given.temperature)
    full = config.divergence == "full" and views.positive is not None
    coefficients, options = given.coefficients * given.grad_loss, (full, config.detach_anchor)
    tiles.backward(coefficients, tiles.rows_that_do(coefficients, *options), *options)
    inputs = (*views, given.weight, given.bias)
    return tuple(hidden.gradients(inputs, given.wants, views.anchor.dtype))


def linear_token_stats(kernels: Any, given: Any) -> tuple[Tensor, ...]:
    """The op of this name; given: its `ARGUMENTS`."""
    shape, mask = given.targets.shape, given.mask
    num_rows = given.targets.numel() if mask is None else int(mask.sum())
    tiles = _tiles_of_rows(kernels, given, [False] * 5, num_rows, given.keeps)
    logps, entropy, _ = tiles.statistics(ANCHOR, tiles.batch.mask)
    head = tiles.hidden.head
    if given.keeps and num_rows:
        kept = tiles.kept(ANCHOR)
    else:
        logits = head.weight.new_empty((0, len(head.weight)), dtype=head.dtype)
        kept = logits, logps.new_empty(len(SAVED), 0)
    return logps.view(shape), entropy.view(shape), *kept


def linear_token_stats_backward(kernels: Any, given: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden, weight and bias: those of a loss that has these derivatives."""
    wants = [given.wants[0], False, False, *given.wants[1:]]
    tiles = _tiles_of_rows(kernels, given, wants, 0)
    shape = (len(COEFFICIENTS), given.targets.numel())
    coefficients = given.hidden.new_zeros(shape, dtype=tiles.hidden.head.accumulator)
    for row, gradient in enumerate((given.grad_logps, given.grad_entropy)):
        if gradient is not None:
            coefficients[row] = gradient.reshape(-1)
    if tiles.batch.mask is not None:
        coefficients.masked_fill_(~tiles.batch.mask, 0)
    head, rows = tiles.hidden.head, tiles.rows_that_do(coefficients)
    count = len(rows[ANCHOR])
    head.multiplies_once = count <= head.rows_per_tile
    if given.kept_logits is not None:
        tiles.keep(ANCHOR, given.kept_logits, given.kept_saved)
        head.multiplies_once |= is_whole(count, given.targets.numel())
    tiles.backward(coefficients, rows)
    inputs = (given.hidden, None, None, given.weight, given.bias)
    anchor, _, _, *of_head = tiles.hidden.gradients(inputs, wants, given.hidden.dtype)
    return anchor, *of_head


def _tiles_of_rows(
    kernels: Any, given: Any, wants: list[bool], num_rows: int, keeps: bool = False
) -> HeadTiles:
    """The rows of `linear_token_stats`, which belong to no completion.

    Args:
        num_rows: how many count, for `HeadTiles.statistics`.
    """
    nothing, mask = given.targets.new_empty(0), flat(given.mask)
    batch = Batch(given.targets.reshape(-1), nothing, nothing, mask=mask)
    hidden = _hidden(given, Views(given.hidden), batch, wants)
    return HeadTiles(kernels, hidden, batch, 0, (num_rows, 0), given.temperature, keeps)
