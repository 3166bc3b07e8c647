"""Tiles of logits from hidden states, and the sums of their gradients.

A tile holds rows of one view or of several, (n, V), and lives as long as its statistics and its
gradient take (`cppo.fused.hidden` says which rows they are).

What needs no computing is not computed: masked rows, views of completions that are not gated, the
positive away from the perception tokens, the backward of rows that no gradient reaches. In GEMM
units (one view's logits), with f the share of tokens in gated completions and r the selected share
of those, three views in full take 12. Here a loss with its gradients takes

    resident    3 + f + 5fr    as many completions at a time as fit one tile: their gradients are
                               computed before the logits are freed; a longer one is recomputed
    recompute   4 + f + 7fr    statistics of all rows, then the loss; then the logits of the rows
                               that have a gradient once more

Resident needs to know beforehand what the loss is divided by.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cppo.fused.batch import ANCHOR, NEGATIVE, POSITIVE, Batch
from cppo.fused.head import even
from cppo.fused.hidden import Hidden, Rows, Tile
from cppo.fused.loss import OF_ENTROPY, OF_LOGP, Statistics
from cppo.fused.schema import CONTRASTS


def index_of(mask: Tensor, size: int) -> Tensor:
    """The places of the `size` entries of a mask that are true; nothing waits for the device."""
    return torch.nonzero_static(mask, size=size)[:, 0]


def is_whole(count: int, size: int) -> bool:
    """Whether a tile of `size` rows is multiplied as it is, of which `count` are needed: some
    products with zeros take less than a copy."""
    return count > 0.9 * size


def _on_host(values: Tensor) -> Any:
    """The numbers of a tensor: a wait for the device."""
    return values.tolist()


class HeadTiles:
    """The logits of a part of the batch.

    Args:
        kernels: the primitives of a backend, by name.
        hidden: of the whole batch.
        batch: the part.
        first: its first row in the whole batch.
        sizes: how many of its rows count, and how many of those are gated.
        temperature: divides the logits.
        keeps: whether the logits stay for `backward`.
    """

    def __init__(
        self,
        kernels: Any,
        hidden: Hidden,
        batch: Batch,
        first: int,
        sizes: tuple[int, int],
        temperature: float,
        keeps: bool = False,
    ) -> None:
        self._kernels, self.hidden, self.batch, self._first = kernels, hidden, batch, first
        self._sizes = {ANCHOR: sizes[0], NEGATIVE: sizes[1]}
        self._temperature, self._keeps = temperature, keeps
        self._kept: dict[int, Tile] = {}
        self._read: dict[int, Tensor] = {}  # the rows that `statistics` read of each view

    def has(self, view: int) -> bool:
        return self.hidden.has(view)

    def _index(self, view: int, where: Tensor | None) -> Tensor:
        if where is None:
            return torch.arange(len(self.batch.targets), device=self.batch.targets.device)
        size = self._sizes[view] if view in self._sizes else _on_host(where.sum())
        return index_of(where, size)

    def _token_stats(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of a tile, which keeps what its backward needs."""
        index = torch.cat([rows.at for rows in tile.rows])
        logps, entropy, tile.saved = self._kernels.token_stats(
            tile.logits, self.batch.targets[index], None, None, self._temperature, False
        )
        return logps, entropy

    def statistics(self, view: int, where: Tensor | None) -> Statistics:
        """As of `cppo.fused.loss.Tiles`; what the backward needs stays with the tile."""
        index, rows = self._index(view, where), len(self.batch.targets)
        self._read[view] = index
        dtype = self.hidden.head.accumulator
        logps, entropy = (self.batch.targets.new_zeros(rows, dtype=dtype) for _ in range(2))
        for some in self._pieces(index):
            tile = self.hidden.tile([Rows(view, some)], self._first)
            logps[some], entropy[some] = self._token_stats(tile)
            if self._keeps:
                self._kept[view] = tile
            del tile  # before the next is there
        return Statistics(logps, entropy, None)

    def _pieces(self, index: Tensor, views: int = 1) -> tuple[Tensor, ...]:
        """Rows of which so many views fit a tile."""
        if not len(index):
            return ()  # a product of no rows reads the whole weight all the same
        room = max(1, self.hidden.head.rows_per_tile // views)
        return index.split(len(index) if self._keeps else even(len(index), room))

    def _three(self, index: Tensor) -> Tile:
        return self.hidden.tile(
            [Rows(view, index) for view in (ANCHOR, POSITIVE, NEGATIVE)], self._first
        )

    def _contrast(self, tile: Tile) -> Tensor:
        views = tile.logits.split(len(tile.logits) // 3)
        every = torch.ones(len(views[0]), dtype=torch.bool, device=tile.logits.device)
        return self._kernels.contrast(*views, every, None, None, self._temperature)

    def contrast(self, where: Tensor) -> Tensor:
        shape = len(CONTRASTS), len(self.batch.targets)
        found = self.batch.targets.new_zeros(shape, dtype=self.hidden.head.accumulator)
        for some in self._pieces(self._index(POSITIVE, where), views=3):
            tile = self._three(some)
            found[:, some] = self._contrast(tile)
            del tile  # before the next is there
        return found

    def rows_that_may(self, earning: Tensor | None, size: int) -> list[Tensor]:
        """The rows of each view that a gradient may reach, after `statistics`; without a wait.

        Args:
            earning: (T,) bool, rows of completions whose anchor may have a gradient, and how many
                they are; None: all that were read.
        """
        own = self._read[ANCHOR] if earning is None else index_of(earning, size)
        selected = self._read.get(POSITIVE, own[:0])
        return [own, selected, selected]

    def rows_that_do(
        self, coefficients: Tensor, full: bool = False, detach_anchor: bool = False
    ) -> list[Tensor]:
        """The rows of each view whose coefficients (4, T) are not zero: a wait for the device.

        Args: as of `backward`.
        """
        own = (coefficients[OF_LOGP[ANCHOR]] != 0) | (coefficients[OF_ENTROPY[ANCHOR]] != 0)
        of_positive = coefficients[OF_LOGP[POSITIVE]] != 0
        if full and not detach_anchor:
            own &= ~of_positive
        masks = [own, of_positive, coefficients[OF_LOGP[NEGATIVE]] != 0]
        sizes = _on_host(torch.stack([mask.sum() for mask in masks]))
        return [index_of(mask, size) for mask, size in zip(masks, sizes, strict=True)]

    def backward(
        self,
        coefficients: Tensor,
        index: list[Tensor],
        full: bool = False,
        detach_anchor: bool = False,
    ) -> None:
        """Adds the gradients of rows.

        Args:
            coefficients: (4, T); a row whose coefficients are zero gets a gradient of zero.
            index: the rows of each view; no other one has a coefficient that is not zero.
            full: the third coefficient is the derivative with respect to the margin.
            detach_anchor: the margin's gradient stops at the anchor.
        """
        rest = []
        for view in (ANCHOR,) if full else (ANCHOR, NEGATIVE, POSITIVE):
            rows = Rows(view, index[view])
            if not len(rows.at) or not self.hidden.wants_logits(view):
                continue
            if rows.view not in self._kept:
                rest.append(rows)
                continue
            # The logits of a view go before those of the next get a gradient.
            for tile in self._kept_rows(rows):
                self._gradient(tile, coefficients)
                del tile
        for some in _filled(rest, self.hidden.head.rows_per_tile):
            tile = self.hidden.tile(some, self._first)
            self._token_stats(tile)
            self._gradient(tile, coefficients)
            del tile
        if full:
            self._gradient_of_three(index[POSITIVE], coefficients, detach_anchor)

    def kept(self, view: int) -> tuple[Tensor, Tensor]:
        """The logits of a view that `statistics` left for the backward, and what it saved."""
        tile = self._kept[view]
        assert tile.saved is not None
        return tile.logits, tile.saved

    def keep(self, view: int, logits: Tensor, saved: Tensor) -> None:
        """Brings those of all rows of a view, as another call had them."""
        rows = Rows(view, self._index(view, None))
        self._kept[view] = Tile([rows], self.hidden.states(rows, self._first), logits, saved)

    def _kept_rows(self, rows: Rows) -> Iterator[Tile]:
        """The rows of a tile that is still there: all of them, or copies of these."""
        tile = self._kept.pop(rows.view)
        if is_whole(len(rows.at), len(tile.logits)):
            yield tile
            return
        (kept,) = tile.rows
        place = torch.empty_like(self.batch.targets, dtype=torch.int64)
        place[kept.at] = torch.arange(len(kept.at), device=place.device)
        assert tile.saved is not None
        for some in self.hidden.head.split(rows.at):
            at = place[some]
            logits = self.hidden.head.rows_of(tile.logits, at)
            yield Tile([Rows(rows.view, some)], tile.hidden[at], logits, tile.saved[:, at])
            del logits

    def _gradient(self, tile: Tile, coefficients: Tensor) -> None:
        """Adds the gradients of a tile, whose logits become theirs."""

        def upstream(rows: Rows) -> tuple[Tensor, Tensor]:
            d_logps, of_entropy = (
                coefficients[OF_LOGP[rows.view], rows.at],
                OF_ENTROPY[rows.view],
            )
            if of_entropy is None:
                return d_logps, torch.zeros_like(d_logps)
            return d_logps, coefficients[of_entropy, rows.at]

        d_logps, d_entropy = map(torch.cat, zip(*map(upstream, tile.rows), strict=True))
        targets = self.batch.targets[torch.cat([rows.at for rows in tile.rows])]
        slope = self.hidden.head.slope(tile.logits)
        self._kernels.token_stats_backward_(
            d_logps,
            d_entropy if any(rows.view == ANCHOR for rows in tile.rows) else None,
            tile.logits,
            targets,
            None,
            None,
            tile.saved,
            self._temperature,
        )
        if slope is not None:
            tile.logits.mul_(slope)
        self.hidden.add(tile, self._first)

    def _gradient_of_three(self, index: Tensor, coefficients: Tensor, detach_anchor: bool) -> None:
        """Adds the gradients of rows that have a margin, in the three views together."""
        for some in self._pieces(index, views=3):
            tile = self._three(some)
            views = tile.logits.split(len(some))
            upstream = coefficients[:, some]
            if detach_anchor:
                upstream[:2] = 0  # of the anchor's own terms: they have rows of their own
            targets = self.batch.targets[some]
            saved = self._kernels.token_stats(
                views[ANCHOR], targets, None, None, self._temperature, False
            )[2]
            contrasts, slope = self._contrast(tile), self.hidden.head.slope(tile.logits)
            self._kernels.contrast_backward_(
                *views,
                targets,
                None,
                None,
                saved,
                contrasts,
                upstream,
                self._temperature,
                detach_anchor,
            )
            if slope is not None:
                tile.logits.mul_(slope)
            if detach_anchor:
                perturbed = slice(len(some), None)
                tile = Tile(tile.rows[1:], tile.hidden[perturbed], tile.logits[perturbed])
            self.hidden.add(tile, self._first)
            del tile, views, slope  # before the next is there


def _filled(rows: list[Rows], room: int) -> Iterator[list[Rows]]:
    """The rows in the fewest tiles of at most `room`, as equal as can be."""
    room = even(sum(len(some.at) for some in rows), room)
    tile: list[Rows] = []
    free = room
    for view, index in rows:
        while len(index):
            tile.append(Rows(view, index[:free]))
            index, free = index[free:], max(0, free - len(index))
            if not free:
                yield tile
                tile, free = [], room
    if tile:
        yield tile
