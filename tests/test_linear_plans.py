"""The fused LM head: tiles of any size, both plans, frozen heads, torch.library."""

from __future__ import annotations

import pytest
import torch

import cppo
from cppo import LossConfig, NumItems, Views, backends
from cppo.ops import head
from cppo.testing import assert_op_as_accurate, evaluate, in_fp64, make_inputs

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        "cpp" not in backends.available("linear_cppo_loss"), reason="the extension is not built"
    ),
]
CONFIGS = {
    "resident": LossConfig(cpl_reduction="sequence", cpl_coef=0.5, entropy_coef=0.01),
    "recompute": LossConfig(cpl_reduction="token", cpl_coef=0.5, entropy_coef=0.01),
    "full": LossConfig(divergence="full", cpl_coef=0.5),
    "full, detached": LossConfig(divergence="full", cpl_coef=0.5, detach_anchor=True),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(params=[1, 3, 8], ids=lambda rows: f"{rows} rows a tile")
def tile(request, monkeypatch):
    """Tiles of so few rows that completions of 7 do not fit, or several of 2 do."""
    monkeypatch.setitem(head.TILE_BYTES, "cpu", request.param * 37 * 8)
    return request.param


@every_config
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_tiles_of_any_size_give_the_same(config, layout, tile):
    inputs = in_fp64({**make_inputs("linear_cppo_loss", layout=layout), "config": config})
    ours, exact = (evaluate("linear_cppo_loss", inputs, name) for name in ("cpp", "reference"))
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], msg=lambda m, n=name: f"{n}: {m}")


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_in_small_tiles(config, dtype, monkeypatch):
    monkeypatch.setitem(head.TILE_BYTES, "cpu", 3 * 37 * 4)
    inputs = {**make_inputs("linear_cppo_loss", dtype=dtype), "config": config}
    assert_op_as_accurate("linear_cppo_loss", "cpp", inputs)
    assert_op_as_accurate("linear_token_stats", "cpp", make_inputs("linear_token_stats"))


def test_slices_of_the_weight_give_the_same(monkeypatch):
    """A CPU without bf16 arithmetic multiplies slices of the weight in fp32."""
    monkeypatch.setattr(head, "multiplies_natively", lambda dtype, device: False)
    monkeypatch.setattr(head, "SLICE_BYTES", 5 * 8 * 4)
    for config in CONFIGS.values():
        inputs = {**make_inputs("linear_cppo_loss", dtype=torch.bfloat16), "config": config}
        assert_op_as_accurate("linear_cppo_loss", "cpp", inputs)


def _metrics(config, **changes):
    inputs = {**make_inputs("linear_cppo_loss"), "config": config, **changes}
    views = Views(*(view.requires_grad_() for view in inputs["hidden"]))
    inputs["weight"].requires_grad_(changes.pop("trains_head", True))
    return cppo.linear_cppo_loss(**{**inputs, "hidden": views}, backend="cpp").metrics


def test_the_plan_and_its_gemm_rows_are_in_the_metrics():
    # 21 rows; A > 0 in completions of 5, 7 and 0 tokens: f = 12 / 21.
    inputs = make_inputs("linear_cppo_loss")
    resident, recompute = _metrics(CONFIGS["resident"]), _metrics(CONFIGS["recompute"])
    assert resident["head_resident_rows"] == 21 and recompute["head_resident_rows"] == 0
    sampled = inputs["mask"].sum(1)
    seeing = int(sampled[inputs["advantages"] > 0].sum())
    selected = int(resident["num_selected"])
    assert 0 < selected < seeing < 21
    # An entropy bonus gives every row a gradient; clamped divergences can only save more.
    assert resident["head_gemm_rows"] <= 3 * 21 + seeing + 5 * selected
    assert recompute["head_gemm_rows"] <= 4 * 21 + seeing + 7 * selected
    assert resident["head_gemm_rows"] > 3 * 21 + seeing
    known = _metrics(CONFIGS["recompute"], num_items=NumItems(6, 21, selected))
    assert known["head_resident_rows"] == 21


@every_config
def test_a_frozen_head_gets_no_gradient_and_costs_less(config):
    inputs = {**make_inputs("linear_cppo_loss"), "config": config}
    everything = evaluate("linear_cppo_loss", inputs, "cpp")
    views = Views(*(view.clone().requires_grad_() for view in inputs["hidden"]))
    out = cppo.linear_cppo_loss(**{**inputs, "hidden": views}, backend="cpp")
    assert out.metrics["head_gemm_rows"] < everything["metrics.head_gemm_rows"]
    out.loss.backward()
    scale = torch.randn((), generator=torch.Generator().manual_seed(0))
    for name, view in zip(Views._fields, views, strict=True):
        torch.testing.assert_close(view.grad * scale, everything[f"grad.hidden.{name}"])


@every_config
def test_opcheck(config):
    inputs = make_inputs("linear_cppo_loss", layout="packed")
    heads = [inputs[name].requires_grad_() for name in ("weight", "bias")]
    views = [view.requires_grad_() for view in inputs["hidden"]]
    rows = [inputs[name] for name in ("targets", "advantages", "old_logps", "ref_logps")]
    options = [getattr(config, name) for name in config.__dataclass_fields__]
    arguments = (*views, *heads, *rows, None, inputs["cu_seqlens"], None, *options, [True] * 5)
    names = ["linear_cppo_loss"]
    if config.cpl_reduction == "sequence":
        names.append("linear_cppo_loss_gradients")
    for name in names:
        outcome = torch.library.opcheck(getattr(torch.ops.cppo, name).default, arguments)
        assert set(outcome.values()) == {"SUCCESS"}


@every_config
def test_torch_compile_in_one_graph(config):
    inputs = {**make_inputs("linear_cppo_loss", layout="packed"), "config": config}

    def loss(views, weight):
        given = {**inputs, "hidden": views, "weight": weight}
        return cppo.linear_cppo_loss(**given, backend="cpp").loss

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        views = Views(*(view.clone().requires_grad_() for view in inputs["hidden"]))
        weight = inputs["weight"].clone().requires_grad_()
        value = call(views, weight)
        value.backward()
        results.append([value.detach(), weight.grad, *(view.grad for view in views)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_statistics_opcheck_and_scaled_upstream_gradients():
    inputs = make_inputs("linear_token_stats")
    hidden, weight, bias = (inputs[n].requires_grad_() for n in ("hidden", "weight", "bias"))
    op = torch.ops.cppo.linear_token_stats.default
    arguments = (hidden, weight, bias, inputs["targets"], inputs["mask"], 0.8)
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}
    inputs = make_inputs("linear_cppo_loss")
    for config in CONFIGS.values():
        views = Views(*(view.clone().requires_grad_() for view in inputs["hidden"]))
        given = {**inputs, "hidden": views, "config": config}
        loss = cppo.linear_cppo_loss(**given, backend="cpp").loss
        once = torch.autograd.grad(loss, views, retain_graph=True)
        scaled = torch.autograd.grad(loss, views, torch.tensor(-3.0))
        for one, other in zip(once, scaled, strict=True):
            torch.testing.assert_close(other, -3 * one)
