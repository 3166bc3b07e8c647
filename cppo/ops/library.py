"""The ops on logits as `torch.library` ops: schemas, fakes and autograd, once for every backend.

Two libraries implement the same schemas: `cppo::` is the C++ extension (its schemas are written
out in csrc/cppo.cpp), `cppo_triton::` the Triton kernels. Here stands what they share, so that a
backend is nothing but kernels:

    token_stats        -> logps, entropy; keeps reference, sum and mean of every row
    perception_mask    -> bool; no gradient
    cppo_loss          -> loss; keeps the row statistics and d loss / d (statistic) of every row
    *_backward         -> the gradient of the logits in one pass over them
    *_backward_        -> the same, written into the logits (`inplace=True`)

The derivative of a row of logits z, with x = (z - reference) / temperature, s = sum e^x,
pi = e^x / s and mean = sum pi x, is (1[v = y] - pi) for logp and -pi (x - mean) for the entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cppo import reference
from cppo.config import LossConfig
from cppo.ops.checks import under_transform
from cppo.records import LossOutput, NumItems, TokenStats, Views

# The scalars of the schema of cppo_loss are the fields of LossConfig, in order.
CONFIG = (
    "float temperature, float clip_low, float clip_high, float? dual_clip, str importance, "
    "str reduction, int? max_length, float kl_coef, float? kl_clamp, float entropy_coef, "
    "float cpl_coef, "
    "str divergence, float tau, float fraction, bool gating, bool detach_anchor, "
    "str cpl_reduction"
)
CONFIG_FIELDS = tuple(field.name for field in fields(LossConfig))
_STATS_GRADIENT = "Tensor? grad_logps, Tensor? grad_entropy"
_STATS_ROWS = "Tensor targets, Tensor? mask, Tensor saved, float temperature"
_LOSS_ROWS = (
    "Tensor targets, Tensor advantages, Tensor? cu_seqlens, Tensor saved, Tensor coefficients, "
    "float temperature, str divergence, bool gating, bool detach_anchor"
)

SCHEMAS = {
    "token_stats": "(Tensor logits, Tensor targets, Tensor? mask, float temperature, "
    "bool inplace) -> (Tensor, Tensor, Tensor)",
    "token_stats_backward": f"({_STATS_GRADIENT}, Tensor logits, {_STATS_ROWS}) -> Tensor",
    "token_stats_backward_": f"({_STATS_GRADIENT}, Tensor(a!) logits, {_STATS_ROWS}) -> ()",
    "perception_mask": "(Tensor anchor_entropy, Tensor negative_entropy, float fraction, "
    "Tensor? mask, Tensor? cu_seqlens) -> Tensor",
    "cppo_loss": "(Tensor anchor, Tensor? positive, Tensor? negative, Tensor targets, "
    "Tensor advantages, Tensor? old_logps, Tensor? ref_logps, Tensor? mask, Tensor? cu_seqlens, "
    f"Tensor? num_items, {CONFIG}, bool inplace) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "cppo_loss_backward": "(Tensor grad_loss, Tensor anchor, Tensor? positive, Tensor? negative, "
    f"{_LOSS_ROWS}) -> (Tensor, Tensor, Tensor)",
    "cppo_loss_backward_": "(Tensor grad_loss, Tensor(a!) anchor, Tensor(b!)? positive, "
    f"Tensor(c!)? negative, {_LOSS_ROWS}) -> ()",
}

# Not differentiable: the loss from statistics that are there already, of packed rows that all
# count -> loss, the metrics of cppo_loss, coefficients. The ops on hidden states call it.
LOSS_TERMS = (
    "(Tensor logps, Tensor entropy, Tensor? positive_logps, Tensor? negative_logps, "
    "Tensor? margin, Tensor selected, Tensor advantages, Tensor? old_logps, Tensor? ref_logps, "
    "Tensor cu_seqlens, float policy_denominator, float contrast_denominator, "
    f"{CONFIG}) -> (Tensor, Tensor, Tensor)"
)

# Rows of `saved`: what the backward needs of each row of logits.
STATS_SAVED = ("reference", "sum", "mean")
LOSS_SAVED = (
    "anchor_reference",
    "anchor_sum",
    "anchor_mean",
    "positive_reference",
    "positive_sum",
    "negative_reference",
    "negative_sum",
    "margin",  # KL(anchor || positive) - KL(anchor || negative), with divergence="full"
)
# Rows of `coefficients`: what the loss is differentiated by.
COEFFICIENTS = ("anchor_logp", "anchor_entropy", "positive_logp_or_margin", "negative_logp")
METRICS = ("policy_loss", "entropy", "clip_fraction", "kl", "cpl_loss", "perception_share")
# Means over completions or tokens; the kernels divide them as they divide the loss.
MEANS = ("entropy", "clip_fraction", "kl")


def accumulator(logits: Tensor) -> torch.dtype:
    """The dtype of every statistic: fp32, or fp64 for fp64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# Fakes: shapes and dtypes, for torch.compile


def _fake_token_stats(logits, targets, mask, temperature, inplace):
    def new(*size):
        return logits.new_empty(size, dtype=accumulator(logits))

    return new(*targets.shape), new(*targets.shape), new(len(STATS_SAVED), targets.numel())


def _fake_token_stats_backward(grad_logps, grad_entropy, logits, *rows):
    return logits.new_empty(logits.shape)


def _fake_perception_mask(anchor_entropy, negative_entropy, fraction, mask, cu_seqlens):
    return anchor_entropy.new_empty(anchor_entropy.shape, dtype=torch.bool)


def _fake_cppo_loss(anchor, positive, negative, targets, *options):
    def new(*size, dtype=None):
        return anchor.new_empty(size, dtype=dtype or accumulator(anchor))

    shape, num_rows = targets.shape, targets.numel()
    return (
        new(),
        new(*shape),
        new(*shape),
        new(*shape, dtype=torch.bool),
        new(len(METRICS)),
        new(dtype=torch.int64),
        new(len(LOSS_SAVED), num_rows),
        new(len(COEFFICIENTS), num_rows),
    )


def _fake_cppo_loss_backward(grad_loss, anchor, positive, negative, *options):
    return tuple(
        anchor.new_empty(0) if view is None else view.new_empty(view.shape)
        for view in (anchor, positive, negative)
    )


def _fake_nothing(*arguments):
    return None


_FAKES: dict[str, Callable[..., Any]] = {
    "token_stats": _fake_token_stats,
    "token_stats_backward": _fake_token_stats_backward,
    "token_stats_backward_": _fake_nothing,
    "perception_mask": _fake_perception_mask,
    "cppo_loss": _fake_cppo_loss,
    "cppo_loss_backward": _fake_cppo_loss_backward,
    "cppo_loss_backward_": _fake_nothing,
}


# Autograd


def refuse_second_derivative(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name.replace('::', '.')}: has no second derivative; backend='reference' has one"
        )


def _is_dual(value: Any) -> bool:
    level = forward_ad._current_level
    return level >= 0 and forward_ad.unpack_dual(value, level=level).tangent is not None


def refuse_transforms(name: str, inputs: Iterable[Any]) -> None:
    """RuntimeError where forward mode or torch.func asks for a derivative, which no kernel has.

    An op that knows nothing of tangents passes none on: its results would look constant.
    """
    forward, transform = forward_ad._current_level >= 0, under_transform()
    if not forward and not transform:
        return
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    op = name.replace("::", ".").removesuffix("_gradients")
    if forward and any(map(_is_dual, tensors)):
        raise RuntimeError(f"{op}: has no forward-mode derivative; backend='reference' has one")
    wanted = torch.is_grad_enabled() and any(value.requires_grad for value in tensors)
    if transform and wanted:
        raise RuntimeError(f"{op}: has no derivative under torch.func; backend='reference' has one")


# As long as somebody holds them, what they registered stays.
_registrations: list[torch.library.Library] = []


def register_autograd(
    namespace: str,
    op_name: str,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> None:
    """Gives an op its gradient, as `torch.library.register_autograd` does.

    That one looks up the default of every argument in each call, in a time that grows with the
    square of their number: with our thirty it is longer than many of the kernels. There are no
    defaults here.
    """
    op = getattr(getattr(torch.ops, namespace), op_name).default
    name = f"{namespace}.{op_name}"

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def reverse(ctx: Any, *gradients: Any) -> Any:
        refuse_transforms(name, gradients)
        return backward(ctx, *gradients)

    members = {"forward": staticmethod(forward), "backward": staticmethod(reverse)}
    function: Any = type(f"{namespace}_{op_name}", (torch.autograd.Function,), members)

    def differentiable(*inputs: Any) -> Any:
        refuse_transforms(name, inputs)
        if torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in inputs
        ):
            return function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    library = torch.library.Library(namespace, "FRAGMENT")
    library.impl(op_name, differentiable, "Autograd")
    _registrations.append(library)


def _register_token_stats(namespace: str) -> None:
    name = f"{namespace}::token_stats"
    ops = getattr(torch.ops, namespace)

    def setup(ctx, inputs, output):
        logits, targets, mask, ctx.temperature, ctx.inplace = inputs
        saved = output[2]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved)
        ctx.save_for_backward(logits, targets, mask, saved)

    def backward(ctx, grad_logps, grad_entropy, _):
        nothing = (None,) * 4
        if grad_logps is None and grad_entropy is None:
            return None, *nothing
        refuse_second_derivative(name)
        logits, targets, mask, saved = ctx.saved_tensors
        rows = (grad_logps, grad_entropy, logits, targets, mask, saved, ctx.temperature)
        if not ctx.inplace:
            return ops.token_stats_backward(*rows), *nothing
        ops.token_stats_backward_(*rows)
        torch.autograd.graph.increment_version(logits)
        return logits, *nothing

    register_autograd(namespace, "token_stats", setup, backward)


def _register_cppo_loss(namespace: str) -> None:
    name = f"{namespace}::cppo_loss"
    ops = getattr(torch.ops, namespace)

    def setup(ctx, inputs, output):
        options = dict(zip(CONFIG_FIELDS, inputs[10:-1], strict=True))
        taken = ("temperature", "divergence", "gating", "detach_anchor")
        ctx.options = tuple(options[field] for field in taken)
        ctx.num_inputs, ctx.inplace = len(inputs), inputs[-1]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        anchor, positive, negative, targets, advantages = inputs[:5]
        cu_seqlens, saved, coefficients = inputs[8], output[6], output[7]
        ctx.save_for_backward(
            anchor, positive, negative, targets, advantages, cu_seqlens, saved, coefficients
        )

    def backward(ctx, grad_loss, *_):
        nothing = (None,) * (ctx.num_inputs - 3)
        if grad_loss is None:
            return None, None, None, *nothing
        refuse_second_derivative(name)
        anchor, positive, negative, *rows = ctx.saved_tensors
        _, wants_positive, wants_negative = ctx.needs_input_grad[:3]
        if ctx.options[1] != "full":
            # A view on its own is differentiated on its own.
            positive = positive if wants_positive else None
            negative = negative if wants_negative else None
        views = (anchor, positive, negative)
        if not ctx.inplace:
            gradients = ops.cppo_loss_backward(grad_loss, *views, *rows, *ctx.options)
        else:
            ops.cppo_loss_backward_(grad_loss, *views, *rows, *ctx.options)
            torch.autograd.graph.increment_version([view for view in views if view is not None])
            gradients = views
        wanted = zip(gradients, views, ctx.needs_input_grad[:3], strict=True)
        return *(g if w and v is not None else None for g, v, w in wanted), *nothing

    register_autograd(namespace, "cppo_loss", setup, backward)


def num_items_tensor(num_items: Any, like: Tensor) -> Tensor | None:
    """fp64 (4,): the whole, or completions, tokens and selected; NaN where not given."""
    if num_items is None:
        return None
    whole = (num_items, None, None, None)
    counts = (None, *num_items) if isinstance(num_items, NumItems) else whole

    def as_tensor(count: float | Tensor | None) -> Tensor:
        if isinstance(count, Tensor):
            return count.detach().to(like.device, torch.float64)
        return like.new_full((), math.nan if count is None else count, dtype=torch.float64)

    return torch.stack([as_tensor(count) for count in counts])


def metric_scale(
    targets: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_completions: int,
    num_items: float | Tensor | NumItems | None,
    config: LossConfig,
) -> float | Tensor | None:
    """`cppo.reference.metric_scale` of rows in either layout, without a wait for the device.

    None stands for 1, so that nothing is launched for it.
    """
    if config.reduction != "dr_grpo":
        return None
    num_rows = targets.numel() if mask is None else mask.sum()
    longest: int | Tensor = targets.shape[-1]
    if cu_seqlens is not None:
        longest = cu_seqlens.diff().max() if num_completions else 0
    return reference.metric_scale(num_rows, num_completions, longest, num_items, config)


def metrics_of(
    values: Tensor,
    num_selected: Tensor,
    views: Views,
    ref_logps: Tensor | None,
    scale: float | Tensor | None,
) -> dict[str, Tensor]:
    """The metrics by name, those that make sense for what was given."""
    metrics = dict(zip(METRICS, values.unbind(), strict=True))
    if scale is not None:
        metrics |= {name: metrics[name] * scale for name in MEANS}
    if ref_logps is None:
        del metrics["kl"]
    if views.positive is None:
        del metrics["cpl_loss"]
    if views.negative is None:
        del metrics["perception_share"]
    else:
        metrics["num_selected"] = num_selected
    return metrics


class Backend:
    """The backend functions of the ops of one namespace, called like those of `cppo.reference`.

    Args:
        namespace: of the `torch.library` ops.
        kernels: {name of a schema: launcher} where Python implements them; None where the
            compiled extension has defined and implemented the schemas already.
    """

    def __init__(
        self, namespace: str, kernels: Mapping[str, Callable[..., Any]] | None = None
    ) -> None:
        self._ops = getattr(torch.ops, namespace)
        for op, schema in SCHEMAS.items():
            name = f"{namespace}::{op}"
            if kernels is not None:
                torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
                torch.library.impl(name, ("cpu", "cuda"), kernels[op])
            torch.library.register_fake(name, _FAKES[op])
        _register_token_stats(namespace)
        _register_cppo_loss(namespace)

    def token_stats(
        self,
        logits: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        mask: Tensor | None = None,
        inplace: bool = False,
    ) -> TokenStats:
        logps, entropy, _ = self._ops.token_stats(logits, targets, mask, temperature, inplace)
        return TokenStats(logps, entropy)

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
        loss, logps, entropy, selected, values, num_selected, _, _ = self._ops.cppo_loss(
            *views,
            targets,
            advantages,
            old_logps,
            ref_logps,
            mask,
            cu_seqlens,
            num_items_tensor(num_items, advantages),
            *(getattr(config, field) for field in CONFIG_FIELDS),
            inplace,
        )
        rows = (targets, mask, cu_seqlens, advantages.numel())
        scale = metric_scale(*rows, num_items, config)
        metrics = metrics_of(values, num_selected, views, ref_logps, scale)
        return LossOutput(loss, logps, entropy, selected, metrics)
