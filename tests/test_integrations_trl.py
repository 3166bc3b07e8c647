"""The TRL adapter against TRL itself: what it changes, what it leaves alone, what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")

from trainer_cases import (
    fixed_batch,
    fixed_rollouts,
    gradients,
    packed,
    question,
    relative_difference,
    same,
    tiny,
    weights_of,
)
from trainer_cases import image as picture
from trl_cases import OFF, CPPOFixed, Fixed, logged, trained, trainer_of, watched

import cppo
from cppo.config import LossConfig
from cppo.integrations import trl as adapter
from cppo.integrations.contrast import contrastive_perception
from cppo.integrations.trl import CPPO, check, patch_trl, per_device_train_batch_size
from cppo.integrations.trl_options import check_run
from cppo.records import NumItems, Views
from cppo.train.algorithm import microbatch_loss

TRL = tuple(int(part) for part in importlib.metadata.version("trl").split(".")[:2])
HAS_KERNEL = check()[-1].fits
LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo")
OTHER_LOSSES = ("cispo", "sapo", "luspo", "vespo")
HALF = CPPO(prune_rate=0.5, loss=LossConfig(cpl_coef=0))
LOOK = CPPO(loss=LossConfig(cpl_coef=1.0, cpl_reduction="sequence"))


@functools.cache
def plain_weights(family: str = "text", **options: Any) -> dict[str, torch.Tensor]:
    return weights_of(trained(family, **options).model)


def late(options: CPPO) -> CPPO:
    return dataclasses.replace(options, early=False)


# What stays TRL's


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl"])
def test_everything_off_is_plain_trl_bit_for_bit(family: str) -> None:
    assert same(weights_of(trained(family, OFF).model), plain_weights(family))


def test_a_run_moves_the_weights_beyond_every_tolerance_used_here() -> None:
    start = weights_of(trainer_of().model)
    assert relative_difference(plain_weights(), start) > 1e-3


def test_trimming_is_plain_trl_with_fewer_tokens() -> None:
    parts = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainers = [trainer_of(cppo=options, **parts) for options in (None, CPPO(loss=OFF.loss))]
    seen = [watched(trainer) for trainer in trainers]
    for trainer in trainers:
        trainer.train()
    plain, trimmed = (weights_of(trainer.model) for trainer in trainers)
    assert relative_difference(trimmed, plain) < 1e-6
    shares = logged(trainers[1], "cppo/width_share")
    assert min(shares) < 1
    assert sum(seen[1]["grad_tokens"]) < sum(seen[0]["grad_tokens"])


def test_trimming_keeps_every_column_that_holds_a_token() -> None:
    trainer = trainer_of(cppo=CPPO())
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
    out = trainer._trimmed(inputs)
    assert out["prompt_ids"].tolist() == [[2, 3]] * 2
    assert out["completion_ids"].tolist() == [[0, 1, 2]] * 2
    assert out["mm_token_type_ids"].tolist() == [[2, 3, 4, 5, 6]] * 2
    assert out["ref_per_token_logps"].shape == (2, 3)
    assert out["importance_sampling_ratio"].shape == (2, 1)
    trainer.pad_to_multiple_of = 4
    out = trainer._trimmed(inputs)
    assert (out["prompt_ids"].shape[1], out["completion_ids"].shape[1]) == (4, 4)


# Pruning


@pytest.mark.parametrize("loss_type", LOSSES)
def test_early_and_late_pruning_are_the_same_bit_for_bit(loss_type: str) -> None:
    runs = [trained(cppo=options, loss_type=loss_type) for options in (HALF, late(HALF))]
    early, after = (weights_of(run.model) for run in runs)
    assert same(early, after)
    assert not same(early, plain_weights(loss_type=loss_type))
    assert logged(runs[0], "kl")[-1] > 0  # the reference takes part


def test_early_and_late_pruning_of_images_are_the_same_bit_for_bit() -> None:
    options = dataclasses.replace(HALF, loss=LOOK.loss)
    early, after = (
        weights_of(trained("qwen2_5_vl", cppo=each).model) for each in (options, late(options))
    )
    assert same(early, after)


def test_pruned_rows_are_those_with_the_smallest_advantages_of_their_question() -> None:
    whole, pruned = trainer_of(), trainer_of(cppo=HALF, loss_type="dapo")
    seen = [watched(trainer) for trainer in (whole, pruned)]
    for trainer in (whole, pruned):
        trainer.train()
    (everything,), (rest,) = (seen[i]["rollouts"] for i in (0, 1))
    advantages = everything["advantages"]
    expected = cppo.prune_completions(advantages, 4, 0.5)
    assert len(expected) == 4 and len(advantages) == 8
    assert torch.equal(rest["advantages"], advantages[expected])
    for name in ("prompt_ids", "completion_ids", "completion_mask"):
        assert torch.equal(rest[name], everything[name][expected]), name
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        tokens = rest["completion_mask"].bool()
        assert torch.equal(rest[name][tokens], everything[name][expected][tokens]), name
    assert rest["num_items_in_batch"] == rest["completion_mask"].sum()
    assert logged(pruned, "cppo/kept_share") == [0.5]
    # TRL's own statistics are over all that was sampled.
    for name in ("reward", "completions/mean_length"):
        assert logged(pruned, name) == logged(whole, name)


def test_early_pruning_runs_the_old_and_reference_model_on_the_kept_rows_only() -> None:
    tokens = []
    for options in (HALF, late(HALF)):
        trainer = trainer_of(cppo=options)
        seen = watched(trainer)
        trainer.train()
        tokens.append(sum(seen["tokens"]))
    assert 0 < tokens[0] * 2 == tokens[1]


@pytest.mark.parametrize("options", [dict(prune_scope="batch"), dict(prune="largest")])
def test_pruning_options(options: dict[str, str]) -> None:
    trainer = trainer_of(cppo=dataclasses.replace(HALF, **options))
    seen = watched(trainer)
    trainer.train()
    whole = trainer_of()
    all_rows = watched(whole)
    whole.train()
    names = {"prune_scope": "scope", "prune": "prune"}
    advantages = all_rows["rollouts"][0]["advantages"]
    expected = cppo.prune_completions(
        advantages, 4, 0.5, **{names[name]: value for name, value in options.items()}
    )
    assert torch.equal(seen["rollouts"][0]["advantages"], advantages[expected])


@pytest.mark.parametrize("loss_type", OTHER_LOSSES)
def test_every_other_loss_type_trains(loss_type: str) -> None:
    extra = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    run = trained(cppo=HALF, loss_type=loss_type, **extra)
    assert all(value > 0 for value in logged(run, "grad_norm"))
    assert logged(run, "cppo/kept_share") == [0.5]


def test_dynamic_allocation_fills_the_micro_batches_again() -> None:
    size = per_device_train_batch_size(4, 4, 0.75, steps_per_generation=2)
    assert size == 16
    trainer = trainer_of(
        cppo=dataclasses.replace(HALF, prune_rate=0.75),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    seen = watched(trainer)
    trainer.train()
    assert [len(micro["advantages"]) for micro in seen["micro"]] == [4, 4]
    with pytest.raises(ValueError, match="3 rows x 1 steps must be whole questions, of which 2 of"):
        per_device_train_batch_size(3, 4, 0.5)


def test_gradient_accumulation_changes_nothing() -> None:
    whole = weights_of(trained(cppo=HALF, num_iterations=1, max_steps=1).model)
    parts = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    run = trained(cppo=HALF, num_iterations=1, max_steps=1, **parts)
    assert relative_difference(weights_of(run.model), whole) < 1e-6


def test_lora_early_and_late_and_its_reference_is_the_model_without_adapters() -> None:
    from peft import LoraConfig

    runs, rollouts = [], []
    for options in (HALF, late(HALF)):
        adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        trainer = trainer_of(cppo=options, more={"peft_config": adapters}, max_steps=3)
        seen = watched(trainer)
        trainer.train()
        runs.append(weights_of(trainer.model))
        rollouts.append(seen["rollouts"])
    assert same(*runs)
    for first, second in zip(*rollouts, strict=True):
        assert torch.equal(first["ref_per_token_logps"], second["ref_per_token_logps"])
        assert not torch.allclose(first["ref_per_token_logps"], first["old_per_token_logps"])


def test_evaluation_is_left_alone() -> None:
    metrics = []
    for options in (None, HALF):
        trainer = trainer_of(cppo=options, per_device_eval_batch_size=4)
        metrics.append(trainer.evaluate(trainer.train_dataset))
    for name in ("eval_reward", "eval_loss", "eval_completions/mean_length"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-6), name
    assert "eval_cppo/kept_share" not in metrics[1]


def test_masked_tokens_of_a_rollout_function_are_pruned_along() -> None:
    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        ids = [[10 + i % 5, 11, 12 + i % 3, 13] for i in range(len(prompts))]
        encode = trainer.processing_class.apply_chat_template
        prompt_ids = [encode(p, tokenize=True, return_dict=False) for p in prompts]
        masks = [[1, 0, 1, 1] if i % 2 else [1, 1, 1, 0] for i in range(len(prompts))]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": ids,
            "logprobs": None,
            "env_mask": masks,
        }

    weights = []
    for options in (HALF, late(HALF)):
        more = {"rollout_func": rollout}
        trainer = trainer_of(cppo=options, more=more, loss_type="dapo", max_completion_length=4)
        seen = watched(trainer)
        trainer.train()
        (pruned,) = seen["rollouts"]
        assert pruned["tool_mask"].shape == (4, 4)
        assert pruned["num_items_in_batch"] == 12
        weights.append(weights_of(trainer.model))
    assert same(*weights)


def test_a_trainer_with_an_advantage_per_token() -> None:
    class PerToken(Fixed):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            rollout = super()._generate_and_score_completions(inputs)
            spread = rollout["advantages"][:, None] * rollout["completion_mask"]
            return {**rollout, "advantages": spread}

    class Mine(adapter.CPPOMixin, PerToken):
        pass

    options = dataclasses.replace(HALF, loss=LOOK.loss)
    found, expected = (
        weights_of(trained("qwen2_5_vl", cppo=options, base=base, max_steps=1).model)
        for base in (Mine, CPPOFixed)
    )
    assert relative_difference(found, expected) < 1e-6


# Contrastive perception


@pytest.mark.parametrize("divergence", ["k3", "k1"])
@pytest.mark.parametrize("cpl_reduction", ["token", "sequence"])
def test_contrast_of_log_probabilities_is_that_of_logits(
    divergence: str, cpl_reduction: str
) -> None:
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


def test_contrast_of_nothing_is_a_zero_with_a_graph() -> None:
    logps = torch.zeros(2, 3, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for reduction in ("token", "sequence"):
        config = LossConfig(cpl_reduction=reduction)
        views, flat = Views(logps, logps, logps), torch.ones(2, 3)
        loss = contrastive_perception(views, flat, flat + 1, nothing, 2, config).loss
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, logps)
        assert not gradient.any()


def dimmed(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return 0.9 * pixels + 0.05


def darkened(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return 0.2 * pixels


@pytest.mark.parametrize("cpl_reduction", ["sequence", "token"])
def test_gradients_are_those_of_our_trainer_on_the_same_batch(cpl_reduction: str) -> None:
    model, processor = tiny("qwen2_5_vl")
    pictures = [picture(48, 24, 1), picture(24, 72, 2)]
    texts = ["How many?", "What is the sum of the digits?"]
    questions = [question(*pair) for pair in zip(texts, [[p] for p in pictures], strict=True)]
    rollouts = fixed_rollouts(packed(model), processor, questions, group_size=3)
    batch = fixed_batch(rollouts)
    loss = LossConfig(cpl_coef=2.0, cpl_reduction=cpl_reduction)
    views = dict(positive_views=(dimmed,), negative_views=(darkened,))
    ours = cppo.CPPOConfig(loss=loss, **views)
    rows = torch.arange(6)

    def step() -> None:
        items = NumItems(*batch.counts(rows))
        microbatch_loss(model, batch, rows, items, ours, processor).loss.backward()

    expected = gradients(model.train(), step)

    options = dict(num_generations=3, per_device_train_batch_size=6, beta=0.0, num_iterations=1)
    trainer = trainer_of("qwen2_5_vl", cppo=CPPO(loss=loss, **views), **options)
    trainer.model.load_state_dict(model.state_dict())
    trainer.current_gradient_accumulation_steps = 1
    width = rollouts.prompts.input_ids.shape[1]
    prompts, images = rollouts.prompts, rollouts.prompts.images
    order = [question for question in range(2) for _ in range(3)]
    patches = images.pixel_values.split(images.image_grid_thw.prod(1).tolist())
    inputs = {
        "prompt_ids": prompts.input_ids[order],
        "prompt_mask": prompts.attention_mask[order].long(),
        "completion_ids": rollouts.input_ids[:, width:],
        "completion_mask": rollouts.completion_mask[:, width:].long(),
        "advantages": batch.advantages,
        "num_items_in_batch": rollouts.completion_mask.sum(),
        "pixel_values": torch.cat([patches[i] for i in order]),
        "image_grid_thw": images.image_grid_thw[order],
        "num_images": [1] * 6,
        "mm_token_type_ids": (rollouts.input_ids == model.config.image_token_id).int(),
        "cppo_seed": torch.zeros(6, dtype=torch.int64),
    }
    theirs = trainer.model.train()
    found = gradients(theirs, lambda: trainer.compute_loss(theirs, inputs).backward())
    assert relative_difference(found, expected) < 1e-5
    without = dataclasses.replace(ours, loss=dataclasses.replace(loss, cpl_coef=0.0))
    ours = without
    assert relative_difference(found, gradients(model, step)) > 1e-2


def test_perturbed_views_run_only_where_the_advantage_is_positive() -> None:
    trainer = trainer_of("qwen2_5_vl", cppo=LOOK, num_iterations=1, beta=0.0)
    seen = watched(trainer)
    shown: list[int] = []
    both_views = trainer._both_views

    def watch(rows: Any, seeds: Any, looking: Any) -> Any:
        shown.append(len(looking))
        return both_views(rows, seeds, looking)

    trainer._both_views = watch
    trainer.train()
    positive = [int((micro["advantages"] > 0).sum()) for micro in seen["micro"]]
    assert shown == positive and 0 < shown[0] < 8
    assert logged(trainer, "cppo/looking_share") == [n / 8 for n in positive]
    assert all(value > 0 for value in logged(trainer, "cppo/cpl_loss"))
    assert all(0 < value < 1 for value in logged(trainer, "cppo/perception_share"))
    assert not same(weights_of(trainer.model), plain_weights("qwen2_5_vl", num_iterations=1))


def test_a_question_has_one_seed_and_another_one_at_every_step() -> None:
    trainer = trainer_of(cppo=LOOK)
    seeds = trainer._view_seeds(torch.zeros(8)).tolist()
    assert seeds[:4] == seeds[:1] * 4 and seeds[4:] == seeds[4:5] * 4
    trainer._step += 1
    assert len({*seeds, *trainer._view_seeds(torch.zeros(8)).tolist()}) == 4


def test_gradient_accumulation_changes_nothing_with_images() -> None:
    options = dataclasses.replace(LOOK, prune_rate=0.5)
    once = dict(num_iterations=1, max_steps=1)
    whole = weights_of(trained("qwen2_5_vl", cppo=options, **once).model)
    parts = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    run = trained("qwen2_5_vl", cppo=options, **once, **parts)
    assert relative_difference(weights_of(run.model), whole) < 1e-6


# Processes


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    script = Path(__file__).with_name("trl_two_processes.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", str(script), str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
            "TORCH_COMPILE_DISABLE": "1",  # DeepSpeed compiles optimizers that nobody asked for
        },
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    from trl_two_processes import CASES, KINDS, METRICS, run

    for name in CASES:
        one = run(name, 1)
        for kind in KINDS:
            two = torch.load(tmp_path / f"{name}-{kind}.pt", weights_only=True)
            metrics = two.pop("metrics")
            assert relative_difference(two, weights_of(one.model)) < 1e-6, (name, kind)
            for metric in METRICS:
                assert metrics[metric] == pytest.approx(logged(one, metric), rel=1e-5), metric


# What the installed TRL has


def test_check_says_what_fits() -> None:
    fits = check()
    assert [str(fit) for fit in fits if not fit.fits and fit.part != "patch_trl"] == []
    assert fits[0].why.startswith(f"version {importlib.metadata.version('trl')}")
    assert fits[-1].part == "patch_trl" and fits[-1].fits == (TRL >= (1, 15))


def test_check_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import GRPOTrainer
    from trl.trainer import utils

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, inputs: None)
    monkeypatch.delattr(utils, "use_adapter")
    words = "\n".join(map(str, check()))
    assert (
        "_compute_loss: does not fit (expected (self model inputs), found (self inputs))" in words
    )
    assert "trl.trainer.utils: does not fit (missing: use_adapter)" in words
    with pytest.raises(RuntimeError, match="_compute_loss: does not fit"):
        trainer_of(cppo=HALF)

    def not_there(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_there)
    assert str(check()[0]) == "trl: does not fit (not installed: pip install 'trl>=1.7')"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.6.2")
    assert str(check()[0]) == "trl: does not fit (version 1.6.2; 1.7 to 1.x are known)"


def test_importing_the_adapter_imports_no_trl() -> None:
    code = "import cppo, sys; assert cppo.integrations.trl.CPPO; assert 'trl' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_the_trainer_is_trls_with_the_mixin_before_it() -> None:
    from trl import GRPOTrainer

    assert adapter.CPPOGRPOTrainer.__mro__[1:3] == (adapter.CPPOMixin, GRPOTrainer)
    assert issubclass(CPPOFixed, Fixed)
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = adapter.Trainer


# What is refused


def test_runs_that_would_lose_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="2 of 8 completions are kept, which do not divide over"):
        trainer_of(
            cppo=CPPO(prune_rate=0.75),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(use_vllm=True, vllm_importance_sampling_correction=True),
            "vLLM's importance sampling",
        ),
        (dict(tools=[print]), "tool calls and environments bring images and state of their own"),
        (dict(environments=[object()]), "tool calls and environments"),
        # Two processes of eight completions, of which a question has sixteen.
        (dict(num_generations=16), "= 8 must be a multiple of num_generations = 16"),
    ],
)
def test_what_would_give_wrong_numbers_is_refused(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(cppo=HALF)
    for name, value in changes.items():
        monkeypatch.setattr(trainer, name, value)  # an error if this TRL has no such attribute
    with pytest.raises(ValueError, match=words):
        check_run(trainer)
    if "use_vllm" in changes:  # late pruning has every old log-probability
        trainer.cppo = late(HALF)
        check_run(trainer)
    # Without pruning and contrast there is nothing to refuse.
    trainer.cppo = OFF
    check_run(trainer)


def test_a_loss_that_is_computed_elsewhere_is_refused() -> None:
    trainer = trainer_of(cppo=HALF)
    trainer.args.use_liger_kernel, trainer.compute_liger_loss = True, print  # TRL before 1.14
    with pytest.raises(ValueError, match="use_liger_kernel=True computes the loss elsewhere"):
        check_run(trainer)


def test_contrast_of_images_that_cannot_be_perturbed_is_refused() -> None:
    trainer = trainer_of("qwen2_5_vl", cppo=LOOK)
    trainer.processing_class = SimpleNamespace(image_processor=SimpleNamespace())
    with pytest.raises(ValueError, match="with another vision-language model set loss="):
        check_run(trainer)
    trainer.cppo = HALF
    check_run(trainer)


def test_options_that_mean_nothing_are_refused() -> None:
    for options, words in (
        (dict(prune_rate=1.0), r"prune_rate must be a number in \[0, 1\), got 1.0"),
        (dict(prune_scope="rank"), "prune_scope must be one of 'group', 'batch', got 'rank'"),
        (dict(prune="best"), "prune must be one of"),
        (dict(loss=LossConfig(divergence="full")), "loss.divergence must be one of 'k3', 'k1'"),
        (dict(loss=LossConfig(kl_coef=0.1)), "loss.kl_coef = 0.1 would have no effect; TRL has"),
        (dict(negative_views=("blurr",)), "unknown perturbation 'blurr'"),
    ):
        with pytest.raises(ValueError, match=words):
            CPPO(**options)


# The kernel


@pytest.mark.skipif(HAS_KERNEL, reason="this TRL has the kernel that patch_trl swaps")
def test_patch_trl_leaves_an_older_trl_alone() -> None:
    with pytest.raises(RuntimeError, match="cppo.patch_trl: patch_trl: does not fit"):
        patch_trl()


@pytest.mark.skipif(not HAS_KERNEL, reason="trl before 1.15 has no fused LM head")
def test_patch_trl_trains_the_same_and_can_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import utils

    theirs = utils._ChunkedLogProbFunction
    calls = []
    stats = cppo.linear_token_stats

    def watch(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return stats(*args, **kwargs)

    monkeypatch.setattr(cppo, "linear_token_stats", watch)
    undo = patch_trl("reference")
    try:
        patch_trl("reference")  # twice is once
        ours = weights_of(trained(temperature=0.7, top_entropy_quantile=0.5).model)
    finally:
        undo()
    assert utils._ChunkedLogProbFunction is theirs
    assert calls and calls[0]["temperature"] == 0.7 and calls[0]["backend"] == "reference"
    expected = plain_weights(temperature=0.7, top_entropy_quantile=0.5)
    assert relative_difference(ours, expected) < 1e-6
    del calls[:]
    trained(max_steps=1)
    assert not calls


@pytest.mark.skipif(not HAS_KERNEL, reason="trl before 1.15 has no fused LM head")
@pytest.mark.parametrize(
    ("softcap", "scale", "outputs", "is_ours"),
    [
        (None, 1.0, ("log_probs", "entropy"), True),
        (None, 2.0, ("log_probs",), True),
        (3.0, 1.0, ("log_probs", "entropy"), True),
        (3.0, 0.25, ("log_probs", "entropy"), True),
        (None, 1.0, ("log_probs", "entropy", "mean_logits", "is_top1"), False),
    ],
)
def test_patch_trl_computes_what_trl_computes(
    softcap: float | None,
    scale: float,
    outputs: tuple[str, ...],
    is_ours: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trl.trainer import utils

    calls = []
    stats = cppo.linear_token_stats

    def watch(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return stats(*args, **kwargs)

    monkeypatch.setattr(cppo, "linear_token_stats", watch)
    generator = torch.Generator().manual_seed(0)
    head = [torch.randn(n, 4, generator=generator, requires_grad=True) for n in (5, 9)]
    bias = torch.randn(9, generator=generator, requires_grad=True)
    usual = (*head, bias, torch.tensor([0, 8, 3, 3, 1]), 0.5, 4)
    theirs = utils._ChunkedLogProbFunction
    undo = patch_trl("reference")
    try:
        found = utils._ChunkedLogProbFunction.apply(*usual, softcap, scale, outputs)
    finally:
        undo()
    assert len(calls) == is_ours
    expected = theirs.apply(*usual, softcap, scale, outputs)
    assert len(found) == len(expected) == 5
    for ours, exact in zip(found, expected, strict=True):
        assert (ours is None) == (exact is None)
        if exact is not None:
            assert torch.allclose(ours.float(), exact.float(), atol=1e-5)
    for ours, exact in zip(
        *(torch.autograd.grad(each[0].sum(), [*head, bias]) for each in (found, expected)),
        strict=True,
    ):
        assert torch.allclose(ours, exact, atol=1e-5)
