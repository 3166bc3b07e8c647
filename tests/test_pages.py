"""The pages in a browser: on a phone and on a desk, in the light and in the dark."""

from pathlib import Path

import pytest
from pages_in_browser import measure, why_not
from PIL import Image

from cppo.inspection import Answer, Inspection, Token
from cppo.report import RunRecord
from cppo.report.comparison import comparison
from cppo.report.page import page

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
LONG = "\u0120a_very_long_token_without_any_blank" * 12
PICTURE = Image.new("RGB", (240, 96), (90, 120, 200))


def a_run(name, **changes):
    """A run with everything that a page can show, and names that are too long."""
    rows = [
        {"step": i, "reward/mean": i / 9, "reward/std": 0.3, f"reward/{LONG}": i / 9}
        | {"reward/form": 0.5, f"eval/sampled/{LONG}": i / 9, f"eval/greedy/{LONG}": i / 8}
        | {"kept_share": 0.25, "entropy": 1 / (i + 1), "perception_share": 0.2, "cpl_loss": 0.1}
        | {"grad_norm": 12345.6789, "mismatch/mean": 1e-7, "time/step": 900.0, "time/rollout": 500}
        | {"time/backward": 300, "completion/tokens": 123456.7, "completion/max_tokens": 200000}
        for i in range(9)
    ]
    start = {"step": 0, "started": "2026-11-29T06:12:01+00:00", "command": f"cppo train {LONG}"}
    start |= {"model": LONG, "parameters": 7e9, "device": "NVIDIA H200", "processes": 8}
    start |= {"versions": {"cppo": "0.1.0", "torch": "2.13.0+cu130", "transformers": "5.24.0"}}
    held = {"mode": "greedy", "question": 0, "text": LONG, "answer": LONG, "tokens": 400}
    texts = (
        LONG * 9,
        "\u0645\u0631\u062d\u0628\u0627 " * 40 + "\u4f60\u597d" * 200 + "\n\n  x = 1\n",
    )
    records = {
        "folder": Path("runs") / name,
        "history": rows,
        "starts": [start],
        "options": {"max_steps": 9, "data.train.path": "/" + LONG, "x": [LONG]},
        "held_out": [
            {**held, "step": step, "completion": text, "rewards": {LONG: 0.5}}
            for step, text in zip((0, 8), texts, strict=True)
        ],
        "completions": [
            {"step": 8, "question": LONG, "completion": text, "reward": reward, "advantage": 1.0}
            for reward, text in enumerate(texts)
        ],
        "evaluations": [
            dict.fromkeys(("model", "data", "split", "questions", "mode", "metric"), LONG[:90])
            | {"samples": "16", "mean": "0.1234", "std": "0.0100"}
        ],
    }
    return RunRecord(**{**records, **changes})


def report():
    views = [{name: PICTURE for name in ("anchor", "positive", "negative")} | {"question": LONG}]
    tokens = ["I see ", LONG, "\u4f60", "\n"]
    looked = {"question": LONG, "image": PICTURE, "tokens": tokens, "reward": 1.0}
    looked |= {"entropy_shift": [0.1, 2.0, -1.0, 0.0], "selected": [False, True, False, True]}
    return page(a_run("a"), views=views, completions=[looked | {"advantage": 0.5}])


def side_by_side():
    return comparison([a_run(f"{i}-{LONG}", options={"x": i, LONG: str(i)}) for i in range(10)])


def inspection():
    numbers = {"anchor": -0.1, "positive": -0.2, "negative": -3.0}
    texts = ["I see ", LONG, "\u4f60\u597d", "<b>", "\n"]
    tokens = [Token(text, 1, numbers, numbers, 0.5 - i, i == 1) for i, text in enumerate(texts)]
    views = {name: [PICTURE, PICTURE] for name in numbers}
    options = {"given": False, "temperature": 1.0, "fraction": 0.5}
    answers = [Answer("".join(texts), tokens, True)] * 2
    return Inspection(LONG, LONG, views, answers, options).html()


PAGES = {"report": report, "comparison": side_by_side, "inspect": inspection}


@pytest.mark.parametrize(("width", "dark"), [(400, False), (400, True), (1200, False)])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_and_can_be_read(tmp_path, name, width, dark):
    # What is folded must fit as well.
    source = PAGES[name]().replace("<details>", "<details open>")
    found = measure(source, tmp_path, width, dark=dark)
    assert found["width"] == width and found["dark"] == dark and found["elements"] > 50
    assert found["out"] == [] and found["scroll"] <= width
    assert found["faint"] == []
    assert found["smallest"] is None or found["smallest"] >= 9  # pixels of an axis' letters


def test_what_does_not_fit_or_cannot_be_read_is_found(tmp_path):
    wide = '<p style="width:900px">wide</p><p style="color:#bbb;background:#fff">faint</p>'
    boxed = f'<div style="overflow-x:auto" class="box">{wide}</div>'
    found = measure(f"<!doctype html><body>{wide}</body>", tmp_path, 400)
    assert found["scroll"] > 400 and found["out"] == ["p.: wide"]
    assert found["faint"] == ["p.: faint"]
    found = measure(f"<!doctype html><body>{boxed}</body>", tmp_path, 400)
    assert found["scroll"] == 400 and found["out"] == []
