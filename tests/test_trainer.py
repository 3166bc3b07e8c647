"""Short runs of the trainer: every family of options does what it says."""

import math
import re
from unittest.mock import patch

import pytest
import torch
from trainer_cases import (
    digit_share,
    lines,
    noise,
    same,
    small_run,
    text_rows,
    trainer_for,
    weights_of,
)

from cppo.model.wrappers import vision_tower
from cppo.options.trainer import LoraConfig
from cppo.train import algorithm
from cppo.train.algorithm import cppo_update
from cppo.train.checkpoint import last_checkpoint
from cppo.train.progress import PhaseTimer, read_metrics
from cppo.train.scoring import RewardError
from cppo.train.views import token_logps


def moved(trainer):
    """How far each parameter moved in a run of the trainer."""
    before = weights_of(trainer.model)
    trainer.train()
    after = weights_of(trainer.model)
    return {name: (after[name] - before[name]).abs().max().item() for name in before}


# A learning signal


def test_a_learnable_reward_rises(tmp_path):
    options = dict(max_steps=12, batch_size=32, group_size=16, prune_rate=0.5, learning_rate=1e-2)
    last = trainer_for(tmp_path, **options).train()
    rewards = [row["reward/mean"] for row in read_metrics(tmp_path)]
    assert len(rewards) == 12 and last["reward/mean"] == rewards[-1]
    assert sum(rewards[:2]) / 2 < 0.1 and sum(rewards[-2:]) / 2 > 0.3


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl"])
def test_the_seed_decides_everything(family, tmp_path):
    results = []
    for run, seed in enumerate((3, 3, 4)):
        torch.manual_seed(run)  # what the caller did with the global generator has no say
        trainer = trainer_for(tmp_path / str(run), family, rewards=noise, seed=seed)
        trainer.train()
        results.append(weights_of(trainer.model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_a_step_that_an_error_broke_off_leaves_no_gradient(tmp_path, monkeypatch):
    loss, results = algorithm.microbatch_loss, []
    for done in (0, 1):  # micro-batches before the error
        calls = []

        def breaks(*given, calls=calls, done=done):
            if len(calls) == done:
                raise MemoryError
            calls.append(given)
            return loss(*given)

        options = dict(rewards=noise, max_tokens_per_microbatch=20)
        trainer = trainer_for(tmp_path / str(done), **options)
        monkeypatch.setattr(algorithm, "microbatch_loss", breaks)
        with pytest.raises(MemoryError):
            trainer.train_step()
        monkeypatch.setattr(algorithm, "microbatch_loss", loss)
        assert len(calls) == done
        trainer.train_step()
        results.append(weights_of(trainer.model))
    assert same(*results)


# The options of the update


def test_several_passes_and_steps_take_old_log_probabilities(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "cppo.train.update.token_logps", lambda *a: (calls.append(token_logps(*a)), calls[-1])[1]
    )
    options = dict(rewards=noise, lr_scheduler="linear", learning_rate=1e-2)
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


def test_lora_trains_its_adapters_alone_against_the_model_without(tmp_path):
    options = dict(rewards=noise, kl_coef=0.1, lora=LoraConfig(r=2, alpha=4), max_steps=3)
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


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_frozen_vision_tower_does_not_move(family, tmp_path):
    trainer = trainer_for(tmp_path, family, rewards=noise, freeze_vision_tower=True, cpl_coef=0.5)
    tower = {id(p) for p in vision_tower(trainer.model).parameters()}
    names = {name for name, p in trainer.model.named_parameters() if id(p) in tower}
    changes = moved(trainer)
    assert names and all((change == 0) == (name in names) for name, change in changes.items())
    assert trainer.history[-1]["perception_share"] > 0


def test_a_run_says_that_it_contrasts(tmp_path, capsys):
    trainer_for(tmp_path / "on", "qwen2_5_vl", cpl_coef=0.5)
    on = "contrastive perception is on (loss.cpl_coef = 0.5): completions with A > 0 also run under"
    off = "two perturbed views of their images; loss.cpl_coef = 0 turns it off"
    assert f"{on} {off}" in " ".join(capsys.readouterr().out.split())
    trainer_for(tmp_path / "all", "qwen2_5_vl", cpl_coef=0.5, gating=False)
    assert "0.5): all completions also" in capsys.readouterr().out
    trainer_for(tmp_path / "off", "qwen2_5_vl", cpl_coef=0.0)
    trainer_for(tmp_path / "text", cpl_coef=0.5)
    assert "contrastive" not in capsys.readouterr().out
    trainer_for(tmp_path / "vain", "qwen2_5_vl", cpl_coef=0.0, tau=0.2, perception="cpl_all")
    how = "with loss.perception = 'cpl_all' and loss.cpl_coef = 0"
    on = "loss.cpl_coef = 0.01 turns contrastive perception on"
    vain = f"loss.perception, loss.tau have no effect {how}; {on}"
    assert vain in capsys.readouterr().out


def test_bf16_keeps_fp32_weights(tmp_path, monkeypatch):
    seen = []
    from cppo.train.views import hidden_states

    def watch(*arguments):
        hidden = hidden_states(*arguments)
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return hidden

    monkeypatch.setattr("cppo.train.views.hidden_states", watch)
    trainer = trainer_for(tmp_path, "qwen2_5_vl", precision="bf16", rewards=noise)
    changes = moved(trainer)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert max(changes.values()) > 0


def only_even(completions, answer, **columns):
    """Noise for every second question, 1 for the others."""
    pairs = zip(noise(completions), answer, strict=True)
    return [x if int(a) % 4 == 0 else 1.0 for x, a in pairs]


def equal(completions, **columns):
    return [1.0] * len(completions)


def test_dropping_groups_of_equal_reward(tmp_path):
    rows = text_rows(2)  # answers 0 and 2: the second question's rewards are all 1
    options = dict(rewards=only_even, rows=rows, log_completions=8, max_steps=1, max_refills=0)
    for drop, kept in ((False, 8), (True, 4)):
        trainer = trainer_for(tmp_path / str(drop), drop_zero_variance=drop, **options)
        row = trainer.train()
        assert row["reward/zero_variance_share"] == 0.5
        assert row["kept_share"] == kept / 8
        for line in lines(tmp_path / str(drop) / "completions.jsonl"):
            assert line["kept"] == (not drop or line["answer"] == "0")


def test_groups_of_equal_reward_are_replaced_until_the_batch_is_full(tmp_path):
    options = dict(
        rewards=only_even, rows=text_rows(8), drop_zero_variance=True, batch_size=16, max_refills=9
    )
    trainer = trainer_for(tmp_path, **options)
    asked = []
    batches = []
    draw, select = trainer.questions.draw, algorithm.select
    trainer.questions.draw = lambda n: (asked.append(n), draw(n))[1]
    with patch.object(algorithm, "select", lambda *a: (batches.append(select(*a)), batches[-1])[1]):
        trainer.train()
    for batch in batches:
        assert len(batch.kept) == 16
        answers = [batch.rollouts.question_of(i).columns["answer"] for i in batch.kept.tolist()]
        assert all(int(answer) % 4 == 0 for answer in answers)
        assert len(batch.rollouts.texts) == len(batch.advantages) > 16
        # The first and the refilled questions have the same padding on both sides.
        assert batch.rollouts.attention_mask.shape == batch.rollouts.completion_mask.shape
    assert asked[0] == 4 and len(asked) > 2 and min(asked) < 4
    assert trainer.questions.position == sum(asked)


def test_refilling_ends_with_words(tmp_path, capsys, recwarn):
    options = dict(drop_zero_variance=True, max_refills=2, max_steps=1, weight_decay=0.5)
    trainer = trainer_for(tmp_path, rewards=equal, **options)
    assert max(moved(trainer).values()) == 0  # nothing to learn
    assert not [one for one in recwarn if "lr_scheduler" in str(one.message)]  # torch's own advice
    row = trainer.history[-1]
    assert trainer.step == 1
    assert trainer.questions.position == 6  # two questions, drawn three times
    assert row["kept_share"] == 0 and row["loss"] == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "step 1: 0 of 8 completions after 2 refills (6 questions)" in said
    assert "raise max_refills" in said


@pytest.mark.parametrize("share_prompts", [False, True])
def test_how_full_micro_batches_are_is_reported(share_prompts, tmp_path):
    budget = 60
    options = dict(max_tokens_per_microbatch=budget, share_prompts=share_prompts, num_iterations=2)
    trainer = trainer_for(tmp_path, rewards=noise, **options)
    rollouts = trainer.sample(trainer.draw_questions())
    batches = []
    update = trainer.new_update(PhaseTimer(), batches.append)
    cppo_update(update, rollouts, torch.tensor(noise(rollouts.texts)))
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


def test_overlong_completions_count_for_advantages_only(tmp_path):
    # The tiny model hardly ever closes: everything is cut, nothing is left to train on.
    trainer = trainer_for(tmp_path, rewards=noise, mask_overlong=True, max_steps=1)
    row = trainer.train()
    assert row["completion/truncated_share"] > 0.5
    assert row["kept_share"] == pytest.approx(1 - row["completion/truncated_share"])
    assert row["reward/std"] > 0


def test_too_long_prompts_are_skipped(tmp_path):
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
def test_how_many_are_sampled_and_kept(options, sampled, kept, tmp_path):
    trainer = trainer_for(tmp_path, rewards=noise, **options)
    questions = trainer.draw_questions()
    rollouts = trainer.sample(questions)
    rewards = torch.tensor(noise(rollouts.texts))
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


# A reward that fails


@pytest.mark.parametrize("kind", ["raises", "nan"])
def test_a_failing_reward_stops_the_run_and_leaves_the_last_checkpoint(kind, tmp_path):
    calls = 0

    def digits(completions, **columns):
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

    def repaired(completions, **columns):
        return digit_share(completions)

    repaired.__name__ = "digits"
    with pytest.raises(ValueError, match=r"changed: rewards \(was .*resume_with_changes=True"):
        trainer_for(tmp_path, **{**options, "rewards": repaired}).train(resume_from="auto")
    resumed = trainer_for(tmp_path, **{**options, "rewards": repaired, "resume_with_changes": True})
    resumed.train(resume_from="auto")
    whole = trainer_for(tmp_path / "whole", **{**options, "rewards": repaired})
    whole.train()
    assert same(weights_of(resumed.model), weights_of(whole.model))


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    trainer = trainer_for(tmp_path, rewards=noise)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match="gradient of step 0 is not finite .norm nan."):
        trainer.train()


def test_dr_grpo_divides_by_the_longest_completion_there_may_be(tmp_path):
    options = small_run(tmp_path, reduction="dr_grpo", max_completion_tokens=6)
    assert options.loss.max_length == 6
    assert small_run(tmp_path, reduction="dr_grpo", max_length=9).loss.max_length == 9
    assert small_run(tmp_path).loss.max_length is None
    trainer_for(tmp_path, reduction="dr_grpo", rewards=noise).train()
