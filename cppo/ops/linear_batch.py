"""One call of `linear_cppo_loss`: which rows count, and the passes over them, tile by tile.

    statistics   of the anchor and the negative -> perception tokens -> of the positive at those
    loss         from the statistics, and its derivative by each of them
    gradients    of the rows whose derivative is not zero

Each works on a range of completions. A row is named by its place among the rows that count (n of
them), or among those of completions with perturbed views ("seeing" rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cppo.config import LossConfig
from cppo.ops.head import Head
from cppo.ops.library import COEFFICIENTS, CONFIG_FIELDS, STATS_SAVED
from cppo.records import Views

ANCHOR, POSITIVE, NEGATIVE, WEIGHT, BIAS = range(5)  # of `wants`; the views first
COEFFICIENT = {ANCHOR: 0, POSITIVE: 2, NEGATIVE: 3}  # row of the derivative by a view's logp
SAVED = {view: slice(3 * view, 3 * view + 3) for view in range(3)}  # rows of its statistics
# Logits that are still there, by view: of all rows of a range; of the positive, the selected ones.
Tiles = dict[int, Tensor]


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
        if cu_seqlens is None:
            lengths = [targets.shape[1]] * targets.shape[0]
            self.longest = targets.shape[1]
        else:
            lengths = cu_seqlens.diff().tolist()
            self.longest = max(lengths, default=0)
        device, total = targets.device, targets.numel()
        owner = torch.arange(len(lengths), device=device).repeat_interleave(
            torch.tensor(lengths, dtype=torch.int64, device=device), output_size=total
        )
        everything = torch.arange(total, device=device)
        rows = everything if mask is None else mask.reshape(-1).nonzero()[:, 0]
        owner_of_row = owner[rows]
        counts = torch.bincount(owner_of_row, minlength=len(lengths)).tolist()
        self.starts = [0, *accumulate(counts)]
        self.num_rows, self.num_completions = len(rows), len(lengths)

        sees = torch.zeros(len(lengths), dtype=torch.bool, device=device)
        if views.negative is not None:
            sees = advantages > 0 if gating else torch.ones_like(sees)
        seeing = sees[owner_of_row]
        self.seeing = seeing.nonzero()[:, 0]
        looks = sees.tolist()
        self.seeing_starts = [
            0,
            *accumulate(n if look else 0 for n, look in zip(counts, looks, strict=True)),
        ]
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
        self.rows_multiplied = 0

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

    def statistics(self, first: int, last: int, config: LossConfig, keep: bool) -> Tiles:
        """Statistics and selection of a range; returns the logits with `keep`."""
        tiles: Tiles = {}
        rows = self.range_of(first, last)
        self._stats_of(ANCHOR, rows, rows, keep, tiles)
        seeing, places = self.seeing_range(first, last)
        if self.hidden[NEGATIVE] is None:
            return tiles
        self._stats_of(NEGATIVE, seeing, places, keep, tiles)
        bounds = torch.tensor(self.seeing_starts[first : last + 1], device=rows.device)
        self.selected[seeing] = self.ops.perception_mask(
            self.entropy[ANCHOR][seeing],
            self.entropy[NEGATIVE][seeing],
            config.fraction,
            None,
            bounds - bounds[0],
        )
        if self.hidden[POSITIVE] is None:
            return tiles
        chosen = self.selected[seeing]
        if config.divergence == "full":
            self._margins(seeing[chosen], places[chosen])
        else:
            self._stats_of(POSITIVE, seeing[chosen], places[chosen], keep, tiles)
        return tiles

    def _stats_of(self, view: int, rows: Tensor, places: Tensor, keep: bool, tiles: Tiles) -> None:
        step = max(1, len(rows)) if keep else self.head.rows_per_tile
        for some, where in zip(rows.split(step), places.split(step), strict=True):
            _, logits = self._logits(view, where)
            logps, entropy, saved = self.ops.token_stats(
                logits, self.targets[some], None, self.temperature, False
            )
            self.logps[view][some] = logps
            self.saved[SAVED[view], some] = saved
            self.entropy[view][some] = entropy
            if keep:
                tiles[view] = logits

    def _margins(self, rows: Tensor, places: Tensor) -> None:
        """KL(anchor || positive) - KL(anchor || negative) at the perception tokens."""
        for some, where in self._thirds(rows, places):
            logits = [self._logits(view, some if view == ANCHOR else where)[1] for view in range(3)]
            self.margin[some] = self._statistics_of_three(logits, some)[7]

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
        ends = torch.tensor([0, len(rows)], device=rows.device)
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
    ) -> tuple[Tensor, Tensor]:
        """Loss and metrics of a range; fills its coefficients. old, ref: (n,) of the rows."""
        part = slice(self.starts[first], self.starts[last])
        device = self.rows.device
        bounds = torch.tensor(self.starts[first : last + 1]) - self.starts[first]
        has_positive = self.hidden[POSITIVE] is not None
        full = config.divergence == "full"

        def host(values: Tensor | None) -> Tensor | None:
            # A few numbers per row, and the extension has the arithmetic.
            return None if values is None else values[part].cpu()

        loss, metrics, coefficients = torch.ops.cppo.loss_terms(
            host(self.logps[ANCHOR]),
            host(self.entropy[ANCHOR]),
            host(self.logps[POSITIVE]) if has_positive and not full else None,
            host(self.logps[NEGATIVE]) if has_positive and not full else None,
            host(self.margin) if has_positive and full else None,
            host(self.selected),
            self.advantages[first:last].cpu(),
            host(old_logps),
            host(ref_logps),
            bounds,
            *by,
            *(getattr(config, name) for name in CONFIG_FIELDS),
        )
        self.coefficients[:, part] = coefficients.to(device)
        return loss.to(device), metrics.to(device)

    # Gradients

    def gradients(
        self, first: int, last: int, config: LossConfig, wants: list[bool], tiles: Tiles
    ) -> None:
        """Adds the gradients of a range to those of the views and of the head."""
        rows = self.range_of(first, last)
        seeing, places = self.seeing_range(first, last)
        chosen = self.selected[seeing]
        if config.divergence == "full" and self.hidden[POSITIVE] is not None:
            contrasted = self.coefficients[2, seeing] != 0
            self._contrast(seeing[contrasted], places[contrasted], config, wants)
            if not config.detach_anchor:
                rows = rows[self.coefficients[2, rows] == 0]
            self._gradient_of(ANCHOR, rows, rows, wants, None)
            return
        self._gradient_of(ANCHOR, rows, rows, wants, tiles.get(ANCHOR))
        if self.hidden[POSITIVE] is not None:
            selected = (seeing[chosen], places[chosen])
            self._gradient_of(POSITIVE, *selected, wants, tiles.get(POSITIVE))
            self._gradient_of(NEGATIVE, seeing, places, wants, tiles.get(NEGATIVE))

    def _active(self, view: int, rows: Tensor) -> Tensor:
        """The places among `rows` of those with a coefficient."""
        counts = self.coefficients[COEFFICIENT[view], rows] != 0
        if view == ANCHOR:
            counts = counts | (self.coefficients[1, rows] != 0)
        return counts.nonzero()[:, 0]

    def _gradient_of(
        self, view: int, rows: Tensor, places: Tensor, wants: list[bool], kept: Tensor | None
    ) -> None:
        """`kept`: the logits of these rows, which are overwritten; None: they are computed."""
        if not (wants[view] or wants[WEIGHT] or wants[BIAS]):
            return
        active = self._active(view, rows)
        step = max(1, len(active)) if kept is not None else self.head.rows_per_tile
        for part in active.split(step) if len(active) else ():
            some, where = rows[part], places[part]
            d_entropy = self.coefficients[1, some] if view == ANCHOR else None
            if kept is None:
                # Statistics of these very logits: another GEMM rounds them in another way, and
                # what should cancel in the gradient would not.
                hidden, logits = self._logits(view, where)
                saved = self._saved_of(logits, some)
            else:
                hidden = self._hidden_at(view, where)
                logits = kept if len(part) == len(rows) else kept[part]
                saved = self.saved[SAVED[view], some]
            d_logps = self.coefficients[COEFFICIENT[view], some]
            self.ops.token_stats_backward_(
                d_logps, d_entropy, logits, self.targets[some], None, saved, self.temperature
            )
            self._add(view, where, logits, hidden, wants)

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
                coefficients = coefficients * (coefficients.new_tensor([0, 0, 1, 1])[:, None])
            self.ops.cppo_loss_backward_(
                self.coefficients.new_ones(()),
                *logits,
                self.targets[some],
                one,
                ends,
                self._statistics_of_three(logits, some),
                coefficients,
                self.temperature,
                "full",
                False,
                config.detach_anchor,
            )
            for view in range(3):
                if view != ANCHOR or not config.detach_anchor:
                    self._add(view, at[view], logits[view], hidden[view], wants)

    def _saved_of(self, logits: Tensor, rows: Tensor) -> Tensor:
        targets = self.targets[rows]
        return self.ops.token_stats(logits, targets, None, self.temperature, False)[2]

    def _add(
        self, view: int, places: Tensor, grad_logits: Tensor, hidden: Tensor, wants: list[bool]
    ) -> None:
        gradient = self.head.backward(grad_logits, hidden, wants[view])
        self.rows_multiplied += len(places) * (wants[view] + wants[WEIGHT])
        if gradient is None:
            return
        source = self.hidden[view]
        assert source is not None
        total = self.hidden_gradients[view]
        if total is None:
            total = torch.zeros_like(source, dtype=self.logps[0].dtype)
            self.hidden_gradients[view] = total
        total[self.view_rows[view][places]] = gradient

    def backward_rows(self, config: LossConfig, wants: list[bool]) -> int:
        """Rows that a recomputing backward will multiply, once for each product."""
        products = [1 + wants[view] + wants[WEIGHT] for view in range(3)]
        together = 0
        rows = torch.arange(self.num_rows, device=self.rows.device)
        if config.divergence == "full":
            together = int((self.coefficients[2] != 0).sum())
            own = rows if config.detach_anchor else rows[self.coefficients[2] == 0]
            return together * sum(products) + len(self._active(ANCHOR, own)) * products[ANCHOR]
        active = [len(self._active(view, rows)) for view in range(3)]
        return sum(n * k for n, k in zip(active, products, strict=True))
