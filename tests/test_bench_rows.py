"""What the benchmarks write: rows, charts, the numbers of a text, and never over committed rows."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cppo.benchmarks import environment, gpu, inputs, report, run
from cppo.benchmarks.cases import Case
from cppo.benchmarks.inputs import Sizes
from cppo.benchmarks.timing import Ceilings
from cppo.cli import main

CPU = torch.device("cpu")
SCRIPTS = Path(environment.__file__).parent / "experiments"
COLUMNS = ("ms_p20", "ms_p50", "ms_p80", "samples", "passes", "gbytes", "gflop", "rate", "unit")
COLUMNS += ("percent_of_ceiling", "speedup_over_eager", "peak_mib", "gradient_mib", "max_error")  # type: ignore[assignment]


def _row(**values: str) -> report.Row:
    row = dict(op="cppo_loss", shape="T=1 V=2 three views, all rows", dtype="fp32", mode="both")
    zero = dict(percent_of_ceiling="50", peak_mib="12", gradient_mib="10", device="d", unit="GB/s")
    return {**row, "backend": "", "peer": "", **zero, **values}


def test_rows_replace_those_of_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    report.merge(path, [_row(device="x", ms_p50="1")])
    report.merge(path, [_row(device="y", ms_p50="2", new="3")])
    assert report.merge(path, [_row(device="x", ms_p50="4")]) is not None
    found = [(r["device"], r["ms_p50"], r["new"]) for r in report.read(path)]
    assert found == [("x", "4", ""), ("y", "2", "3")]


def test_ceilings_are_the_best_of_all_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = iter([Ceilings(10.0, 2.0, 5.0, 2.0), Ceilings(20.0, 1.0, 5.0, 2.0)])
    monkeypatch.setattr(run, "measure_ceilings", lambda *_, **__: next(probed))
    path = tmp_path / "toy.csv"
    command = ["bench", "--shapes", "toy", "--op", "token_stats", "plan_microbatches"]
    command += ["--against", "eager", "--seconds", "0.1", "--passes", "2", "--output", str(path)]
    assert main(command) == 0
    found = report.read(path)
    assert {(row["copy_gb_s"], row["read_gb_s"]) for row in found} == {("20.0", "2.0")}
    for row in found:
        if row["unit"] == "GB/s":
            share = 100 * float(row["rate"]) / 20
            assert float(row["percent_of_ceiling"]) == pytest.approx(share, rel=0.01)


def test_the_command_writes_rows_pictures_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    path = tmp_path / "toy.csv"
    command = ["bench", "--shapes", "toy", "--op", "cppo_loss", "plan_microbatches"]
    command += ["--dtype", "fp32", "--device", "cpu", "--output", str(path), "--against", "eager"]
    command += ["--mode", "both", "--seconds", "0.1", "--passes", "2"]
    assert main([*command, "--plot"]) == 0
    found = report.read(path)
    assert {row["op"] for row in found} == {"cppo_loss", "plan_microbatches"}
    for row in found:
        assert set(COLUMNS) <= set(row)
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert row["device"] and row["commit"] and row["date"] and row["torch"] and row["allocator"]
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
    table = report.summary(found)
    assert "| `plan_microbatches` |" in table
    assert "| `cppo_loss` | T=48 V=193 anchor only | fp32 forward + backward |" in table


def test_a_typing_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--against", "trll"]) == 2
    assert "unknown peer trll; choose from eager, compile, trl" in capsys.readouterr().err


# Where rows go


def test_committed_rows_are_only_written_over_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    committed = Path(environment.__file__).parent / "results"
    assert run.Options().path.parent == tmp_path / "cppo-bench"
    assert run.Options(record=True).path.parent == committed
    assert run.Options(record=True, output=Path("a.csv")).path == Path("a.csv")
    before = {path: path.stat().st_mtime_ns for path in committed.iterdir()}
    command = ["bench", "--shapes", "small", "--op", "plan_microbatches", "--against", "none"]
    assert main([*command, "--seconds", "0"]) == 0
    (written,) = (tmp_path / "cppo-bench").iterdir()
    assert {row["op"] for row in report.read(written)} == {"plan_microbatches"}
    assert {path: path.stat().st_mtime_ns for path in committed.iterdir()} == before


def test_there_is_nothing_to_record_into_outside_of_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "HERE", tmp_path / "site-packages")
    assert main(["bench", "--record"]) == 2
    assert "--record: benchmarks/results is not here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script", sorted(path.name for path in SCRIPTS.glob("*.py") if "def main" in path.read_text())
)
def test_every_script_asks_before_it_writes_over_committed_rows(script: str) -> None:
    """None of them names the folder of committed rows but through `results_folder(record)`."""
    text = (SCRIPTS / script).read_text()
    assert "results_folder(options.record)" in text and text.count("results_folder(") == 1
    assert "experiment_parser(__doc__" in text or "shown(__doc__" in text


def test_a_file_is_named_after_its_device_and_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.backends.cpu.get_cpu_capability().lower()
    stem = environment.file_stem()
    assert environment.allocator() == "system"
    assert stem.startswith("cpu_") and f"_{vectors}_" in stem
    monkeypatch.setattr(environment, "allocator", lambda: "jemalloc")
    assert environment.file_stem() == f"{stem}_jemalloc"
    assert environment.environment()["allocator"] == "jemalloc"


def test_a_preloaded_allocator_is_seen(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux") or not shutil.which("cc"):
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path / "libjemalloc.so.2"
    command = ["cc", "-shared", "-o", str(library), "-x", "c", "/dev/null"]
    subprocess.run(command, check=True)
    code = "from cppo.benchmarks import environment; print(environment.allocator())"
    clean = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "jemalloc", done.stderr


def test_the_gpu_script_goes_on_where_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def case(op: str) -> Case:
        sizes = Sizes(4, 5, 37)
        make = lambda device: inputs.row_inputs(op, sizes, "fp32", device)  # noqa: E731
        return Case(op, "tiny", "fp32", make, ("forward", "both"), sizes)

    monkeypatch.setattr(gpu, "CHECKED_OPS", ("advantages_and_prune",))
    two = [case("token_stats"), case("cppo_loss")]
    monkeypatch.setattr(run, "cases", lambda shapes, device: two)
    command = ["--toy", "--device", "cpu", "--output", str(tmp_path), "--part", "kernels"]
    assert gpu.main([*command, "--minutes", "0"]) == 1
    plan = gpu.Plan(CPU, tmp_path, True, False, time.monotonic() + 60, run.Console(quiet=True))
    rows_path = plan.path()
    assert report.read(rows_path) == []
    monkeypatch.setattr(run, "cases", lambda shapes, device: two[:1])
    assert gpu.kernels(plan)
    first = report.read(rows_path)
    assert {row["op"] for row in first} == {"token_stats"}
    monkeypatch.setattr(run, "cases", lambda shapes, device: two)
    assert gpu.kernels(plan)
    assert report.read(rows_path)[: len(first)] == first
    assert {row["op"] for row in report.read(rows_path)} == {"token_stats", "cppo_loss"}
    assert gpu.correctness(plan)
    checked = report.read(plan.path("_correctness"))
    assert [row["status"] for row in checked] == ["ok"] * len(checked) and checked


# Numbers of a text


def test_numbers_are_written_without_an_exponent() -> None:
    found = [report.three_digits(value) for value in (0.01234, 12.34, 999.4, 4246.0)]
    assert found == ["0.0123", "12.3", "999", "4,246"]


def test_what_texts_are_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gated = "T=1 V=2 three views, f=0.5 r=0.2"
    rows = [_row(backend="cpp", ms_p50="2000"), _row(peer="eager", ms_p50="50000")]
    rows += [_row(backend="cpp", ms_p50="1", shape=gated, peak_mib="3")]
    rows += [_row(peer="trl, gated", ms_p50="4.5", shape=gated)]
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.write(tmp_path / "cpu_here.csv", rows)
    report.write(tmp_path / "cpu_here_steps.csv", rows)  # is no second set of the device

    def made(place: str) -> str:
        kind = place.partition(":")[0]
        text = report.rendered(f"<!-- {place} -->old<!-- /{kind} -->")
        return text.removeprefix(f"<!-- {place} -->").removesuffix(f"<!-- /{kind} -->").strip()

    assert made("table: cpu brief").splitlines() == [
        "| input |  | cppo ms | of ceiling | eager | TRL |",
        "|---|---|---|---|---|---|",
        "| all rows | fp32 forward + backward | 2,000 | 50 % | 25.0x |  |",
        "| f=0.5 r=0.2 | fp32 forward + backward | 1 | 50 % |  | (4.5x) |",
    ]
    assert [line.split(" | ")[5] for line in made("table: cpu all").splitlines()[2:]] == ["2", "3"]
    assert made(f"ratio: cpu; cppo_loss; {rows[0]['shape']}; fp32; both; eager") == "25.0x"
    assert made("spread: cpu; both; eager") == "25.0x to 25.0x"
    assert made("value: cpu; ms_p50; peer=eager") == "50000.0"
    assert made("set: cpu").startswith("d; torch ; allocator ; ; `cpu_here.csv`")
    with pytest.raises(ValueError, match="no committed rows"):
        report.ratio(rows, "cppo_loss", "other", "fp32", "both", "eager")
    with pytest.raises(ValueError, match="2 committed rows"):
        made("value: cpu; ms_p50; backend=cpp")
    report.write(tmp_path / "cpu_there.csv", rows)
    with pytest.raises(ValueError, match="2 sets of 'cpu': keep one"):
        made("set: cpu")
