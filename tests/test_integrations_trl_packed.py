"""TRL's forward without padding, and with prompts that completions share."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")

from datasets import Dataset
from trainer_cases import image as picture
from trainer_cases import relative_difference, same, tiny, weights_of
from transformers import OPTConfig, OPTForCausalLM
from trl_cases import (
    CPPO,
    HALF,
    HALF_LOOK,
    OFF,
    Fixed,
    late,
    logged,
    rows_of,
    trainer_of,
    watched,
    watched_run,
)

from cppo.integrations import trl_packed
from cppo.integrations.trl import CPPOMixin
from cppo.integrations.trl_options import check_run, exchanged
from cppo.integrations.trl_packed import questions
from cppo.options.trainer import LossConfig

PACKED = {"pack": dict(pack=True), "shared": dict(share_prompts=True)}
# A mean over the perception tokens of a micro-batch.
BY_TOKEN = LossConfig(cpl_coef=1.0, cpl_reduction="token")
# What fp64 leaves of a model that normalises in fp32.
ROUNDING = 1e-6


def packed(options: CPPO, how: str) -> CPPO:
    return dataclasses.replace(options, **PACKED[how])


def run_fp64(options: CPPO, **run: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    """A trainer after its run in fp64, how far its weights moved, and what passed it."""
    trainer = trainer_of(cppo=options, **run)
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            model.double()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    seen = watched(trainer)
    trainer.train()
    moved = {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}
    return trainer, moved, seen


def check_equal(options: CPPO, how: str, **run: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Packed training is padded training, with fewer tokens; returns what passed both trainers."""
    padded, expected, before = run_fp64(options, **run)
    other, moved, after = run_fp64(packed(options, how), **run)
    assert relative_difference(moved, expected) < ROUNDING
    assert logged(other, "loss") == pytest.approx(logged(padded, "loss"), rel=1e-5, abs=1e-7)
    # TRL's metrics are means of its micro-batches' means, and shared prompts deal rows otherwise.
    names = ("entropy", "kl", "cppo/cpl_loss", "clip_ratio/region_mean") if how == "pack" else ()
    for name in names:
        assert logged(other, name) == pytest.approx(logged(padded, name), rel=1e-5, abs=1e-7), name
    assert sum(after["grad_tokens"]) < sum(before["grad_tokens"])
    assert sum(after["tokens"]) < sum(before["tokens"]) or not sum(before["tokens"])
    return before, after


@pytest.mark.parametrize("how", PACKED)
@pytest.mark.parametrize("options", [OFF, HALF], ids=["all", "half"])
def test_text_trains_as_padded(options, how):
    check_equal(options, how, family="text", max_steps=3)


@pytest.mark.parametrize("how", PACKED)
@pytest.mark.parametrize(
    "loss_type", ["dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"]
)
def test_every_kind_of_loss_trains_as_padded(loss_type, how):
    run = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4)
    if loss_type == "luspo":  # before 1.15 TRL's means of it are over padding, too, but for these
        run |= dict(importance_sampling_level="sequence", beta=0.0)
    check_equal(OFF, how, family="text", loss_type=loss_type, **run)


@pytest.mark.parametrize("how", PACKED)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_images_and_their_views_train_as_padded(family, how):
    run = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, num_iterations=1)
    check_equal(HALF_LOOK, how, family=family, **run)


@pytest.mark.parametrize("how", PACKED)
def test_contrast_over_tokens_trains_as_padded(how):
    run = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4, num_iterations=1)
    check_equal(CPPO(loss=BY_TOKEN), how, family="qwen2_5_vl", loss_type="dapo", **run)


@pytest.mark.parametrize("how", PACKED)
def test_questions_with_two_images_and_one_train_as_padded(how):
    """The texts are alike, so that the images alone tell the questions apart."""
    prompt = [{"role": "user", "content": "What is the sum?"}]
    sizes = ([(56, 28), (28, 56)], [(28, 28)], [(56, 56)], [(28, 28)])
    rows = [
        {"prompt": prompt, "images": [picture(*size, number) for size in own]}
        for number, own in enumerate(sizes)
    ]
    run = dict(rows=Dataset.from_list(rows), per_device_train_batch_size=16, num_iterations=1)
    check_equal(HALF_LOOK, how, family="qwen2_5_vl", **run)


@pytest.mark.parametrize("how", PACKED)
def test_learned_positions_train_as_padded(how, monkeypatch):
    """Those of OPT begin behind the padding, as they do in the stream."""

    def opt(folder: str) -> Any:
        torch.manual_seed(0)
        sizes = dict(vocab_size=len(tiny("text")[1]), hidden_size=32, word_embed_proj_dim=32)
        sizes |= dict(ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
        return OPTForCausalLM(OPTConfig(dropout=0.0, max_position_embeddings=128, **sizes))

    monkeypatch.setattr("trl_cases.load_model", opt)
    check_equal(OFF, how, family="text", beta=0.0)


@pytest.mark.parametrize("how", PACKED)
def test_adapters_train_as_padded(how):
    from peft import LoraConfig

    adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    check_equal(HALF, how, family="text", more={"peft_config": adapters}, max_steps=3)


@pytest.mark.parametrize("how", PACKED)
def test_early_and_late_pruning_train_alike(how):
    early, _ = watched_run(cppo=packed(HALF, how), max_steps=3)
    after, _ = watched_run(cppo=late(packed(HALF, how)), max_steps=3)
    # A shared stream of other rows rounds otherwise.
    if how == "pack":
        same(weights_of(early.model), weights_of(after.model))
    assert relative_difference(weights_of(early.model), weights_of(after.model)) < 1e-6


def test_evaluation_is_packed_too():
    losses = []
    for options in (OFF, packed(OFF, "shared")):
        trainer = trainer_of(cppo=options, more={"eval_dataset": rows_of("text", 4)})
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_stream_of_questions_is_packed():
    """Nobody knows its first prompt before training."""
    stream = rows_of("text").to_iterable_dataset()
    trainer, _ = watched_run(cppo=packed(HALF, "pack"), rows=stream, max_steps=1, num_iterations=1)
    assert logged(trainer, "cppo/kept_share") == [0.5]


def test_completions_of_a_question_meet_in_a_micro_batch():
    run = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4, num_iterations=1)
    apart, before = watched_run(cppo=packed(OFF, "pack"), max_steps=2, **run)
    trainer, after = watched_run(cppo=packed(OFF, "shared"), max_steps=2, **run)
    for micro in after["micro"]:
        assert len(micro["prompt_ids"].unique(dim=0)) == 1
    assert any(len(micro["prompt_ids"].unique(dim=0)) > 1 for micro in before["micro"])
    assert relative_difference(weights_of(trainer.model), weights_of(apart.model)) < 1e-6
    # A prompt is computed once but for its last token, which every completion has to itself.
    for micro, tokens in zip(after["micro"], after["grad_tokens"], strict=True):
        prompt = int(micro["prompt_mask"][0].sum())
        assert tokens == prompt - 1 + len(micro["prompt_ids"]) + int(micro["completion_mask"].sum())


def exchange(steps: int = 1, accumulated: int = 1, loss_type: str = "grpo", **more: Any) -> int:
    args = SimpleNamespace(
        steps_per_generation=steps, gradient_accumulation_steps=accumulated, loss_type=loss_type
    )
    return exchanged(SimpleNamespace(**{"args": args, "cppo": CPPO(), **more}))


def test_rows_change_places_within_an_optimizer_step_alone():
    assert exchange(8, 2) == 2
    assert exchange(2, 8) == 2
    assert exchange(6, 4) == 1
    assert exchange(4, 4, "dapo") == 4
    # A micro-batch has a mean, a threshold, an entropy of its own.
    assert exchange(4, 4, "bnpo") == 1
    assert exchange(4, 4, top_entropy_quantile=0.2) == 1
    assert exchange(4, 4, _entropy_bonus_enabled=True) == 1
    assert exchange(4, 4, cppo=CPPO(loss=BY_TOKEN)) == 1
    assert exchange(4, 4, cppo=CPPO(loss=dataclasses.replace(BY_TOKEN, cpl_coef=0))) == 4


def test_prompts_are_one_question_if_text_and_images_are():
    ids = torch.tensor([[9, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 3], [0, 1, 2]])
    mask = torch.tensor([[0, 1, 1]] * 4 + [[1, 1, 1]])
    text = questions(ids, mask, [[]] * 5)
    assert text[0] == text[1] == text[2] and len(set(text)) == 3

    def image(value: float, *grid: int) -> dict[str, torch.Tensor]:
        patches = torch.full((4, 3), value)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([grid])}

    images = [[image(value, 1, 2, 2)] for value in (1.0, 1.0, 2.0, 1.0, 1.0)]
    assert questions(ids, mask, images) == [0, 0, 1, 2, 3]
    wide = [[image(1.0, 1, 2, 2)], [image(1.0, 1, 1, 4)]]
    assert questions(ids[:2], mask[:2], wide) == [0, 1]
    assert questions(ids[:2], mask[:2], [wide[0], wide[0] * 2]) == [0, 1]


def test_an_entry_without_a_value_stays_without_one():
    class Extra(Fixed):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            return super()._generate_and_score_completions(inputs) | {"extra": None}

    class CPPOExtra(CPPOMixin, Extra):
        pass

    run = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for options in (packed(OFF, "shared"), HALF):
        _, seen = watched_run(cppo=options, base=CPPOExtra, **run)
        assert all(micro["extra"] is None for micro in seen["micro"])


def test_a_micro_batch_without_a_token_has_a_gradient_of_zero():
    run = dict(max_completion_length=3, mask_truncated_completions=True, beta=0.0)

    class Endless(Fixed):
        def _generate_single_turn(self, prompt_ids: list[Any], *rest: Any, **more: Any) -> Any:
            return [[5, 6, 7] for _ in prompt_ids], None

    class CPPOEndless(CPPOMixin, Endless):
        pass

    for how in PACKED:
        trainer = trainer_of(cppo=packed(OFF, how), base=CPPOEndless, **run)
        before = {name: value.clone() for name, value in weights_of(trainer.model).items()}
        trainer.train()
        same(weights_of(trainer.model), before)


def test_what_cannot_be_packed_is_refused():
    shared = packed(OFF, "shared")
    trainer = trainer_of(cppo=shared)
    call = dict(model=trainer.model, input_ids=torch.ones(2, 4, dtype=torch.long))
    call |= dict(attention_mask=torch.ones(2, 4, dtype=torch.long), logits_to_keep=2)
    with pytest.raises(ValueError, match="know input_ids.*got token_type_ids"):
        trainer._forward(call | {"token_type_ids": torch.zeros(2, 4, dtype=torch.long)})
    trainer.aux_loss_enabled = True
    with pytest.raises(ValueError, match="router's loss.*router_aux_loss_coef=0"):
        check_run(trainer)
    trainer.aux_loss_enabled, trainer.use_transformers_continuous_batching = False, True
    with pytest.raises(ValueError, match="continuous_batching=True samples with an attention"):
        check_run(trainer)
    # What only shared prompts need is not asked of packing.
    trainer.use_transformers_continuous_batching = False
    del trainer._buffered_inputs
    with pytest.raises(ValueError, match="deals the rows of TRL's buffer"):
        check_run(trainer)
    trainer.cppo = packed(OFF, "pack")
    check_run(trainer)


def test_the_attention_is_chosen_for_the_device_of_training(monkeypatch):
    chosen = []
    monkeypatch.setattr(
        trl_packed, "set_attention", lambda model, name, device: chosen.append((name, device))
    )
    trainer = trainer_of(cppo=OFF)
    trainer.cppo = packed(OFF, "pack")
    monkeypatch.setattr(trl_packed, "check_model", lambda model, shares, shown: None)
    trl_packed.prepare(trainer)
    assert chosen == [("auto", trainer.accelerator.device)] * 2  # the reference model's, too
