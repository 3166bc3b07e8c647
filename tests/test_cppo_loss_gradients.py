"""The losses' gradients, and what all ops on rows share: memory, autocast, repeatability."""

from __future__ import annotations

import pytest
import torch
from loss_cases import BACKENDS, every_run

import cppo
from cppo import Views, backends
from cppo.testing import DIFFERENTIABLE, evaluate, in_fp64, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned")

ALL_RUNS = [(op, backend) for op in DIFFERENTIABLE for backend in backends.available(op)]


@every_run
def test_only_the_loss_is_attached_and_scales(op, backend):
    inputs = make_inputs(op)
    name = "hidden" if op.startswith("linear") else "logits"
    anchor = inputs[name].anchor.clone().requires_grad_()
    old = inputs["old_logps"].clone().requires_grad_()
    advantages = inputs["advantages"].clone().requires_grad_()
    changed = {name: inputs[name]._replace(anchor=anchor)}
    changed |= {"old_logps": old, "advantages": advantages}
    out = getattr(cppo, op)(**{**inputs, **changed}, backend=backend)
    assert not any(
        x.requires_grad
        for x in (out.logps, out.entropy, out.perception_mask, *out.metrics.values())
    )
    assert out.perception_mask.dtype == torch.bool and out.logps.dtype == torch.float32
    (once,) = torch.autograd.grad(out.loss, anchor, retain_graph=True)
    (scaled,) = torch.autograd.grad(out.loss, anchor, torch.tensor(-3.0), retain_graph=True)
    torch.testing.assert_close(scaled, -3 * once)
    expanded = out.loss.expand(4).sum() + 0 * anchor.sum() + anchor.square().sum()
    (both,) = torch.autograd.grad(expanded, anchor, retain_graph=True)
    torch.testing.assert_close(both, 4 * once + 2 * anchor)
    out.loss.backward()
    assert old.grad is None and advantages.grad is None


def same(ours, expected):
    for name, value in expected.items():
        assert torch.equal(ours[name], value.to(ours[name].dtype)), name


@pytest.mark.parametrize(("op", "backend"), ALL_RUNS)
def test_repeatable(op, backend):
    inputs = make_inputs(op)
    same(evaluate(op, inputs, backend), evaluate(op, inputs, backend))


@pytest.mark.parametrize(
    ("op", "backend"), [(op, backend) for op, backend in ALL_RUNS if op.startswith("linear")]
)
def test_autocast_casts_like_linear(op, backend):
    inputs = make_inputs(op)
    names = ("hidden", "weight", "bias")

    def cast(value, dtype):
        return Views(*(v.to(dtype) for v in value)) if isinstance(value, Views) else value.to(dtype)

    half = {k: cast(v, torch.bfloat16) if k in names else v for k, v in inputs.items()}
    expected = evaluate(op, half, backend)
    with torch.autocast("cpu", torch.bfloat16):  # backward, too
        ours = evaluate(op, inputs, backend)
        exact = evaluate(op, in_fp64(inputs), backend)
    assert ours["logps"].dtype == ours["grad.weight"].dtype == torch.float32
    same(ours, expected)
    # autocast leaves fp64 alone.
    same(exact, evaluate(op, in_fp64(inputs), backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_a_model_are_sliced(backend):
    inputs = make_inputs("cppo_loss")
    expected = evaluate("cppo_loss", inputs, backend)
    sliced = Views(*(torch.cat([v, v[:, :1] + 1], 1)[:, :-1] for v in inputs["logits"]))
    assert not sliced.anchor.is_contiguous()
    same(evaluate("cppo_loss", {**inputs, "logits": sliced}, backend), expected)


@pytest.mark.parametrize("op", ["token_stats", "cppo_loss"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_32_bit_offsets(op, backend):
    inputs = make_inputs(op, layout="packed", lengths=(2,), dtype=torch.bfloat16)
    near = inputs["logits"].anchor if op == "cppo_loss" else inputs["logits"]
    # The pages between the two rows are never touched, so they cost no memory.
    stride = 2**31 + 10
    far = torch.empty(0, dtype=near.dtype).set_(
        torch.UntypedStorage(2 * (stride + 64)), 0, near.shape, (stride, 1)
    )
    far.copy_(near)
    logits = inputs["logits"]._replace(anchor=far) if op == "cppo_loss" else far
    same(evaluate(op, {**inputs, "logits": logits}, backend), evaluate(op, inputs, backend))
