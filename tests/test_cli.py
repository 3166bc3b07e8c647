"""The command line: what it prints, its exit statuses, and every recipe's dry run."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cppo.cli import dry_run, main, run_config
from cppo.cli.run_parts import load_questions
from cppo.config import CPPOConfig, LoraConfig, LossConfig
from cppo.demo.run import demo_config
from cppo.train.progress import read_metrics

RECIPES = sorted(Path(__file__).parents[1].joinpath("recipes").glob("*.yaml"))
DIGITS, GSM8K = (str(path) for path in RECIPES if path.stem in ("digits", "gsm8k_qwen2.5_1.5b"))
ARITHMETIC = str(next(path for path in RECIPES if path.stem == "arithmetic"))
# As published on the models' hub pages.
PARAMETERS = {
    "gsm8k_qwen2.5_1.5b": "1,543,714,304",
    "math_qwen2.5_7b": "7,615,616,512",
    "virl39k_qwen2.5_vl_3b": "3,754,622,976",
    "virl39k_qwen2.5_vl_7b": "8,292,166,656",
    "geometry3k_qwen2.5_vl_3b": "3,754,622,976",
    "geometry3k_qwen2.5_vl_7b": "8,292,166,656",
}
TINY = [
    "data.train.limit=8",
    "data.eval.limit=2",
    "trainer.max_steps=2",
    "trainer.batch_size=2",
    "trainer.group_size=4",
    "trainer.prune_rate=0.5",
    "trainer.max_completion_tokens=4",
    "trainer.warmup_steps=1",
    "trainer.eval_every=0",
    "trainer.log_every=1",
]


def test_help_names_the_commands_without_loading_transformers() -> None:
    code = "import sys; from cppo.cli import main; main(['--help'])"
    check = f"try:\n {code}\nexcept SystemExit: pass\nassert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("train", "eval", "info", "demo"):
        assert command in done.stdout


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


def test_info_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_dry_runs(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # no data here, and nothing may be written
    assert main(["train", str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    resolved, rest = out.split("\n# data\n")
    copy = tmp_path / "resolved.yaml"
    copy.write_text(resolved)
    assert run_config.load(copy) == run_config.load(recipe)
    if recipe.stem in PARAMETERS:
        assert f"{PARAMETERS[recipe.stem]}, " in rest
        assert "train: not here, a real run would stop: data.train: " in rest
        assert "sizes from model.architecture" in rest
    else:
        assert "first question:" in rest and "is not on this machine" not in rest
    assert "peak" in rest
    assert [path.name for path in tmp_path.iterdir()] == ["resolved.yaml"]


def test_the_demo_and_its_recipe_are_the_same_run() -> None:
    recipe = run_config.load(RECIPES[0].with_name("digits.yaml"))
    assert recipe.trainer == demo_config("digits", output_dir="runs/digits")


def test_recipes_are_listed() -> None:
    text = RECIPES[0].with_name("README.md").read_text()
    for recipe in RECIPES:
        assert recipe.stem.removesuffix("_7b") in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "missing.yaml"], "missing.yaml: no such file"),
        (["train", DIGITS, "trainer.seeed=1"], "did you mean trainer.seed"),
        (["train", GSM8K], "data.train: .*data/gsm8k"),
        (["train", DIGITS, "model={path: no/such/model}"], "no/such/model"),
        (["train", DIGITS, "data.train.split=tst"], "data.train: .*'train'.*, got 'tst'"),
        (["train", DIGITS, "--resume", "nowhere"], "nowhere is not a checkpoint of cppo"),
        (
            ["train", DIGITS, "trainer.attention=flash_attention_2"],
            "trainer.attention must be 'auto' or one that runs here .*, got 'flash_attention_2'",
        ),
        (
            ["train", DIGITS, "trainer.lora.target_modules=[nope]"],
            r"trainer.lora.target_modules must be .*, got \('nope',\): there is no 'nope'",
        ),
        (
            ["train", ARITHMETIC, "trainer.freeze_vision_tower=true"],
            "trainer.freeze_vision_tower must be False for a model without a vision tower",
        ),
        (
            ["train", DIGITS, "trainer.max_prompt_tokens=1", "data.train.limit=3"],
            "no question of train_dataset can be asked, .* 3 by max_prompt_tokens = 1 ",
        ),
        (
            ["train", DIGITS, "rewards=[{boxed: null, weight: 0}]"],
            "trainer.reward_weights must be not all 0: nothing would be learned",
        ),
        (["eval", "nowhere"], "nowhere: no such file or folder"),
        (["eval", "."], "neither a run of `cppo train` nor a checkpoint"),
        (["eval", DIGITS, "--samples", "0"], "--samples must be >= 1, got 0"),
        (["eval", DIGITS, "data.eval=null", "trainer.eval_every=0"], "data.eval is missing"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith(f"cppo {arguments[0]}: error: ")]
    assert len(errors) == 1
    assert re.search(words, errors[0])


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPPO_DEBUG", "1")
    with pytest.raises(run_config.ConfigError):
        main(["train", "missing.yaml"])


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "a.yaml", "--dry-rum"])
    assert caught.value.code == 2 and "--dry-rum" in capsys.readouterr().err


def test_train_resume_and_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [*TINY, "trainer.output_dir=run"]
    assert main(["train", DIGITS, *overrides]) == 0
    assert run_config.load("run/config.yaml").trainer.max_steps == 2
    capsys.readouterr()

    assert main(["train", DIGITS, *overrides]) == 2
    assert "already holds checkpoint-000002" in capsys.readouterr().err
    # an override right behind --resume is no folder
    assert main(["train", DIGITS, *overrides, "--resume", "trainer.max_steps=3"]) == 0
    capsys.readouterr()

    checkpoint = sorted(Path("run").glob("checkpoint-*"))[-1]
    assert checkpoint.name == "checkpoint-000003"
    assert main(["eval", "run", "--checkpoint", "last", "--samples", "2"]) == 0
    assert main(["eval", str(checkpoint), "trainer.eval_greedy=false"]) == 0
    assert main(["eval", DIGITS, *overrides, "--data", "train"]) == 0
    assert "on 8 questions" in capsys.readouterr().out
    with open("run/eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows if row["mode"] == "greedy"].count("tiny_digits") == 3
    avg = [row for row in rows if row["samples"] == "2" and row["metric"] == "boxed"]
    assert len(avg) == 1 and avg[0]["std"] and avg[0]["model"] == str(checkpoint)


def test_eval_of_adapters_puts_them_on_the_configured_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    run = ["trainer.output_dir=run", "trainer.lora.r=2", "trainer.max_steps=1"]
    assert main(["train", DIGITS, *TINY, *run, "trainer.warmup_steps=0"]) == 0
    assert main(["eval", "run"]) == 0
    assert "checkpoint-000001 on 2 questions" in capsys.readouterr().out


def test_a_failing_reward_is_an_error_with_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = "def broken(completions, **columns):\n    return [float('nan') for _ in completions]\n"
    (tmp_path / "their_rewards.py").write_text(text)
    overrides = [*TINY, "rewards=['their_rewards:broken']"]
    for command in ("train", "eval"):
        assert main([command, DIGITS, *overrides]) == 2
        error = capsys.readouterr().err
        assert f"cppo {command}: error: reward function 'broken' failed" in error
        assert ("last checkpoint: none" in error) == (command == "train")


def test_rows_of_ones_own_are_limited_and_take_the_system_prompt(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows: list[dict[str, object]] = [
        {"prompt": f"What is {i} + 1?", "answer": i + 1} for i in range(5)
    ]
    rows[0]["prompt"] = [
        {"role": "system", "content": "old"},
        {"role": "user", "content": "What is 0 + 1?"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    data = run_config.DatasetConfig("rows", str(path), limit=2)
    loaded = load_questions(data, "new", "data.train")
    assert len(loaded) == 2
    for i in range(2):
        assert loaded[i]["answer"] == i + 1
        assert loaded[i]["prompt"] == [
            {"role": "system", "content": "new"},
            {"role": "user", "content": f"What is {i} + 1?"},
        ]
    assert load_questions(data, None, "data.train")[0] == rows[0]


@pytest.mark.parametrize(
    "row", [{"question": "1 + 1?"}, {"prompt": [{"role": "robot", "content": ""}]}]
)
def test_malformed_rows_stop_a_run_and_a_dry_run(
    row: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps(row))
    data = ["data.train={loader: rows, path: rows.jsonl}", "data.eval=null", "trainer.eval_every=0"]
    for last in ([], ["--dry-run"]):
        assert main(["train", DIGITS, *data, *last]) == 2
        assert "row 0: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reward", "answer", "words"),
    [
        ("boxed", None, "row 40: has no ground truth"),
        ("boxed", r"\boxed{5", "row 40: cppo.rewards.boxed: ground truth must be an answer"),
        (
            "{numeric: {unfinished_thought: -1}}",
            "five",
            "row 40: cppo.rewards.numeric: ground truth",
        ),
        ("gsm8k_reward", "five", "row 40: cppo.rewards.gsm8k: ground truth must be a number"),
    ],
)
@pytest.mark.parametrize("place", ["train", "eval"])
def test_a_ground_truth_that_no_reward_reads_stops_a_run_before_its_model_is_loaded(
    reward: str,
    answer: str | None,
    words: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    good = [{"prompt": f"{n}?", "answer": "5"} for n in range(50)]
    bad = [*good[:40], {"prompt": "?", "answer": answer}, *good[41:]]
    for name in ("train", "eval"):
        rows = bad if name == place else good
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = [f"data.{name}={{loader: rows, path: {name}.jsonl}}" for name in ("train", "eval")]
    for more in ([], ["--dry-run", "model.architecture={model_type: qwen2}"]):
        model = "model={path: no/such}"
        assert main(["train", DIGITS, *data, f"rewards=[{reward}]", model, *more]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_says_where_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    from cppo.train.trainer import CPPOTrainer

    monkeypatch.chdir(tmp_path)
    step = CPPOTrainer.train_step

    def interrupted(trainer: CPPOTrainer) -> dict[str, float]:
        metrics = step(trainer)
        if trainer.step == 1:
            os.kill(os.getpid(), signal.Signals[name])
        return metrics

    run = [
        "train",
        DIGITS,
        *TINY,
        "trainer.output_dir=run",
        "data.eval=null",
        "trainer.max_steps=3",
    ]
    run.remove("data.eval.limit=2")
    monkeypatch.setattr(CPPOTrainer, "train_step", interrupted)
    if name == "SIGINT":
        assert main(run) == 130
        words = "interrupted; the newest checkpoint is run/checkpoint-000002; go on with --resume"
        assert words in capsys.readouterr().err
    else:
        with pytest.raises(SystemExit) as ended:
            main(run)
        assert ended.value.code == 143
        words = "stopped by SIGTERM; the newest checkpoint is run/checkpoint-000002"
        assert words in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(CPPOTrainer, "train_step", step)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert main([*run, "--resume"]) == 0
    assert [row["step"] for row in read_metrics("run")] == [1, 2, 3]


def test_a_refused_command_leaves_the_run_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = ["train", DIGITS, *TINY, "trainer.output_dir=run", "trainer.max_steps=2"]
    assert main([*run, "trainer.save_every=1"]) == 0

    def files() -> dict[str, bytes]:
        found = (path for path in Path("run").rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in found if path.name != ".lock"}

    before = files()
    config = Path("run/config.yaml").read_text()
    assert config.startswith("# All options of this run")
    for more in (
        ["--resume", "trainer.loss.temperature=3"],
        ["--resume", "run/checkpoint-000001", "--overwrite", "trainer.learning_rate=0.5"],
        ["--resume", "data.train.limit=7"],
        [],
    ):
        assert main([*run, *more]) == 2
        assert files() == before, more
    assert main(["train", "run/config.yaml", "--resume", "trainer.max_steps=3"]) == 0
    assert "trainer.loss.temperature=3" not in capsys.readouterr().out
    elsewhere = [*run, "trainer.output_dir=new", "--resume", "run/checkpoint-000002"]
    assert main([*elsewhere, "trainer.seed=9"]) == 2
    assert not Path("new/config.yaml").exists()


def test_a_configuration_of_ones_own_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    mine = "# mine\nextends: " + DIGITS + "\n"
    Path("own/config.yaml").write_text(mine)
    assert main(["train", "own/config.yaml", *TINY, "trainer.output_dir=own"]) == 2
    assert "own/config.yaml is a configuration of your own" in capsys.readouterr().err
    assert Path("own/config.yaml").read_text() == mine


def test_the_csv_file_is_looked_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for path in ("file/x.csv", "."):
        assert main(["eval", DIGITS, *TINY, "--csv", path]) == 2
        assert f"--csv: {path} cannot be written" in capsys.readouterr().err


# The arithmetic of a dry run


def test_step_sizes_by_hand() -> None:
    config = CPPOConfig(
        batch_size=64,
        group_size=16,
        prune_rate=0.75,
        max_completion_tokens=100,
        max_tokens_per_microbatch=480,
        optimizer_steps=2,
        num_iterations=3,
    )
    step = dry_run.step_sizes(config, prompt_tokens=20)
    assert (step.questions, step.sampled, step.kept) == (16, 256, 64)
    assert (step.sampled_tokens, step.trained_tokens) == (25_600, 64 * 120)
    # 480 // 120 = 4 completions per part, 32 per optimizer step: 8 parts x 2 steps x 3 passes
    assert (step.microbatches, step.microbatch_tokens, step.microbatch_rows) == (48, 480, 400)


def test_step_sizes_without_dynamic_allocation() -> None:
    config = CPPOConfig(batch_size=64, group_size=16, prune_rate=0.75, dynamic_allocation=False)
    step = dry_run.step_sizes(config, prompt_tokens=1)
    assert (step.questions, step.sampled, step.kept) == (4, 64, 16)


def test_memory_by_hand() -> None:
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


@pytest.mark.parametrize("module", ["cppo", "cppo.cli"])
def test_as_a_module(tmp_path: Path, module: str) -> None:
    """For launchers: torchrun -m cppo train run.yaml."""
    command = [sys.executable, "-m", module, "train", "nowhere.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "cppo train: error: nowhere.yaml: no such file\n"
