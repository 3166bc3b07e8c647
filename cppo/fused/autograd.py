"""The gradients of the fused ops, and what they refuse to differentiate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cppo.fused.schema import ARGUMENTS, RESULTS, from_text
from cppo.ops.checks import under_transform

# As long as somebody holds them, what they registered stays.
_registrations: list[torch.library.Library] = []


def _refuse_second_derivative(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name}: has no second derivative; backend='reference' has one")


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
    if forward and any(map(_is_dual, tensors)):
        raise RuntimeError(f"{name}: has no forward-mode derivative; backend='reference' has one")
    wanted = torch.is_grad_enabled() and any(value.requires_grad for value in tensors)
    if transform and wanted:
        raise RuntimeError(
            f"{name}: has no derivative under torch.func; backend='reference' has one"
        )


def _differentiable(
    namespace: str,
    op_name: str,
    setup_context: Callable[[Any, Any, Any], None],
    backward: Callable[..., Any],
) -> None:
    """Gives an op its gradient, as `torch.library.register_autograd` does.

    That one looks up the default of every argument in each call, in a time that grows with the
    square of their number: with our fifteen it is longer than many of the kernels. There are no
    defaults here.
    """
    op = getattr(getattr(torch.ops, namespace), op_name).default
    name, arguments = f"{namespace}.{op_name}", ARGUMENTS[op_name]

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        ctx.set_materialize_grads(False)
        ctx.num_inputs = len(inputs)
        setup_context(ctx, arguments(*inputs), output)
        return output

    def reverse(ctx: Any, *gradients: Any) -> Any:
        refuse_transforms(name, gradients)
        if all(gradient is None for gradient in gradients):
            return (None,) * ctx.num_inputs
        _refuse_second_derivative(name)
        found = backward(ctx, *gradients)
        return *found, *(None,) * (ctx.num_inputs - len(found))

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


def _written(*logits: Tensor | None) -> None:
    """Tells autograd that gradients stand in these logits now."""
    torch.autograd.graph.increment_version([view for view in logits if view is not None])


def _token_stats(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)

    def setup(ctx, given, output):
        ctx.temperature, ctx.inplace = given.temperature, given.inplace
        saved = output[2]
        ctx.mark_non_differentiable(saved)
        ctx.save_for_backward(given.logits, given.targets, given.mask, given.places, saved)

    def backward(ctx, grad_logps, grad_entropy, _):
        logits, *rows = ctx.saved_tensors
        arguments = (grad_logps, grad_entropy, logits, *rows, ctx.temperature)
        if not ctx.inplace:
            return (ops.token_stats_backward(*arguments),)
        ops.token_stats_backward_(*arguments)
        _written(logits)
        return (logits,)

    _differentiable(namespace, "token_stats", setup, backward)


def _wanted(gradients: Iterable[Any], wants: Iterable[bool]) -> list[Any]:
    return [g if want else None for g, want in zip(gradients, wants, strict=True)]


def _cppo_loss(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)

    def setup(ctx, given, output):
        ctx.options, ctx.inplace = (given.temperature, given.config), given.inplace
        ctx.mark_non_differentiable(*output[1:])
        views = (given.anchor, given.positive, given.negative)
        rows = (given.targets, given.advantages, given.mask, given.cu_seqlens)
        kept = RESULTS["cppo_loss"](*output)
        saved = (kept.saved_anchor, kept.saved_positive, kept.saved_negative)
        ctx.save_for_backward(*views, *rows, *saved, kept.coefficients)

    def backward(ctx, grad_loss, *_):
        anchor, positive, negative, *rows = ctx.saved_tensors
        perturbed = [positive, negative]
        wants = ctx.needs_input_grad[:3]
        if from_text(ctx.options[1]).divergence != "full":
            # A view on its own is differentiated on its own.
            perturbed = _wanted(perturbed, wants[1:])
        views = (anchor, *perturbed)
        arguments = (grad_loss, *views, *rows, *ctx.options)
        if not ctx.inplace:
            return _wanted(ops.cppo_loss_backward(*arguments), wants)
        ops.cppo_loss_backward_(*arguments)
        _written(*views)
        return _wanted(views, wants)

    _differentiable(namespace, "cppo_loss", setup, backward)


def _linear_token_stats(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)

    def setup(ctx, given, output):
        ctx.options = (given.temperature, given.softcap, given.logits_dtype)
        kept = output[2:]
        ctx.mark_non_differentiable(*kept)
        head = (given.weight, given.bias, given.suppressed)
        kept = kept if given.keeps else (None, None)
        ctx.save_for_backward(given.hidden, *head, given.targets, given.mask, *kept)

    def backward(ctx, grad_logps, grad_entropy, *_):
        wants = list(ctx.needs_input_grad[:3])
        *inputs, logits, saved = ctx.saved_tensors
        if not _is_last():
            logits = saved = None  # gradients are written into them: these are made again
        gradients = ops.linear_token_stats_backward(
            grad_logps, grad_entropy, *inputs, logits, saved, *ctx.options, wants
        )
        _written(logits)
        return _wanted(gradients, wants)

    _differentiable(namespace, "linear_token_stats", setup, backward)


def _linear_cppo_loss(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)

    def setup(ctx, given, output):
        logits = (given.softcap, given.logits_dtype)
        ctx.options = (given.temperature, given.config, *logits)
        ctx.wants = given.wants
        ctx.mark_non_differentiable(*output[1:])
        ctx.resident, ctx.dtype = given.resident, given.anchor.dtype
        inputs = (given.anchor, given.positive, given.negative, given.weight, given.bias)
        rows = (given.suppressed, given.targets, given.advantages, given.cu_seqlens)
        kept = RESULTS["linear_cppo_loss"](*output)
        gradients = kept[-len(inputs) :]
        ctx.save_for_backward(*gradients if ctx.resident else (*inputs, *rows, kept.coefficients))

    def backward(ctx, grad_loss, *_):
        wants = [a and b for a, b in zip(ctx.wants, ctx.needs_input_grad[:5], strict=True)]
        if ctx.resident:
            return _wanted(_scaled(ctx.saved_tensors, grad_loss, ctx.dtype), wants)
        return _wanted(
            ops.linear_cppo_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.options, wants), wants
        )

    _differentiable(namespace, "linear_cppo_loss", setup, backward)


def _is_last() -> bool:
    """Whether the graph dies with this backward: nobody can ask for the gradients again."""
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _scaled(gradients: Iterable[Tensor], by: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of a unit upstream gradient, for this one."""
    last = _is_last()

    def scaled(gradient: Tensor) -> Tensor:
        # A copy of the weight's gradient would be the largest tensor of all: none is made in fp32,
        # nor any where the graph dies with this pass (a compiled graph may not). A GPU scales and
        # rounds in one pass.
        if last and type(gradient) is Tensor and (gradient.dtype == dtype or not gradient.is_cuda):
            return gradient.mul_(by).to(dtype)
        return torch.mul(gradient, by, out=gradient.new_empty(gradient.shape, dtype=dtype))

    return [scaled(gradient) for gradient in gradients]


def register(namespace: str) -> None:
    """Gives the ops of a namespace their gradients."""
    _token_stats(namespace)
    _cppo_loss(namespace)
    _linear_token_stats(namespace)
    _linear_cppo_loss(namespace)
