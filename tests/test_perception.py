"""LossConfig.perception of both losses: PAPO's term, all gated tokens, VPPO's share of rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from loss_cases import RUNS, every_run, loss_of

import cppo
from cppo import LossConfig, NumItems
from cppo.fused.schema import from_text
from cppo.testing import assert_op_as_accurate, evaluate, in_fp64, make_inputs, to_packed

pytestmark = pytest.mark.usefixtures("poisoned")

FUSED = [backend for op, backend in RUNS if op.startswith("linear") and backend != "reference"]
PAPO = {
    "grpo": LossConfig(perception="papo", papo_coef=0.3),
    "dapo": LossConfig(perception="papo", papo_coef=0.3, reduction="dapo", kl_coef=0.1),
    "dr_grpo": LossConfig(perception="papo", reduction="dr_grpo", max_length=7, temperature=0.8),
    "gspo": LossConfig(perception="papo", importance="sequence", entropy_coef=-0.03),
}
every_config = pytest.mark.parametrize("config", PAPO.values(), ids=PAPO)
FAR = [-30.0, -3.0, -0.5, 0.0, 0.4, 2.0, 3.5]  # d of PAPO: both bounds and what is between


def papo_inputs(op, config=PAPO["grpo"], case="random", **options):  # noqa: B008
    """The anchor alone; d differs by the column, and the third completion has no removing view."""
    inputs = {**make_inputs(op, case, **options), "config": config}
    name = "hidden" if op.startswith("linear") else "logits"
    inputs[name] = inputs[name].anchor
    far = torch.tensor(FAR)[: inputs["old_logps"].shape[1]]
    removed = inputs["old_logps"] + far
    removed[2:3] = math.nan
    inputs["removed_logps"] = removed.masked_fill(~inputs["mask"], math.nan)
    return inputs


@pytest.mark.interpreted("grpo", linear=["grpo"])
@every_config
@every_run
def test_accuracy(op, backend, config):
    inputs = papo_inputs(op, config, seed=1)
    for same in (inputs, to_packed(inputs)):
        assert_op_as_accurate(op, backend, same)
    outputs = evaluate(op, inputs, backend)
    assert outputs["metrics.papo/kl"] > 0 and not outputs["perception_mask"].any()


@pytest.mark.interpreted("", linear=[""])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["random", "large", "all_masked", "one_row", "empty"])
@every_run
def test_accuracy_of_edges(op, backend, case, dtype):
    assert_op_as_accurate(op, backend, papo_inputs(op, case=case, dtype=dtype))


@every_run
def test_the_released_term_by_hand(op, backend):
    """PAPO's dp_actor.py: low_var_kl, d clamped at 20 and its estimate at 10, minus gamma times it.

    One completion of five tokens without an advantage, so that nothing else is there.
    """
    z = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, 2, 2, 6])
    own = z.detach().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    d = torch.tensor([0.0, 1.0, -2.0, 3.0, math.nan]).double()
    output = loss_of(
        op,
        backend,
        z,
        targets=targets,
        advantages=torch.zeros(1),
        removed_logps=own + d,
        cu_seqlens=torch.tensor([0, 5]),
        config=LossConfig(perception="papo", papo_coef=0.02),
    )
    output.loss.backward()
    value = (0 + (math.e - 2) + (math.exp(-2) + 1) + 10 + 0) / 5
    assert output.metrics["papo/kl"].item() == pytest.approx(value, rel=1e-6)
    assert output.loss.item() == pytest.approx(-0.02 * value, rel=1e-6)
    # d = removed - logp: the derivative by logp is gamma (e^d - 1), and none beyond the bound.
    by_logp = 0.02 / 5 * torch.tensor([0, math.e - 1, math.exp(-2) - 1, 0, 0]).double()
    chosen = torch.nn.functional.one_hot(targets, 7)
    expected = by_logp[:, None] * (chosen - z.detach().softmax(-1))
    torch.testing.assert_close(z.grad, expected, rtol=1e-6, atol=1e-9)


@every_run
def test_without_a_removing_view_or_a_coefficient_it_is_the_plain_loss(op, backend):
    inputs = papo_inputs(op)
    plain = evaluate(op, {**inputs, "config": LossConfig()}, backend)
    assert "metrics.papo/kl" not in plain, "removed_logps are not read"
    nowhere = {**inputs, "removed_logps": torch.full_like(inputs["old_logps"], math.nan)}
    free = {**inputs, "config": replace(PAPO["grpo"], papo_coef=0.0)}
    absent = {**free, "removed_logps": None}
    for given in (nowhere, free, absent):
        ours = evaluate(op, given, backend)
        names = [name for name in plain if not name.startswith("metrics.head_")]
        for field in names:  # A = 0 does not keep a row out of the products where PAPO has a say
            torch.testing.assert_close(ours[field], plain[field])
        assert ("metrics.papo/kl" in ours) == (given is not absent)


@pytest.mark.interpreted("grpo", linear=["grpo"])
@every_config
@every_run
def test_parts_add_up(op, backend, config):
    inputs = in_fp64(to_packed(papo_inputs(op, config)))
    whole = evaluate(op, inputs, backend)
    name, ends = "hidden" if op.startswith("linear") else "logits", inputs["cu_seqlens"].tolist()
    parts = []
    for first, last in ((0, 2), (2, 6)):
        rows = slice(ends[first], ends[last])
        part = dict(inputs, cu_seqlens=inputs["cu_seqlens"][first : last + 1] - ends[first])
        part["advantages"] = inputs["advantages"][first:last]
        for field in ("targets", name, "old_logps", "ref_logps", "removed_logps"):
            part[field] = inputs[field][rows]
        parts.append(evaluate(op, {**part, "num_items": NumItems(6, ends[-1])}, backend))
    for field in ("loss", "metrics.papo/kl"):
        torch.testing.assert_close(parts[0][field] + parts[1][field], whole[field])


@every_run
def test_entropy_below_zero_is_penalised(op, backend):
    inputs = in_fp64(papo_inputs(op, LossConfig()))
    plain, bonus, penalty = (
        evaluate(op, {**inputs, "config": LossConfig(entropy_coef=coef)}, backend)
        for coef in (0.0, 0.06, -0.06)
    )
    for name in ("loss", "grad.hidden" if op.startswith("linear") else "grad.logits"):
        torch.testing.assert_close(penalty[name] - plain[name], plain[name] - bonus[name])
    assert penalty["loss"] > plain["loss"]


@every_run
def test_every_token_of_a_gated_completion(op, backend):
    """The ablation cpl_use_vision_mask=False: the selection is the mask of the gated rows."""
    config = LossConfig(perception="cpl_all", cpl_coef=0.5)
    inputs = {**make_inputs(op), "config": config}
    found = evaluate(op, inputs, backend)
    gated = inputs["mask"] & (inputs["advantages"] > 0)[:, None]
    assert torch.equal(found["perception_mask"], gated)
    assert found["metrics.perception_share"] == 1 and found["metrics.num_selected"] == gated.sum()
    # What `fraction` = 1 selects is less: tokens whose entropy rises.
    name = "hidden" if op.startswith("linear") else "logits"
    calm = {**inputs, name: inputs[name]._replace(negative=inputs[name].anchor)}
    assert not evaluate(op, {**calm, "config": LossConfig(fraction=1.0)}, backend)[
        "perception_mask"
    ].any()
    assert torch.equal(evaluate(op, calm, backend)["perception_mask"], gated)


# Rows


@pytest.mark.interpreted()
@pytest.mark.parametrize("backend", FUSED)
def test_forty_percent_of_the_tokens_are_forty_percent_of_the_rows(backend):
    """A forward of all rows, and two products of a backward of those with a weight."""
    inputs = make_inputs("linear_cppo_loss", layout="packed", lengths=(10, 20, 5, 15))
    inputs["hidden"] = inputs["hidden"].anchor
    inputs["advantages"] = torch.tensor([1.0, -0.5, 0.7, -0.2])
    del inputs["ref_logps"]
    removed = inputs["old_logps"] - torch.rand(50, generator=torch.Generator().manual_seed(0))
    bounds = inputs["cu_seqlens"]
    weights = cppo.visual_dependency(inputs["old_logps"], removed, cu_seqlens=bounds).token_weights
    assert (weights > 0).sum() == 4 + 8 + 2 + 6

    def rows(**more):
        found = evaluate("linear_cppo_loss", {**inputs, **more}, backend)
        return found, int(found["metrics.head_gemm_rows"])

    plain, every = rows()
    ones, same = rows(token_weights=torch.ones(50))
    assert all(torch.equal(ones[name], plain[name]) for name in plain) and same == every
    some, fewer = rows(token_weights=weights, config=LossConfig(perception="vppo"))
    assert (every, fewer) == (50 + 2 * 50, 50 + 2 * 20)
    assert some["grad.hidden"].any(1).sum() <= 20
    zeros, none = rows(token_weights=torch.zeros(50))
    assert none == 50 and not zeros["grad.hidden"].any() and not zeros["grad.weight"].any()
    # PAPO's term needs every row, whatever it weighs, those of A = 0 included.
    papo = dict(config=LossConfig(perception="papo"), removed_logps=removed)
    inputs["advantages"][0] = 0
    assert rows(**papo, token_weights=weights)[1] == 50 + 2 * 50
    assert rows()[1] == 50 + 2 * 40


def test_options_cross_as_text():
    config = LossConfig(perception="papo", vppo_fraction=0.3, vppo_floor=0.5, papo_entropy_coef=0.1)
    assert from_text(config.text) == config and "perception=papo" in config.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perception": "clp"}, "perception must be one of 'cpl', 'cpl_all', 'vppo', 'papo'"),
        ({"vppo_fraction": 0.0}, "vppo_fraction must be a number > 0 and <= 1, got 0.0"),
        ({"vppo_floor": 1.1}, "vppo_floor must be a number >= 0 and <= 1, got 1.1"),
        ({"papo_coef": -0.1}, "papo_coef must be a number >= 0, got -0.1"),
        ({"papo_entropy_coef": math.inf}, "papo_entropy_coef must be a number >= 0"),
        ({"entropy_coef": math.nan}, "entropy_coef must be a finite number, got nan"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)
