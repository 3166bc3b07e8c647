"""What a run writes while it goes: rows of anything, on a disk that may be full."""

import datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trainer_cases import lines, text_rows, trainer_for

from cppo.train import progress
from cppo.train.progress import RunLog, read_metrics


def test_rows_of_anything_are_written(tmp_path):
    log = RunLog(tmp_path, 1, is_main=True)
    odd = {
        "decimal": Decimal("1.50"),
        "date": datetime.date(2026, 1, 2),
        "array": np.arange(2),
        "number": np.float32(0.5),
        "tensor": torch.ones(2),
        "set": {1},
        "pairs": {(1, 2): b"x"},
        "picture": Image.new("L", (1, 1)),
        "object": object,
    }
    log.completions([{"step": 1, **odd}])
    (row,) = lines(tmp_path / "completions.jsonl")
    assert row["decimal"] == "1.50" and row["date"] == "2026-01-02" and row["array"] == [0, 1]
    assert row["number"] == 0.5 and row["tensor"] == [1.0, 1.0] and row["set"] == [1]
    assert row["pairs"] == {"(1, 2)": "b'x'"} and "Image" in row["picture"]


def test_a_run_on_odd_answers(tmp_path):
    rows = [{**row, "answer": Decimal(i)} for i, row in enumerate(text_rows())]

    def logs(completions, log_extra, **columns):
        log_extra("object", [object] * len(completions))
        return [float(i) for i in range(len(completions))]

    trainer_for(tmp_path, rows=rows, rewards=logs, max_steps=1).train()
    (first, *_) = lines(tmp_path / "completions.jsonl")
    assert first["answer"].isdecimal() and "object" in first


def test_what_a_full_disk_refuses_is_written_later(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path, 5, is_main=True)
    log.metrics({"step": 1}, show=False)
    stock = progress.append_bytes

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(progress, "append_bytes", full)
    log.metrics({"step": 2}, show=False)
    log.metrics({"step": 3}, show=False)
    words = "metrics.jsonl cannot be written (No space left on device): its rows are kept"
    assert " ".join(capsys.readouterr().out.split()).count(words) == 2
    monkeypatch.setattr(progress, "append_bytes", stock)
    log.metrics({"step": 4}, show=False)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_run_that_was_stopped_before_its_first_row_keeps_its_start(tmp_path, goes_on):
    log = RunLog(tmp_path, 5, is_main=True)
    log.restart([], 0, {"step": 0, "started": "first"}, goes_on=False)
    log.completions([{"step": 1}])  # of the step that was broken off
    log.restart([], 0, {"step": 0, "started": "then"}, goes_on=goes_on)
    starts = [row["started"] for row in lines(tmp_path / "run.jsonl")]
    assert starts == (["first", "then"] if goes_on else ["then"])
    assert lines(tmp_path / "completions.jsonl") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_row_is_written_whole_or_not_at_all():
    with pytest.raises(OSError, match="No space left"):
        progress.append_bytes(Path("/dev/full"), b"row\n")


def test_texts_are_shown_as_they_are(tmp_path, capsys):
    log = RunLog(tmp_path, 1, is_main=True)
    log.say("a [/b] [red]c")
    log.metrics({"step": 0, "eval/sampled/acc[/x]": 0.5, "eval/sampled/reward": 0.5}, show=True)
    shown = capsys.readouterr().out
    assert "a [/b] [red]c" in shown
    assert "held-out after 0 steps  sampled/acc[/x] 0.500" in shown
