"""A backend of the fused ops: the primitives of one namespace, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cppo.config import LossConfig
from cppo.fused import autograd, linear, loss
from cppo.fused.checks import checked
from cppo.fused.denominators import Denominators, denominators
from cppo.fused.fakes import fake
from cppo.fused.head import keeps_logits
from cppo.fused.schema import ARGUMENTS, COMPOSED, PRIMITIVES, RESULTS, TERMS
from cppo.ops.checks import under_transform
from cppo.records import LossOutput, NumItems, TokenStats, Views

# Means over completions or tokens, of a loss that divides by something else.
_MEANS = ("entropy", "clip_fraction", "kl")


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
    """The functions of a backend, called like those of `cppo.reference`.

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

    def linear_token_stats(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        temperature: float = 1.0,
        mask: Tensor | None = None,
        softcap: float | None = None,
        suppressed: Tensor | None = None,
        logits_dtype: str = "fp32",
    ) -> TokenStats:
        head, options = (weight, bias, suppressed), (temperature, softcap, logits_dtype)
        keeps = mask is None and _is_eager(hidden, weight, bias)
        keeps &= keeps_logits(targets.numel(), weight, bias, softcap, logits_dtype)
        found = self._ops.linear_token_stats(hidden, *head, targets, mask, *options, keeps)
        return TokenStats(*found[:2])

    def perception_mask(
        self,
        anchor_entropy: Tensor,
        negative_entropy: Tensor,
        fraction: float = 0.5,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        return self._ops.perception_mask(
            anchor_entropy, negative_entropy, fraction, mask, cu_seqlens
        )

    def cppo_loss(
        self,
        views: Views,
        targets: Tensor,
        advantages: Tensor,
        old_logps: Tensor | None = None,
        ref_logps: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_items: float | Tensor | NumItems | None = None,
        config: LossConfig = LossConfig(),  # noqa: B008  (frozen)
        inplace: bool = False,
    ) -> LossOutput:
        by = denominators(targets, mask, cu_seqlens, num_items, config)
        rows = (targets, advantages, old_logps, ref_logps, mask, cu_seqlens)
        options = (by.values, by.per_selected, config.temperature, config.text, inplace)
        found = RESULTS["cppo_loss"](*self._ops.cppo_loss(*views, *rows, *options))
        metrics = _metrics(found, views, ref_logps, by)
        return LossOutput(found.loss, found.logps, found.entropy, found.selected, metrics)

    def linear_cppo_loss(
        self,
        views: Views,
        weight: Tensor,
        targets: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        old_logps: Tensor | None = None,
        ref_logps: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_items: float | Tensor | NumItems | None = None,
        config: LossConfig = LossConfig(),  # noqa: B008  (frozen)
        softcap: float | None = None,
        logit_scale: float = 1.0,
        suppressed: Tensor | None = None,
        logits_dtype: str = "fp32",
    ) -> LossOutput:
        inputs = (*views, weight, bias)
        # The tensors of torch.func do not say what those in them require: the backward knows.
        known = not under_transform()
        wants = [
            torch.is_grad_enabled() and value is not None and (value.requires_grad or not known)
            for value in inputs
        ]
        temperature = config.temperature / logit_scale
        by = denominators(targets, mask, cu_seqlens, num_items, config)
        # Three views at once are too many for tiles that stay, and a loss of which the denominator
        # is counted on the way is known when the last tile is gone.
        waits = by.per_selected and views.positive is not None
        # Gradients for a unit upstream gradient vanish in fp16: there they are made when the scale
        # of a GradScaler is known.
        waits |= weight.dtype == torch.float16
        resident = known and any(wants) and config.divergence != "full" and not waits
        rows = (suppressed, targets, advantages, old_logps, ref_logps, mask, cu_seqlens)
        options = (by.values, by.per_selected, temperature, config.text, softcap, logits_dtype)
        op = self._ops.linear_cppo_loss
        found = RESULTS["linear_cppo_loss"](*op(*inputs, *rows, *options, wants, resident))
        metrics = _metrics(found, views, ref_logps, by)
        # Divided by the rows that count they are GEMM units, and the share that was resident.
        work = found.work.to(found.metrics.dtype)
        metrics["head_gemm_rows"], metrics["head_resident_rows"] = work.unbind()
        return LossOutput(found.loss, found.logps, found.entropy, found.selected, metrics)


def _is_eager(*inputs: Tensor | None) -> bool:
    """Whether autograd will ask for gradients of a call that nothing traces or transforms."""
    given = [value for value in inputs if value is not None]
    traced = torch.compiler.is_compiling() or under_transform()
    plain = all(type(value) in (Tensor, torch.nn.Parameter) for value in given)
    wanted = torch.is_grad_enabled() and any(value.requires_grad for value in given)
    return wanted and plain and not traced


def _metrics(
    found: Any, views: Views, ref_logps: Tensor | None, by: Denominators
) -> dict[str, Tensor]:
    """The metrics by name, those that make sense for what was given."""
    metrics, dtype = dict(zip(TERMS, found.metrics.unbind(), strict=True)), found.metrics.dtype
    if by.metric_scale is not None:
        metrics |= {name: (metrics[name] * by.metric_scale).to(dtype) for name in _MEANS}
    if ref_logps is None:
        del metrics["kl"]
    if views.positive is None:
        del metrics["cpl_loss"]
    if views.negative is not None:
        share = found.num_selected / found.num_gated.clamp_min(1)
        metrics["perception_share"] = share.to(dtype)
        metrics["num_selected"] = found.num_selected
    return metrics
