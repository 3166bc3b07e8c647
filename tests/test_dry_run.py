"""`cppo train --dry-run`: every recipe, and the arithmetic of its estimates."""

import io
import sys
from pathlib import Path

import pytest
from cli_cases import ARITHMETIC, DIGITS, RECIPES, cppo

from cppo.cli import dry_run, run_config
from cppo.cli.command import main
from cppo.demo.run import demo_config
from cppo.options.trainer import CPPOConfig, LoraConfig, LossConfig

# As published on the models' hub pages.
PARAMETERS = {
    "gsm8k_qwen2.5_1.5b": "1,543,714,304",
    "math_qwen2.5_7b": "7,615,616,512",
    "virl39k_qwen2.5_vl_3b": "3,754,622,976",
    "virl39k_qwen2.5_vl_7b": "8,292,166,656",
    "geometry3k_qwen2.5_vl_3b": "3,754,622,976",
    "geometry3k_qwen2.5_vl_7b": "8,292,166,656",
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_dry_runs(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # no data here, and nothing may be written
    status, out, _ = cppo(capsys, "train", str(recipe), "--dry-run")
    assert status == 0 and not list(tmp_path.iterdir())
    resolved, rest = out.split("\n# data\n")
    Path("resolved.yaml").write_text(resolved)
    assert run_config.load("resolved.yaml") == run_config.load(recipe)
    if recipe.stem in PARAMETERS:
        assert f"{PARAMETERS[recipe.stem]}, " in rest
        assert "train: not here, a real run would stop: data.train: " in rest
        assert "sizes from model.architecture" in rest
    else:
        assert "first question:" in rest and "is not on this machine" not in rest
    assert "peak" in rest


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "data.train.prompt_key=questoin",
            "prompt_key must be a column of the rows, got 'questoin'",
        ),
        ("data.train.skip=5", "data.train.skip must be below the 2 rows, got 5"),
        ("data.train.path=semicolons.csv", "the columns must be divided by commas"),
        ("data.eval={loader: rows, path: my.jsonl}", "data.eval: the rows have no column 'prompt'"),
    ],
)
def test_data_that_is_here_and_wrong_ends_a_dry_run(override, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text('{"question": "1 + 1", "answer": 2}\n' * 2)
    Path("semicolons.csv").write_text("question;answer\n1 + 1;2\n")
    own = "data.train={loader: rows, path: my.jsonl, prompt_key: question}"
    run = ["train", ARITHMETIC, own, "data.eval=null", "trainer.eval_every=0", "--dry-run"]
    assert cppo(capsys, *run)[0] == 0
    status, out, err = cppo(capsys, *run, override)
    assert status == 2 and words in err and not out


def test_a_question_that_the_terminal_cannot_show_is_escaped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text('{"prompt": "Wie groß?", "answer": 2}\n', encoding="utf-8")
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    own = ["data.train={loader: rows, path: my.jsonl}", "data.eval=null", "trainer.eval_every=0"]
    assert main(["train", ARITHMETIC, *own, "--dry-run"]) == 0
    shown.flush()
    assert rb"Wie gro\xdf?" in shown.buffer.getvalue()


def test_recipes_are_listed_and_that_of_the_demo_is_the_same_run():
    listed = RECIPES[0].with_name("README.md").read_text()
    assert all(recipe.stem.removesuffix("_7b") in listed for recipe in RECIPES)
    recipe = run_config.load(RECIPES[0].with_name("digits.yaml"))
    assert recipe.trainer == demo_config("digits", output_dir="runs/digits")


def test_step_sizes_by_hand():
    config = CPPOConfig(
        batch_size=64, group_size=16, prune_rate=0.75, max_completion_tokens=100,
        max_tokens_per_microbatch=480, optimizer_steps=2, num_iterations=3,
    )  # fmt: skip
    step = dry_run.step_sizes(config, prompt_tokens=20)
    assert (step.questions, step.sampled, step.kept) == (16, 256, 64)
    assert (step.sampled_tokens, step.trained_tokens) == (25_600, 64 * 120)
    # 480 // 120 = 4 completions per part, 32 per optimizer step: 8 parts x 2 steps x 3 passes
    assert (step.microbatches, step.microbatch_tokens, step.microbatch_rows) == (48, 480, 400)
    fixed = CPPOConfig(batch_size=64, group_size=16, prune_rate=0.75, dynamic_allocation=False)
    step = dry_run.step_sizes(fixed, prompt_tokens=1)
    assert (step.questions, step.sampled, step.kept) == (4, 64, 16)
    # 4 questions for 2 completions of each; of all 12 a batch keeps 6.
    whole = CPPOConfig(batch_size=8, group_size=3, prune_rate=0.5, prune_scope="batch")
    step = dry_run.step_sizes(whole, prompt_tokens=1)
    assert (step.questions, step.sampled, step.kept) == (4, 12, 6)


def test_the_engine_and_its_memory(empty_folder, monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "engine_words", lambda config: f"words of {config.engine}")
    unfit = "trainer.vllm.max_model_len=16"  # what a run would stop at: nothing is started
    seen = {}
    for engine in ("builtin", "vllm", "vllm_server"):
        given = [f"trainer.engine={engine}", "trainer.vllm.dtype=float16", unfit]
        status, out, _ = cppo(capsys, "train", DIGITS, *given, "--dry-run")
        assert status == 0 and f"sampled by             words of {engine}\n" in out
        seen[engine] = out
    assert "corrected by           none\n" in seen["builtin"]
    assert "corrected by           token_truncate\n" in seen["vllm"]
    # 1,328,160 parameters of two bytes, beside those of the trainer.
    assert "weights of vLLM        2.5 MiB\n" in seen["vllm"]
    assert "trainer.vllm.memory_share = 0.3 of a GPU" in seen["vllm"]
    for engine in ("builtin", "vllm_server"):
        assert "of vLLM " not in seen[engine]
    for engine in ("vllm", "vllm_server"):
        assert "KV cache of a rollout  0.0 B\n" in seen[engine] != seen["builtin"]


def test_memory_by_hand():
    sizes = dry_run.ModelSizes("toy", 1000, 300, 50, 10, 20, 3, 4, 7)
    step = dry_run.StepSizes(1, 8, 4, 80, 48, 1, 12, 10)
    fp32 = CPPOConfig(max_completion_tokens=10, loss=LossConfig(kl_coef=0.1, cpl_coef=0.1))
    assert dry_run.memory(fp32, sizes, step, prompt_tokens=2) == {
        "weights": 4000,
        "gradients": 4000,
        "AdamW state": 8000,
        "reference copy": 4000,
        "activations (rough)": 4 * 12 * 3 * (80 + 80) * 3,
        "KV cache of a rollout": 2 * 4 * 3 * 4 * 8 * 12,
        "logits, a tile": 3 * 4 * 10 * 7 * 3,
        "gradient of the LM head": 4 * 7 * 10,
    }
    lora = CPPOConfig(
        max_completion_tokens=10,
        precision="bf16",
        gradient_checkpointing=True,
        lora=LoraConfig(),
        loss=LossConfig(kl_coef=0.1, cpl_coef=0.0),
    )
    assert dry_run.memory(lora, sizes, step, prompt_tokens=2) == {
        "weights": 6000,
        "gradients": 200,
        "AdamW state": 400,
        "reference copy": 0,
        "activations (rough)": 2 * 12 * (30 + 160),
        "KV cache of a rollout": 2 * 2 * 3 * 4 * 8 * 12,
        "logits, a tile": 3 * 4 * 10 * 7,
        "gradient of the LM head": 0,
    }
    frozen = CPPOConfig(max_completion_tokens=10, freeze_vision_tower=True)
    assert dry_run.memory(frozen, sizes, step, 2)["gradients"] == 4 * 700
    many = step._replace(microbatch_rows=10**8)
    assert dry_run.memory(fp32, sizes, many, 2)["logits, a tile"] == 2**30  # of the fused head
