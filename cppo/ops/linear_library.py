"""The ops on hidden states as `torch.library` ops, over the ops on logits of the same backend.

Logits exist a tile at a time (`cppo.ops.head`); their statistics and gradients are those of
`token_stats` and `cppo_loss`. What needs no computing is not computed: rows that are masked, views
of completions with A <= 0, the positive away from the perception tokens, the backward of rows
whose coefficient is zero.

In GEMM units (one view's logits), with f the share of tokens in completions with A > 0 and r the
selected share of those, three views in full take 12. The plans of the loss:

resident, 3 + f + 5fr: where the loss's denominators are known beforehand. A group of completions
    that fits a tile at a time: statistics, selection, loss and gradients while its logits are
    alive.
deferred, 3 + f + 9fr: where the contrastive term is divided by the number of selected tokens, and
    they are few (2fr < 1). So for the policy terms; when all selected tokens are counted come the
    positive there, and the logits of anchor and negative once more.
recompute, 4 + f + 7fr: statistics of all rows, then the loss; then the logits of the rows that have
    a gradient once more. A completion longer than a tile is always treated so.

The forward computes the gradients, the backward scales them. With divergence="full" the backward
recomputes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cppo.config import LossConfig
from cppo.ops import linear_plans
from cppo.ops.checks import under_transform
from cppo.ops.library import (
    COEFFICIENTS,
    CONFIG,
    CONFIG_FIELDS,
    METRICS,
    accumulator,
    metric_scale,
    metrics_of,
    num_items_tensor,
    refuse_second_derivative,
    register_autograd,
)
from cppo.ops.sizes import checked
from cppo.records import LossOutput, NumItems, TokenStats, Views

_HEAD = "Tensor weight, Tensor? bias"
_LOSS = (
    f"(Tensor anchor, Tensor? positive, Tensor? negative, {_HEAD}, Tensor targets, "
    "Tensor advantages, Tensor? old_logps, Tensor? ref_logps, Tensor? mask, Tensor? cu_seqlens, "
    f"Tensor? num_items, {CONFIG}, float? softcap, bool[] wants)"
)
_OUTPUTS = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"

# `wants`: gradients of anchor, positive, negative, weight, bias.
SCHEMAS = {
    "linear_token_stats": f"(Tensor hidden, {_HEAD}, Tensor targets, Tensor? mask, "
    "float temperature, float? softcap) -> (Tensor, Tensor)",
    "linear_token_stats_backward": "(Tensor? grad_logps, Tensor? grad_entropy, Tensor hidden, "
    f"{_HEAD}, Tensor targets, Tensor? mask, float temperature, float? softcap, bool[] wants) "
    "-> (Tensor, Tensor, Tensor)",
    "linear_cppo_loss": f"{_LOSS} -> ({_OUTPUTS}, Tensor)",
    "linear_cppo_loss_backward": "(Tensor grad_loss, Tensor anchor, Tensor? positive, "
    f"Tensor? negative, {_HEAD}, Tensor targets, Tensor advantages, Tensor? mask, "
    "Tensor? cu_seqlens, Tensor coefficients, float temperature, str divergence, "
    "bool gating, bool detach_anchor, float? softcap, bool[] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    # With the gradients of a unit upstream gradient, fp32 or better.
    "linear_cppo_loss_gradients": f"{_LOSS} -> ({_OUTPUTS}, {', '.join(['Tensor'] * 5)})",
}
# Sums, as the other counts are: rows multiplied with the head, once for each product, and rows that
# took the resident plan. Divided by the rows that count they are GEMM units, and the plan.
LINEAR_METRICS = (*METRICS, "head_gemm_rows", "head_resident_rows")


# Fakes: shapes and dtypes, for torch.compile


def _fake_stats(hidden, weight, bias, targets, mask, temperature, softcap):
    def new(*size):
        return hidden.new_empty(size, dtype=accumulator(hidden))

    return new(*targets.shape), new(*targets.shape)


def _fake_gradients(inputs, wants, dtype=None):
    like = next(value for value in inputs if value is not None)
    return tuple(
        like.new_empty(
            value.shape if want and value is not None else 0,
            dtype=dtype or (value.dtype if want and value is not None else like.dtype),
        )
        for value, want in zip(inputs, wants, strict=True)
    )


def _fake_stats_backward(grad_logps, grad_entropy, hidden, weight, bias, targets, *rest):
    return _fake_gradients((hidden, weight, bias), rest[-1])


def _fake_outputs(anchor, positive, negative, weight, bias, targets, *rest):
    def new(*size, dtype=None):
        return anchor.new_empty(size, dtype=dtype or accumulator(anchor))

    return (
        new(),
        new(*targets.shape),
        new(*targets.shape),
        new(*targets.shape, dtype=torch.bool),
        new(len(LINEAR_METRICS)),
        new(dtype=torch.int64),
    )


def _fake_loss(*inputs):
    anchor, targets = inputs[0], inputs[5]
    shape = (len(COEFFICIENTS), targets.numel())
    return *_fake_outputs(*inputs), anchor.new_empty(shape, dtype=accumulator(anchor))


def _fake_loss_gradients(*inputs):
    gradients = _fake_gradients(inputs[:5], inputs[-1], accumulator(inputs[0]))
    return *_fake_outputs(*inputs), *gradients


def _fake_loss_backward(grad_loss, *inputs):
    return _fake_gradients(inputs[:5], inputs[-1])


_FAKES: dict[str, Callable[..., Any]] = {
    "linear_token_stats": _fake_stats,
    "linear_token_stats_backward": _fake_stats_backward,
    "linear_cppo_loss": _fake_loss,
    "linear_cppo_loss_backward": _fake_loss_backward,
    "linear_cppo_loss_gradients": _fake_loss_gradients,
}


# Autograd


def _register_stats(namespace: str) -> None:
    name = f"{namespace}::linear_token_stats"
    ops = getattr(torch.ops, namespace)

    def setup(ctx, inputs, output):
        *tensors, ctx.temperature, ctx.softcap = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    def backward(ctx, grad_logps, grad_entropy):
        if grad_logps is None and grad_entropy is None:
            return (None,) * 7
        refuse_second_derivative(name)
        wants = list(ctx.needs_input_grad[:3])
        gradients = ops.linear_token_stats_backward(
            grad_logps, grad_entropy, *ctx.saved_tensors, ctx.temperature, ctx.softcap, wants
        )
        return *_wanted(gradients, wants), *(None,) * 4

    register_autograd(namespace, "linear_token_stats", setup, backward)


def _wanted(gradients: tuple[Tensor, ...], wants: list[bool]) -> list[Tensor | None]:
    return [g if want else None for g, want in zip(gradients, wants, strict=True)]


def _register_recompute(namespace: str) -> None:
    name = f"{namespace}::linear_cppo_loss"
    ops = getattr(torch.ops, namespace)

    def setup(ctx, inputs, output):
        ctx.num_inputs, ctx.wants = len(inputs), inputs[-1]
        options = dict(zip(CONFIG_FIELDS, inputs[12:-2], strict=True))
        taken = ("temperature", "divergence", "gating", "detach_anchor")
        ctx.options = (*(options[field] for field in taken), inputs[-2])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        mask, cu_seqlens = inputs[9:11]
        ctx.save_for_backward(*inputs[:7], mask, cu_seqlens, output[-1])

    def backward(ctx, grad_loss, *_):
        nothing = (None,) * (ctx.num_inputs - 5)
        if grad_loss is None:
            return *(None,) * 5, *nothing
        refuse_second_derivative(name)
        wants = [a and b for a, b in zip(ctx.wants, ctx.needs_input_grad[:5], strict=True)]
        gradients = ops.linear_cppo_loss_backward(
            grad_loss, *ctx.saved_tensors, *ctx.options, wants
        )
        return *_wanted(gradients, wants), *nothing

    register_autograd(namespace, "linear_cppo_loss", setup, backward)


def _register_resident(namespace: str) -> None:
    name = f"{namespace}::linear_cppo_loss_gradients"

    def setup(ctx, inputs, output):
        ctx.num_inputs, ctx.wants = len(inputs), inputs[-1]
        ctx.dtype = inputs[0].dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[6:])

    def backward(ctx, grad_loss, *_):
        nothing = (None,) * (ctx.num_inputs - 5)
        if grad_loss is None:
            return *(None,) * 5, *nothing
        refuse_second_derivative(name)
        last = not torch._C._autograd._get_current_graph_task_keep_graph()

        def scaled(g):
            # A copy of the weight's gradient would be the largest tensor of all: none is made in
            # fp32, nor any where the graph dies with this pass (a compiled graph may not). A GPU
            # scales and rounds in one pass.
            if last and type(g) is Tensor and (g.dtype == ctx.dtype or not g.is_cuda):
                return g.mul_(grad_loss).to(ctx.dtype)
            return torch.mul(g, grad_loss, out=g.new_empty(g.shape, dtype=ctx.dtype))

        gradients = tuple(scaled(g) for g in ctx.saved_tensors)
        return *_wanted(gradients, ctx.wants), *nothing

    register_autograd(namespace, "linear_cppo_loss_gradients", setup, backward)


def _without_autocast(plan: Callable[..., Any]) -> Callable[..., Any]:
    """The plan with products in the dtypes that it chose: the inputs were cast already."""

    def run(*inputs: Any) -> Any:
        device = next(value.device.type for value in inputs if value is not None)
        with torch.autocast(device, enabled=False):
            return plan(*inputs)

    return run


class LinearBackend:
    """The backend functions on hidden states of one namespace, called like `cppo.reference`'s.

    Args:
        namespace: of the `torch.library` ops on logits, to which these are added.
    """

    def __init__(self, namespace: str) -> None:
        self._ops = getattr(torch.ops, namespace)
        for op, schema in SCHEMAS.items():
            name = f"{namespace}::{op}"
            torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
            plan = _without_autocast(partial(getattr(linear_plans, op), self._ops))
            plan = checked(op, schema, plan)
            torch.library.impl(name, ("cpu", "cuda"), plan)
            torch.library.register_fake(name, _FAKES[op])
        _register_stats(namespace)
        _register_recompute(namespace)
        _register_resident(namespace)

    def linear_token_stats(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        temperature: float = 1.0,
        mask: Tensor | None = None,
        softcap: float | None = None,
    ) -> TokenStats:
        logps, entropy = self._ops.linear_token_stats(
            hidden, weight, bias, targets, mask, temperature, softcap
        )
        return TokenStats(logps, entropy)

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
    ) -> LossOutput:
        inputs = (*views, weight, bias)
        # The tensors of torch.func do not say what those in them require: the backward knows.
        known = not under_transform()
        wants = [
            torch.is_grad_enabled() and value is not None and (value.requires_grad or not known)
            for value in inputs
        ]
        # Three views at once are too many for tiles that are kept.
        resident = known and any(wants) and config.divergence != "full"
        op = self._ops.linear_cppo_loss_gradients if resident else self._ops.linear_cppo_loss
        loss, logps, entropy, selected, values, num_selected, *_ = op(
            *inputs,
            targets,
            advantages,
            old_logps,
            ref_logps,
            mask,
            cu_seqlens,
            num_items_tensor(num_items, advantages),
            *(getattr(config, name) for name in CONFIG_FIELDS),
            softcap,
            wants,
        )
        count = len(METRICS)
        rows = (targets, mask, cu_seqlens, advantages.numel())
        scale = metric_scale(*rows, num_items, config)
        metrics = metrics_of(values[:count], num_selected, views, ref_logps, scale)
        metrics |= dict(zip(LINEAR_METRICS[count:], values[count:].unbind(), strict=True))
        return LossOutput(loss, logps, entropy, selected, metrics)
