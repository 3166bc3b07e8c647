"""The correction for another engine and the weights of tokens, by hand on every backend."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from loss_cases import RUNS, every_run, loss_of

import cppo
from cppo import LossConfig
from cppo.fused.schema import from_text
from cppo.testing import evaluate, in_fp64, make_inputs, to_packed, with_weights

NAN = math.nan

# Ratios of two completions of three and two tokens: old over sampling. The last place is padding.
RATIOS = torch.tensor([[2.0, 0.25, 1.0], [4.0, 0.5, NAN]])
KNOWN = torch.tensor([[True, True, False], [True, True, True]])  # the engine gave none of the third
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
# The ratios of the sequences are 2 / 4 = 0.5 and 4 / 2 = 2. All in [0.4, 2.5] or cut at them.
WEIGHTS = {
    "none": [[1, 1, 1], [1, 1, 0]],
    "bypass": [[1, 1, 1], [1, 1, 0]],
    "token_truncate": [[2, 0.4, 1], [2.5, 0.5, 0]],
    "token_mask": [[2, 0, 1], [0, 0.5, 0]],
    "sequence_truncate": [[0.6, 0.6, 0.6], [1.8, 1.8, 0]],
    "sequence_mask": [[0.5, 0.5, 0.5], [0, 0, 0]],
}
BOUNDS = {
    "sequence_truncate": {"correction_min": 0.6, "correction_max": 1.8},
    "sequence_mask": {"correction_min": 0.5, "correction_max": 1.8},
}


def options_of(correction, **more):
    bounds = BOUNDS.get(correction, {"correction_min": 0.4, "correction_max": 2.5})
    return LossConfig(importance_correction=correction, **bounds, **more)


def logps(dtype=torch.float32):
    old = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.5, NAN]], dtype=dtype)
    return old, (old - RATIOS.to(dtype).log()).masked_fill(~KNOWN, NAN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("correction", WEIGHTS)
def test_weights_by_hand(correction, dtype):
    old, sampling = logps(dtype)
    expected, config = torch.tensor(WEIGHTS[correction], dtype=dtype), options_of(correction)
    if correction == "sequence_mask":
        sampling[0, 0] -= 1e-3  # clear of the bound, by a factor that is below
        expected[0] *= math.exp(1e-3)
    ours = cppo.importance_weights(old, sampling, mask=MASK, config=config)
    torch.testing.assert_close(ours, expected)
    where, bounds = MASK.bool(), torch.tensor([0, 3, 5])
    packed = cppo.importance_weights(old[where], sampling[where], cu_seqlens=bounds, config=config)
    torch.testing.assert_close(packed, expected[where])


def test_a_weight_is_finite_whatever_its_bound():
    far = torch.tensor([[1e4, -1e4, math.inf, 0.0]])
    for correction in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        for bound in (3.0, math.inf):
            config = LossConfig(importance_correction=correction, correction_max=bound)
            ours = cppo.importance_weights(far, torch.zeros_like(far), config=config)
            largest = min(bound, math.exp(20))
            if correction.endswith("mask") and bound == 3:
                largest = 0.0
            expected = [largest, 0, largest, 1] if correction[0] == "t" else [largest] * 4
            torch.testing.assert_close(ours, torch.tensor([expected]))


def test_half_precision_and_nothing_at_all():
    old, config = torch.randn(2, 0).bfloat16(), LossConfig(importance_correction="sequence_mask")
    assert cppo.importance_weights(old, old, config=config).dtype == torch.float32
    none, bounds = torch.empty(0), torch.zeros(3, dtype=torch.int32)
    assert not len(cppo.importance_weights(none, none, cu_seqlens=bounds, config=config))


# The loss: logits of three tokens, whose log-probabilities the identity as a head gives too.


@pytest.mark.parametrize("importance", ["token", "sequence"])
@every_run
def test_loss_and_gradient_by_hand(op, backend, importance):
    """One completion of four tokens, A = 2, ratios 1, 1.1, 0.9 and 1.3, clipped at 1.2."""
    z = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, 2, 2])
    own = z.detach().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ratios = torch.tensor([1.0, 1.1, 0.9, 1.3], dtype=torch.float64)
    weights = torch.tensor([0.5, 3.0, 0.0, 1.0], dtype=torch.float64)
    output = loss_of(
        op,
        backend,
        z,
        targets=targets,
        advantages=torch.tensor([2.0]),
        old_logps=own - ratios.log(),
        token_weights=weights,
        cu_seqlens=torch.tensor([0, 4]),
        config=LossConfig(importance=importance),
    )
    output.loss.backward()
    if importance == "token":
        value = -2 * (0.5 * 1.0 + 3 * 1.1 + 0 + 1 * 1.2) / 4
        by_logp = -2 / 4 * torch.tensor([0.5 * 1.0, 3 * 1.1, 0, 0]).double()
    else:
        mean = (1.1 * 0.9 * 1.3) ** 0.25
        value = -2 * mean * (0.5 + 3 + 0 + 1) / 4
        # Each logp moves the mean by 1/4, and the mean moves all four: their weights, 4.5 in all.
        by_logp = (-2 / 4 * mean * 4.5 / 4 * torch.ones(4)).double()
    assert output.loss.item() == pytest.approx(value, rel=1e-6)
    assert output.metrics["policy_loss"].item() == pytest.approx(value, rel=1e-6)
    chosen = torch.nn.functional.one_hot(targets, 5)
    expected = by_logp[:, None] * (chosen - z.detach().softmax(-1))
    torch.testing.assert_close(z.grad, expected, rtol=1e-6, atol=1e-9)


@every_run
def test_kl_entropy_and_contrast_have_no_weight(op, backend):
    config = LossConfig(kl_coef=0.1, entropy_coef=0.2, cpl_coef=0.5)
    inputs = in_fp64({**make_inputs(op), "config": config})
    inputs["token_weights"] = torch.zeros_like(inputs["old_logps"])
    ours = evaluate(op, inputs, backend)
    without = evaluate(op, {**inputs, "advantages": inputs["advantages"] * 1e-300}, backend)
    assert ours["metrics.policy_loss"] == 0 and without["metrics.kl"] > 0
    for name in without:
        if not name.startswith("metrics.head_"):
            torch.testing.assert_close(ours[name], without[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("importance", ["token", "sequence"])
@every_run
def test_weights_of_one_change_no_bit(op, backend, importance):
    """Nor do sampling_logps without a correction, nor a correction of an engine that agrees."""
    config = LossConfig(importance=importance, kl_coef=0.1, cpl_coef=0.5, dual_clip=2.0)
    inputs = {**make_inputs(op), "config": config}
    plain = evaluate(op, inputs, backend)
    ones = {**inputs, "token_weights": torch.ones(6, 7)}
    ignored = {**inputs, "sampling_logps": inputs["old_logps"] - 1}
    equal = {**inputs, "sampling_logps": inputs["old_logps"]}
    equal["config"] = replace(config, importance_correction="sequence_mask")
    for given in (ones, ignored, equal):
        ours = evaluate(op, given, backend)
        assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("correction", [name for name in WEIGHTS if name != "none"])
@every_run
def test_own_logps_stand_in_for_old_ones(op, backend, correction):
    config = options_of(correction)
    inputs = with_weights(in_fp64({**make_inputs(op), "config": config}))
    inputs["old_logps"] = None
    ours = evaluate(op, inputs, backend)
    own = ours["logps"]
    if correction == "bypass":
        sampling = inputs["sampling_logps"]
        old = {"old_logps": sampling.where(~sampling.isnan(), own), "config": LossConfig()}
    else:
        old = {"old_logps": own}
    expected = evaluate(op, {**inputs, **old}, backend)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")


@every_run
def test_a_weight_of_zero_silences_a_ratio_that_overflows(op, backend):
    """A < 0 without a bound above: the surrogate is infinite, and has no say."""
    inputs = make_inputs(op)
    inputs["advantages"] = -inputs["advantages"].abs()
    inputs["old_logps"][0, 1] = -1e4
    inputs["token_weights"] = torch.ones(6, 7)
    assert evaluate(op, inputs, backend)["loss"].isinf()
    inputs["token_weights"][0, 1] = 0
    for importance in ("token", "sequence"):
        if importance == "sequence":
            inputs["token_weights"][0] = 0
        given = {**inputs, "config": LossConfig(importance=importance)}
        assert all(value.isfinite().all() for value in evaluate(op, given, backend).values())


@pytest.mark.parametrize("correction", ["token_mask", "sequence_mask"])
@pytest.mark.skipif(RUNS[-1][1] == "reference", reason="no fused backend is here")
def test_tokens_that_are_masked_out_cost_no_gradient(correction):
    options = {"correction_max": 1.1, "cpl_reduction": "token"}
    config = LossConfig(importance_correction=correction, **options)
    backend = "cpp" if ("linear_cppo_loss", "cpp") in RUNS else "triton"
    # fp16 recomputes: it finds out what has a gradient.
    inputs = {**make_inputs("linear_cppo_loss", dtype=torch.float16), "config": config}
    inputs["hidden"] = inputs["hidden"].anchor
    inputs["sampling_logps"] = inputs["old_logps"].clone()
    all_of_them = evaluate("linear_cppo_loss", inputs, backend)["metrics.head_gemm_rows"]
    inputs["sampling_logps"][:, 1:] -= 1
    some = evaluate("linear_cppo_loss", inputs, backend)["metrics.head_gemm_rows"]
    assert 21 <= some < 0.6 * all_of_them


# Options


def test_options_cross_as_text():
    config = LossConfig(importance_correction="token_mask", correction_max=math.inf)
    assert from_text(config.text) == config and "correction_max=inf" in config.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_correction": "tokens"}, "must be one of 'none', 'bypass', 'token_truncate'"),
        ({"correction_min": -0.1}, "LossConfig.correction_min must be a number >= 0"),
        ({"correction_min": math.inf}, "LossConfig.correction_min must be a number"),
        ({"correction_max": 0.0}, "LossConfig.correction_max must be a number > 0, got 0.0"),
        ({"correction_min": 4.0}, "LossConfig.correction_max must be a number > 4, got 3.0"),
        ({"correction_max": NAN}, "LossConfig.correction_max must be a number > 0, got nan"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LossConfig(**options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"config": None}, TypeError, "config must be a cppo.LossConfig, got NoneType"),
        ({"old_logps": torch.ones(2, 3).long()}, TypeError, "old_logps must be of floating dtype"),
        ({"sampling_logps": torch.ones(2, 2)}, ValueError, "(B, L) = (2, 3) like old_logps"),
        ({"mask": torch.ones(3)}, ValueError, "mask must be (B, L) = (2, 3) like old_logps"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens must be None for padded"),
        ({"sampling_logps": torch.ones(2, 3, device="meta")}, ValueError, "must be on cpu"),
    ],
)
def test_bad_input(changes, error, message):
    old, sampling = logps()
    good = {"old_logps": old, "sampling_logps": sampling, "mask": MASK, "config": LossConfig()}
    with pytest.raises(error, match=rf"^cppo\.importance_weights: .*{re.escape(message)}"):
        cppo.importance_weights(**{**good, **changes})


def test_packed_rows_need_their_bounds():
    with pytest.raises(ValueError, match="cu_seqlens must be given for packed old_logps"):
        cppo.importance_weights(torch.zeros(3), torch.zeros(3), config=LossConfig())
    bounds = torch.tensor([0, 2])
    with pytest.raises(ValueError, match="cu_seqlens must end at T = 3, got 2"):
        cppo.importance_weights(
            torch.zeros(3), torch.zeros(3), cu_seqlens=bounds, config=LossConfig()
        )


def test_weights_of_both_layouts_are_the_same_in_a_compiled_graph():
    config = LossConfig(importance_correction="sequence_truncate")
    inputs = with_weights(make_inputs("cppo_loss"))
    names = ("old_logps", "sampling_logps", "mask", "cu_seqlens")
    padded, packed = (
        {k: given[k] for k in names if k in given} for given in (inputs, to_packed(inputs))
    )
    ours = cppo.importance_weights(**padded, config=config)
    assert torch.equal(cppo.importance_weights(**packed, config=config), ours[inputs["mask"]])
    compiled = torch.compile(cppo.importance_weights, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**padded, config=config), ours)
