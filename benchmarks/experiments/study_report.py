"""What the rows of the study say: paired differences with intervals, a table and a figure.

Everything is a difference between a method and GRPO on the same task and seed, so that what a seed
brings along (its warm-up, its questions) cancels out. Intervals are 95 % percentile bootstraps over
seeds. At equal steps both are compared after their last step; at equal time, when the faster of the
two has ended: the accuracy of the other at that time is read off the line between its evaluations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from cppo.benchmarks import report
from cppo.benchmarks.report import Row

GRPO = "GRPO"
FIRST_TUNING_SEED = 100  # and those above: they choose CPL's coefficient, and nothing else
_DRAWS = 10_000


class Curve(NamedTuple):
    """The runs of a task and a method.

    accuracy: {seed: (E,) accuracy in percent at each evaluation}; seconds: (E,) CPU seconds of
    training until then, the median over seeds; misread: in percent of the wrong answers at the end.
    """

    accuracy: dict[int, np.ndarray]
    seconds: np.ndarray
    misread: float


class Difference(NamedTuple):
    """The mean of paired differences in points, and the 95 % interval of the mean."""

    mean: float
    low: float
    high: float

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        text = f"{points(self.mean)} ({points(self.low)} to {points(self.high)})"
        return f"**{text}**" if self.is_significant else text


def points(difference: float) -> str:
    """Points with their sign; zero has none."""
    text = f"{difference:+.1f}"
    return "0.0" if text[1:] == "0.0" else text


def curves(rows: Iterable[Row]) -> dict[str, dict[str, Curve]]:
    """{task: {method: its runs}}, the newest of each seed, without those of the tuning seeds."""
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if int(row["seed"]) < FIRST_TUNING_SEED:
            runs = found.setdefault(row["task"], {}).setdefault(row["method"], {})
            runs[row["seed"]] = row
    return {
        task: {method: _curve(list(runs.values())) for method, runs in methods.items()}
        for task, methods in found.items()
    }


def _curve(runs: Sequence[Row]) -> Curve:
    accuracy = {int(row["seed"]): 100 * _evaluations(row, "accuracy") for row in runs}
    seconds = np.median([_evaluations(row, "seconds") for row in runs], axis=0)
    return Curve(accuracy, seconds, 100 * fmean(float(row["misread"]) for row in runs))


def _evaluations(row: Row, name: str) -> np.ndarray:
    """(E,) numbers of a row, by step."""
    steps = sorted(int(key.split("_")[1]) for key in row if key.startswith(f"{name}_"))
    return np.array([float(row[f"{name}_{step}"]) for step in steps])


def paired(method: Curve, base: Curve) -> tuple[np.ndarray, np.ndarray]:
    """(S,) differences in points at equal steps and at equal time.

    They are of the seeds that both have run from the same start, as its accuracy shows.
    """
    both = sorted(method.accuracy.keys() & base.accuracy.keys())
    seeds = [seed for seed in both if method.accuracy[seed][0] == base.accuracy[seed][0]]
    time = min(method.seconds[-1], base.seconds[-1])

    def in_time(curve: Curve, seed: int) -> float:
        return float(np.interp(time, curve.seconds, curve.accuracy[seed]))

    steps = [method.accuracy[seed][-1] - base.accuracy[seed][-1] for seed in seeds]
    return np.array(steps), np.array([in_time(method, s) - in_time(base, s) for s in seeds])


def bootstrap(differences: np.ndarray, draws: int = _DRAWS) -> Difference:
    """The mean of (S,) differences, and the 95 % interval of `draws` means of S drawn anew."""
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(differences), size=(draws, len(differences)))
    low, high = np.percentile(differences[chosen].mean(1), [2.5, 97.5])
    return Difference(float(differences.mean()), float(low), float(high))


def compared(methods: Mapping[str, Curve]) -> dict[str, tuple[Difference, Difference]]:
    """{method: against GRPO at equal steps, at equal time}, where at least two seeds have both."""
    if GRPO not in methods:
        return {}
    found = {}
    for name, curve in methods.items():
        steps, time = paired(curve, methods[GRPO])
        if name != GRPO and len(steps) > 1:
            found[name] = bootstrap(steps), bootstrap(time)
    return found


def in_words(rows: Iterable[Row], method: str, at: str) -> str:
    """Points of a method over GRPO at equal "steps" or "time", task by task: "+1.3 and -0.2"."""
    found = [compared(methods)[method] for methods in curves(rows).values()]
    return _listed([points((steps if at == "steps" else time).mean) for steps, time in found])


def _listed(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def best_coefficient(rows: Iterable[Row], task: str, names: Sequence[str]) -> tuple[str, ...]:
    """The method that was most accurate on a task's tuning seeds; none before all have run.

    Args:
        names: the methods that are tuned; each must have the same seeds.
    """
    last: dict[str, dict[str, float]] = {name: {} for name in names}
    for row in rows:
        if row["task"] == task and int(row["seed"]) >= FIRST_TUNING_SEED and row["method"] in last:
            last[row["method"]][row["seed"]] = _evaluations(row, "accuracy")[-1]
    seeds = {frozenset(runs) for runs in last.values()}
    if len(seeds) != 1 or not next(iter(seeds)):
        return ()
    return (max(names, key=lambda name: fmean(last[name].values())),)


# The table and the figure


def summary(rows: Sequence[Row]) -> str:
    """A Markdown table of the tasks and methods that have run, and what of it is significant."""
    lines, verdicts = [], []
    for task, methods in curves(rows).items():
        differences = compared(methods)
        for name, curve in methods.items():
            before, *_, after = zip(*curve.accuracy.values(), strict=True)
            against = [str(difference) for difference in differences.get(name, ("", ""))]
            share = curve.seconds[-1] / methods[GRPO].seconds[-1] if GRPO in methods else None
            cells = [task, name, *against, "" if share is None else f"{100 * share:.0f} %"]
            cells += [f"{curve.seconds[-1]:.0f}", f"{fmean(before):.1f}", f"{fmean(after):.1f}"]
            lines.append([*cells, f"{curve.misread:.0f} %", str(len(after))])
        verdicts += [_verdict(task, differences)] if differences else []
    columns = ["task", "method", "points over GRPO at equal steps", "at equal time", "CPU time"]
    columns += ["CPU s", "% right before", "after", "of the wrong misread", "seeds"]
    return "\n\n".join([report.markdown(columns, lines), *verdicts])


def _verdict(task: str, differences: Mapping[str, tuple[Difference, Difference]]) -> str:
    """Which methods of a task differ from GRPO, in words."""
    sentences = []
    for number, words in enumerate(("equal steps", "equal time")):
        found = {name: both[number] for name, both in differences.items()}
        parts = []
        for relation, names in (
            ("above GRPO", [n for n, d in found.items() if d.low > 0]),
            ("below GRPO", [n for n, d in found.items() if d.high < 0]),
            ("not told apart from GRPO", [n for n, d in found.items() if not d.is_significant]),
        ):
            verb = "is" if len(names) == 1 else "are"
            parts += [f"{_listed(names)} {verb} {relation}"] if names else []
        widest = max((d.high - d.low) / 2 for d in found.values())
        sentences.append(f"At {words} {'; '.join(parts)} (± {widest:.1f} points at most).")
    return f"`{task}`: {' '.join(sentences)}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Differences from GRPO with their intervals: a panel for each task. Needs matplotlib."""
    import matplotlib.pyplot as plt

    tasks = {task: compared(methods) for task, methods in curves(rows).items()}
    tasks = {task: found for task, found in tasks.items() if found}
    names = list(dict.fromkeys(name for found in tasks.values() for name in found))
    size = (3 * len(tasks) + 1.5, 0.42 * len(names) + 1.2)
    figure, grid = plt.subplots(
        1, len(tasks), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (task, found) in zip(grid[0], tasks.items(), strict=True):
        axes.axvline(0, color="#94a3b8", linewidth=1)
        kinds = (("equal steps", "#0f766e", -0.12), ("equal time", "#b45309", 0.12))
        for number, (words, colour, shift) in enumerate(kinds):
            own = {name: both[number] for name, both in found.items()}
            means = np.array([d.mean for d in own.values()])
            spread = [
                [d.mean - d.low for d in own.values()],
                [d.high - d.mean for d in own.values()],
            ]
            places = [names.index(name) + shift for name in own]
            style = {"fmt": "o", "markersize": 4, "capsize": 2, "color": colour}
            axes.errorbar(means, places, xerr=spread, label=words, **style)
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("points over GRPO, 95 %", fontsize=9)
        axes.grid(alpha=0.25, axis="x")
    grid[0][0].set_yticks(range(len(names)), names)
    grid[0][0].invert_yaxis()
    grid[0][-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
