"""`num_epochs` in place of `max_steps`: one number in the trainer, the schedule, the dry run."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from cli_cases import ARITHMETIC, TINY, cppo
from trainer_cases import noise, text_rows, trainer_for

from cppo import questions_needed
from cppo.cli import main, run_config
from cppo.options.trainer import CPPOConfig
from cppo.train.progress import read_metrics

# (epochs, rows, options, processes, steps)
PLANNED = [
    (1, 96, {}, 1, 12),  # 64 completions, 8 of a question
    (1, 97, {}, 1, 13),
    (2.5, 96, {}, 1, 30),
    (0.25, 96, {}, 1, 3),
    (1e-9, 96, {}, 1, 1),
    (1, 96, {"prune_rate": 0.5}, 1, 6),  # 16 questions fill a step
    (1, 96, {"prune_rate": 0.5, "dynamic_allocation": False}, 1, 12),
    (1, 96, {"batch_size": 20}, 2, 24),  # 3 questions, of which 2 processes ask 2 each
    (0.1, 30, {"batch_size": 24}, 1, 1),  # 0.1 * 30 is a little more than 3
]


@pytest.mark.parametrize(("epochs", "rows", "options", "processes", "steps"), PLANNED)
def test_steps_by_hand(epochs, rows, options, processes, steps):
    config = CPPOConfig(num_epochs=epochs, **options)
    assert config.steps(rows, processes) == steps


def test_a_step_has_the_questions_of_dynamic_allocation():
    for size, group, rate in itertools.product((1, 7, 64), (2, 5, 16), (0, 0.3, 0.75, 0.99)):
        config = CPPOConfig(batch_size=size, group_size=group, prune_rate=rate)
        assert config.questions_per_step() == questions_needed(size, group, rate)


def test_one_of_the_two_says_how_long_a_run_is():
    assert CPPOConfig().steps() == 100 and CPPOConfig(max_steps=7).steps(1000) == 7
    copy = dataclasses.replace(CPPOConfig(), num_epochs=2)
    assert copy.steps(80) == 20
    with pytest.raises(ValueError, match="CPPOConfig.num_epochs needs the number of training"):
        copy.steps()
    words = "CPPOConfig.max_steps must be left out .None. with num_epochs = 2, got 60"
    with pytest.raises(ValueError, match=words):
        CPPOConfig(num_epochs=2, max_steps=60)
    for wrong in (0, -1, float("inf"), float("nan"), "2", True):
        with pytest.raises(ValueError, match="CPPOConfig.num_epochs must be a number > 0"):
            CPPOConfig(num_epochs=wrong)


def test_the_trainer_its_schedule_and_its_rewards_agree(tmp_path, capsys):
    seen = []

    def reward(completions, trainer_state, **columns):
        seen.append(trainer_state.max_steps)
        return noise(completions, **columns)

    options = dict(rewards=reward, rows=text_rows(5), max_steps=None, lr_scheduler="linear")
    trainer = trainer_for(tmp_path, num_epochs=1.5, learning_rate=0.5, **options)
    assert "num_epochs = 1.5: 4 steps of 2 questions" in capsys.readouterr().out
    trainer.train()
    assert trainer.step == 4 and set(seen) == {4}
    assert trainer.scheduler.get_last_lr() == [0.0]  # at its end with the last step
    by_steps = trainer_for(tmp_path / "b", **{**options, "max_steps": 4}, learning_rate=0.5)
    assert by_steps.config == dataclasses.replace(trainer.config, output_dir=str(tmp_path / "b"))


def test_a_run_goes_on_for_more_epochs(tmp_path):
    options = dict(rewards=noise, rows=text_rows(4), max_steps=None)
    trainer_for(tmp_path, num_epochs=1, **options).train()
    longer = trainer_for(tmp_path, num_epochs=2, **options)
    longer.train(resume_from="auto")
    assert longer.step == 4
    trainer_for(tmp_path, **{**options, "max_steps": 5}).train(resume_from="auto")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_no_dataset_is_said_before_it_is_counted(tmp_path):
    with pytest.raises(TypeError, match="cppo.CPPOTrainer: train_dataset must have __len__"):
        trainer_for(tmp_path, rows=iter([]), max_steps=None, num_epochs=1)


def test_on_the_command_line(empty_folder, capsys):
    rows = [{"prompt": f"Tom has {i} pens.", "answer": str(i)} for i in range(6)]
    Path("my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = [word for word in TINY if "data." not in word and "max_steps" not in word]
    run += ["data={train: {path: my.jsonl}}", "trainer.num_epochs=0.5"]
    status, _, err = cppo(capsys, "train", ARITHMETIC, *run)
    assert status == 2 and "trainer.max_steps must be left out (None) with num_epochs = 0.5" in err
    run.append("trainer.max_steps=null")
    status, out, _ = cppo(capsys, "train", ARITHMETIC, *run, "--dry-run")
    assert status == 0 and "3 steps, 3 questions, 0.5 epochs" in out
    status, out, _ = cppo(
        capsys, "train", ARITHMETIC, *run, "--dry-run", "data.train.path=nowhere.jsonl"
    )
    assert status == 0 and "0.5 epochs of data that is not here" in out
    assert main(["train", ARITHMETIC, *run]) == 0
    assert [row["step"] for row in read_metrics("run")] == [1, 2, 3]
    written = run_config.load("run/config.yaml").trainer
    assert (written.num_epochs, written.max_steps) == (0.5, None)
    assert main(["train", "run/config.yaml", "--resume", "trainer.num_epochs=1"]) == 0
    assert read_metrics("run")[-1]["step"] == 6
