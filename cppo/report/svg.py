"""Two small charts as inline SVG, lines and stacked bars.

matplotlib would draw fixed colours; these follow the page's theme by its classes c0..c7, and a
pointer over a value shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from cppo.report.words import duration, number

_WIDTH, _HEIGHT = 480, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 10, 44  # a phone's letters are larger in these units
_MAX_BARS = 60
_MAX_MARKED_POINTS = 24
NUM_COLOURS = 8


class Series(NamedTuple):
    """A named line. points: (x, y), finite, in ascending x."""

    label: str
    points: list[tuple[float, float]]


def line_chart(
    series: Sequence[Series],
    *,
    top: float | None = None,
    show: Callable[[float], str] = number,
    x_label: str = "step",
) -> str:
    """Return a legend and an SVG with one line per series; the y axis starts at 0 or below.

    Args:
        series: at least one that has a point; one without is left out and keeps its colour.
        top: upper end of the y axis; None takes it from the data.
        show: a value in words.
        x_label: what x counts.
    """
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    y_range = min(0.0, *ys), top or max(*ys, 1e-9)
    to_x, to_y, axes = _axes((min(xs), max(xs)), y_range, show, x_label)
    shapes = []
    for order, (label, points) in enumerate(series):
        if not points:
            continue
        placed = [(to_x(x), to_y(y)) for x, y in points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        shapes.append(f'<path class="line {_colour(order)}" d="{path}"/>')
        marked = range(len(points)) if len(points) <= _MAX_MARKED_POINTS else [len(points) - 1]
        for i in marked:
            tip = f"{label}: {show(points[i][1])} at {x_label} {number(points[i][0])}"
            shapes.append(
                f'<circle class="dot {_colour(order)}" cx="{placed[i][0]:.1f}" '
                f'cy="{placed[i][1]:.1f}" r="3"><title>{escape(tip)}</title></circle>'
            )
    last = [f" <b>{show(s.points[-1][1])}</b>" if s.points else None for s in series]
    return _legend(series, last) + _svg(axes + "".join(shapes))


def stacked_chart(series: Sequence[Series]) -> str:
    """Return a legend and an SVG with one bar per step, the series (seconds) on top of each other.

    More than 60 steps are averaged in groups. A series without a point at some step counts 0 there.

    Args:
        series: at least one; y >= 0.
    """
    xs = sorted({x for s in series for x, _ in s.points})
    values = [dict(s.points) for s in series]
    group = math.ceil(len(xs) / _MAX_BARS)
    bars = [xs[i : i + group] for i in range(0, len(xs), group)]
    heights = [[sum(v.get(x, 0.0) for x in bar) / len(bar) for v in values] for bar in bars]
    step = (xs[-1] - xs[0]) / max(1, len(xs) - 1) * group or 1.0
    x_range = (xs[0] - step / 2, bars[-1][0] + step / 2)
    to_x, to_y, axes = _axes(x_range, (0.0, max(sum(h) for h in heights)), number, "step")
    width = (to_x(step) - to_x(0.0)) * 0.82
    shapes = []
    for bar, height in zip(bars, heights, strict=True):
        base, left = 0.0, to_x(bar[0]) - width / 2
        steps = number(bar[0]) + (f" to {number(bar[-1])}" if len(bar) > 1 else "")
        for order, value in enumerate(height):
            if value > 0:
                upper = to_y(base + value)
                tip = f"step {steps}, {series[order].label}: {duration(value)}"
                shapes.append(
                    f'<rect class="area {_colour(order)}" x="{left:.1f}" y="{upper:.1f}" '
                    f'width="{width:.1f}" height="{to_y(base) - upper:.1f}">'
                    f"<title>{escape(tip)}</title></rect>"
                )
            base += value
    return _legend(series, [""] * len(series)) + _svg(axes + "".join(shapes))


def _axes(
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    show: Callable[[float], str],
    x_label: str,
) -> tuple[Callable[[float], float], Callable[[float], float], str]:
    """Two functions from data to pixels, and the grid with its numbers."""
    y_ticks = _ticks(*y_range)
    low, high = min(y_ticks[0], y_range[0]), max(y_ticks[-1], y_range[1])
    x_low, x_high = x_range if x_range[1] > x_range[0] else (x_range[0] - 0.5, x_range[0] + 0.5)

    def to_x(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def to_y(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        y = to_y(tick)
        kind = "axis" if tick == 0 else "grid"
        parts.append(f'<path class="{kind}" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{show(tick)}</text>')
    for tick in _ticks(x_low, x_high):
        if x_low <= tick <= x_high and tick == int(tick):
            x = to_x(tick)
            parts.append(
                f'<text x="{x:.1f}" y="{_HEIGHT - 22}" text-anchor="middle">{number(tick)}</text>'
            )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return to_x, to_y, "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Four to six round numbers; the first is at or below `low` and the last at or above `high`."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _legend(series: Sequence[Series], extra: Sequence[str | None]) -> str:
    items = "".join(
        f'<span><i class="key {_colour(i)}"></i>{escape(s.label)}{extra[i]}</span>'
        for i, s in enumerate(series)
        if extra[i] is not None
    )
    return f'<div class="keys">{items}</div>'


def _svg(content: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{content}</svg>'


def _colour(order: int) -> str:
    """The classes of a series; the lines are dashed where the colours begin again."""
    return f"c{order % NUM_COLOURS}" + (" again" if order >= NUM_COLOURS else "")
