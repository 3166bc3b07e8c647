"""The fused LM head: tiles of any size, both plans, frozen heads, torch.library."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cppo
from cppo import LossConfig, NumItems, Views, backends
from cppo.fused import head, linear
from cppo.fused.batch import OF_ROWS
from cppo.fused.denominators import denominators
from cppo.fused.schema import ARGUMENTS, PRIMITIVES, RESULTS
from cppo.options.loss import CORRECTIONS, IMPORTANCE
from cppo.testing import assert_op_as_accurate, evaluate, in_fp64, make_inputs, with_weights

FUSED = [name for name in backends.available("linear_cppo_loss") if name != "reference"]
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not FUSED, reason="the extension is not built"),
]
CONFIGS = {
    "resident": LossConfig(cpl_reduction="sequence", cpl_coef=0.5, entropy_coef=0.01),
    "recompute": LossConfig(cpl_reduction="token", cpl_coef=0.5, entropy_coef=0.01),
    "all rising": LossConfig(cpl_reduction="token", cpl_coef=0.5, fraction=1.0),
    "full": LossConfig(divergence="full", cpl_coef=0.5),
    "full, detached": LossConfig(divergence="full", cpl_coef=0.5, detach_anchor=True),
}
# Of the tests that give sampling_logps.
CORRECTED = {**CONFIGS, "corrected": LossConfig(importance_correction="sequence_mask")}
every_backend = pytest.mark.parametrize("backend", FUSED)
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def _ops(backend):
    backends.pick("linear_cppo_loss", torch.zeros(1), backend)
    return torch.ops.cppo_triton if backend == "triton" else torch.ops.cppo


@pytest.fixture(params=[1, 3, 8], ids=lambda rows: f"{rows} rows a tile")
def tile(request, monkeypatch):
    """Tiles of so few rows that completions of 7 do not fit, or several of 2 do."""
    monkeypatch.setitem(head.TILE_BYTES, "cpu", request.param * 37 * 8)
    return request.param


@pytest.mark.interpreted()
@every_config
@pytest.mark.parametrize("layout", ["padded", "packed"])
@every_backend
def test_tiles_of_any_size_give_the_same(config, layout, tile, backend):
    inputs = {**make_inputs("linear_cppo_loss", layout=layout), "config": config}
    same_as_the_reference(in_fp64(inputs), backend)


@pytest.mark.interpreted("resident-sequence_truncate")
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("plan", ["resident", "recompute"])
@every_backend
def test_corrections_in_tiles_of_any_size(plan, correction, tile, backend):
    """No completion is cut in two: a weight of a sequence is of all its tokens."""
    for importance in IMPORTANCE:
        options = {"importance": importance, "importance_correction": correction}
        config = replace(CONFIGS[plan], **options, correction_max=1.2)
        inputs = with_weights({**make_inputs("linear_cppo_loss"), "config": config})
        same_as_the_reference(in_fp64(inputs), backend)


@pytest.mark.interpreted("triton-dtype0")
@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_backend
def test_accuracy_in_small_tiles(config, dtype, backend, monkeypatch):
    monkeypatch.setitem(head.TILE_BYTES, "cpu", 3 * 37 * 4)
    inputs = {**make_inputs("linear_cppo_loss", dtype=dtype), "config": config}
    assert_op_as_accurate("linear_cppo_loss", backend, inputs)
    assert_op_as_accurate("linear_token_stats", backend, make_inputs("linear_token_stats"))


@pytest.mark.interpreted()
@every_backend
def test_slices_of_the_weight_give_the_same(monkeypatch, backend):
    """A CPU without bf16 arithmetic multiplies slices of the weight in fp32."""
    monkeypatch.setattr(head, "multiplies_natively", lambda dtype, device: False)
    monkeypatch.setattr(head, "SLICE_BYTES", 5 * 8 * 4)
    for config in CONFIGS.values():
        inputs = {**make_inputs("linear_cppo_loss", dtype=torch.bfloat16), "config": config}
        assert_op_as_accurate("linear_cppo_loss", backend, inputs)


def same_as_the_reference(inputs, backend):
    ours, exact = (evaluate("linear_cppo_loss", inputs, name) for name in (backend, "reference"))
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], msg=lambda m, n=name: f"{n}: {m}")
    return ours


def _metrics(backend, config, **changes):
    inputs = {**make_inputs("linear_cppo_loss"), "config": config, **changes}
    views = Views(*(view.requires_grad_() for view in inputs["hidden"]))
    inputs["weight"].requires_grad_(changes.pop("trains_head", True))
    return cppo.linear_cppo_loss(**{**inputs, "hidden": views}, backend=backend).metrics


@pytest.mark.interpreted()
@every_backend
def test_the_plan_and_its_gemm_rows_are_in_the_metrics(backend):
    # 21 rows; A > 0 in completions of 5, 7 and 0 tokens: f = 12 / 21.
    inputs = make_inputs("linear_cppo_loss")
    sampled = inputs["mask"].sum(1)
    gated = int(sampled[inputs["advantages"] > 0].sum())
    bounds = {"resident": (3, 5), "recompute": (4, 7), "all rising": (4, 7)}
    selected = {}
    for name, (all_rows, selected_rows) in bounds.items():
        metrics = _metrics(backend, CONFIGS[name])
        count = selected[name] = int(metrics["num_selected"])
        assert 0 < count <= gated < 21
        # An entropy bonus gives every row a gradient; clamped divergences can only save more.
        least = all_rows * 21 + gated if name != "all rising" else 0
        assert least < metrics["head_gemm_rows"] <= all_rows * 21 + gated + selected_rows * count
        assert metrics["head_resident_rows"] == (21 if name == "resident" else 0)
    for name in ("recompute", "all rising"):
        known = _metrics(backend, CONFIGS[name], num_items=NumItems(6, 21, selected[name]))
        assert known["head_resident_rows"] == 21


@pytest.mark.interpreted("triton-resident")
@every_config
@every_backend
def test_a_frozen_head_gets_no_gradient_and_costs_less(config, backend):
    inputs = {**make_inputs("linear_cppo_loss"), "config": config}
    everything = evaluate("linear_cppo_loss", inputs, backend)
    views = Views(*(view.clone().requires_grad_() for view in inputs["hidden"]))
    out = cppo.linear_cppo_loss(**{**inputs, "hidden": views}, backend=backend)
    assert out.metrics["head_gemm_rows"] < everything["metrics.head_gemm_rows"]
    out.loss.backward()
    scale = torch.randn((), generator=torch.Generator().manual_seed(0))
    for name, view in zip(Views._fields, views, strict=True):
        torch.testing.assert_close(view.grad * scale, everything[f"grad.hidden.{name}"])


@pytest.mark.interpreted()
@pytest.mark.parametrize("config", CORRECTED.values(), ids=CORRECTED)
@pytest.mark.parametrize("softcap", [None, 3.0])
@every_backend
def test_opcheck(config, backend, softcap):
    # With a loss above 0: opcheck differentiates its absolute value and compares what the op has
    # returned, and a backward scales the gradients among that where they are.
    inputs = with_weights(make_inputs("linear_cppo_loss", layout="packed"), seed=5)
    heads = [inputs[name].requires_grad_() for name in ("weight", "bias")]
    views = [view.requires_grad_() for view in inputs["hidden"]]
    rows = [inputs.get(name) for name in ("targets", "advantages", *OF_ROWS)]
    by = denominators(rows[0], None, inputs["cu_seqlens"], None, config)
    options = (by.values, by.per_selected, config.temperature, config.text, softcap, "fp32")
    suppressed = None if softcap is None else torch.tensor([36])
    arguments = (
        *views,
        *heads,
        suppressed,
        *rows,
        None,
        inputs["cu_seqlens"],
        *options,
        [True] * 5,
    )
    for resident in (False, True) if config.cpl_reduction == "sequence" else (False,):
        op = _ops(backend).linear_cppo_loss.default
        outcome = torch.library.opcheck(op, (*arguments, resident))
        assert set(outcome.values()) == {"SUCCESS"}


class _Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: values that the host reads, sizes that depend on them."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        to_list = torch.Tensor.tolist

        def counted(tensor):
            self.count += 1
            return to_list(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put_", "index_put") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        self.count += masks or name in ("nonzero", "_local_scalar_dense", "masked_select")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def kernels(monkeypatch):
    """The primitives, for tiles of exactly so many rows."""
    monkeypatch.setattr(head, "VECTOR", 1)
    return SimpleNamespace(**{op: getattr(torch.ops.cppo, op) for op in PRIMITIVES})


def loss_arguments(plan, layout, views=3, **changes):
    """`ARGUMENTS` of the loss and of its backward."""
    inputs = with_weights({**make_inputs("linear_cppo_loss", layout=layout), **changes})
    config = replace(CONFIGS[plan], importance_correction="sequence_mask")
    rows = [inputs.get(k) for k in ("targets", "advantages", *OF_ROWS, "mask", "cu_seqlens")]
    by = denominators(rows[0], *rows[-2:], None, config)
    seen = [view if number < views else None for number, view in enumerate(inputs["hidden"])]
    given = (*seen, inputs["weight"], None, torch.tensor([36]))
    logits = (None, "fp32", [True] * 5)
    options = (by.values, by.per_selected, config.temperature, config.text, *logits)
    forward = ARGUMENTS["linear_cppo_loss"](*given, *rows, *options, plan == "resident")

    def backward(coefficients):
        of_rows = (*rows[:2], rows[-1], coefficients, config.temperature, config.text)
        return ARGUMENTS["linear_cppo_loss_backward"](torch.ones(()), *given, *of_rows, *logits)

    return forward, backward


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.skipif("cpp" not in FUSED, reason="the extension is not built")
def test_the_host_waits_once_and_once_a_group(layout, kernels, monkeypatch):
    def waits(plan, rows_per_tile, **options):
        """Of a forward and a backward."""
        monkeypatch.setitem(head.TILE_BYTES, "cpu", rows_per_tile * 37 * 4)
        forward, backward = loss_arguments(plan, layout, **options)
        with _Waits(monkeypatch) as mode:
            found = RESULTS["linear_cppo_loss"](*linear.linear_cppo_loss(kernels, forward))
            if plan != "resident":
                linear.linear_cppo_loss_backward(kernels, backward(found.coefficients))
        assert found.loss.isfinite() and found.work[0] > 0
        return mode.count

    # Completions of 5, 2, 7, 0, 3 and 4 rows, of which 5, 7 and 0 count twice.
    assert waits("resident", 100) == 2
    assert waits("resident", 14) == 1 + 3
    for rows_per_tile in (100, 14, 3):
        assert waits("resident", rows_per_tile, views=1) == 1
    assert waits("recompute", 14) == 2 + 1


@pytest.mark.skipif("cpp" not in FUSED, reason="the extension is not built")
@pytest.mark.parametrize("masked", [False, True])
def test_the_host_waits_for_statistics_twice_at_most(masked, kernels, monkeypatch):
    monkeypatch.setitem(head.TILE_BYTES, "cpu", 5 * 37 * 4)
    inputs = make_inputs("linear_token_stats", layout="padded" if masked else "packed")
    given = [inputs[k] for k in ("hidden", "weight", "bias")] + [torch.tensor([36])]
    given += [inputs["targets"], inputs.get("mask")]
    options = (1.0, None, "fp32")
    with _Waits(monkeypatch) as mode:
        arguments = ARGUMENTS["linear_token_stats"](*given, *options, not masked)
        *stats, logits, saved = linear.linear_token_stats(kernels, arguments)
        kept = (None, None) if masked else (logits, saved)
        arguments = (*stats, *given, *kept, *options, [True] * 3)
        arguments = ARGUMENTS["linear_token_stats_backward"](*arguments)
        linear.linear_token_stats_backward(kernels, arguments)
    assert mode.count == (2 if masked else 1)


@pytest.mark.interpreted()
@pytest.mark.parametrize(("plan", "views"), [("resident", 1), ("resident", 3), ("recompute", 3)])
@every_backend
def test_tokens_without_a_weight_cost_no_gradient(plan, views, backend):
    config = replace(CONFIGS[plan], entropy_coef=0.0)
    inputs = {**make_inputs("linear_cppo_loss"), "config": config}
    if views == 1:
        inputs["hidden"] = inputs["hidden"].anchor
    every = evaluate("linear_cppo_loss", inputs, backend)["metrics.head_gemm_rows"]
    inputs["token_weights"] = torch.zeros(6, 7)
    inputs["token_weights"][:, 1:3] = 0.5
    ours = same_as_the_reference(inputs, backend)["metrics.head_gemm_rows"]
    # Of 5, 2, 7, 0, 3 and 4 tokens 2, 1, 2, 0, 2 and 2 have a weight; A = 0 in the last but one.
    if views == 1:
        assert (every, ours) == (21 + 2 * 18, 21 + 2 * 7)
    elif plan == "resident":  # any token of a gated completion may be a perception token
        assert every - ours == 2 * (18 - 15)
    else:
        assert every - ours >= 3 * 2 * (18 - 15)


@pytest.mark.interpreted()
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@every_backend
def test_completions_without_an_advantage_cost_no_gradient(kl_coef, backend):
    """Unless the distance to the reference policy gives them one."""
    config = LossConfig(kl_coef=kl_coef)
    inputs = {**make_inputs("linear_cppo_loss", layout="packed"), "config": config}
    inputs["hidden"] = inputs["hidden"].anchor
    inputs["advantages"] = inputs["advantages"].where(inputs["advantages"] > 0, 0.0)
    ours = evaluate("linear_cppo_loss", inputs, backend)
    assert ours["metrics.head_gemm_rows"] == 21 + 2 * (21 if kl_coef else 12)
    exact = evaluate("linear_cppo_loss", inputs, "reference")
    for name in ("loss", "grad.hidden", "grad.weight", "grad.bias"):
        torch.testing.assert_close(ours[name], exact[name])


@pytest.mark.interpreted()
@pytest.mark.parametrize("config", CORRECTED.values(), ids=CORRECTED)
@every_backend
def test_torch_compile_in_one_graph(config, backend):
    inputs = {**make_inputs("linear_cppo_loss", layout="packed"), "config": config}
    inputs = with_weights(inputs)

    def loss(views, weight):
        given = {**inputs, "hidden": views, "weight": weight}
        return cppo.linear_cppo_loss(**given, backend=backend).loss

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        views = Views(*(view.clone().requires_grad_() for view in inputs["hidden"]))
        weight = inputs["weight"].clone().requires_grad_()
        value = call(views, weight)
        value.backward()
        results.append([value.detach(), weight.grad, *(view.grad for view in views)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.interpreted()
@every_backend
def test_statistics_opcheck_and_scaled_upstream_gradients(backend):
    inputs = make_inputs("linear_token_stats")
    hidden, weight, bias = (inputs[n].requires_grad_() for n in ("hidden", "weight", "bias"))
    op = _ops(backend).linear_token_stats.default
    given = (hidden, weight, bias, torch.tensor([36]), inputs["targets"].clamp(min=0))
    more = (inputs["mask"], 0.8, 3.0, "fp32", False)
    assert set(torch.library.opcheck(op, (*given, *more)).values()) == {"SUCCESS"}
    # Logits are kept where nothing is traced.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    more = (None, 0.8, None, "input", True)
    outcome = torch.library.opcheck(op, (*given, *more), test_utils=checks)
    assert set(outcome.values()) == {"SUCCESS"}
    inputs = make_inputs("linear_cppo_loss")
    for config in CONFIGS.values():
        views = Views(*(view.clone().requires_grad_() for view in inputs["hidden"]))
        given = {**inputs, "hidden": views, "config": config}
        loss = cppo.linear_cppo_loss(**given, backend=backend).loss
        once = torch.autograd.grad(loss, views, retain_graph=True)
        scaled = torch.autograd.grad(loss, views, torch.tensor(-3.0))
        for one, other in zip(once, scaled, strict=True):
            torch.testing.assert_close(other, -3 * one)


@every_config
def test_a_grad_scaler_keeps_small_gradients_of_a_fp16_head(config, monkeypatch):
    """On a device that multiplies fp16, tiles hold gradients in fp16: 2^-24 is the smallest."""
    monkeypatch.setattr(head, "multiplies_natively", lambda dtype, device: True)
    sizes = {"vocabulary": 2000, "hidden_size": 16, "lengths": (50, 20, 70, 0, 30, 40)}
    inputs = make_inputs("linear_cppo_loss", dtype=torch.float16, **sizes)
    inputs |= {"num_items": NumItems(64, 64 * 256, 64 * 100), "config": config}
    inputs |= dict.fromkeys(("bias", "old_logps", "ref_logps"))
    inputs["weight"] *= 0.3
    gradients = []
    for given in (in_fp64(inputs), {**inputs, "logits_dtype": "input"}):
        weight = given["weight"].requires_grad_()
        loss = cppo.linear_cppo_loss(**given, backend="cpp").loss
        (gradient,) = torch.autograd.grad(loss * 2**16, weight)
        gradients.append(gradient.double())
    exact, ours = gradients
    # Of the tokens that are never sampled: sums of what the softmax leaves them.
    rest = ~torch.isin(torch.arange(2000), inputs["targets"])
    assert (ours - exact)[rest].norm() < 0.01 * exact[rest].norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_that_is_kept_gives_its_gradients_again(compiled):
    """They are scaled in place where nobody can ask for them again."""
    inputs = {**make_inputs("linear_cppo_loss"), "config": CONFIGS["resident"]}

    def loss(weight):
        return cppo.linear_cppo_loss(**{**inputs, "weight": weight}, backend="cpp").loss

    call = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    weight = inputs["weight"].clone().requires_grad_()
    value = call(weight)
    twice = [torch.autograd.grad(value, weight, g, retain_graph=True)[0] for g in torch.ones(2) * 2]
    (once,) = torch.autograd.grad(value, weight)
    assert torch.equal(twice[0], twice[1]) and torch.equal(twice[0], 2 * once)
