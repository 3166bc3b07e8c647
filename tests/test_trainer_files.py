"""What a run writes, how it evaluates, and the order of its questions."""

import math

import pytest
from trainer_cases import config, lines, noise, same, text_rows, tiny, trainer_for, weights_of

from cppo.demo.digits import DigitSums
from cppo.model.load import load_model, load_processor
from cppo.questions import as_question
from cppo.questions.stream import QuestionStream
from cppo.train import evaluate as evaluate_module
from cppo.train.checkpoint import best_checkpoint, checkpoints, last_checkpoint
from cppo.train.evaluate import Share, evaluate
from cppo.train.progress import read_metrics
from cppo.train.sealed import read_summary
from cppo.train.trainer import CPPOTrainer

# What is written


def test_files_table_and_tensorboard(tmp_path, capsys):
    trainer = trainer_for(
        tmp_path,
        "qwen2_5_vl",
        rewards=noise,
        eval_rows=DigitSums("heldout", 3),
        trackers=("tensorboard",),
        max_steps=3,
        log_every=1,
        max_completion_tokens=3,
    )
    last = trainer.train()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[-1] == last
    assert {name for name in rows[0]} == {
        "step", "eval/sampled/noise", "eval/sampled/reward", "eval/sampled/tokens",
        "eval/greedy/noise", "eval/greedy/reward", "eval/greedy/tokens",
    }  # fmt: skip
    phases = {"rollout", "reward", "forward", "backward", "optimizer", "step"}
    assert {f"time/{phase}" for phase in phases} <= rows[1].keys()
    assert {"loss", "policy_loss", "cpl_loss", "perception_share", "grad_norm"} <= rows[1].keys()
    assert "eval/sampled/reward" in last and "eval/sampled/reward" not in rows[1]
    assert all(math.isfinite(value) for row in rows for value in row.values())

    written = lines(tmp_path / "completions.jsonl")
    assert [row["step"] for row in written] == [1, 1, 2, 2, 3, 3]
    assert written[0].keys() == {
        "step", "question", "answer", "completion", "reward", "advantage", "kept",
    }  # fmt: skip
    assert written[0]["reward"] == pytest.approx(noise([written[0]["completion"]])[0])

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert logged == [(row["step"], pytest.approx(row["reward/mean"])) for row in rows[1:]]

    printed = capsys.readouterr().out.splitlines()
    header = next(line.split() for line in printed if line.split()[:1] == ["step"])
    assert header == [
        "step", "reward", "kept", "loss", "cpl", "percept", "entropy", "grad", "tokens", "sec",
    ]  # fmt: skip
    table = [line.split() for line in printed if line.split()[:1] in (["1"], ["2"], ["3"])]
    assert [len(line) for line in table] == [len(header)] * 3
    assert float(table[0][1]) == pytest.approx(rows[1]["reward/mean"], abs=6e-4)
    assert sum("held-out after" in line for line in printed) == 2


def test_log_every_thins_the_table_not_the_metrics(tmp_path, capsys):
    trainer_for(tmp_path, rewards=noise, max_steps=4, log_every=2).train()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert {row["step"] for row in lines(tmp_path / "completions.jsonl")} == {2, 4}
    first = [line.split()[:1] for line in capsys.readouterr().out.splitlines()]
    assert ["2"] in first and ["4"] in first and ["1"] not in first and ["3"] not in first


def scripted(values):
    """An evaluation that gives these values, one after the other."""
    left = iter(values)
    return lambda self: {"eval/sampled/digit_share": next(left), "eval/other": 0.5}


def test_best_and_last_checkpoints_and_which_are_kept(tmp_path, monkeypatch):
    values = [0.9, 0.2, 0.5, 0.1, 0.3, 0.2]
    monkeypatch.setattr(CPPOTrainer, "_evaluation", scripted(values))
    trainer = trainer_for(
        tmp_path,
        eval_every=1,
        eval_rows=text_rows(1),
        save_every=1,
        keep_checkpoints=2,
        max_steps=5,
        log_completions=0,
    )
    trainer.train()
    # After steps 1 to 5; what was measured before training has no checkpoint.
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-000002",
        "checkpoint-000004",
        "checkpoint-000005",
    ]
    assert best_checkpoint(tmp_path).name == "checkpoint-000002"
    assert last_checkpoint(tmp_path).name == "checkpoint-000005"
    assert read_summary(best_checkpoint(tmp_path))["metric"] == 0.5
    model = load_model(last_checkpoint(tmp_path))
    assert same(weights_of(model), weights_of(trainer.model))
    assert load_processor(last_checkpoint(tmp_path)).chat_template


def test_the_best_of_another_metric_is_no_better(tmp_path, monkeypatch):
    tokens = iter([90.0, 20.0, 50.0])
    monkeypatch.setattr(
        CPPOTrainer, "_evaluation", lambda self: {"eval/sampled/tokens": next(tokens)}
    )
    options = dict(eval_every=1, eval_rows=text_rows(1), save_every=1, keep_checkpoints=9)
    trainer_for(tmp_path, max_steps=2, best_metric="sampled/tokens", **options).train()
    assert best_checkpoint(tmp_path).name == "checkpoint-000002"
    monkeypatch.setattr(CPPOTrainer, "_evaluation", scripted([0.1, 0.3, 0.2]))
    again = trainer_for(tmp_path, max_steps=5, **options)
    again.train("auto")
    assert again._run._best == 0.3
    assert best_checkpoint(tmp_path).name == "checkpoint-000004"


def test_without_save_every_the_best_and_the_last_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(CPPOTrainer, "_evaluation", scripted([0.9, 0.2, 0.5, 0.5, 0.3, 0.2]))
    options = dict(eval_every=1, eval_rows=text_rows(1), max_steps=5, keep_checkpoints=9)
    trainer_for(tmp_path, **options).train()
    # A tie is no improvement.
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["1", "2", "5"]


def test_the_best_that_was_not_written_is_no_best(tmp_path, monkeypatch):
    monkeypatch.setattr(CPPOTrainer, "_evaluation", scripted([0.1, 0.9, 0.5, 0.3]))
    options = dict(eval_every=2, eval_rows=text_rows(1), max_steps=6, keep_checkpoints=1)
    trainer = trainer_for(tmp_path, **options)
    stock = trainer.model.save_pretrained

    def full_in_step_2(*args, **kwargs):
        if trainer.step == 2:
            raise OSError(28, "No space left on device")
        stock(*args, **kwargs)

    trainer.model.save_pretrained = full_in_step_2
    trainer.train()
    assert best_checkpoint(tmp_path).name == "checkpoint-000004"


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for name in ("checkpoint-1000000", "checkpoint-999999", "checkpoint-old", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer.json").write_text('{"metric": null}')
    (tmp_path / "checkpoint-1000001").mkdir()  # not whole
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-999999",
        "checkpoint-1000000",
    ]
    assert last_checkpoint(tmp_path).name == "checkpoint-1000000"
    assert best_checkpoint(tmp_path) is None


# Evaluation


def test_evaluation_averages_over_questions_then_over_passes(monkeypatch):
    model, tokenizer = tiny("text")
    questions = [as_question(row) for row in text_rows(3)]
    # Reward of question q in sampled pass s; the greedy one comes after.
    table = {"0": [1.0, 0.0], "2": [0.0, 0.0], "4": [1.0, 1.0]}
    greedy = {"0": 1.0, "2": 0.0, "4": 0.0}
    modes = []
    stock = evaluate_module.sample_completions

    def watch(*arguments, **options):
        modes.append((options["temperature"], options["group_size"], len(arguments[2].questions)))
        return stock(*arguments, **options)

    monkeypatch.setattr(evaluate_module, "sample_completions", watch)

    def stub(completions, answer, **columns):
        if modes[-1][0] is None:
            return [greedy[a] for a in answer]
        return [table[a][i % 2] for i, a in enumerate(answer)]

    options = config(
        eval_samples=2, generation_batch_size=4, max_completion_tokens=3, temperature=0.7
    )
    result = evaluate(model, tokenizer, [stub], questions, config=options)
    # Two questions of two samples at once, then the third; the greedy ones together.
    assert modes == [(0.7, 2, 2), (0.7, 2, 1), (None, 1, 3)]
    # Passes: (1 + 0 + 1) / 3 and (0 + 0 + 1) / 3.
    assert result.metrics["sampled/stub"] == pytest.approx(0.5)
    assert result.metrics["sampled/stub_std"] == pytest.approx(math.sqrt(2 * (1 / 6) ** 2))
    assert result.metrics["greedy/stub"] == pytest.approx(1 / 3)
    assert "greedy/stub_std" not in result.metrics
    assert result.metrics["sampled/reward"] == result.metrics["sampled/stub"]
    assert [(r["mode"], r["question"], r["sample"]) for r in result.completions] == [
        *[("sampled", q, s) for q in range(3) for s in range(2)],
        *[("greedy", q, 0) for q in range(3)],
    ]
    assert [r["rewards"]["stub"] for r in result.completions[:6]] == sum(table.values(), [])


def test_each_process_evaluates_its_share_of_the_questions():
    model, tokenizer = tiny("text")
    questions = [as_question(row) for row in text_rows(3)]
    options = config(eval_greedy=False, max_completion_tokens=3)
    shares = []
    for rank in (0, 1):
        share = Share(rank, 2, lambda rows: shares.append(rows) or [rows])
        evaluate(model, tokenizer, [noise], questions, config=options, share=share)
    assert [[row["question"] for row in rows] for rows in shares] == [[0, 2], [1]]


def test_evaluation_repeats_and_leaves_training_alone(tmp_path):
    rows = DigitSums("heldout", 4)
    options = dict(rewards=noise, max_completion_tokens=4)
    trainer = trainer_for(tmp_path / "a", "qwen2_5_vl", eval_rows=rows, eval_every=1, **options)
    assert trainer.evaluate() == trainer.evaluate()
    trainer.train()
    without = trainer_for(tmp_path / "b", "qwen2_5_vl", **options)
    without.train()
    assert same(weights_of(trainer.model), weights_of(without.model))


@pytest.mark.parametrize(("minutes", "saved"), [(1e-9, [1, 2, 3]), (30.0, [3]), (0.0, [3])])
def test_checkpoints_by_time(tmp_path, minutes, saved):
    options = dict(max_steps=3, keep_checkpoints=9)
    trainer_for(tmp_path, save_minutes=minutes, **options).train()
    assert [int(path.name[-6:]) for path in checkpoints(tmp_path)] == saved


def test_questions_come_once_per_epoch_in_an_order_of_the_seed():
    rows = text_rows(5)

    def drawn(seed, start=0):
        stream = QuestionStream(rows, seed)
        stream.position = start
        return [next(stream).columns["answer"] for _ in range(10)]

    assert sorted(drawn(0)[:5]) == sorted(drawn(0)[5:]) == ["0", "2", "4", "6", "8"]
    assert drawn(0)[:5] != drawn(0)[5:]
    assert drawn(0) != drawn(1)
    assert drawn(0, start=3)[:7] == drawn(0)[3:]
