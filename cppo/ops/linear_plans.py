"""How the ops on hidden states compute: the plans of `cppo.ops.linear_library`.

Every function takes the namespace of the ops on logits first, then the arguments of its schema.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cppo import reference
from cppo.config import LossConfig
from cppo.ops.head import Head
from cppo.ops.library import COEFFICIENTS, METRICS, accumulator
from cppo.ops.linear_batch import EVERY_VIEW, LinearBatch
from cppo.ops.linear_rows import ANCHOR, NEGATIVE, POSITIVE
from cppo.records import NumItems, Views


class _Loss:
    """One call of the loss: the batch, and what it returns."""

    def __init__(self, ops: Any, inputs: tuple[Any, ...]) -> None:
        anchor, positive, negative, weight, bias, targets, advantages = inputs[:7]
        old_logps, ref_logps, mask, cu_seqlens, num_items = inputs[7:12]
        *options, softcap, wants = inputs[12:]
        self.config, self.wants = LossConfig(*options), list(wants)
        self.num_items, self.targets = num_items, targets
        self.head = Head(weight, bias, softcap, self.wants[3], self.wants[4])
        self.batch = LinearBatch(
            ops,
            Views(anchor, positive, negative),
            self.head,
            targets,
            advantages,
            mask,
            cu_seqlens,
            self.config.temperature,
            self.config.gating,
            self.wants,
        )

        def at_rows(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.reshape(-1)[self.batch.rows]

        self.old_logps, self.ref_logps = at_rows(old_logps), at_rows(ref_logps)

    @cached_property
    def given(self) -> Any:
        """The num_items of the caller, as numbers."""
        if self.num_items is None:
            return None
        whole, completions, tokens, selected = self.num_items.tolist()
        parts = NumItems(completions, tokens, None if math.isnan(selected) else selected)
        return parts if math.isnan(whole) else whole

    @property
    def knows_denominators(self) -> bool:
        """Before anything is selected."""
        if not self.batch.has_positive or self.config.cpl_reduction == "sequence":
            return True
        return isinstance(self.given, NumItems) and self.given.selected is not None

    def denominators(self, num_selected: int) -> tuple[float, float]:
        """What the policy terms and the contrastive term are divided by."""
        policy, contrast = reference._denominators(
            self.batch.num_rows,
            self.batch.num_completions,
            torch.tensor(num_selected, dtype=torch.float64),
            self.batch.longest,
            self.given,
            self.config,
        )
        return float(policy), float(contrast)

    def nothing(self) -> tuple[Tensor, Tensor]:
        """Loss and metrics before the first completion."""
        like = self.batch.saved
        return like.new_zeros(()), like.new_zeros(len(METRICS))

    def reduce(
        self, first: int, last: int, by: tuple[float, float], contrast: bool = True
    ) -> tuple[Tensor, Tensor]:
        values = (self.old_logps, self.ref_logps)
        return self.batch.loss(first, last, *values, by, self.config, contrast)

    def outputs(
        self, loss: Tensor, metrics: Tensor, rows: int | Tensor, resident: int
    ) -> list[Tensor]:
        """What every plan returns first; `rows`: rows multiplied, once for each product;
        `resident`: rows whose gradients needed no logits but the first."""
        batch = self.batch
        num_selected = batch.selected.sum()
        metrics[5] = num_selected / max(1, len(batch.seeing))
        plan = [metrics.new_zeros(()) + count for count in (rows, resident)]

        def spread(values: Tensor) -> Tensor:
            flat = values.new_zeros(self.targets.numel())
            flat[batch.rows] = values
            return flat.view(self.targets.shape)

        return [
            loss,
            spread(batch.logps[0]),
            spread(batch.entropy[0]),
            spread(batch.selected),
            torch.cat([metrics, torch.stack(plan)]),
            num_selected,
        ]


def _groups(starts: list[int], room: int) -> Iterator[tuple[int, int, bool]]:
    """Ranges of completions whose rows fit into `room`; False: one completion that does not.

    starts: where the rows of every completion begin, and the last ones end.
    """
    first = 0
    for completion in range(len(starts) - 1):
        if first < completion and starts[completion + 1] - starts[first] > room:
            yield first, completion, starts[completion] - starts[first] <= room
            first = completion
    if first < len(starts) - 1:
        yield first, len(starts) - 1, starts[-1] - starts[first] <= room


def linear_cppo_loss(ops: Any, *inputs: Any) -> tuple[Tensor, ...]:
    """The recompute plan: statistics, loss, coefficients."""
    loss = _Loss(ops, inputs)
    batch, config = loss.batch, loss.config
    last = batch.num_completions
    batch.statistics(0, last, config, keep=())
    value, metrics = loss.reduce(0, last, loss.denominators(batch.num_selected))
    rows = batch.views.rows_multiplied + batch.backward_rows(config)
    outputs = loss.outputs(value, metrics, rows, resident=0)

    wide = batch.coefficients.new_zeros(len(COEFFICIENTS), loss.targets.numel())
    wide[:, batch.rows] = batch.coefficients
    return *outputs, wide


def linear_cppo_loss_backward(
    ops: Any,
    grad_loss: Tensor,
    anchor: Tensor,
    positive: Tensor | None,
    negative: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    coefficients: Tensor,
    temperature: float,
    divergence: str,
    gating: bool,
    detach_anchor: bool,
    softcap: float | None,
    wants: list[bool],
) -> tuple[Tensor, ...]:
    head = Head(weight, bias, softcap, wants[3], wants[4])
    views = Views(anchor, positive, negative)
    batch = LinearBatch(
        ops, views, head, targets, advantages, mask, cu_seqlens, temperature, gating, wants
    )
    batch.coefficients = coefficients[:, batch.rows] * grad_loss
    batch.selected = batch.coefficients[2] != 0
    config = LossConfig(
        temperature=temperature, divergence=divergence, detach_anchor=detach_anchor, gating=gating
    )
    batch.gradients(0, batch.num_completions, config, {})
    return _gradients_of(batch, (anchor, positive, negative, weight, bias), cast=True)


def linear_cppo_loss_gradients(ops: Any, *inputs: Any) -> tuple[Tensor, ...]:
    """Loss and gradients at once, by the plan that multiplies the fewest rows."""
    loss = _Loss(ops, inputs)
    batch, config = loss.batch, loss.config
    # At most so many rows are selected.
    selected = config.fraction * len(batch.seeing)
    if loss.knows_denominators:
        value, metrics, resident = _resident(loss)
    elif config.detach_anchor or 2 * selected < batch.num_rows:
        value, metrics, resident = _deferred(loss)
    else:
        value, metrics, resident = _again(loss)
    gradients = _gradients_of(batch, inputs[:5], cast=False)
    return *loss.outputs(value, metrics, batch.views.rows_multiplied, resident), *gradients


def _resident(loss: _Loss) -> tuple[Tensor, Tensor, int]:
    """Loss, metrics and how many rows were resident; group by group."""
    batch = loss.batch
    by = loss.denominators(0)
    # The rows of the positive come on top of those of anchor and negative; they are the fewest.
    starts = [a + b for a, b in zip(batch.starts, batch.seeing_starts, strict=True)]
    total, metrics = loss.nothing()
    for first, last, fits in _groups(starts, batch.head.rows_per_tile):
        tiles = batch.statistics(first, last, loss.config, EVERY_VIEW if fits else ())
        value, part = loss.reduce(first, last, by)
        total, metrics = total + value, metrics + part
        batch.gradients(first, last, loss.config, tiles)
    return total, metrics, batch.num_rows


def _deferred(loss: _Loss) -> tuple[Tensor, Tensor, int]:
    """The policy terms group by group; when all is selected, the contrastive term."""
    batch, config = loss.batch, loss.config
    room = batch.head.rows_per_tile
    by, sent = None, None
    for first, last, fits in _groups(batch.starts, max(1, room - room // 3)):
        keep = (ANCHOR,) if fits else ()
        tiles = batch.read(first, last, keep)
        by = by or loss.denominators(0)
        loss.reduce(first, last, by, contrast=False)
        # While a GPU multiplies the negative, the host learns which rows have a gradient; and
        # while it multiplies the last gradients, how many tokens are selected.
        counted = batch.count(first, last)
        batch.select(first, last, config, keep, tiles)
        sent = batch.selected_starts() if last == batch.num_completions else None
        batch.gradients(first, last, config, tiles, counted)
    policy = batch.coefficients.clone()
    starts = (sent or batch.selected_starts()).tolist()
    by = loss.denominators(starts[-1])
    views = (NEGATIVE, POSITIVE) if config.detach_anchor else (ANCHOR, NEGATIVE, POSITIVE)
    together = all(batch.views.wants_logits(view) for view in views)
    total, metrics = loss.nothing()
    for first, last, fits in _groups(starts, room // len(views)):
        size = starts[last] - starts[first]
        stack = batch.contrast(first, last, size, views) if fits and together else None
        if stack is None:
            batch.compare(first, last, config, (), {})
        value, part = loss.reduce(first, last, by)
        total, metrics = total + value, metrics + part
        rows = slice(batch.starts[first], batch.starts[last])
        contrast = batch.coefficients[:, rows] - policy[:, rows]
        batch.coefficients[:, rows] = torch.where(batch.selected[rows], contrast, 0.0)
        if stack is None:
            batch.gradients(first, last, config, {})
        else:
            batch.gradient(stack)
        del stack  # before the next is there
    return total, metrics, batch.num_rows - starts[-1]


def _again(loss: _Loss) -> tuple[Tensor, Tensor, int]:
    """All statistics, then all gradients."""
    batch, last = loss.batch, loss.batch.num_completions
    batch.statistics(0, last, loss.config, keep=())
    value, metrics = loss.reduce(0, last, loss.denominators(batch.num_selected))
    batch.gradients(0, last, loss.config, {})
    return value, metrics, 0


def _gradients_of(
    batch: LinearBatch, inputs: tuple[Tensor | None, ...], cast: bool
) -> tuple[Tensor, ...]:
    """Gradients of the inputs that want one, empty tensors for the others."""
    batch.views.flush()
    sums = [*batch.views.gradients, batch.head.grad_weight, batch.head.grad_bias]
    found = []
    first = inputs[0]
    assert first is not None
    dtype = first.dtype if cast else batch.saved.dtype
    for total, like, want in zip(sums, inputs, batch.views.wants, strict=True):
        if like is None or not want:
            found.append(batch.saved.new_empty(0, dtype=dtype))
            continue
        if total is None:
            found.append(torch.zeros(like.shape, dtype=dtype, device=like.device))
        else:
            found.append(total.view(like.shape).to(dtype))
    return tuple(found)


def linear_token_stats(
    ops: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    head = Head(weight, bias, softcap)
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    rows = _counting(targets, mask)
    dtype = accumulator(hidden)
    logps, entropy = (hidden.new_zeros(targets.numel(), dtype=dtype) for _ in range(2))
    for some in head.split(rows):
        logits = head.logits(flat[some])
        logps[some], entropy[some], _ = ops.token_stats(logits, ids[some], None, temperature, False)
        del logits  # before the next are there
    return logps.view(targets.shape), entropy.view(targets.shape)


def _counting(targets: Tensor, mask: Tensor | None) -> Tensor:
    """The flat positions of the rows that count."""
    if mask is None:
        return torch.arange(targets.numel(), device=targets.device)
    return mask.reshape(-1).nonzero()[:, 0]


def linear_token_stats_backward(
    ops: Any,
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
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(weight, bias, softcap, wants[1], wants[2])
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    rows = _counting(targets, mask)
    gradient = hidden.new_zeros(flat.shape) if wants[0] else hidden.new_empty(0)
    upstream = [None if g is None else g.reshape(-1)[rows] for g in (grad_logps, grad_entropy)]
    counts = torch.zeros_like(rows, dtype=torch.bool)
    for values in upstream:
        if values is not None:
            counts |= values != 0
    active = counts.nonzero()[:, 0]
    for part in head.split(active):
        some = rows[part]
        states = flat[some]
        logits = head.logits(states)
        saved = ops.token_stats(logits, ids[some], None, temperature, False)[2]
        d_logps, d_entropy = (None if values is None else values[part] for values in upstream)
        slope = head.slope(logits)
        ops.token_stats_backward_(d_logps, d_entropy, logits, ids[some], None, saved, temperature)
        if slope is not None:
            logits.mul_(slope)
        of_hidden = head.backward(logits, states, wants[0])
        if of_hidden is not None:
            gradient[some] = of_hidden.to(hidden.dtype)
        del logits, slope
    if wants[0]:
        gradient = gradient.view(hidden.shape)

    def of_head(total: Tensor | None) -> Tensor:
        return hidden.new_empty(0) if total is None else total.to(weight.dtype)

    return gradient, of_head(head.grad_weight), of_head(head.grad_bias)
