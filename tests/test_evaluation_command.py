"""`cppo eval`: its predictions, pass@k, maj@N, and what it does when it is killed."""

import csv
import json
import math
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from cli_cases import DIGITS, TINY, cppo
from trainer_cases import lines

from cppo.cli import evaluate as command
from cppo.cli import measures, predictions
from cppo.cli.predictions import default_name
from cppo.cli.run_config import BUILDERS, DataConfig, DatasetConfig, ModelConfig, RunConfig
from cppo.model.load import load_model, load_processor
from cppo.rewards import boxed, exact_match, from_names, gsm8k, math_verify, numeric
from cppo.rewards.reading import reading_of
from cppo.train import evaluate as evaluate_module

EVAL = ["eval", DIGITS, *TINY, "data.eval.limit=3", "trainer.generation_batch_size=4"]
FILE = Path("run/predictions_digits_heldout.jsonl")

pytestmark = pytest.mark.usefixtures("empty_folder")


def table():
    with open("run/eval.csv", newline="") as file:
        return {(row["mode"], row["metric"]): row for row in csv.DictReader(file)}


def test_predictions_hold_every_completion_and_the_table_follows_from_them(capsys):
    status, out, _ = cppo(capsys, *EVAL, "--samples", "2")
    assert status == 0 and f"predictions in {FILE}" in out and "+- is the standard error" in out
    found = lines(FILE)
    keys = [(line["mode"], line["row"], line["sample"]) for line in found]
    sampled = [("sampled", row, sample) for row in range(3) for sample in range(2)]
    assert keys == [*sampled, *[("greedy", row, 0) for row in range(3)]]
    for line in found:
        assert line["model"] == "tiny_digits" and line["images"] == [None]
        assert line["question"].startswith("<image>") and line["answer"]
        assert line["extracted"] == boxed_in(line["completion"])
        assert line["finish_reason"] == ("length" if line["truncated"] else "stop")
        assert (line["tokens"] == 4) >= line["truncated"]
        assert line["rewards"]["boxed"] == boxed([line["completion"]], answer=[line["answer"]])[0]
    rewards = [line["rewards"]["boxed"] for line in found[:6]]
    pairs = [rewards[i : i + 2] for i in (0, 2, 4)]
    rows = table()
    assert float(rows["sampled", "boxed"]["mean"]) == pytest.approx(sum(rewards) / 6, abs=1e-4)
    assert rows["sampled", "boxed/pass@1"]["mean"] == rows["sampled", "boxed"]["mean"]
    passed = sum(map(max, pairs)) / 3
    assert float(rows["sampled", "boxed/pass@2"]["mean"]) == pytest.approx(passed, abs=1e-4)
    assert ("sampled", "boxed/maj@2") in rows and ("greedy", "boxed/pass@1") not in rows
    assert rows["sampled", "boxed"]["stderr"] and rows["sampled", "boxed"]["std"]


def boxed_in(completion):
    return completion.split("{")[1].split("}")[0] if "}" in completion else None


class Killed(BaseException):
    pass


def test_a_killed_evaluation_goes_on_where_it_was(monkeypatch, capsys):
    assert cppo(capsys, *EVAL, "--samples", "2")[0] == 0
    whole = FILE.read_bytes()
    stock, calls = evaluate_module.sample_completions, []

    def counted(*arguments, dies_at=None, **options):
        calls.append(options["temperature"])
        if len(calls) == dies_at:
            raise Killed
        return stock(*arguments, **options)

    monkeypatch.setattr(evaluate_module, "sample_completions", partial(counted, dies_at=2))
    with pytest.raises(Killed):
        cppo(capsys, *EVAL, "--samples", "2")
    assert FILE.read_bytes() == whole, "the earlier evaluation's file"
    partial_file = FILE.with_name(f"{FILE.name}.partial")
    with partial_file.open("ab") as file:
        file.write(b'{"mode": "sampled", "ro')  # a line that a kill has torn
    monkeypatch.setattr(evaluate_module, "sample_completions", counted)
    calls.clear()
    status, out, _ = cppo(capsys, *EVAL, "--samples", "2")
    assert status == 0 and "4 completions of an evaluation that did not end are taken over" in out
    assert len(calls) == 2, "the other sampled batch and the greedy one"
    assert FILE.read_bytes() == whole and not partial_file.exists()


@pytest.mark.parametrize("change", ["settings", "damage"])
def test_another_evaluation_does_not_take_over_what_was_begun(change, monkeypatch, capsys):
    stock, calls = evaluate_module.sample_completions, []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return stock(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(evaluate_module, "sample_completions", dies)
        with pytest.raises(Killed):
            cppo(capsys, *EVAL)
    more = ["trainer.seed=5"] if change == "settings" else []
    if change == "damage":
        begun = FILE.with_name(f"{FILE.name}.partial")
        begun.write_bytes(begun.read_bytes() + b"[1]\n")
    status, out, _ = cppo(capsys, *EVAL, *more)
    assert status == 0 and "taken over" not in out and len(lines(FILE)) == 6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_completions_are_those_that_the_run_has_sampled(precision, monkeypatch, capsys):
    stock, seen = evaluate_module.sample_completions, []

    def watched(*arguments, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return stock(*arguments, **options)

    monkeypatch.setattr(evaluate_module, "sample_completions", watched)
    given = [f"trainer.precision={precision}", "trainer.log_completions=2"]
    assert cppo(capsys, "train", DIGITS, *TINY, *given)[0] == 0
    assert cppo(capsys, "eval", "run", "--checkpoint", "last")[0] == 0
    assert set(seen) == {precision == "bf16"}
    rows = [row for row in lines(Path("run/held_out.jsonl")) if row["step"] == 2]
    assert [row["completion"] for row in rows] == [row["completion"] for row in lines(FILE)]


@pytest.mark.parametrize("changed", ["rewards", "data", "model"])
def test_files_of_ones_own_code_count(changed, monkeypatch, capsys):
    texts = {
        "rewards": "def one(completions, **columns):\n    return [1.0] * len(completions)\n",
        "data": "def one():\n    return [{'prompt': '1 + 1?', 'answer': '2'}] * 3\n",
        "model": "from cppo.cli.run_config import BUILDERS\n"
        "from cppo.model.load import load_model, load_processor\n"
        "def one():\n"
        "    path = BUILDERS['tiny_arithmetic']\n"
        "    return load_model(path), load_processor(path)\n",
    }
    files = {name: Path(f"of_{changed}_{name}.py") for name in texts}
    for name, file in files.items():
        file.write_text(texts[name])
    recipe = Path("own.yaml")
    recipe.write_text(
        f"model: {{builder: '{files['model']}:one'}}\n"
        f"data: {{train: &one {{loader: '{files['data']}:one'}}, eval: *one}}\n"
        f"rewards: ['{files['rewards']}:one']\n"
        "trainer: {output_dir: run, max_completion_tokens: 2, generation_batch_size: 2}\n"
    )
    stock = evaluate_module.sample_completions

    def dies(*arguments, temperature, **options):
        if temperature is None:
            raise Killed
        return stock(*arguments, temperature=temperature, **options)

    with monkeypatch.context() as patched:
        patched.setattr(evaluate_module, "sample_completions", dies)
        for _ in range(2):
            with pytest.raises(Killed):
                cppo(capsys, "eval", str(recipe))
    assert "3 completions of an evaluation that did not end are" in capsys.readouterr().out
    files[changed].write_text(texts[changed] + "# another\n")
    status, out, _ = cppo(capsys, "eval", str(recipe))
    assert status == 0 and "taken over" not in out


def test_files_in_the_folders_of_a_folder_count():
    """As the hub has them, and `datasets` saves them."""
    file = Path("set/data/test.jsonl")
    file.parent.mkdir(parents=True)
    file.write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    data = DatasetConfig(path="set")
    model = ModelConfig(builder="tiny_arithmetic")
    config = RunConfig(model, DataConfig(data, data), ("boxed",))
    before = predictions.fingerprint(config, "eval", None, [])
    Path("set/predictions_set.jsonl").write_text("")
    Path("set/.cache").mkdir()
    Path("set/.cache/lock").write_text("")
    assert predictions.fingerprint(config, "eval", None, []) == before
    file.write_text(file.read_text() * 2)
    assert predictions.fingerprint(config, "eval", None, []) != before


def test_what_was_judged_is_what_this_start_asks(monkeypatch, capsys):
    given = [*EVAL, "rewards=[boxed, exact_match]", "trainer.eval_greedy=false"]

    def refuses(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(predictions.os, "replace", refuses)
        status, _, err = cppo(capsys, *given)
    assert status == 2 and "cannot be written (No space left on device)" in err
    assert [path.name for path in FILE.parent.glob("predictions_*")] == [f"{FILE.name}.partial"]
    status, out, _ = cppo(capsys, *given, "--metric", "exact_match")
    assert status == 0 and "3 completions of an evaluation that did not end are taken over" in out
    reading = reading_of(exact_match)
    assert all(own["extracted"] == reading.extract(own["completion"], "") for own in lines(FILE))
    assert [path.name for path in FILE.parent.glob("predictions_*")] == [FILE.name]


def test_a_table_whose_last_line_is_open_goes_on(capsys):
    assert cppo(capsys, *EVAL)[0] == 0
    file = Path("run/eval.csv")
    count = len(file.read_text().splitlines())
    file.write_bytes(file.read_bytes().rstrip())
    assert cppo(capsys, *EVAL)[0] == 0
    assert len(file.read_text().splitlines()) == 2 * count - 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full and /proc")
def test_a_table_may_go_to_a_pipe_and_a_full_disk_is_one_line(capsys):
    status, _, err = cppo(capsys, *EVAL, "--csv", "/dev/full", "--predictions", "p.jsonl")
    assert status == 2 and "--csv: /dev/full cannot be written (No space left" in err
    assert lines(Path("p.jsonl"))  # were measured, and stay
    out, into = os.pipe()
    command._append_csv(Path(f"/proc/self/fd/{into}"), [{"model": "m"}])
    os.close(into)
    with open(out) as file:
        assert file.read().splitlines()[1].startswith("m,")


def test_a_model_that_diverged_is_one_line(capsys):
    model = load_model(BUILDERS["tiny_arithmetic"])
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    model.save_pretrained("nan")
    load_processor(BUILDERS["tiny_arithmetic"]).save_pretrained("nan")
    status, _, err = cppo(capsys, "eval", "nan", "--loader", "arithmetic", "data.eval.limit=2")
    assert status == 2 and "error: cppo.rollouts: the model's hidden states are not finite" in err


REWARD = "def share(completions, **columns):\n    return [0.25 * (i % 5) for i in range({})]\n"


def test_a_reward_of_ones_own_says_what_is_right_or_is_asked(capsys):
    Path("mine.py").write_text(REWARD.format("len(completions)"))
    given = [*EVAL, "rewards=['mine.py:share']", "--samples=2", "trainer.eval_greedy=false"]
    status, out, _ = cppo(capsys, *given)
    assert status == 0 and "no pass@k and maj@N: share gives 0.25" in out and "--right" in out
    assert not any("pass@" in metric for _, metric in table())
    assert "extracted" not in lines(FILE)[0]
    status, out, _ = cppo(capsys, *given, "--right", "0.5", "--pass-k", "2")
    metrics = [metric for _, metric in table() if "@" in metric]
    assert status == 0 and metrics == ["share/pass@2"], "no vote: nobody knows its answers"
    # The batches hold 0, .25, .5, .75 and 0, .25: one pair of three is right.
    assert table()["sampled", "share/pass@2"]["mean"] == "0.3333"


@pytest.mark.parametrize(
    ("length", "before"),
    [(["trainer.max_steps=2"], 2), (["trainer.max_steps=null", "trainer.num_epochs=1"], 0)],
)
def test_a_reward_is_told_the_step_as_in_the_run(length, before, capsys):
    Path("mine.py").write_text(
        "def told(completions, trainer_state, **columns):\n"
        "    step = trainer_state.global_step + trainer_state.max_steps / 10\n"
        "    return [step] * len(completions)\n"
    )
    short = [word for word in TINY if "max_steps" not in word] + ["data.train.limit=2"]
    given = [DIGITS, *short, *length, "rewards=['mine.py:told']"]
    assert cppo(capsys, "eval", *given)[0] == 0
    assert table()["greedy", "told"]["mean"] == f"{before / 10:.4f}"
    assert cppo(capsys, "train", *given)[0] == 0
    seen = lines(Path("run/metrics.jsonl"))[-1]["eval/greedy/told"]
    assert cppo(capsys, "eval", "run", "--checkpoint", "last")[0] == 0
    assert table()["greedy", "told"]["mean"] == f"{seen:.4f}" == "2.2000"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metric", "boxd"], "--metric: unknown reward 'boxd'; did you mean 'boxed'"),
        (["--pass-k", "4"], "--pass-k must be .* = 2 .*got '4'"),
        (["--pass-k", "0,1"], "--pass-k must be"),
        (["--pass-k", "1,x"], "--pass-k must be"),
        (["--right", "nan"], "--right must be a number, got nan"),
        (["--predictions", "."], "--predictions: . cannot be written"),
        (["--predictions", "file/p.jsonl"], "--predictions: file/p.jsonl cannot be written"),
        (["--split", "test"], "--path and --split need --loader"),
        (["--loader", "math50", "--path", "x"], "command line: --loader must be one of"),
        (["--loader", "rows"], "command line: --path must be a file or folder"),
    ],
)
def test_mistakes(arguments, words, capsys):
    Path("file").write_text("")
    status, _, err = cppo(capsys, *EVAL, "--samples=2", *arguments)
    (error,) = [line for line in err.splitlines() if line.startswith("cppo eval: error: ")]
    assert status == 2 and re.search(words, error), error


def test_a_model_without_a_configuration(capsys):
    rows = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1), "id": i} for i in range(2)]
    Path("sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["--loader", "rows", "--path", "sums.jsonl", "trainer.max_completion_tokens=3"]
    status, out, _ = cppo(capsys, "eval", "tiny_arithmetic", *given)
    assert status == 0 and "tiny_arithmetic on 2 questions" in out
    found = lines(Path("predictions_sums.jsonl"))
    assert [line["columns"] for line in found[:2]] == [{"id": 0}, {"id": 1}]
    with open("eval.csv", newline="") as file:
        assert {row["data"] for row in csv.DictReader(file)} == {"sums.jsonl"}


def test_two_sets_or_parts_of_one_have_different_files():
    named = DatasetConfig("math", "data/x", "test"), DatasetConfig("math", "data/x", "train")
    own = DatasetConfig("rows", "a/dev set.jsonl"), DatasetConfig("my.py:load", "b/c.parquet")
    own += (DatasetConfig("my.py:load"), DatasetConfig("rows", "my.jsonl", limit=100))
    own += (DatasetConfig("rows", "my.jsonl", skip=100),)
    names = [default_name(data) for data in (*named, *own)]
    assert names == [
        *("predictions_math_test.jsonl", "predictions_math_train.jsonl"),
        *("predictions_dev-set.jsonl", "predictions_c.jsonl", "predictions_my-py-load.jsonl"),
        *("predictions_my.jsonl", "predictions_my_100.jsonl"),
    ]


# What a reward says about answers


@pytest.mark.parametrize(
    ("reward", "completion", "extracted"),
    [
        (boxed, r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (boxed, "the answer is 3", None),
        (exact_match, "<answer> Paris </answer>", "Paris"),
        (numeric, "She has 3 apples, so 18 in all.", "18"),
        (numeric, "The answer is $5.", "$5"),
        (gsm8k, "<think>3</think><answer>42</answer>", "42"),
        (gsm8k, "6 x 7\n#### 42", "42"),
        (boxed, r"<think>\boxed{1}", None),
        (partial(boxed, unfinished_thought="judged"), r"<think>\boxed{1}", "1"),
        (boxed, r"<think>\boxed{1}</think>\boxed{2}", "2"),
    ],
)
def test_the_answer_that_is_judged(reward, completion, extracted):
    assert reading_of(reward).extract(completion, "") == extracted


def test_a_thought_that_the_template_opened_is_no_answer():
    assert reading_of(boxed).extract(r"\boxed{1}", "<|assistant|><think>\n") is None


def right_from(*entries):
    (function,), _ = from_names(entries)
    found = reading_of(function)
    return found and found.right


def test_what_a_right_answer_earns_at_least():
    assert right_from("boxed") == 1.0 and right_from("gsm8k") == 1.5
    assert right_from("perception_reward") == 0.9 and right_from("gsm8k_reward") == 1.5
    assert right_from("think_format") is None
    assert right_from({"cosine_length": {"max_length": 9}}) is None
    for reward, answer in (("perception_reward", r"\boxed{7}"), ("gsm8k_reward", "7")):
        (function,), _ = from_names([reward])
        forms = ["{}", "<think>x</think>{}", "<think>x</think><answer>{}</answer>"]
        for form in forms:
            right, wrong = function([form.format(answer), form.format("8")], answer=["7", "7"])
            assert right >= reading_of(function).right > wrong


def test_votes_count_answers_that_are_the_same():
    vote = reading_of(boxed).same
    assert vote("1/2", r"\frac{1}{2}") and vote("(B)", "B") and not vote("2", "3")
    pytest.importorskip("math_verify")
    formula = reading_of(math_verify).same
    assert formula("x(x+1)", "x^2+x") and not formula("x(x+1)", "x^2") and not formula("5", "...")


def completion(text, reward, question=0, mode="sampled"):
    rewards = {"boxed": reward}
    row = {"mode": mode, "question": question, "completion": text, "tokens": 1}
    return {**row, "generation_prompt": "", "rewards": rewards}


def test_completions_without_a_reward_take_no_part():
    nan = float("nan")
    rows = [completion(r"\boxed{1}", 1.0), completion(r"\boxed{2}", nan), completion("", 0.0)]
    rows += [completion("", nan, 1), completion("", nan, 1), completion("", 0.0, 1)]
    verdicts = measures.Verdicts("boxed", 1.0, reading_of(boxed))
    found = {m.metric: m.mean for m in measures.of_samples(rows, verdicts, [1, 2, 3])}
    # Question 0 has two completions, of which one is right; question 1 has one, and that is wrong.
    assert found == {"boxed/pass@1": 0.25, "boxed/pass@2": 1.0, "boxed/maj@2": 0.5}
    silent = [completion("", nan), completion("", nan)]
    assert measures.of_samples(silent, verdicts, [1]) == []


def test_a_file_of_an_earlier_form_is_refused_with_what_to_do(capsys):
    Path("run").mkdir()
    Path("run/eval.csv").write_text("model,data,split,questions,mode,metric,samples,mean,std\n")
    status, _, err = cppo(capsys, *EVAL)
    assert status == 2 and "has other columns" in err and "give another file" in err
    assert command._COLUMNS[-1] == "stderr"
