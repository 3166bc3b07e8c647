"""The TRL adapter under trainers that somebody has changed, and in runs that go on."""

import dataclasses
import warnings

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")

from trainer_cases import relative_difference, same, weights_of
from trl import RLOOConfig, RLOOTrainer
from trl_cases import (
    HALF,
    HALF_LOOK,
    LOOK,
    CPPOFixed,
    Fixed,
    completions_of,
    late,
    logged,
    trained,
    trainer_of,
    watched,
    watched_run,
)

from cppo.integrations.trl import CPPO, CPPOMixin
from cppo.integrations.trl_postponed import Postponed
from cppo.options.trainer import LossConfig

# Old and reference log-probabilities that somebody reads


def reads_a_kl(rollout):
    kl = rollout["old_per_token_logps"] - rollout["ref_per_token_logps"]
    rollout["advantages"] = rollout["advantages"] - 10 * (kl * rollout["completion_mask"]).sum(1)


def casts(rollout):
    rollout["old_per_token_logps"] = rollout["old_per_token_logps"].double()


def clones(rollout):
    rollout["ref_per_token_logps"] = rollout["ref_per_token_logps"].clone()


def changes(rollout):
    rollout["ref_per_token_logps"].mul_(0.5)


def stacks(rollout):
    both = torch.stack([rollout["old_per_token_logps"], rollout["ref_per_token_logps"]])
    rollout["old_per_token_logps"] = both.mean(0)


def fixed_that(reads):
    """A trainer of somebody else's that reads the rollout, with the mixin before it."""

    class Reads(Fixed):
        def _generate_and_score_completions(self, inputs):
            rollout = super()._generate_and_score_completions(inputs)
            reads(rollout)
            return rollout

    class Mine(CPPOMixin, Reads):
        pass

    return Mine


@pytest.mark.parametrize("reads", [reads_a_kl, casts, clones, changes, stacks])
def test_who_reads_log_probabilities_before_the_pruning_gets_them(reads):
    options = dict(base=fixed_that(reads), max_steps=3, beta=0.3)
    with pytest.warns(UserWarning, match="computed for every sampled completion") as said:
        early = trained(cppo=HALF, **options)
    assert sum("every sampled completion" in str(each.message) for each in said) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*every sampled completion")
        after = trained(cppo=late(HALF), **options)
    assert same(weights_of(early.model), weights_of(after.model))
    unread = trained(cppo=HALF, **options | {"base": CPPOFixed})
    if reads is not casts:
        assert same(weights_of(early.model), weights_of(unread.model)) == (reads is clones)


def test_a_look_at_the_shape_computes_nothing():
    runs = []

    def compute(rows):
        runs.append(rows)
        return torch.arange(6.0).view(3, 2) if rows is None else torch.ones(len(rows), 2)

    unread = Postponed.of((3, 2), torch.device("cpu"), compute)
    assert unread.shape == (3, 2) and len(unread) == 3 and unread.dim() == unread.ndim == 2
    assert unread.size(1) == 2 and unread.device.type == "cpu" and not runs
    assert torch.equal(unread.take(torch.tensor([2])), torch.ones(1, 2)) and len(runs) == 1
    assert (unread[1] + 1).tolist() == [3, 4] and type(unread + 0) is torch.Tensor
    assert torch.cat([unread, unread]).shape == (6, 2) and unread.tolist()[2] == [4, 5]
    assert len(runs) == 2 and runs[1] is None
    # What somebody changed in place stays changed.
    unread.add_(1)
    assert torch.equal(unread.take(torch.tensor([0])), torch.tensor([[1.0, 2.0]]))


class FixedRLOO(RLOOTrainer):
    def _generate_single_turn(self, prompt_ids, *rest, **more):
        return completions_of(self, prompt_ids)


class CPPORLOO(CPPOMixin, FixedRLOO):
    """RLOO sums the old log-probabilities in its rollout: they are computed for every row."""


def test_rloo_is_pruned_late_and_says_so():
    options = dict(base=CPPORLOO, config=RLOOConfig, loss_type=None)
    with pytest.warns(UserWarning, match="rollout of CPPORLOO is pruned"):
        early, seen = watched_run(cppo=HALF, **options)
    assert same(weights_of(early.model), weights_of(trained(cppo=late(HALF), **options).model))
    assert [len(rollout["advantages"]) for rollout in seen["rollouts"]] == [4]
    assert logged(early, "cppo/kept_share") == [0.5]
    plain = trained(base=FixedRLOO, config=RLOOConfig, loss_type=None)
    assert not same(weights_of(early.model), weights_of(plain.model))


# The forward that contrast starts from


class Blanks(Fixed):
    """Looks at a blank image first, as some do for a baseline."""

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        names = ("image_grid_thw", "num_images", "mm_token_type_ids")
        self._get_per_token_logps_and_entropies(
            model,
            ids,
            mask,
            inputs["completion_ids"].shape[1],
            compute_entropy=True,
            pixel_values=inputs["pixel_values"] * 0,
            **{name: inputs[name] for name in names},
        )
        return super()._compute_loss(model, inputs)


class CPPOBlanks(CPPOMixin, Blanks):
    pass


def test_an_adapter_of_virtual_tokens_is_pruned_early_and_keeps_its_padding():
    """They stand before the padding: with less of it the prompt would be nearer to them."""
    peft = pytest.importorskip("peft")
    adapter = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    runs = []
    for options in (HALF, late(HALF)):
        with pytest.warns(UserWarning, match="micro-batches are not trimmed"):
            runs.append(trained(cppo=options, more={"peft_config": adapter}))
    assert same(*(weights_of(run.model) for run in runs))
    assert not runs[0].cppo.trim and len(logged(runs[0], "kl")) == 2
    with pytest.raises(ValueError, match="max_refills (joins draws|needs trl 1.15)"):
        refilled = dataclasses.replace(HALF, drop_zero_variance=True)
        trainer_of(cppo=refilled, more={"peft_config": adapter})


def test_a_loss_of_completions_is_one_whatever_its_loss_type():
    """GMPO's loss is a mean over rows; "dapo" of GRPOConfig says that it is one over tokens."""
    gmpo = pytest.importorskip("trl.experimental.gmpo")

    class FixedGMPO(gmpo.GMPOTrainer):
        _generate_single_turn = Fixed._generate_single_turn

    class Pruned(CPPOMixin, FixedGMPO):
        pass

    run = dict(base=Pruned, config=gmpo.GMPOConfig, loss_type="dapo", max_steps=1)
    quarter = dataclasses.replace(HALF, prune_rate=0.75)
    whole = trained(cppo=quarter, **run)
    # Two rows stay, for four micro-batches of one.
    filled = trained(
        cppo=quarter, per_device_train_batch_size=2, gradient_accumulation_steps=4, **run
    )
    assert logged(filled, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)
    weights = LossConfig(perception="vppo")
    with pytest.raises(ValueError, match="'vppo' needs a loss of tokens; that of Pruned is of"):
        trainer_of("qwen2_5_vl", dataclasses.replace(HALF, loss=weights), **run)


def test_contrast_starts_from_the_micro_batch_not_from_another_forward_in_the_loss():
    options = dict(cppo=HALF_LOOK, max_steps=1)
    found, expected = (
        weights_of(trained("qwen2_5_vl", base=base, **options).model)
        for base in (CPPOBlanks, CPPOFixed)
    )
    assert relative_difference(found, expected) < 1e-6


class NoEntropies(Fixed):
    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
        images = {name: inputs[name] for name in names}
        width = inputs["completion_ids"].shape[1]
        return self._get_per_token_logps_and_entropies(model, ids, mask, width, **images)[0].sum()


class CallsTheModel(Fixed):
    def _compute_loss(self, model, inputs):
        names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        return model(input_ids=ids, **{name: inputs[name] for name in names}).logits.sum()


@pytest.mark.parametrize("loss", [NoEntropies, CallsTheModel])
def test_a_loss_that_gives_contrast_nothing_to_start_from_is_told(loss):
    mine = type("Mine", (CPPOMixin, loss), {})
    with pytest.raises(RuntimeError, match="Mine._compute_loss does not ask _get_per_token_logps"):
        trained("qwen2_5_vl", base=mine, cppo=HALF_LOOK)
    trained("qwen2_5_vl", base=mine, cppo=HALF, max_steps=1)


@pytest.mark.parametrize("options", [{"prune_rate": 0.5}, 0.5, CPPO])
def test_options_that_are_no_cppo_are_named(options):
    kind = type(options).__name__
    with pytest.raises(TypeError, match=rf"cppo must be a CPPO such as .*, got {kind}$"):
        trainer_of(cppo=options)


# A run that goes on


def test_a_resumed_run_draws_the_perturbations_of_the_whole_one(tmp_path):
    options = dict(
        cppo=dataclasses.replace(LOOK, prune_rate=0.5, prune="random"),
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        output_dir=str(tmp_path),
    )
    _, seen = watched_run("qwen2_5_vl", **options)
    rest = trainer_of("qwen2_5_vl", **options)
    again = watched(rest)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (_, second), (resumed,) = seen["rollouts"], again["rollouts"]
    for name in ("cppo_seed", "completion_ids", "advantages"):
        assert torch.equal(resumed[name], second[name]), name


# Trainers that have nothing to wrap


def test_a_trainer_without_what_is_wrapped_is_refused():
    """TRL's own asynchronous one would train on everything, without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental
        asynchronous = pytest.importorskip("trl.experimental.async_grpo").AsyncGRPOTrainer
    mixed = type("Mixed", (CPPOMixin, asynchronous), {})
    with pytest.raises(ValueError, match="Mixed must be made of CPPOMixin and a trainer that has"):
        mixed()
