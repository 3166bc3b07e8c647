"""The benchmark harness: what it refuses, what it counts, what it writes."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cppo import backends
from cppo.benchmarks import environment, gpu, harness, inputs, peers, rows, run, show, timing
from cppo.benchmarks.cases import SHAPES, Case, cases
from cppo.benchmarks.ceilings import Ceilings, measure_ceilings
from cppo.benchmarks.harness import Budget, Measured, Pass
from cppo.benchmarks.inputs import Sizes
from cppo.cli import main
from cppo.records import TokenStats

CPU = torch.device("cpu")
CEILINGS = Ceilings(10.0, 10.0, 1.0, 1.0)
TINY = Budget(seconds=0.0, rounds=3)
SIZES = Sizes(4, 5, 37)


def _case(op: str, sizes: Sizes = SIZES, dtype: str = "fp32") -> Case:
    return Case(
        op,
        "tiny",
        dtype,
        lambda device: inputs.row_inputs(op, sizes, dtype, device),
        ("forward", "both"),
        sizes,
    )


def _measure(case: Case, against: tuple[str, ...] = ("eager",)) -> list[Measured]:
    return list(harness.measure(case, CPU, TINY, CEILINGS, against))


def _plant(
    monkeypatch: pytest.MonkeyPatch, op: str, change: Callable[[TokenStats], TokenStats]
) -> None:
    """Changes what our fastest backend of `op` returns."""
    backend = backends.available(op)[0]
    namespace = backends.pick(op, torch.zeros(1), backend)
    original = getattr(namespace, op)

    def changed(*args: Any, **options: Any) -> Any:
        return change(original(*args, **options))

    monkeypatch.setattr(namespace, op, changed)
    # The fp64 truth is the specification, whatever is planted in a backend.
    if backend == "reference":
        pytest.skip("no backend of its own beside the specification")


# What is caught


@pytest.mark.parametrize("part", ["value", "gradient"])
def test_a_wrong_result_is_reported_and_never_timed(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(stats: TokenStats) -> TokenStats:
        shift = 1e-3 * (stats.logps if part == "value" else stats.logps - stats.logps.detach())
        return TokenStats(stats.logps + shift, stats.entropy)

    _plant(monkeypatch, "token_stats", wrong)
    found = _measure(_case("token_stats"))
    ours = [m for m in found if m.backend]
    assert ours and all(m.status.startswith("wrong") and not m.passes for m in ours)
    assert all(m.passes for m in found if m.peer == "eager")
    assert {row["peer"] for row in rows.make_rows(found, CEILINGS)} == {"eager"}


def test_an_error_at_full_size_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    checked_rows = 2 * SIZES.length

    def wrong(stats: TokenStats) -> TokenStats:
        is_whole = stats.logps.numel() > checked_rows
        return TokenStats(stats.logps + 0.1 * is_whole, stats.entropy)

    _plant(monkeypatch, "token_stats", wrong)
    budget = Budget(seconds=0.0, rounds=1, check_rows=checked_rows)
    found = list(harness.measure(_case("token_stats"), CPU, budget, CEILINGS, ()))
    assert found and all("whole call" in m.status and not m.passes for m in found)


def test_a_slow_backend_is_seen_and_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case("token_stats")
    before = rows.make_rows(_measure(case)[:2], CEILINGS)
    shared = {"device": "here"}

    def slow(stats: TokenStats) -> TokenStats:
        time.sleep(0.3)
        return stats

    _plant(monkeypatch, "token_stats", slow)
    after = rows.make_rows(_measure(case)[:2], CEILINGS)
    ours = next(row for row in after if row["backend"])
    assert float(ours["ms_p20"]) >= 300
    flagged = rows.slower([r | shared for r in before], [r | shared for r in after])
    assert len(flagged) == 1 and "token_stats" in flagged[0]
    assert rows.slower(before, before) == []


def test_a_peer_is_timed_whatever_its_error_is_and_the_error_stands_beside() -> None:
    case = _case("token_stats")
    found = {m.variant: m for m in _measure(case) if m.mode == "forward"}
    assert found["eager"].error < 1e-5 and found["eager"].passes
    drawn = case.make(CPU)
    exact = harness.run(case, "forward", drawn, lambda x: case.run(x, "reference"))
    off = {name: value + 1 for name, value in exact.items()}
    error, of = harness.largest_error(off, exact)
    assert error == pytest.approx(1 / float(exact[of].abs().max()), rel=1e-5)


@pytest.mark.parametrize("op", ["cppo_loss", "linear_cppo_loss"])
@pytest.mark.parametrize("gating", [True, False])
def test_eager_is_the_same_loss_as_ours(op: str, gating: bool) -> None:
    hidden = 8 if op.startswith("linear") else 0
    found = _measure(_case(op, Sizes(4, 10, 37, hidden, gating=gating)))
    names = {m.variant for m in found}
    assert {"eager", "eager, gated"} <= names if gating else "eager, gated" not in names
    for m in found:
        assert m.status == "ok" and m.error < 1e-3, (m.variant, m.status, m.error, m.error_of)


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
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    samples = timing.time_interleaved(calls, 0.0, {"a": 4, "b": 2}, CPU)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 4, "b": 2}
    assert order[:4] == ["a", "b", "b", "a"]
    assert timing.percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5


def test_a_fast_call_is_measured_for_as_long_as_a_slow_one_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    milliseconds = {"fast": 1.0, "slow": 30.0}
    calls = {name: lambda name=name: order.append(name) for name in milliseconds}
    monkeypatch.setattr(
        timing, "time_calls", lambda call, *_: [(call(), milliseconds[order[-1]])[1]]
    )
    timing.time_interleaved(calls, 0.2, {"fast": 4, "slow": 4}, CPU)
    turns = [(name, len(list(calls))) for name, calls in itertools.groupby(order)]
    # The order alternates: fast, slow, slow, fast, fast, slow. A turn is one call, later 30 of
    # the fast one, until each has used up 200 ms in four rounds or more.
    assert turns[:4] == [("fast", 1), ("slow", 2), ("fast", 60), ("slow", 2)]
    assert {name: order.count(name) >= 200 / ms for name, ms in milliseconds.items()} == {
        "fast": True,
        "slow": True,
    }


def test_a_mode_that_nobody_asked_for_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    modes, original = set(), harness.run

    def heard(case: Case, mode: str, *rest: Any) -> Any:
        modes.add(mode)
        return original(case, mode, *rest)

    monkeypatch.setattr(harness, "run", heard)
    options: tuple[Any, ...] = (CPU, TINY, CEILINGS, ("eager",), (), ("forward",))
    assert {m.mode for m in harness.measure(_case("token_stats"), *options)} == {"forward"}
    assert modes == {"forward"}


def test_later_passes_time_the_same_calls_again(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case("token_stats")
    found = _measure(case)
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
    assert {row["passes"] for row in rows.make_rows(found, CEILINGS)} == {"8"}


def test_what_a_call_in_place_overwrites_is_there_again() -> None:
    sizes = Sizes(4, 5, 37, inplace=True)
    drawn, given = (inputs.row_inputs("cppo_loss", sizes, "fp32", CPU) for _ in range(2))
    case = Case("cppo_loss", "tiny", "fp32", lambda _: given, ("both",), sizes)
    # No call of a peer after ours: eager leaves its inputs as they are.
    results = _measure(case, ())
    assert [m.status for m in results] == ["ok"] and results[0].passes
    for view, other in zip(given["logits"], drawn["logits"], strict=True):
        assert torch.equal(view, other)
    harness.run(case, "both", given, lambda x: case.run(x, "auto"))
    assert not torch.equal(given["logits"].anchor, drawn["logits"].anchor)


def test_peak_memory_sees_what_is_freed_again() -> None:
    def call() -> Tensor:
        return torch.ones(2**24).mul(2)[:1].clone()  # two times 64 MiB, both gone at the end

    peak = timing.peak_growth(call, CPU)
    if peak is None:
        pytest.skip("the kernel gives no high-water mark here")
    assert 100 * 2**20 < peak < 200 * 2**20
    assert (timing.peak_growth(lambda: None, CPU) or 0) < 20 * 2**20


def test_kept_memory_is_returned_between_cases() -> None:
    script = """if True:
        import torch
        from cppo.benchmarks import timing
        def resident(): return timing._status_kib("VmRSS") // 1024
        assert timing.keep_freed_memory()
        before = resident()
        large, last = torch.ones(2**26), torch.ones(2**20)  # 256 MiB below what stays
        del large
        kept = resident() - before
        print(kept, timing.return_freed_memory(), resident() - before)
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("the C library's heap is kept on Linux only")
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kept, returned, left = ran.stdout.split()
    assert int(kept) > 200 and returned == "True" and int(left) < 60, ran.stdout


def test_reserved_memory_is_there_for_the_calls_that_follow() -> None:
    script = """if True:
        import resource, torch
        from cppo.benchmarks import timing
        def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        assert timing.keep_freed_memory()
        gap, behind = torch.ones(2**24), torch.ones(2**22)
        del gap
        timing.return_freed_memory()
        timing.reserve_memory(2**27)
        before = faults()
        held = [torch.ones(2**22) for _ in range(7)]  # 112 MiB, 28,672 pages of 4 KiB
        print(faults() - before)
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("the C library's heap is kept on Linux only")
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 100


def test_ceilings_are_rates() -> None:
    measured = measure_ceilings(CPU, 0.0, toy=True)
    assert all(value > 0 for value in measured.columns().values())
    wide = Ceilings(1.0, 1.0, 5.0, 2.0)
    assert wide.of("TFLOP/s", "bf16") == 5.0 and wide.gemm("bf16") == 2.0


def test_what_nobody_would_wait_for_is_not_run() -> None:
    case = _case("linear_cppo_loss", Sizes(4, 5, 37, 8))
    crawling = Ceilings(1.0, 1.0, 1e-12, 1e-12)
    found = list(harness.measure(case, CPU, TINY, crawling, ("eager",), ("reference",)))
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
    found = _measure(_case("token_stats"), ("compile",))
    compiled = [m for m in found if m.peer == "compile"]
    assert len(compiled) == 2 and all(m.passes and m.error < 1e-5 for m in compiled)


# What is written


def test_rows_replace_those_of_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    row = {"op": "a", "shape": "s", "dtype": "", "mode": "forward", "backend": "cpp", "peer": ""}
    rows.merge(path, [row | {"device": "x", "ms_p50": "1"}])
    rows.merge(path, [row | {"device": "y", "ms_p50": "2", "new": "3"}])
    found = rows.merge(path, [row | {"device": "x", "ms_p50": "4"}])
    assert found == rows.read(path) or len(found) == len(rows.read(path)) == 2
    assert [(r["device"], r["ms_p50"], r["new"]) for r in rows.read(path)] == [
        ("x", "4", ""),
        ("y", "2", "3"),
    ]


def test_ceilings_are_the_best_of_all_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = iter([Ceilings(10.0, 2.0, 5.0, 2.0), Ceilings(20.0, 1.0, 5.0, 2.0)])
    monkeypatch.setattr(run, "measure_ceilings", lambda *_, **__: next(probed))
    path = tmp_path / "toy.csv"
    command = ["bench", "--shapes", "toy", "--op", "token_stats", "plan_microbatches"]
    command += ["--against", "eager", "--seconds", "0.1", "--passes", "2", "--output", str(path)]
    assert main(command) == 0
    found = rows.read(path)
    assert {(row["copy_gb_s"], row["read_gb_s"]) for row in found} == {("20.0", "2.0")}
    for row in found:
        if row["unit"] == "GB/s":
            assert float(row["percent_of_ceiling"]) == pytest.approx(
                100 * float(row["rate"]) / 20, rel=0.01
            )


def test_the_command_writes_rows_pictures_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    path = tmp_path / "toy.csv"
    command = ["bench", "--shapes", "toy", "--op", "cppo_loss", "plan_microbatches"]
    command += ["--dtype", "fp32", "--device", "cpu", "--output", str(path), "--against", "eager"]
    command += ["--mode", "both", "--seconds", "0.1", "--passes", "2"]
    assert main([*command, "--plot"]) == 0
    found = rows.read(path)
    assert {row["op"] for row in found} == {"cppo_loss", "plan_microbatches"}
    for row in found:
        assert set(rows.MEASURED) <= set(row)
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert row["device"] and row["commit"] and row["date"] and row["torch"]
        assert not row["unit"] or float(row["percent_of_ceiling"]) >= 0
    printed = capsys.readouterr().out
    assert "cppo_loss T=48 V=193 three views, all rows fp32" in printed and "vs eager" in printed
    page = (tmp_path / "toy.html").read_text()
    assert "three views, f=0.5 r=0.2" in page and "<script" not in page and "http" not in page
    pictures = {p.name for p in tmp_path.glob("*.png")}
    assert pictures == {"toy_logits.png", "toy_host.png", "toy_roofline.png"}
    assert "2" in {row["passes"] for row in found}
    assert ", pass 2" in printed
    before = path.read_text()
    assert main([*command, "--missing"]) == 0
    assert path.read_text() == before
    assert "no case to measure" in capsys.readouterr().out
    assert "| `plan_microbatches` |" in show.summary(found, "host")
    assert "| `cppo_loss` | T=48 V=193 anchor only | fp32 forward + backward |" in show.summary(
        found
    )


def test_a_typing_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--against", "trll"]) == 2
    assert "unknown peer trll; choose from eager, compile, trl" in capsys.readouterr().err


def test_rows_go_into_a_clone_and_beside_the_user_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert environment.results_folder() == Path(environment.__file__).parent / "results"
    monkeypatch.setattr(environment, "HERE", tmp_path / "site-packages")
    assert environment.results_folder() == tmp_path / "cppo-bench"
    vectors = torch.backends.cpu.get_cpu_capability().lower()
    assert environment.file_stem().startswith("cpu_") and f"_{vectors}_" in environment.file_stem()


def test_the_gpu_script_goes_on_where_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "CHECKED_OPS", ("advantages_and_prune",))
    two = [_case("token_stats"), _case("cppo_loss")]
    monkeypatch.setattr(run, "cases", lambda shapes, device: two)
    command = ["--toy", "--device", "cpu", "--output", str(tmp_path), "--part", "kernels"]
    assert gpu.main([*command, "--minutes", "0"]) == 1
    plan = gpu.Plan(CPU, tmp_path, True, False, time.monotonic() + 60, run.Console(quiet=True))
    rows_path = plan.path()
    assert rows.read(rows_path) == []
    monkeypatch.setattr(run, "cases", lambda shapes, device: two[:1])
    assert gpu.kernels(plan)
    first = rows.read(rows_path)
    assert {row["op"] for row in first} == {"token_stats"}
    monkeypatch.setattr(run, "cases", lambda shapes, device: two)
    assert gpu.kernels(plan)
    assert rows.read(rows_path)[: len(first)] == first
    assert {row["op"] for row in rows.read(rows_path)} == {"token_stats", "cppo_loss"}
    assert gpu.correctness(plan)
    checked = rows.read(plan.path("_correctness"))
    assert [row["status"] for row in checked] == ["ok"] * len(checked) and checked


def test_numbers_are_written_without_an_exponent() -> None:
    found = [rows.three_digits(value) for value in (0.01234, 12.34, 999.4, 4246.0)]
    assert found == ["0.0123", "12.3", "999", "4,246"]
