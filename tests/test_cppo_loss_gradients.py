"""The losses' gradients, and logits that lie in memory in other ways."""

from __future__ import annotations

import pytest
import torch

import cppo
from cppo import Views, backends
from cppo.testing import evaluate, in_fp64, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned")

OPS = ("cppo_loss", "linear_cppo_loss")
RUNS = [(op, backend) for op in OPS for backend in backends.available(op)]
BACKENDS = backends.available("cppo_loss")
every_run = pytest.mark.parametrize(("op", "backend"), RUNS)


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


@pytest.mark.parametrize("backend", backends.available("linear_cppo_loss"))
def test_autocast_casts_like_linear(backend):
    inputs = make_inputs("linear_cppo_loss")
    names = ("hidden", "weight", "bias")

    def cast(value, dtype):
        return Views(*(v.to(dtype) for v in value)) if isinstance(value, Views) else value.to(dtype)

    half = {k: cast(v, torch.bfloat16) if k in names else v for k, v in inputs.items()}
    expected = evaluate("linear_cppo_loss", half, backend)
    with torch.autocast("cpu", torch.bfloat16):  # backward, too
        ours = evaluate("linear_cppo_loss", inputs, backend)
        exact = evaluate("linear_cppo_loss", in_fp64(inputs), backend)
    assert ours["loss"].dtype == ours["grad.weight"].dtype == torch.float32
    same(ours, expected)
    # autocast leaves fp64 alone.
    same(exact, evaluate("linear_cppo_loss", in_fp64(inputs), backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_a_model_are_sliced(backend):
    inputs = make_inputs("cppo_loss")
    expected = evaluate("cppo_loss", inputs, backend)
    sliced = Views(*(torch.cat([v, v[:, :1] + 1], 1)[:, :-1] for v in inputs["logits"]))
    assert not sliced.anchor.is_contiguous()
    same(evaluate("cppo_loss", {**inputs, "logits": sliced}, backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_32_bit_offsets(backend):
    inputs = make_inputs("cppo_loss", layout="packed", lengths=(2,), dtype=torch.bfloat16)
    near = inputs["logits"].anchor
    # The pages between the two rows are never touched, so they cost no memory.
    stride = 2**31 + 10
    far = torch.empty(0, dtype=near.dtype).set_(
        torch.UntypedStorage(2 * (stride + 64)), 0, near.shape, (stride, 1)
    )
    far.copy_(near)
    views = inputs["logits"]._replace(anchor=far)
    expected = evaluate("cppo_loss", inputs, backend)
    ours = evaluate("cppo_loss", {**inputs, "logits": views}, backend)
    assert all(torch.equal(ours[n], expected[n]) for n in expected)
