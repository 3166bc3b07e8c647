"""The demo tasks, the warm-up, the shipped checkpoints and the tiny models."""

import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cppo import cli
from cppo.demo.arithmetic import ArithmeticProblems, arithmetic_accuracy
from cppo.demo.digits import (
    DigitSums,
    compose_scene,
    digit_sum_accuracy,
    direct_answer,
    handwriting,
    worked_answer,
)
from cppo.demo.run import demo_config
from cppo.demo.shortcut import HintedSums
from cppo.demo.tasks import TASKS
from cppo.demo.tiny import build_tiny_text_model, build_tiny_vlm
from cppo.demo.warmup import (
    CHECKPOINTS,
    encode,
    generated_accuracy,
    save_checkpoint,
    supervise,
    warm_up,
)
from cppo.model.load import load_model, load_processor
from cppo.train.progress import read_metrics
from cppo.train.trainer import CPPOTrainer


def _same(row, other):
    images = zip(row["images"], other["images"], strict=True)
    rest = {k: v for k, v in row.items() if k != "images"}
    return all(a.tobytes() == b.tobytes() for a, b in images) and all(
        other[k] == v for k, v in rest.items()
    )


def test_no_heldout_scan_is_a_training_scan():
    train, heldout = handwriting("train"), handwriting("heldout")
    assert (len(train[0]), len(heldout[0])) == (1297, 500)
    assert not {scan.tobytes() for scan in train[0]} & {scan.tobytes() for scan in heldout[0]}
    assert set(heldout[1].tolist()) == set(range(10))
    assert train[0].min() == 0 and train[0].max() == 1


def test_digit_rows_depend_on_split_seed_and_index_only():
    data = DigitSums("train", 20, seed=3)
    assert _same(data[7], DigitSums("train", 9, seed=3)[7])
    for other in (DigitSums("train", 20, seed=4)[7], DigitSums("heldout", 20, seed=3)[7], data[8]):
        assert not _same(data[7], other | {k: v for k, v in data[7].items() if k != "images"})


def test_digit_rows_are_complete_questions():
    rows = list(DigitSums("heldout", 40))
    assert len(rows) == 40  # iteration ends by IndexError
    for row in rows:
        (message,) = row["prompt"]
        assert [part["type"] for part in message["content"]] == ["image", "text"]
        assert row["images"][0].size == (24 * len(row["digits"]), 24)
        assert row["images"][0].mode == "RGB"
        assert row["answer"] == str(sum(row["digits"]))
    assert {len(row["digits"]) for row in rows} == {2, 3}
    assert {d for row in rows for d in row["digits"]} == set(range(10))


def test_each_digit_stays_in_its_slot():
    blank, full = np.zeros((8, 8), np.float32), np.ones((8, 8), np.float32)
    image = compose_scene([blank, full, blank], np.random.default_rng(0), noise=0.0)
    ink = np.asarray(image)[:, :, 0] > np.asarray(image)[0, 0, 0]
    columns = np.flatnonzero(ink.any(0))
    assert 24 <= columns.min() and columns.max() < 48
    assert 16**2 <= ink.sum() <= 22**2


def test_completions_by_hand():
    assert worked_answer([3, 5, 9]) == "I see 3, 5, 9. 3+5=8, 8+9=17. \\boxed{17}"
    assert worked_answer([4]) == "I see 4. \\boxed{4}"
    assert direct_answer([9, 0]) == "\\boxed{9}"


@pytest.mark.parametrize("reward", [digit_sum_accuracy, arithmetic_accuracy])
def test_reward_is_one_for_the_right_number_in_the_last_box(reward):
    completions = ["\\boxed{17}", "17", "\\boxed{16}, so \\boxed{17}", "\\boxed{17} no, \\boxed{1}"]
    completions += ["\\boxed{17", "", [{"role": "assistant", "content": "\\boxed{17}"}]]
    answers = ["17"] * len(completions)
    assert reward(completions, answer=answers, prompts=None, digits=None) == [1, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("data", [DigitSums("train", 50), ArithmeticProblems("train", 50)])
def test_both_styles_of_completion_are_right(data):
    rows = [data[i] for i in range(50)]
    for style in ("worked", "direct"):
        completions = [row[style] for row in rows]
        assert digit_sum_accuracy(completions, answer=[row["answer"] for row in rows]) == [1.0] * 50


def _numbers(row):
    first, *rest = re.findall(r"(\d+)([+*-])(\d+)=", row["worked"])
    return first, *(step[1:] for step in rest)


def test_arithmetic_steps_follow_from_the_question_and_each_other():
    for row in ArithmeticProblems("heldout", 100, num_steps=(1, 2)):
        total = None
        for left, sign, right, result in re.findall(r"(\d+)([+*-])(\d+)=(\d+)", row["worked"]):
            assert total is None or int(left) == total
            total = {"+": int(left) + int(right), "-": int(left) - int(right)}.get(
                sign, int(left) * int(right)
            )
            assert total == int(result)
            assert right in re.findall(r"\d+", row["prompt"][0]["content"])
        assert str(total) == row["answer"]


def test_no_heldout_combination_of_numbers_is_trained_on():
    train = {_numbers(row) for row in ArithmeticProblems("train", 1500)}
    heldout = {_numbers(row) for row in ArithmeticProblems("heldout", 500)}
    assert len(heldout) > 250 and not train & heldout


def test_hints_are_right_as_often_as_asked_and_wrong_in_one_digit():
    data = HintedSums("train", 300, seed=5, hint_right=0.5)
    wrong = 0
    for i in range(300):
        row, plain = data[i], DigitSums("train", 300, seed=5)[i]
        assert row["digits"] == plain["digits"]
        assert row["images"][0].tobytes() == plain["images"][0].tobytes()
        differ = sum(a != b for a, b in zip(row["hint"], row["digits"], strict=True))
        assert differ == (0 if row["hint_is_right"] else 1)
        assert (sum(row["hint"]) == int(row["answer"])) == row["hint_is_right"]
        claim = ", ".join(map(str, row["hint"]))
        assert f"they are {claim}. What" in row["prompt"][0]["content"][1]["text"]
        wrong += not row["hint_is_right"]
    assert 120 < wrong < 180
    assert all(HintedSums("train", 9, hint_right=1.0)[i]["hint_is_right"] for i in range(9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DigitSums("test"), "split must be one of .*'test'"),
        (lambda: DigitSums(size=-1), "size must be >= 0, got -1"),
        (lambda: DigitSums(num_digits=(3, 2)), r"num_digits must be .*got \(3, 2\)"),
        (lambda: DigitSums(noise=-0.1), "noise must be >= 0, got -0.1"),
        (lambda: ArithmeticProblems(num_steps=(1, 3)), r"num_steps must be .*got \(1, 3\)"),
        (lambda: HintedSums(hint_right=1.5), r"hint_right must be in \[0, 1\], got 1.5"),
        (lambda: build_tiny_vlm("llava"), "family must be one of .*'llava'"),
        (lambda: build_tiny_vlm(size="huge"), "build_tiny_vlm: size must be .*'huge'"),
        (lambda: build_tiny_text_model(size="huge"), "build_tiny_text_model: size must be"),
        (lambda: warm_up("chess"), "task must be one of .*'chess'"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("data", [DigitSums("train", 4), ArithmeticProblems("train", 4)])
@pytest.mark.parametrize("index", [4, -1])
def test_rows_out_of_range(data, index):
    with pytest.raises(IndexError, match=rf"index must be in \[0, 4\), got {index}"):
        data[index]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_tiny_models_are_a_function_of_the_seed(family):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, again, other = (build_tiny_vlm(family, seed, size="test")[0] for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [m.state_dict() for m in (first, again, other)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_labels_are_the_completion_and_its_end():
    _, processor = build_tiny_vlm(size="test")
    rows = [DigitSums("train", 8, num_digits=(n, n))[0] for n in (1, 3)]
    batch = encode(processor, rows, [row["worked"] for row in rows])
    for row, labels, ids in zip(rows, batch["labels"], batch["input_ids"], strict=True):
        kept = labels[labels != -100]
        assert processor.tokenizer.decode(kept) == row["worked"] + "<|im_end|>"
        assert torch.equal(ids[-len(kept) :], kept)
    assert batch["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 6]]


@pytest.mark.parametrize("task", ["digits", "arithmetic"])
def test_supervision_learns_and_repeats_exactly(task):
    def train():
        build = build_tiny_vlm if task == "digits" else build_tiny_text_model
        model, processor = build(seed=0, size="test")
        made = TASKS[task]
        phase = made.phases[0]._replace(steps=6, direct_fraction=0.2)
        rows = made.rows("train", 64, seed=99, **phase.rows)
        chosen = [rows[i] for i in range(64)]
        batch = encode(processor, chosen, [row["worked"] for row in chosen])
        before = model(**batch).loss.item()
        supervise(model, processor, replace(made, phases=(phase,), peak_lr=2e-2), seed=0)
        return before, model(**batch).loss.item(), model

    before, after, model = train()
    _, _, again = train()
    assert after < before - 0.7
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_a_saved_checkpoint_is_half_the_size_and_nearly_the_same(tmp_path):
    model, processor = build_tiny_vlm(size="test")
    save_checkpoint(model, processor, tmp_path)
    loaded = load_model(tmp_path)
    parameters = sum(p.numel() for p in model.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < 2 * parameters + 20_000
    assert model.dtype == loaded.dtype == torch.float32
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("task", "megabytes"), [("digits", 4), ("arithmetic", 2)])
def test_shipped_checkpoints_leave_room_for_rl(task, megabytes):
    """Right about three times in ten: 0.30 and 0.31 on 500 held-out questions when shipped."""
    folder = CHECKPOINTS / task
    assert sum(f.stat().st_size for f in folder.iterdir()) < megabytes * 1e6
    model, processor = load_model(folder), load_processor(folder)
    rows = TASKS[task].rows("heldout", 120, seed=1)
    accuracy, completions = generated_accuracy(model, processor, rows, batch_size=120)
    worked = sum("=" in text for text in completions) / len(completions)
    assert 0.15 < accuracy < 0.5
    assert 0.25 < worked < 0.7


def test_a_demo_run_can_be_evaluated_and_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "run")
    options = ["--steps=2", "--held-out=8", "--task=arithmetic", f"--output={folder}"]
    assert cli.main(["demo", *options]) == 0
    assert "sampled accuracy" in capsys.readouterr().out
    assert cli.main(["eval", folder, "--samples", "2"]) == 0
    resumed = ["train", f"{folder}/config.yaml", "trainer.max_steps=3", "--resume"]
    assert cli.main(resumed) == 0
    assert "resumed from" in capsys.readouterr().out


def test_a_demo_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = ["demo", "--held-out=8", "--task=arithmetic", f"--output={tmp_path}/run", "--steps=2"]
    step = CPPOTrainer.train_step

    def stopped(trainer: CPPOTrainer) -> Any:
        if trainer.step == 1:
            signal.raise_signal(signal.SIGINT)
        return step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(CPPOTrainer, "train_step", stopped)
        assert cli.main(demo) == 130
    assert "go on with --resume" in capsys.readouterr().err
    assert cli.main([*demo, "--resume", "--seed=1"]) == 2
    assert "must be resumed with the options" in capsys.readouterr().err
    assert cli.main([*demo, "--resume"]) == 0
    assert (tmp_path / "run" / "report.html").is_file()
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.parametrize("task", ["digits", "shortcut"])
def test_a_demo_without_scikit_learn_is_one_line(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    handwriting.cache_clear()
    assert cli.main(["demo", f"--task={task}", f"--output={tmp_path}/run"]) == 2
    assert capsys.readouterr().err.strip() == (
        "cppo demo: error: cppo.demo: the handwritten digits come with scikit-learn: "
        "pip install 'cppo[demo]'"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_demo_of_few_steps_learns_in_the_last(steps: int) -> None:
    assert demo_config(steps=steps).warmup_steps == steps - 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prune-rate=1"], "CPPOConfig.prune_rate must be a number >= 0 and < 1, got 1.0"),
        (["--start=./nowhere"], "nowhere"),
    ],
)
def test_mistakes_of_a_demo_are_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cppo demo: error: ") and words in error
