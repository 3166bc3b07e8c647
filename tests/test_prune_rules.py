"""What stays by "variance", "shortest", "efficiency" and "unbiased", and the weights of chance.

Each rule is held to a reading of its formula that shares no code with ours: exact fractions for
the rewards, all outcomes of chance enumerated for "unbiased".
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from chance_cases import outcomes
from error_cases import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cppo
from cppo import LossConfig, NumItems, backends, reference
from cppo.options.trainer import PRUNES, SCALES, kept_per_unit

pytestmark = pytest.mark.usefixtures("poisoned")

BACKENDS = backends.available("advantages_and_prune")
NEW = ("variance", "shortest", "efficiency", "unbiased")
on_backends = pytest.mark.parametrize("backend", BACKENDS)
numbers = st.integers(-3, 3) | st.integers(-50, 50)
rates = st.sampled_from([0.0, 0.3, 0.5, 0.75, 0.9])
fewer = settings(max_examples=40, deadline=None)


def keep_of(rewards: list[int], keep: int) -> list[int]:
    """The subset of `keep` rewards of the form of PODS with the largest variance, by trying all."""
    falling = sorted(rewards, reverse=True)
    best: tuple[Fraction, list[int]] | None = None
    for highest in range(1, keep + 1):
        chosen = falling[:highest] + falling[len(falling) - keep + highest :]
        mean = Fraction(sum(chosen), keep)
        variance = sum((x - mean) ** 2 for x in chosen)
        if best is None or variance > best[0]:  # of equal ones the fewer highest
            best = Fraction(variance), chosen
    assert best is not None
    of_value = {value: [i for i, r in enumerate(rewards) if r == value] for value in set(rewards)}
    return sorted(i for value in set(best[1]) for i in of_value[value][: best[1].count(value)])


@on_backends
@given(st.lists(numbers, min_size=1, max_size=9), rates, st.sampled_from([0, 1_000_003]))
@fewer
def test_variance_is_the_largest_of_all_splits(backend, rewards, rate, offset):
    rewards = [reward + offset for reward in rewards]
    exact = torch.tensor(rewards, dtype=torch.float64)
    options: dict[str, Any] = {"prune": "variance", "backend": backend}
    kept = cppo.prune_completions(exact * 0, len(rewards), rate, rewards=exact, **options)
    assert kept.tolist() == keep_of(rewards, kept_per_unit(len(rewards), rate))
    both = cppo.advantages_and_prune(exact, len(rewards), rate, **options)
    assert torch.equal(both[1], kept)


@on_backends
@given(st.lists(st.tuples(numbers, st.integers(0, 9)), min_size=1, max_size=9), rates)
@fewer
def test_shortest_and_efficiency_rank_by_tokens(backend, rows, rate):
    rewards = torch.tensor([reward for reward, _ in rows], dtype=torch.float64)
    lengths = torch.tensor([length for _, length in rows])
    keep, indices = kept_per_unit(len(rows), rate), range(len(rows))
    of = {
        "shortest": lambda i: (rows[i][1], i),
        "efficiency": lambda i: (-Fraction(rows[i][0], max(rows[i][1], 1)), i),
    }
    for prune, order in of.items():
        options: dict[str, Any] = {"prune": prune, "lengths": lengths, "backend": backend}
        both = cppo.advantages_and_prune(rewards, len(rows), rate, **options)
        kept = cppo.prune_completions(both[0], len(rows), rate, rewards=rewards, **options)
        assert kept.tolist() == sorted(sorted(indices, key=order)[:keep])
        assert torch.equal(both[1], kept)


@on_backends
def test_the_formulas_of_the_papers_by_hand(backend):
    rewards = torch.tensor([0.5, 1.0, 0.0, 0.4, 0.9, 0.1, 0.6, 0.5], dtype=torch.float64)
    lengths = torch.tensor([50, 80, 10, 10, 20, 90, 15, 60])
    options: dict[str, Any] = {"advantages_of": "kept", "backend": backend}
    # PODS, 4 of 8: variances (n - 1) of the 0, 1, 2, 3 and 4 highest and the lowest for the rest:
    # 0.057, 0.203, 0.273, 0.203, 0.057 (its released loop, with torch.var). Two and two.
    advantages, kept = cppo.advantages_and_prune(rewards, 8, 0.5, prune="variance", **options)
    assert kept.tolist() == [1, 2, 4, 5]
    std = math.sqrt((2 * 0.5**2 + 2 * 0.4**2) / 3) + 1e-4
    expected = torch.tensor([0, 0.5, -0.5, 0, 0.4, -0.4, 0, 0]) / std
    torch.testing.assert_close(advantages, expected.float())
    # GFPO, 3 of 8 by length: 10, 10, 15 tokens with rewards 0, 0.4, 0.6.
    options["lengths"] = lengths
    advantages, kept = cppo.advantages_and_prune(rewards, 8, 0.625, prune="shortest", **options)
    assert kept.tolist() == [2, 3, 6]
    std = math.sqrt((1 / 9 + 1 / 225 + 16 / 225) / 2) + 1e-4
    expected = torch.tensor([0, 0, -1 / 3, 1 / 15, 0, 0, 4 / 15, 0]) / std
    torch.testing.assert_close(advantages, expected)
    # By reward per token: 0.045, 0.04, 0.04 lead; 0.0125, 0.01, 0.0083, 0.0011 and 0 follow.
    _, kept = cppo.advantages_and_prune(rewards, 8, 0.625, prune="efficiency", **options)
    assert kept.tolist() == [3, 4, 6]


@on_backends
def test_of_equal_ones_the_lower_index_stays(backend):
    def kept(prune, rewards, rate):
        count = len(rewards)
        options: dict[str, Any] = {"lengths": torch.full((count,), 5), "backend": backend}
        return cppo.advantages_and_prune(
            torch.tensor(rewards), count, rate, prune=prune, **options
        )[1].tolist()

    assert kept("variance", [1, 0, 0, 0, 1, 0, 1, 0], 0.5) == [0, 1, 2, 4]
    # Three of six: one 1 and two 0 vary as much as two 1 and one 0. The fewer highest.
    assert kept("variance", [0, 1, 0, 1, 0, 1], 0.5) == [0, 1, 2]
    assert kept("variance", [2, 2, 2, 2], 0.5) == [0, 1]
    assert kept("variance", [0.0, -0.0, 1.0, 0.0, -0.0, 1.0], 0.34) == [0, 1, 2, 5]
    assert kept("efficiency", [-1.0, 0.0, -0.0, 0.0], 0.5) == [1, 2]
    assert kept("variance", [0, 3, 1, 3], 0.9) == [1]  # of one, which varies by 0, the highest
    assert kept("shortest", [0, 3, 1, 3], 0.5) == [0, 1]
    assert kept("efficiency", [0, 3, 1, 3], 0.75) == [1]


def probabilities(advantages: Tensor, keep: int) -> Tensor:
    """p = min(1, c w) that sum up to `keep`, by bisection for c."""
    weight = advantages.double().abs()
    weight = torch.maximum(weight, 0.1 * weight.mean())
    weight = weight + (weight.sum() == 0)
    low, high = 0.0, len(weight) / weight.min().item()
    for _ in range(200):
        middle = (low + high) / 2
        enough = (middle * weight).clamp(max=1).sum() >= keep
        low, high = (low, middle) if enough else (middle, high)
    return (high * weight).clamp(max=1)


SIZES = [
    ([0.5, -2.0, 0.1, 1.5, 0.0, -0.1], 0.5),
    ([0.0, 0.0, 0.0, 0.0, 0.0], 0.6),
    ([9.0, 0.0, 0.0, 0.0, 0.0, 0.0, -9.0, 0.2], 0.5),
    ([1.0, -1.0, 1.0, -1.0], 0.25),
    ([1.0, -1.0, 2.0], 0.0),
    ([3.0], 0.5),
    ([1e-30, 1e30, 0.0, 1e-30, 5.0], 0.4),
]


@on_backends
@pytest.mark.parametrize(("sizes", "rate"), SIZES)
def test_unbiased_keeps_each_with_its_probability(backend, sizes, rate, monkeypatch):
    advantages = torch.tensor(sizes, dtype=torch.float64).repeat(2)
    n, keep = len(sizes), kept_per_unit(len(sizes), rate)
    p = probabilities(advantages[:n], keep)
    assert p.sum().item() == pytest.approx(keep) and (p > 0).all()
    often = torch.zeros(2 * n, dtype=torch.float64)
    for u, probability in outcomes(p):
        noise = torch.full((2 * n,), u, dtype=torch.float64)
        monkeypatch.setattr("cppo.ops.advantages._noise", lambda *_, noise=noise: noise)
        options: dict[str, Any] = {"prune": "unbiased", "backend": backend}
        kept = cppo.prune_completions(advantages, n, rate, **options)
        assert len(kept) == 2 * keep and torch.equal(kept, kept.unique())
        assert torch.equal(kept[:keep] + n, kept[keep:])
        often[kept] += probability
        weights = cppo.prune_weights(advantages, kept, n, rate)
        assert weights.dtype == torch.float32 and weights.max() <= 11 * n / keep
        torch.testing.assert_close(weights, (1 / p.repeat(2)[kept]).float())
    torch.testing.assert_close(often, p.repeat(2), rtol=0, atol=1e-7)


@given(st.lists(st.floats(-5, 5) | st.just(0.0), min_size=1, max_size=12), rates)
@settings(max_examples=200, deadline=None)
def test_the_probabilities_are_those_of_the_formula(sizes, rate):
    advantages = torch.tensor(sizes, dtype=torch.float64)
    keep = kept_per_unit(len(sizes), rate)
    ours = reference.inclusion_probabilities(advantages, len(sizes), keep)
    torch.testing.assert_close(ours, probabilities(advantages, keep), rtol=1e-10, atol=1e-12)


@on_backends
@given(st.lists(st.floats(-5, 5) | st.just(0.0), min_size=2, max_size=9), rates, st.floats(0, 1))
@fewer
def test_backends_draw_the_same_and_never_another_number(backend, sizes, rate, u):
    advantages = torch.tensor(sizes, dtype=torch.float64)
    keep = kept_per_unit(len(sizes), rate)
    # Not at the end of a part, where rounding decides.
    ends = reference.inclusion_probabilities(advantages, len(sizes), keep).cumsum(0)
    noise = torch.full((len(sizes),), u, dtype=torch.float64).clamp(max=1 - 2.0**-24)
    implementation = backends.pick("prune_completions", advantages, backend)
    given_options = (len(sizes), rate, "group", "unbiased", False, noise)
    kept = implementation.prune_completions(advantages, *given_options)
    assert len(kept) == keep and torch.equal(kept, kept.unique())
    if ((ends - noise) - (ends - noise).round()).abs().min() > 1e-9:
        expected = reference.prune_completions(advantages, *given_options)
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("reduction", ["grpo", "dapo", "dr_grpo"])
def test_the_mean_gradient_over_all_outcomes_is_the_unpruned_one(reduction):
    """Of two questions with four completions each, all pairs of outcomes, in fp64."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 5, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (8, 5), generator=generator)
    lengths = torch.tensor([5, 2, 3, 1, 4, 4, 5, 2])
    mask = torch.arange(5) < lengths[:, None]
    advantages = torch.randn(8, generator=generator, dtype=torch.float64)
    old = torch.log_softmax(logits.detach(), -1).gather(-1, targets[..., None])[..., 0]
    old = old + 0.3 * torch.randn(8, 5, generator=generator, dtype=torch.float64)
    config = LossConfig(reduction=reduction, max_length=7)
    sampled = NumItems(8, int(lengths.sum()))

    def gradient(rows: Tensor, weights: Tensor) -> Tensor:
        loss = cppo.cppo_loss(
            logits[rows],
            targets[rows],
            advantages[rows],
            old_logps=old[rows],
            token_weights=weights[:, None].expand(-1, 5),
            mask=mask[rows],
            num_items=sampled,
            config=config,
            backend="reference",
        ).loss
        return torch.autograd.grad(loss, logits)[0]

    everything = gradient(torch.arange(8), torch.ones(8, dtype=torch.float64))
    p = reference.inclusion_probabilities(advantages, 4, 2)
    mean, total = torch.zeros_like(everything), 0.0
    for (u, first), (v, second) in itertools.product(outcomes(p[:4]), outcomes(p[4:])):
        noise = torch.tensor([u, 0, 0, 0, v, 0, 0, 0], dtype=torch.float64)
        kept = reference.prune_completions(advantages, 4, 0.5, prune="unbiased", noise=noise)
        weights = reference.prune_weights(advantages, kept, 4, 0.5)
        mean += first * second * gradient(kept, weights)
        total += first * second
    assert total == pytest.approx(1)
    torch.testing.assert_close(mean, everything, rtol=1e-10, atol=1e-10)


@on_backends
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("prune", [prune for prune in PRUNES if prune != "unbiased"])
@pytest.mark.parametrize("scope", ["group", "batch"])
def test_advantages_of_the_kept(backend, scope, prune, scale):
    rewards = torch.randint(0, 4, (24,)).double()
    options: dict[str, Any] = dict(scope=scope, prune=prune, lengths=torch.arange(24), scale=scale)

    def both(**more):
        generator = torch.Generator().manual_seed(3)
        return cppo.advantages_and_prune(
            rewards, 8, 0.5, **options, **more, generator=generator, backend=backend
        )

    _, kept = both()
    advantages, same = both(advantages_of="kept")
    assert torch.equal(kept, same)
    expected = torch.zeros(24, dtype=torch.float64)
    for rows in (kept[kept // 8 == question] for question in range(3)):
        own = rewards[rows]
        divisor = {"none": 1.0, "batch": rewards[kept].std() + 1e-4}.get(scale)
        if divisor is None:
            divisor = (own.std() if len(own) > 1 else 0.0) + 1e-4
        expected[rows] = (own - own.mean()) / divisor if len(own) else own
    torch.testing.assert_close(advantages, expected.float())
    zeros = both(advantages_of="kept", drop_zero=True)
    assert torch.equal(zeros[0], advantages)
    assert torch.equal(zeros[1], kept[advantages[kept] != 0])


@on_backends
@pytest.mark.parametrize("prune", NEW)
def test_edges(backend, prune):
    options: dict[str, Any] = {"prune": prune, "backend": backend}
    nothing = torch.empty(0)
    advantages, kept = cppo.advantages_and_prune(nothing, 4, 0.5, lengths=nothing, **options)
    assert len(advantages) == len(kept) == 0 and kept.dtype == torch.int64
    both = {"rewards": nothing, "lengths": nothing}
    assert len(cppo.prune_completions(nothing, 4, 0.5, scope="batch", **both, **options)) == 0
    # One completion of a question, a strided input, integers, equal rewards.
    rewards, lengths = torch.arange(12).view(6, 2)[:, 0], torch.arange(12).view(6, 2)[:, 1]
    assert cppo.advantages_and_prune(rewards, 1, 0.9, lengths=lengths, **options)[1].tolist() == [
        *range(6)
    ]
    for dtype in (torch.int64, torch.bfloat16, torch.float64):
        strided = cppo.advantages_and_prune(
            rewards.to(dtype), 6, 0.5, lengths=lengths, **options, generator=seeded()
        )
        plain = cppo.advantages_and_prune(
            rewards.double().clone(), 6, 0.5, lengths=lengths.clone(), **options, generator=seeded()
        )
        assert torch.equal(strided[1], plain[1])
    equal = cppo.advantages_and_prune(
        torch.full((8,), 0.1), 4, 0.5, lengths=torch.ones(8), drop_zero=True, **options
    )
    assert not equal[0].any() and len(equal[1]) == 0


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@on_backends
@pytest.mark.parametrize("prune", NEW)
def test_what_is_no_number_crashes_nothing(backend, prune):
    """On a GPU nobody looks whether the values are finite: as many stay as otherwise."""
    bad = torch.tensor([math.nan, 1.0, math.inf, -math.inf, 0.0, math.nan, 2.0, 1.0])
    implementation = backends.pick("prune_completions", bad, backend)
    for rate in (0.0, 0.3, 0.5, 0.9):
        options = (8, rate, "group", prune, False, torch.full((8,), 0.4))
        kept = implementation.prune_completions(bad, *options, rewards=bad, lengths=bad)
        assert len(kept) == kept_per_unit(8, rate)
        assert torch.equal(kept, kept.unique()) and kept.min() >= 0 and kept.max() < 8


@on_backends
@pytest.mark.parametrize("prune", NEW)
def test_nothing_waits_and_nothing_breaks_a_graph(backend, prune):
    """What runs as one graph reads no value on the host."""
    rewards, lengths = torch.tensor([0, 1, 1, 0, 2, 0, 1, 3.0]), torch.arange(8)
    of = "sampled" if prune == "unbiased" else "kept"

    def call():
        options: dict[str, Any] = {"prune": prune, "lengths": lengths, "backend": backend}
        both = cppo.advantages_and_prune(rewards, 4, 0.5, **options, advantages_of=of)
        return *both, cppo.prune_weights(both[0], both[1], 4, 0.5, prune=prune)

    torch.manual_seed(1)
    expected = call()
    torch.manual_seed(1)
    if backend == "triton":
        ours = call()  # the interpreter cannot be compiled
    else:
        ours = torch.compile(call, fullgraph=True, backend="eager")()
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("prune", [prune for prune in PRUNES if prune != "unbiased"])
def test_the_other_rules_weigh_everything_alike(prune):
    weights = cppo.prune_weights(torch.rand(8), torch.tensor([1, 5]), 4, 0.75, prune=prune)
    assert weights.tolist() == [1, 1]
    assert cppo.prune_weights(torch.empty(0), torch.empty(0).long(), 4, 0.5).numel() == 0


R = torch.rand(8)
ERRORS = [
    (
        lambda: cppo.prune_completions(R, 4, 0.5, prune="variance"),
        "prune_completions: rewards must be a (B,) Tensor for prune = 'variance', got None",
    ),
    (
        lambda: cppo.prune_completions(R, 4, 0.5, prune="efficiency", rewards=R),
        "prune_completions: lengths must be a (B,) Tensor for prune = 'efficiency', got None",
    ),
    (
        lambda: cppo.advantages_and_prune(R, 4, 0.5, prune="shortest"),
        "advantages_and_prune: lengths must be a (B,) Tensor for prune = 'shortest', got None",
    ),
    (
        lambda: cppo.advantages_and_prune(R, 4, 0.5, prune="shortest", lengths=R[:4]),
        "lengths must be (B,) = (8,) like rewards, got (4,)",
    ),
    (
        lambda: cppo.advantages_and_prune(R, 4, 0.5, prune="shortest", lengths=R - 2),
        "lengths must be >= 0, got -",
    ),
    (
        lambda: cppo.prune_completions(R, 4, 0.5, prune="variance", rewards=R / 0),
        "rewards must be finite, got inf at index",
    ),
    (
        lambda: cppo.prune_completions(R, 4, 0.5, prune="variance", rewards=R.to("meta")),
        "rewards must be on cpu like advantages, got meta",
    ),
    (
        lambda: cppo.advantages_and_prune(R, 4, 0.5, advantages_of="all"),
        "advantages_of must be one of 'sampled', 'kept', got 'all'",
    ),
    (
        lambda: cppo.advantages_and_prune(R, 4, 0.5, prune="unbiased", advantages_of="kept"),
        "advantages_of with prune = 'unbiased' must be one of 'sampled', got 'kept'",
    ),
    (
        lambda: cppo.prune_weights(R, torch.zeros(2, 2).long(), 4, 0.5),
        "kept must be (B,), got shape (2, 2)",
    ),
]

test_bad_options = refused(ERRORS)


def test_bad_types():
    with pytest.raises(TypeError, match="generator must be a torch.Generator, got int"):
        cppo.prune_completions(R, 4, 0.5, prune="random", generator=0)
    with pytest.raises(TypeError, match="generator must be a torch.Generator, got int"):
        cppo.advantages_and_prune(R, 4, 0.5, generator=0)
    with pytest.raises(TypeError, match="lengths must be a Tensor, got list"):
        cppo.prune_completions(R, 4, 0.5, prune="shortest", lengths=[1] * 8)
    with pytest.raises(TypeError, match="kept must be of integer dtype"):
        cppo.prune_weights(R, R, 4, 0.5)
