"""The benchmark harness: what it refuses and what it counts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cppo import backends
from cppo.benchmarks import accuracy, calls, harness, inputs, peers, report, timing
from cppo.benchmarks.cases import SHAPES, Case, cases
from cppo.benchmarks.harness import Budget, Measured, Pass, Selection
from cppo.benchmarks.inputs import Sizes
from cppo.benchmarks.timing import Ceilings, measure_ceilings
from cppo.records import TokenStats

CPU = torch.device("cpu")
CEILINGS = Ceilings(10.0, 10.0, 1.0, 1.0)
TINY = Budget(seconds=0.0, rounds=3)
SIZES = Sizes(4, 5, 37)


def _case(op: str, sizes: Sizes = SIZES, dtype: str = "fp32") -> Case:
    def make(device: torch.device) -> inputs.Inputs:
        return inputs.row_inputs(op, sizes, dtype, device)

    return Case(op, "tiny", dtype, make, ("forward", "both"), sizes)


def _measure(case: Case, *against: str, budget: Budget = TINY, **chosen: Any) -> list[Measured]:
    selection = Selection(against, **chosen)
    return list(harness.measure(case, CPU, budget, CEILINGS, selection))


def _plant(
    monkeypatch: pytest.MonkeyPatch, op: str, change: Callable[[TokenStats], TokenStats]
) -> None:
    """Changes what our fastest backend of `op` returns."""
    backend = backends.available(op)[0]
    # The fp64 truth is the specification, whatever is planted in a backend.
    if backend == "reference":
        pytest.skip("no backend of its own beside the specification")
    namespace = backends.pick(op, torch.zeros(1), backend)
    original = getattr(namespace, op)
    monkeypatch.setattr(namespace, op, lambda *a, **options: change(original(*a, **options)))


# What is caught


@pytest.mark.parametrize("part", ["value", "gradient"])
def test_a_wrong_result_is_reported_and_never_timed(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(stats: TokenStats) -> TokenStats:
        shift = 1e-3 * (stats.logps if part == "value" else stats.logps - stats.logps.detach())
        return TokenStats(stats.logps + shift, stats.entropy)

    _plant(monkeypatch, "token_stats", wrong)
    found = _measure(_case("token_stats"), "eager")
    ours = [m for m in found if m.backend]
    assert ours and all(m.status.startswith("wrong") and not m.passes for m in ours)
    assert all(m.passes for m in found if m.peer == "eager")
    assert {row["peer"] for row in report.make_rows(found, CEILINGS)} == {"eager"}


def test_an_error_at_full_size_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    checked_rows = 2 * SIZES.length

    def wrong(stats: TokenStats) -> TokenStats:
        is_whole = stats.logps.numel() > checked_rows
        return TokenStats(stats.logps + 0.1 * is_whole, stats.entropy)

    _plant(monkeypatch, "token_stats", wrong)
    budget = Budget(seconds=0.0, rounds=1, check_rows=checked_rows)
    found = _measure(_case("token_stats"), budget=budget)
    assert found and all("whole call" in m.status and not m.passes for m in found)


def test_a_slow_backend_is_seen_and_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case("token_stats")
    before = report.make_rows(_measure(case, "eager")[:2], CEILINGS)
    shared = {"device": "here"}

    def slow(stats: TokenStats) -> TokenStats:
        time.sleep(0.3)
        return stats

    _plant(monkeypatch, "token_stats", slow)
    after = report.make_rows(_measure(case, "eager")[:2], CEILINGS)
    ours = next(row for row in after if row["backend"])
    assert float(ours["ms_p20"]) >= 300
    flagged = report.slower([r | shared for r in before], [r | shared for r in after])
    assert len(flagged) == 1 and "token_stats" in flagged[0]
    assert report.slower(before, before) == []


def test_a_peer_is_timed_whatever_its_error_is_and_the_error_stands_beside() -> None:
    case = _case("token_stats")
    found = {m.variant: m for m in _measure(case, "eager") if m.mode == "forward"}
    assert found["eager"].error < 1e-5 and found["eager"].passes
    exact = calls.run(case, "forward", case.make(CPU), calls.ours(case, "reference"))
    off = {name: value + 1 for name, value in exact.items()}
    error, of = accuracy.largest_error(off, exact)
    assert error == pytest.approx(1 / float(exact[of].abs().max()), rel=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", ["cppo_loss", "linear_cppo_loss"])
@pytest.mark.parametrize("gating", [True, False])
def test_eager_is_the_same_loss_as_ours(op: str, gating: bool, dtype: str) -> None:
    hidden = 64 if op.startswith("linear") else 0
    found = _measure(_case(op, Sizes(4, 10, 2011, hidden, gating=gating), dtype), "eager")
    names = {m.variant for m in found}
    assert {"eager", "eager, gated"} <= names if gating else "eager, gated" not in names
    for m in found:  # in bf16 the accuracy law alone: rounding moves small gradients by a fifth
        assert m.status == "ok", (m.variant, m.status)
        assert dtype == "bf16" or m.error < 1e-3, (m.variant, m.error, m.error_of)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", ["cppo_loss", "linear_cppo_loss"])
def test_the_share_of_rows_is_what_the_formulas_count(op: str, dtype: str) -> None:
    sizes = Sizes(8, 10, 2011, 64 if op.startswith("linear") else 0, selected_share=0.2)
    case = _case(op, sizes, dtype)
    drawn = case.make(CPU)
    output = case.run(drawn, "reference")
    assert float((drawn["advantages"] > 0).float().mean()) == sizes.looking == 0.5
    assert float(output.perception_mask.float().mean()) == pytest.approx(sizes.selected)


def test_formulas_by_hand() -> None:
    view = 20 * 37 * 4
    case = _case("cppo_loss", Sizes(4, 5, 37, selected_share=0.2))
    # f = 0.5, r = 0.2: anchor, half of the negatives, a tenth of the positives; then the gradient:
    # anchor and twice a tenth read again, three gradients written.
    assert case.bytes("forward") == pytest.approx(1.6 * view)
    assert case.bytes("both") == pytest.approx((1.6 + 1.2 + 3) * view)
    assert _case("token_stats").bytes("both") == 3 * view
    linear = _case("linear_cppo_loss", Sizes(4, 5, 37, 8, selected_share=0.2))
    unit = 2 * 20 * 37 * 8
    assert linear.flops("forward") == pytest.approx(1.6 * unit)
    assert linear.flops("both") == pytest.approx((3 + 0.5 + 0.9) * unit)
    dense = _case("linear_cppo_loss", Sizes(4, 5, 37, 8, gating=False, selected_share=1.0))
    assert dense.flops("both") == 9 * unit


# What is counted


def test_interleaved_samples_respect_rounds_and_time() -> None:
    order: list[str] = []
    timed = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    samples = timing.time_interleaved(timed, 0.0, {"a": 4, "b": 2}, CPU)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 4, "b": 2}
    assert order[:4] == ["a", "b", "b", "a"]
    assert timing.percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5


def test_a_fast_call_is_measured_for_as_long_as_a_slow_one_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    milliseconds = {"fast": 1.0, "slow": 30.0}
    timed = {name: lambda name=name: order.append(name) for name in milliseconds}
    monkeypatch.setattr(
        timing, "time_calls", lambda call, *_: [(call(), milliseconds[order[-1]])[1]]
    )
    timing.time_interleaved(timed, 0.2, {"fast": 4, "slow": 4}, CPU)
    turns = [(name, len(list(found))) for name, found in itertools.groupby(order)]
    # The order alternates: fast, slow, slow, fast, fast, slow. A turn is one call, later 30 of
    # the fast one, until each has used up 200 ms in four rounds or more.
    assert turns[:4] == [("fast", 1), ("slow", 2), ("fast", 60), ("slow", 2)]
    assert all(order.count(name) >= 200 / ms for name, ms in milliseconds.items())


def test_a_mode_that_nobody_asked_for_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    modes, original = set(), calls.run

    def heard(case: Case, mode: str, *rest: Any) -> Any:
        modes.add(mode)
        return original(case, mode, *rest)

    monkeypatch.setattr(calls, "run", heard)
    found = _measure(_case("token_stats"), "eager", modes=("forward",))
    assert {m.mode for m in found} == modes == {"forward"}


def test_later_passes_time_the_same_calls_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _measure(_case("token_stats"), "eager")
    assert [len(m.passes) for m in found] == [1] * 4
    clock = itertools.count(1.0)
    monkeypatch.setattr(timing, "time_calls", lambda call, *_: [(call(), next(clock))[1]])
    assert not harness.measure_again(found, CPU, Budget(quick=0.0))  # slow calls are not
    assert harness.measure_again(found, CPU, Budget(seconds=60.0, quick=60.0, rounds=3))
    for m in found:
        first, second = m.passes
        assert second.samples >= 3 and m.count == first.samples + second.samples
        m.passes[:] = map(Pass.of, ([3.0, 5.0, 9.0, 10.0, 11.0, 12.0], [1.0, 6.0, 7.0, 8.0, 10.0]))
        assert m.passes[0] == (6, 5.0, 9.5, 11.0) and m.ms() == 8.25  # of each pass, averaged
        assert (m.ms("p20"), m.ms("p80")) == pytest.approx((5.0, 9.7))
        m.passes[:] = [Pass.of([t]) for t in (5.0, 7.0, 6.0, 6.5, 8.0, 5.5, 900.0, 0.1)]
        assert m.ms() == 6.25  # of 0.1, 5, 5.5, 6, 6.5, 7, 8, 900 those between the quartiles
    assert {row["passes"] for row in report.make_rows(found, CEILINGS)} == {"8"}


def test_what_a_call_in_place_overwrites_is_there_again() -> None:
    sizes = Sizes(4, 5, 37, inplace=True)
    drawn, given = (inputs.row_inputs("cppo_loss", sizes, "fp32", CPU) for _ in range(2))
    case = Case("cppo_loss", "tiny", "fp32", lambda _: given, ("both",), sizes)
    # No call of a peer after ours: eager leaves its inputs as they are.
    results = _measure(case)
    assert [m.status for m in results] == ["ok"] and results[0].passes
    for view, other in zip(given["logits"], drawn["logits"], strict=True):
        assert torch.equal(view, other)
    calls.run(case, "both", given, calls.ours(case, "auto"))
    assert not torch.equal(given["logits"].anchor, drawn["logits"].anchor)


def test_peak_memory_sees_what_is_freed_again() -> None:
    def call() -> Tensor:
        return torch.ones(2**24).mul(2)[:1].clone()  # two times 64 MiB, both gone at the end

    for _ in range(2):  # whatever the allocator of the process keeps of the first
        assert 2**27 <= timing.peak_growth(call, CPU) < 2**27 + 2**16
    assert timing.peak_growth(lambda: None, CPU) == 0
    held = torch.ones(2**20)
    assert 2**22 <= timing.peak_growth(lambda: held + 1, CPU) < 2**22 + 2**16


def test_ceilings_are_rates() -> None:
    measured = measure_ceilings(CPU, 0.0, toy=True)
    assert all(value > 0 for value in measured.columns().values())
    wide = Ceilings(1.0, 1.0, 5.0, 2.0)
    assert wide.of("TFLOP/s", "bf16") == 5.0 and wide.gemm("bf16") == 2.0


def test_what_nobody_would_wait_for_is_not_run() -> None:
    case = _case("linear_cppo_loss", Sizes(4, 5, 37, 8))
    crawling = Ceilings(1.0, 1.0, 1e-12, 1e-12)
    selection = Selection(("eager",), ("reference",))
    found = list(harness.measure(case, CPU, TINY, crawling, selection))
    assert found and all(m.status.startswith("not run: about") for m in found)


def test_every_op_has_a_case_in_every_shape_set() -> None:
    special = {"group_advantages", "prune_completions"}  # timed as parts of others
    for shapes in SHAPES:
        ops = {case.op for case in cases(shapes, CPU)}
        missing = set(backends.BACKENDS) - special - ops
        assert missing <= ({"linear_token_stats"} if shapes in ("small", "full") else set())
        named = [(c.op, c.shape, c.dtype) for c in cases(shapes, CPU)]
        assert len(set(named)) == len(named)


def test_a_peer_that_is_absent_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "version", lambda name: "")
    _, absent = peers.competitors(_case("token_stats"), CPU, ("trl", "flash-attn"))
    assert absent["trl"] == "not installed" and absent["flash-attn"] == "not installed"


@pytest.mark.slow
def test_torch_compile_is_a_peer() -> None:
    compiled = [m for m in _measure(_case("token_stats"), "compile") if m.peer == "compile"]
    assert len(compiled) == 2 and all(m.passes and m.error < 1e-5 for m in compiled)
