"""The page about one run: what it was, what came of it, its curves and its completions.

report.html.jinja is the page; here is what goes into it, read from the run's folder. What the
folder lacks is left out. The page has no script and loads nothing; its colours follow the reader's
light or dark theme.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cppo.options.trainer import MODES, CPPOConfig
from cppo.report import words
from cppo.report.curves import figures, reward_words, times
from cppo.report.parts import template
from cppo.report.record import RunRecord, read_run
from cppo.report.texts import before_and_after, best_and_worst
from cppo.train.run_options import run_options

NAME = "report.html"
MARK = '<meta name="generator" content="cppo report">'
FOLDER = Path(__file__).parent
_TOKEN_LISTS = ("tokens", "entropy_shift", "selected")
_MOST_CARDS = 4
_NEWEST_EVALUATIONS = 12


class Change(NamedTuple):
    """A number before and after; `bar` is (the smaller, the difference) of two shares, in %."""

    name: str
    before: str | None
    after: str
    mood: str
    words: str
    bar: tuple[str, str] | None


def write_report(
    folder: str | Path,
    *,
    path: str | Path | None = None,
    is_running: bool | None = None,
    **extras: Any,
) -> Path:
    """Write report.html into the folder of a run, from what the folder holds; return its path.

    Args:
        folder: the run's.
        path: of the page, if it is to be somewhere else.
        is_running: whether the run goes on; None asks the folder's lock.
        extras: as `page` takes them.
    Raises: ReportError if the folder holds no run with a row of metrics; OSError.
    """
    run = read_run(folder, is_running=is_running)
    return write_page(page(run, **extras), Path(folder) / NAME if path is None else Path(path))


def write_page(text: str, path: Path) -> Path:
    """Write a page whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        # "replace": half a surrogate pair, which a model may write, is no text for a file.
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return path


def page(
    run: RunRecord,
    *,
    title: str | None = None,
    views: Sequence[Mapping[str, Any]] = (),
    completions: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page as HTML.

    Args:
        run: what it is about.
        title: None: the name of the run's folder.
        views: one mapping per image: `anchor`, `positive`, `negative` (PIL images), `question` and,
            if wanted, `answer`.
        completions: one mapping each: `question`, `image` (PIL or None), `tokens` (list of str),
            `entropy_shift` (nats, one per token), `selected` (bool, one per token: the perception
            tokens), `reward`, `advantage`, and `answer` if wanted.
    Raises: ValueError if a completion's tokens, entropy_shift and selected differ in length.
    """
    scale = _largest_shift(completions)
    return template(FOLDER, "report.html.jinja", number=_decimal, duration=words.duration).render(
        mark=MARK,
        title=title or run.folder.resolve().name,
        status=run.status,
        written=words.moment(words.now()),
        changes=changes(run),
        facts=facts(run),
        curves=list(figures(run)),
        times=times(run),
        asked=before_and_after(run),
        extremes=best_and_worst(run),
        views=[{"question": "", "answer": None, **view} for view in views],
        completions=[{"answer": None, **c, "tokens": _tokens(c)} for c in completions],
        scale=scale,
        evaluations=run.evaluations[-_NEWEST_EVALUATIONS:],
        options=_options(run),
    )


def changes(run: RunRecord) -> list[Change]:
    """The cards: held-out rewards before and after, without them the reward of training."""
    found = []
    for name in run.evaluated:
        for mode in MODES:
            points = [y for _, y in run.points(f"eval/{mode}/{name}")]
            if points:
                heading = f"Held-out {reward_words(name)}, {mode}"
                found.append(_change(heading, points[0], points[-1], run.is_share(name), points))
    points = [y for _, y in run.points("reward/mean")]
    if not found and points:
        some = max(1, len(points) // 10)
        ends = words.mean(points[:some]), words.mean(points[-some:])
        heading = f"Training reward, first and last {words.count(some, 'step')}"
        found.append(_change(heading, *ends, is_share=False, points=points))
    return found[:_MOST_CARDS]


def _change(
    name: str, before: float, after: float, is_share: bool, points: Sequence[float]
) -> Change:
    show = words.percent if is_share else words.number
    if len(points) < 2:
        return Change(name, None, show(after), "same", "measured once", None)
    change, (low, high) = after - before, sorted((before, after))
    sign = "+" if change >= 0 else "\u2212"
    said = words.points(change) if is_share else f"{sign}{words.number(abs(change))}"
    mood = "up" if change > 0 else "down" if change < 0 else "same"
    bar = (f"{100 * low:.1f}", f"{100 * (high - low):.1f}") if is_share else None
    return Change(name, show(before), show(after), mood, said, bar)


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """What the run was, in words: what is not known is left out."""
    versions = run.said("versions")
    found = [
        ("Model", _model(run)),
        ("Started", words.moment(run.starts[0].get("started")) if run.starts else None),
        ("Training time", _time(run)),
        ("Training data", data(run, "train")),
        ("Held-out data", data(run, "eval")),
        ("Rewards", ", ".join(run.reward_names)),
        ("Device", _device(run)),
        ("Versions", ", ".join(f"{k} {v}" for k, v in versions.items()))
        if isinstance(versions, dict)
        else ("", None),
    ]
    return [(name, value) for name, value in found if value] + _command(run)


def _command(run: RunRecord) -> list[tuple[str, str]]:
    command = run.starts[0].get("command") if run.starts else None
    return [("Command", str(command))] if command else []


def _model(run: RunRecord) -> str | None:
    parameters = words.finite(run.said("parameters"))
    if run.model is None:
        return None
    path = Path(run.model)
    name = path.name if path.is_absolute() else run.model
    return name + (f", {_size(parameters)} parameters" if parameters else "")


def _size(parameters: float) -> str:
    for limit, unit in ((1e9, "billion"), (1e6, "million")):
        if parameters >= limit:
            return f"{parameters / limit:.3g} {unit}"
    return f"{parameters:,.0f}"


def _time(run: RunRecord) -> str | None:
    seconds, steps = run.seconds[-1], len(run.points("time/step"))
    if not steps:
        return None
    of = f"{words.count(steps, 'step')} of {words.duration(seconds / steps)}"
    again = len(run.starts) - 1
    return f"{words.duration(seconds)}, {of}" + (
        f"; resumed {words.count(again, 'time')}" if again > 0 else ""
    )


def data(run: RunRecord, part: str) -> str | None:
    """A data set in words: where it is from, and how many questions it has."""
    named = {name: run.options.get(f"data.{part}.{name}") for name in ("loader", "path", "split")}
    source, split = named["path"] or named["loader"], named["split"]
    where = str(source or "") + (f" ({split})" if split else "")
    size = re.match(r"(\d+) rows", str(run.options.get(f"{part}_dataset") or ""))
    questions = words.count(int(size[1]), "question") if size else ""
    return ", ".join(filter(None, (where, questions))) or None


def _device(run: RunRecord) -> str | None:
    device, processes = run.said("device"), run.said("processes")
    if not device:
        return None
    return f"{processes} x {device}" if isinstance(processes, int) and processes > 1 else device


def _options(run: RunRecord) -> dict[str, list[tuple[str, str]]]:
    """Those that differ from the defaults, and the others."""
    defaults = run_options(CPPOConfig(), 1)
    own: dict[str, list[tuple[str, str]]] = {"set": [], "default": []}
    for name, value in run.options.items():
        kind = "default" if name in defaults and defaults[name] == value else "set"
        if name in defaults or value is not None:  # a part of model or data that is not given
            own[kind].append((name, words.option(value)))
    return own


def _tokens(completion: Mapping[str, Any]) -> list[tuple[str, float, bool]]:
    return list(zip(*(completion[name] for name in _TOKEN_LISTS), strict=True))


def _largest_shift(completions: Sequence[Mapping[str, Any]]) -> float:
    """The shift with the full colour.

    Raises: ValueError if the lists of a completion differ in length.
    """
    for order, completion in enumerate(completions):
        lengths = [len(completion[name]) for name in _TOKEN_LISTS]
        if len(set(lengths)) != 1:
            raise ValueError(
                "write_report: tokens, entropy_shift and selected must be equally long, "
                f"completion {order} has {lengths}"
            )
    shifts = [abs(x) for c in completions for x in c["entropy_shift"] if math.isfinite(x)]
    return max([*shifts, 1e-6])


def _decimal(value: Any, sign: str = "") -> str:
    return words.NOTHING if value is None else f"{float(value):{sign}.2f}"


def is_ours(path: str | Path) -> bool:
    """Whether a file is a page of `cppo report`, or there is no file."""
    if not os.path.lexists(path):
        return True
    with open(path, "rb") as file:
        return MARK.encode() in file.read(1000)
