"""The ops on logits as torch.library ops: opcheck, torch.compile, autograd's corners."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import cppo
from cppo import LossConfig, NumItems, Views, backends
from cppo.fused.batch import OF_ROWS
from cppo.fused.denominators import denominators
from cppo.options.loss import CORRECTIONS, IMPORTANCE
from cppo.testing import assert_op_as_accurate, compact_views, evaluate, make_inputs, with_weights

pytestmark = pytest.mark.usefixtures("poisoned")

FUSED = [name for name in backends.available("cppo_loss") if name != "reference"]
NAMESPACES = {"cpp": "cppo", "triton": "cppo_triton"}
CONFIGS = [
    LossConfig(cpl_coef=0.3),
    LossConfig(divergence="full", entropy_coef=0.01, kl_coef=0.1, cpl_coef=1.0),
    LossConfig(divergence="k1", importance="sequence", reduction="dapo", detach_anchor=True),
    LossConfig(divergence="full", detach_anchor=True, gating=False, cpl_reduction="sequence"),
    LossConfig(importance_correction="sequence_mask", kl_coef=0.1),
]
every_backend = pytest.mark.parametrize("backend", FUSED)
every_config = pytest.mark.parametrize(
    "config", CONFIGS, ids=["k3", "full", "k1", "detached", "corrected"]
)


def ops_of(backend):
    backends.pick("token_stats", torch.zeros(1), backend)
    return getattr(torch.ops, NAMESPACES[backend])


def leaves(views):
    return Views(*(view.clone().requires_grad_() for view in views))


# torch.library


@pytest.mark.interpreted("dtype0")
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_token_stats(backend, dtype):
    inputs = make_inputs("token_stats", dtype=dtype)
    logits = inputs["logits"].requires_grad_()
    op = ops_of(backend).token_stats.default
    rows = (inputs["targets"], inputs["mask"], None)
    outcome = torch.library.opcheck(op, (logits, *rows, 0.7, False))
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.interpreted("k3", "full", "corrected")
@every_backend
@every_config
def test_opcheck_of_the_loss(backend, config):
    inputs = with_weights(make_inputs("cppo_loss", layout="packed"))
    rows = [inputs.get(name) for name in ("targets", "advantages", *OF_ROWS)]
    by = denominators(rows[0], None, inputs["cu_seqlens"], None, config)
    options = (by.values, by.per_selected, config.temperature, config.text, False)
    op = ops_of(backend).cppo_loss.default
    arguments = (*leaves(inputs["logits"]), *rows, None, inputs["cu_seqlens"], *options)
    outcome = torch.library.opcheck(op, arguments)
    assert set(outcome.values()) == {"SUCCESS"}


@every_backend
def test_opcheck_of_the_perception_mask(backend):
    inputs = make_inputs("perception_mask", layout="packed")
    entropies = (inputs["anchor_entropy"], inputs["negative_entropy"])
    op = ops_of(backend).perception_mask.default
    outcome = torch.library.opcheck(op, (*entropies, 0.5, None, inputs["cu_seqlens"]))
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.interpreted()
@every_backend
@every_config
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_torch_compile_in_one_graph(backend, config, layout):
    torch.compiler.reset()  # each case compiles the same function anew
    inputs = with_weights(make_inputs("cppo_loss", layout=layout))
    num_items = NumItems(12, 70, 20)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(views):
        given = {**inputs, "logits": views, "num_items": num_items, "config": config}
        out = cppo.cppo_loss(**given, backend=backend)
        stats = cppo.token_stats(views.anchor, inputs["targets"], backend=backend, mask=mask)
        return out.loss + stats.entropy.sum() + stats.logps.sum(), out.metrics, out.logps

    mask = inputs.get("mask")
    eager, compiled = leaves(inputs["logits"]), leaves(inputs["logits"])
    expected, metrics, logps = torch._dynamo.disable(loss._torchdynamo_orig_callable)(eager)
    ours, our_metrics, our_logps = loss(compiled)
    assert torch.equal(ours, expected) and torch.equal(our_logps, logps)
    assert our_metrics.keys() == metrics.keys()
    expected.backward()
    ours.backward()
    for one, other in zip(compiled, eager, strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.interpreted()
@every_backend
def test_a_new_length_is_not_a_new_compilation(backend):
    compilations = []

    def count(graph, _):
        compilations.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count, dynamic=True)
    def entropy(logits, targets):
        return cppo.token_stats(logits, targets, backend=backend).entropy.sum()

    for rows in (3, 5, 8, 11):
        entropy(torch.randn(rows, 37), torch.zeros(rows, dtype=torch.int64))
    assert len(compilations) == 1


# Autograd


@pytest.mark.interpreted("padded-k3", "packed-detached", "compact-full", "compact-k1")
@every_backend
@every_config
@pytest.mark.parametrize("layout", ["padded", "packed", "compact"])
def test_in_place_gradients_are_the_same_and_bump_the_version(backend, config, layout):
    inputs = with_weights(
        make_inputs("cppo_loss", layout="padded" if layout == "padded" else "packed")
    )
    inputs["config"] = config
    if layout == "compact" and config.gating:
        compact = compact_views(inputs["logits"], inputs["advantages"], inputs["cu_seqlens"])
        inputs["logits"] = compact
    expected = evaluate("cppo_loss", inputs, backend)
    plain = leaves(inputs["logits"])
    views = Views(*(view * 1.0 for view in plain))
    versions = [view._version for view in views]
    out = cppo.cppo_loss(**{**inputs, "logits": views}, inplace=True, backend=backend)
    (out.loss * expected_scale(expected, out)).backward()
    for name, leaf, view, version in zip(Views._fields, plain, views, versions, strict=True):
        torch.testing.assert_close(leaf.grad, expected[f"grad.logits.{name}"])
        assert view._version > version
        assert torch.equal(view.detach(), leaf.grad)


def expected_scale(expected, out):
    """`evaluate` differentiates a fixed multiple of the loss."""
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(expected["loss"], out.loss.detach())
    return torch.randn((), generator=generator)


@every_backend
def test_in_place_is_an_error_for_who_still_needs_the_logits(backend):
    inputs = make_inputs("token_stats", layout="packed")
    leaf = inputs["logits"].clone().requires_grad_()
    logits = leaf * 1.0
    squares = logits.square().sum()
    stats = cppo.token_stats(logits, inputs["targets"], inplace=True, backend=backend)
    (gradient,) = torch.autograd.grad(stats.logps.sum(), logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


@every_backend
def test_in_place_with_strides_and_a_wrong_flag(backend):
    inputs = make_inputs("token_stats", layout="packed")
    plain = evaluate("token_stats", inputs, backend)["grad.logits"]
    transposed = inputs["logits"].T.contiguous().T
    ours = evaluate("token_stats", {**inputs, "logits": transposed, "inplace": True}, backend)
    torch.testing.assert_close(ours["grad.logits"], plain)
    with pytest.raises(TypeError, match="inplace must be True or False, got 1"):
        cppo.cppo_loss(**make_inputs("cppo_loss"), inplace=1)


@pytest.mark.interpreted("k3-wants0", "k3-wants2", "full-wants1")
@every_backend
@pytest.mark.parametrize("wants", [(True, False, False), (False, True, True), (True, False, True)])
@pytest.mark.parametrize("divergence", ["k3", "full"])
def test_only_the_views_that_want_a_gradient_get_one(backend, wants, divergence):
    inputs = make_inputs("cppo_loss")
    inputs["config"] = LossConfig(divergence=divergence, cpl_coef=0.5)
    everything = leaves(inputs["logits"])
    cppo.cppo_loss(**{**inputs, "logits": everything}, backend=backend).loss.backward()
    some = Views(
        *(v.clone().requires_grad_(w) for v, w in zip(inputs["logits"], wants, strict=True))
    )
    cppo.cppo_loss(**{**inputs, "logits": some}, backend=backend).loss.backward()
    for view, other, want in zip(some, everything, wants, strict=True):
        assert torch.equal(view.grad, other.grad) if want else view.grad is None


@every_backend
def test_gradient_checkpointing_and_autocast(backend):
    inputs = make_inputs("cppo_loss", layout="packed")
    weight = torch.randn(37, 37, requires_grad=True)

    def loss(weight):
        views = Views(*(view @ weight for view in inputs["logits"]))
        return cppo.cppo_loss(**{**inputs, "logits": views}, backend=backend).loss

    (plain,) = torch.autograd.grad(loss(weight), weight)
    (again,) = torch.autograd.grad(checkpoint(loss, weight, use_reentrant=False), weight)
    assert torch.equal(again, plain)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(weight)
    assert half.dtype == torch.float32
    (of_half,) = torch.autograd.grad(half, weight)
    assert of_half.dtype == torch.float32 and of_half.isfinite().all()
    expected = cppo.cppo_loss(
        **{
            **inputs,
            "logits": Views(*(v.bfloat16() @ weight.bfloat16() for v in inputs["logits"])),
        },
        backend="reference",
    )
    torch.testing.assert_close(half, expected.loss, rtol=1e-5, atol=1e-6)


# Any shape


@pytest.mark.interpreted()
@every_backend
@settings(max_examples=25)
@given(data=st.data())
def test_any_shape_is_as_accurate_as_eager(backend, data):
    lengths = data.draw(st.lists(st.integers(0, 9), max_size=5), label="lengths")
    options = {
        "dtype": data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "layout": data.draw(st.sampled_from(["padded", "packed"])),
        "vocabulary": data.draw(st.integers(1, 200) | st.sampled_from([1024, 2049])),
        "lengths": tuple(lengths),
        "seed": data.draw(st.integers(0, 10**6)),
    }
    temperature = data.draw(st.sampled_from([0.3, 1.0, 1.7]), label="temperature")
    stats = {**make_inputs("token_stats", **options), "temperature": temperature}
    assert_op_as_accurate("token_stats", backend, stats)
    config = LossConfig(
        temperature=temperature,
        divergence=data.draw(st.sampled_from(["k3", "k1", "full"])),
        fraction=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        gating=data.draw(st.booleans()),
        cpl_reduction=data.draw(st.sampled_from(["token", "sequence"])),
        importance=data.draw(st.sampled_from(IMPORTANCE)),
        importance_correction=data.draw(st.sampled_from(CORRECTIONS)),
        correction_min=data.draw(st.sampled_from([0.0, 0.9])),
        correction_max=data.draw(st.sampled_from([1.1, math.inf])),
    )
    inputs = {**make_inputs("cppo_loss", **options), "config": config}
    if config.importance_correction != "none" or data.draw(st.booleans(), label="weighted"):
        inputs = with_weights(inputs)
    assert_op_as_accurate("cppo_loss", backend, inputs)


@every_backend
def test_a_nan_row_poisons_only_itself_in_every_dtype(backend):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        logits = torch.randn(3, 2500).to(dtype)
        clean = cppo.token_stats(logits, torch.tensor([1, 2, 3]), backend=backend)
        for bad in (math.nan, math.inf, -math.inf):
            stained = logits.clone()
            stained[1, slice(2100, 2101) if bad != -math.inf else slice(None)] = bad
            stats = cppo.token_stats(stained, torch.tensor([1, 2, 3]), backend=backend)
            assert stats.logps[1].isnan() and stats.entropy[1].isnan()
            for row in (0, 2):
                assert stats.logps[row] == clean.logps[row]
                assert stats.entropy[row] == clean.entropy[row]
