"""LM heads of every kind: capped and scaled logits, sharded weights, a weight elsewhere, LoRA."""

from __future__ import annotations

import contextlib
import sys
import types
from importlib.util import find_spec

import pytest
import torch
from launching import torchrun

import cppo
from cppo import LossConfig, Views, backends
from cppo.fused import head
from cppo.testing import assert_op_as_accurate, make_inputs

OPS = ("linear_token_stats", "linear_cppo_loss")
CONFIGS = {
    "resident": LossConfig(cpl_reduction="sequence", cpl_coef=0.5, entropy_coef=0.01),
    "recompute": LossConfig(cpl_reduction="token", cpl_coef=0.5, entropy_coef=0.01),
    "full": LossConfig(divergence="full", cpl_coef=0.5),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
COMPILED = [name for name in backends.available("linear_cppo_loss") if name != "reference"]


def capped_by_hand(inputs, logit_scale, softcap):
    """The same inputs for the op on logits."""
    weight, bias = inputs.pop("weight"), inputs.pop("bias")
    hidden = inputs.pop("hidden")

    def logits(states):
        z = logit_scale * (states @ weight.T + bias)
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    views = Views(*map(logits, hidden)) if isinstance(hidden, Views) else logits(hidden)
    return {"logits": views, **inputs}


@pytest.mark.interpreted()
@pytest.mark.parametrize("backend", backends.available("linear_cppo_loss"))
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["uncapped", "capped"])
@pytest.mark.parametrize("op", OPS)
def test_scaled_and_capped_logits_are_those_of_the_model(op, softcap, backend):
    inputs = make_inputs(op, dtype=torch.float64)
    by_hand = capped_by_hand(dict(inputs), 0.25, softcap)
    ours = getattr(cppo, op)(**inputs, logit_scale=0.25, softcap=softcap, backend=backend)
    exact = getattr(cppo, op.removeprefix("linear_"))(**by_hand, backend="reference")
    torch.testing.assert_close(ours.logps, exact.logps)
    torch.testing.assert_close(ours.entropy, exact.entropy)
    plain = getattr(cppo, op)(**inputs, backend=backend)
    assert not torch.allclose(plain.logps, ours.logps)


@pytest.mark.interpreted()
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@every_config
def test_accuracy_of_a_capped_head(config, layout, dtype, backend, monkeypatch):
    monkeypatch.setitem(head.TILE_BYTES, "cpu", 8 * 37 * 4)
    more = {"softcap": 3.0, "logit_scale": 1.5}
    inputs = {**make_inputs("linear_cppo_loss", layout=layout, dtype=dtype), **more}
    assert_op_as_accurate("linear_cppo_loss", backend, {**inputs, "config": config})
    inputs = {**make_inputs("linear_token_stats", layout=layout, dtype=dtype), **more}
    assert_op_as_accurate("linear_token_stats", backend, inputs)


@pytest.mark.interpreted()
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", backends.available("linear_cppo_loss"))
@every_config
def test_what_a_bias_rules_out_stays_ruled_out_by_a_cap(config, backend):
    inputs = {**make_inputs("linear_cppo_loss"), "config": config}
    ruled_out = 36
    inputs["targets"] = inputs["targets"].where(inputs["targets"] != ruled_out, 0)
    views = Views(*(view.clone().requires_grad_() for view in inputs["hidden"]))
    weight = inputs["weight"].clone().requires_grad_()
    bias = inputs["bias"].clone()
    bias[ruled_out] = -torch.inf
    given = {**inputs, "hidden": views, "weight": weight, "bias": bias}
    out = cppo.linear_cppo_loss(**given, softcap=3.0, backend=backend)
    out.loss.backward()
    for tensor in (*views, weight):
        assert tensor.grad.isfinite().all() and tensor.grad.any()
    assert not weight.grad[ruled_out].any()
    shorter = {"weight": inputs["weight"][:ruled_out], "bias": inputs["bias"][:ruled_out]}
    without = cppo.linear_cppo_loss(**{**inputs, **shorter}, softcap=3.0, backend=backend)
    torch.testing.assert_close(out.logps, without.logps)
    torch.testing.assert_close(out.entropy, without.entropy)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("softcap", 0.0, "softcap must be finite and > 0, got 0.0"),
        ("softcap", -30, "softcap must be finite and > 0, got -30"),
        ("logit_scale", 0, "logit_scale must be finite and > 0, got 0"),
        ("logit_scale", float("inf"), "logit_scale must be finite and > 0, got inf"),
    ],
)
def test_a_scale_or_cap_that_is_none_is_named(op, argument, value, message):
    with pytest.raises(ValueError, match=f"cppo.{op}: {message}"):
        getattr(cppo, op)(**make_inputs(op), **{argument: value})


def test_a_head_that_is_a_dtensor():
    """FSDP2 among them."""
    assert torchrun("sharded_head.py").count("all held") == 2


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_a_head_under_deepspeed():
    assert torchrun("zero3_head.py").count("all held") == 2


class Zero3:
    """What DeepSpeed does with a parameter, as far as the ops see it."""

    def __init__(self, weight):
        self.ds_tensor = weight.detach().clone()
        self.parameter = torch.nn.Parameter(self.ds_tensor.clone())
        # DeepSpeed makes the node that accumulates the gradient while the parameter is whole.
        self.node = self.parameter.expand_as(self.parameter).grad_fn.next_functions[0][0]
        self.parameter.ds_id, self.parameter.ds_tensor = 0, self.ds_tensor
        self.gathered = 0
        self.release()

    def release(self):
        self.parameter.data = torch.empty(0)
        self.parameter.ds_status = types.SimpleNamespace(name="NOT_AVAILABLE")

    def fetch(self):
        self.parameter.data = self.ds_tensor.clone()
        self.parameter.ds_status = types.SimpleNamespace(name="AVAILABLE")

    @contextlib.contextmanager
    def __call__(self, parameters):
        assert parameters[0] is self.parameter
        self.gathered += 1
        self.fetch()
        yield
        self.release()


@every_config
def test_a_head_that_is_partitioned_by_zero_3(config, monkeypatch):
    inputs = {**make_inputs("linear_cppo_loss"), "config": config}
    whole = inputs["weight"].clone().requires_grad_()
    expected = cppo.linear_cppo_loss(**{**inputs, "weight": whole}).loss
    expected.backward()
    zero = Zero3(inputs["weight"])
    deepspeed = types.ModuleType("deepspeed")
    deepspeed.zero = types.SimpleNamespace(GatheredParameters=zero)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    loss = cppo.linear_cppo_loss(**{**inputs, "weight": zero.parameter}).loss
    assert zero.gathered == 1 and zero.parameter.shape == (0,)
    torch.testing.assert_close(loss, expected)
    zero.fetch()  # as the engine does for the backward of the module that read it
    loss.backward()
    torch.testing.assert_close(zero.parameter.grad, whole.grad)
    assert zero.gathered == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_config
def test_a_head_on_another_device(config):
    """As with a device_map: hidden states here, the weight there, the results here."""
    inputs = {**make_inputs("linear_cppo_loss"), "config": config}
    results = []
    for device in ("cpu", "cuda"):
        views = Views(*(view.clone().requires_grad_() for view in inputs["hidden"]))
        heads = [inputs[name].to(device).requires_grad_() for name in ("weight", "bias")]
        given = {**inputs, "hidden": views, "weight": heads[0], "bias": heads[1]}
        out = cppo.linear_cppo_loss(**given)
        assert {value.device.type for value in (*out[:4], *out.metrics.values())} == {"cpu"}
        out.loss.backward()
        assert heads[0].grad.device == heads[0].device
        results.append([out.loss, out.logps, *(x.grad.cpu() for x in (*views, *heads))])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-4)


def test_the_bias_is_where_the_weight_is():
    inputs = make_inputs("linear_token_stats")
    with pytest.raises(ValueError, match="bias must be on cpu like weight, got meta"):
        cppo.linear_token_stats(**{**inputs, "bias": inputs["bias"].to("meta")})
