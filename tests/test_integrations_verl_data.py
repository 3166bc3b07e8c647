"""What a run of verl is given: parquet files, rewards and the recipes, read by verl itself."""

import os
import re
import stat
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="needs verl >= 0.9: tests/run_verl.sh")

from omegaconf import OmegaConf  # noqa: E402
from question_cases import DATA, needs  # noqa: E402
from verl_cases import ROOT, composed, load_example  # noqa: E402

import cppo  # noqa: E402
from cppo.cli import main  # noqa: E402
from cppo.integrations.verl import CompletionPruning  # noqa: E402
from cppo.integrations.verl_loss import loss_config  # noqa: E402
from cppo.integrations.verl_options import Pruning, check_run  # noqa: E402
from cppo.questions.to_verl import write_verl  # noqa: E402

example = load_example()

from verl.trainer.ppo.reward import get_custom_reward_fn  # noqa: E402
from verl.trainer.ppo.v1 import get_trainer_cls  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass, validate_config  # noqa: E402
from verl.utils.dataset.rl_dataset import RLHFDataset  # noqa: E402


@pytest.fixture(scope="module")
def processor():
    return example.build_tiny_vlm(size="test")[1]


def dataset(file, processor, tmp_path, **options):
    config = dict(cache_dir=str(tmp_path / "cache"), filter_overlong_prompts=False, **options)
    return RLHFDataset(str(file), processor.tokenizer, OmegaConf.create(config), processor)


@needs("gsm8k")
def test_verls_dataset_reads_a_text(processor, tmp_path, capsys):
    file = tmp_path / "gsm8k.parquet"
    command = ["data", "to-verl", "gsm8k", str(DATA / "gsm8k"), str(file), "--limit", "5"]
    assert main(command) == 0
    rows = dataset(file, processor, tmp_path)
    assert len(rows) == 5
    row = rows[4]
    assert [message["role"] for message in row["raw_prompt"]] == ["system", "user"]
    assert all(isinstance(message["content"], str) for message in row["raw_prompt"])
    assert row["data_source"] == "openai/gsm8k" and row["index"] == 4
    assert row["reward_model"]["style"] == "rule" and row["reward_model"]["ground_truth"] == "624"


def test_verls_dataset_reads_images(processor, tmp_path):
    questions = example.DigitSums(size=3, seed=0)
    file = tmp_path / "digits.parquet"
    assert write_verl(questions, file, data_source="digits", split="train") == 3
    rows = dataset(file, processor, tmp_path, max_prompt_length=100)
    for index, question in enumerate(questions[i] for i in range(3)):
        row = rows[index]
        seen = [
            part
            for message in row["raw_prompt"]
            if isinstance(message["content"], list)
            for part in message["content"]
            if part["type"] == "image"
        ]
        images = [part["image"] for part in seen]
        assert [image.convert("RGB").tobytes() for image in images] == [
            image.convert("RGB").tobytes() for image in question["images"]
        ]
        assert row["reward_model"]["ground_truth"] == question["answer"] and row["index"] == index


# The recipes


RECIPES = sorted((ROOT / "recipes" / "verl").glob("*.sh"))


def options_of(script: Path, folder: Path) -> list[str]:
    """What a recipe gives to verl: the arguments of the only python that it runs."""
    python = folder / "python3"
    python.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    run = subprocess.run(
        ["bash", str(script), "trainer.total_epochs=7"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    given = run.stdout.split("\0")[:-1]
    assert given[:2] == ["-m", "verl.trainer.main_ppo"]
    return given[2:]


EXPECTED = {
    # prune rate, questions of a step, completions of each, dual clip, rewards
    "gsm8k_qwen2.5_1.5b": (0.5, 16, 16, 10.0, ["gsm8k", "think_answer_format"]),
    "math_qwen2.5_7b": (0.5, 16, 16, 10.0, ["math_verify", "think_answer_format"]),
    "virl39k_qwen2.5_vl_3b": (0.0, 512, 5, 3.0, ["boxed", "think_boxed_format"]),
}


def test_there_is_a_recipe_for_each_setting():
    assert [script.stem for script in RECIPES] == sorted(EXPECTED)
    page = (ROOT / "recipes" / "README.md").read_text()
    assert all(f"verl/{script.name}" in page for script in RECIPES)


@pytest.mark.parametrize("script", RECIPES, ids=lambda script: script.stem)
def test_verl_takes_the_recipe(script, tmp_path):
    config = composed(*options_of(script, tmp_path), base=())
    validate_config(config, use_reference_policy=True, use_critic=False)
    prune_rate, questions, completions, dual_clip, rewards = EXPECTED[script.stem]
    assert config.trainer.total_epochs == 7  # further options of the command line
    assert config.actor_rollout_ref.rollout.n == completions
    assert config.data.train_batch_size == questions
    assert script.stem in config.trainer.experiment_name
    size = script.stem.split("_")[-1].upper()
    assert config.actor_rollout_ref.model.path.endswith(f"-{size}-Instruct")

    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)
    assert issubclass(trainer, CompletionPruning) == bool(prune_rate)
    if prune_rate:
        check_run(config)
        assert Pruning(**config.trainer.v1.cppo) == Pruning(prune_rate)
        mini_batch = config.actor_rollout_ref.actor.ppo_mini_batch_size
        # The release's 8 questions of 16 completions, by dynamic allocation.
        assert questions == mini_batch == cppo.questions_needed(8 * 16, 16, prune_rate)

    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert actor.policy_loss.loss_mode == "cppo"
    assert loss_config(actor).dual_clip == dual_clip
    if "vl" in script.stem:
        assert loss_config(actor) == cppo.LossConfig(clip_high=0.2, dual_clip=3.0, cpl_coef=0.01,
                                                     cpl_reduction="token")  # fmt: skip

    if "math_verify" not in rewards or find_spec("math_verify"):
        score = get_custom_reward_fn(config)(
            data_source="d", solution_str="<think>7</think>", ground_truth="7", extra_info={}
        )
        assert list(score) == ["score", "acc", *rewards]
    # What the recipe says to run first makes the files that it names.
    commands = re.findall(r"^#   cppo data to-verl \S+ \S+ (\S+)", script.read_text(), re.MULTILINE)
    assert commands == [config.data.train_files, config.data.val_files]
