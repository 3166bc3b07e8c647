"""Lines and bars as SVG: where points are, and what their axes say."""

from xml.etree import ElementTree

import pytest

from cppo.report.svg import Series, _ticks, line_chart, stacked_chart


def svg(chart):
    return ElementTree.fromstring(chart[chart.index("<svg") :])


def test_line_chart_places_points_by_hand():
    root = svg(line_chart([Series("a", [(0, 0), (10, 1.0)])], top=1.0))
    (path,) = [e for e in root if e.get("class") == "line c0"]
    # 480 x 240 with margins 56, 14 (sides), 10 (top), 44 (bottom)
    assert path.get("d") == "M56.0 196.0L466.0 10.0"
    labels = {e.text: float(e.get("y")) for e in root if e.tag == "text"}
    assert labels["0.2"] - labels["0.4"] == pytest.approx(37.2, abs=0.11)


@pytest.mark.parametrize(
    "points", [[(3, 0.0)], [(0, 2.0), (1, 2.0)], [(0, -1.0), (5, -2.0)]], ids=str
)
def test_line_chart_of_one_point_or_a_constant(points):
    root = svg(line_chart([Series("a", points)]))
    places = [float(e.get("cy")) for e in root if e.tag == "circle"]
    assert len(places) == len(points) and all(10 <= y <= 196 for y in places)


def test_stacked_bars_stand_on_each_other():
    root = svg(stacked_chart([Series("a", [(1, 1), (2, 2)]), Series("b", [(1, 3)])]))
    bars = [e for e in root if e.tag == "rect"]
    first = {b.get("class"): b for b in bars if b.get("x") == bars[0].get("x")}
    (low, low_height), (high, high_height) = (
        (float(first[f"area c{i}"].get("y")), float(first[f"area c{i}"].get("height")))
        for i in range(2)
    )
    assert high + high_height == pytest.approx(low, abs=0.11)
    assert high_height == pytest.approx(3 * low_height, abs=0.3)
    assert len(bars) == 3


def test_many_steps_are_averaged_into_at_most_sixty_bars():
    root = svg(stacked_chart([Series("a", [(i, 1.0) for i in range(1000)])]))
    bars = [e for e in root if e.tag == "rect"]
    assert 50 <= len(bars) <= 60
    assert len({b.get("height") for b in bars}) == 1


@pytest.mark.parametrize(
    ("ends", "ticks"),
    [
        ((0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ((0, 0.37), [0, 0.1, 0.2, 0.3, 0.4]),
        ((-1.5, 4), [-2, 0, 2, 4]),
    ],
)
def test_ticks_are_round_and_cover_the_range(ends, ticks):
    assert _ticks(*ends) == ticks
