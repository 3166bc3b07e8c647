"""Short runs of the trainer: every family of options does what it says."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_cases import (
    config,
    digit_share,
    same,
    small_run,
    text_rows,
    tiny,
    trainer_for,
    weights_of,
)

from cppo.config import LoraConfig
from cppo.demo.digits import DigitSums
from cppo.model.forward import vision_tower
from cppo.model.load import load_model, load_processor
from cppo.questions import as_question
from cppo.questions.stream import QuestionStream
from cppo.rewards import completion_text
from cppo.train import evaluate as evaluate_module
from cppo.train.algorithm import cppo_update
from cppo.train.batch import Batch
from cppo.train.checkpoint import best_checkpoint, checkpoints, last_checkpoint, read_summary
from cppo.train.evaluate import evaluate
from cppo.train.progress import PhaseTimer, read_metrics
from cppo.train.scoring import RewardError
from cppo.train.trainer import CPPOTrainer
from cppo.train.views import token_logps


def random_reward(completions: list[Any], **columns: Any) -> list[float]:
    """Noise that depends on the completion alone: every group has a variance."""
    return [random.Random(completion_text(text)).random() for text in completions]


def moved(trainer: CPPOTrainer) -> dict[str, float]:
    """How far each parameter moved in a run of the trainer."""
    before = weights_of(trainer.model)
    trainer.train()
    after = weights_of(trainer.model)
    return {name: (after[name] - before[name]).abs().max().item() for name in before}


# A learning signal


def test_a_learnable_reward_rises(tmp_path: Path) -> None:
    options = dict(max_steps=12, batch_size=32, group_size=16, prune_rate=0.5, learning_rate=1e-2)
    last = trainer_for(tmp_path, **options).train()
    rewards = [row["reward/mean"] for row in read_metrics(tmp_path)]
    assert len(rewards) == 12 and last["reward/mean"] == rewards[-1]
    assert sum(rewards[:2]) / 2 < 0.1 and sum(rewards[-2:]) / 2 > 0.3


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl"])
def test_the_seed_decides_everything(family: str, tmp_path: Path) -> None:
    results = []
    for run, seed in enumerate((3, 3, 4)):
        torch.manual_seed(run)  # what the caller did with the global generator has no say
        trainer = trainer_for(tmp_path / str(run), family, rewards=random_reward, seed=seed)
        trainer.train()
        results.append(weights_of(trainer.model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


# The options of the update


def test_several_passes_and_steps_take_old_log_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []
    monkeypatch.setattr(
        "cppo.train.update.token_logps", lambda *a: (calls.append(token_logps(*a)), calls[-1])[1]
    )
    options = dict(rewards=random_reward, lr_scheduler="linear", learning_rate=1e-2)
    trainer = trainer_for(tmp_path, num_iterations=2, optimizer_steps=2, **options)
    last = trainer.train()
    assert len(calls) == 2  # once per rollout
    assert {int(s["step"]) for s in trainer.optimizer.state.values()} == {8}
    # Linear over 2 x 2 x 2 optimizer steps: the fourth and the eighth had 5/8 and 1/8 of the rate.
    assert trainer.history[0]["learning_rate"] == pytest.approx(5 / 8 * 1e-2)
    assert last["learning_rate"] == pytest.approx(1 / 8 * 1e-2)
    assert trainer.history[0]["clip_fraction"] > 0
    on_policy = trainer_for(tmp_path / "one", **options)
    on_policy.train()
    assert len(calls) == 2 and on_policy.history[0]["clip_fraction"] == 0


def test_kl_holds_the_policy_at_a_reference_that_never_moves(tmp_path: Path) -> None:
    options = dict(rewards=random_reward, max_steps=4, learning_rate=5e-3)
    trainer = trainer_for(tmp_path / "kl", kl_coef=3.0, **options)
    reference = weights_of(trainer.reference)
    assert same(reference, weights_of(trainer.model))
    trainer.train()
    assert same(reference, weights_of(trainer.reference))
    assert not any(p.requires_grad for p in trainer.reference.parameters())
    held = [row["kl"] for row in trainer.history]
    assert held[0] == pytest.approx(0, abs=1e-9) and held[-1] > 0

    free = trainer_for(tmp_path / "free", **options)
    free.train()

    def distance(run: CPPOTrainer) -> float:
        final = weights_of(run.model)
        return sum((final[name] - reference[name]).square().sum().item() for name in reference)

    assert free.reference is None and "kl" not in free.history[-1]
    assert distance(trainer) < distance(free)


def test_lora_trains_its_adapters_alone_against_the_model_without(tmp_path: Path) -> None:
    options = dict(rewards=random_reward, kl_coef=0.1, lora=LoraConfig(r=2, alpha=4), max_steps=3)
    trainer = trainer_for(tmp_path, **options)
    assert trainer.reference is None
    changes = moved(trainer)
    assert all(
        (change > 0) == ("lora_B" in name or "lora_A" in name) for name, change in changes.items()
    )
    kl = [row["kl"] for row in trainer.history]
    assert kl[0] == 0.0 and kl[-1] > 0
    folder = last_checkpoint(tmp_path)
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    # The adapters' start follows the seed, not the caller's generator.
    torch.manual_seed(123)
    again = trainer_for(tmp_path / "again", **options)
    again.train()
    assert same(weights_of(again.model), weights_of(trainer.model))


def test_lora_over_a_frozen_vision_tower_leaves_it_alone(tmp_path: Path) -> None:
    options = dict(rewards=random_reward, lora=LoraConfig(r=2, alpha=4))
    frozen = trainer_for(tmp_path / "a", "qwen2_5_vl", freeze_vision_tower=True, **options)
    seeing = trainer_for(tmp_path / "b", "qwen2_5_vl", **options)
    adapted = [
        {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        for trainer in (frozen, seeing)
    ]
    assert not any("visual" in name for name in adapted[0])
    assert any("visual" in name for name in adapted[1])
    frozen.train()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_frozen_vision_tower_does_not_move(family: str, tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path, family, rewards=random_reward, freeze_vision_tower=True, cpl_coef=0.5
    )
    tower = {id(p) for p in vision_tower(trainer.model).parameters()}
    names = {name for name, p in trainer.model.named_parameters() if id(p) in tower}
    changes = moved(trainer)
    assert names and all((change == 0) == (name in names) for name, change in changes.items())
    assert trainer.history[-1]["perception_share"] > 0


def test_gradient_checkpointing_trains_alike(tmp_path: Path) -> None:
    results = []
    for enabled in (False, True):
        trainer = trainer_for(
            tmp_path / str(enabled),
            "qwen2_5_vl",
            rewards=random_reward,
            gradient_checkpointing=enabled,
            max_steps=1,
        )
        assert trainer.model.is_gradient_checkpointing == enabled
        trainer.train()
        results.append(weights_of(trainer.model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-6)


def test_bf16_keeps_fp32_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    from cppo.train.views import packed_hidden

    def watch(*arguments: Any) -> Tensor:
        hidden = packed_hidden(*arguments)
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return hidden

    monkeypatch.setattr("cppo.train.views.packed_hidden", watch)
    trainer = trainer_for(tmp_path, "qwen2_5_vl", precision="bf16", rewards=random_reward)
    changes = moved(trainer)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert max(changes.values()) > 0


def test_dropping_groups_of_equal_reward(tmp_path: Path) -> None:
    def only_even(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        noise = random_reward(completions)
        return [x if int(a) % 4 == 0 else 1.0 for x, a in zip(noise, answer, strict=True)]

    rows = text_rows(2)  # answers 0 and 2: the second question's rewards are all 1
    options = dict(rewards=only_even, rows=rows, log_completions=8, max_steps=1, max_refills=0)
    for drop, kept in ((False, 8), (True, 4)):
        trainer = trainer_for(tmp_path / str(drop), drop_zero_variance=drop, **options)
        row = trainer.train()
        assert row["reward/zero_variance_share"] == 0.5
        assert row["kept_share"] == kept / 8
        for line in lines(tmp_path / str(drop) / "completions.jsonl"):
            assert line["kept"] == (not drop or line["answer"] == "0")


def test_groups_of_equal_reward_are_replaced_until_the_batch_is_full(tmp_path: Path) -> None:
    def only_even(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        noise = random_reward(completions)
        return [x if int(a) % 4 == 0 else 1.0 for x, a in zip(noise, answer, strict=True)]

    options = dict(
        rewards=only_even, rows=text_rows(8), drop_zero_variance=True, batch_size=16, max_refills=9
    )
    trainer = trainer_for(tmp_path, **options)
    asked = []
    draw = trainer.draw_questions
    trainer.draw_questions = lambda n=None: (asked.append(n), draw(n))[1]  # type: ignore
    updates = []
    update = trainer.update
    trainer.update = lambda batch, timer: (updates.append(batch), update(batch, timer))[1]  # type: ignore
    trainer.train()
    for batch in updates:
        assert len(batch.kept) == 16
        answers = [batch.rollouts.question_of(row).columns["answer"] for row in batch.kept.tolist()]
        assert all(int(answer) % 4 == 0 for answer in answers)
        assert len(batch.rollouts.texts) == len(batch.advantages) > 16
        # The first and the refilled questions have the same padding on both sides.
        assert batch.rollouts.attention_mask.shape == batch.rollouts.completion_mask.shape
    assert asked[0] == 4 and len(asked) > 2 and min(asked) < 4
    assert trainer.questions.position == sum(asked)


def test_refilling_ends_with_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def equal(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    trainer = trainer_for(
        tmp_path, rewards=equal, drop_zero_variance=True, max_refills=2, max_steps=1
    )
    row = trainer.train()
    assert trainer.questions.position == 6  # two questions, drawn three times
    assert row["kept_share"] == 0 and row["loss"] == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "step 1: 0 of 8 completions after 2 refills (6 questions)" in said
    assert "raise max_refills" in said


@pytest.mark.parametrize("share_prompts", [False, True])
def test_how_full_micro_batches_are_is_reported(share_prompts: bool, tmp_path: Path) -> None:
    budget = 60
    options = dict(max_tokens_per_microbatch=budget, share_prompts=share_prompts, num_iterations=2)
    trainer = trainer_for(tmp_path, rewards=random_reward, **options)
    rollouts = trainer.sample(trainer.draw_questions())
    batches: list[Batch] = []
    update = trainer.new_update(PhaseTimer(), batches.append)
    cppo_update(update, rollouts, torch.tensor(random_reward(rollouts.texts)))
    fill, batch = update.metrics()["microbatch_fill"], batches[0]
    parts = [rows.tolist() for rows in batch.microbatches(batch.kept, budget)]
    assert len(parts) > 1
    prompts = (rollouts.attention_mask & ~rollouts.completion_mask).sum(1).tolist()
    # A shared prompt counts once in every micro-batch that its question is in.
    counted = [{row // 4 * 4 for row in rows} if share_prompts else rows for rows in parts]
    tokens = sum(prompts[row] for rows in counted for row in rows)
    tokens += int(rollouts.completion_mask[batch.kept].sum())
    assert fill == pytest.approx(tokens / (budget * len(parts)))
    assert 0.3 < fill <= 1


def test_nothing_to_learn_moves_nothing(tmp_path: Path) -> None:
    def equal(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    trainer = trainer_for(tmp_path, rewards=equal, drop_zero_variance=True, weight_decay=0.5)
    assert max(moved(trainer).values()) == 0
    assert trainer.history[-1]["loss"] == 0.0 and trainer.history[-1]["kept_share"] == 0
    assert trainer.step == 2


def test_overlong_completions_count_for_advantages_only(tmp_path: Path) -> None:
    # The tiny model hardly ever closes: everything is cut, nothing is left to train on.
    trainer = trainer_for(tmp_path, rewards=random_reward, mask_overlong=True, max_steps=1)
    row = trainer.train()
    assert row["completion/truncated_share"] > 0.5
    assert row["kept_share"] == pytest.approx(1 - row["completion/truncated_share"])
    assert row["reward/std"] > 0


def test_too_long_prompts_are_skipped(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi" * n, "answer": str(n)} for n in (1, 100, 2, 90)]
    trainer = trainer_for(tmp_path, rows=rows, max_prompt_tokens=60, log_completions=8)
    trainer.train()
    answers = {line["answer"] for line in lines(tmp_path / "completions.jsonl")}
    assert answers == {"1", "2"}
    with pytest.raises(ValueError, match="no question of train_dataset .* max_prompt_tokens = 3"):
        trainer_for(tmp_path / "none", rows=rows, max_prompt_tokens=3)


@pytest.mark.parametrize(
    ("options", "sampled", "kept"),
    [
        (dict(prune_rate=0.0), 8, 8),
        (dict(prune_rate=0.5), 16, 8),
        (dict(prune_rate=0.75), 32, 8),
        (dict(prune_rate=0.5, dynamic_allocation=False), 8, 4),
        (dict(prune_rate=0.5, prune_scope="batch"), 16, 8),
        (dict(prune_rate=0.5, prune="largest"), 16, 8),
        (dict(prune_rate=0.5, prune="random"), 16, 8),
        (dict(prune_rate=0.25, batch_size=7), 12, 7),  # 3 kept of each of 3 questions, 2 cut
        (dict(scale_rewards="none"), 8, 8),
        (dict(scale_rewards="batch"), 8, 8),
    ],
    ids=str,
)
def test_how_many_are_sampled_and_kept(
    options: dict[str, Any], sampled: int, kept: int, tmp_path: Path
) -> None:
    trainer = trainer_for(tmp_path, rewards=random_reward, **options)
    questions = trainer.draw_questions()
    rollouts = trainer.sample(questions)
    rewards = torch.tensor(random_reward(rollouts.texts))
    batch = trainer.make_batch(rollouts, rewards)
    assert len(rollouts.texts) == sampled and len(batch.kept) == kept
    scale = options.get("scale_rewards", "group")
    groups = rewards.view(-1, 4)
    expected = groups - groups.mean(1, keepdim=True)
    if scale != "none":
        std = rewards.std() if scale == "batch" else groups.std(1, keepdim=True)
        expected = expected / (std + 1e-4)
    torch.testing.assert_close(batch.advantages.view(-1, 4), expected, rtol=1e-4, atol=1e-5)
    if options.get("prune") == "largest":
        dropped = sorted(set(range(sampled)) - set(batch.kept.tolist()))
        size = batch.advantages.abs().view(-1, 4)
        assert size.flatten()[dropped].view(-1, 2).amin(1).ge(size.median(1).values).all()


def test_rewards_are_weighted(tmp_path: Path) -> None:
    def length(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    trainer = trainer_for(
        tmp_path, rewards=[length, digit_share], reward_weights=(0.1, 2.0), max_steps=1
    )
    row = trainer.train()
    expected = 0.1 * row["reward/length"] + 2 * row["reward/digit_share"]
    assert row["reward/mean"] == pytest.approx(expected, rel=1e-5)


def test_questions_come_once_per_epoch_in_an_order_of_the_seed() -> None:
    rows = text_rows(5)

    def drawn(seed: int, start: int = 0) -> list[str]:
        stream = QuestionStream(rows, seed)
        stream.position = start
        return [next(stream).columns["answer"] for _ in range(10)]

    assert sorted(drawn(0)[:5]) == sorted(drawn(0)[5:]) == ["0", "2", "4", "6", "8"]
    assert drawn(0)[:5] != drawn(0)[5:]
    assert drawn(0) != drawn(1)
    assert drawn(0, start=3)[:7] == drawn(0)[3:]


# What is written


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_table_and_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_for(
        tmp_path,
        "qwen2_5_vl",
        rewards=random_reward,
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
        "step", "eval/sampled/random_reward", "eval/sampled/reward", "eval/sampled/tokens",
        "eval/greedy/random_reward", "eval/greedy/reward", "eval/greedy/tokens",
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
    assert written[0]["reward"] == pytest.approx(random_reward([written[0]["completion"]])[0])

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


def test_log_every_thins_the_table_not_the_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_for(tmp_path, rewards=random_reward, max_steps=4, log_every=2).train()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert {row["step"] for row in lines(tmp_path / "completions.jsonl")} == {2, 4}
    first = [line.split()[:1] for line in capsys.readouterr().out.splitlines()]
    assert ["2"] in first and ["4"] in first and ["1"] not in first and ["3"] not in first


def scripted(values: list[float]) -> Any:
    """An evaluation that gives these values, one after the other."""
    left = iter(values)
    return lambda self: {"eval/sampled/digit_share": next(left), "eval/other": 0.5}


def test_best_and_last_checkpoints_and_which_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_without_save_every_the_best_and_the_last_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CPPOTrainer, "_evaluation", scripted([0.9, 0.2, 0.5, 0.5, 0.3, 0.2]))
    trainer_for(
        tmp_path, eval_every=1, eval_rows=text_rows(1), max_steps=5, keep_checkpoints=9
    ).train()
    # A tie is no improvement.
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["1", "2", "5"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
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


def test_evaluation_averages_over_questions_then_over_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = tiny("text")
    questions = [as_question(row) for row in text_rows(3)]
    # Reward of question q in sampled pass s; the greedy one comes after.
    table = {"0": [1.0, 0.0], "2": [0.0, 0.0], "4": [1.0, 1.0]}
    greedy = {"0": 1.0, "2": 0.0, "4": 0.0}
    modes = []
    stock = evaluate_module.sample_completions

    def watch(*arguments: Any, **options: Any) -> Any:
        modes.append((options["temperature"], options["group_size"], len(arguments[2].questions)))
        return stock(*arguments, **options)

    monkeypatch.setattr(evaluate_module, "sample_completions", watch)

    def stub(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
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


def test_evaluation_repeats_and_leaves_training_alone(tmp_path: Path) -> None:
    rows = DigitSums("heldout", 4)
    options = dict(rewards=random_reward, max_completion_tokens=4)
    trainer = trainer_for(tmp_path / "a", "qwen2_5_vl", eval_rows=rows, eval_every=1, **options)
    assert trainer.evaluate() == trainer.evaluate()
    trainer.train()
    without = trainer_for(tmp_path / "b", "qwen2_5_vl", **options)
    without.train()
    assert same(weights_of(trainer.model), weights_of(without.model))


# A reward that fails


@pytest.mark.parametrize("kind", ["raises", "nan"])
def test_a_failing_reward_stops_the_run_and_leaves_the_last_checkpoint(
    kind: str, tmp_path: Path
) -> None:
    calls = 0

    def digits(completions: list[str], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        values = digit_share(completions)
        if calls >= 3:
            if kind == "raises":
                raise KeyError("no such answer")
            values[5] = math.nan
        return values

    options = dict(max_steps=4, save_every=1, rewards=digits)
    words = "KeyError: 'no such answer'" if kind == "raises" else "returned nan"
    with pytest.raises(RewardError, match=f"reward function 'digits' failed .{words}") as error:
        trainer_for(tmp_path, **options).train()
    words = r"question of row \d: \[{'role': 'user', 'content': 'What is"
    assert re.search(words, str(error.value))
    assert "completion: '" in str(error.value)
    assert last_checkpoint(tmp_path).name == "checkpoint-000002"

    def repaired(completions: list[str], **columns: Any) -> list[float]:
        return digit_share(completions)

    repaired.__name__ = "digits"
    with pytest.raises(ValueError, match=r"changed: rewards \(was .*resume_with_changes=True"):
        trainer_for(tmp_path, **{**options, "rewards": repaired}).train(resume_from="auto")
    resumed = trainer_for(tmp_path, **{**options, "rewards": repaired, "resume_with_changes": True})
    resumed.train(resume_from="auto")
    whole = trainer_for(tmp_path / "whole", **{**options, "rewards": repaired})
    whole.train()
    assert same(weights_of(resumed.model), weights_of(whole.model))


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, rewards=random_reward)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match="gradient of step 0 is not finite .norm nan."):
        trainer.train()


def test_dr_grpo_divides_by_the_longest_completion_there_may_be(tmp_path: Path) -> None:
    options = small_run(tmp_path, reduction="dr_grpo", max_completion_tokens=6)
    assert options.loss.max_length == 6
    assert small_run(tmp_path, reduction="dr_grpo", max_length=9).loss.max_length == 9
    assert small_run(tmp_path).loss.max_length is None
    trainer_for(tmp_path, reduction="dr_grpo", rewards=random_reward).train()


@pytest.mark.parametrize(("minutes", "saved"), [(1e-9, [1, 2, 3]), (30.0, [3]), (0.0, [3])])
def test_checkpoints_by_time(tmp_path: Path, minutes: float, saved: list[int]) -> None:
    options = dict(max_steps=3, keep_checkpoints=9)
    trainer_for(tmp_path, save_minutes=minutes, **options).train()
    assert [int(path.name[-6:]) for path in checkpoints(tmp_path)] == saved
