"""One self-contained HTML page about a run: curves, time, the three views, tokens by entropy shift.

The page is report.html.jinja; here is what goes into it. It shows what the records hold and leaves
out what they do not. It has no script and loads nothing; its colours follow the reader's light or
dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from cppo.demo.svg import Series, line_chart, stacked_chart
from cppo.pages.parts import template
from cppo.values import is_number

_FOLDER = Path(__file__).parent
_TIME_PARTS = (
    *("rollout", "reward", "old_logps", "ref_logps"),
    *("views", "forward", "backward", "optimizer"),
)
_TOKEN_LISTS = ("tokens", "entropy_shift", "selected")


class _Curves(NamedTuple):
    """A chart: its heading, what it shows, {key of the history: label}, upper end of the axis."""

    heading: str
    note: str
    labels: dict[str, str]
    top: float | None = None


_CHARTS = (
    _Curves(
        "Held-out accuracy",
        "share of right answers on questions that training never saw",
        {"sampled": "sampled", "greedy": "greedy"},
        top=1.0,
    ),
    _Curves(
        "Training reward",
        "of the sampled completions; the deviation is within a question",
        {"reward/mean": "mean", "reward/std": "standard deviation"},
    ),
    _Curves(
        "Trained on",
        "share of the sampled completions, and of their tokens, that pruning keeps",
        {"kept_share": "completions", "kept_token_share": "tokens"},
        top=1.0,
    ),
    _Curves(
        "Contrastive perception",
        "the loss, and the share of tokens with a positive advantage that it acts on",
        {"cpl_loss": "loss", "perception_share": "share of tokens"},
    ),
    _Curves("Entropy", "of the policy, mean over response tokens, nats", {"entropy": "entropy"}),
    _Curves("Completion length", "mean", {"completion/tokens": "tokens"}),
)


def write_report(
    path: str | Path,
    *,
    title: str,
    history: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    views: Sequence[Mapping[str, Any]] = (),
    completions: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page and return its path. What a record lacks is left out.

    Args:
        path: of the HTML file; its folder is made.
        title: heading of the page.
        history: the trainer's metrics, one mapping per step (`CPPOTrainer.history`): `step`,
            any of the keys of the curves, `eval/sampled/...`, `eval/greedy/...`, and
            `time/<part>` in seconds. Missing keys and None or NaN values are left out.
        summary: {row name: {"before": number, "after": number}} becomes the before/after table; any
            other value becomes a fact beside it. Numbers named ...accuracy are shown in percent.
        views: one mapping per image: `anchor`, `positive`, `negative` (PIL images), `question` and,
            if wanted, `answer`.
        completions: one mapping each: `question`, `image` (PIL or None), `tokens` (list of str),
            `entropy_shift` (nats, one per token), `selected` (bool, one per token: the perception
            tokens), `reward`, `advantage`, and `answer` if wanted.
        config: what the run was made with, in order; nested options get dotted names.
    Raises: ValueError if a completion's tokens, entropy_shift and selected differ in length.
    """
    history, facts = _with_derived(history), []
    changes = []
    for name, value in summary.items():
        if isinstance(value, Mapping) and {"before", "after"} <= set(value):
            changes.append(_change(name, value["before"], value["after"]))
        else:
            facts.append((name, _text(name, value)))
    scale = _largest_shift(completions)
    page = template(_FOLDER, "report.html.jinja", number=_number).render(
        title=title,
        changes=changes,
        facts=facts,
        curves=_curves(history),
        times=_times(history),
        views=[{"question": "", "answer": None, **view} for view in views],
        completions=[{"answer": None, **c, "tokens": _tokens(c)} for c in completions],
        scale=scale,
        config=_flat(config or {}).items(),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _with_derived(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The history with held-out accuracy under one name and the share of tokens trained on."""
    names = {name for row in history for name in row if name.startswith("eval/")}
    rows = []
    for row in history:
        derived: dict[str, Any] = {}
        for mode in ("sampled", "greedy"):
            accuracies = sorted(
                n for n in names if n.startswith(f"eval/{mode}/") and n.endswith("accuracy")
            )
            derived[mode] = row.get(accuracies[0] if accuracies else f"eval/{mode}/reward")
        if row.get("tokens/sampled") and row.get("tokens/trained") is not None:
            derived["kept_token_share"] = row["tokens/trained"] / row["tokens/sampled"]
        rows.append(derived | dict(row))
    return rows


def _change(name: str, before: float, after: float) -> dict[str, Any]:
    """A before/after card; accuracies and shares also get a bar."""
    is_share = _is_share(name)
    change = (after - before) * (100 if is_share else 1)
    low, high = sorted((before, after))
    return {
        "name": name,
        "before": _text(name, before),
        "after": _text(name, after),
        "mood": "up" if change > 0 else "down" if change < 0 else "same",
        "words": f"{change:+.1f} points" if is_share else f"{change:+.1f}",
        "bar": (f"{100 * low:.1f}", f"{100 * (high - low):.1f}") if is_share else None,
    }


def _curves(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Markup]]:
    figures = []
    for heading, note, labels, top in _CHARTS:
        series = [Series(label, _points(history, key)) for key, label in labels.items()]
        series = [s for s in series if s.points]
        if series:
            figures.append((heading, note, Markup(line_chart(series, top=top))))
    return figures


def _times(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Where a step's time goes: seconds by part, stacked for each step, and in total."""
    named = [k.removeprefix("time/") for row in history for k in row if k.startswith("time/")]
    known = [part for part in _TIME_PARTS if part in named]
    parts = known + sorted(set(named) - set(known) - {"step", "total"})
    series = [Series(part, _points(history, f"time/{part}")) for part in parts]
    series = [s for s in series if any(y > 0 for _, y in s.points)]
    if not series:
        return None
    totals = [(s.label, sum(y for _, y in s.points)) for s in series]
    return {
        "chart": Markup(stacked_chart(series)),
        "parts": totals,
        "total": sum(seconds for _, seconds in totals),
    }


def _tokens(completion: Mapping[str, Any]) -> list[tuple[str, float, bool]]:
    return list(zip(*(completion[name] for name in _TOKEN_LISTS), strict=True))


def _largest_shift(completions: Sequence[Mapping[str, Any]]) -> float:
    """The shift with the full colour.

    Raises: ValueError if the lists of a completion differ in length.
    """
    for number, completion in enumerate(completions):
        lengths = [len(completion[name]) for name in _TOKEN_LISTS]
        if len(set(lengths)) != 1:
            raise ValueError(
                "write_report: tokens, entropy_shift and selected must be equally long, "
                f"completion {number} has {lengths}"
            )
    shifts = [abs(x) for c in completions for x in c["entropy_shift"] if math.isfinite(x)]
    return max([*shifts, 1e-6])


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) wherever the history holds a finite number under the key."""
    points = []
    for index, row in enumerate(history):
        value = row.get(key)
        if value is not None and math.isfinite(float(value)):
            points.append((float(row.get("step", index)), float(value)))
    return points


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + str(name)] = value
    return flat


def _is_share(name: str) -> bool:
    return "accuracy" in name.lower() or "share" in name.lower()


def _text(name: str, value: Any) -> str:
    """A summary value in words: percent for accuracies and shares, else at most 4 digits."""
    if not is_number(value):
        return str(value)
    if _is_share(name):
        return f"{100 * value:.1f} %"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _number(value: Any, sign: str = "") -> str:
    return "-" if value is None else f"{float(value):{sign}.2f}"
