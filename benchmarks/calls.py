"""One call as it is timed: fresh leaves go in, outputs and gradients come out by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cppo.benchmarks.cases import Case
from cppo.benchmarks.inputs import Inputs
from cppo.records import Views

Outputs = dict[str, Tensor]
Call = Callable[[Inputs], Any]


def ours(case: Case, backend: str) -> Call:
    """The op of a case on one of our backends."""
    return lambda inputs: case.run(inputs, backend)


def run(case: Case, mode: str, inputs: Inputs, call: Call) -> Outputs:
    """One call with its gradients ("both") or without autograd ("forward")."""
    if mode == "forward":
        with torch.no_grad():
            return named(case, call(inputs))
    fresh, leaves = _leaves(inputs)
    outputs = named(case, call(fresh))
    differentiable = {k: v for k, v in outputs.items() if v.requires_grad}
    if "loss" in differentiable:
        differentiable = {"loss": differentiable["loss"]}
    rows = inputs["targets"].numel()
    gradients = torch.autograd.grad(
        list(differentiable.values()),
        list(leaves.values()),
        [_upstream(name, value, rows) for name, value in differentiable.items()],
        allow_unused=True,
    )
    outputs = {name: value.detach() for name, value in outputs.items()}
    for name, gradient in zip(leaves, gradients, strict=True):
        outputs[f"grad.{name}"] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return outputs


def timed(case: Case, mode: str, inputs: Inputs, call: Call) -> Callable[[], Any]:
    """What the clock runs for."""
    if case.sizes is None:
        return lambda: call(inputs)
    return lambda: run(case, mode, inputs, call)


def named(case: Case, result: Any) -> Outputs:
    """The result of an op as outputs by name."""
    if isinstance(result, dict):
        return result
    if isinstance(result, Tensor):
        return {case.op: result}
    if hasattr(result, "_asdict"):
        return {k: v for k, v in result._asdict().items() if isinstance(v, Tensor)}
    if isinstance(result, (tuple, list)):
        # Tensors, or the planners' lists of indices.
        parts = (x if isinstance(x, Tensor) else torch.tensor(x) for x in result)
        return {f"{case.op}[{i}]": part for i, part in enumerate(parts)}
    tensors = {k: v for k, v in vars(result).items() if isinstance(v, Tensor)}
    return tensors | {f"per_token.{k}": v for k, v in result.per_token.items()}


def _leaves(inputs: Inputs) -> tuple[Inputs, dict[str, Tensor]]:
    """The inputs with fresh leaves in place of what gradients flow to, and these leaves."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, value: Tensor) -> Tensor:
        leaves[name] = value.detach().requires_grad_()
        return leaves[name]

    fresh = dict(inputs)
    for name in ("logits", "hidden", "weight"):
        value = inputs.get(name)
        if isinstance(value, Views):
            fields = zip(value._fields, value, strict=True)
            views: list[Any] = [x if x is None else leaf(f"{name}.{f}", x) for f, x in fields]
            fresh[name] = Views(*views)
        elif isinstance(value, Tensor):
            fresh[name] = leaf(name, value)
    return fresh, leaves


def _upstream(name: str, value: Tensor, rows: int) -> Tensor:
    """The gradient that arrives at an output: gradients of the inputs are then of order one."""
    if name == "loss":
        return torch.full_like(value, float(rows))
    # Different at every row, the same in every dtype and for every variant.
    index = torch.arange(value.numel(), device=value.device, dtype=torch.float64)
    phase = index + (0.5 if name == "entropy" else 0.0)
    return torch.cos(phase).view(value.shape).to(value.dtype)
