"""group_advantages, prune_completions, advantages_and_prune, questions_needed on every backend."""

from __future__ import annotations

import math
import re

import pytest
import torch
from error_cases import refused

import cppo
from cppo import backends, reference
from cppo.testing import REWARD_CASES, assert_op_as_accurate, evaluate, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned")

OPS = ("group_advantages", "prune_completions", "advantages_and_prune")
RUNS = [(op, backend) for op in OPS for backend in backends.available(op)]
BACKENDS = backends.available("advantages_and_prune")
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("case", REWARD_CASES)
@pytest.mark.parametrize(("op", "backend"), RUNS)
def test_accuracy(op, backend, case):
    inputs = make_inputs(op, case)
    assert_op_as_accurate(op, backend, inputs)
    if op != "group_advantages":
        kept = evaluate(op, inputs, backend)
        expected = evaluate(op, inputs, "reference")
        assert all(torch.equal(kept[name], expected[name]) for name in kept)


@pytest.mark.filterwarnings("error")
def test_rewards_with_a_gradient_are_read_without_a_warning():
    rewards = torch.tensor([0.0, 1.0, 2.0, 3.0], requires_grad=True)
    torch.set_warn_always(True)  # else torch warns once per process
    try:
        advantages, _ = cppo.advantages_and_prune(rewards, 4, 0.5)
    finally:
        torch.set_warn_always(False)
    assert not advantages.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["group", "none", "batch"])
@pytest.mark.parametrize("scope", ["group", "batch"])
@pytest.mark.parametrize("prune", ["smallest", "largest", "random"])
@pytest.mark.parametrize("drop_zero", [False, True])
def test_one_launch_equals_the_two_ops(backend, scale, scope, prune, drop_zero):
    rewards = torch.randint(0, 3, (24,)).double()
    pruning = {"scope": scope, "prune": prune, "drop_zero": drop_zero}

    def generator():
        return torch.Generator().manual_seed(5)

    advantages, kept = cppo.advantages_and_prune(
        rewards, 8, 0.6, scale=scale, **pruning, generator=generator(), backend=backend
    )
    two = cppo.group_advantages(rewards, 8, scale=scale, backend="reference")
    torch.testing.assert_close(advantages, two, rtol=1e-6, atol=0)
    # The same advantages: rounding must not decide which of two equals stays.
    expected = cppo.prune_completions(
        advantages, 8, 0.6, **pruning, generator=generator(), backend="reference"
    )
    assert torch.equal(kept, expected)
    assert advantages.dtype == torch.float32 and kept.dtype == torch.int64


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_paper_example(backend):
    rewards = torch.zeros(16)
    rewards[[3, 7]] = 1
    _, kept = cppo.advantages_and_prune(rewards, 16, 0.7, backend=backend)
    assert kept.tolist() == [0, 1, 2, 3, 7]  # 5 of 16, the two rare ones among them


@pytest.mark.parametrize("backend", BACKENDS)
def test_rate_zero_keeps_everything(backend):
    _, kept = cppo.advantages_and_prune(torch.rand(12), 4, 0.0, backend=backend)
    assert torch.equal(kept, torch.arange(12))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e8, -7.7])
@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_equal_rewards_are_worth_nothing(backend, scale, value):
    rewards = torch.full((15,), value)
    options = {"scale": scale, "drop_zero": True, "backend": backend}
    advantages, kept = cppo.advantages_and_prune(rewards, 5, 0.5, **options)
    assert torch.equal(advantages, torch.zeros(15)) and kept.numel() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_questions_permutes_the_advantages(backend):
    rewards = torch.rand(6, 8)
    order = torch.randperm(6)
    plain = cppo.group_advantages(rewards.flatten(), 8, backend=backend)
    moved = cppo.group_advantages(rewards[order].flatten(), 8, backend=backend)
    assert torch.equal(plain.view(6, 8)[order].flatten(), moved)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]
)
def test_any_real_dtype_and_stride(backend, dtype):
    rewards = torch.randint(0, 2, (16, 3)).to(dtype)[:, 1]
    expected = reference.group_advantages(rewards.double(), 4)
    ours = cppo.group_advantages(rewards, 4, backend=backend)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_pruning_follows_the_generator(backend):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"prune": "random", "generator": generator, "backend": backend}
        return cppo.prune_completions(torch.rand(64), 8, 0.5, **options)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1).div(8, rounding_mode="floor").bincount(), torch.full((8,), 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeatable_and_without_gradient(backend):
    rewards = torch.rand(40, requires_grad=True)
    first = cppo.advantages_and_prune(rewards, 8, 0.5, backend=backend)
    again = cppo.advantages_and_prune(rewards, 8, 0.5, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not first[0].requires_grad


R = torch.rand(8)
ERRORS = [
    ("list", lambda op: op([1.0] * 8, 4), TypeError, "must be a Tensor, got list"),
    ("complex", lambda op: op(R + 1j * R, 4), TypeError, "must be of real dtype"),
    ("two dimensions", lambda op: op(R.view(2, 4), 4), ValueError, "must be (B,), got shape"),
    ("ragged", lambda op: op(R, 3), ValueError, "a multiple of group_size = 3 values, got 8"),
    ("no group", lambda op: op(R, 0), ValueError, "group_size must be >= 1, got 0"),
    ("half a group", lambda op: op(R, 2.0), TypeError, "group_size must be an integer, got float"),
    ("nan", lambda op: op(torch.tensor([1, NAN]), 2), ValueError, "finite, got nan at index 1"),
    ("inf", lambda op: op(torch.tensor([-INF, 1]), 2), ValueError, "got -inf at index 0"),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("call", "error", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS]
)
def test_bad_values(op, call, error, message):
    def bound(values, group_size):
        rate = () if op == "group_advantages" else (0.5,)
        return getattr(cppo, op)(values, group_size, *rate)

    with pytest.raises(error, match=rf"^cppo\.{op}: .*{re.escape(message)}"):
        call(bound)


OPTION_ERRORS = [
    (lambda: cppo.prune_completions(R, 4, 1.0), "prune_rate must be a number in [0, 1), got 1.0"),
    (lambda: cppo.prune_completions(R, 4, -0.1), "got -0.1"),
    (lambda: cppo.prune_completions(R, 4, NAN), "got nan"),
    (lambda: cppo.prune_completions(R, 4, 0.5, scope="row"), "one of 'group', 'batch', got 'row'"),
    (lambda: cppo.prune_completions(R, 4, 0.5, prune="all"), "'unbiased', got 'all'"),
    (lambda: cppo.advantages_and_prune(R, 4, 2), "prune_rate"),
    (lambda: cppo.advantages_and_prune(R, 4, 0.5, scale="std"), "scale must be one of 'group'"),
    (lambda: cppo.group_advantages(R, 4, scale="std"), "got 'std'"),
    (lambda: cppo.group_advantages(R, 4, eps=0), "eps must be finite and > 0, got 0"),
    (lambda: cppo.group_advantages(R, 4, backend="gpu"), "backend"),
    (lambda: cppo.questions_needed(-1, 4, 0.5), "batch_size must be >= 0, got -1"),
    (lambda: cppo.questions_needed(8, 0, 0.5), "group_size must be >= 1, got 0"),
    (lambda: cppo.questions_needed(8, 4, 1), "prune_rate"),
]

test_bad_options = refused(OPTION_ERRORS)


def test_an_explicit_backend_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="cppo.group_advantages: backend 'cuda'"):
        cppo.group_advantages(R, 4, backend="cuda")


@pytest.mark.parametrize(
    ("batch", "group", "rate", "questions"), [(64, 16, 0, 4), (64, 16, 0.7, 13), (60, 8, 0.5, 15)]
)
def test_questions_needed(batch, group, rate, questions):
    assert cppo.questions_needed(batch, group, rate) == questions


# Completions without a reward, in the specification, which the trainer uses where there are any.
# Worked out by hand for two questions of four completions.

UNSCORED = torch.tensor([1, NAN, 3, 2, NAN, NAN, NAN, 5], dtype=torch.float64)
SCORED = ~UNSCORED.isnan()


@pytest.mark.parametrize(
    ("scale", "std"), [("group", 1.0), ("none", 1.0 - 1e-4), ("batch", math.sqrt(35 / 12))]
)
def test_completions_without_a_reward_are_in_no_mean_and_no_std(scale, std):
    # 1, 3, 2 have mean 2 and std 1; 1, 3, 2, 5 have mean 2.75 and variance 8.75 / 3.
    advantages = reference.group_advantages(UNSCORED, 4, scale, mask=SCORED)
    expected = torch.tensor([-1, 0, 1, 0, 0, 0, 0, 0]) / (std + 1e-4)
    torch.testing.assert_close(advantages, expected)


@pytest.mark.parametrize(
    ("prune", "rate", "expected"),
    [
        ("smallest", 0.5, [0, 2, 7]),
        ("largest", 0.5, [0, 3, 7]),
        ("smallest", 0.0, [0, 2, 3, 7]),
        ("random", 0.0, [0, 2, 3, 7]),
        ("smallest", 0.75, [0, 7]),
    ],
)
def test_completions_without_a_reward_never_stay(prune, rate, expected):
    options = dict(prune=prune, noise=torch.rand(8))
    _, kept = reference.advantages_and_prune(UNSCORED, 4, rate, **options, mask=SCORED)
    assert kept.tolist() == expected
    nobody = torch.zeros(8, dtype=torch.bool)
    advantages, kept = reference.advantages_and_prune(UNSCORED, 4, rate, **options, mask=nobody)
    assert kept.tolist() == [] and not advantages.any()


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_a_mask_of_ones_changes_nothing(scale):
    rewards = make_inputs("group_advantages")["rewards"]
    masked = reference.group_advantages(rewards, 4, scale, mask=torch.ones(len(rewards)))
    assert torch.equal(masked, reference.group_advantages(rewards, 4, scale))


@pytest.mark.parametrize("index", [-1, 8])
def test_weights_of_indices_that_are_none(index):
    with pytest.raises(ValueError, match=rf"prune_weights: kept must be in \[0, 8\), got {index}"):
        cppo.prune_weights(torch.rand(8), torch.tensor([0, index]), 4, 0.5)


# Dtypes of few bits, or without a sign


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint16], ids=str)
def test_numbers_without_a_sign_or_of_few_bits(backend, dtype):
    """A size of -128 does not fit into the eight bits that hold it."""
    advantages = torch.tensor([-128 if dtype == torch.int8 else 1, 0, 0, 1], dtype=dtype)
    lengths = torch.tensor([1, 0, 0, 1]).to(dtype)
    for prune in ("smallest", "largest", "shortest"):
        options = {"prune": prune, "drop_zero": prune != "largest", "lengths": lengths}
        kept = cppo.prune_completions(advantages, 4, 0.75, **options, backend=backend)
        assert kept.tolist() == {"smallest": [0], "largest": [1], "shortest": []}[prune]


def test_weights_of_kept_ones_in_any_integer():
    advantages, kept = torch.rand(8), torch.tensor([1, 6])
    expected = cppo.prune_weights(advantages, kept, 4, 0.75)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(cppo.prune_weights(advantages, kept.to(dtype), 4, 0.75), expected)


def test_eight_bit_floats_are_refused():
    with pytest.raises(TypeError, match="real dtype of at least 16 bits, got torch.float8_e4m3fn"):
        cppo.group_advantages(torch.rand(8).to(torch.float8_e4m3fn), 4)
