"""The pruning rules of the field in TRL: what stays, and the mean gradient of chance."""

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")

from chance_cases import outcomes
from trainer_cases import relative_difference, weights_of
from trl_cases import HALF, trained, trainer_of, watched_run

import cppo
from cppo import reference
from cppo.integrations.trl import CPPO
from cppo.integrations.trl_rows import loss_mask

# One plain step, on which the weights move in proportion to the gradient.
STEP = dict(max_steps=1, num_iterations=1, learning_rate=1.0, max_grad_norm=0.0, beta=0.0)


@pytest.mark.parametrize("prune", ["variance", "shortest"])
def test_the_rows_that_stay(prune):
    chosen = dataclasses.replace(HALF, prune=prune)
    (everything,), (rest,) = (
        watched_run(cppo=options, loss_type="dapo", **STEP)[1]["rollouts"]
        for options in (None, chosen)
    )
    advantages, lengths = everything["advantages"], everything["completion_mask"].sum(1)
    expected = cppo.prune_completions(
        advantages, 4, 0.5, prune=prune, rewards=advantages, lengths=lengths
    )
    assert len(expected) == 4 and torch.equal(rest["advantages"], advantages[expected])
    assert torch.equal(rest["completion_ids"], everything["completion_ids"][expected])


def graded(completions, **columns):
    """Rewards of which several are equal, but not all of a question."""
    return [float(len(text[0]["content"]) % 3) for text in completions]


@pytest.mark.parametrize(
    ("options", "more"),
    [
        (dict(loss_type="grpo"), {}),
        (dict(loss_type="dapo"), {}),
        (dict(loss_type="dr_grpo"), {}),
        # Three of four stay, or fewer: rows that weigh nothing fill the two micro-batches.
        (
            dict(loss_type="grpo", per_device_train_batch_size=4, gradient_accumulation_steps=2),
            dict(prune_rate=0.25, drop_zero_variance=True, max_refills=0),
        ),
    ],
    ids=str,
)
def test_the_mean_step_over_all_outcomes_is_the_unpruned_one(options, more, monkeypatch):
    options = {**STEP, "rewards": graded, **options}
    start = weights_of(trainer_of().model)

    def moved(trainer):
        weights = weights_of(trainer.model)
        return {name: weights[name].double() - start[name].double() for name in start}

    # A row without advantage counts in TRL's mean, unless it is dropped.
    off = CPPO(loss=HALF.loss, prune_rate=0.0, **{k: v for k, v in more.items() if k[0] != "p"})
    whole, seen = watched_run(cppo=off, **options)
    expected = moved(whole)
    _, plain = watched_run(**options)
    advantages = plain["rollouts"][0]["advantages"]
    chosen = dataclasses.replace(HALF, prune="unbiased", **more)
    keep = reference.kept_per_unit(4, chosen.prune_rate)
    p = reference.inclusion_probabilities(advantages, 4, keep)
    mean = {name: torch.zeros_like(value) for name, value in expected.items()}
    for (u, a), (v, b) in itertools.product(outcomes(p[:4]), outcomes(p[4:])):
        chances = torch.tensor([u, 0, 0, 0, v, 0, 0, 0], dtype=torch.float64)
        monkeypatch.setattr("cppo.ops.advantages._noise", lambda *_, given=chances: given)
        for name, value in moved(trained(cppo=chosen, **options)).items():
            mean[name] += value * a * b
    assert relative_difference(mean, expected) < 1e-4
    assert loss_mask(seen["rollouts"][0]).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(prune="efficiency"), "prune must be one of 'smallest', .*, got 'efficiency'"),
        (
            dict(prune="variance", prune_scope="batch"),
            "prune = 'variance' must have prune_scope = 'group', got 'batch'",
        ),
    ],
)
def test_rules_without_what_they_need_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        CPPO(**options)


def test_runs_that_would_be_biased_are_refused():
    with pytest.raises(ValueError, match="prune='unbiased' would be biased with loss_type='bnpo'"):
        trainer_of(cppo=dataclasses.replace(HALF, prune="unbiased"), loss_type="bnpo")
    with pytest.raises(ValueError, match="needs mask_truncated_completions=False"):
        trainer_of(
            cppo=dataclasses.replace(HALF, prune="shortest"), mask_truncated_completions=True
        )
