"""Runs the demo over seeds and settings, and writes what each ingredient changes.

    python benchmarks/demo_runs.py --task digits --prune-rates 0 0.75 --cpl-coefs 0 0.01

Every run is `cppo demo` in a process of its own with one thread, `--jobs` of them side by side.
Each evaluation becomes a row of `results/<task>_runs.csv`: training seconds (evaluations left out)
and held-out accuracy after so many steps. The table compares the settings at equal steps (the last
row) and at equal time (the last evaluation that each finished within the time of the fastest).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cppo.benchmarks.environment import environment
from cppo.train.progress import read_metrics

RESULTS = Path(__file__).parent / "results"
PHASES = ("rollout", "forward", "backward")


def run(arguments: argparse.Namespace, prune_rate: float, cpl_coef: float, seed: int) -> list[dict]:
    """One demo run; one row per evaluation."""
    with tempfile.TemporaryDirectory() as output:
        options = {
            "task": arguments.task,
            "prune-rate": prune_rate,
            "cpl-coef": cpl_coef,
            "seed": seed,
            "steps": arguments.steps,
            "held-out": arguments.held_out,
            "eval-every": arguments.eval_every,
            "output": output,
        }
        command = [str(Path(sys.executable).with_name("cppo")), "demo"]
        command += [f"--{name}={value}" for name, value in options.items()]
        command += [f"--start={arguments.start}"] if arguments.start else []
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
        history = read_metrics(output)
    rows, seconds, phases = [], 0.0, dict.fromkeys(PHASES, 0.0)
    for metrics in history:
        seconds += metrics.get("time/step", 0.0)
        for phase in PHASES:
            phases[phase] += metrics.get(f"time/{phase}", 0.0)
        accuracies = {
            name.split("/")[1]: value
            for name, value in metrics.items()
            if name.startswith("eval/") and name.endswith("accuracy")
        }
        if accuracies:
            rows.append(
                {
                    "task": arguments.task,
                    "prune_rate": prune_rate,
                    "cpl_coef": cpl_coef,
                    "seed": seed,
                    "step": metrics["step"],
                    "training_seconds": round(seconds, 2),
                    **{f"{phase}_seconds": round(phases[phase], 2) for phase in PHASES},
                    **{mode: round(value, 4) for mode, value in accuracies.items()},
                    "held_out": arguments.held_out,
                    **environment(),
                }
            )
    print(
        f"  {setting(rows[-1])} seed {seed}: {rows[0]['sampled']:.3f} -> {rows[-1]['sampled']:.3f}"
    )
    return rows


def setting(row: dict) -> str:
    """The setting of a row, in words."""
    return f"prune {row['prune_rate']:g}, cpl {row['cpl_coef']:g}"


def summary(rows: list[dict]) -> str:
    """The comparison as a Markdown table: means over seeds, with the std of the gain."""
    rows = [row_numbers(row) for row in rows]
    by_setting: dict[str, dict[int, list[dict]]] = {}
    for row in rows:
        by_setting.setdefault(setting(row), {}).setdefault(int(row["seed"]), []).append(row)
    budget = {
        seed: min(
            runs[seed][-1]["training_seconds"] for runs in by_setting.values() if seed in runs
        )
        for seed in {int(row["seed"]) for row in rows}
    }
    slowest = max(_mean(runs, _last, "training_seconds") for runs in by_setting.values())
    lines = [
        "| setting | sampled before | after | gain (std over seeds) | greedy after | "
        "training s | of the slowest | sampled at equal time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in by_setting.items():
        gains = [100 * (run[-1]["sampled"] - run[0]["sampled"]) for run in runs.values()]
        spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
        at_budget = [
            max((r for r in run if r["training_seconds"] <= budget[seed]), key=lambda r: r["step"])
            for seed, run in runs.items()
        ]
        seconds = _mean(runs, _last, "training_seconds")
        lines.append(
            f"| {name} | {_mean(runs, _first, 'sampled'):.3f} "
            f"| {_mean(runs, _last, 'sampled'):.3f} "
            f"| {statistics.fmean(gains):+.1f} ({spread:.1f}) | {_mean(runs, _last, 'greedy'):.3f} "
            f"| {seconds:.0f} | {100 * seconds / slowest:.0f} % "
            f"| {statistics.fmean(r['sampled'] for r in at_budget):.3f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Held-out accuracy against training seconds, mean over seeds: one line per setting."""
    import matplotlib.pyplot as plt

    curves: dict[str, dict[int, list[dict]]] = {}
    for row in rows:
        curves.setdefault(setting(row_numbers(row)), {}).setdefault(int(row["step"]), []).append(
            row_numbers(row)
        )
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, steps in curves.items():
        seconds = [statistics.fmean(r["training_seconds"] for r in at) for at in steps.values()]
        sampled = [statistics.fmean(r["sampled"] for r in at) for at in steps.values()]
        axes.plot(seconds, sampled, marker="o", markersize=4, label=name)
    axes.set(xlabel="training seconds", ylabel="held-out accuracy, sampled", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def row_numbers(row: dict) -> dict:
    """A row of the CSV file with its numbers as numbers."""
    return {**row, **{name: float(row[name]) for name in _NUMBERS}}


_NUMBERS = ("prune_rate", "cpl_coef", "step", "training_seconds", "sampled", "greedy")


def _first(run: list[dict]) -> dict:
    return run[0]


def _last(run: list[dict]) -> dict:
    return run[-1]


def _mean(runs: dict[int, list[dict]], pick, name: str) -> float:  # noqa: ANN001
    return statistics.fmean(pick(run)[name] for run in runs.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="digits")
    parser.add_argument("--prune-rates", type=float, nargs="+", default=[0.0, 0.75])
    parser.add_argument("--cpl-coefs", type=float, nargs="+", default=[0.0, 0.01])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=1000)
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument("--start", help="checkpoint folder that every run starts from")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only print the committed table")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file (matplotlib)")
    arguments = parser.parse_args()
    path = RESULTS / f"{arguments.task}_runs.csv"
    if not arguments.table:
        plan = itertools.product(arguments.seeds, arguments.prune_rates, arguments.cpl_coefs)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            runs = list(pool.map(lambda p: run(arguments, p[1], p[2], p[0]), plan))
        rows = [row for rows in runs for row in rows]
        RESULTS.mkdir(exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    print(summary(rows))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
