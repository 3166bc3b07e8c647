"""Own data in five minutes: `cppo init`, `cppo train`, `cppo eval`, plain transformers."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_cases import cppo
from question_cases import picture, write_jsonl, write_parquet

from cppo.cli import init, main, own_reward
from cppo.cli.own_data import Findings
from cppo.cli.run_config import BUILDERS, load
from cppo.cli.strict_yaml import parse, scalar
from cppo.demo.arithmetic import ArithmeticProblems
from cppo.demo.digits import DigitSums
from cppo.questions import as_question

ROOT = Path(__file__).parents[1]
QUICK = (
    "trainer.batch_size=4 trainer.group_size=4 trainer.max_completion_tokens=6 trainer.eval_every=0"
).split()

pytestmark = pytest.mark.usefixtures("empty_folder")


def problems(count=20):
    rows = ArithmeticProblems("train", count)
    return [{"question": r["prompt"][0]["content"], "label": r["answer"]} for r in rows]


def command(*arguments):
    """A command in a process of its own, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "cppo", *arguments], capture_output=True, text=True, timeout=500
    )


# ---- The whole way


def test_own_csv_and_own_reward_to_a_model_of_plain_transformers():
    with open("my.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["question", "label"])
        writer.writeheader()
        writer.writerows(problems())
    given = ["--data", "my.csv", "--model", "tiny_arithmetic", "--reward", "my_reward.py"]
    done = command("init", "my_data.yaml", *given)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "written: my_data.yaml",
        "written: my_reward.py",
        "  20 rows with the columns question, label",
        "  prompt: the column 'question' (prompt_key)",
        "  answer: the column 'label' (answer_key)",
        "  held out: the first 2 rows",
        "next: cppo train my_data.yaml --dry-run",
    ]
    done = command("train", "my_data.yaml", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 steps, 32 questions, 1.78 epochs" in done.stdout
    done = command("train", "my_data.yaml", *QUICK, "trainer.trackers=[tensorboard]")
    # Nothing that a library wants to say to its developers.
    assert (done.returncode, done.stderr) == (0, "")
    assert "num_epochs = 1: 9 steps of 2 questions" in done.stdout
    assert "\ncurves: tensorboard --logdir runs/my_data\n" in done.stdout
    assert list(Path("runs/my_data").rglob("events.out.tfevents*"))
    last = done.stdout.splitlines()[-1]
    assert last == "report: runs/my_data/report.html; next: cppo eval runs/my_data"
    assert Path("runs/my_data/report.html").is_file()
    done = command("eval", "runs/my_data")
    assert (done.returncode, done.stderr) == (0, "")
    assert "on 2 questions" in done.stdout
    measured = [line.split()[2] for line in done.stdout.splitlines() if "avg@1" in line]
    assert measured == ["right_answer", "tokens"]
    code = """
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
(folder,) = Path("runs/my_data").glob("checkpoint-000009")
model, tokenizer = (k.from_pretrained(folder) for k in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer("Tom has 3 apples", return_tensors="pt").input_ids
print(model(ids).logits.shape[-1], "cppo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.fullmatch(r"\d+ False\n", done.stdout), done.stderr


def test_own_images_beside_their_file(capsys):
    Path("set/pics").mkdir(parents=True)
    rows = []
    for i, row in enumerate(DigitSums("train", 12)):
        question = as_question(row, i)
        question.images[0].save(f"set/pics/{i}.png")
        rows.append({"q": "What is the sum?", "picture": f"pics/{i}.png", "sum": row["answer"]})
    write_jsonl(rows, "set/my.jsonl")
    given = ["--data", "set/my.jsonl", "--model", "tiny_digits", "--prompt-key", "q"]
    status, out, _ = cppo(capsys, "init", *given, "--answer-key", "sum")
    assert status == 0 and "images: the column 'picture' (images_key)" in out
    text = Path("my_data.yaml").read_text()
    assert "images_key: picture # the column of images, or of paths relative" in text
    assert "  # loss: {cpl_coef: 0.01} # contrastive perception" in text
    status, out, _ = cppo(capsys, "train", "my_data.yaml", "--dry-run")
    assert status == 0 and re.search(r"images: \d+ x \d+ pixels", out)
    assert main(["train", "my_data.yaml", *QUICK]) == 0
    assert main(["eval", "runs/my_data"]) == 0
    look = ["inspect", "runs/my_data", "--image", "set/pics/0.png", "--question", "Sum?"]
    assert main(look) == 0 and main(["info", "runs/my_data"]) == 0
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    (folder,) = Path("runs/my_data").glob("checkpoint-000006")
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert AutoModelForImageTextToText.from_pretrained(folder).config.model_type == "qwen2_5_vl"


# ---- What a recipe says


def findings(rows, *given, name="my.jsonl", writer=write_jsonl):
    assert main(["init", "--overwrite", "--data", str(writer(rows, name)), *given]) == 0
    return load("my_data.yaml"), Path("my_data.yaml").read_text()


def test_a_recipe_without_a_look_at_data_is_read_back(capsys):
    status, out, _ = cppo(capsys, "init")
    assert status == 0 and out == (
        "written: my_data.yaml\nnext: cppo train my_data.yaml --dry-run\n"
    )
    config = load("my_data.yaml")
    assert config.data.train.path == "my.jsonl" and config.data.eval is None
    assert config.model.path == "Qwen/Qwen2.5-1.5B-Instruct" and config.rewards == ("boxed",)
    assert config.trainer.num_epochs == 1 and config.trainer.output_dir == "runs/my_data"
    text = Path("my_data.yaml").read_text()
    for key in ("prompt_key", "answer_key", "images_key"):
        assert f"# {key}: the column of" in text


COLUMNS = [
    ({"prompt": "?", "answer": "1"}, {}),
    ({"Question": "?", "Final Answer": "1"},
     {"prompt_key": "Question", "answer_key": "Final Answer"}),
    ({"instruction": "?", "input": "", "output": "1"},
     {"prompt_key": "instruction", "answer_key": "output"}),
    ({"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": "1"}},
     {"answer_key": "reward_model.ground_truth"}),
    ({"problem": "?", "answer": "1", "image": "a.png"}, {"prompt_key": "problem"}),
    ({"query": "?", "label": 1, "files": ["a.png", "b.jpg"]},
     {"prompt_key": "query", "answer_key": "label", "images_key": "files"}),
    ({"prompt": "?", "answer": "1", "image_path": "a.png", "map": "b.png"},
     {"images_key": "image_path"}),
    ({"text": "?", "label": "yes", "a: b, 'c'\n#": 1},
     {"prompt_key": "text", "answer_key": "label"}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "keys"), COLUMNS, ids=range(len(COLUMNS)))
def test_columns_are_read_by_their_names_and_images_by_their_values(row, keys):
    config, text = findings([row] * 20)
    assert config.data.train.keys == config.data.eval.keys == keys
    assert (config.data.train.skip, config.data.eval.limit) == (2, 2)
    assert f"# The columns of the file: {', '.join(row)[:6]}" in text
    is_vision = any("image" in name or name == "files" for name in row)
    assert ("VL" in config.model.path) == is_vision
    assert ("cpl_coef" in text) == is_vision and not config.trainer.loss.contrasts


def test_images_in_parquet_and_in_messages():
    pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    encoded = b"\x89PNG"
    rows = [{"question": "?", "answer": "1", "picture": {"bytes": encoded, "path": None}}] * 3
    config, _ = findings(rows, name=Path("my.parquet"), writer=write_parquet)
    assert config.data.train.images_key == "picture" and config.data.eval is None
    picture(4).save("a.png")
    content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "?"}]
    config, _ = findings([{"messages": [{"role": "user", "content": content}], "answer": "1"}])
    assert "VL" in config.model.path and config.data.train.keys == {"prompt_key": "messages"}


def test_held_out_rows_of_splits_and_of_another_file():
    row = {"prompt": "?", "answer": "1"}
    write_jsonl([row] * 5, "set/train.jsonl")
    write_jsonl([row] * 4, "set/test.jsonl")
    assert main(["init", "--data", "set"]) == 0
    data = load("my_data.yaml").data
    assert (data.train.split, data.eval.split, data.train.skip) == ("train", "test", 0)
    # Where no split is held out, some rows of the training split are.
    write_jsonl([row] * 20, "two/extra.jsonl")
    write_jsonl([row] * 20, "two/train.jsonl")
    assert main(["init", "two.yaml", "--data", "two"]) == 0
    data = load("two.yaml").data
    assert (data.train.split, data.eval.split) == ("train", "train")
    assert data.train.skip == data.eval.limit == 2
    config, _ = findings([row] * 50, "--eval-data", "set/test.jsonl")
    assert config.data.eval.path == "set/test.jsonl" and config.data.train.skip == 0
    config, text = findings([row] * 9)
    assert config.data.eval is None and config.trainer.eval_every == 0
    assert "train: {skip: 100}, eval: {limit: 100}" in text


def test_long_answers_are_said():
    _, text = findings([{"prompt": "?", "answer": "step by step " * 20}])
    assert "name a column of short answers" in text
    assert "short answers" not in findings([{"prompt": "?", "answer": "1"}])[1]


MISTAKES = [
    (["my.jsonl"], "the file to write must end in .yaml, got my.jsonl; your rows .*--data my"),
    (["taken.yaml"], "taken.yaml is there; --overwrite replaces it"),
    (["--reward", "taken.py"], "taken.py is there; --overwrite"),
    (["--reward", "my_reward"], "the file to write must end in .py, got my_reward$"),
    (["no/where.yaml"], "there is no folder no$"),
    (["--data", "nowhere.csv"], "--data: there is no file or folder nowhere.csv"),
    (["--data", "bad.csv"], "--data: bad.csv, line 3 has 1 cells, the first row names 2 columns"),
    (["--data", "odd.jsonl"], "none of the columns aa, bb looks like the questions: .*--prompt-"),
    (["--data", "odd.jsonl", "--prompt-key", "aa"], "the right answers: .*--answer-key .*--reward"),
    (["--data", "odd.jsonl", "--prompt-key", "AA"], "prompt_key must be a column .*mean 'aa'"),
    (["--eval-data", "odd.jsonl"], "--eval-data needs --data"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "words"), MISTAKES, ids=[" ".join(g) for g, _ in MISTAKES])
def test_mistakes_are_one_line_and_nothing_is_written(given, words, capsys):
    for name in ("taken.yaml", "taken.py"):
        Path(name).write_text("mine")
    Path("bad.csv").write_text("prompt,answer\n1,2\n3\n")
    write_jsonl([{"aa": "?", "bb": "1"}], "odd.jsonl")
    before = sorted(Path().iterdir())
    status, _, err = cppo(capsys, "init", *given)
    assert status == 2 and re.search(f"^cppo init: error: .*{words}", err.strip())
    assert sorted(Path().iterdir()) == before and Path("taken.yaml").read_text() == "mine"


def test_a_reward_that_needs_no_answer():
    config, _ = findings([{"aa": "?", "bb": "1"}], "--prompt-key", "aa", "--reward")
    assert config.rewards == ("my_reward.py:right_answer",)
    assert Path("my_reward.py").read_text() == Path(own_reward.__file__).read_text()


def test_the_reward_to_start_from():
    texts = [r"so \boxed{7}", r"\boxed{8} or \boxed{ 7 }", r"\boxed{8}", "think\n7", "it is 7"]
    scores = [1.0, 1.0, 0.1, 1.0, 0.0]
    assert own_reward.right_answer(texts, answer=[7] * 5, level=[1] * 5) == scores
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert own_reward.right_answer(messages, answer=["7"] * 5) == scores


NAMES = [
    "a",
    "a/b.jsonl",
    "x: y",
    "yes",
    "1",
    "1e3",
    "null",
    "-",
    "a #b",
    "it's",
    "{a}",
    "",
    "a\nb",
]


@pytest.mark.parametrize("text", [*NAMES, "\t\x00é"])
def test_any_name_is_read_back_from_yaml(text):
    assert parse(f"key: {scalar(text)} # comment")["key"] == text


def test_recipes_for_every_demo_model_are_read_back():
    for model in BUILDERS:
        found = Findings("a b.jsonl", ("x\ny",), has_images=True, eval_path="e", is_long=True)
        text = init.recipe_text(found, Path("r.yaml"), model, Path("its reward.py"))
        assert yaml.safe_load(text)["model"] == {"builder": model}


def test_the_page_does_what_it_says(capsys):
    page = (ROOT / "docs" / "own_data.md").read_text()
    (rows,) = re.findall(r"```jsonl\n(.*?)```", page, re.DOTALL)
    (commands,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    (data,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    Path("pics").mkdir()
    picture().save("pics/1.png")
    Path("my.jsonl").write_text(rows)
    names = {}
    exec(code, names)
    assert names["question"].columns["answer"] == 5
    write_jsonl([json.loads(line) for line in rows.splitlines()] * 100)
    first, dry, *_ = (line.split("#")[0].split()[1:] for line in commands.splitlines())
    assert main(first) == 0 and main(dry) == 0
    Path("page.yaml").write_text(f"extends: my_data.yaml\n{data}")
    keys = {"prompt_key": "question", "answer_key": "label", "images_key": "picture"}
    assert load("page.yaml").data.train.keys == keys == load("my_data.yaml").data.train.keys
