"""Triton kernels: numerics, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from cppo import LossConfig, Views, backends, reference
from cppo.testing import assert_op_as_accurate, evaluate, make_inputs

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs_here(op, **options):
    def move(value):
        if isinstance(value, Views):
            return Views(*map(move, value))
        return value.to(DEVICE) if isinstance(value, torch.Tensor) else value

    return {name: move(value) for name, value in make_inputs(op, **options).items()}


def kernels():
    return backends.pick("advantages_and_prune", torch.zeros(1, device=DEVICE), "triton")


@pytest.mark.parametrize("scope", ["group", "batch"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("prune", ["smallest", "largest", "random"])
def test_advantages_and_prune_equals_reference(scope, scale, prune):
    generator = torch.Generator().manual_seed(len(scope + scale + prune))
    for group_size, num_questions, dtype in ((1, 3, torch.float32), (6, 3, torch.float64)):
        count = group_size * num_questions
        # Thirds in fp64: many ties, and means that rounding moves off a reward.
        rewards = (torch.randint(0, 4, (count,), generator=generator) / 3.0).to(DEVICE, dtype)
        noise = torch.rand(count, generator=generator).to(DEVICE)
        for rate, drop_zero in ((0.0, True), (0.5, False), (0.9, True)):
            options = (rewards, group_size, rate, scale, 1e-4, scope, prune, drop_zero, noise)
            advantages, kept = kernels().advantages_and_prune(*options)
            expected, expected_kept = reference.advantages_and_prune(*options)
            torch.testing.assert_close(advantages, expected, rtol=2e-7, atol=1e-12)
            assert torch.equal(kept, expected_kept) and kept.dtype == torch.int64
            again = kernels().prune_completions(expected, group_size, rate, *options[5:])
            assert torch.equal(again, expected_kept)
            alone = kernels().group_advantages(*options[:2], *options[3:5])
            assert torch.equal(alone, advantages)


def test_ranking_of_nan_and_of_fp64_advantages():
    nan = torch.tensor([0.5, float("nan"), 2.0, float("nan")], device=DEVICE)
    assert kernels().prune_completions(nan, 4, 0.5).tolist() == [1, 3]
    close = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64, device=DEVICE)
    assert kernels().prune_completions(close, 2, 0.5).tolist() == [1]
    assert kernels().prune_completions(close, 2, 0.5, prune="largest").tolist() == [0]


def test_empty_and_long_units():
    advantages, kept = kernels().advantages_and_prune(torch.zeros(0, device=DEVICE), 4, 0.5)
    assert advantages.shape == kept.shape == (0,)
    rewards = torch.arange(4098.0, device=DEVICE)
    ours = kernels().advantages_and_prune(rewards, 4098, 0.5)
    spec = reference.advantages_and_prune(rewards, 4098, 0.5)
    assert all(torch.equal(one, other) for one, other in zip(ours, spec, strict=True))


def test_opcheck():
    kernels()
    op = torch.ops.cppo_triton.advantages_and_prune.default
    rewards = torch.arange(8.0, device=DEVICE)
    for unit_size, noise in ((4, None), (8, torch.rand(8, device=DEVICE))):
        prune = "smallest" if noise is None else "random"
        outcome = torch.library.opcheck(op, (rewards, 4, unit_size, 2, "group", 1e-4, prune, noise))
        assert set(outcome.values()) == {"SUCCESS"}
        prune_op = torch.ops.cppo_triton.prune_completions.default
        outcome = torch.library.opcheck(prune_op, (rewards, unit_size, 2, prune, noise))
        assert set(outcome.values()) == {"SUCCESS"}


@pytest.fixture
def shared_rows(monkeypatch):
    """So many multiprocessors that each row is cut into as many parts as it has tiles."""
    kernels()
    from cppo.triton_kernels import launch

    monkeypatch.setattr(launch, "multiprocessors", lambda device: 10_000)


def _with_hole(inputs, name, first, last):
    """Low logits, of which the columns of a whole part are -inf."""
    views = inputs[name] if isinstance(inputs[name], Views) else Views(inputs[name])
    for view in views:
        if view is not None:
            view -= 150
            view[..., first:last] = -torch.inf
    inputs["targets"] = inputs["targets"] % first
    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [9001, 3 * 8192])
@pytest.mark.usefixtures("shared_rows", "poisoned")
def test_programs_that_share_a_row(dtype, vocabulary):
    inputs = inputs_here("token_stats", lengths=(1, 2), vocabulary=vocabulary, dtype=dtype)
    assert_op_as_accurate("token_stats", "triton", inputs)
    inputs = _with_hole(inputs, "logits", 4096, 8192)
    assert_op_as_accurate("token_stats", "triton", inputs)
    first, again = (evaluate("token_stats", inputs, "triton") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("divergence", ["k3", "full"])
@pytest.mark.parametrize("vocabulary", [37, 40])
@pytest.mark.usefixtures("poisoned")
def test_aligned_rows_of_any_length(vocabulary, divergence):
    """As the tiles of the fused head: rows start at multiples of 16 bytes and may end anywhere."""
    inputs = inputs_here("cppo_loss", layout="packed", lengths=(2, 3), vocabulary=vocabulary)
    inputs["config"] = LossConfig(divergence=divergence, cpl_coef=1.0)
    padded = [torch.full((5, 48), torch.nan, device=DEVICE) for _ in range(3)]
    views = Views(*(wide[:, :vocabulary] for wide in padded))
    for view, logits in zip(views, inputs["logits"], strict=True):
        view.copy_(logits)
    kernels()
    from cppo.triton_kernels import launch

    assert launch.as_rows(views.anchor).alignment == (1 if vocabulary == 37 else 2)
    assert_op_as_accurate("cppo_loss", "triton", {**inputs, "logits": views})


@pytest.mark.parametrize("divergence", ["k3", "full"])
@pytest.mark.usefixtures("shared_rows", "poisoned")
def test_programs_that_share_a_row_of_three_views(divergence):
    config = LossConfig(divergence=divergence, cpl_coef=1.0, entropy_coef=0.1)
    inputs = inputs_here("cppo_loss", layout="packed", lengths=(2, 1, 1), vocabulary=4099)
    inputs = {**inputs, "config": config}
    assert_op_as_accurate("cppo_loss", "triton", inputs)
    inputs = _with_hole(inputs, "logits", 1024, 2048)
    assert_op_as_accurate("cppo_loss", "triton", inputs)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's checks of 32-bit arithmetic")
def test_no_32_bit_overflow():
    from interpreter import overflow_checks

    inputs = inputs_here("cppo_loss", layout="packed", lengths=(2, 3))
    expected = evaluate("cppo_loss", inputs, "triton")
    with overflow_checks():
        ours = evaluate("cppo_loss", inputs, "triton")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selection_of_a_long_completion_to_the_last_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    anchor, negative = torch.rand(2, 2, 5000, generator=generator, dtype=dtype)
    negative[1] = (negative[1] * 4).round()
    mask = torch.rand(2, 5000, generator=generator) < 0.8
    entropies = (anchor.to(DEVICE), negative.to(DEVICE))
    ours = kernels().fused.perception_mask(*entropies, 0.3, mask.to(DEVICE))
    assert torch.equal(ours, reference.perception_mask(*entropies, 0.3, mask.to(DEVICE)))
