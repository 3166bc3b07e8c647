"""The charts of a run: which metrics, in which units, and how many points of a long run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from cppo.options.trainer import MODES
from cppo.report.record import RunRecord
from cppo.report.svg import Series, line_chart, stacked_chart
from cppo.report.words import count, mean, number, percent

MOST_POINTS = 300  # of a line
PHASES = (
    *("rollout", "sync", "reward", "old_logps", "ref_logps"),
    *("views", "forward", "backward", "optimizer"),
)
_REST = "other"


class Curves(NamedTuple):
    """A chart: its heading, what it shows, {metric: label}, upper end of the axis, its unit."""

    heading: str
    note: str
    labels: dict[str, str]
    top: float | None = None
    show: Callable[[float], str] = number


class Figure(NamedTuple):
    """A chart as a page shows it."""

    heading: str
    note: str
    chart: Markup


KEPT = Curves(
    "Trained on",
    "share of the sampled completions, and of their tokens, that pruning keeps",
    {"kept_share": "completions", "kept_token_share": "tokens"},
    1.0,
    percent,
)
ENTROPY = Curves(
    "Entropy", "of the policy, mean over response tokens, nats", {"entropy": "entropy"}
)
MISMATCH = Curves(
    "Engine against trainer",
    "mean difference of a token's log-probability between the two, nats",
    {"mismatch/mean": "difference"},
)
LENGTH = Curves(
    "Completion length",
    "tokens, over the sampled completions",
    {"completion/tokens": "mean", "completion/max_tokens": "longest"},
)
_CHARTS = (
    KEPT,
    Curves(
        "Questions without a signal",
        "share of the questions whose completions all got the same reward",
        {"reward/zero_variance_share": "questions"},
        1.0,
        percent,
    ),
    Curves(
        "Perception tokens",
        "share of the tokens of gated completions that the contrastive loss acts on",
        {"perception_share": "tokens"},
        1.0,
        percent,
    ),
    Curves("Contrastive perception", "its loss", {"cpl_loss": "loss"}),
    Curves("PAPO", "KL between the policy with and without the image, nats", {"papo/kl": "KL"}),
    ENTROPY,
    Curves("Distance from the reference", "KL to the first policy, nats", {"kl": "KL"}),
    LENGTH,
    Curves(
        "Cut completions",
        "share of the sampled completions that reached the limit of tokens",
        {"completion/truncated_share": "completions"},
        1.0,
        percent,
    ),
    Curves("Gradient", "its norm before clipping", {"grad_norm": "norm"}),
    MISMATCH,
)
# Nothing to see where they are 0 throughout.
_ONLY_IF_ANY = ("perception_share", "cpl_loss", "completion/truncated_share")


def reward_curves(run: RunRecord, name: str, modes: Iterable[str] = MODES) -> Curves:
    """The evaluations of a reward. It is an accuracy only if it is called so."""
    labels = {f"eval/{mode}/{name}": mode for mode in modes}
    if run.is_share(name):
        what = "share of right answers" if is_accuracy(name) else "share of completions that got 1"
        note = f"{what}, on questions that training never saw"
        return Curves(f"Held-out {reward_words(name)}", note, labels, 1.0, percent)
    note = "mean, on questions that training never saw"
    return Curves(f"Held-out {reward_words(name)}", note, labels)


def is_accuracy(reward: str) -> bool:
    """Whether a reward is called an accuracy."""
    return "accuracy" in reward.lower()


def reward_words(name: str) -> str:
    """What a reward is called in a heading."""
    if is_accuracy(name):
        return name.replace("_", " ")
    return "reward, weighted sum" if name == "reward" else f"reward \u201c{name}\u201d"


def training_curves(run: RunRecord) -> list[Curves]:
    """The rewards of training: their sum, and each function where there are several."""
    names = run.reward_names
    is_share = len(names) == 1 and run.is_share(names[0]) and _is_sum(run, names[0])
    found = [
        Curves(
            "Training reward",
            "of the sampled completions; the deviation is within a question",
            {"reward/mean": "mean", "reward/std": "standard deviation"},
            show=percent if is_share else number,
        )
    ]
    if len(names) > 1:
        labels = {f"reward/{name}": name for name in names}
        found.append(Curves("Training rewards", "mean of each function", labels))
    return found


def _is_sum(run: RunRecord, name: str) -> bool:
    """Whether the weighted sum is the one reward itself."""
    return run.points(f"reward/{name}") == run.points("reward/mean")


def figures(run: RunRecord) -> Iterator[Figure]:
    """Every chart for which the run has a number."""
    evaluated = [reward_curves(run, name) for name in run.evaluated]
    for curves in (*evaluated, *training_curves(run), *_CHARTS):
        series = [Series(label, points_of(run, key)) for key, label in curves.labels.items()]
        series = [one for one in series if one.points]
        is_flat = all(y == 0 for one in series for _, y in one.points)
        if series and not (is_flat and curves.labels.keys() <= set(_ONLY_IF_ANY)):
            yield figure(curves, series)


def figure(curves: Curves, series: Sequence[Series], x_label: str = "step") -> Figure:
    """A chart of these series; those of a long run are averaged."""
    size = max(-(-len(one.points) // MOST_POINTS) for one in series)
    note = curves.note + (f"; a point is the mean of {count(size, x_label)}" if size > 1 else "")
    drawn = [Series(one.label, thinned(one.points)) for one in series]
    chart = line_chart(drawn, top=curves.top, show=curves.show, x_label=x_label)
    return Figure(curves.heading, note, Markup(chart))


def points_of(run: RunRecord, key: str) -> list[tuple[float, float]]:
    """(step, value) of a metric, or of the share of the tokens that are trained on."""
    if key != "kept_token_share":
        return run.points(key)
    sampled = dict(run.points("tokens/sampled"))
    trained = run.points("tokens/trained")
    return [(step, value / sampled[step]) for step, value in trained if sampled.get(step)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: means over neighbours."""
    size = max(1, -(-len(points) // MOST_POINTS))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(mean([x for x, _ in own]), mean([y for _, y in own])) for own in groups]


class Times(NamedTuple):
    """Where the time goes: by step as a chart, and [phase, seconds] in all."""

    chart: Markup
    parts: list[tuple[str, float]]
    total: float


def times(run: RunRecord) -> Times | None:
    """The phases of the steps; what none of them counts is called other."""
    series = phase_series(run)
    if not series:
        return None
    totals = [(one.label, sum(y for _, y in one.points)) for one in series]
    total = max(sum(seconds for _, seconds in totals), run.seconds[-1])
    return Times(Markup(stacked_chart(series)), totals, total)


def phase_series(run: RunRecord) -> list[Series]:
    """Seconds of each phase, by step."""
    named = {key.removeprefix("time/") for key in run.keys if key.startswith("time/")}
    known = [phase for phase in PHASES if phase in named]
    phases = known + sorted(named - set(known) - {"step", "total"})
    series = [Series(phase, run.points(f"time/{phase}")) for phase in phases]
    counted: dict[float, float] = {}
    for one in series:
        for step, seconds in one.points:
            counted[step] = counted.get(step, 0.0) + seconds
    rest = [(step, s - counted.get(step, 0.0)) for step, s in run.points("time/step")]
    series.append(Series(_REST, [(step, max(0.0, seconds)) for step, seconds in rest]))
    least = 0.005 * sum(y for one in series for _, y in one.points)
    shown = [one for one in series if sum(y for _, y in one.points) > 0]
    return [one for one in shown if one.label != _REST or sum(y for _, y in one.points) > least]


def phases_of(run: RunRecord) -> dict[str, float]:
    """Mean seconds of each phase in a step."""
    series = phase_series(run)
    steps = len({step for one in series for step, _ in one.points})
    return {one.label: sum(y for _, y in one.points) / steps for one in series}


def last(run: RunRecord, key: str) -> Any:
    """The newest value of a metric, None without one."""
    points = points_of(run, key)
    return points[-1][1] if points else None
