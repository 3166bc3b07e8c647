"""One call of `linear_cppo_loss`: which rows count, and the passes over them, tile by tile.

    statistics   of the anchor and the negative -> perception tokens -> of the positive at those
    loss         from the statistics, and its derivative by each of them
    gradients    of the rows whose derivative is not zero

Each works on a range of completions. A row is named by its place among the rows that count (n of
them), or among those of completions with perturbed views ("seeing" rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cppo.config import LossConfig
from cppo.ops.head import Head
from cppo.ops.library import COEFFICIENTS, CONFIG_FIELDS, STATS_SAVED
from cppo.records import Views

ANCHOR, POSITIVE, NEGATIVE, WEIGHT, BIAS = range(5)  # of `wants`; the views first
EVERY_VIEW = (ANCHOR, POSITIVE, NEGATIVE)
COEFFICIENT = {ANCHOR: 0, POSITIVE: 2, NEGATIVE: 3}  # row of the derivative by a view's logp
SAVED = {view: slice(3 * view, 3 * view + 3) for view in range(3)}  # rows of its statistics
# Logits that are still there, by view: of all rows of a range; of the positive, the selected ones.
Tiles = dict[int, Tensor]
# Of some rows of a view: the view, their places, the gradient of their logits, their hidden states.
Waiting = tuple[int, Tensor, Tensor, Tensor]


def _from_zero(counts: Tensor) -> Tensor:
    """Running sums, (n + 1,)."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _ends(targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where each completion begins, and the last one ends, (B + 1,) int64."""
    if cu_seqlens is not None:
        return cu_seqlens.to(targets.device, torch.int64)
    return torch.arange(targets.shape[0] + 1, device=targets.device) * targets.shape[1]


def _where(*masks: Tensor) -> list[Tensor]:
    """The places that each (n,) mask names; waits for the device once."""
    sizes = torch.stack([mask.sum() for mask in masks]).tolist()
    return [places_of(mask, size) for mask, size in zip(masks, sizes, strict=True)]


def places_of(counts: Tensor, size: int) -> Tensor:
    """Where (n,) is not zero, of which the host knows how often that is."""
    return torch.nonzero_static(counts, size=size)[:, 0]


class LinearBatch:
    """Rows, statistics, coefficients and gradients of one batch.

    Args:
        ops: the namespace of torch.ops whose ops on logits are used.
        views: hidden states, (B, L, D) or (T, D); the perturbed ones whole or compact.
        head: the LM head, with the sums of its gradients.
        targets, advantages, mask, cu_seqlens: as of `cppo.linear_cppo_loss`.
        temperature, gating: of the `LossConfig`.
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
    ) -> None:
        self.ops, self.head, self.temperature = ops, head, temperature
        self.advantages = advantages
        self.hidden = [None if view is None else view.reshape(-1, view.shape[-1]) for view in views]
        device, total = targets.device, targets.numel()
        ends = _ends(targets, cu_seqlens)
        sees = torch.zeros(len(ends) - 1, dtype=torch.bool, device=device)
        if views.negative is not None:
            sees = advantages > 0 if gating else torch.ones_like(sees)
        position = torch.arange(total, device=device)
        owner = torch.searchsorted(ends[1:], position, right=True)
        counts = torch.ones_like(position) if mask is None else mask.reshape(-1).long()
        # Of completion c: its rows among those that count, and among those of seeing completions.
        self.row_ends = _from_zero(counts)[ends]
        self.seeing_ends = _from_zero(self.row_ends.diff() * sees)
        # The one wait for the device here: sizes, and with them where every completion lies.
        self.starts, self.seeing_starts, host_ends = torch.stack(
            [self.row_ends, self.seeing_ends, ends]
        ).tolist()
        self.longest = max((b - a for a, b in pairwise(host_ends)), default=0)
        self.num_rows, self.num_completions = self.starts[-1], len(ends) - 1
        rows = position if mask is None else places_of(counts, self.num_rows)
        self.seeing = places_of(sees[owner[rows]], self.seeing_starts[-1])
        compact = sees[owner].cumsum(0) - 1
        self.rows = rows
        at = rows[self.seeing]
        self.view_rows = [
            rows,
            *(
                at if view is not None and len(view) == total else compact[at]
                for view in self.hidden[1:]
            ),
        ]
        self.targets = targets.reshape(-1)[rows].long()
        dtype = torch.promote_types(views.anchor.dtype, torch.float32)

        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.saved = new(3 * len(STATS_SAVED), self.num_rows)
        self.margin = new(self.num_rows)
        self.coefficients = new(len(COEFFICIENTS), self.num_rows)
        self.logps = [new(self.num_rows) for _ in range(3)]
        self.entropy = [new(self.num_rows) for _ in range(3)]
        self.selected = torch.zeros(self.num_rows, dtype=torch.bool, device=device)
        self.hidden_gradients: list[Tensor | None] = [None, None, None]
        # Gradients of few rows, which are multiplied together: a product costs a pass over the
        # gradient of the weight, however few rows it has.
        self.waiting: list[Waiting] = []
        self.rows_multiplied = self.num_selected = 0

    # Rows and tiles

    def range_of(self, first: int, last: int) -> Tensor:
        """The rows of the completions [first, last)."""
        begin, end = self.starts[first], self.starts[last]
        return torch.arange(begin, end, device=self.rows.device)

    def seeing_range(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Of the completions [first, last): the seeing rows, and their places among those."""
        begin, end = self.seeing_starts[first], self.seeing_starts[last]
        places = torch.arange(begin, end, device=self.rows.device)
        return self.seeing[begin:end], places

    def _hidden_at(self, view: int, places: Tensor) -> Tensor:
        hidden = self.hidden[view]
        assert hidden is not None
        return hidden[self.view_rows[view][places]]

    def _logits(self, view: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and logits of a view at some of its rows."""
        hidden = self._hidden_at(view, places)
        self.rows_multiplied += len(places)
        return hidden, self.head.logits(hidden)

    # Statistics

    def statistics(self, first: int, last: int, config: LossConfig, keep: tuple[int, ...]) -> Tiles:
        """Statistics and selection of a range; returns the logits of the views in `keep`."""
        tiles: Tiles = {}
        rows = self.range_of(first, last)
        self._stats_of(ANCHOR, rows, rows, keep, tiles)
        seeing, places = self.seeing_range(first, last)
        if self.hidden[NEGATIVE] is None:
            return tiles
        self._stats_of(NEGATIVE, seeing, places, keep, tiles)
        bounds = self.seeing_ends[first : last + 1]
        self.selected[seeing] = self.ops.perception_mask(
            self.entropy[ANCHOR][seeing],
            self.entropy[NEGATIVE][seeing],
            config.fraction,
            None,
            bounds - bounds[0],
        )
        if self.hidden[POSITIVE] is None:
            return tiles
        (chosen,) = _where(self.selected[seeing])
        self.num_selected += len(chosen)
        if config.divergence == "full":
            self._margins(seeing[chosen], places[chosen])
        else:
            self._stats_of(POSITIVE, seeing[chosen], places[chosen], keep, tiles)
        return tiles

    def _stats_of(
        self, view: int, rows: Tensor, places: Tensor, keep: tuple[int, ...], tiles: Tiles
    ) -> None:
        # Where others are kept there is a third of a tile left.
        room = max(1, self.head.rows_per_tile // 3) if keep else self.head.rows_per_tile
        step = max(1, len(rows)) if view in keep else room
        for some, where in zip(rows.split(step), places.split(step), strict=True):
            _, logits = self._logits(view, where)
            logps, entropy, saved = self.ops.token_stats(
                logits, self.targets[some], None, self.temperature, False
            )
            self.logps[view][some] = logps
            self.saved[SAVED[view], some] = saved
            self.entropy[view][some] = entropy
            if view in keep:
                tiles[view] = logits
            del logits  # before the next are there

    def _margins(self, rows: Tensor, places: Tensor) -> None:
        """KL(anchor || positive) - KL(anchor || negative) at the perception tokens."""
        for some, where in self._thirds(rows, places):
            logits = [self._logits(view, some if view == ANCHOR else where)[1] for view in range(3)]
            self.margin[some] = self._statistics_of_three(logits, some)[7]
            del logits

    def _statistics_of_three(self, logits: Sequence[Tensor], rows: Tensor) -> Tensor:
        """LOSS_SAVED of these rows' logits, with the margin: (8, rows)."""
        config = LossConfig(temperature=self.temperature, divergence="full", gating=False)
        options = [getattr(config, name) for name in CONFIG_FIELDS]
        one, ends = self._one_completion(rows)
        return self.ops.cppo_loss(
            *logits, self.targets[rows], one, None, None, None, ends, None, *options, False
        )[6]

    def _thirds(self, rows: Tensor, places: Tensor) -> Any:
        """Rows of which three views fit a tile."""
        step = max(1, self.head.rows_per_tile // 3)
        return zip(rows.split(step), places.split(step), strict=True)

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
        has_positive = self.hidden[POSITIVE] is not None and contrast
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

    def gradients(
        self, first: int, last: int, config: LossConfig, wants: list[bool], tiles: Tiles
    ) -> None:
        """Adds the gradients of a range to those of the views and of the head."""
        rows = self.range_of(first, last)
        seeing, places = self.seeing_range(first, last)
        anchor = self._counts(ANCHOR, rows)
        if config.divergence == "full" and self.hidden[POSITIVE] is not None:
            if not config.detach_anchor:
                anchor &= ~self._counts(POSITIVE, rows)
            contrasted, own = _where(self._counts(POSITIVE, seeing), anchor)
            self._contrast(seeing[contrasted], places[contrasted], config, wants)
            self._gradient_of(ANCHOR, rows[own], rows[own], wants, None, own)
            return
        masks = [self._counts(view, seeing) for view in (POSITIVE, NEGATIVE)]
        own, positive, negative = _where(anchor, *masks)
        # The logits of a view are let go of before those of the next get a gradient.
        self._gradient_of(ANCHOR, rows[own], rows[own], wants, tiles.pop(ANCHOR, None), own)
        if self.hidden[POSITIVE] is not None:
            kept = tiles.pop(NEGATIVE, None)
            self._gradient_of(NEGATIVE, seeing[negative], places[negative], wants, kept, negative)
            # Of the positive there are the logits of the selected rows.
            at = (self.selected[seeing].cumsum(0) - 1)[positive]
            kept = tiles.pop(POSITIVE, None)
            self._gradient_of(POSITIVE, seeing[positive], places[positive], wants, kept, at)

    def _counts(self, view: int, rows: Tensor) -> Tensor:
        """Which of the rows have a coefficient."""
        counts = self.coefficients[COEFFICIENT[view], rows] != 0
        return counts | (self.coefficients[1, rows] != 0) if view == ANCHOR else counts

    def _gradient_of(
        self,
        view: int,
        rows: Tensor,
        places: Tensor,
        wants: list[bool],
        kept: Tensor | None,
        at: Tensor,
    ) -> None:
        """`kept`: logits, overwritten, in which these rows lie at `at`; None: they are computed."""
        if not (wants[view] or wants[WEIGHT] or wants[BIAS]):
            return
        step = self.head.rows_per_tile if kept is None else max(1, len(rows))
        for some, where in zip(rows.split(step), places.split(step), strict=True):
            if not len(some):
                return
            d_entropy = self.coefficients[1, some] if view == ANCHOR else None
            if kept is None:
                # Statistics of these very logits: another GEMM rounds them in another way, and
                # what should cancel in the gradient would not.
                hidden, logits = self._logits(view, where)
                saved = self._saved_of(logits, some)
            else:
                hidden = self._hidden_at(view, where)
                logits = kept if len(at) == len(kept) else self.head.rows_of(kept, at)
                saved = self.saved[SAVED[view], some]
            slope = self.head.slope(logits)
            d_logps = self.coefficients[COEFFICIENT[view], some]
            self.ops.token_stats_backward_(
                d_logps, d_entropy, logits, self.targets[some], None, saved, self.temperature
            )
            self._add(view, where, logits, hidden, wants, slope)
            del logits, slope

    def _contrast(
        self, rows: Tensor, places: Tensor, config: LossConfig, wants: list[bool]
    ) -> None:
        """The three views together, with the full divergence."""
        for some, where in self._thirds(rows, places):
            if not len(some):
                return
            at = [some, where, where]
            hidden, logits = zip(*(self._logits(view, at[view]) for view in range(3)), strict=True)
            one, ends = self._one_completion(some)
            coefficients = self.coefficients[:, some]
            if config.detach_anchor:
                coefficients[:2] = 0
            saved = self._statistics_of_three(logits, some)
            slopes = [self.head.slope(tile) for tile in logits]
            self.ops.cppo_loss_backward_(
                self.coefficients.new_ones(()),
                *logits,
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
            for view in range(3):
                if view != ANCHOR or not config.detach_anchor:
                    self._add(view, at[view], logits[view], hidden[view], wants, slopes[view])
            del logits, slopes

    def _saved_of(self, logits: Tensor, rows: Tensor) -> Tensor:
        targets = self.targets[rows]
        return self.ops.token_stats(logits, targets, None, self.temperature, False)[2]

    def _add(
        self,
        view: int,
        places: Tensor,
        grad_logits: Tensor,
        hidden: Tensor,
        wants: list[bool],
        slope: Tensor | None,
    ) -> None:
        if slope is not None:
            grad_logits.mul_(slope)
        self.rows_multiplied += len(places) * (wants[view] + wants[WEIGHT])
        item = (view, places, grad_logits, hidden)
        room = self.head.rows_per_tile // 4
        if len(places) > room:
            self._multiply([item], wants)
            return
        if sum(len(other[1]) for other in self.waiting) + len(places) > room:
            self.flush(wants)
        self.waiting.append(item)

    def flush(self, wants: list[bool]) -> None:
        """Multiplies the gradients that wait."""
        waiting, self.waiting = self.waiting, []
        if waiting:
            self._multiply(waiting, wants)

    def _multiply(self, items: list[Waiting], wants: list[bool]) -> None:
        views, places, tiles, hidden = zip(*items, strict=True)
        wanted = any(wants[view] for view in views)
        gradients = self.head.backward(self.head.stacked(list(tiles)), torch.cat(hidden), wanted)
        if gradients is None:
            return
        parts = gradients.split([len(at) for at in places])
        for view, at, gradient in zip(views, places, parts, strict=True):
            if wants[view]:
                self._place(view, at, gradient)

    def _place(self, view: int, places: Tensor, gradient: Tensor) -> None:
        source = self.hidden[view]
        assert source is not None
        total = self.hidden_gradients[view]
        if total is None:
            total = torch.zeros_like(source, dtype=self.logps[0].dtype)
            self.hidden_gradients[view] = total
        # A row has one gradient of the policy terms, and perhaps another of the contrastive one.
        total[self.view_rows[view][places]] += gradient

    def backward_rows(self, config: LossConfig, wants: list[bool]) -> Tensor:
        """Rows that a recomputing backward will multiply, once for each product."""
        products = [1 + wants[view] + wants[WEIGHT] for view in range(3)]
        rows = torch.arange(self.num_rows, device=self.rows.device)
        counts = [self._counts(view, rows) for view in range(3)]
        if config.divergence == "full":
            own = counts[ANCHOR] if config.detach_anchor else counts[ANCHOR] & ~counts[POSITIVE]
            return counts[POSITIVE].sum() * sum(products) + own.sum() * products[ANCHOR]
        return torch.stack([n.sum() * k for n, k in zip(counts, products, strict=True)]).sum()
