"""Several runs side by side on one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cppo.options.trainer import MODES
from cppo.report import words
from cppo.report.curves import (
    ENTROPY,
    KEPT,
    LENGTH,
    MISMATCH,
    PHASES,
    Curves,
    Figure,
    figure,
    last,
    phases_of,
    points_of,
    reward_curves,
    training_curves,
)
from cppo.report.page import FOLDER, MARK, data, facts, write_page
from cppo.report.parts import template
from cppo.report.record import RunRecord, read_run
from cppo.report.svg import NUM_COLOURS, Series

_SAME_BY_NATURE = ("output_dir",)  # every run has its own


class _Bar(NamedTuple):
    """The phases of a run: [number of the colour, % of the longest step, words]."""

    run: str
    total: str
    parts: list[tuple[int, str, str]]


def write_comparison(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Write one page about several runs; return its path.

    Raises: ReportError for a folder that holds no run with a row of metrics; OSError.
    """
    return write_page(comparison([read_run(folder) for folder in folders]), Path(path))


def comparison(runs: Sequence[RunRecord]) -> str:
    """The page as HTML."""
    names = names_of(runs)
    return template(FOLDER, "comparison.html.jinja").render(
        mark=MARK,
        title=f"{len(runs)} runs side by side",
        written=words.moment(words.now()),
        names=names,
        curves=_figures(runs, names),
        phases=_phase_names(runs),
        bars=_bars(runs, names),
        table_rows=_table(runs),
        options=differing_options(runs),
        colours=[
            f"c{i % NUM_COLOURS}" + (" again" if i >= NUM_COLOURS else "") for i in range(len(runs))
        ],
    )


def names_of(runs: Sequence[RunRecord]) -> list[str]:
    """The shortest ends of the folders' paths that tell the runs apart."""
    parts = [run.folder.resolve().parts for run in runs]
    names: list[str] = []
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def differing_options(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """[option, its value in each run] of those that are not the same in all of them."""
    known = dict.fromkeys(name for run in runs for name in run.options)
    found = []
    for name in known:
        values = [
            words.option(run.options[name]) if name in run.options else words.NOTHING
            for run in runs
        ]
        if len(set(values)) > 1 and name not in _SAME_BY_NATURE:
            found.append((name, values))
    return found


def _figures(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Figure]:
    found = []
    for curves in _held_out(runs) or training_curves(runs[0])[:1]:
        label = next(iter(curves.labels.values()))
        own = curves._replace(heading=f"{curves.heading}, {label}")
        found += _by_step(runs, names, own) + _by_time(runs, names, own)
    kept = KEPT._replace(note="share of the sampled completions that pruning keeps")
    length = LENGTH._replace(note="mean tokens of the sampled completions")
    for curves in (kept, ENTROPY, length, MISMATCH):
        found += _by_step(runs, names, curves)
    return found


def _held_out(runs: Sequence[RunRecord]) -> list[Curves]:
    """A chart for each way of evaluation of the first reward of every run."""
    first = dict.fromkeys(run.evaluated[0] for run in runs if run.evaluated)
    own = {name: next(run for run in runs if name in run.evaluated) for name in first}
    return [reward_curves(run, name, [mode]) for name, run in own.items() for mode in MODES]


def _by_step(runs: Sequence[RunRecord], names: Sequence[str], curves: Curves) -> list[Figure]:
    """The chart of the first metric of `curves` with a line for each run; none if no run has it."""
    key = next(iter(curves.labels))
    return _drawn(names, [points_of(run, key) for run in runs], curves, "step")


def _by_time(runs: Sequence[RunRecord], names: Sequence[str], curves: Curves) -> list[Figure]:
    """The same chart against the time that the steps took; none if no run says so."""
    key, lines = next(iter(curves.labels)), []
    for run in runs:
        seconds = {row["step"]: s for row, s in zip(run.history, run.seconds, strict=True)}
        lines.append([(seconds[int(step)], y) for step, y in points_of(run, key)])
    longest = max((x for line in lines for x, _ in line), default=0.0)
    if not longest:
        return []
    size, unit = words.axis_of_time(longest)
    note = f"against {unit} of training steps, evaluations left out"
    shown = curves._replace(heading=f"{curves.heading}, by time", note=note)
    return _drawn(names, [[(x / size, y) for x, y in line] for line in lines], shown, unit)


def _drawn(
    names: Sequence[str], lines: Sequence[list[tuple[float, float]]], curves: Curves, x_label: str
) -> list[Figure]:
    # A run without the metric has an empty line, so that every run keeps its colour.
    series = [Series(name, line) for name, line in zip(names, lines, strict=True)]
    return [figure(curves, series, x_label)] if any(lines) else []


def _phase_names(runs: Sequence[RunRecord]) -> list[str]:
    named = dict.fromkeys(phase for run in runs for phase in phases_of(run))
    return [*(p for p in PHASES if p in named), *(p for p in named if p not in PHASES)]


def _bars(runs: Sequence[RunRecord], names: Sequence[str]) -> list[_Bar]:
    """Mean seconds of a step by phase, as bars on one scale."""
    order, own = _phase_names(runs), [phases_of(run) for run in runs]
    longest = max((sum(phases.values()) for phases in own), default=0.0)
    bars = []
    for name, phases in zip(names, own, strict=True):
        shown = [(i, phase) for i, phase in enumerate(order) if phase in phases]
        parts = [
            (i, f"{100 * phases[p] / longest:.2f}", f"{p}: {words.duration(phases[p])}")
            for i, p in shown
        ]
        if parts:
            bars.append(_Bar(name, words.duration(sum(phases.values())), parts))
    return bars


def _table(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """[what, its value in each run]: how each ended, and its newest numbers."""
    rows: list[tuple[str, Callable[[RunRecord], Any]]] = [("status", lambda run: run.status)]
    for name in dict.fromkeys(name for run in runs for name in run.evaluated):
        for mode in MODES:
            rows.append((f"held-out {name}, {mode}", _evaluation_of(f"eval/{mode}/{name}", name)))
    rows += [
        ("training reward", _newest("reward/mean", words.number)),
        ("completions trained on", _newest("kept_share", words.percent)),
        ("tokens of a completion", _newest("completion/tokens", words.number)),
        ("entropy, nats", _newest("entropy", words.number)),
        ("engine against trainer, nats", _newest("mismatch/mean", words.number)),
        ("training time", lambda run: words.duration(run.seconds[-1]) if run.seconds[-1] else None),
    ]
    table = [(what, [value(run) for run in runs]) for what, value in rows]
    known = [dict(facts(run)) for run in runs]
    for name in ("Model", "Started", "Device", "Versions", "Command"):
        table.append((name.lower(), [own.get(name) for own in known]))
    table.insert(-4, ("training data", [data(run, "train") for run in runs]))
    return [
        (what, [words.NOTHING if value is None else value for value in values])
        for what, values in table
        if any(value is not None for value in values)
    ]


def _newest(key: str, show: Callable[[float], str]) -> Callable[[RunRecord], str | None]:
    def value(run: RunRecord) -> str | None:
        newest = last(run, key)
        return None if newest is None else show(newest)

    return value


def _evaluation_of(key: str, name: str) -> Callable[[RunRecord], str | None]:
    """The first and the newest value: "30.7 % -> 75.0 %"."""

    def value(run: RunRecord) -> str | None:
        points = run.points(key)
        show = words.percent if run.is_share(name) else words.number
        ends = dict.fromkeys((points[0], points[-1])) if points else {}
        return " \u2192 ".join(show(y) for _, y in ends) or None

    return value
