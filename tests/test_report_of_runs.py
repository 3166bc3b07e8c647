"""Reports of real runs: when the trainer writes one, what it needs, and `cppo report`."""

import re
import shutil
import signal
from pathlib import Path

import pytest
from cli_cases import cppo
from trainer_cases import digit_share, lines, noise, same, text_rows, trainer_for, weights_of

from cppo.demo.digits import DigitSums
from cppo.report import read_run, write_report
from cppo.report.comparison import comparison, differing_options, names_of
from cppo.report.page import page
from cppo.report.record import RunRecord
from cppo.train.output_dir import is_in_use
from cppo.train.scoring import RewardError
from cppo.train.trainer import CPPOTrainer

HELD_OUT = dict(eval_rows=text_rows(3), eval_every=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of three steps, made from Python."""
    folder = tmp_path_factory.mktemp("run") / "first"
    trainer_for(folder, rewards=noise, max_steps=3, **HELD_OUT).train()
    return folder


@pytest.fixture
def copied(run, tmp_path):
    """The same run, somewhere else, without its report."""
    folder = tmp_path / "moved"
    shutil.copytree(run, folder)
    (folder / "report.html").unlink()
    return folder


def test_a_run_from_python_says_everything_of_itself(run):
    found = read_run(run)
    assert found.status == "finished, step 3 of 3" and found.model == "Qwen3ForCausalLM"
    assert found.said("parameters") > 1000 and found.said("versions")["torch"]
    assert found.options["learning_rate"] == 1e-3 and found.reward_names == ["noise"]
    source = (run / "report.html").read_text()
    for expected in ("Held-out reward", "6 questions", "What is 0 + 0?", "after step 3", "CPU ("):
        assert expected in source, expected
    assert not list(run.glob("*.partial"))


def test_the_first_held_out_questions_are_kept_at_each_evaluation(run):
    rows = lines(run / "held_out.jsonl")
    assert [(r["step"], r["mode"], r["question"]) for r in rows] == [
        (step, mode, question)
        for step in range(4)
        for mode in ("sampled", "greedy")
        for question in range(2)  # log_completions
    ]
    assert rows[0]["text"] == "What is 0 + 0?" and rows[0]["answer"] == "0"
    assert rows[0]["rewards"].keys() == {"reward", "noise"} and rows[0]["tokens"] >= 1


def test_pictures_of_the_held_out_questions_are_on_the_page(tmp_path):
    options = dict(rewards=noise, max_steps=1, eval_rows=DigitSums("heldout", 1))
    trainer_for(tmp_path, "qwen2_5_vl", eval_greedy=False, **options).train()
    before, after = lines(tmp_path / "held_out.jsonl")
    assert len(before["images"]) == 1 and "images" not in after
    assert (tmp_path / "report.html").read_text().count(before["images"][0]) == 1


def test_a_report_every_few_steps_and_at_the_end(tmp_path, monkeypatch):
    written = []
    step = CPPOTrainer.train_step

    def watched(trainer):
        report = tmp_path / str(trainer.config.report_every) / "report.html"
        words = re.findall(r'class="status">(.*?)<', report.read_text()) if report.exists() else []
        written.append((trainer.config.report_every, trainer.step, words))
        return step(trainer)

    monkeypatch.setattr(CPPOTrainer, "train_step", watched)
    for every in (2, 0):
        trainer_for(tmp_path / str(every), max_steps=4, report_every=every).train()
        assert "finished, step 4 of 4" in (tmp_path / str(every) / "report.html").read_text()
    of_two = ["running, step 2 of 4"]
    assert [words for every, _, words in written if every == 2] == [[], [], of_two, of_two]
    assert not any(words for every, _, words in written if every == 0)


def test_a_report_changes_nothing_and_is_no_reason_to_end(tmp_path, monkeypatch, capsys):
    first = trainer_for(tmp_path / "a", rewards=noise, report_every=1, **HELD_OUT)
    first.train()

    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cppo.report.write_report", broken)
    second = trainer_for(tmp_path / "b", rewards=noise, report_every=1, **HELD_OUT)
    second.train()
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("report.html cannot be written (No space left on device)") == 2
    monkeypatch.setattr("cppo.report.write_report", lambda *_, **__: 1 / 0)
    third = trainer_for(tmp_path / "c", rewards=noise, report_every=0, **HELD_OUT)
    third.train()
    assert "report.html cannot be written (ZeroDivisionError" in capsys.readouterr().out
    for other in (second, third):
        assert same(weights_of(first.model), weights_of(other.model))
        without = [{k: v for k, v in row.items() if "time/" not in k} for row in other.history]
        assert without == [
            {k: v for k, v in row.items() if "time/" not in k} for row in first.history
        ]


def test_a_page_is_written_whole_or_not_at_all(copied, monkeypatch):
    (copied / "report.html").write_text("the old one")
    stock = Path.write_text

    def full(path, text, **options):
        stock(path, text[:100], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        write_report(copied)
    assert (copied / "report.html").read_text() == "the old one"
    assert not list(copied.glob("*.partial"))


@pytest.mark.parametrize("end", ["signal", "error"])
def test_a_run_that_ends_early_has_a_report(tmp_path, end):
    calls = []

    def reward(completions, **columns):
        calls.append(1)
        if len(calls) == 3:
            if end == "error":
                raise ValueError("no judge")
            signal.raise_signal(signal.SIGINT)
        return noise(completions)

    with pytest.raises(KeyboardInterrupt if end == "signal" else RewardError):
        trainer_for(tmp_path, rewards=reward, max_steps=5).train()
    assert "stopped at step 2 of 5" in (tmp_path / "report.html").read_text()


def test_a_run_without_a_row_has_no_report(tmp_path):
    def fails(completions, **columns):
        raise ValueError("no judge")

    with pytest.raises(RewardError):
        trainer_for(tmp_path, rewards=fails).train()
    assert not (tmp_path / "report.html").exists()


def test_a_run_goes_on_with_another_report_every_and_its_files_are_cut_back(tmp_path):
    options = dict(rewards=noise, save_every=1, **HELD_OUT)
    trainer_for(tmp_path, max_steps=2, **options).train()
    again = trainer_for(tmp_path, max_steps=3, report_every=1, log_completions=1, **options)
    again.train(tmp_path / "checkpoint-000001", overwrite=True)
    steps = [row["step"] for row in lines(tmp_path / "held_out.jsonl")]
    assert steps == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 2
    assert [row["step"] for row in lines(tmp_path / "run.jsonl")] == [0, 1]
    assert "resumed 1 time" in (tmp_path / "report.html").read_text()
    # A new run keeps nothing of the old one.
    trainer_for(tmp_path, max_steps=1, rewards=noise).train(overwrite=True)
    assert not lines(tmp_path / "held_out.jsonl") and len(lines(tmp_path / "run.jsonl")) == 1


def test_a_folder_in_use_is_a_run_that_goes_on(copied):
    seen = []

    def reward(completions, **columns):
        seen.append((is_in_use(copied / "x"), is_in_use(copied)))
        return digit_share(completions)

    trainer_for(copied / "x", rewards=reward, max_steps=1).train()
    assert set(seen) == {(True, False)} and not is_in_use(copied / "x")
    # What a killed run leaves in the lock says nothing.
    (copied / ".lock").write_text("process 1 on here since then\n")
    assert not is_in_use(copied) and not is_in_use(copied / "nowhere")


# The command


def test_the_report_of_a_run_that_was_moved(copied, capsys):
    status, out, _ = cppo(capsys, "report", str(copied))
    assert status == 0 and out.strip() == str(copied / "report.html")
    assert "finished, step 3 of 3" in (copied / "report.html").read_text()
    for name in ("run.jsonl", "held_out.jsonl", "completions.jsonl"):
        (copied / name).unlink()
    assert cppo(capsys, "report", str(copied))[0] == 0
    assert read_run(copied).options["max_steps"] == 3  # of a checkpoint
    for checkpoint in copied.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert cppo(capsys, "report", str(copied))[0] == 0
    assert "stopped at step 3<" in (copied / "report.html").read_text()


def test_mistakes_are_one_line(copied, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    run = str(copied)
    for arguments, words in (
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "empty: not a run of cppo (it has no metrics.jsonl)"),
        ([run, run + "/"], "is given twice"),
        ([run, "empty"], "empty: not a run"),
        ([run, "--output", "mine.html"], "mine.html is not a page of cppo report"),
        ([run, "--output", "."], "Is a directory"),
        ([run, "--output", "mine.html/x.html"], "mine.html: File exists"),
        (["n" * 300], "File name too long"),
    ):
        status, _, err = cppo(capsys, "report", *arguments)
        assert status == 2 and words in err and len(err.strip().splitlines()) == 1, err
        assert err.startswith("cppo report: error: ")
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"


# Several runs


def test_runs_side_by_side(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other" / "first"
    trainer_for(other, rewards=noise, max_steps=2, learning_rate=0.5, **HELD_OUT).train()
    for _ in range(2):  # it may replace its own page
        status, out, _ = cppo(capsys, "report", str(run), str(other))
        assert status == 0 and out.strip() == "comparison.html"
    source = Path("comparison.html").read_text()
    names = "other/first", f"{run.parent.name}/first"
    for expected in (*names, "by time", "learning_rate", "0.001", "0.5"):
        assert expected in source, expected
    options = source.partition("Options that differ")[2].partition("</table>")[0]
    assert "learning_rate" in options
    assert "batch_size" not in options and "output_dir" not in options
    assert not re.search(r"<script|<link|(src|href)=.http", source)


def plain(folder, **changes):
    rows = [{"step": i, "reward/mean": i / 9, "kept_share": 0.5} for i in range(1, 4)]
    return RunRecord(**{"folder": Path(folder), "history": rows, **changes})


def test_runs_are_told_apart_by_the_ends_of_their_paths():
    folders = ["/a/x/run", "/b/x/run", "/b/y/other"]
    assert names_of([plain(f) for f in folders]) == ["a/x/run", "b/x/run", "b/y/other"]
    assert names_of([plain("/a/one"), plain("/a/two")]) == ["one", "two"]


def test_options_that_differ_are_listed_alone():
    runs = [
        plain("/a", options=own) for own in ({"x": 1, "y": [1.0]}, {"x": 1, "y": [2], "z": None})
    ]
    assert differing_options(runs) == [("y", ["[1]", "[2]"]), ("z", ["\u2013", "none"])]
    same_options = comparison([plain("/a", options={"x": 1}), plain("/b", options={"x": 1})])
    assert "the runs have the same options" in same_options


def test_a_run_without_a_metric_keeps_its_colour():
    with_entropy = [{"step": 1, "entropy": 0.5, "eval/greedy/accuracy": 0.25, "time/step": 3.0}]
    source = comparison([plain("/a"), plain("/b", history=with_entropy)])
    entropy = source[source.index("<h3>Entropy</h3>") :].partition("</figure>")[0]
    assert 'class="line c1"' in entropy and "c0" not in entropy
    assert "25 %" in source and "by time" in source


def test_many_runs_and_no_numbers():
    runs = [plain(f"/runs/{i}", history=[{"step": 1}]) for i in range(11)]
    assert "11 runs side by side" in comparison(runs)
    source = comparison([plain(f"/runs/{i}") for i in range(11)])
    assert 'class="line c2 again"' in source


def test_a_name_is_no_markup():
    runs = [plain(f"/<q>{i}", options={"<i>": i}) for i in range(2)]
    for source in (comparison(runs), page(runs[0])):
        assert "<q>" not in source and "<i>" not in source and "&lt;q&gt;0" in source
