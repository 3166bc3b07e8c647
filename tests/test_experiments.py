"""The scripts of benchmarks/experiments run at toy size, and write nothing then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cppo.benchmarks.experiments import demo_runs

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "experiments"


def _printed(script: str, folder: Path) -> list[str]:
    command = [sys.executable, str(FOLDER / script), "--smoke"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(folder.iterdir()) == []
    return done.stdout.splitlines()


def test_shared_prompts_at_toy_size(tmp_path: Path) -> None:
    header, rule, *rows = _printed("shared_prompts.py", tmp_path)
    names = [name.strip() for name in header.strip("|").split("|")]
    assert {"tokens_shared", "speedup", "gradient_error"} <= set(names)
    assert rule.startswith("|---") and len(rows) == 2
    assert all(len(row.strip("|").split("|")) == len(names) for row in rows)


def test_the_costs_of_reliability_at_toy_size(tmp_path: Path) -> None:
    printed = "\n".join(_printed("reliability.py", tmp_path))
    assert "save without checksums" in printed and "piece of a step" in printed


def test_the_time_of_the_host_at_toy_size(tmp_path: Path) -> None:
    printed = _printed("host_time.py", tmp_path)
    assert len(printed) == 8 and all(int(line.split()[-2]) > 0 for line in printed)


def test_the_costs_of_selecting_tokens_at_toy_size(tmp_path: Path) -> None:
    printed = _printed("token_selection.py", tmp_path)
    # So small a backward is lost in what a call costs; the updates are not.
    assert sum(line.startswith("head") for line in printed) == 2
    rows = [line.split() for line in printed if line.startswith("update")]
    assert len(rows) == 6 and all(float(row[-1]) > 0 for row in rows)


def test_demo_runs_are_compared_at_the_same_time() -> None:
    """Not after a setting's last evaluation before it: one of them may have just begun a step."""

    def course(prune_rate: float, seed: int, seconds_per_step: float) -> list[demo_runs.Row]:
        at = {"prune_rate": prune_rate, "cpl_coef": 0.0, "seed": seed, "greedy": 0.0}
        return [
            {**at, "step": step, "training_seconds": step * seconds_per_step, "sampled": accuracy}
            for step, accuracy in ((0, 0.2), (10, 0.4), (20, 0.5 + seed / 10))
        ]

    rows = [row for seed in (0, 2) for row in (*course(0, seed, 4), *course(0.75, seed, 3))]
    *_, plain, pruned = demo_runs.summary(rows).splitlines()
    # After 60 seconds the plain runs are at step 15: 0.45 and 0.55.
    assert plain.split(" | ")[-2:] == ["100 %", "0.500 |"]
    assert pruned.split(" | ")[-2:] == ["75 %", "0.600 |"]
