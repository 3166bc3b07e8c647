"""The one place that chooses, and the compiled ops against the specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from cppo import backends, reference
from cppo.fused import extension
from cppo.options.trainer import PRUNES, SCALES, SCOPES

needs_cpp = pytest.mark.skipif(bool(extension.missing["cpp"]), reason=extension.missing["cpp"])
needs_host = pytest.mark.skipif(bool(extension.missing["host"]), reason=extension.missing["host"])
needs_cuda = pytest.mark.skipif(
    bool(extension.missing["cuda"]) or not torch.cuda.is_available(),
    reason=extension.missing["cuda"] or "no CUDA device",
)


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch):
    monkeypatch.delenv("CPPO_BACKEND", raising=False)


# Choosing


def test_every_op_has_a_reference_of_its_name():
    for op, names in backends.BACKENDS.items():
        assert names[-1] == "reference" and set(names) <= set(backends.NAMES)
        assert callable(getattr(reference, op))
        if "cpp" in names:
            namespace = extension.fused if op in backends.FUSED_OPS else extension
            assert callable(getattr(namespace, op))


@needs_cpp
def test_auto_takes_the_fastest_that_runs_here():
    rewards = torch.zeros(4)
    assert backends.available("pack_completions", rewards.device) == ["cpp", "reference"]
    assert backends.available("unpack", rewards.device) == ["cpp", "reference"]
    assert backends.pick("advantages_and_prune", rewards, "auto") is extension
    assert backends.pick("cppo_loss", rewards, "auto") is extension.fused
    assert backends.pick("linear_cppo_loss", rewards, "auto") is extension.fused
    assert backends.pick("advantages_and_prune", rewards, "reference") is reference


def test_auto_falls_back_to_the_reference_without_the_extension(monkeypatch):
    monkeypatch.setattr(extension, "missing", dict.fromkeys(extension.missing, "not built"))
    for op in backends.BACKENDS:
        assert backends.pick(op, torch.zeros(2), "auto") is reference
        assert backends.pick(op, None, "auto") is reference


def test_an_explicit_choice_that_cannot_run_names_op_backend_and_reason(monkeypatch):
    monkeypatch.setattr(
        extension, "missing", {"cpp": "no C++ compiler was found", "cuda": "", "host": ""}
    )
    message = "cppo.pack_completions: backend 'cpp' cannot run here: no C++ compiler was found"
    with pytest.raises(RuntimeError) as caught:
        backends.pick("pack_completions", torch.zeros(2), "cpp")
    assert str(caught.value) == message
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: tensors are on cpu"):
        backends.pick("advantages_and_prune", torch.zeros(2), "cuda")
    with pytest.raises(RuntimeError, match="'cpp' cannot run here: tensors are on meta"):
        backends.pick("advantages_and_prune", torch.zeros(2, device="meta"), "cpp")
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: it has no implementation"):
        backends.pick("perception_mask", torch.zeros(2), "cuda")


def test_triton_runs_on_a_gpu_or_in_its_interpreter_and_there_never_by_itself(monkeypatch):
    op = "advantages_and_prune"
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.available(op)[-1] == "triton" != backends.available(op)[0]
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "triton" not in backends.available(op)
    with pytest.raises(RuntimeError, match="'triton' cannot run here: tensors are on cpu, where"):
        backends.pick(op, torch.zeros(2), "triton")
    assert backends.why_not(op, "triton", "cuda") == ""
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    assert backends.why_not(op, "triton", "cuda") == "triton is not installed"


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="cppo.token_stats: backend must be 'auto' or one of cuda"):
        backends.pick("token_stats", torch.zeros(2), "numba")


@needs_cpp
def test_the_environment_variable_replaces_auto_only(monkeypatch):
    monkeypatch.setenv("CPPO_BACKEND", "reference")
    assert backends.pick("advantages_and_prune", torch.zeros(2), "auto") is reference
    assert backends.pick("advantages_and_prune", torch.zeros(2), "cpp") is extension
    monkeypatch.setenv("CPPO_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=r"'cuda' \(from CPPO_BACKEND\) cannot run here"):
        backends.pick("advantages_and_prune", torch.zeros(2), "auto")
    monkeypatch.setenv("CPPO_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"backend \(from CPPO_BACKEND\) must be .* 'nonsense'"):
        backends.pick("balance_ranks", None, "auto")


@needs_host
def test_planners_ignore_a_forced_backend_that_they_lack(monkeypatch):
    monkeypatch.setenv("CPPO_BACKEND", "cuda")
    assert backends.pick("plan_microbatches", None, "auto") is extension


def test_support_matrix_gives_a_reason_for_everything_that_does_not_run():
    for op, row in backends.support_matrix().items():
        assert {name for name, reason in row.items() if not reason} == set(backends.available(op))
        assert row["reference"] == "" and set(row) == set(backends.NAMES)


@needs_cpp
def test_pick_can_be_traced():
    @torch.compile(fullgraph=True, backend="eager")
    def step(rewards):
        implementation = backends.pick("advantages_and_prune", rewards, "auto")
        advantages, kept = implementation.advantages_and_prune(rewards, 4, 0.5)
        return advantages * 2, kept

    rewards = torch.tensor([0.0, 1.0, 3.0, 0.5])
    advantages, kept = step(rewards)
    expected, expected_kept = reference.advantages_and_prune(rewards, 4, 0.5)
    torch.testing.assert_close(advantages, expected * 2)
    assert torch.equal(kept, expected_kept)


# The compiled ops


def rewards_of(num_questions, group_size, seed, dtype=torch.float64):
    """Half of the seeds give rewards with many ties, the others none."""
    generator = torch.Generator().manual_seed(seed)
    size = (num_questions * group_size,)
    if seed % 2:
        return (torch.randint(0, 4, size, generator=generator).double() / 3).to(dtype)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def check_advantages_and_prune(device, dtype, seed):
    group_size, num_questions = 1 + seed % 9, (seed * 7) % 6
    rewards = rewards_of(num_questions, group_size, seed, dtype).to(device)
    noise = torch.rand(rewards.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    rate = (seed % 13) / 13
    for scale in SCALES:
        ours = extension.group_advantages(rewards, group_size, scale, 1e-4)
        spec = reference.group_advantages(rewards, group_size, scale, 1e-4)
        torch.testing.assert_close(ours, spec, rtol=2e-7, atol=1e-12)
        assert torch.equal(ours == 0, spec == 0)
        for scope in SCOPES:
            for prune in PRUNES:
                for drop_zero in (False, True):
                    options = (scope, prune, drop_zero, noise)
                    more = {"rewards": rewards, "lengths": (noise * 9).long()}
                    advantages, kept = extension.advantages_and_prune(
                        rewards, group_size, rate, scale, 1e-4, *options, lengths=more["lengths"]
                    )
                    expected = reference.prune_completions(spec, group_size, rate, *options, **more)
                    again = extension.prune_completions(spec, group_size, rate, *options, **more)
                    assert torch.equal(advantages, ours)
                    assert torch.equal(kept, expected) and torch.equal(again, expected)
                    assert kept.dtype == torch.int64


@needs_cpp
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.filterwarnings("ignore:std")
def test_advantages_and_prune_cpp_equals_reference(seed):
    check_advantages_and_prune(
        "cpu", (torch.float64, torch.float32, torch.bfloat16)[seed % 3], seed
    )


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("seed", range(20))
def test_advantages_and_prune_cuda_equals_reference(seed):
    check_advantages_and_prune("cuda", torch.float32, seed)


@needs_cpp
def test_rounding_of_the_mean_makes_no_advantage():
    # 0.1 summed three times is not 0.3; (0, 1/3, 2/3) has its middle at its mean.
    equal = torch.full((3,), 0.1, dtype=torch.float64)
    middle = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64) / 3
    for implementation in (reference, extension):
        assert implementation.group_advantages(equal, 3).tolist() == [0.0, 0.0, 0.0]
        assert implementation.group_advantages(middle, 3)[1] == 0.0
        kept = implementation.advantages_and_prune(middle, 3, 0.0, drop_zero=True)[1]
        assert kept.tolist() == [0, 2]


@needs_cpp
def test_nan_advantages_rank_first_and_do_not_crash():
    advantages = torch.tensor([0.5, float("nan"), 2.0, float("nan")])
    assert extension.prune_completions(advantages, 4, 0.5).tolist() == [1, 3]
    assert reference.prune_completions(advantages, 4, 0.5).tolist() == [1, 3]


@needs_cpp
def test_float64_advantages_are_ranked_as_float64():
    advantages = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert extension.prune_completions(advantages, 2, 0.5).tolist() == [1]


@needs_cpp
def test_compiled_checks_name_op_argument_expected_and_got():
    ids, mask = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    one = torch.tensor([0])
    bounds = torch.tensor([0, 3]).int(), torch.tensor([0, 2]).int()
    cases = [
        ("pack_completions", (ids, mask[:, :2], mask, one, *bounds, [], 3, 2),
         "attention_mask must have the shape (2, 3) of input_ids, got (2, 2)"),
        ("pack_completions", (ids, mask, mask, torch.tensor([2]), *bounds, [], 3, 2),
         "kept must be in [0, B = 2), got 2 at 0"),
        ("pack_completions", (ids.float(), mask, mask, one, *bounds, [], 3, 2),
         "input_ids must be int32 or int64"),
        ("pack_completions", (ids, mask, mask, one, *bounds, [], 4, 2),
         "cu_seqlens must rise from 0 to 4"),
        ("pack_completions", (ids, mask, mask, one, bounds[1], bounds[1], [], 2, 2),
         "cu_seqlens and row_cu_seqlens must be those of the masks"),
        ("pack_completions", (ids, mask, mask, one, *bounds, [ids[:1]], 3, 2),
         "per_token must have the shape (2, 3) of input_ids, got (1, 3)"),
        ("unpack", ([torch.zeros(2)], torch.tensor([5, 6]), 2, 3),
         "target_index must be in [0, 6), got 6 at 1"),
        ("gather_tokens", ([ids], torch.tensor([-1])),
         "target_index must be in [0, 6), got -1 at 0"),
        ("group_advantages", (torch.zeros(5), 4, "group", 1e-4),
         "group_size must divide B = 5, got 4"),
        ("group_advantages", (torch.zeros(4), 4, "median", 1e-4),
         "scale must be 'group', 'batch' or 'none', got 'median'"),
        ("prune_completions", (torch.zeros(4), 4, 2, "variance", None),
         "score (B,) is needed for this rule"),
        ("prune_completions", (torch.zeros(4), 4, 2, "score", torch.zeros(3)),
         "score must be (B,) = (4,), got (3,)"),
        ("prune_completions", (torch.zeros(4), 4, 2, "random", None),
         "prune must be 'smallest', 'largest', 'score', 'variance' or 'unbiased', got 'random'"),
        ("prune_completions", (torch.zeros(4), 4, 5, "smallest", None),
         "keep must be in [1, unit_size = 4], got 5"),
    ]  # fmt: skip
    for op, arguments, message in cases:
        with pytest.raises(RuntimeError) as caught:
            getattr(torch.ops.cppo, op)(*arguments)
        assert str(caught.value).splitlines()[0] == f"cppo.{op}: {message}"


@needs_cpp
def test_opcheck():
    ops = torch.ops.cppo
    rewards, noise = torch.arange(8.0), torch.rand(8)
    ids, mask = torch.arange(12).view(3, 4), torch.ones(3, 4, dtype=torch.bool)
    kept, weights = torch.tensor([0, 2]), torch.rand(3, 4, requires_grad=True)
    bounds = torch.tensor([0, 4, 8]).int(), torch.tensor([0, 3, 6]).int()
    values = torch.rand(3, requires_grad=True)
    samples = [
        (ops.group_advantages, (rewards, 4, "group", 1e-4)),
        (ops.prune_completions, (rewards, 4, 2, "smallest", None)),
        (ops.prune_completions, (rewards, 4, 2, "score", noise)),
        (ops.prune_completions, (rewards, 4, 2, "unbiased", noise)),
        (ops.advantages_and_prune, (rewards, 4, 8, 3, "group", 1e-4, "variance", rewards)),
        (ops.advantages_and_prune, (rewards, 4, 8, 3, "batch", 1e-4, "largest", None)),
        (ops.advantages_and_prune, (rewards, 4, 4, 3, "none", 1e-4, "smallest", None)),
        (ops.pack_sizes, (mask, mask, kept)),
        (ops.pack_completions, (ids, mask, mask, kept, *bounds, [], 8, 6)),
        (ops.pack_completions, (ids, mask, mask, kept, *bounds, [weights.detach(), ids], 8, 6)),
        (ops.unpack, ([values, values.double()], torch.tensor([3, 4, 8]), 3, 4)),
        (ops.gather_tokens, ([weights, ids], torch.tensor([3, 4, 8]))),
    ]
    for op, arguments in samples:
        outcome = torch.library.opcheck(op.default, arguments)
        assert set(outcome.values()) == {"SUCCESS"}, (op, outcome)
    # opcheck cannot sum a float output onto an integer one: test_pack_completions compiles this.
    arguments = (ids, mask, mask, kept, *bounds, [weights, ids], 8, 6)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.pack_completions.default, arguments, test_utils=checks)


# Planners

lengths = st.lists(st.integers(0, 40), max_size=60)


@needs_host
def test_planner_errors_name_index_and_length():
    with pytest.raises(ValueError, match="index 1 has 9 tokens, more than max_tokens = 8"):
        extension.plan_microbatches([8, 9], 8)
    with pytest.raises(ValueError, match="must not be negative, got -2 at index 0"):
        extension.balance_ranks([-2], 2)
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        extension.balance_ranks([2], 0)


@needs_cpp
@pytest.mark.parametrize("prune", PRUNES)
def test_units_that_are_too_long_for_a_kernel_are_pruned_by_the_specification(prune, monkeypatch):
    rewards, noise = rewards_of(2, 8, 1), torch.rand(16)
    options = (0.5, "group", 1e-4, "group", prune, True, noise)
    of = "sampled" if prune == "unbiased" else "kept"
    more = {"lengths": torch.arange(16), "advantages_of": of}
    monkeypatch.setattr(extension._prune, "_longest", 4)
    monkeypatch.setattr(extension._prune, "_ops", None)
    ours = extension.advantages_and_prune(rewards, 8, *options, **more)
    expected = reference.advantages_and_prune(rewards, 8, *options, **more)
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))
