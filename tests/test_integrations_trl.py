"""The TRL adapter in training: what it leaves alone, pruning, contrastive perception, processes."""

import dataclasses
import functools

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")

from launching import torchrun
from trainer_cases import relative_difference, same, weights_of
from trl_cases import (
    HALF,
    HALF_LOOK,
    LOOK,
    OFF,
    CPPOFixed,
    Fixed,
    late,
    logged,
    trained,
    trainer_of,
    watched,
    watched_run,
)

import cppo
from cppo.integrations import trl_views
from cppo.integrations.contrast import contrastive_perception
from cppo.integrations.trl import CPPO, CPPOMixin, per_device_train_batch_size
from cppo.integrations.trl_rows import trimmed
from cppo.options.trainer import LossConfig
from cppo.records import Views


@functools.cache
def plain_weights(family="text", **options):
    return weights_of(trained(family, **options).model)


# What stays TRL's


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl"])
def test_everything_off_is_plain_trl_bit_for_bit(family):
    assert same(weights_of(trained(family, OFF).model), plain_weights(family))


def test_a_run_moves_the_weights_beyond_every_tolerance_used_here():
    start = weights_of(trainer_of().model)
    assert relative_difference(plain_weights(), start) > 1e-3


def test_trimming_is_plain_trl_with_fewer_tokens():
    parts = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    plain, plain_seen = watched_run(**parts)
    trimmed, trimmed_seen = watched_run(cppo=CPPO(loss=OFF.loss), **parts)
    assert relative_difference(weights_of(trimmed.model), weights_of(plain.model)) < 1e-6
    assert min(logged(trimmed, "cppo/width_share")) < 1
    assert sum(trimmed_seen["grad_tokens"]) < sum(plain_seen["grad_tokens"])


def test_trimming_keeps_every_column_that_holds_a_token():
    length, prompt = 5, 4
    inputs = {
        "prompt_ids": torch.arange(prompt).repeat(2, 1),
        "prompt_mask": torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]]),
        "completion_ids": torch.arange(length).repeat(2, 1),
        "completion_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]),
        "mm_token_type_ids": torch.arange(prompt + length).repeat(2, 1),
        "ref_per_token_logps": torch.zeros(2, length),
        "importance_sampling_ratio": torch.ones(2, 1),
        "advantages": torch.ones(2),
        "num_items_in_batch": torch.tensor(4),
    }
    out, share = trimmed(inputs, 1)
    assert share == 5 / 9
    assert out["prompt_ids"].tolist() == [[2, 3]] * 2
    assert out["completion_ids"].tolist() == [[0, 1, 2]] * 2
    assert out["mm_token_type_ids"].tolist() == [[2, 3, 4, 5, 6]] * 2
    assert out["ref_per_token_logps"].shape == (2, 3)
    assert out["importance_sampling_ratio"].shape == (2, 1)
    out, _ = trimmed(inputs, 4)
    assert (out["prompt_ids"].shape[1], out["completion_ids"].shape[1]) == (4, 4)


def test_evaluation_is_left_alone():
    trainers = [trainer_of(cppo=options, per_device_eval_batch_size=4) for options in (None, HALF)]
    plain, ours = (trainer.evaluate(trainer.train_dataset) for trainer in trainers)
    for name in ("eval_reward", "eval_loss", "eval_completions/mean_length"):
        assert ours[name] == pytest.approx(plain[name], rel=1e-6), name
    assert "eval_cppo/kept_share" not in ours
    assert trainers[1]._prompts is None  # they would stay until the next rollout


# Pruning


@pytest.mark.parametrize(
    "options",
    [dict(loss_type=loss) for loss in ("grpo", "dapo", "dr_grpo", "bnpo")]
    + [dict(family="qwen2_5_vl", cppo=HALF_LOOK)],
    ids=str,
)
def test_early_and_late_pruning_are_the_same_bit_for_bit(options):
    chosen = options.get("cppo", HALF)
    early, after = (watched_run(**(options | {"cppo": each}))[0] for each in (chosen, late(chosen)))
    assert same(weights_of(early.model), weights_of(after.model))
    if "family" not in options:
        assert not same(weights_of(early.model), plain_weights(**options))
        assert logged(early, "kl")[-1] > 0  # the reference takes part


@pytest.mark.parametrize("options", [{}, dict(prune_scope="batch"), dict(prune="largest")], ids=str)
def test_pruned_rows_are_those_that_prune_completions_drops(options):
    chosen = dataclasses.replace(HALF, **options)
    whole, whole_seen = watched_run()
    pruned, pruned_seen = watched_run(cppo=chosen, loss_type="dapo")
    (everything,), (rest,) = whole_seen["rollouts"], pruned_seen["rollouts"]
    advantages = everything["advantages"]
    expected = cppo.prune_completions(
        advantages, 4, 0.5, scope=chosen.prune_scope, prune=chosen.prune
    )
    assert len(expected) == 4 and len(advantages) == 8
    for name in ("advantages", "prompt_ids", "completion_ids", "completion_mask"):
        assert torch.equal(rest[name], everything[name][expected]), name
    tokens = rest["completion_mask"].bool()
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        assert torch.equal(rest[name][tokens], everything[name][expected][tokens]), name
    assert rest["num_items_in_batch"] == rest["completion_mask"].sum()
    assert logged(pruned, "cppo/kept_share") == [0.5]
    # TRL's own statistics are over all that was sampled.
    for name in ("reward", "completions/mean_length"):
        assert logged(pruned, name) == logged(whole, name)


def test_early_pruning_runs_the_old_and_reference_model_on_the_kept_rows_only():
    early, after = (sum(watched_run(cppo=o)[1]["tokens"]) for o in (HALF, late(HALF)))
    assert 0 < early * 2 == after


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "luspo", "vespo"])
def test_every_other_loss_type_trains(loss_type):
    extra = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    run = trained(cppo=HALF, loss_type=loss_type, **extra)
    assert all(value > 0 for value in logged(run, "grad_norm"))
    assert logged(run, "cppo/kept_share") == [0.5]


def test_dynamic_allocation_fills_the_micro_batches_again():
    size = per_device_train_batch_size(4, 4, 0.75, steps_per_generation=2)
    assert size == 16
    options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=2, max_steps=1)
    _, seen = watched_run(cppo=dataclasses.replace(HALF, prune_rate=0.75), **options)
    assert [len(micro["advantages"]) for micro in seen["micro"]] == [4, 4]
    with pytest.raises(ValueError, match="3 rows x 1 steps must be whole questions, of which 2 of"):
        per_device_train_batch_size(3, 4, 0.5)
    with pytest.raises(ValueError, match=r"prune_rate must be a number in \[0, 1\), got 1"):
        per_device_train_batch_size(4, 4, 1)
    with pytest.raises(ValueError, match="steps_per_generation must be >= 1, got 0"):
        per_device_train_batch_size(4, 4, 0.5, 0)


@pytest.mark.parametrize(
    ("family", "options"), [("text", HALF), ("qwen2_5_vl", HALF_LOOK)], ids=["text", "images"]
)
def test_gradient_accumulation_changes_nothing(family, options):
    once = dict(num_iterations=1, max_steps=1)
    parts = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    whole, cut = (trained(family, options, **once, **more) for more in ({}, parts))
    assert relative_difference(weights_of(cut.model), weights_of(whole.model)) < 1e-6


def test_lora_early_and_late_and_its_reference_is_the_model_without_adapters():
    from peft import LoraConfig

    runs = []
    for options in (HALF, late(HALF)):
        adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        runs.append(watched_run(cppo=options, more={"peft_config": adapters}, max_steps=3))
    assert same(*(weights_of(trainer.model) for trainer, _ in runs))
    for first, second in zip(*(seen["rollouts"] for _, seen in runs), strict=True):
        assert torch.equal(first["ref_per_token_logps"], second["ref_per_token_logps"])
        assert not torch.allclose(first["ref_per_token_logps"], first["old_per_token_logps"])


def test_masked_tokens_of_a_rollout_function_are_pruned_along():
    def rollout(prompts, trainer):
        encode = trainer.processing_class.apply_chat_template
        count = range(len(prompts))
        return {
            "prompt_ids": [encode(p, tokenize=True, return_dict=False) for p in prompts],
            "completion_ids": [[10 + i % 5, 11, 12 + i % 3, 13] for i in count],
            "logprobs": None,
            "env_mask": [[1, 0, 1, 1] if i % 2 else [1, 1, 1, 0] for i in count],
        }

    options = dict(more={"rollout_func": rollout}, loss_type="dapo", max_completion_length=4)
    runs = [watched_run(cppo=each, **options) for each in (HALF, late(HALF))]
    for _, seen in runs:
        (pruned,) = seen["rollouts"]
        assert pruned["tool_mask"].shape == (4, 4) and pruned["num_items_in_batch"] == 12
    assert same(*(weights_of(trainer.model) for trainer, _ in runs))


def test_a_trainer_with_an_advantage_per_token():
    class PerToken(Fixed):
        def _generate_and_score_completions(self, inputs):
            rollout = super()._generate_and_score_completions(inputs)
            spread = rollout["advantages"][:, None] * rollout["completion_mask"]
            return {**rollout, "advantages": spread}

    class Mine(CPPOMixin, PerToken):
        pass

    found, expected = (
        weights_of(trained("qwen2_5_vl", cppo=HALF_LOOK, base=base, max_steps=1).model)
        for base in (Mine, CPPOFixed)
    )
    assert relative_difference(found, expected) < 1e-6


# Contrastive perception


@pytest.mark.parametrize("divergence", ["k3", "k1"])
@pytest.mark.parametrize("cpl_reduction", ["token", "sequence"])
def test_contrast_of_log_probabilities_is_that_of_logits(divergence, cpl_reduction):
    config = LossConfig(divergence=divergence, cpl_reduction=cpl_reduction, tau=0.5)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, 11, generator=generator, dtype=torch.float64)
    logits[2] *= torch.linspace(0.1, 1, 7)[:, None]
    targets = torch.randint(0, 11, (5, 7), generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 2, 6])[:, None]
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0])
    exact = cppo.cppo_loss(Views(*logits), targets, advantages, mask=mask, config=config)
    stats = [cppo.token_stats(view, targets, mask=mask) for view in logits]
    looks = advantages > 0
    ours = contrastive_perception(
        Views(*(each.logps[looks] for each in stats)),
        stats[0].entropy[looks],
        stats[2].entropy[looks],
        mask[looks],
        5,
        config,
    )
    assert exact.metrics["cpl_loss"] > 0
    assert torch.allclose(ours.loss, exact.metrics["cpl_loss"], rtol=1e-12)
    assert torch.equal(ours.selected, exact.perception_mask[looks])


@pytest.mark.parametrize("cpl_reduction", ["token", "sequence"])
def test_contrast_of_nothing_is_a_zero_with_a_graph(cpl_reduction):
    logps, flat = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    config = LossConfig(cpl_reduction=cpl_reduction)
    views = Views(logps, logps, logps)
    loss = contrastive_perception(views, flat, flat + 1, nothing, 2, config).loss
    assert loss.item() == 0 and not torch.autograd.grad(loss, logps)[0].any()


def test_perturbed_views_run_only_where_the_advantage_is_positive(monkeypatch):
    trainer = trainer_of("qwen2_5_vl", cppo=LOOK, num_iterations=1, beta=0.0)
    seen, shown, both_views = watched(trainer), [], trl_views.both_views

    def watch(trainer, call, inputs, looking):
        shown.append(len(looking))
        return both_views(trainer, call, inputs, looking)

    monkeypatch.setattr(trl_views, "both_views", watch)
    trainer.train()
    positive = [int((micro["advantages"] > 0).sum()) for micro in seen["micro"]]
    assert shown == positive and 0 < shown[0] < 8
    assert logged(trainer, "cppo/gated_share") == [n / 8 for n in positive]
    assert all(value > 0 for value in logged(trainer, "cppo/cpl_loss"))
    assert all(0 < value < 1 for value in logged(trainer, "cppo/perception_share"))
    assert not same(weights_of(trainer.model), plain_weights("qwen2_5_vl", num_iterations=1))


@pytest.mark.parametrize(("gating", "share"), [(True, 0.0), (False, 1.0)])
def test_equal_rewards_are_no_positive_advantage(gating, share):
    """The mean of eight rewards of 0.3 is 2^-25 off, which TRL divides by 1e-4."""
    looks = CPPO(loss=dataclasses.replace(LOOK.loss, gating=gating))
    options = dict(rewards=lambda completions, **columns: [0.3] * len(completions))
    options |= dict(num_generations=8, num_iterations=1, max_steps=1, beta=0.0)
    trainer, seen = watched_run("qwen2_5_vl", cppo=looks, **options)
    assert logged(trainer, "cppo/gated_share") == [share]
    assert (logged(trainer, "cppo/cpl_loss")[0] > 0) == bool(share)
    # Without a gate nothing asks for them, and TRL's advantages stay as they are.
    assert seen["rollouts"][0]["advantages"].any() == bool(share)


def test_a_question_has_one_seed_and_another_one_at_every_step():
    _, seen = watched_run("qwen2_5_vl", cppo=LOOK, num_iterations=1)
    seeds = [rollout["cppo_seed"].tolist() for rollout in seen["rollouts"]]
    for each in seeds:
        assert each[:4] == each[:1] * 4 and each[4:] == each[4:5] * 4
    assert len(seeds) == 2 and len({*seeds[0], *seeds[1]}) == 4


# Processes


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    # DeepSpeed compiles optimizers that nobody asked for.
    variables = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "TORCH_COMPILE_DISABLE": "1"}
    torchrun("trl_two_processes.py", str(tmp_path), **variables)
    from trl_two_processes import CASES, KINDS, METRICS, run

    for name in CASES:
        one = run(name, 1)
        for kind in KINDS:
            two = torch.load(tmp_path / f"{name}-{kind}.pt", weights_only=True)
            metrics = two.pop("metrics")
            assert relative_difference(two, weights_of(one.model)) < 1e-6, (name, kind)
            for metric in METRICS:
                assert metrics[metric] == pytest.approx(logged(one, metric), rel=1e-5), metric
