"""Odd files, options and rewards: each is answered in words or counted right, in no other way."""

import json
from pathlib import Path

import pytest
from cli_cases import ARITHMETIC, TINY, cppo
from PIL import Image
from question_cases import write_jsonl
from trainer_cases import text_rows, trainer_for

from cppo.cli.datasets import overlap
from cppo.cli.run_config import BUILDERS, load
from cppo.questions import QuestionError, as_question, check_dataset, load_rows
from cppo.rewards.lengths import RepetitionPenalty
from cppo.rewards.spelling import same_answer
from cppo.train import evaluate as evaluate_module
from cppo.train.progress import RunLog

RUN = ["train", ARITHMETIC, *TINY]
OWN = "data={train: {path: my.jsonl}}"
HUGE = "1" + "0" * 400  # a whole number that no float holds
CODE = """
def f(completions, **columns):
    return [1.0] * len(completions)

def length_std(completions, **columns):
    return [float(i) for i in range(len(completions))]

def logs(completions, log_extra, **columns):
    log_extra("step", ["x"] * len(completions))
    log_extra("mine", [7] * len(completions))
    return [0.0] * len(completions)

class Rows:
    def __len__(self):
        return 6
    def __getitem__(self, index):
        if index == 3:
            raise OSError(f"cannot identify <_io.BytesIO object at {id(object())}>")
        return {"prompt": f"{index}+1=", "answer": str(index + 1)}

def rows(*_):
    return Rows()

def texts(*_):
    return ["1+1=", "2+2="]
"""


@pytest.fixture(autouse=True)
def _in_a_folder_with_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_text(CODE)
    Path("b.py").write_text(CODE)
    write_jsonl([{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(6)], "my.jsonl")


def error_of(capsys, *arguments):
    status, _, err = cppo(capsys, *arguments)
    assert status == 2, err
    return err.strip().splitlines()[-1] if "\n  row" not in err else err


# ---- Options


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"trainer.learning_rate={HUGE}", "trainer.learning_rate must be a number > 0, got 1000"),
        (f"trainer.betas=[0.9, {HUGE}]", "trainer.betas must be two numbers in [0, 1)"),
        ("trainer.output_dir=2024-01-01", "must be text, got datetime.date(2024, 1, 1) (a date)"),
        ("trainer.num_epochs=1e308", "trainer.num_epochs must be a number > 0 and <= 1e+06"),
    ],
)
def test_numbers_that_nothing_can_hold_and_dates(override, words, capsys):
    given = "trainer.max_steps=none"
    assert words in error_of(capsys, *RUN, given, override, "--dry-run")


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("{model_type: gpt2}", "layers                 12 of width 768"),
        ("{model_type: opt}", "layers                 12 of width 768"),
        ("{model_type: mamba}", "sizes unknown, no memory estimate: model_type 'mamba': "),
        ("{model_type: [a]}", "sizes unknown, no memory estimate: model.architecture: "),
        ("{model_type: qwen2, hidden_size: wide}", "'hidden_size' expected int, got str"),
        ("{model_type: qwen2, num_attention_heads: 0}", "model_type 'qwen2': integer division"),
    ],
)
def test_a_dry_run_of_any_architecture(architecture, words, capsys):
    model = f"model={{path: not_here, architecture: {architecture}}}"
    status, out, err = cppo(capsys, *RUN, model, "--dry-run")
    assert status == 0 and words in out, err


def test_a_dry_run_counts_the_adapters_that_are_asked_for(capsys):
    seen = {}
    for name, targets in (("some", "[q_proj]"), ("regex", "'.*q_proj'"), ("all", "all-linear")):
        lora = f"trainer.lora={{r: 1, target_modules: {targets}}}"
        out = cppo(capsys, *RUN, lora, "--dry-run")[1]
        seen[name] = next(line for line in out.splitlines() if line.startswith("gradients"))
    # 4 layers of 128 to 128, in fp32
    assert seen["some"].endswith(" 4.0 KiB") and seen["regex"] == seen["some"] != seen["all"]


def test_a_folder_with_a_damaged_config_is_one_line(capsys):
    Path("model").mkdir()
    Path("model/config.json").write_text('{"model_type": "qwen2", "hidden_size": "wide"}')
    for command in (["info", "model"], [*RUN, "model={path: model}", "--dry-run"]):
        assert "gives no model configuration" in error_of(capsys, *command)


def test_a_picture_as_large_as_a_bomb_is_one_line(capsys, monkeypatch):
    Image.new("1", (100, 100)).save("large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    given = [str(BUILDERS["tiny_digits"]), "--image", "large.png", "--question", "?"]
    assert "cannot read the image (large.png)" in error_of(capsys, "inspect", *given)


# ---- Rows


def test_a_system_prompt_hides_no_empty_question(capsys):
    write_jsonl([{"prompt": "1+1=", "answer": "2"}, {"prompt": "", "answer": "3"}], "my.jsonl")
    system = "data.system_prompt=Think."
    assert "row 1: prompt asks nothing" in error_of(capsys, *RUN, OWN, system, "--dry-run")
    with pytest.raises(QuestionError, match="prompt asks nothing"):
        as_question(load_rows("my.jsonl", system_prompt="Think.")[1])
    given = [OWN.replace("path: my.jsonl", "loader: 'a.py:texts'"), system, "--dry-run"]
    assert "row 0: expected a mapping, got str" in error_of(capsys, *RUN, *given)


def test_a_bad_question_is_skipped_from_the_command_line_too(capsys):
    run = [*RUN, OWN.replace("path: my.jsonl", "loader: 'a.py:rows'")]
    assert "row 3: the dataset cannot give it" in error_of(capsys, *run)
    run.append("trainer.skip_bad_questions=true")
    assert "train: 6 questions" in cppo(capsys, *run, "--dry-run")[1]
    assert cppo(capsys, *run)[0] == 0
    more = "trainer.max_steps=3"  # and its digest is that of before
    status, out, err = cppo(capsys, *run, more, "--resume")
    assert status == 0 and "resumed from" in out, err
    bad = [{"prompt": ""}, {"prompt": " "}]
    with pytest.raises(ValueError, match="2 of 2 rows read cannot be used"):
        check_dataset(bad, skip_bad_questions=True)


def test_splits_of_a_folder_are_those_that_its_files_have(capsys):
    rows = Path("my.jsonl").read_text()
    for name, files in {
        "code": {"my.jsonl": rows, "train.py": "1"},
        "other": {"train.jsonl": rows, "test.png": "1", "data/test.jsonl": rows},
    }.items():
        for file, text in files.items():
            Path(name, file).parent.mkdir(parents=True, exist_ok=True)
            Path(name, file).write_text(text)
        status, _, err = cppo(capsys, "init", f"{name}.yaml", "--data", name)
        assert status == 0, err
    assert load("code.yaml").data.train.split is None
    data = load("other.yaml").data
    assert data.train.split == "train" and data.eval is None
    for saved in ("{}", "[]", "{"):
        Path("saved").mkdir(exist_ok=True)
        Path("saved/dataset_dict.json").write_text(saved)
        words = error_of(capsys, "init", "x.yaml", "--data", "saved")
        assert "dataset_dict.json does not name the splits" in words


def test_odd_names_in_init(capsys):
    words = error_of(capsys, "init", "x.yaml", "--reward", "", "--data", "my.jsonl")
    assert "must end in .py, got ." in words
    given = ["--reward", 'a"b.py', "--data", "my.jsonl"]
    status, out, _ = cppo(capsys, "init", "my data.yaml", *given)
    assert status == 0 and "next: cppo train 'my data.yaml' --dry-run" in out
    assert load("my data.yaml").rewards == ('a"b.py:right_answer',)


def test_a_split_that_is_left_out_is_the_loaders(tmp_path):
    text = "model: {builder: tiny_arithmetic}\nrewards: [boxed]\ndata:\n"
    text += "  train: {loader: gsm8k, path: x}\n  eval: {loader: gsm8k, path: x, split: train}\n"
    Path("c.yaml").write_text(text)
    assert "has questions that data.train trains on" in overlap(load("c.yaml").data)
    Path("c.yaml").write_text(text.replace("split: train", "split: test"))
    assert overlap(load("c.yaml").data) == ""


# ---- Rewards and what is written of them


def test_two_rewards_of_one_name_are_refused_by_every_command(capsys):
    given = [ARITHMETIC, *TINY, "rewards=['a.py:f', 'b.py:f']"]
    for command in (["eval", *given], ["train", *given, "--dry-run"]):
        assert "must have different names" in error_of(capsys, *command)
    questions = [as_question(row) for row in text_rows()]
    with pytest.raises(ValueError, match="must have different names"):
        two = [lambda completions, **_: [0.0] * len(completions) for _ in range(2)]
        trainer = trainer_for("run")
        config, processor = trainer.config, trainer.processor
        evaluate_module.evaluate(trainer.model, processor, two, questions, config=config)


def test_a_reward_that_is_called_std_is_shown(capsys):
    given = [ARITHMETIC, *TINY, "rewards=['a.py:length_std']"]
    out = cppo(capsys, "eval", *given, "--samples", "2")[1]
    assert "avg@2   length_std" in out and "length_std_std" not in out
    log = RunLog("run", 1, is_main=True)
    row = {"step": 0, "eval/sampled/length_std": 0.5, "eval/sampled/length_std_std": 0.25}
    log.metrics({**row, "eval/sampled/reward": 0.5}, show=True)
    assert "0 steps  sampled/length_std 0.500\n" in capsys.readouterr().out


def test_the_console_says_no_number_that_there_is_not(capsys):
    log = RunLog("run", 3, is_main=True)
    log.metrics({"step": 1, "loss": 0.0}, show=True)
    log.metrics({"step": 2, "loss": 0.0, "reward/mean": 0.25}, show=True)
    log.metrics({"step": 3, "loss": 0.0}, show=True)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[0] == ["step", "loss"] and shown[2] == ["step", "reward", "loss"]
    assert shown[3][1] == "0.250" and shown[4][1] == "-"


def test_what_a_reward_logs_takes_no_place_of_the_trainers(capsys):
    assert cppo(capsys, *RUN, OWN, "rewards=['a.py:logs']")[0] == 0
    rows = [json.loads(line) for line in Path("run/completions.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {1, 2}
    assert {row["logged/step"] for row in rows} == {"x"} and {row["mine"] for row in rows} == {7}


def test_ngrams_longer_than_any_completion():
    penalty = RepetitionPenalty(ngram_size=10**9)
    assert penalty(["a"], completion_ids=[[1, 1, 1]]) == [0.0]


def test_tuples_are_compared_down_to_their_own_depth():
    def nested(first, depth):
        return first if depth == 0 else f"({nested(first, depth - 1)}, {depth})"

    assert same_answer(nested("0.5", 4), nested("1/2", 4))
    assert not same_answer(nested("0.5", 5), nested("1/2", 5))


def test_a_folder_with_an_equals_sign_is_no_override(capsys):
    Path("lr=1").mkdir()
    status, _, err = cppo(capsys, *RUN, "--resume", "lr=1")
    assert status == 2 and "lr=1 is not a checkpoint of cppo" in err
