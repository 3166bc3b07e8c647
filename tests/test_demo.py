"""The demo tasks, the warm-up, the shipped checkpoints and the tiny models."""

import re
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from cli_cases import cppo

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


def fields(row):
    return {**row, "images": [image.tobytes() for image in row["images"]]}


# Questions


def test_no_heldout_scan_is_a_training_scan():
    train, heldout = handwriting("train"), handwriting("heldout")
    assert (len(train[0]), len(heldout[0])) == (1297, 500)
    assert not {scan.tobytes() for scan in train[0]} & {scan.tobytes() for scan in heldout[0]}
    assert set(heldout[1].tolist()) == set(range(10))
    assert train[0].min() == 0 and train[0].max() == 1


def test_digit_rows_depend_on_split_seed_and_index_only():
    data = DigitSums("train", 20, seed=3)
    row = fields(data[7])
    assert row == fields(DigitSums("train", 9, seed=3)[7])
    for other in (DigitSums("train", 20, seed=4)[7], DigitSums("heldout", 20, seed=3)[7], data[8]):
        assert row["images"] != fields(other)["images"]


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


@pytest.mark.parametrize("sizes", [(5, 5), (14, 18)])
def test_print_is_as_small_as_asked(sizes):
    full, sides = [np.ones((8, 8), np.float32)] * 3, set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        image = np.asarray(compose_scene(full, rng, noise=0.0, print_size=sizes))[:, :, 0]
        for slot in np.split(image > image.min(), 3, axis=1):
            sides |= {slot.any(0).sum(), slot.any(1).sum()}
    assert sides == set(range(sizes[0], sizes[1] + 1))


def test_the_print_task_asks_for_the_sums_of_the_digits_task():
    small, again = (TASKS["print"].rows("train", 30, seed=5) for _ in range(2))
    for row, repeated, same in zip(small, again, DigitSums("train", 30, seed=5), strict=True):
        assert fields(row) == fields(repeated)
        assert fields(row)["images"] != fields(same)["images"]
        assert fields(row) | {"images": 0} == fields(same) | {"images": 0}


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
@pytest.mark.parametrize("style", ["worked", "direct"])
def test_both_styles_of_completion_are_right(data, style):
    rows = list(data)
    answers = [row["answer"] for row in rows]
    assert digit_sum_accuracy([row[style] for row in rows], answer=answers) == [1.0] * 50


def test_arithmetic_steps_follow_from_the_question_and_each_other():
    for row in ArithmeticProblems("heldout", 100, num_steps=(1, 2)):
        total = None
        for left, sign, right, result in re.findall(r"(\d+)([+*-])(\d+)=(\d+)", row["worked"]):
            a, b = int(left), int(right)
            assert total is None or a == total
            total = {"+": a + b, "-": a - b, "*": a * b}[sign]
            assert total == int(result)
            assert right in re.findall(r"\d+", row["prompt"][0]["content"])
        assert str(total) == row["answer"]


def test_no_heldout_combination_of_numbers_is_trained_on():
    def numbers(row):
        first, *rest = re.findall(r"(\d+)([+*-])(\d+)=", row["worked"])
        return first, *(step[1:] for step in rest)

    train = {numbers(row) for row in ArithmeticProblems("train", 1500)}
    heldout = {numbers(row) for row in ArithmeticProblems("heldout", 500)}
    assert len(heldout) > 250 and not train & heldout


def test_hints_are_right_as_often_as_asked_and_wrong_in_one_digit():
    data, plain = HintedSums("train", 300, seed=5), DigitSums("train", 300, seed=5)
    for row, same in zip(data, plain, strict=True):
        assert row["digits"] == same["digits"] and fields(row)["images"] == fields(same)["images"]
        differ = sum(a != b for a, b in zip(row["hint"], row["digits"], strict=True))
        assert differ == (0 if row["hint_is_right"] else 1)
        assert (sum(row["hint"]) == int(row["answer"])) == row["hint_is_right"]
        claim = ", ".join(map(str, row["hint"]))
        assert f"they are {claim}. What" in row["prompt"][0]["content"][1]["text"]
    assert 120 < sum(row["hint_is_right"] for row in data) < 180
    assert all(row["hint_is_right"] for row in HintedSums("train", 9, hint_right=1.0))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DigitSums("test"), ValueError, "split must be one of .*'test'"),
        (lambda: DigitSums(size=-1), ValueError, "size must be >= 0, got -1"),
        (lambda: DigitSums(num_digits=(3, 2)), ValueError, r"num_digits must be .*got \(3, 2\)"),
        (lambda: DigitSums(print_size=(20, 25)), ValueError, r"print_size .*got \(20, 25\)"),
        (lambda: DigitSums(noise=-0.1), ValueError, "noise must be >= 0, got -0.1"),
        (lambda: ArithmeticProblems(num_steps=(1, 3)), ValueError, "num_steps must be"),
        (lambda: HintedSums(hint_right=1.5), ValueError, r"hint_right must be in \[0, 1\], got 1"),
        (lambda: build_tiny_vlm("llava"), ValueError, "family must be one of .*'llava'"),
        (lambda: build_tiny_vlm(size="huge"), ValueError, "build_tiny_vlm: size must be .*'huge'"),
        (lambda: build_tiny_text_model(size="huge"), ValueError, "build_tiny_text_model: size mus"),
        (lambda: warm_up("chess"), ValueError, "task must be one of .*'chess'"),
        (lambda: DigitSums(size=4)[4], IndexError, r"DigitSums: index must be in \[0, 4\), got 4"),
        (lambda: DigitSums(size=4)[-1], IndexError, r"index must be in \[0, 4\), got -1"),
        (lambda: ArithmeticProblems(size=4)[4], IndexError, r"index must be in \[0, 4\), got 4"),
        (lambda: ArithmeticProblems(size=4)[-1], IndexError, r"index must be in \[0, 4\), got -1"),
    ],
)
def test_wrong_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Models and the warm-up


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_tiny_models_are_a_function_of_the_seed(family):
    before = torch.random.get_rng_state()
    first, again, other = (build_tiny_vlm(family, seed, size="test")[0] for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    same = again.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in first.state_dict().items())
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


@pytest.mark.parametrize(
    ("task", "build"), [("digits", build_tiny_vlm), ("arithmetic", build_tiny_text_model)]
)
def test_supervision_learns_and_repeats_exactly(task, build):
    phase = TASKS[task].phases[0]._replace(steps=6, direct_fraction=0.2)
    short = replace(TASKS[task], phases=(phase,), peak_lr=2e-2)

    def train():
        model, processor = build(seed=0, size="test")
        rows = list(short.rows("train", 64, seed=99, **phase.rows))
        batch = encode(processor, rows, [row["worked"] for row in rows])
        before = model(**batch).loss.item()
        supervise(model, processor, short, seed=0)
        return model, before - model(**batch).loss.item()

    (model, gain), (again, _) = train(), train()
    assert gain > 0.7
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_a_saved_checkpoint_is_half_the_size_and_nearly_the_same(tmp_path):
    model, processor = build_tiny_vlm(size="test")
    save_checkpoint(model, processor, tmp_path)
    loaded = load_model(tmp_path)
    parameters = sum(p.numel() for p in model.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < 2 * parameters + 20_000
    assert model.dtype == loaded.dtype == torch.float32
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=1e-3, atol=1e-6)


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


# The command


def test_a_demo_that_was_stopped_goes_on_and_can_be_evaluated(tmp_path, monkeypatch, capsys):
    folder, step = tmp_path / "run", CPPOTrainer.train_step
    demo = ["demo", "--held-out=8", "--task=arithmetic", f"--output={folder}", "--steps=2"]

    def stopped(trainer):
        if trainer.step == 1:
            signal.raise_signal(signal.SIGINT)
        return step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(CPPOTrainer, "train_step", stopped)
        status, _, err = cppo(capsys, *demo)
        assert status == 130 and "go on with --resume" in err
    status, _, err = cppo(capsys, *demo, "--resume", "--seed=1")
    assert status == 2 and "must be resumed with the options" in err
    status, out, _ = cppo(capsys, *demo, "--resume")
    assert status == 0 and "sampled accuracy" in out and f"report: {folder}/report.html" in out
    assert (folder / "report.html").is_file() and (folder / "summary.json").is_file()
    assert [row["step"] for row in read_metrics(folder)] == [0, 1, 2]
    assert cppo(capsys, "eval", str(folder), "--samples", "2")[0] == 0
    further = ["train", f"{folder}/config.yaml", "trainer.max_steps=3", "--resume"]
    status, out, _ = cppo(capsys, *further)
    assert status == 0 and "resumed from" in out


@pytest.mark.parametrize("task", ["digits", "shortcut", "print"])
def test_a_demo_without_scikit_learn_is_one_line(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    handwriting.cache_clear()
    status, _, err = cppo(capsys, "demo", f"--task={task}", f"--output={tmp_path}/run")
    assert status == 2 and err.strip() == (
        "cppo demo: error: cppo.demo: the handwritten digits come with scikit-learn: "
        "pip install 'cppo[demo]'"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--prune-rate=1", "CPPOConfig.prune_rate must be a number >= 0 and < 1, got 1.0"),
        ("--start=./nowhere", "nowhere"),
    ],
)
def test_mistakes_of_a_demo_are_one_line(option, words, capsys, empty_folder):
    # A demo that was run here is another mistake.
    status, _, err = cppo(capsys, "demo", option)
    assert status == 2 and err.startswith("cppo demo: error: ") and words in err


@pytest.mark.parametrize("steps", [1, 2])
def test_a_demo_of_few_steps_learns_in_the_last(steps):
    assert demo_config(steps=steps).warmup_steps == steps - 1
