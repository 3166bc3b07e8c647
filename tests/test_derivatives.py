"""Every kind of derivative that PyTorch can ask an op for: right, or refused in words.

The reference has all of them. The kernels have the first derivative in reverse mode. What no
gradient flows into is constant in forward mode too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import cppo
from cppo import LossConfig, Views, backends
from cppo.fused.batch import OF_ROWS
from cppo.testing import make_inputs, with_weights

FUSED = [name for name in backends.available("cppo_loss") if name != "reference"]
every_backend = pytest.mark.parametrize("backend", FUSED)
LOSSES = ("cppo_loss", "linear_cppo_loss")
OPS = ("token_stats", "linear_token_stats", *LOSSES)
every_op = pytest.mark.parametrize("op", OPS)
NO_FORWARD = "has no forward-mode derivative; backend='reference' has one"
NO_TRANSFORM = "has no derivative under torch.func; backend='reference' has one"
Function = Callable[..., Tensor]


def function_of(op: str, backend: str, of: str = "") -> tuple[Function, Tensor]:
    """The op as a function of one tensor, the anchor where none is named, and that tensor."""
    inputs = make_inputs(op, layout="packed", lengths=(2, 3))
    if of == "removed_logps":  # PAPO's, which takes no perturbed views
        views = "hidden" if "linear" in op else "logits"
        inputs |= {views: inputs[views].anchor, of: inputs["old_logps"] - 0.5}
        inputs["config"] = LossConfig(perception="papo")
    elif of in OF_ROWS:
        inputs["config"] = LossConfig(importance_correction="token_truncate")
        inputs = with_weights(inputs)
    name = of or ("hidden" if "linear" in op else "logits")

    def run(value: Tensor) -> Tensor:
        old = inputs[name]
        given = {**inputs, name: Views(value, *old[1:]) if isinstance(old, Views) else value}
        found: Any = getattr(cppo, op)(**given, backend=backend)
        return found.loss if op in LOSSES else found.logps + 2 * found.entropy

    value = inputs[name]
    return run, value.anchor if isinstance(value, Views) else value


def packing(backend: str) -> dict[str, tuple[Function, Tensor]]:
    ids, mask = torch.randint(0, 9, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    response = mask.clone()
    response[:, :2] = 0

    def pack(value: Tensor) -> Tensor:
        batch = cppo.pack_completions(ids, mask, response, per_token={"x": value}, backend=backend)
        return batch.per_token["x"]

    unpack = cppo.pack_completions(ids, mask, response).unpack
    return {"pack_completions": (pack, torch.randn(2, 6)), "unpack": (unpack, torch.randn(8))}


def dual(function: Function, value: Tensor, tangent: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(value, tangent))).tangent


def refused(words: str, calls: list[Callable[[], Any]]) -> None:
    for call in calls:
        with pytest.raises(RuntimeError, match=words):
            call()


def refuses_forward_mode(name: str, function: Function, value: Tensor) -> None:
    tangent = torch.randn_like(value)
    leaf = value.clone().requires_grad_()
    refused(
        rf"{name}: {NO_FORWARD}",
        [
            lambda: dual(function, value, tangent),
            lambda: dual(function, leaf, tangent),
            lambda: torch.func.jvp(function, (value,), (tangent,)),
            lambda: torch.func.jacfwd(function)(value),
        ],
    )


@every_backend
@every_op
def test_forward_mode_is_refused(op: str, backend: str) -> None:
    refuses_forward_mode(op, *function_of(op, backend))
    if "linear" in op:
        refuses_forward_mode(op, *function_of(op, backend, "weight"))


@every_backend
@every_op
def test_a_tangent_of_the_upstream_gradient_is_refused(op: str, backend: str) -> None:
    function, value = function_of(op, backend)
    leaf = value.clone().requires_grad_()
    out = function(leaf)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(RuntimeError, match=f"{op}: {NO_FORWARD}"):
            torch.autograd.grad(out, leaf, upstream)


@every_op
def test_the_reference_has_forward_mode(op: str) -> None:
    function, value = function_of(op, "reference")
    tangent = torch.randn_like(value)
    leaf = value.clone().requires_grad_()
    out = function(leaf)
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, leaf, upstream)
    found = torch.func.jvp(function, (value,), (tangent,))[1]
    expected = (gradient * tangent).sum()
    torch.testing.assert_close((found * upstream).sum().float(), expected, rtol=1e-3, atol=1e-4)


@every_backend
@every_op
def test_torch_func_gets_no_derivative(op: str, backend: str) -> None:
    function, value = function_of(op, backend)

    def total(value: Tensor) -> Tensor:
        return function(value).sum()

    refused(
        rf"{op}: {NO_TRANSFORM}",
        [
            lambda: torch.func.grad(total)(value),
            lambda: torch.func.vjp(function, value),
            lambda: torch.func.jacrev(function)(value),
            lambda: torch.func.hessian(total)(value),
            lambda: torch.func.vmap(torch.func.grad(total))(torch.stack([value, value])),
        ],
    )


@every_backend
@every_op
def test_a_second_derivative_is_refused(op: str, backend: str) -> None:
    function, value = function_of(op, backend)
    leaf = value.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative; backend='reference'"):
        torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)


@every_backend
@every_op
def test_vmap_is_a_loop(op: str, backend: str) -> None:
    function, value = function_of(op, backend)
    several = torch.stack([value, value * 0.5, -value])
    loop = torch.stack([function(one) for one in several])
    torch.testing.assert_close(torch.func.vmap(function)(several), loop)
    several.requires_grad_()
    mapped = torch.func.vmap(function)(several)
    upstream = torch.randn_like(mapped)
    (ours,) = torch.autograd.grad(mapped, several, upstream)
    looped = torch.stack([function(one) for one in several])
    (expected,) = torch.autograd.grad(looped, several, upstream)
    # The loss of hidden states takes another plan, which rounds differently.
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@every_backend
def test_batched_upstream_gradients(backend: str) -> None:
    function, value = function_of("token_stats", backend)
    leaf = value.clone().requires_grad_()
    out = function(leaf)
    upstream = torch.randn(3, *out.shape)
    (ours,) = torch.autograd.grad(out, leaf, upstream, retain_graph=True, is_grads_batched=True)
    for found, one in zip(ours, upstream, strict=True):
        (expected,) = torch.autograd.grad(out, leaf, one, retain_graph=True)
        torch.testing.assert_close(found, expected)


@every_backend
@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("name", ["advantages", *OF_ROWS])
def test_what_gets_no_gradient_is_constant_in_forward_mode(
    op: str, backend: str, name: str
) -> None:
    function, value = function_of(op, backend, name)
    tangent = torch.ones_like(value)
    for found in (
        dual(function, value, tangent),
        torch.func.jvp(function, (value,), (tangent,))[1],
        torch.func.jvp(function_of(op, "reference", name)[0], (value,), (tangent,))[1],
    ):
        assert found is None or not found.any()


@pytest.mark.parametrize("name", ["pack_completions", "unpack"])
def test_packing(name: str) -> None:
    if "cpp" not in backends.available(name):
        pytest.skip("packing is compiled in the extension alone")
    function, value = packing("cpp")[name]
    refuses_forward_mode(name, function, value)
    with pytest.raises(RuntimeError, match=f"{name}: {NO_TRANSFORM}"):
        torch.func.grad(lambda value: function(value).sum())(value)
    # It only moves numbers, so its second derivative is that of what comes after.
    leaf = value.double().requires_grad_()
    assert torch.autograd.gradcheck(function, leaf)
    assert torch.autograd.gradgradcheck(lambda value: function(value) ** 3, leaf)


@pytest.mark.parametrize("backend", backends.available("group_advantages"))
def test_advantages_and_masks_are_constants(backend: str) -> None:
    rewards, entropy = torch.randn(8), torch.rand(2, 4)

    def advantages(rewards: Tensor) -> Tensor:
        return cppo.group_advantages(rewards, 4, backend=backend)

    def both(rewards: Tensor) -> Tensor:
        return cppo.advantages_and_prune(rewards, 4, 0.5, backend=backend)[0]

    def mask(entropy: Tensor) -> Tensor:
        return cppo.perception_mask(entropy, entropy + 1, backend=backend).float()

    for function, value in ((advantages, rewards), (both, rewards), (mask, entropy)):
        tangent = torch.ones_like(value)
        assert not torch.func.jvp(function, (value,), (tangent,))[1].any()
        found = dual(function, value, tangent)
        assert found is None or not found.any()
        leaf = value.clone().requires_grad_()
        assert not function(leaf).requires_grad
