"""Hidden states of the views: their logits, some rows at a time, and the sums of their gradients.

Three numberings of rows meet here:

    rows of the batch       (T,)   targets, masks, coefficients, and hidden states of a whole view
    rows of a view          where `Batch.places` has them; a compact view holds gated rows alone
    rows of a tile          (n,)   `Rows.at` says which row of its part of the batch each one is
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cppo.fused.head import Head

WEIGHT, BIAS = 3, 4  # of `wants`, after the views


class Rows(NamedTuple):
    """Some rows of a view: their places in a part of the batch, (n,)."""

    view: int
    at: Tensor


@dataclass
class Tile:
    """Logits of rows that are multiplied together.

    Args:
        rows: whose rows, in order.
        hidden, logits: (n, D) and (n, V); the logits become their gradient.
        saved: (3, n), what `token_stats` saved of these very logits: another GEMM rounds them in
            another way, and what should cancel in the gradient would not.
    """

    rows: list[Rows]
    hidden: Tensor
    logits: Tensor
    saved: Tensor | None = None


class Hidden:
    """The hidden states of the views, and the sums of their gradients and the head's.

    Args:
        head: the LM head.
        views: (rows, D) each, or None.
        places: of each view, as `Batch.places`.
        wants: which gradients are wanted: of anchor, positive, negative, weight, bias.
    """

    def __init__(
        self,
        head: Head,
        views: list[Tensor | None],
        places: list[Tensor | None],
        wants: list[bool],
    ) -> None:
        self.head, self.wants = head, wants
        self._views, self._places = views, places
        self._gradients: list[Tensor | None] = [None, None, None]
        self.rows_multiplied: int | Tensor = 0
        # Gradients of few rows, which are multiplied together: a product costs a pass over the
        # gradient of the weight, however few rows it has.
        self._waiting: list[tuple[Tile, int]] = []

    def has(self, view: int) -> bool:
        return self._views[view] is not None

    def wants_logits(self, view: int) -> bool:
        """Whether logits of this view need a gradient."""
        return self.wants[view] or self.wants[WEIGHT] or self.wants[BIAS]

    def _view(self, view: int) -> Tensor:
        hidden = self._views[view]
        assert hidden is not None, view
        return hidden

    def _at(self, rows: Rows, first: int) -> Tensor:
        """Where the rows lie in their view."""
        places, index = self._places[rows.view], rows.at + first if first else rows.at
        return index if places is None else places[index]

    def states(self, rows: Rows, first: int) -> Tensor:
        """The hidden states of rows of the part of the batch that begins at row `first`."""
        return self._view(rows.view)[self._at(rows, first)]

    def tile(self, rows: list[Rows], first: int) -> Tile:
        """The logits of rows of the part of the batch that begins at row `first`."""
        states = [self.states(some, first) for some in rows]
        hidden = torch.cat(states) if len(states) > 1 else states[0]
        self.rows_multiplied += len(hidden)
        return Tile(rows, hidden, self.head.logits(hidden))

    def add(self, tile: Tile, first: int) -> None:
        """Adds the gradients that these gradients of logits give, now or with later ones."""
        for view, index in tile.rows:
            self.rows_multiplied += len(index) * (self.wants[view] + self.wants[WEIGHT])
        room = self.head.rows_per_tile // 4
        if len(tile.logits) > room:
            self._multiply([(tile, first)])
            return
        if sum(len(other.logits) for other, _ in self._waiting) + len(tile.logits) > room:
            self._flush()
        self._waiting.append((tile, first))

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._multiply(waiting)

    def _multiply(self, tiles: list[tuple[Tile, int]]) -> None:
        rows = [(some, first) for tile, first in tiles for some in tile.rows]
        gradients = self.head.backward(
            self.head.stacked([tile.logits for tile, _ in tiles]),
            torch.cat([tile.hidden for tile, _ in tiles]),
            any(self.wants[some.view] for some, _ in rows),
        )
        if gradients is None:
            return
        sizes = [len(some.at) for some, _ in rows]
        for (some, first), gradient in zip(rows, gradients.split(sizes), strict=True):
            if self.wants[some.view]:
                self._gradient_of(some.view)[self._at(some, first)] = gradient

    def _gradient_of(self, view: int) -> Tensor:
        gradient = self._gradients[view]
        if gradient is None:
            gradient = torch.zeros_like(self._view(view), dtype=self.head.accumulator)
            self._gradients[view] = gradient
        return gradient

    def gradients(
        self, inputs: tuple[Tensor | None, ...], wants: list[bool], dtype: torch.dtype
    ) -> list[Tensor]:
        """Those of the views, weight and bias, shaped like `inputs`; empty where none is wanted."""
        self._flush()
        sums = [*self._gradients, self.head.grad_weight, self.head.grad_bias]
        found = []
        for total, like, want in zip(sums, inputs, wants, strict=True):
            if like is None or not want:
                found.append(self.head.weight.new_empty(0, dtype=dtype))
            elif total is None:
                found.append(torch.zeros(like.shape, dtype=dtype, device=like.device))
            else:
                found.append(total.view(like.shape).to(dtype))
        return found
