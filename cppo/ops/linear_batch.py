"""One call of `linear_cppo_loss`: which rows count, and the passes over them, tile by tile.

    statistics   of the anchor and the negative -> perception tokens -> of the positive at those
    loss         from the statistics, and its derivative by each of them
    gradients    of the rows whose derivative is not zero

Each works on a range of completions. A row is named by its place among the rows that count (n of
them), or among those of completions with perturbed views ("seeing" rows).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cppo.config import LossConfig
from cppo.ops.head import Head, even
from cppo.ops.library import COEFFICIENTS, CONFIG_FIELDS, STATS_SAVED
from cppo.ops.linear_rows import ANCHOR, NEGATIVE, POSITIVE, WEIGHT, Part, Stack, ViewRows, stacks
from cppo.records import Views

EVERY_VIEW = (ANCHOR, POSITIVE, NEGATIVE)
COEFFICIENT = {ANCHOR: 0, POSITIVE: 2, NEGATIVE: 3}  # row of the derivative by a view's logp
SAVED = {view: slice(3 * view, 3 * view + 3) for view in range(3)}  # rows of its statistics
# Logits that are still there, by view: of all rows of a range; of the positive, the selected ones.
Tiles = dict[int, Tensor]


def _from_zero(counts: Tensor) -> Tensor:
    """Running sums, (n + 1,)."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _ends(targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where each completion begins, and the last one ends, (B + 1,) int64."""
    if cu_seqlens is not None:
        return cu_seqlens.to(targets.device, torch.int64)
    return torch.arange(targets.shape[0] + 1, device=targets.device) * targets.shape[1]


class Sent:
    """Integers on their way to the host: what is launched meanwhile hides the wait for them."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)
        self._there = torch.cuda.Event() if values.is_cuda else None
        if self._there is not None:
            self._there.record()

    def tolist(self) -> Any:
        if self._there is not None:
            self._there.synchronize()
        return self._values.tolist()


class Counted:
    """(n,) masks, the sizes of which are on their way to the host."""

    def __init__(self, *masks: Tensor) -> None:
        self._masks = masks
        self._sizes = Sent(torch.stack([mask.sum() for mask in masks]))

    def places(self) -> list[Tensor]:
        """The places that each mask names."""
        sizes = self._sizes.tolist()
        return [places_of(mask, size) for mask, size in zip(self._masks, sizes, strict=True)]


def places_of(counts: Tensor, size: int) -> Tensor:
    """Where (n,) is not zero, of which the host knows how often that is."""
    return torch.nonzero_static(counts, size=size)[:, 0]


class Seeing:
    """Which rows belong to completions with perturbed views; found out after the first product.

    Args:
        rows: (n,) the rows that count, as places among all of the targets.
        owner: (T,) the completion of each. sees: (B,) which completions have perturbed views.
        size: how many rows they have, of those that count.
        is_whole: of each view, whether it has all rows and not those of seeing completions alone.
    """

    def __init__(
        self, rows: Tensor, owner: Tensor, sees: Tensor, size: int, is_whole: list[bool]
    ) -> None:
        self._rows, self._owner, self._sees = rows, owner, sees
        self._size, self._is_whole = size, is_whole

    @cached_property
    def rows(self) -> Tensor:
        """Their places among the rows that count."""
        return places_of(self._sees[self._owner[self._rows]], self._size)

    def places_in(self, view: int) -> Tensor:
        """Where the rows lie that a view has: all that count, or the seeing ones."""
        if view == ANCHOR:
            return self._rows
        at = self._rows[self.rows]
        return at if self._is_whole[view] else (self._sees[self._owner].cumsum(0) - 1)[at]


class LinearBatch:
    """Rows, statistics, coefficients and gradients of one batch.

    Args:
        ops: the namespace of torch.ops whose ops on logits are used.
        views: hidden states, (B, L, D) or (T, D); the perturbed ones whole or compact.
        head: the LM head, with the sums of its gradients.
        targets, advantages, mask, cu_seqlens: as of `cppo.linear_cppo_loss`.
        temperature, gating: of the `LossConfig`.
        wants: which gradients are wanted, as in the schemas.
    """

    def __init__(
        self,
        ops: Any,
        views: Views,
        head: Head,
        targets: Tensor,
        advantages: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        temperature: float,
        gating: bool,
        wants: list[bool],
    ) -> None:
        self.ops, self.head, self.temperature = ops, head, temperature
        self.advantages = advantages
        hidden = [None if view is None else view.reshape(-1, view.shape[-1]) for view in views]
        self.has_negative = views.negative is not None
        self.has_positive = views.positive is not None
        device, total = targets.device, targets.numel()
        ends = _ends(targets, cu_seqlens)
        sees = torch.zeros(len(ends) - 1, dtype=torch.bool, device=device)
        if views.negative is not None:
            sees = advantages > 0 if gating else torch.ones_like(sees)
        position = torch.arange(total, device=device)
        counts = None if mask is None else mask.reshape(-1).long()
        # Of completion c: its rows among those that count, and among those of seeing completions.
        self.row_ends = ends if counts is None else _from_zero(counts)[ends]
        self.seeing_ends = _from_zero(self.row_ends.diff() * sees)
        sent = Sent(torch.stack([self.row_ends, self.seeing_ends, ends]))
        owner = torch.searchsorted(ends[1:], position, right=True)
        parts = (3 * len(STATS_SAVED), 1, len(COEFFICIENTS), 3, 3)
        numbers = torch.zeros(
            sum(parts),
            total,
            dtype=torch.promote_types(views.anchor.dtype, torch.float32),
            device=device,
        )
        selected = torch.zeros(total, dtype=torch.bool, device=device)
        ids = targets.reshape(-1).long()
        # The one wait for the device here: sizes, and with them where every completion lies.
        self.starts, self.seeing_starts, host_ends = sent.tolist()
        self.longest = max((b - a for a, b in pairwise(host_ends)), default=0)
        self.num_rows, self.num_completions = self.starts[-1], len(ends) - 1
        self.rows = position if counts is None else places_of(counts, self.num_rows)
        self.targets = ids if counts is None else ids[self.rows]
        is_whole = [view is not None and len(view) == total for view in hidden]
        self._seeing = Seeing(self.rows, owner, sees, self.seeing_starts[-1], is_whole)
        self.views = ViewRows(head, hidden, self._seeing.places_in, wants)
        self.selected, numbers = selected[: self.num_rows], numbers[:, : self.num_rows]
        self.saved, margin, self.coefficients, logps, entropy = numbers.split(parts)
        self.margin, self.logps, self.entropy = margin[0], list(logps), list(entropy)
        self.num_selected = 0

    @property
    def seeing(self) -> Tensor:
        """The rows of completions with perturbed views."""
        return self._seeing.rows

    # Rows and tiles

    def range_of(self, first: int, last: int) -> Tensor:
        """The rows of the completions [first, last)."""
        begin, end = self.starts[first], self.starts[last]
        return torch.arange(begin, end, device=self.rows.device)

    def selected_starts(self) -> Sent:
        """Where the selected rows of every completion begin, and the last ones end."""
        return Sent(_from_zero(self.selected.long())[self.row_ends])

    def seeing_range(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Of the completions [first, last): the seeing rows, and their places among those."""
        begin, end = self.seeing_starts[first], self.seeing_starts[last]
        places = torch.arange(begin, end, device=self.rows.device)
        return self.seeing[begin:end], places

    def _stack(self, parts: list[Part]) -> tuple[Stack, Tensor]:
        """The logits of these rows, and their logps."""
        stack = self.views.stack(parts)
        logps, _, stack.saved = self._token_stats(stack.logits, stack.rows)
        return stack, logps

    def _token_stats(self, logits: Tensor, rows: Tensor) -> Any:
        return self.ops.token_stats(logits, self.targets[rows], None, self.temperature, False)

    # Statistics

    def statistics(self, first: int, last: int, config: LossConfig, keep: tuple[int, ...]) -> Tiles:
        """All statistics of a range; returns the logits of the views in `keep`."""
        tiles = self.read(first, last, keep)
        self.select(first, last, config, keep, tiles)
        self.compare(first, last, config, keep, tiles)
        return tiles

    def read(self, first: int, last: int, keep: tuple[int, ...]) -> Tiles:
        """The anchor of a range."""
        tiles: Tiles = {}
        rows = self.range_of(first, last)
        self._stats_of(ANCHOR, rows, rows, keep, tiles)
        return tiles

    def select(
        self, first: int, last: int, config: LossConfig, keep: tuple[int, ...], tiles: Tiles
    ) -> None:
        """The negative of a range, and the perception tokens."""
        seeing, places = self.seeing_range(first, last)
        if not self.has_negative:
            return
        self._stats_of(NEGATIVE, seeing, places, keep, tiles)
        bounds = self.seeing_ends[first : last + 1]
        self.selected[seeing] = self.ops.perception_mask(
            self.entropy[ANCHOR][seeing],
            self.entropy[NEGATIVE][seeing],
            config.fraction,
            None,
            bounds - bounds[0],
        )

    def compare(
        self, first: int, last: int, config: LossConfig, keep: tuple[int, ...], tiles: Tiles
    ) -> None:
        """The positive of a range, at its perception tokens."""
        if not self.has_positive:
            return
        seeing, places = self.seeing_range(first, last)
        (chosen,) = Counted(self.selected[seeing]).places()
        self.num_selected += len(chosen)
        if config.divergence == "full":
            self._margins(seeing[chosen], places[chosen])
        else:
            self._stats_of(POSITIVE, seeing[chosen], places[chosen], keep, tiles)

    def _stats_of(
        self, view: int, rows: Tensor, places: Tensor, keep: tuple[int, ...], tiles: Tiles
    ) -> None:
        if not len(rows):
            return  # a product of no rows reads the whole weight all the same
        # Where others are kept there is a third of a tile left.
        room = max(1, self.head.rows_per_tile // 3) if keep else self.head.rows_per_tile
        step = len(rows) if view in keep else even(len(rows), room)
        for some, where in zip(rows.split(step), places.split(step), strict=True):
            logits = self.views.logits(self.views.hidden_at(view, where))
            logps, entropy, saved = self._token_stats(logits, some)
            self.logps[view][some] = logps
            self.saved[SAVED[view], some] = saved
            self.entropy[view][some] = entropy
            if view in keep:
                tiles[view] = logits
            del logits  # before the next are there

    def contrast(self, first: int, last: int, size: int, views: tuple[int, ...]) -> Stack | None:
        """The perception tokens of a range in these views, the positive last; None: there are none.

        Fills the statistics of the positive, as `compare` does. `size`: how many there are.
        """
        if not size:
            return None
        seeing, places = self.seeing_range(first, last)
        chosen = places_of(self.selected[seeing], size)
        rows, places = seeing[chosen], places[chosen]
        parts = [(view, rows, rows if view == ANCHOR else places) for view in views]
        stack, logps = self._stack(parts)
        self.logps[POSITIVE][rows] = logps[-len(rows) :]
        return stack

    def _margins(self, rows: Tensor, places: Tensor) -> None:
        """KL(anchor || positive) - KL(anchor || negative) at the perception tokens."""
        for parts in self._thirds(rows, places):
            stack = self.views.stack(parts)
            self.margin[parts[0][1]] = self._statistics_of_three(stack)[7]
            del stack  # before the next is there

    def _statistics_of_three(self, stack: Stack) -> Tensor:
        """LOSS_SAVED of rows in three views: (8, rows), with the margin."""
        config = LossConfig(temperature=self.temperature, divergence="full", gating=False)
        options = [getattr(config, name) for name in CONFIG_FIELDS]
        rows = stack.parts[0][1]
        one, ends = self._one_completion(rows)
        return self.ops.cppo_loss(
            *stack.logits.split(len(rows)),
            self.targets[rows],
            one,
            None,
            None,
            None,
            ends,
            None,
            *options,
            False,
        )[6]

    def _thirds(self, rows: Tensor, places: Tensor) -> Iterator[list[Part]]:
        """Rows of which three views fit a tile."""
        step = even(len(rows), max(1, self.head.rows_per_tile // 3))
        for some, where in zip(rows.split(step), places.split(step), strict=True):
            if len(some):
                yield [(ANCHOR, some, some), (POSITIVE, some, where), (NEGATIVE, some, where)]

    def _one_completion(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and cu_seqlens of rows that are called one completion."""
        ends = torch.arange(2, device=rows.device) * len(rows)
        return self.advantages.new_ones(1), ends

    # Loss

    def loss(
        self,
        first: int,
        last: int,
        old_logps: Tensor | None,
        ref_logps: Tensor | None,
        by: tuple[float, float],
        config: LossConfig,
        contrast: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Loss and metrics of a range; fills its coefficients. old, ref: (n,) of the rows."""
        part = slice(self.starts[first], self.starts[last])
        has_positive = self.has_positive and contrast
        full = config.divergence == "full"

        def here(values: Tensor | None, wanted: bool = True) -> Tensor | None:
            return None if values is None or not wanted else values[part]

        loss, metrics, coefficients = self.ops.loss_terms(
            self.logps[ANCHOR][part],
            self.entropy[ANCHOR][part],
            here(self.logps[POSITIVE], has_positive and not full),
            here(self.logps[NEGATIVE], has_positive and not full),
            here(self.margin, has_positive and full),
            self.selected[part],
            self.advantages[first:last],
            here(old_logps),
            here(ref_logps),
            self.row_ends[first : last + 1] - self.row_ends[first],
            *by,
            *(getattr(config, name) for name in CONFIG_FIELDS),
        )
        self.coefficients[:, part] = coefficients
        return loss, metrics

    # Gradients

    def count(self, first: int, last: int) -> Counted:
        """The rows of a range that have a gradient: anchor; negative, positive among the seeing."""
        seeing, _ = self.seeing_range(first, last)
        masks = [self._counts(view, seeing) for view in (NEGATIVE, POSITIVE)]
        return Counted(self._counts(ANCHOR, self.range_of(first, last)), *masks)

    def gradients(
        self,
        first: int,
        last: int,
        config: LossConfig,
        tiles: Tiles,
        counted: Counted | None = None,
    ) -> None:
        """Adds the gradients of a range to those of the views and of the head.

        Args:
            tiles: logits that are still there, which are overwritten; others are computed again.
            counted: what `count` found, if it was asked before.
        """
        rows = self.range_of(first, last)
        seeing, places = self.seeing_range(first, last)
        if config.divergence == "full" and self.has_positive:
            anchor = self._counts(ANCHOR, rows)
            if not config.detach_anchor:
                anchor &= ~self._counts(POSITIVE, rows)
            contrasted, own = Counted(self._counts(POSITIVE, seeing), anchor).places()
            self._contrast(seeing[contrasted], places[contrasted], config)
            found = [(ANCHOR, rows, rows, own)]
        else:
            own, negative, positive = (counted or self.count(first, last)).places()
            found = [
                (ANCHOR, rows, rows, own),
                (NEGATIVE, seeing, places, negative),
                (POSITIVE, seeing, places, positive),
            ]
        gone = []
        for view, some, where, at in found:
            if not len(at) or not self.views.wants_logits(view):
                continue
            part = (view, some[at], where[at])
            # The logits of a view are let go of before those of the next get a gradient.
            logits = tiles.pop(view, None)
            if logits is None:
                gone.append(part)
                continue
            if view == POSITIVE:
                # Of which there are the selected rows.
                at = (self.selected[seeing].cumsum(0) - 1)[at]
            if len(at) < len(logits):
                logits = self.head.rows_of(logits, at)
            hidden, saved = self.views.hidden_at(view, part[2]), self.saved[SAVED[view], part[1]]
            self.gradient(Stack([part], hidden, logits, saved))
            del logits
        count = sum(len(rows) for _, rows, _ in gone)
        for parts in stacks(gone, even(count, self.head.rows_per_tile)):
            self.gradient(self._stack(parts)[0])

    def gradient(self, stack: Stack) -> None:
        """Adds the gradients of these rows."""
        slope = self.head.slope(stack.logits)

        def of(part: Part) -> tuple[Tensor, Tensor]:
            view, rows, _ = part
            d_logps, d_entropy = self.coefficients[COEFFICIENT[view], rows], self.coefficients[1]
            return d_logps, d_entropy[rows] if view == ANCHOR else torch.zeros_like(d_logps)

        d_logps, d_entropy = map(torch.cat, zip(*map(of, stack.parts), strict=True))
        self.ops.token_stats_backward_(
            d_logps,
            d_entropy if any(view == ANCHOR for view, *_ in stack.parts) else None,
            stack.logits,
            self.targets[stack.rows],
            None,
            stack.saved,
            self.temperature,
        )
        if slope is not None:
            stack.logits.mul_(slope)
        self.views.add(stack)

    def _counts(self, view: int, rows: Tensor) -> Tensor:
        """Which of the rows have a coefficient."""
        counts = self.coefficients[COEFFICIENT[view], rows] != 0
        return counts | (self.coefficients[1, rows] != 0) if view == ANCHOR else counts

    def _contrast(self, rows: Tensor, places: Tensor, config: LossConfig) -> None:
        """The three views together, with the full divergence."""
        for parts in self._thirds(rows, places):
            stack = self.views.stack(parts)
            some = parts[0][1]
            one, ends = self._one_completion(some)
            coefficients = self.coefficients[:, some]
            if config.detach_anchor:
                coefficients[:2] = 0
            saved = self._statistics_of_three(stack)
            slope = self.head.slope(stack.logits)
            self.ops.cppo_loss_backward_(
                self.coefficients.new_ones(()),
                *stack.logits.split(len(some)),
                self.targets[some],
                one,
                ends,
                saved,
                coefficients,
                self.temperature,
                "full",
                False,
                config.detach_anchor,
            )
            if slope is not None:
                stack.logits.mul_(slope)
            if config.detach_anchor:
                perturbed = slice(len(some), None)
                stack = Stack(parts[1:], stack.hidden[perturbed], stack.logits[perturbed])
            self.views.add(stack)
            del stack, slope

    def backward_rows(self, config: LossConfig) -> Tensor:
        """Rows that a recomputing backward will multiply, once for each product."""
        wants = self.views.wants
        products = [1 + wants[view] + wants[WEIGHT] for view in range(3)]
        rows = torch.arange(self.num_rows, device=self.rows.device)
        counts = [self._counts(view, rows) for view in range(3)]
        if config.divergence == "full":
            own = counts[ANCHOR] if config.detach_anchor else counts[ANCHOR] & ~counts[POSITIVE]
            return counts[POSITIVE].sum() * sum(products) + own.sum() * products[ANCHOR]
        return torch.stack([n.sum() * k for n, k in zip(counts, products, strict=True)]).sum()
