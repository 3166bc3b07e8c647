"""The report page: complete, self-contained, well formed, tolerant of missing records."""

import base64
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image

from cppo.demo.report import write_report
from cppo.demo.svg import Series, _ticks, line_chart, stacked_chart


class Outline(HTMLParser):
    """Checks that tags are balanced, and collects text, images and classes."""

    def __init__(self, path):
        super().__init__()
        self.open, self.words, self.images, self.classes = [], "", [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.classes += (dict(attrs).get("class") or "").split()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def picture(shade):
    image = Image.new("RGB", (24, 24), (shade, shade, shade))
    image.putpixel((3, 5), (255, 0, 10))
    return image


def history():
    rows = [{"step": 0, "eval/sampled/digit_sum_accuracy": 0.3, "eval/greedy/reward": 0.1}]
    for step in range(1, 6):
        row = {"step": step, "reward/mean": 0.1 * step, "kept_share": 0.25, "time/rollout": 0.5}
        rows.append(row | {"time/forward": 0.2, "time/step": 0.7, "cpl_loss": float("nan")})
    rows[-1] |= {"eval/sampled/digit_sum_accuracy": 0.75, "entropy": None}
    return rows


COMPLETION = {
    "question": "Sum of <the> digits?",
    "image": picture(7),
    "tokens": ["I see ", "3", ", ", "5", "<|im_end|>"],
    "entropy_shift": [0.1, 2.0, -0.5, float("nan"), 0.0],
    "selected": [False, True, False, True, False],
    "reward": 1.0,
    "advantage": 0.5,
}


def page(folder, **changes):
    names = ("anchor", "positive", "negative")
    records = {
        "title": "Digits & <more>",
        "history": history(),
        "summary": {"held-out accuracy": {"before": 0.307, "after": 0.75}, "steps": 60},
        "views": [
            {n: picture(i) for i, n in enumerate(names)} | {"question": "Which?", "answer": "8"}
        ],
        "completions": [COMPLETION],
        "config": {"seed": 0, "output": "<runs>", "loss": {"tau": 0.125, "kl": {"coef": 0.5}}},
    }
    return Outline(write_report(folder / "out" / "report.html", **(records | changes)))


def test_the_page_holds_everything_and_loads_nothing(tmp_path):
    shown = page(tmp_path)
    assert not re.search(r"https?:|<script|<link|@import|url\(", shown.source)
    for expected in (
        *("Digits & <more>", "30.7 %", "75.0 %", "+44.3 points", "60", "<runs>", "loss.kl.coef"),
        *("Held-out accuracy", "Training reward", "Trained on", "Seconds per step"),
        *("I\xa0see\xa0", ",\xa0", "<|im_end|>", "Sum of <the> digits?", "advantage +0.50"),
    ):
        assert expected in shown.words, expected
    # What is not recorded, or never finite, has no chart.
    for absent in ("Completion length", "Contrastive perception", "Entropy"):
        assert absent not in shown.words


def test_perception_tokens_are_marked(tmp_path):
    pattern = r'<span class="(token[^"]*)" title="([^"]*)" style="([^"]*)">'
    kinds, titles, styles = zip(*re.findall(pattern, page(tmp_path).source), strict=True)
    assert kinds == ("token", "token selected", "token", "token selected", "token")
    assert titles[:3] == ("+0.10 nats", "+2.00 nats", "-0.50 nats")
    assert "var(--rise) 100%" in styles[1] and "var(--fall)" in styles[2]


def test_images_are_inside_unchanged_and_enlarged_by_a_whole_factor(tmp_path):
    shown = page(tmp_path)
    for source, shade in zip(shown.images, (0, 1, 2, 7), strict=True):
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(data)).tobytes() == picture(shade).tobytes()
    assert 'width="96" height="96"' in shown.source


@pytest.mark.parametrize(
    ("changes", "present", "absent"),
    [
        (
            {"history": [], "summary": {}, "views": [], "completions": [], "config": {}},
            "Digits & <more>",
            "Configuration",
        ),
        ({"summary": {"accuracy": {"before": 0.5, "after": 0.4}}}, "-10.0 points", "Configuration"),
        # A single accuracy is preferred to the summed reward, which is shown where there is none.
        (
            {"history": [{"step": 0, "eval/sampled/reward": 0.99, "eval/sampled/accuracy": 0.123}]},
            "0.123",
            "0.99",
        ),
        ({"history": [{"step": 0, "eval/sampled/reward": 0.99}]}, "0.99", "Training reward"),
    ],
)
def test_other_records(tmp_path, changes, present, absent):
    shown = page(tmp_path, **({"completions": [], "config": {}} | changes))
    assert present in shown.words and absent not in shown.words.partition("Three views")[0]
    assert ("down" in shown.classes) == (present == "-10.0 points")


@pytest.mark.parametrize("field", ["tokens", "entropy_shift", "selected"])
def test_lists_of_unequal_length_are_an_error(tmp_path, field):
    completion = COMPLETION | {field: COMPLETION[field][:-1]}
    with pytest.raises(ValueError, match="must be equally long, completion 0 has"):
        page(tmp_path, completions=[completion])


def svg(chart):
    return ElementTree.fromstring(chart[chart.index("<svg") :])


def test_line_chart_places_points_by_hand():
    root = svg(line_chart([Series("a", [(0, 0), (10, 1.0)])], top=1.0))
    (path,) = [e for e in root if e.get("class") == "line c0"]
    # 480 x 240 with margins 44, 14 (sides), 10 (top), 40 (bottom)
    assert path.get("d") == "M44.0 200.0L466.0 10.0"
    labels = {e.text: float(e.get("y")) for e in root if e.tag == "text"}
    assert labels["0.2"] - labels["0.4"] == pytest.approx(38, abs=0.11)


@pytest.mark.parametrize(
    "points", [[(3, 0.0)], [(0, 2.0), (1, 2.0)], [(0, -1.0), (5, -2.0)]], ids=str
)
def test_line_chart_of_one_point_or_a_constant(points):
    root = svg(line_chart([Series("a", points)]))
    places = [float(e.get("cy")) for e in root if e.tag == "circle"]
    assert len(places) == len(points) and all(10 <= y <= 200 for y in places)


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
