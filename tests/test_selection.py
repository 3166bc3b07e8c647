"""What the trainer makes of the pruning rules: lengths, groups, and the weights of chance."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from chance_cases import outcomes
from torch import Tensor
from trainer_cases import (
    config,
    fixed_rollouts,
    gradients,
    lines,
    noise,
    questions_for,
    relative_difference,
    text_rows,
    tiny,
    trainer_for,
)

import cppo
from cppo import NumItems, reference
from cppo.options.trainer import kept_per_unit
from cppo.train import selection
from cppo.train.algorithm import microbatch_loss
from cppo.train.balance import _piece

REWARDS = torch.tensor([1.0, 0.0, 0.25, 0.0, 0.5, 0.5, 0.0, 3.0], dtype=torch.float64)
LENGTHS = torch.tensor([5, 2, 7, 1, 4, 6, 2, 3])
NAN = math.nan


@pytest.mark.parametrize(
    ("options", "rewards"),
    [
        ({}, REWARDS),
        ({"reduction": "dapo"}, REWARDS),
        ({"reduction": "dr_grpo"}, REWARDS),
        ({"scale_rewards": "batch", "drop_zero_variance": True}, REWARDS.clamp(max=0.5)),
        ({"reduction": "dapo", "drop_zero_variance": True}, REWARDS.clamp(max=0.5)),
        ({"reduction": "dapo", "mask_overlong": True}, REWARDS),
        ({"mask_overlong": True}, REWARDS),
        ({"group_top_p": 0.5}, REWARDS),
        ({"reduction": "dapo"}, torch.tensor([1, 0, NAN, 0.5, NAN, 2, 0, 1]).double()),
        ({"batch_size": 3, "dynamic_allocation": True, "reduction": "dapo"}, REWARDS),
        ({"batch_size": 3, "dynamic_allocation": True}, REWARDS),
    ],
    ids=str,
)
def test_the_mean_gradient_is_the_unpruned_one(options, rewards, tmp_path):
    """Over all outcomes of two questions with four completions each, of a tiny model in fp64."""
    model, processor = tiny("text", dtype=torch.float64)
    common = dict(batch_size=8, dynamic_allocation=False, max_length=9)
    pruned = config(
        **{**common, **options}, group_size=4, prune="unbiased", prune_rate=0.5,
        output_dir=tmp_path,
    )  # fmt: skip
    trainer = trainer_for(tmp_path, model=model, processor=processor)
    rollouts = fixed_rollouts(
        trainer.model, processor, questions_for("text")[:2], group_size=4, lengths=LENGTHS.tolist()
    )
    truncated = torch.arange(8) % 4 == 2
    rollouts = dataclasses.replace(rollouts, truncated=truncated)

    def gradient(chosen: Any) -> dict[str, Tensor]:
        trainer.policy.config = chosen
        batch = trainer.make_batch(rollouts, rewards)
        model = trainer.model
        items = NumItems(*batch.counts(batch.kept))

        def accumulate() -> None:
            for part in batch.microbatches(batch.kept, 40):
                packed = batch, part, items, chosen, processor
                microbatch_loss(model, *packed).loss.backward()

        return gradients(model, accumulate)

    everything = dict(prune="smallest", prune_rate=0.0, batch_size=8, dynamic_allocation=False)
    expected = gradient(dataclasses.replace(pruned, **everything))

    scored = ~rewards.isnan()
    advantages = reference.group_advantages(rewards, 4, pruned.scale_rewards, mask=scored)
    p = reference.inclusion_probabilities(advantages, 4, 2, scored)
    cuts = [0.125, 0.375, 0.625, 0.875] if pruned.dynamic_allocation else [0.5]
    mean = {name: torch.zeros_like(value) for name, value in expected.items()}
    for (u, a), (v, b), start in itertools.product(outcomes(p[:4]), outcomes(p[4:]), cuts):
        chances = torch.tensor([u, 0, 0, 0, v, 0, 0, 0], dtype=torch.float64)

        def rand(size: Any, chances: Any = chances, start: Any = start, **_: Any) -> Tensor:
            return chances if size == 8 else torch.tensor(start, dtype=torch.float64)

        with patch.object(torch, "rand", rand):
            for name, value in gradient(pruned).items():
                mean[name] += value * a * b / len(cuts)
    # Weights are fp32.
    assert relative_difference(mean, expected) < 1e-6


def test_a_rate_of_zero_weighs_everything_as_one(tmp_path):
    chosen = config(prune="unbiased", group_size=4, output_dir=tmp_path)
    of_all = REWARDS, torch.zeros(8, dtype=torch.bool), LENGTHS
    advantages, kept = selection.select_completions(REWARDS, chosen, 0, LENGTHS)
    assert kept.tolist() == [*range(8)]
    weights = selection.unbiased_weights(kept, 8, advantages, of_all, chosen)
    assert weights.tolist() == [1] * 8


def test_weights_go_where_their_completions_go(tmp_path):
    trainer = trainer_for(tmp_path, rewards=noise, prune="unbiased", prune_rate=0.5)
    rollouts = trainer.sample(trainer.draw_questions())
    batch = trainer.make_batch(rollouts, torch.tensor(noise(rollouts.texts)))
    weights = batch.per_token["token_weights"]
    assert weights.shape == rollouts.input_ids.shape and weights.dtype == torch.float32
    assert torch.equal(weights[:, 0].nonzero()[:, 0], batch.kept)
    packed = batch.pack(batch.kept)
    expected = weights[batch.kept, 0].repeat_interleave(packed.row_cu_seqlens.long().diff())
    assert torch.equal(packed.per_token["token_weights"], expected)
    moved = _piece(batch, [2, 0])
    assert torch.equal(moved.per_token["token_weights"], weights[[8, 9, 10, 11, 0, 1, 2, 3]])
    # And the update reads them: it is another one than without.
    row = trainer.train()
    assert math.isfinite(row["loss"]) and row["kept_share"] == 0.5


@pytest.mark.parametrize("prune", ["variance", "shortest", "efficiency"])
@pytest.mark.parametrize("of", ["sampled", "kept"])
@pytest.mark.parametrize("rewards", [REWARDS, REWARDS.clone().index_fill(0, torch.tensor(2), NAN)])
def test_rules_of_rewards_and_lengths(prune, of, rewards, tmp_path):
    chosen = config(
        prune=prune, prune_rate=0.5, advantages_of=of, group_size=4, output_dir=tmp_path
    )
    advantages, kept = selection.select_completions(rewards, chosen, 3, LENGTHS)
    scored = ~rewards.isnan()
    options = dict(prune=prune, lengths=LENGTHS, advantages_of=of, mask=scored)
    expected = reference.advantages_and_prune(rewards, 4, 0.5, **options)
    assert torch.equal(advantages, expected[0]) and torch.equal(kept, expected[1])
    assert scored[kept].all() and not advantages[~scored].any()
    if of == "kept":
        assert set(advantages.nonzero()[:, 0].tolist()) <= set(kept.tolist())


def test_the_shortest_completions_are_trained_on(tmp_path):
    trainer = trainer_for(tmp_path, rewards=noise, prune="shortest", prune_rate=0.5)
    rollouts = trainer.sample(trainer.draw_questions())
    batch = trainer.make_batch(rollouts, torch.tensor(noise(rollouts.texts)))
    lengths = torch.tensor(batch.response_lengths(torch.arange(16)))
    assert torch.equal(rollouts.lengths, lengths)
    expected = cppo.prune_completions(
        torch.zeros(16), 4, 0.5, prune="shortest", lengths=lengths, backend="reference"
    )
    assert torch.equal(batch.kept, expected)


def test_groups_are_chosen_after_pruning(tmp_path):
    # Variances: 0.1680, 0, 1.4219, and of the scored ones 0.25.
    rewards = torch.cat([REWARDS[:4], torch.ones(4), REWARDS[4:], torch.tensor([0, 1, NAN, NAN])])
    options = dict(group_size=4, prune_rate=0.5, output_dir=tmp_path)
    lengths = torch.ones(16)

    def kept(**more: Any) -> list[int]:
        return selection.select_completions(rewards, config(**options, **more), 0, lengths)[
            1
        ].tolist()

    whole = kept()
    assert whole == [0, 1, 4, 5, 10, 11, 12, 13]
    assert kept(group_top_p=0.7) == [i for i in whole if i // 4 == 2]
    assert kept(group_top_p=0.9) == [i for i in whole if i // 4 in (2, 3)]
    assert kept(group_top_p=1.0) == [i for i in whole if i // 4 != 1]


def graded(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """Of every other question all rewards are equal."""
    values = noise(completions)
    return [value if int(a) % 4 == 0 else 1.0 for value, a in zip(values, answer, strict=True)]


def test_groups_that_are_dropped_are_replaced_until_the_batch_is_full(tmp_path):
    options = dict(rewards=graded, rows=text_rows(8), batch_size=16, max_refills=9)
    trainer = trainer_for(tmp_path, group_top_p=1.0, log_completions=99, max_steps=1, **options)
    row = trainer.train()
    assert row["kept_share"] < 1 and trainer.questions.position > 4
    kept = [line for line in lines(tmp_path / "completions.jsonl") if line["kept"]]
    assert len(kept) == 16 and all(int(line["answer"]) % 4 == 0 for line in kept)


def test_the_surplus_is_cut_by_chance_evenly():
    generator = torch.Generator().manual_seed(0)
    kept = torch.arange(0, 20, 2)
    often = torch.zeros(20)
    for _ in range(3000):
        left = selection.cut_by_chance(kept, 7, generator)
        assert len(left) == 7 and torch.equal(left, left.unique())
        often[left] += 1
    torch.testing.assert_close(often[kept] / 3000, torch.full((10,), 0.7), rtol=0, atol=0.04)
    assert selection.cut_by_chance(kept, 10, generator) is kept


BAD = [
    ({"prune": "best"}, "prune must be one of 'smallest', .*, 'unbiased', got 'best'"),
    ({"advantages_of": "all"}, "advantages_of must be one of 'sampled', 'kept', got 'all'"),
    (
        {"advantages_of": "kept", "prune": "unbiased"},
        "advantages_of must be 'sampled' with prune = 'unbiased', which it would bias, got 'kept'",
    ),
    (
        {"advantages_of": "kept", "prune_rate": 0.9, "group_size": 8},
        "advantages_of must be 'sampled' where one completion of a question is kept, got 'kept'",
    ),
    ({"group_top_p": 0.0}, "group_top_p must be a number > 0 and <= 1, got 0.0"),
    ({"group_top_p": 1.1}, "group_top_p must be a number > 0 and <= 1, got 1.1"),
    ({"group_top_p": "0.9"}, "group_top_p must be a number > 0 and <= 1, got '0.9'"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=[str(o) for o, _ in BAD])
def test_bad_options_are_answered(options, words):
    with pytest.raises(ValueError, match=f"^CPPOConfig.{words}"):
        cppo.CPPOConfig(**options)
    assert kept_per_unit(8, 0.9) == 1
