"""Runs the demo over seeds and settings, and writes what each ingredient changes.

    python benchmarks/experiments/demo_runs.py --task digits --prune-rates 0 0.75 --cpl-coefs 0 0.01

Every run is `cppo demo` in a process of its own with one thread, `--jobs` of them side by side.
Each evaluation becomes a row of `<task>_runs.csv`: training seconds (evaluations left out) and
held-out accuracy after so many steps. The table compares the settings at equal steps (the last
row) and at equal time (that of the fastest, on the line between two evaluations of the others).
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from cppo.benchmarks import report
from cppo.benchmarks.environment import environment, experiment_parser, results_folder
from cppo.train.progress import read_metrics

PHASES = ("rollout", "forward", "backward")
_NUMBERS = ("prune_rate", "cpl_coef", "step", "training_seconds", "sampled", "greedy")
Row = dict[str, Any]


def run(options: argparse.Namespace, prune_rate: float, cpl_coef: float, seed: int) -> list[Row]:
    """One demo run; one row per evaluation."""
    with tempfile.TemporaryDirectory() as output:
        named = {
            "task": options.task,
            "prune-rate": prune_rate,
            "cpl-coef": cpl_coef,
            "seed": seed,
            "steps": options.steps,
            "held-out": options.held_out,
            "eval-every": options.eval_every,
            "output": output,
        } | ({"start": options.start} if options.start else {})
        command = [str(Path(sys.executable).with_name("cppo")), "demo"]
        command += [f"--{name}={value}" for name, value in named.items()]
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
        history = read_metrics(output)
    setting = {"task": options.task, "prune_rate": prune_rate, "cpl_coef": cpl_coef, "seed": seed}
    shared = {"held_out": options.held_out, **environment()}
    rows = [{**setting, **row, **shared} for row in evaluations(history)]
    first, last = rows[0]["sampled"], rows[-1]["sampled"]
    print(f"  {setting_of(rows[-1])}, seed {seed}: {first:.3f} -> {last:.3f}")
    return rows


def evaluations(history: Iterable[dict[str, float]]) -> list[Row]:
    """The accuracies of a run, with the training seconds up to each."""
    rows, seconds = [], dict.fromkeys(("step", *PHASES), 0.0)
    for metrics in history:
        for name in seconds:
            seconds[name] += metrics.get(f"time/{name}", 0.0)
        accuracies = {
            name.split("/")[1]: round(value, 4)
            for name, value in metrics.items()
            if name.startswith("eval/") and name.endswith("accuracy")
        }
        if accuracies:
            spent = {f"{phase}_seconds": round(seconds[phase], 2) for phase in PHASES}
            training = round(seconds["step"], 2)
            rows.append(
                {"step": metrics["step"], "training_seconds": training, **spent, **accuracies}
            )
    return rows


def setting_of(row: Row) -> str:
    """The setting of a row, in words."""
    pruning = f"prune {row['prune_rate']:.4g}" if row["prune_rate"] else "no pruning"
    contrast = f"CPL {row['cpl_coef']:g}" if row["cpl_coef"] else "no CPL"
    plain = " (plain GRPO)" if not row["prune_rate"] and not row["cpl_coef"] else ""
    return f"{pruning}, {contrast}{plain}"


def by_setting(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """{setting: {seed: its evaluations}}, with numbers as numbers."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        row = {**row, **{name: float(row[name]) for name in _NUMBERS}}
        found.setdefault(setting_of(row), {}).setdefault(str(row["seed"]), []).append(row)
    return found


def _column(run: list[Row], name: str) -> list[float]:
    return [row[name] for row in run]


def summary(rows: list[Row]) -> str:
    """The comparison as a Markdown table: means over seeds, with the std of the gain.

    Times are relative to the first setting's.
    """
    settings = by_setting(rows)
    fastest = {
        seed: min(runs[seed][-1]["training_seconds"] for runs in settings.values() if seed in runs)
        for seed in {str(row["seed"]) for row in rows}
    }
    lines: list[list[str]] = []
    first = 0.0
    for name, runs in settings.items():
        gains = [100 * (run[-1]["sampled"] - run[0]["sampled"]) for run in runs.values()]
        in_time = [
            float(
                np.interp(fastest[seed], _column(run, "training_seconds"), _column(run, "sampled"))
            )
            for seed, run in runs.items()
        ]
        seconds = fmean(run[-1]["training_seconds"] for run in runs.values())
        first = first or seconds
        lines.append(
            [
                name,
                f"{fmean(run[0]['sampled'] for run in runs.values()):.3f}",
                f"{fmean(run[-1]['sampled'] for run in runs.values()):.3f}",
                f"{fmean(gains):+.1f} ({stdev(gains) if len(gains) > 1 else 0:.1f})",
                f"{fmean(run[-1]['greedy'] for run in runs.values()):.3f}",
                f"{seconds:.0f}",
                f"{100 * seconds / first:.0f} %",
                f"{fmean(in_time):.3f}",
            ]
        )
    columns = ["setting", "accuracy before", "after", "gain (std over seeds)", "greedy after"]
    columns += ["training s", "relative time", "accuracy at equal time"]
    return report.markdown(columns, lines)


def plot(rows: list[Row], path: Path) -> None:
    """Held-out accuracy against training seconds, mean over seeds: one line per setting."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, runs in by_setting(rows).items():
        evaluations = list(zip(*runs.values(), strict=True))
        seconds = [fmean(row["training_seconds"] for row in at) for at in evaluations]
        sampled = [fmean(row["sampled"] for row in at) for at in evaluations]
        axes.plot(seconds, sampled, marker="o", markersize=4, label=name)
    axes.set(xlabel="training seconds", ylabel="held-out accuracy, sampled", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = experiment_parser(__doc__)
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
    options = parser.parse_args()
    if options.table:
        rows: list[Row] = list(report.read(report.committed(f"{options.task}_runs")))
    else:
        plan = itertools.product(options.seeds, options.prune_rates, options.cpl_coefs)
        with ThreadPoolExecutor(options.jobs) as pool:
            runs = pool.map(lambda p: run(options, p[1], p[2], p[0]), plan)
            rows = [row for rows in runs for row in rows]
        report.write(results_folder(options.record) / f"{options.task}_runs.csv", rows)
    print(summary(rows))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
