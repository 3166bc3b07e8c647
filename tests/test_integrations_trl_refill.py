"""Dynamic sampling in the TRL adapter: groups of equal rewards are dropped or drawn anew."""

import dataclasses
import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")

from trainer_cases import same, weights_of
from trl_cases import HALF, LOOK, late, logged, noise, rows_of, trainer_of, watched_run

from cppo.integrations import trl_options
from cppo.integrations.trl import check
from cppo.integrations.trl_options import check_run
from cppo.integrations.trl_refill import sample
from cppo.integrations.trl_rows import EQUAL, ROUNDED, settled

pytestmark = pytest.mark.skipif(not check()[-1].fits, reason="trl before 1.15")
DROP = dataclasses.replace(HALF, prune_rate=0.0, drop_zero_variance=True, max_refills=0)
FILL = dataclasses.replace(DROP, max_refills=4)


def sometimes(completions, prompts, **columns):
    """Equal rewards for half of the questions."""
    values = noise(completions)
    draws = [random.Random(prompt[-1]["content"]).random() for prompt in prompts]
    return [value if draw < 0.5 else 0.1 for value, draw in zip(values, draws, strict=True)]


def never(completions, **columns):
    return [0.1] * len(completions)


def run(cppo, *, rewards=sometimes, family="text", **options):
    options = dict(max_steps=3, num_iterations=1, loss_type="dapo", rows=rows_of(family)) | options
    return watched_run(family, cppo, rewards=rewards, **options)


def live(rollout):
    return (rollout["advantages"].abs() > 1e-4).sum().item()


def test_questions_of_equal_rewards_are_dropped():
    trainer, seen = run(DROP)
    counts = [live(rollout) for rollout in seen["rollouts"]]
    assert {*counts} >= {0, 4} or {*counts} >= {4, 8}, counts  # some question has equal rewards
    shares = logged(trainer, "cppo/kept_share")
    assert shares == [count / 8 for count in counts]
    assert logged(trainer, "cppo/equal_share") == [1 - share for share in shares]
    assert logged(trainer, "cppo/refills") == [0.0] * 3


def test_equal_rewards_beside_none_have_no_advantage():
    """The mean of seven rewards of 0.3 is 2^-25 off, and the eighth completion has no reward."""
    rounded, real = [2**-25 / 1e-4] * 7 + [0.0], [-0.5] * 6 + [3.0, 0.0]
    # The last 16 are not centred.
    advantages = torch.tensor(rounded + real + [1.0] + [0.0] * 7 + [1.0] * 8)
    assert advantages[0] > EQUAL
    accelerator = SimpleNamespace(gather=lambda values: values, process_index=0)
    trainer = SimpleNamespace(accelerator=accelerator, num_generations=8)
    found = settled(trainer, advantages)
    assert not found[:8].any() and torch.equal(found[8:24], advantages[8:24])
    assert not found[24:].any(), "to be dropped: their rewards are equal"
    assert torch.equal(settled(trainer, advantages, ROUNDED)[8:], advantages[8:])
    assert not settled(trainer, advantages, ROUNDED)[:8].any()


@pytest.mark.parametrize("options", [FILL, dataclasses.replace(FILL, prune_rate=0.5)], ids=str)
def test_further_questions_take_their_place(options):
    (trainer, seen), (after, _) = run(options), run(late(options))
    kept = 8 * (1 - options.prune_rate)
    assert [live(rollout) for rollout in seen["rollouts"]] == [kept] * 3
    assert logged(trainer, "cppo/equal_share") == [0.0] * 3
    refills = logged(trainer, "cppo/refills")
    assert 0 < max(refills) <= 4
    assert same(weights_of(trainer.model), weights_of(after.model))
    for rollout in seen["rollouts"]:
        tokens = rollout["completion_mask"].bool()
        assert rollout["num_items_in_batch"] == tokens.sum()
        # Each row's log-probabilities are its own: the reference is the model of the first step.
        assert (rollout["ref_per_token_logps"][tokens] < 0).all()


def test_the_log_probabilities_of_drawn_rows_are_those_of_their_tokens():
    trainer, seen = run(FILL, max_steps=4, num_iterations=2, learning_rate=0.0)
    assert max(logged(trainer, "cppo/refills")) > 0 and len(seen["rollouts"]) == 2
    for rollout in seen["rollouts"]:
        ids, mask = (
            torch.cat([rollout[f"prompt_{name}"], rollout[f"completion_{name}"]], 1)
            for name in ("ids", "mask")
        )
        width = rollout["completion_ids"].shape[1]
        with torch.no_grad():
            forward = trainer._get_per_token_logps_and_entropies
            expected = forward(trainer.model, ids, mask, width)[0]
        tokens = rollout["completion_mask"].bool()
        for name in ("ref_per_token_logps", "old_per_token_logps"):
            assert torch.allclose(rollout[name][tokens], expected[tokens], atol=1e-5)


def test_images_of_drawn_questions_come_along():
    options = dataclasses.replace(FILL, loss=LOOK.loss)

    def by_image(completions, answer, **columns):
        values = noise(completions)
        return [v if int(a) % 2 else 0.0 for v, a in zip(values, answer, strict=True)]

    trainer, seen = run(options, rewards=by_image, family="qwen2_5_vl")
    assert max(logged(trainer, "cppo/refills")) > 0
    for rollout in seen["rollouts"]:
        patches = rollout["image_grid_thw"].prod(1).sum()
        assert patches == len(rollout["pixel_values"]) and len(rollout["num_images"]) == 8
        token = trainer.processing_class.image_token_id
        assert (rollout["prompt_ids"] == token).sum() * 4 == patches
        assert len({*rollout["cppo_seed"].tolist()}) == 2
    assert max(logged(trainer, "cppo/cpl_loss")) > 0


def test_the_share_of_equal_questions_is_over_those_that_lie_on_several_processes():
    """Two processes have two rows each: one question of four, and its advantages are not 0."""
    here, there = torch.tensor([0.0, 0.0]), torch.tensor([-1.0, 1.0])
    log = defaultdict(list)
    trainer = SimpleNamespace(
        cppo=DROP,
        num_generations=4,
        accelerator=SimpleNamespace(gather=lambda values: torch.cat([values, there])),
        _metrics={"train": log},
        _tokenizer=SimpleNamespace(pad_token_id=0),
    )
    sampled = sample(trainer, [{}, {}], (0,), lambda questions, draw: {"advantages": here})
    assert torch.equal(sampled.advantages(), here)
    assert log == {"cppo/refills": [0.0], "cppo/equal_share": [0.0]}


def test_draws_are_bounded_and_nothing_left_moves_nothing():
    trainer, seen = run(dataclasses.replace(FILL, max_refills=2), rewards=never, beta=0.0)
    assert logged(trainer, "cppo/refills") == [2.0] * 3
    assert logged(trainer, "cppo/kept_share") == [0.0] * 3
    assert logged(trainer, "cppo/equal_share") == [1.0] * 3
    assert same(weights_of(trainer.model), weights_of(trainer_of().model))


def test_where_further_questions_cannot_be_drawn(monkeypatch):
    trainer = trainer_of(cppo=FILL)
    with monkeypatch.context() as changed:
        changed.setattr(trainer, "train_dataset", iter(()))
        with pytest.raises(ValueError, match="draws from a dataset with rows, not from a stream"):
            check_run(trainer)
    with pytest.raises(ValueError, match="draws from a dataset with rows, not from a stream"):
        trainer_of(cppo=FILL, rows=rows_of("text").to_iterable_dataset())
    with monkeypatch.context() as changed:
        changed.setattr(trainer, "num_generations", 16)
        with pytest.raises(ValueError, match="max_refills replaces whole questions"):
            check_run(trainer)
    with monkeypatch.context() as changed:
        changed.setattr(trl_options, "installed", lambda name: ("1.7.0", (1, 7)))
        with pytest.raises(ValueError, match="max_refills needs trl 1.15"):
            check_run(trainer)
    monkeypatch.setattr(trainer, "num_generations", 16)
    trainer.cppo = DROP
    check_run(trainer)
    with pytest.raises(ValueError, match="max_refills must be >= 0, got -1"):
        dataclasses.replace(FILL, max_refills=-1)


def test_equal_rewards_are_seen_whatever_their_mean_is_rounded_to():
    def equal(completions, **columns):
        return [0.7] * len(completions)  # of seven the mean is not 0.7 in fp32: TRL has A = 6e-4

    options = dict(num_generations=7, per_device_train_batch_size=7, max_steps=1)
    trainer, _ = run(DROP, rewards=equal, beta=0.0, **options)
    assert logged(trainer, "cppo/kept_share") == [0.0]
    assert logged(trainer, "cppo/equal_share") == [1.0]
