"""The ops on hidden states: the loss and the statistics of the logits of an LM head.

Nothing of the loss is here: `cppo.fused.loss` composes it, `cppo.fused.head_tiles` makes the logits
a tile at a time, and here the batch is cut into parts whose logits fit one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cppo.config import LossConfig
from cppo.fused.batch import ANCHOR, Batch, flat, make_batch
from cppo.fused.head import Head
from cppo.fused.head_tiles import HeadTiles, Hidden
from cppo.fused.loss import OF_ENTROPY, OF_LOGP, Terms, outputs, terms
from cppo.fused.schema import COEFFICIENTS, from_text
from cppo.records import Views


def _hidden(head: Head, views: Views, batch: Batch, wants: list[bool]) -> Hidden:
    anchor = views.anchor
    places = [None if view is None else batch.places(view, anchor) for view in views]
    rows = Views(*(None if view is None else view.reshape(-1, view.shape[-1]) for view in views))
    return Hidden(head, rows, places, wants)


def _sums_before(counts: Tensor | None, bounds: Tensor) -> Tensor:
    """Of each bound the number of rows before it that count."""
    if counts is None:
        return bounds
    sums = counts.cumsum(0)
    return torch.cat([sums.new_zeros(1), sums])[bounds]


def _parts(batch: Batch, room: int | None) -> Iterator[tuple[Batch, int, tuple[int, int], bool]]:
    """The batch in ranges of completions whose logits fit `room` rows; None: in one.

    Yields: the part, its first row in the batch, how many of its rows count and how many are gated,
    and whether it fits: a completion of more rows does not.
    """
    bounds = batch.cu_seqlens
    gated = bounds.new_zeros(bounds.shape)
    if batch.gated is not None:
        gated = _sums_before(batch.gated, bounds.long())
    counted = _sums_before(batch.mask, bounds.long())
    # The one wait for the device before the first product.
    ends, counted, gated = torch.stack([bounds, counted, gated]).tolist()
    for first, last in _ranges([a + b for a, b in zip(counted, gated, strict=True)], room):
        rows = slice(ends[first], ends[last])
        sizes = counted[last] - counted[first], gated[last] - gated[first]
        fits = room is not None and sum(sizes) <= room
        yield batch.of(slice(first, last), rows), rows.start, sizes, fits


def _ranges(sums: list[int], room: int | None) -> Iterator[tuple[int, int]]:
    """Ranges of completions of at most `room` rows, or of one; sums: rows before each."""
    last = len(sums) - 1
    if room is None:
        yield 0, last
        return
    first = 0
    for completion in range(last):
        if first < completion and sums[completion + 1] - sums[first] > room:
            yield first, completion
            first = completion
    if first < last or not last:
        yield first, last


def linear_cppo_loss(
    kernels: Any,
    anchor: Tensor,
    positive: Tensor | None,
    negative: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    advantages: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    denominators: Tensor,
    per_selected: bool,
    config: str,
    softcap: float | None,
    wants: list[bool],
    resident: bool,
) -> tuple[Tensor, ...]:
    """The op of this name; after the kernels the arguments of its schema.

    Returns: the outputs of the loss; how many rows were multiplied with the head, once for each
        product, and how many were resident (2,); the coefficients; then the gradients of what wants
        one, for a unit upstream gradient, if `resident`.
    """
    options, views = from_text(config), Views(anchor, positive, negative)
    gating = options.gating if negative is not None else None
    batch = make_batch(targets, advantages, cu_seqlens, mask, gating, (old_logps, ref_logps))
    head = Head(weight, bias, softcap, wants[3], wants[4])
    hidden = _hidden(head, views, batch, wants)
    found, num_resident = [], 0
    for part, first, sizes, fits in _parts(batch, head.rows_per_tile if resident else None):
        tiles = HeadTiles(kernels, hidden, part, first, sizes, options.temperature, keeps=fits)
        found.append(terms(kernels, tiles, denominators, per_selected, options))
        if resident:
            tiles.backward(found[-1].coefficients)
            num_resident += sizes[0]
    whole = _joined(found)
    multiplied = hidden.rows_multiplied
    if not resident:
        multiplied += _backward_rows(whole.coefficients, options, positive is not None, wants)
    work = _counts(targets, multiplied, num_resident)
    inputs = (anchor, positive, negative, weight, bias)
    if resident:
        gradients = hidden.gradients(inputs, head.accumulator)
    else:
        gradients = [weight.new_empty(0, dtype=head.accumulator) for _ in inputs]
    return *outputs(batch, targets.shape, whole), work, whole.coefficients, *gradients


def _joined(found: list[Terms]) -> Terms:
    """The terms of the whole batch from those of its parts."""
    if len(found) == 1:
        return found[0]
    has_views = found[0].selected is not None
    return Terms(
        torch.stack([part.loss for part in found]).sum(),
        torch.stack([part.metrics for part in found]).sum(0),
        torch.cat([part.coefficients for part in found], 1),
        torch.cat([part.logps for part in found]),
        torch.cat([part.entropy for part in found]),
        torch.cat([part.selected for part in found]) if has_views else None,
        found[0].saved,
    )


def _counts(like: Tensor, multiplied: int | Tensor, resident: int) -> Tensor:
    """(2,) int64, filled without a copy from the host."""
    counts = like.new_zeros(2, dtype=torch.int64)
    counts[0] = multiplied
    counts[1] = resident
    return counts


def _backward_rows(
    coefficients: Tensor, config: LossConfig, contrasted: bool, wants: list[bool]
) -> Tensor:
    """Rows that a recomputing backward will multiply, once for each product."""
    products = [1 + wants[view] + wants[3] for view in range(3)]
    counts = [coefficients[OF_LOGP[view]] != 0 for view in range(3)]
    counts[ANCHOR] = counts[ANCHOR] | (coefficients[OF_ENTROPY[ANCHOR]] != 0)
    if config.divergence == "full" and contrasted:
        own = counts[ANCHOR] if config.detach_anchor else counts[ANCHOR] & ~counts[1]
        return counts[1].sum() * sum(products) + own.sum() * products[ANCHOR]
    return torch.stack([n.sum() * k for n, k in zip(counts, products, strict=True)]).sum()


def linear_cppo_loss_backward(
    kernels: Any,
    grad_loss: Tensor,
    anchor: Tensor,
    positive: Tensor | None,
    negative: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor | None,
    coefficients: Tensor,
    config: str,
    softcap: float | None,
    wants: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients of the recompute plan."""
    options, views = from_text(config), Views(anchor, positive, negative)
    gating = options.gating if negative is not None else None
    batch = make_batch(targets, advantages, cu_seqlens, None, gating)
    hidden = _hidden(Head(weight, bias, softcap, wants[3], wants[4]), views, batch, wants)
    tiles = HeadTiles(kernels, hidden, batch, 0, (0, 0), options.temperature)
    full = options.divergence == "full" and positive is not None
    tiles.backward(coefficients * grad_loss, full, options.detach_anchor)
    return tuple(hidden.gradients((anchor, positive, negative, weight, bias), anchor.dtype))


def linear_token_stats(
    kernels: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The op of this name; after the kernels the arguments of its schema."""
    head, wants = Head(weight, bias, softcap), [False] * 5
    batch = _rows_alone(targets, flat(mask))
    num_rows = targets.numel() if mask is None else int(mask.sum())
    rows = _hidden(head, Views(hidden), batch, wants)
    tiles = HeadTiles(kernels, rows, batch, 0, (num_rows, 0), temperature)
    logps, entropy, _ = tiles.statistics(ANCHOR, batch.mask)
    return logps.view(targets.shape), entropy.view(targets.shape)


def linear_token_stats_backward(
    kernels: Any,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    wants: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of hidden, weight and bias: those of a loss that has these derivatives."""
    wants = [wants[0], False, False, *wants[1:]]
    head = Head(weight, bias, softcap, wants[3], wants[4])
    batch = _rows_alone(targets, flat(mask))
    rows = _hidden(head, Views(hidden), batch, wants)
    coefficients = hidden.new_zeros(len(COEFFICIENTS), targets.numel(), dtype=head.accumulator)
    for row, gradient in enumerate((grad_logps, grad_entropy)):
        if gradient is not None:
            coefficients[row] = gradient.reshape(-1)
    if batch.mask is not None:
        coefficients.masked_fill_(~batch.mask, 0)
    tiles = HeadTiles(kernels, rows, batch, 0, (0, 0), temperature)
    tiles.backward(coefficients)
    anchor, _, _, *of_head = rows.gradients((hidden, None, None, weight, bias), hidden.dtype)
    return anchor, *of_head


def _rows_alone(targets: Tensor, mask: Tensor | None) -> Batch:
    """Rows of no completion in particular."""
    nothing = targets.new_empty(0)
    return Batch(targets.reshape(-1), nothing, nothing, mask=mask)
