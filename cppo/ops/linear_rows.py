"""Rows of a batch's views on their way through the LM head, and the sums of their gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cppo.ops.head import Head

ANCHOR, POSITIVE, NEGATIVE, WEIGHT, BIAS = range(5)  # of `wants`; the views first
Part = tuple[int, Tensor, Tensor]  # a view, some rows, and their places among those that it has


@dataclass
class Stack:
    """Rows of one or several views in one tile, for one product.

    Args:
        parts: whose rows, in order.
        hidden, logits: (n, D) and (n, V); the logits become their gradient.
        saved: (3, n), what `token_stats` saves of these very logits: another GEMM rounds them in
            another way, and what should cancel in the gradient would not. None: they are the
            gradient already.
    """

    parts: list[Part]
    hidden: Tensor
    logits: Tensor
    saved: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        return torch.cat([rows for _, rows, _ in self.parts])


def stacks(parts: list[Part], room: int) -> Iterator[list[Part]]:
    """The parts in pieces of `room` rows."""
    piece: list[Part] = []
    free = room
    for view, rows, places in parts:
        while len(rows):
            piece.append((view, rows[:free], places[:free]))
            rows, places, free = rows[free:], places[free:], max(0, free - len(rows))
            if not free:
                yield piece
                piece, free = [], room
    if piece:
        yield piece


class ViewRows:
    """The hidden states of the views.

    Args:
        head: the LM head, with the sums of its gradients.
        hidden: (n, D) of each view, or None.
        places: (view) to where the rows lie that it has; asked once, when they are needed.
        wants: gradients of anchor, positive, negative, weight, bias.
    """

    def __init__(
        self,
        head: Head,
        hidden: list[Tensor | None],
        places: Callable[[int], Tensor],
        wants: list[bool],
    ) -> None:
        self.head, self.wants = head, wants
        self._hidden, self._at = hidden, functools.cache(places)
        self.gradients: list[Tensor | None] = [None, None, None]
        self.rows_multiplied = 0
        # Gradients of few rows, which are multiplied together: a product costs a pass over the
        # gradient of the weight, however few rows it has.
        self._waiting: list[Stack] = []

    def hidden_at(self, view: int, places: Tensor) -> Tensor:
        hidden = self._hidden[view]
        assert hidden is not None
        return hidden[self._at(view)[places]]

    def logits(self, hidden: Tensor) -> Tensor:
        self.rows_multiplied += len(hidden)
        return self.head.logits(hidden)

    def stack(self, parts: list[Part]) -> Stack:
        """The logits of these rows, in one product."""
        hidden = torch.cat([self.hidden_at(view, places) for view, _, places in parts])
        return Stack(parts, hidden, self.logits(hidden))

    def wants_logits(self, view: int) -> bool:
        """Whether logits of this view need a gradient."""
        return self.wants[view] or self.wants[WEIGHT] or self.wants[BIAS]

    def add(self, stack: Stack) -> None:
        """Multiplies what are gradients of logits by now, or lets them wait for others."""
        for view, rows, _ in stack.parts:
            self.rows_multiplied += len(rows) * (self.wants[view] + self.wants[WEIGHT])
        room = self.head.rows_per_tile // 4
        if len(stack.logits) > room:
            self._multiply([stack])
            return
        if sum(len(other.logits) for other in self._waiting) + len(stack.logits) > room:
            self.flush()
        self._waiting.append(stack)

    def flush(self) -> None:
        """Multiplies the gradients that wait."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._multiply(waiting)

    def _multiply(self, some: list[Stack]) -> None:
        parts = [part for stack in some for part in stack.parts]
        gradients = self.head.backward(
            self.head.stacked([stack.logits for stack in some]),
            torch.cat([stack.hidden for stack in some]),
            any(self.wants[view] for view, *_ in parts),
        )
        if gradients is None:
            return
        sizes = [len(rows) for _, rows, _ in parts]
        for (view, _, places), gradient in zip(parts, gradients.split(sizes), strict=True):
            if self.wants[view]:
                self._place(view, places, gradient)

    def _place(self, view: int, places: Tensor, gradient: Tensor) -> None:
        source = self._hidden[view]
        assert source is not None
        total = self.gradients[view]
        if total is None:
            total = torch.zeros_like(source, dtype=self.head.accumulator)
            self.gradients[view] = total
        # A row has one gradient of the policy terms, and perhaps another of the contrastive one.
        total[self._at(view)[places]] += gradient
