"""The command line: what it prints, its exit statuses, and what it leaves on disk."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import DIGITS, GSM8K, TINY, cppo
from PIL import Image

from cppo.cli import main, run_config
from cppo.cli.datasets import load_questions
from cppo.train.progress import read_metrics
from cppo.train.trainer import CPPOTrainer

TRAIN, TINY_RUN = ["train", DIGITS], ["train", DIGITS, *TINY]

pytestmark = pytest.mark.usefixtures("empty_folder")


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_help_names_the_commands_without_loading_transformers(capsys):
    code = "import sys; from cppo.cli import main; main(['--help'])"
    check = f"try:\n {code}\nexcept SystemExit: pass\nassert 'transformers' not in sys.modules"
    done = python("-c", check)
    assert done.returncode == 0, done.stderr
    for command in ("train", "eval", "info", "demo", "data", "bench"):
        assert command in done.stdout
    status, out, _ = cppo(capsys)
    assert status == 2 and "COMMAND" in out
    status, out, _ = cppo(capsys, "info")
    assert status == 0 and "torch" in out


@pytest.mark.parametrize("module", ["cppo", "cppo.cli"])
def test_as_a_module(module):
    """For launchers: torchrun -m cppo train run.yaml."""
    done = python("-m", module, "train", "nowhere.yaml")
    assert done.returncode == 2
    assert done.stderr == "cppo train: error: nowhere.yaml: no such file\n"


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "missing.yaml"], "missing.yaml: no such file"),
        ([*TRAIN, "trainer.seeed=1"], "did you mean trainer.seed"),
        (["train", GSM8K], "data.train: .*data/gsm8k"),
        ([*TRAIN, "model={path: no/such/model}"], "no/such/model"),
        ([*TRAIN, "data.train.split=tst"], "data.train: .*'train'.*, got 'tst'"),
        ([*TRAIN, "--resume", "nowhere"], "nowhere is not a checkpoint of cppo"),
        (
            [*TRAIN, "trainer.lora.target_modules=[nope]"],
            r"trainer.lora.target_modules must be .*, got \('nope',\): there is no 'nope'",
        ),
        (["eval", "nowhere"], "nowhere: no such file or folder"),
        (["eval", "."], "neither a run of `cppo train` nor a checkpoint"),
        (["eval", DIGITS, "--samples", "0"], "--samples must be >= 1, got 0"),
        (["eval", DIGITS, "data.eval=null", "trainer.eval_every=0"], "data.eval is missing"),
        (["eval", DIGITS, *TINY, "--csv", "file/x.csv"], "--csv: file/x.csv cannot be written"),
        (["eval", DIGITS, *TINY, "--csv", "."], "--csv: . cannot be written"),
        (["eval", DIGITS, *TINY, "--csv", "file"], "--csv: file has other columns than .*'x'"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, words, capsys):
    Path("file").write_text("x\n")
    status, _, err = cppo(capsys, *arguments)
    start = f"cppo {arguments[0]}: error: "
    (error,) = [line for line in err.splitlines() if line.startswith(start)]
    assert status == 2 and re.search(words, error)


def test_debug_shows_the_traceback_and_an_unknown_option_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("CPPO_DEBUG", "1")
    with pytest.raises(run_config.ConfigError):
        main(["train", "missing.yaml"])
    with pytest.raises(SystemExit) as caught:
        main(["train", "a.yaml", "--dry-rum"])
    assert caught.value.code == 2 and "--dry-rum" in capsys.readouterr().err


def test_a_failing_reward_is_an_error_with_the_last_checkpoint(capsys):
    text = "def broken(completions, **columns):\n    return [float('nan') for _ in completions]\n"
    Path("their_rewards.py").write_text(text)
    for command in ("train", "eval"):
        status, _, err = cppo(capsys, command, *TINY_RUN[1:], "rewards=['their_rewards.py:broken']")
        assert status == 2
        assert f"cppo {command}: error: reward function 'broken' failed" in err
        assert ("last checkpoint: none" in err) == (command == "train")


# Data


def test_rows_of_ones_own_are_limited_and_take_the_system_prompt():
    rows = [{"prompt": f"What is {i} + 1?", "answer": i + 1} for i in range(5)]
    old = {"role": "system", "content": "old"}
    rows[0]["prompt"] = [old, {"role": "user", "content": "What is 0 + 1?"}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = run_config.DatasetConfig("rows", "rows.jsonl", limit=2)
    loaded = load_questions(data, "new", "data.train")
    assert len(loaded) == 2
    for i in range(2):
        asked = {"role": "user", "content": f"What is {i} + 1?"}
        assert loaded[i]["answer"] == i + 1
        assert loaded[i]["prompt"] == [{"role": "system", "content": "new"}, asked]
    assert load_questions(data, None, "data.train")[0] == rows[0]


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("loader", ["digits", "arithmetic"])
def test_the_loaders_of_the_demo_tasks(loader, split):
    data = run_config.DatasetConfig(loader, split=split)
    assert data.is_demo
    rows = load_questions(data, None, "data.train")
    few = load_questions(run_config.DatasetConfig(loader, split=split, limit=3), None, "data.train")
    assert (len(rows), len(few)) == (100_000, 3)
    assert all(rows[i]["answer"] == few[i]["answer"] for i in range(3))


BAD_ROWS = [
    ("boxed", {"question": "1 + 1?"}, "row 40: "),
    ("boxed", {"answer": r"\boxed{5"}, "row 40: cppo.rewards.boxed: ground truth must be an an"),
    ("gsm8k_reward", {"answer": "five"}, "row 40: cppo.rewards.gsm8k: ground truth must be a n"),
]


@pytest.mark.parametrize(("reward", "bad", "words"), BAD_ROWS, ids=[str(b[1]) for b in BAD_ROWS])
@pytest.mark.parametrize("place", ["train", "eval"])
def test_a_bad_row_stops_a_run_before_its_model_is_loaded(reward, bad, words, place, capsys):
    good = [{"prompt": f"{n}?", "answer": "5"} for n in range(50)]
    bad = bad if "question" in bad else {"prompt": "?", "answer": "5", **bad}
    for name in ("train", "eval"):
        rows = [*good[:40], bad if name == place else good[40], *good[41:]]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = [f"data.{name}={{loader: rows, path: {name}.jsonl}}" for name in ("train", "eval")]
    for more in ([], ["--dry-run", "model.architecture={model_type: qwen2}"]):
        given = [*data, f"rewards=[{reward}]", "model={path: no/such}", *more]
        status, _, err = cppo(capsys, *TRAIN, *given)
        assert status == 2 and words in err


# Runs


def test_train_resume_and_eval(capsys):
    assert main(TINY_RUN) == 0
    assert run_config.load("run/config.yaml").trainer.max_steps == 2
    status, _, err = cppo(capsys, *TINY_RUN)
    assert status == 2 and "already holds checkpoint-000002" in err
    # an override right behind --resume is no folder
    assert main([*TINY_RUN, "--resume", "trainer.max_steps=3"]) == 0
    checkpoint = sorted(Path("run").glob("checkpoint-*"))[-1]
    assert checkpoint.name == "checkpoint-000003"
    assert main(["eval", "run", "--checkpoint", "last", "--samples", "2"]) == 0
    assert main(["eval", str(checkpoint), "trainer.eval_greedy=false"]) == 0
    status, out, _ = cppo(capsys, "eval", DIGITS, *TINY, "--data", "train")
    assert status == 0 and "on 8 questions" in out
    with open("run/eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows if row["mode"] == "greedy"].count("tiny_digits") == 3
    (avg,) = [row for row in rows if row["samples"] == "2" and row["metric"] == "boxed"]
    assert avg["std"] and avg["model"] == str(checkpoint)


def test_commands_put_adapters_on_the_configured_model(capsys):
    pytest.importorskip("peft")
    lora = ["trainer.lora.r=2", "trainer.max_steps=1", "trainer.warmup_steps=0"]
    assert main([*TINY_RUN, *lora]) == 0
    status, out, _ = cppo(capsys, "eval", "run")
    assert status == 0 and "checkpoint-000001 on 2 questions" in out
    status, out, _ = cppo(capsys, "info", "run")
    assert status == 0 and "run/checkpoint-000001 (model_type" in out
    assert "config says that it was made for 1024" in " ".join(out.split())
    Image.new("RGB", (56, 28)).save("x.png")
    asked = ["--image", "x.png", "--question", "What?", "--output", "found.json"]
    assert cppo(capsys, "inspect", "run/checkpoint-000001", *asked)[0] == 0
    views = json.loads(Path("found.json").read_text())["options"]["positive_views"]
    assert views == list(map(str, run_config.load("run/config.yaml").trainer.positive_views))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_says_where_to_go_on(name, monkeypatch, capsys):
    step = CPPOTrainer.train_step

    def interrupted(trainer):
        metrics = step(trainer)
        if trainer.step == 1:
            os.kill(os.getpid(), signal.Signals[name])
        return metrics

    run = [word for word in TINY_RUN if not word.startswith("data.eval")]
    run += ["data.eval=null", "trainer.max_steps=3"]
    with monkeypatch.context() as patched:
        patched.setattr(CPPOTrainer, "train_step", interrupted)
        newest = "the newest checkpoint is run/checkpoint-000002"
        if name == "SIGINT":
            status, _, err = cppo(capsys, *run)
            assert status == 130 and f"interrupted; {newest}; go on with --resume" in err
        else:
            with pytest.raises(SystemExit) as ended:
                main(run)
            assert ended.value.code == 143
            assert f"stopped by SIGTERM; {newest}" in " ".join(capsys.readouterr().out.split())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert main([*run, "--resume"]) == 0
    assert [row["step"] for row in read_metrics("run")] == [1, 2, 3]


def test_a_refused_evaluation_leaves_no_files(capsys):
    Path("run").mkdir()
    given = ["eval", DIGITS, *TINY, "model.builder=null", "model.path=nowhere"]
    assert cppo(capsys, *given)[0] == 2
    assert not list(Path("run").iterdir())


def test_a_refused_command_leaves_the_run_as_it_is(capsys):
    assert main([*TINY_RUN, "trainer.save_every=1"]) == 0

    def files():
        found = (path for path in Path("run").rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in found if path.name != ".lock"}

    before = files()
    assert before["run/config.yaml"].startswith(b"# All options of this run")
    for more in (
        ["--resume", "trainer.loss.temperature=3"],
        ["--resume", "run/checkpoint-000001", "--overwrite", "trainer.learning_rate=0.5"],
        ["--resume", "data.train.limit=7"],
        [],
    ):
        assert main([*TINY_RUN, *more]) == 2
        assert files() == before, more
    status, out, _ = cppo(capsys, "train", "run/config.yaml", "--resume", "trainer.max_steps=3")
    assert status == 0 and "trainer.loss.temperature=3" not in out
    elsewhere = ["trainer.output_dir=new", "--resume", "run/checkpoint-000002", "trainer.seed=9"]
    assert main([*TINY_RUN, *elsewhere]) == 2
    assert not Path("new/config.yaml").exists()


def test_a_configuration_of_ones_own_is_not_written_over(capsys):
    Path("own").mkdir()
    mine = f"# mine\nextends: {DIGITS}\n"
    Path("own/config.yaml").write_text(mine)
    status, _, err = cppo(capsys, "train", "own/config.yaml", *TINY, "trainer.output_dir=own")
    assert status == 2 and "own/config.yaml is a configuration of your own" in err
    assert Path("own/config.yaml").read_text() == mine
