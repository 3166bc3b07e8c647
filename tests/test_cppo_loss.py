"""cppo_loss and linear_cppo_loss on every backend: accuracy and invariants."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import BACKENDS, every_run

import cppo
from cppo import LossConfig, NumItems, Views
from cppo.testing import (
    ROW_CASES,
    assert_op_as_accurate,
    compact_views,
    evaluate,
    in_fp64,
    make_inputs,
    to_packed,
    with_weights,
)

pytestmark = pytest.mark.usefixtures("poisoned")

CONFIGS = {
    "default": LossConfig(),
    "dapo": LossConfig(reduction="dapo", clip_high=0.28, cpl_reduction="sequence", kl_coef=0.04),
    "dr_grpo": LossConfig(reduction="dr_grpo", max_length=7, divergence="k1", temperature=0.8),
    "gspo": LossConfig(importance="sequence", clip_low=0.02, clip_high=0.03, entropy_coef=0.01),
    "detached": LossConfig(detach_anchor=True, cpl_coef=1.0, entropy_coef=0.02),
    "full": LossConfig(divergence="full", dual_clip=3.0, cpl_coef=1.0, gating=False),
    "token_truncate": LossConfig(
        importance_correction="token_truncate", correction_min=0.9, correction_max=1.1, kl_coef=0.1
    ),
    "token_mask": LossConfig(
        importance_correction="token_mask", correction_max=1.1, reduction="dapo", dual_clip=1.2
    ),
    "sequence_truncate": LossConfig(importance_correction="sequence_truncate", entropy_coef=0.01),
    "sequence_mask of gspo": LossConfig(
        importance="sequence", importance_correction="sequence_mask", correction_min=0.5
    ),
    "bypass": LossConfig(importance_correction="bypass", divergence="full"),
    "cpl_all": LossConfig(perception="cpl_all", cpl_reduction="token", cpl_coef=1.0),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def inputs_of(op, config, *case, **options):
    inputs = {**make_inputs(op, *case, **options), "config": config}
    return inputs if config.importance_correction == "none" else with_weights(inputs)


def views_of(op):
    return "hidden" if op.startswith("linear") else "logits"


def close(ours, expected, names=None, **tolerance):
    for name in names or expected:
        torch.testing.assert_close(
            ours[name], expected[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def results(outputs):
    """Loss, metrics and gradients: what does not depend on the layout or on what was saved."""
    names = [n for n in outputs if n == "loss" or n.startswith(("grad.", "metrics."))]
    return [n for n in names if not n.startswith("metrics.head_")]


@pytest.mark.interpreted("", linear=["random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ROW_CASES)
@every_run
def test_accuracy(op, backend, case, dtype):
    inputs = {**make_inputs(op, case, dtype=dtype), "config": LossConfig(cpl_coef=0.3)}
    assert_op_as_accurate(op, backend, inputs)
    assert_op_as_accurate(op, backend, to_packed(inputs))


@pytest.mark.interpreted("", linear=[""])
@every_config
@every_run
def test_accuracy_of_every_option(op, backend, config):
    inputs = inputs_of(op, config, seed=1)
    assert_op_as_accurate(op, backend, inputs)
    outputs = evaluate(op, inputs, backend)
    assert outputs["perception_mask"].any() and outputs["metrics.cpl_loss"] > 0
    assert all(outputs[name].any() for name in results(outputs) if name.startswith("grad."))


FAR_CASES = ["large", "low", "minus_inf_columns", "lowest_columns", "one_finite"]


@pytest.mark.parametrize("case", FAR_CASES)
@every_run
def test_accuracy_of_the_full_divergence(op, backend, case):
    inputs = {**make_inputs(op, case), "config": CONFIGS["full"]}
    assert_op_as_accurate(op, backend, inputs)
    assert all(value.isfinite().all() for value in evaluate(op, inputs, backend).values())


@pytest.mark.parametrize("view", ["positive", "negative"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_one_view_alone_forbids(backend, view):
    """Its logit of finfo.min makes a loss of some 1e36, not infinity and not NaN gradients."""
    config = LossConfig(cpl_coef=1.0, divergence="full", tau=1.0, gating=False)
    inputs = {**make_inputs("cppo_loss"), "config": config}
    getattr(inputs["logits"], view)[..., 1] = torch.finfo(torch.float32).min
    assert_op_as_accurate("cppo_loss", backend, inputs)
    assert all(value.isfinite().all() for value in evaluate("cppo_loss", inputs, backend).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_vocabulary_of_qwen(backend):
    inputs = make_inputs("cppo_loss", lengths=(2, 1, 3), vocabulary=151_936, layout="packed")
    assert_op_as_accurate("cppo_loss", backend, inputs)


# Layouts


@pytest.mark.interpreted("default", "full", "sequence_mask")
@every_config
@every_run
def test_packed_equals_padded(op, backend, config):
    inputs = in_fp64(inputs_of(op, config))
    mask, name = inputs["mask"], views_of(op)
    padded = evaluate(op, inputs, backend)
    packed = evaluate(op, to_packed(inputs), backend)
    same = [n for n in results(padded) if not n.startswith(f"grad.{name}")]
    close(packed, padded, same)
    for field in (
        "logps",
        "entropy",
        "perception_mask",
        *(f"grad.{name}.{v}" for v in Views._fields),
    ):
        torch.testing.assert_close(packed[field], padded[field][mask])
        assert not padded[field][~mask].any(), field


@pytest.mark.interpreted("both-padded", "both-packed", "negative-packed", linear=["both-packed"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("which", ["both", "positive", "negative"])
@every_run
def test_compact_views_equal_full_views(op, backend, layout, which):
    inputs = in_fp64({**make_inputs(op, layout=layout), "config": LossConfig(cpl_coef=0.5)})
    name = views_of(op)
    full, advantages = inputs[name], inputs["advantages"]
    compact = compact_views(full, advantages, inputs.get("cu_seqlens"))
    given = compact if which == "both" else full._replace(**{which: getattr(compact, which)})
    expected = evaluate(op, inputs, backend)
    ours = evaluate(op, {**inputs, name: given}, backend)
    perturbed = [f"grad.{name}.{view}" for view in ("positive", "negative")]
    close(ours, expected, [n for n in expected if n not in perturbed])
    gradients = Views(full.anchor, *(expected[n] for n in perturbed))
    gated = compact_views(gradients, advantages, inputs.get("cu_seqlens"))
    for n, view, gradient in zip(perturbed, ("positive", "negative"), gated[1:], strict=True):
        torch.testing.assert_close(
            ours[n], gradient if which in ("both", view) else expected[n], msg=n
        )


@pytest.mark.interpreted("padded-full", "packed-compact")
@pytest.mark.parametrize("rows", ["full", "compact"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@every_run
def test_no_completion_with_a_positive_advantage(op, backend, layout, rows):
    inputs = make_inputs(op, layout=layout)
    name = views_of(op)
    inputs["advantages"] = -inputs["advantages"].abs()
    if rows == "compact":
        inputs[name] = compact_views(inputs[name], inputs["advantages"], inputs.get("cu_seqlens"))
        assert len(inputs[name].negative) == 0
    plain = evaluate(op, {**inputs, name: Views(inputs[name].anchor)}, backend)
    ours = evaluate(op, inputs, backend)
    close(ours, plain, [n for n in plain if not n.startswith("metrics.head_")])
    assert ours["metrics.cpl_loss"] == 0 and not ours["perception_mask"].any()
    assert not ours[f"grad.{name}.negative"].any()


# Batches and their parts


def part(inputs, op, rows):
    """The given completions of padded inputs."""

    def take(value):
        return Views(*(view[rows] for view in value)) if isinstance(value, Views) else value[rows]

    shared = ("weight", "bias", "config")
    return {k: v if k in shared else take(v) for k, v in inputs.items()}


@pytest.mark.interpreted("triton-grpo-token-True", "dapo-sequence-False", "dr_grpo-token-False")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cpl_reduction", ["token", "sequence"])
@pytest.mark.parametrize("reduction", ["grpo", "dapo", "dr_grpo"])
@every_run
def test_parts_add_up_to_the_whole(op, backend, reduction, cpl_reduction, packed):
    config = LossConfig(
        reduction=reduction, cpl_reduction=cpl_reduction, max_length=9, cpl_coef=0.5, kl_coef=0.1
    )
    inputs = in_fp64({**make_inputs(op), "config": config})
    whole = evaluate(op, inputs, backend)
    selected = whole["metrics.num_selected"] if cpl_reduction == "token" else None
    num_items = NumItems(len(inputs["mask"]), inputs["mask"].sum(), selected)
    total: dict[str, torch.Tensor] = {}
    for rows in (torch.tensor([0, 3]), torch.tensor([1, 2, 4, 5])):
        piece = part(inputs, op, rows)
        piece = to_packed(piece) if packed else piece
        ours = evaluate(op, {**piece, "num_items": num_items}, backend)
        head = ("grad.weight", "grad.bias")
        for n in ("loss", "metrics.policy_loss", "metrics.kl", "metrics.cpl_loss", *head):
            if n in ours:
                total[n] = total.get(n, 0) + ours[n]
        name = f"grad.{views_of(op)}.negative"
        expected = whole[name][rows]
        expected = expected[inputs["mask"][rows]] if packed else expected
        torch.testing.assert_close(ours[name], expected)
    close(total, whole, total.keys())


@pytest.mark.interpreted("triton-dr_grpo")
@pytest.mark.parametrize("reduction", ["grpo", "dapo", "dr_grpo"])
@every_run
def test_a_number_of_items_replaces_the_denominator(op, backend, reduction):
    config = LossConfig(reduction=reduction)
    inputs = {**make_inputs(op), "config": config}
    own = {"grpo": 6, "dapo": 21, "dr_grpo": 6 * 7}[reduction]
    expected = evaluate(op, inputs, backend)
    for num_items in (own, torch.tensor(own), torch.tensor(float(own))):
        close(evaluate(op, {**inputs, "num_items": num_items}, backend), expected)
    halved = evaluate(op, {**inputs, "num_items": 2.0 * own}, backend)
    torch.testing.assert_close(2 * halved["loss"], expected["loss"])


# What the terms mean


@every_run
def test_identical_views_leave_plain_grpo(op, backend):
    inputs = make_inputs(op)
    name = views_of(op)
    anchor = inputs[name].anchor
    plain = evaluate(op, {**inputs, name: anchor}, backend)
    ours = evaluate(op, {**inputs, name: Views(anchor, anchor.clone(), anchor.clone())}, backend)
    # Not bit for bit: the plan of a fused head, and with it the shape of a GEMM, may be another.
    torch.testing.assert_close(ours["loss"], plain["loss"])
    torch.testing.assert_close(ours[f"grad.{name}.anchor"], plain[f"grad.{name}"])
    assert not ours[f"grad.{name}.positive"].any() and not ours["perception_mask"].any()


@pytest.mark.parametrize("divergence", ["k3", "k1", "full"])
@every_run
def test_equal_perturbations_have_margin_zero(op, backend, divergence):
    config = LossConfig(divergence=divergence, cpl_reduction="token")
    inputs = {**make_inputs(op), "config": config}
    name = views_of(op)
    inputs[name] = inputs[name]._replace(positive=inputs[name].negative.clone())
    ours = evaluate(op, inputs, backend)
    torch.testing.assert_close(ours["metrics.cpl_loss"], torch.tensor(math.log(2)))


@every_run
def test_coefficient_zero_is_plain_grpo(op, backend):
    inputs = {**make_inputs(op), "config": LossConfig(cpl_coef=0.0)}
    name = views_of(op)
    plain = evaluate(op, {**inputs, name: inputs[name].anchor}, backend)
    ours = evaluate(op, inputs, backend)
    assert torch.equal(ours["loss"], plain["loss"]) and ours["perception_mask"].any()
    alone = {**inputs, name: inputs[name]._replace(positive=None)}
    assert torch.equal(evaluate(op, alone, backend)["perception_mask"], ours["perception_mask"])


@pytest.mark.interpreted("triton-sequence")
@pytest.mark.parametrize("importance", ["token", "sequence"])
@every_run
def test_no_old_logps_means_on_policy(op, backend, importance):
    inputs = in_fp64({**make_inputs(op), "config": LossConfig(importance=importance)})
    logps = evaluate(op, inputs, backend)["logps"]
    expected = evaluate(op, {**inputs, "old_logps": logps}, backend)
    ours = evaluate(op, {**inputs, "old_logps": None}, backend)
    close(ours, expected)
    # The ratio is 1: the surrogate of a completion is its advantage.
    nonempty = inputs["advantages"] * inputs["mask"].any(1)
    torch.testing.assert_close(ours["metrics.policy_loss"], -nonempty.sum() / 6)


@pytest.mark.interpreted("", linear=[""])
@every_run
def test_gating_and_a_masked_nan_leave_no_trace(op, backend):
    inputs = make_inputs(op)
    name, mask = views_of(op), inputs["mask"]
    stained = Views(*(view.clone() for view in inputs[name]))
    for view in stained:
        view[~mask] = math.nan
    for view in stained[1:]:
        view[inputs["advantages"] <= 0] = math.nan
    logps = inputs["old_logps"].masked_fill(~mask, math.nan)
    clean = evaluate(op, inputs, backend)
    ours = evaluate(op, {**inputs, name: stained, "old_logps": logps}, backend)
    assert all(torch.equal(ours[n], clean[n]) for n in clean)


@every_run
def test_an_overflowing_ratio_of_a_clipped_row_leaves_no_nan(op, backend):
    inputs = make_inputs(op)
    inputs["advantages"] = inputs["advantages"].clamp(min=0)
    inputs["old_logps"] = torch.full_like(inputs["old_logps"], -1e4)
    ours = evaluate(op, inputs, backend)
    assert all(ours[n].isfinite().all() for n in ours)
    assert ours["metrics.clip_fraction"] > 0.3


@pytest.mark.parametrize("case", ["all_masked", "empty"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@every_config
@every_run
def test_nothing_to_learn_is_exactly_zero_and_attached(op, backend, config, layout, case):
    inputs = inputs_of(op, config, case, layout=layout)
    name = views_of(op)
    leaves = Views(*(view.requires_grad_() for view in inputs[name]))
    out = getattr(cppo, op)(**{**inputs, name: leaves}, backend=backend)
    assert out.loss.item() == 0 and out.loss.shape == () and out.loss.requires_grad
    assert all(value.isfinite() and value.ndim == 0 for value in out.metrics.values())
    gradients = torch.autograd.grad(out.loss, leaves)
    assert all(not gradient.any() for gradient in gradients)
