"""How the ops on hidden states compute: the plans of `cppo.ops.linear_library`.

Every function takes the namespace of the ops on logits first, then the arguments of its schema.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cppo import reference
from cppo.config import LossConfig
from cppo.ops.head import Head
from cppo.ops.library import COEFFICIENTS, METRICS, accumulator
from cppo.ops.linear_batch import LinearBatch
from cppo.records import NumItems, Views


def _denominators(
    batch: LinearBatch, num_selected: int, num_items: Tensor | None, config: LossConfig
) -> tuple[float, float]:
    """What the policy terms and the contrastive term are divided by, as numbers."""
    given: Any = None
    if num_items is not None:
        whole, completions, tokens, selected = num_items.tolist()
        given = NumItems(completions, tokens, None if math.isnan(selected) else selected)
        given = given if math.isnan(whole) else whole
    policy, contrast = reference._denominators(
        batch.num_rows,
        batch.num_completions,
        torch.tensor(num_selected, dtype=torch.float64),
        batch.longest,
        given,
        config,
    )
    return float(policy), float(contrast)


def _split(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of the schema `_LOSS`: tensors, config and wants."""
    *tensors_and_options, wants = inputs
    config = LossConfig(*tensors_and_options[12:])
    return (*tensors_and_options[:12], config, list(wants))


class _Loss:
    """One call of the loss: the batch, and what it returns."""

    def __init__(self, ops: Any, inputs: tuple[Any, ...]) -> None:
        anchor, positive, negative, weight, bias, targets, advantages = inputs[:7]
        old_logps, ref_logps, mask, cu_seqlens, num_items = inputs[7:12]
        self.config, self.wants = _split(inputs)[12:]
        self.num_items, self.targets = num_items, targets
        self.head = Head(weight, bias, self.wants[3], self.wants[4])
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
        )

        def at_rows(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.reshape(-1)[self.batch.rows]

        self.old_logps, self.ref_logps = at_rows(old_logps), at_rows(ref_logps)

    def reduce(self, first: int, last: int, by: tuple[float, float]) -> tuple[Tensor, Tensor]:
        return self.batch.loss(first, last, self.old_logps, self.ref_logps, by, self.config)

    def outputs(self, loss: Tensor, metrics: Tensor, rows: int, resident: bool) -> list[Tensor]:
        """What every plan returns first; `rows`: rows multiplied, once for each product."""
        batch = self.batch
        num_selected = batch.selected.sum()
        metrics[5] = num_selected / max(1, len(batch.seeing))
        plan = metrics.new_tensor([float(rows), float(batch.num_rows if resident else 0)])

        def spread(values: Tensor) -> Tensor:
            flat = values.new_zeros(self.targets.numel())
            flat[batch.rows] = values
            return flat.view(self.targets.shape)

        return [
            loss,
            spread(batch.logps[0]),
            spread(batch.entropy[0]),
            spread(batch.selected),
            torch.cat([metrics, plan]),
            num_selected,
        ]


def _groups(loss: _Loss) -> Iterator[tuple[int, int, bool]]:
    """Ranges of completions whose logits fit a tile; False: one completion that does not."""
    batch, room = loss.batch, loss.head.rows_per_tile
    first, rows = 0, 0
    for completion in range(batch.num_completions):
        length = batch.starts[completion + 1] - batch.starts[completion]
        seeing = batch.seeing_starts[completion + 1] - batch.seeing_starts[completion]
        cost = length + seeing  # the positive's rows come on top, and are fewer than `seeing`
        if rows and rows + cost > room:
            yield first, completion, rows <= room
            first, rows = completion, 0
        rows += cost
    if first < batch.num_completions:
        yield first, batch.num_completions, rows <= room


def linear_cppo_loss(ops: Any, *inputs: Any) -> tuple[Tensor, ...]:
    """The recompute plan: statistics, loss, coefficients."""
    loss = _Loss(ops, inputs)
    batch, config = loss.batch, loss.config
    last = batch.num_completions
    batch.statistics(0, last, config, keep=False)
    by = _denominators(batch, int(batch.selected.sum()), loss.num_items, config)
    value, metrics = loss.reduce(0, last, by)
    rows = batch.rows_multiplied + batch.backward_rows(config, loss.wants)
    outputs = loss.outputs(value, metrics, rows, resident=False)

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
    wants: list[bool],
) -> tuple[Tensor, ...]:
    head = Head(weight, bias, wants[3], wants[4])
    views = Views(anchor, positive, negative)
    batch = LinearBatch(
        ops, views, head, targets, advantages, mask, cu_seqlens, temperature, gating
    )
    batch.coefficients = coefficients[:, batch.rows] * grad_loss
    batch.selected = batch.coefficients[2] != 0
    config = LossConfig(
        temperature=temperature, divergence=divergence, detach_anchor=detach_anchor, gating=gating
    )
    batch.gradients(0, batch.num_completions, config, wants, {})
    return _gradients_of(batch, (anchor, positive, negative, weight, bias), wants, cast=True)


def linear_cppo_loss_gradients(ops: Any, *inputs: Any) -> tuple[Tensor, ...]:
    """The resident plan: loss and gradients, group by group."""
    loss = _Loss(ops, inputs)
    batch, config = loss.batch, loss.config
    by = _denominators(batch, 0, loss.num_items, config)
    total = torch.zeros((), dtype=batch.saved.dtype, device=batch.saved.device)
    metrics = total.new_zeros(len(METRICS))
    for first, last, fits in _groups(loss):
        tiles = batch.statistics(first, last, config, keep=fits)
        value, part = loss.reduce(first, last, by)
        total, metrics = total + value, metrics + part
        batch.gradients(first, last, config, loss.wants, tiles)
    outputs = loss.outputs(total, metrics, batch.rows_multiplied, resident=True)
    gradients = _gradients_of(batch, inputs[:5], loss.wants, cast=False)
    return *outputs, *gradients


def _gradients_of(
    batch: LinearBatch, inputs: tuple[Tensor | None, ...], wants: list[bool], cast: bool
) -> tuple[Tensor, ...]:
    """Gradients of the inputs that want one, empty tensors for the others."""
    sums = [*batch.hidden_gradients, batch.head.grad_weight, batch.head.grad_bias]
    found = []
    first = inputs[0]
    assert first is not None
    dtype = first.dtype if cast else batch.saved.dtype
    for total, like, want in zip(sums, inputs, wants, strict=True):
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
) -> tuple[Tensor, Tensor]:
    head = Head(weight, bias)
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    rows = _counting(targets, mask)
    dtype = accumulator(hidden)
    logps, entropy = (hidden.new_zeros(targets.numel(), dtype=dtype) for _ in range(2))
    for some in rows.split(head.rows_per_tile) if len(rows) else ():
        logits = head.logits(flat[some])
        logps[some], entropy[some], _ = ops.token_stats(logits, ids[some], None, temperature, False)
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
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(weight, bias, wants[1], wants[2])
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    rows = _counting(targets, mask)
    gradient = hidden.new_zeros(flat.shape) if wants[0] else hidden.new_empty(0)
    upstream = [None if g is None else g.reshape(-1)[rows] for g in (grad_logps, grad_entropy)]
    counts = torch.zeros_like(rows, dtype=torch.bool)
    for values in upstream:
        if values is not None:
            counts |= values != 0
    active = counts.nonzero()[:, 0]
    for part in active.split(head.rows_per_tile) if len(active) else ():
        some = rows[part]
        states = flat[some]
        logits = head.logits(states)
        saved = ops.token_stats(logits, ids[some], None, temperature, False)[2]
        d_logps, d_entropy = (None if values is None else values[part] for values in upstream)
        ops.token_stats_backward_(d_logps, d_entropy, logits, ids[some], None, saved, temperature)
        of_hidden = head.backward(logits, states, wants[0])
        if of_hidden is not None:
            gradient[some] = of_hidden.to(hidden.dtype)
    if wants[0]:
        gradient = gradient.view(hidden.shape)

    def of_head(total: Tensor | None) -> Tensor:
        return hidden.new_empty(0) if total is None else total.to(weight.dtype)

    return gradient, of_head(head.grad_weight), of_head(head.grad_bias)
