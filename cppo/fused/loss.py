"""The loss, composed once, of the primitives of a backend.

    statistics of the anchor, and of the negative where a completion is gated
    -> perception tokens -> statistics of the positive at those
    -> the weights of the tokens, where the engine that sampled is corrected for
    -> the loss, and its derivative with respect to every statistic
    -> gradients of the rows whose derivative is not zero

Logits come in tiles: they are given (`GivenTiles`, the whole batch is one tile), or made of hidden
states a part of the batch at a time (`cppo.fused.head_tiles.HeadTiles`). With the full divergence
the statistic of the positive is the difference of the two divergences: `contrast` reads the three
views at the perception tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cppo import reference
from cppo.fused.batch import ANCHOR, NEGATIVE, OF_ROWS, POSITIVE, Batch, is_compact, make_batch
from cppo.fused.schema import CONTRASTS, from_text
from cppo.options.loss import LossConfig
from cppo.records import Views

# The coefficients of a view: derivatives with respect to its logps, and to its entropy.
OF_LOGP = {ANCHOR: 0, POSITIVE: 2, NEGATIVE: 3}
OF_ENTROPY = {ANCHOR: 1, POSITIVE: None, NEGATIVE: None}


class Statistics(NamedTuple):
    """Of every row of a batch, zero where a view was not read: (T,), (T,); and (3, T) for the
    backward, when logits are given."""

    logps: Tensor
    entropy: Tensor
    saved: Tensor | None


class Tiles(Protocol):
    """The logits of a batch."""

    batch: Batch

    def has(self, view: int) -> bool:
        """Whether the call has this view."""

    def statistics(self, view: int, where: Tensor | None) -> Statistics:
        """Reads the rows of a view that a mask names."""

    def contrast(self, where: Tensor) -> Tensor:
        """`contrast` of the three views at the rows that a mask names: (5, T)."""


class Terms(NamedTuple):
    """The loss of a batch, and what was found on the way to it.

    selected: (T,) bool, None without perturbed views. saved: of the anchor, the positive (its
    contrasts, with the full divergence) and the negative; None: not read.
    """

    loss: Tensor
    metrics: Tensor
    coefficients: Tensor
    logps: Tensor
    entropy: Tensor
    selected: Tensor | None
    saved: tuple[Tensor | None, Tensor | None, Tensor | None]


def terms(
    kernels: Any, tiles: Tiles, denominators: Tensor, per_selected: bool, config: LossConfig
) -> Terms:
    """The loss and its derivatives with respect to every statistic.

    Args:
        kernels: the primitives of a backend, by name.
        denominators, per_selected: of `cppo.fused.denominators`.
    """
    batch = tiles.batch
    anchor = tiles.statistics(ANCHOR, batch.mask)
    negative = positive = contrasts = selected = None
    if tiles.has(NEGATIVE):
        negative = tiles.statistics(NEGATIVE, batch.gated)
        selected = batch.gated
        if config.perception != "cpl_all":
            selected = kernels.perception_mask(
                anchor.entropy, negative.entropy, config.fraction, batch.gated, batch.cu_seqlens
            )
    if tiles.has(POSITIVE) and selected is not None:
        if config.divergence == "full":
            contrasts = tiles.contrast(selected)
        else:
            positive = tiles.statistics(POSITIVE, selected)
        if per_selected:
            count = selected.sum().clamp(min=1)
            denominators = torch.cat([denominators[:1], denominators[1:] * count])
    given = (batch.old_logps, batch.sampling_logps, batch.token_weights)
    old_logps, weights = reference.correct(
        anchor.logps, *given, batch.mask, batch.cu_seqlens, config
    )
    removed_logps = batch.removed_logps
    if removed_logps is not None:
        removed_logps = reference.where_known(removed_logps, anchor.logps)
    loss, metrics, coefficients = kernels.loss_terms(
        anchor.logps,
        anchor.entropy,
        None if positive is None else positive.logps,
        None if positive is None or negative is None else negative.logps,
        None if contrasts is None else contrasts[CONTRASTS.index("margin")],
        selected,
        batch.advantages,
        old_logps,
        batch.ref_logps,
        weights,
        removed_logps,
        batch.mask,
        batch.cu_seqlens,
        denominators,
        config.text,
    )
    of_positive = contrasts if positive is None else positive.saved
    saved = anchor.saved, of_positive, None if negative is None else negative.saved
    return Terms(loss, metrics, coefficients, anchor.logps, anchor.entropy, selected, saved)


def outputs(batch: Batch, shape: torch.Size, found: Terms) -> tuple[Tensor, ...]:
    """What both losses return first, in the layout of the call."""
    selected, gated = found.selected, batch.gated
    if selected is None or gated is None:
        selected = gated = torch.zeros_like(batch.targets, dtype=torch.bool)
    rows = [
        x if x.shape == shape else x.view(shape) for x in (found.logps, found.entropy, selected)
    ]
    return found.loss, *rows, found.metrics, selected.count_nonzero(), gated.count_nonzero()


# The loss of logits that are given


class GivenTiles:
    """Logits of the caller, (B, L, V) or (T, V): one tile, of which masks say what is read."""

    def __init__(self, kernels: Any, views: Views, batch: Batch, temperature: float) -> None:
        self._kernels, self._views, self._temperature = kernels, views, temperature
        self.batch = batch
        self.places = batch.places(views)

    def has(self, view: int) -> bool:
        return self._views[view] is not None

    def statistics(self, view: int, where: Tensor | None) -> Statistics:
        places = self.places[view]
        logits, targets = self._views[view], self.batch.targets
        return Statistics(
            *self._kernels.token_stats(logits, targets, where, places, self._temperature, False)
        )

    def contrast(self, where: Tensor) -> Tensor:
        places = self.places[POSITIVE], self.places[NEGATIVE]
        return self._kernels.contrast(*self._views, where, *places, self._temperature)


def batch_of(given: Any, gating: bool | None) -> Batch:
    """The batch of the arguments of a loss, or of its backward; as `make_batch`."""
    mask = getattr(given, "mask", None)
    of_rows = {name: getattr(given, name, None) for name in OF_ROWS}
    return make_batch(given.targets, given.advantages, given.cu_seqlens, mask, gating, of_rows)


def cppo_loss(kernels: Any, given: Any) -> Any:
    """The op of this name; given: its `ARGUMENTS`."""
    config, views = from_text(given.config), Views(given.anchor, given.positive, given.negative)
    gating = config.gating if views.negative is not None else None
    batch = batch_of(given, gating)
    tiles = GivenTiles(kernels, views, batch, given.temperature)
    found = terms(kernels, tiles, given.denominators, given.per_selected, config)
    saved = (views.anchor.new_empty(0) if kept is None else kept for kept in found.saved)
    return *outputs(batch, given.targets.shape, found), *saved, found.coefficients


def cppo_loss_backward(kernels: Any, inplace: bool, given: Any) -> Any:
    """Gradients of the views, as new tensors or written over them.

    Args:
        given: the `ARGUMENTS`; a view that wants no gradient may be left out.
    """
    config, views = from_text(given.config), Views(given.anchor, given.positive, given.negative)
    masks: list[Tensor | None] = [given.mask] * 3
    places: list[Tensor | None] = [None] * 3
    if is_compact(views):
        batch = batch_of(given, config.gating)
        masks, places = [batch.mask, batch.gated, batch.gated], batch.places(views)
    coefficients = given.coefficients * given.grad_loss
    ending = "_backward_" if inplace else "_backward"
    if config.divergence == "full" and views.positive is not None:
        return getattr(kernels, "contrast" + ending)(
            *views,
            given.targets,
            *places[1:],
            given.saved_anchor,
            given.saved_positive,
            coefficients,
            given.temperature,
            config.detach_anchor,
        )
    d_anchor, d_entropy, d_positive, d_negative = coefficients.unbind()
    upstream = ((d_anchor, d_entropy), (d_positive, None), (d_negative, None))
    saved = (given.saved_anchor, given.saved_positive, given.saved_negative)
    backward, gradients = getattr(kernels, "token_stats" + ending), []
    for view, logits in enumerate(views):
        if logits is None:
            gradients.append(views.anchor.new_empty(0))
            continue
        rows = (given.targets, masks[view], places[view], saved[view])
        gradients.append(backward(*upstream[view], logits, *rows, given.temperature))
    return None if inplace else tuple(gradients)
