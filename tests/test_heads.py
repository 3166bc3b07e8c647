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
from cppo.testing import assert_op_as_accurate, evaluate, make_inputs

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


def with_suppressed(op, dtype=torch.float32, layout="padded"):
    """Inputs without a bias, three tokens suppressed that no row has sampled."""
    inputs = make_inputs(op, dtype=dtype, layout=layout)
    suppressed = torch.tensor([36, 0, 5])
    targets = inputs["targets"]
    return {
        **inputs,
        "bias": None,
        "targets": targets.where(~torch.isin(targets, suppressed), 1),
        "suppressed": suppressed,
    }


@pytest.mark.interpreted()
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["uncapped", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_config
def test_suppressed_tokens_are_those_of_a_bias(config, dtype, softcap, backend, monkeypatch):
    monkeypatch.setitem(head.TILE_BYTES, "cpu", 8 * 37 * 4)
    inputs = {**with_suppressed("linear_cppo_loss", dtype), "config": config, "softcap": softcap}
    assert_op_as_accurate("linear_cppo_loss", backend, inputs)
    bias = torch.zeros(37, dtype=dtype).index_fill(0, inputs["suppressed"], -torch.inf)
    for name in (backend, "reference"):
        ours = evaluate("linear_cppo_loss", inputs, name)
        biased = evaluate("linear_cppo_loss", {**inputs, "bias": bias, "suppressed": None}, name)
        assert ours["entropy"].any() and ours["grad.weight"].isfinite().all()
        assert not ours["grad.weight"][inputs["suppressed"]].any()
        for result in ("loss", "logps", "entropy"):
            torch.testing.assert_close(ours[result], biased[result], rtol=2e-5, atol=2e-5)
    inputs = {**with_suppressed("linear_token_stats", dtype), "softcap": softcap}
    assert_op_as_accurate("linear_token_stats", backend, inputs)


@pytest.mark.interpreted()
@pytest.mark.parametrize("backend", backends.available("linear_token_stats"))
def test_a_target_that_is_suppressed_has_no_probability(backend):
    inputs = make_inputs("linear_token_stats", layout="packed")
    suppressed = inputs["targets"][:1]
    logps = cppo.linear_token_stats(**inputs, suppressed=suppressed, backend=backend).logps
    assert torch.equal(logps.isneginf(), inputs["targets"] == suppressed)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_suppressed_target_gets_no_gradient(softcap):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator).double() for n in (13, 23))
    targets = torch.randint(23, (13,), generator=generator)
    found = []
    for backend in ("reference", "cpp"):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        options = {"suppressed": targets[:1], "softcap": softcap, "backend": backend}
        stats = cppo.linear_token_stats(*leaves, targets, **options)
        stats.logps.sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert not found[1][1][targets[0]].any()
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("logits_dtype", ["fp32", "input"])
def test_linear_token_stats_compiles_in_half_precision(logits_dtype):
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(11, 8).bfloat16()
    hidden.requires_grad_()
    targets = torch.arange(5)

    def total(hidden):
        stats = cppo.linear_token_stats(hidden, weight, targets, logits_dtype=logits_dtype)
        return stats.logps.sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(total(hidden), hidden)
    (found,) = torch.autograd.grad(compiled(hidden), hidden)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_suppressed_tokens_cost_no_rows_and_a_bias_does(dtype, monkeypatch):
    monkeypatch.setattr(head, "multiplies_natively", lambda dtype, device: True)
    weight, rounded = torch.zeros(1000, 8, dtype=dtype), {"logits_dtype": "input"}
    plain = head.Head(weight, **rounded)
    suppressing = head.Head(weight, suppressed=torch.tensor([3]), **rounded)
    assert suppressing.rows_per_tile == plain.rows_per_tile
    logits = suppressing.logits(torch.zeros(4, 8, dtype=dtype))
    assert logits.dtype == dtype and logits.isneginf().nonzero().tolist() == [
        [row, 3] for row in range(4)
    ]
    fewer = head.Head(weight, weight[:, 0], **rounded).rows_per_tile < plain.rows_per_tile
    assert fewer == (dtype == torch.bfloat16)


def halves(dtype, rows=40, size=64):
    """Hidden states, a weight, targets; every sum of products is exact in fp32, few are in bf16."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, size), (300, size)
    hidden, weight = (
        torch.randint(-9, 10, shape, generator=generator).div(8).to(dtype) for shape in shapes
    )
    return hidden, weight, torch.randint(300, (rows,), generator=generator)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["uncapped", "capped"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "a bias"])
@pytest.mark.parametrize("logits_dtype", ["fp32", "input"])
def test_every_machine_computes_the_same_logits(
    logits_dtype, with_bias, softcap, backend, monkeypatch
):
    """One that multiplies bf16 and one that does not."""
    hidden, weight, targets = halves(torch.bfloat16)
    more = {"bias": weight[:, 0] if with_bias else None, "softcap": softcap}
    results = []
    for native in (True, False):
        monkeypatch.setattr(head, "multiplies_natively", lambda *_, native=native: native)
        stats = cppo.linear_token_stats(
            hidden, weight, targets, logits_dtype=logits_dtype, backend=backend, **more
        )
        results.append(stats.logps)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    hidden, weight = hidden.double(), weight.double()
    more["bias"] = None if more["bias"] is None else more["bias"].double()
    exact = cppo.linear_token_stats(hidden, weight, targets, backend="reference", **more).logps
    error = (results[0] - exact).abs().max()
    assert error < 1e-5 if logits_dtype == "fp32" else 1e-3 < error < 0.1


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits_dtype", ["fp32", "input"])
@every_config
def test_accuracy_of_rounded_and_of_exact_logits(config, logits_dtype, dtype):
    sizes = {"vocabulary": 500, "hidden_size": 32, "lengths": (50, 20, 70, 0, 30, 40)}
    for op in OPS:
        inputs = make_inputs(op, dtype=dtype, **sizes)
        inputs |= {"config": config} if op == "linear_cppo_loss" else {}
        assert_op_as_accurate(op, "cpp", {**inputs, "bias": None, "logits_dtype": logits_dtype})


def test_a_rounded_gradient_of_exact_logits_is_that_of_the_product_of_the_model():
    """The specification: what autograd gives a linear layer whose values are not rounded."""
    hidden, weight, targets = halves(torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    stats = cppo.linear_token_stats(*leaves, targets, backend="reference")
    found = torch.autograd.grad(stats.logps.sum(), leaves)
    probabilities = (hidden.float() @ weight.float().T).softmax(-1)
    of_logits = torch.nn.functional.one_hot(targets, 300) - probabilities
    rounded = of_logits.bfloat16().float()
    expected = rounded @ weight.float(), rounded.T @ hidden.float()
    for gradient, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, exact.bfloat16(), rtol=2**-7, atol=1e-6)


def test_another_dtype_of_the_logits_is_named():
    with pytest.raises(ValueError, match="logits_dtype must be one of 'fp32', 'input', got 'bf16'"):
        cppo.linear_token_stats(**make_inputs("linear_token_stats"), logits_dtype="bf16")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "suppressed, error, message",
    [
        (torch.tensor([3, 37]), ValueError, r"must be in \[0, V\) = \[0, 37\), got 37 at 1"),
        (torch.tensor([-1]), ValueError, r"must be in \[0, V\) = \[0, 37\), got -1 at 0"),
        (torch.tensor([[3]]), ValueError, r"must be \(K,\), got shape \(1, 1\)"),
        (torch.tensor([3], dtype=torch.int32), TypeError, "must be torch.int64, got torch.int32"),
        (torch.tensor([3.0]), TypeError, "must be of integer dtype, got torch.float32"),
        ([3], TypeError, "must be a Tensor, got list"),
        (torch.tensor([3]).to("meta"), ValueError, "must be on cpu like weight, got meta"),
    ],
)
def test_suppressed_tokens_that_cannot_be_are_named(op, suppressed, error, message):
    with pytest.raises(error, match=f"cppo.{op}: suppressed {message}"):
        getattr(cppo, op)(**make_inputs(op), suppressed=suppressed)


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


@pytest.mark.gpu
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
