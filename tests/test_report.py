"""The page about a run: complete, self-contained, well formed, tolerant of missing records."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from cppo.options.trainer import CPPOConfig
from cppo.questions import thumbnails
from cppo.report import ReportError, RunRecord, read_run, write_report
from cppo.report.curves import MOST_POINTS, figures, phases_of
from cppo.report.page import page
from cppo.report.words import duration, number, percent
from cppo.train.run_options import run_options


class Outline(HTMLParser):
    """Checks that tags are balanced, and collects text, images and classes."""

    def __init__(self, source):
        super().__init__()
        self.open, self.words, self.images, self.classes = [], "", [], []
        self.source = source
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
        self.words += data if "style" not in self.open else ""


def picture(shade):
    image = Image.new("RGB", (24, 24), (shade, shade, shade))
    image.putpixel((3, 5), (255, 0, 10))
    return image


def history():
    rows = [{"step": 0, "eval/sampled/digit_sum_accuracy": 0.307, "eval/greedy/reward": 0.1}]
    for step in range(1, 6):
        row = {"step": step, "reward/mean": 0.1 * step, "kept_share": 0.25, "time/rollout": 0.5}
        row |= {"reward/digit_sum_accuracy": 0.1 * step}
        rows.append(row | {"time/forward": 0.2, "time/step": 0.7, "cpl_loss": float("nan")})
    rows[-1] |= {"eval/sampled/digit_sum_accuracy": 0.75, "entropy": None}
    return rows


START = {
    "step": 0,
    "started": "2026-11-29T06:12:01+00:00",
    "command": "cppo train 'a <b>.yaml'",
    "model": "org/Tiny",
    "parameters": 1_300_000,
    "device": "CPU (x86_64), 2 threads",
    "processes": 1,
    "versions": {"cppo": "0.1", "torch": "2.13"},
}
COMPLETION = {
    "question": "Sum of <the> digits?",
    "image": picture(7),
    "tokens": ["I see ", "3", ", ", "5", "<|im_end|>"],
    "entropy_shift": [0.1, 2.0, -0.5, float("nan"), 0.0],
    "selected": [False, True, False, True, False],
    "reward": 1.0,
    "advantage": 0.5,
}


def held_out(step, completion, reward, question=0, **changes):
    row = {"step": step, "mode": "greedy", "question": question, "text": "Which <one>?"}
    row |= {"answer": "8", "completion": completion, "tokens": 3, "rewards": {"boxed": reward}}
    return row | changes


def trained(step, completion, reward, **changes):
    row = {"step": step, "question": [{"role": "user", "content": "How many?"}], "answer": "8"}
    return row | {"completion": completion, "reward": reward, "advantage": 0.5, **changes}


def record(**changes):
    options = run_options(CPPOConfig(max_steps=60, seed=7, output_dir="<runs>"), 1)
    records = {"folder": Path("runs/Digits & <more>"), "history": history(), "starts": [START]}
    return RunRecord(**{**records, "options": options, **changes})


def shown(run=None, **extras):
    return Outline(page(run or record(), **extras))


def test_the_page_holds_everything_and_loads_nothing():
    names = ("anchor", "positive", "negative")
    views = [{n: picture(i) for i, n in enumerate(names)} | {"question": "Which?", "answer": "8"}]
    found = shown(views=views, completions=[COMPLETION])
    assert not re.search(r"(src|href)=.http|<script|<link|@import|url\(", found.source)
    for expected in (
        *("Digits & <more>", "30.7 %", "75 %", "+44.3 points", "<runs>", "loss.tau"),
        *("Held-out digit sum accuracy", "Training reward", "Trained on", "Seconds per step"),
        *("I\xa0see\xa0", ",\xa0", "<|im_end|>", "Sum of <the> digits?", "advantage +0.50"),
        *("org/Tiny, 1.3 million parameters", "29 Nov 2026, 06:12", "cppo train 'a <b>.yaml'"),
        *("cppo 0.1, torch 2.13", "2 threads", "stopped at step 5 of 60"),
        "3.5 s, 5 steps of 0.7 s",
    ):
        assert expected in found.words, expected
    # What is not recorded, or never finite, has no chart.
    for absent in ("Completion length", "Contrastive perception", "Entropy", "before and after"):
        assert absent not in found.words


def test_no_raw_number_is_shown():
    rows = [
        {"step": i, "entropy": 0.7833333333 / 3, "reward/mean": 1 / 3, "time/step": 1 / 7}
        for i in range(9)
    ]
    assert not re.search(r">[^<]*\d\.\d{5}", shown(record(history=rows)).source)


def test_perception_tokens_are_marked():
    pattern = r'<span class="(token[^"]*)" title="([^"]*)" style="([^"]*)">'
    kinds, titles, styles = zip(
        *re.findall(pattern, shown(completions=[COMPLETION]).source), strict=True
    )
    assert kinds == ("token", "token selected", "token", "token selected", "token")
    assert titles[:3] == ("+0.10 nats", "+2.00 nats", "-0.50 nats")
    assert "var(--rise) 100%" in styles[1] and "var(--fall)" in styles[2]


def test_images_are_inside_unchanged_and_enlarged_by_a_whole_factor():
    names = ("anchor", "positive", "negative")
    views = [{name: picture(i) for i, name in enumerate(names)}]
    found = shown(views=views, completions=[COMPLETION])
    for source, shade in zip(found.images, (0, 1, 2, 7), strict=True):
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(data)).tobytes() == picture(shade).tobytes()
    assert 'width="96" height="96"' in found.source


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.3, "30 %"), (0.78333333, "78.3 %"), (1, "100 %"), (0, "0 %"), (0.0012, "0.12 %")],
)
def test_a_share_in_percent(value, said):
    assert percent(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        *(
            (0.0421, "0.042 s"),
            (9.96, "10 s"),
            (59.4, "59 s"),
            (59.9, "1 min"),
            (192, "3 min 12 s"),
        ),
        *((7500, "2 h 5 min"), (86399, "23 h 59 min"), (360000, "4 d 4 h"), (0, "0 s")),
    ],
)
def test_a_length_of_time(value, said):
    assert duration(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.378354, "0.378"), (1234.5, "1,234"), (2**20, "1.05e+06"), (-0.5, "-0.5"), (0, "0")],
)
def test_a_number(value, said):
    assert number(value) == said


@pytest.mark.parametrize("field", ["tokens", "entropy_shift", "selected"])
def test_lists_of_unequal_length_are_an_error(field):
    completion = COMPLETION | {field: COMPLETION[field][:-1]}
    with pytest.raises(ValueError, match="must be equally long, completion 0 has"):
        shown(completions=[completion])


# Rewards, in the words that fit them


def evaluated(name, *values, **changes):
    rows = [{"step": 10 * i, f"eval/greedy/{name}": v} for i, v in enumerate(values)]
    return record(history=rows, **changes)


@pytest.mark.parametrize(
    ("run", "present", "absent"),
    [
        (evaluated("exact_accuracy", 0.5, 0.4), ["50 %", "-10.0 points", "right answers"], "got 1"),
        # Called an accuracy, but none.
        (evaluated("accuracy", 0.5, 3.0), ["0.5", "+2.5"], "points"),
        (evaluated("length", 0.5, 0.75), ["0.5", "0.75", "+0.25"], "%"),
        (
            evaluated("boxed", 0.5, 0.75, held_out=[held_out(0, "a", 1.0), held_out(10, "b", 0)]),
            ["share of completions that got 1", "50 %", "+25.0 points"],
            "accuracy",
        ),
        (evaluated("boxed", 0.5, 0.75, held_out=[held_out(0, "a", 0.5)]), ["+0.25"], "points"),
        (evaluated("boxed", 0.25), ["0.25", "measured once"], "points"),
        (
            record(history=[{"step": i, "reward/mean": i} for i in range(1, 31)]),
            ["first and last 3 steps", "2", "29", "+27"],
            "Held-out",
        ),
        (evaluated("odd/name", -2.0, 3.0), ["\u201codd/name\u201d", "+5"], "%"),
    ],
)
def test_a_reward_is_called_what_it_is(run, present, absent):
    said = shown(run).words.partition("Options")[0]
    for expected in present:
        assert expected in said, expected
    assert absent not in said.partition("nats")[0]


def test_one_reward_is_preferred_to_its_sum_and_several_are_all_shown():
    rows = [{"step": 0, "eval/sampled/reward": 0.99, "eval/sampled/accuracy": 0.123}]
    assert "12.3 %" in shown(record(history=rows)).words
    assert "0.99" not in shown(record(history=rows, options={})).words
    rows[0] |= {"eval/sampled/form": 0.5, "eval/sampled/tokens": 17, "eval/sampled/form_std": 0.1}
    found = record(history=rows)
    assert found.evaluated == ["accuracy", "form", "reward"]


# Completions


def test_a_question_has_its_first_and_its_newest_completion():
    rows = [held_out(step, f"text {step}", float(step == 20)) for step in (0, 10, 20)]
    rows += [held_out(0, "by chance", 1.0, mode="sampled")]
    found = shown(evaluated("boxed", 0.0, 1.0, held_out=rows))
    for expected in ("before training", "text 0", "after step 20", "text 20", "greedy, 3 tokens"):
        assert expected in found.words, expected
    assert "text 10" not in found.words and "by chance" not in found.words
    assert [c for c in found.classes if c in ("right", "wrong")] == ["wrong", "right"]


def test_only_images_that_are_in_the_row_are_shown():
    given = [*thumbnails([picture(1)]), "https://example.org/a.png", "data:text/html,x", 7]
    found = shown(record(held_out=[held_out(0, "a", 1.0, images=given)]))
    assert found.images == given[:1]
    assert not shown(record(held_out=[held_out(0, "a", 1.0, images="data:")])).images


def test_right_and_wrong_completions_of_training_are_shown():
    rows = [trained(1, "an old one", 0.0), trained(4, "wrong", 0.0), trained(5, "right", 1.0)]
    found = shown(record(completions=[*rows, trained(5, "right too", 1.0, kept=False)]))
    assert "wrong" in found.words and "an old one" not in found.words
    assert found.words.index("right") < found.words.index("wrong")
    assert "A completion of training" in shown(record(completions=rows[2:])).words


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "</div></main>",
        "\u202eabc",
        "\u0645\u0631\u062d\u0628\u0627",
        "\u4f60\u597d" * 30,
    ]
    + [
        "\U0001f600\u200d\U0001f525",
        "a" * 5000,
        "\n" * 100,
        "\x00\x1b[31mred",
        "\ud800",
        "\u0120the\u010a",
    ],
    ids=lambda text: ascii(text[:8]),
)
def test_any_text_is_shown_as_it_is(tmp_path, text):
    folder = folder_of(tmp_path, history())
    write_rows(folder / "held_out.jsonl", [held_out(0, text, 0.0, text=text, answer=text)])
    found = Outline(write_report(folder).read_text("utf-8"))
    assert "<script" not in found.source and 'dir="auto"' in found.source
    head = text[:100].replace("\x00", "\u2400").replace("\x1b", "\u241b").replace("\ud800", "?")
    assert head.strip() in found.words


def test_a_very_long_completion_is_folded_and_cut():
    text = "".join(f"{i} " for i in range(10_000))
    found = shown(record(held_out=[held_out(0, text, 1.0)]))
    assert "all 48,890 characters" in found.words and "28,890 more" in found.words
    assert len(found.source) < 80_000


# What a folder holds


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def folder_of(parent, rows, name="run"):
    folder = parent / name
    folder.mkdir(parents=True)
    write_rows(folder / "metrics.jsonl", rows)
    return folder


def test_ten_thousand_steps_are_a_small_page():
    rows = [
        {"step": i, "time/step": 1.0, "time/rollout": 0.5, "loss": 0.1}
        | {
            "entropy": 0.5 + i % 7 / 10,
            "reward/mean": i / 1e4,
            "reward/std": 0.1,
            "kept_share": 0.5,
        }
        | {"eval/sampled/accuracy": i / 1e4, "grad_norm": 1.0, "completion/tokens": 5}
        for i in range(10_000)
    ]
    run = record(history=rows)
    source = page(run)
    assert len(source.encode()) < 200_000
    (entropy,) = (one.chart for one in figures(run) if one.heading == "Entropy")
    assert entropy.count("L") < MOST_POINTS and "mean of 34 steps" in source


@pytest.mark.parametrize(
    "row",
    [
        {"entropy": None},
        {"entropy": "high"},
        {"entropy": [1]},
        {"entropy": 1e308, "reward/mean": -1e308},
        {"entropy": 10**400},
        {"entropy": 5e-324},
        {"time/step": float("inf"), "time/rollout": float("nan")},
        {"time/step": -1},
        {"eval/sampled/x": None},
        {"eval/sampled": 1, "eval/": 2, "reward/": 3},
        {"kept_share": True, "tokens/sampled": 0, "tokens/trained": 0},
        {},
    ],
    ids=str,
)
def test_odd_metrics_never_break_the_page(tmp_path, row):
    folder = folder_of(tmp_path, [{"step": 1, **row}, {"step": 2, "entropy": 0.5}])
    Outline(write_report(folder).read_text("utf-8"))
    Outline(write_report(folder_of(tmp_path, [{"step": 1, **row}], "alone")).read_text("utf-8"))


def test_what_cannot_be_read_is_left_out(tmp_path):
    folder = folder_of(tmp_path, [{"step": 2, "loss": 1.0}, {"step": 1}, {"step": -3}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss"\n[1]\n{"step": "4"}\n' + "[" * 100_000 + "\n")
    bad = {"step": 1, "mode": "greedy", "rewards": [], "completion": "x"}
    write_rows(folder / "held_out.jsonl", [bad, bad | {"rewards": {"boxed": "much"}}, {"step": 1}])
    odd = [{"step": 1, "completion": 3}, trained(1, "odd", "a"), trained(2, "fine", 1, question=7)]
    write_rows(folder / "completions.jsonl", odd)
    (folder / "run.jsonl").write_text(
        '{"step": 0, "options": 3, "versions": [], "command": null}\n'
    )
    (folder / "config.yaml").write_text("a: [")
    (folder / "eval.csv").write_bytes(b"x,y\n1\n\xff\x00\n")
    run = read_run(folder)
    assert [row["step"] for row in run.history] == [1, 2]
    assert "fine" in Outline(page(run)).words


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "none", "none: no such folder"),
        (lambda p: p, "not a run of cppo (it has no metrics.jsonl)"),
        (lambda p: folder_of(p, []), "this run has no rows in metrics.jsonl yet"),
        (lambda p: folder_of(p, [{"step": 1}]) / "metrics.jsonl", "must be the folder of a run"),
    ],
)
def test_what_is_no_run_is_said(tmp_path, make, words):
    with pytest.raises(ReportError, match=re.escape(words)):
        read_run(make(tmp_path))


def test_a_checkpoint_leads_to_its_run(tmp_path):
    (folder_of(tmp_path, [{"step": 1}]) / "checkpoint-000001").mkdir()
    with pytest.raises(ReportError, match="is a checkpoint: give its run, .*run$"):
        read_run(tmp_path / "run" / "checkpoint-000001")


def test_phases_have_what_no_phase_counts():
    rows = [{"step": i, "time/step": 2.0, "time/rollout": 1.0, "time/zeal": 0.5} for i in (1, 2)]
    assert phases_of(record(history=rows)) == {"rollout": 1.0, "zeal": 0.5, "other": 0.5}
