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

VOID = {"meta", "img", "br"}


class Outline(HTMLParser):
    """Checks that tags are balanced, and collects text and images."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.images, self.classes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.classes += (attributes.get("class") or "").split()
        if tag == "img":
            self.images.append(attributes["src"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.classes += (dict(attrs).get("class") or "").split()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _outline(path):
    outline = Outline()
    outline.feed(path.read_text(encoding="utf-8"))
    assert outline.open == []
    return outline


def _picture(shade):
    image = Image.new("RGB", (24, 24), (shade, shade, shade))
    image.putpixel((3, 5), (255, 0, 10))
    return image


def _history():
    rows = [{"step": 0, "eval/sampled/digit_sum_accuracy": 0.3, "eval/greedy/reward": 0.1}]
    for step in range(1, 6):
        row = {"step": step, "reward/mean": 0.1 * step, "kept_share": 0.25, "time/rollout": 0.5}
        rows.append(row | {"time/forward": 0.2, "time/step": 0.7, "cpl_loss": float("nan")})
    rows[-1] |= {"eval/sampled/digit_sum_accuracy": 0.75, "entropy": None}
    return rows


def _completion(**changes):
    fields = {
        "question": "Sum of <the> digits?",
        "image": _picture(7),
        "tokens": ["I see ", "3", ", ", "5", "<|im_end|>"],
        "entropy_shift": [0.1, 2.0, -0.5, float("nan"), 0.0],
        "selected": [False, True, False, True, False],
        "reward": 1.0,
        "advantage": 0.5,
    }
    return fields | changes


def _write(path, **changes):
    fields = {
        "title": "Digits & <more>",
        "history": _history(),
        "summary": {"held-out accuracy": {"before": 0.307, "after": 0.75}, "steps": 60},
        "views": [
            {name: _picture(i) for i, name in enumerate(("anchor", "positive", "negative"))}
            | {"question": "Which?", "answer": "8"}
        ],
        "completions": [_completion()],
        "config": {"seed": 0, "output": "<runs>", "loss": {"tau": 0.125, "kl": {"coef": 0.5}}},
    }
    return write_report(path / "out" / "report.html", **(fields | changes))


def test_page_holds_everything_and_loads_nothing(tmp_path):
    page = _write(tmp_path)
    outline, text = _outline(page), page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|@import|url\(", text)
    words = "".join(outline.text)
    for expected in (
        "Digits & <more>",
        "30.7 %",
        "75.0 %",
        "+44.3 points",
        "60",
        "<runs>",
        "loss.kl.coef",
    ):
        assert expected in words
    for heading in ("Held-out accuracy", "Training reward", "Trained on", "Seconds per step"):
        assert heading in words
    for token in ("I\xa0see\xa0", ",\xa0", "<|im_end|>"):
        assert token in words
    # Not recorded, or never finite: no chart.
    assert "Completion length" not in words and "Contrastive perception" not in words
    assert "Entropy" not in words


def test_perception_tokens_are_marked(tmp_path):
    text = _write(tmp_path).read_text(encoding="utf-8")
    tokens = re.findall(r'<span class="(token[^"]*)" title="([^"]*)" style="([^"]*)">', text)
    assert [kind for kind, _, _ in tokens] == [
        "token",
        "token selected",
        "token",
        "token selected",
        "token",
    ]
    assert [title for _, title, _ in tokens][:3] == ["+0.10 nats", "+2.00 nats", "-0.50 nats"]
    assert "var(--rise) 100%" in tokens[1][2] and "var(--fall)" in tokens[2][2]


def test_images_are_inside_unchanged_and_enlarged_by_a_whole_factor(tmp_path):
    page = _write(tmp_path)
    sources = _outline(page).images
    assert len(sources) == 4
    for source, shade in zip(sources, (0, 1, 2, 7), strict=True):
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(data)).tobytes() == _picture(shade).tobytes()
    assert 'width="96" height="96"' in page.read_text(encoding="utf-8")


def test_empty_records_give_a_page(tmp_path):
    page = _write(tmp_path, history=[], summary={}, views=[], completions=[], config={})
    words = "".join(_outline(page).text)
    assert "Digits & <more>" in words and "Configuration" not in words


def test_a_fall_is_shown_as_a_fall(tmp_path):
    page = _write(tmp_path, summary={"accuracy": {"before": 0.5, "after": 0.4}})
    outline = _outline(page)
    assert "-10.0 points" in "".join(outline.text) and "down" in outline.classes


def test_accuracy_is_preferred_over_the_summed_reward(tmp_path):
    history = [{"step": 0, "eval/sampled/reward": 0.99, "eval/sampled/sum_accuracy": 0.123}]
    assert "0.123" in "".join(_outline(_write(tmp_path, history=history)).text)
    history = [{"step": 0, "eval/sampled/reward": 0.99}]
    assert "0.99" in "".join(_outline(_write(tmp_path, history=history)).text)


@pytest.mark.parametrize("field", ["tokens", "entropy_shift", "selected"])
def test_lists_of_unequal_length_are_an_error(tmp_path, field):
    completion = _completion(**{field: _completion()[field][:-1]})
    with pytest.raises(ValueError, match="must be equally long, completion 0 has"):
        _write(tmp_path, completions=[completion])


def _svg(chart):
    return ElementTree.fromstring(chart[chart.index("<svg") :])


def test_line_chart_places_points_by_hand():
    root = _svg(line_chart([Series("a", [(0, 0), (10, 1.0)])], top=1.0))
    (path,) = [e for e in root if e.get("class") == "line c0"]
    # 480 x 240 with margins 44, 14 (sides), 10 (top), 40 (bottom)
    assert path.get("d") == "M44.0 200.0L466.0 10.0"
    labels = {e.text: float(e.get("y")) for e in root if e.tag == "text"}
    assert labels["0.2"] - labels["0.4"] == pytest.approx(38, abs=0.11)


def test_line_chart_of_one_point_or_a_constant():
    for points in ([(3, 0.0)], [(0, 2.0), (1, 2.0)], [(0, -1.0), (5, -2.0)]):
        root = _svg(line_chart([Series("a", points)]))
        places = [float(e.get("cy")) for e in root if e.tag == "circle"]
        assert len(places) == len(points) and all(10 <= y <= 200 for y in places)


def test_stacked_bars_stand_on_each_other():
    root = _svg(stacked_chart([Series("a", [(1, 1), (2, 2)]), Series("b", [(1, 3)])]))
    bars = [e for e in root if e.tag == "rect"]
    first = {b.get("class"): b for b in bars if b.get("x") == bars[0].get("x")}
    lower, upper = first["area c0"], first["area c1"]
    assert float(upper.get("y")) + float(upper.get("height")) == pytest.approx(
        float(lower.get("y")), abs=0.11
    )
    assert float(upper.get("height")) == pytest.approx(3 * float(lower.get("height")), abs=0.3)
    assert len(bars) == 3


def test_many_steps_are_averaged_into_at_most_sixty_bars():
    root = _svg(stacked_chart([Series("a", [(i, 1.0) for i in range(1000)])]))
    bars = [e for e in root if e.tag == "rect"]
    assert 50 <= len(bars) <= 60
    assert len({b.get("height") for b in bars}) == 1


def test_ticks_are_round_and_cover_the_range():
    assert _ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert _ticks(0, 0.37) == [0, 0.1, 0.2, 0.3, 0.4]
    assert _ticks(-1.5, 4) == [-2, 0, 2, 4]
