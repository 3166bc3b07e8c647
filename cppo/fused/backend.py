"""A backend of the fused ops: the primitives of one namespace, and what is made of them."""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cppo import reference
from cppo.fused import autograd, linear, loss
from cppo.fused.batch import OF_ROWS
from cppo.fused.checks import checked
from cppo.fused.denominators import Denominators, denominators
from cppo.fused.fakes import fake
from cppo.fused.head import keeps_logits
from cppo.fused.schema import ARGUMENTS, COMPOSED, PRIMITIVES, RESULTS, TERMS
from cppo.ops.checks import under_transform
from cppo.records import LossOutput, TokenStats, Views

# Means over completions or tokens, of a loss that divides by something else.
_MEANS = ("entropy", "clip_fraction", "kl", "papo/kl")


def _without_autocast(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op with products in the dtypes that it chose: its inputs were cast already."""

    def run(given: Any) -> Any:
        with torch.autocast(given.weight.device.type, enabled=False):
            return op(given)

    return run


def _compositions(kernels: Any) -> dict[str, Callable[..., Any]]:
    """The ops of `COMPOSED`, of these primitives."""
    functions: dict[str, Callable[..., Any]] = {
        "cppo_loss": partial(loss.cppo_loss, kernels),
        "cppo_loss_backward": partial(loss.cppo_loss_backward, kernels, False),
        "cppo_loss_backward_": partial(loss.cppo_loss_backward, kernels, True),
    }
    for op in COMPOSED:
        if op.startswith("linear"):
            functions[op] = _without_autocast(partial(getattr(linear, op), kernels))
    return {op: _by_name(op, function) for op, function in functions.items()}


def _by_name(op: str, function: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *inputs: function(ARGUMENTS[op](*inputs))


def _define(namespace: str, op: str, schema: str, implementation: Callable[..., Any]) -> None:
    name = f"{namespace}::{op}"
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, ("cpu", "cuda"), implementation)


class Backend:
    """The functions of a backend, called like those of `cppo.reference` with `Views`.

    Args:
        namespace: of the `torch.library` ops.
        kernels: {name: function} of `PRIMITIVES` where Python implements them; None where the
            compiled extension has defined and implemented them already.
    """

    def __init__(
        self, namespace: str, kernels: Mapping[str, Callable[..., Any]] | None = None
    ) -> None:
        self._ops = ops = getattr(torch.ops, namespace)
        trusting = kernels is not None  # the extension checks what it is given
        if kernels is None:
            kernels = {op: getattr(ops, op).default for op in PRIMITIVES}
        else:
            for op, schema in PRIMITIVES.items():
                _define(namespace, op, schema, checked(op, schema, kernels[op]))
        for op, composition in _compositions(SimpleNamespace(**kernels)).items():
            if trusting or op.startswith("linear"):
                composition = checked(op, COMPOSED[op], composition)
            _define(namespace, op, COMPOSED[op], composition)
        for op in (*PRIMITIVES, *COMPOSED):
            torch.library.register_fake(f"{namespace}::{op}", fake(op))
        autograd.register(namespace)

    def token_stats(
        self,
        logits: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        mask: Tensor | None = None,
        inplace: bool = False,
    ) -> TokenStats:
        logps, entropy, _ = self._ops.token_stats(logits, targets, mask, None, temperature, inplace)
        return TokenStats(logps, entropy)

    def linear_token_stats(self, *arguments: Any, **named: Any) -> TokenStats:
        given = _LINEAR_TOKEN_STATS(*arguments, **named)
        head = (given.weight, given.bias, given.suppressed)
        options = (given.softcap, given.logits_dtype)
        rows = (given.targets, given.mask, given.temperature)
        keeps = (
            given.mask is None
            and _is_eager(given.hidden, given.weight, given.bias)
            and keeps_logits(given.targets.numel(), given.weight, given.bias, *options)
        )
        found = self._ops.linear_token_stats(given.hidden, *head, *rows, *options, keeps)
        return TokenStats(*found[:2])

    def perception_mask(self, *arguments: Any, **named: Any) -> Tensor:
        found: Tensor = self._ops.perception_mask(*_PERCEPTION_MASK(*arguments, **named))
        return found

    def cppo_loss(self, *arguments: Any, inplace: bool = False, **named: Any) -> LossOutput:
        given = _LOSS(*arguments, **named)
        by, rows = _denominators_and_rows(given)
        config = given.config
        options = (by.values, by.per_selected, config.temperature, config.text, inplace)
        found = RESULTS["cppo_loss"](*self._ops.cppo_loss(*given.logits, *rows, *options))
        metrics = _metrics(found, given.logits, given, by)
        return LossOutput(found.loss, found.logps, found.entropy, found.selected, metrics)

    def linear_cppo_loss(self, *arguments: Any, **named: Any) -> LossOutput:
        given = _LINEAR_LOSS(*arguments, **named)
        views, config, weight = given.hidden, given.config, given.weight
        inputs = (*views, weight, given.bias)
        # The tensors of torch.func do not say what those in them require: the backward knows.
        known = not under_transform()
        wants = [
            torch.is_grad_enabled() and value is not None and (value.requires_grad or not known)
            for value in inputs
        ]
        by, rows = _denominators_and_rows(given)
        # Three views at once are too many for tiles that stay, and a loss of which the denominator
        # is counted on the way is known when the last tile is gone.
        waits = by.per_selected and views.positive is not None
        # Gradients for a unit upstream gradient vanish in fp16: there they are made when the scale
        # of a GradScaler is known.
        waits |= weight.dtype == torch.float16
        resident = known and any(wants) and config.divergence != "full" and not waits
        temperature = config.temperature / given.logit_scale
        options = (by.values, by.per_selected, temperature, config.text, given.softcap)
        plan = (given.logits_dtype, wants, resident)
        found = RESULTS["linear_cppo_loss"](
            *self._ops.linear_cppo_loss(*inputs, given.suppressed, *rows, *options, *plan)
        )
        metrics = _metrics(found, views, given, by)
        # Divided by the rows that count they are GEMM units, and the share that was resident.
        work = found.work.to(found.metrics.dtype)
        metrics["head_gemm_rows"], metrics["head_resident_rows"] = work.unbind()
        return LossOutput(found.loss, found.logps, found.entropy, found.selected, metrics)


def _record(specification: Callable[..., Any]) -> Any:
    """The arguments of a function of `cppo.reference`, by name and with their defaults."""
    parameters = inspect.signature(specification).parameters
    defaults = [p.default for p in parameters.values() if p.default is not p.empty]
    return namedtuple(specification.__name__, parameters, defaults=defaults)  # noqa: PYI024


_LINEAR_TOKEN_STATS = _record(reference.linear_token_stats)
_PERCEPTION_MASK = _record(reference.perception_mask)
_LOSS, _LINEAR_LOSS = _record(reference.cppo_loss), _record(reference.linear_cppo_loss)


def _denominators_and_rows(given: Any) -> tuple[Denominators, tuple[Tensor | None, ...]]:
    """Of either loss: what its terms are divided by, and its rows in the order of the ops."""
    count = (given.targets, given.mask, given.cu_seqlens, given.num_items, given.config)
    of_rows = (getattr(given, name) for name in OF_ROWS)
    rows = (given.targets, given.advantages, *of_rows, given.mask, given.cu_seqlens)
    return denominators(*count), rows


def _is_eager(*inputs: Tensor | None) -> bool:
    """Whether autograd will ask for gradients of a call that nothing traces or transforms."""
    given = [value for value in inputs if value is not None]
    traced = torch.compiler.is_compiling() or under_transform()
    plain = all(type(value) in (Tensor, torch.nn.Parameter) for value in given)
    wanted = torch.is_grad_enabled() and any(value.requires_grad for value in given)
    return wanted and plain and not traced


def _metrics(found: Any, views: Views, given: Any, by: Denominators) -> dict[str, Tensor]:
    """The metrics by name, those that make sense for what was given."""
    metrics, dtype = dict(zip(TERMS, found.metrics.unbind(), strict=True)), found.metrics.dtype
    if by.metric_scale is not None:
        metrics |= {name: (metrics[name] * by.metric_scale).to(dtype) for name in _MEANS}
    if given.ref_logps is None:
        del metrics["kl"]
    if given.removed_logps is None:
        del metrics["papo/kl"]
    if views.positive is None:
        del metrics["cpl_loss"]
    if views.negative is not None:
        share = found.num_selected / found.num_gated.clamp_min(1)
        metrics["perception_share"] = share.to(dtype)
        metrics["num_selected"] = found.num_selected
    return metrics
