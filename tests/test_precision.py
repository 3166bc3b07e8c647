"""In which dtype parameters are held: nothing trained is lost, nothing frozen changes a bit."""

import copy
import json

import pytest
import torch
from families import tiny_family
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from trainer_cases import config, questions_for, text_rows, tiny, trainer_for, weights_of

import cppo
from cppo.model import forward
from cppo.model.images import image_token_mask
from cppo.model.load import load_model
from cppo.model.precision import hold_weights, whole
from cppo.model.prompts import encode_questions
from cppo.model.wrappers import unwrap
from cppo.train import policy
from cppo.train.checkpoint import last_checkpoint

CPU = torch.device("cpu")
HALVES = (torch.bfloat16, torch.float16)


def dtypes(model, trained):
    return {p.dtype for p in model.parameters() if p.requires_grad is trained}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", HALVES)
def test_a_small_step_changes_weights_that_were_stored_in_half(stored, precision, tmp_path):
    model, _ = tiny("text", dtype=stored)
    start = {name: value.float() for name, value in weights_of(model).items()}
    options = dict(precision=precision, learning_rate=1e-6, max_steps=3)
    trainer = trainer_for(tmp_path, model=model, **options)
    trainer.train()
    assert dtypes(trainer.model, True) == {torch.float32}
    states = trainer.optimizer.state.values()
    assert {state[key].dtype for state in states for key in ("exp_avg", "exp_avg_sq")} == {
        torch.float32
    }
    now = weights_of(trainer.model)
    # A tenth of them have no gradient: tokens that are neither read nor predicted.
    moved = sum(int((now[name] != start[name]).sum()) for name in start)
    assert moved > 0.85 * sum(value.numel() for value in start.values())
    saved = load_file(last_checkpoint(tmp_path) / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


def layers_of(model, kind):
    base = unwrap(model)
    return {n: m for n, m in base.named_modules() if isinstance(m, kind)}


def test_rewards_compute_in_their_own_arithmetic(tmp_path):
    """A reward may be a model: it says the same of a completion in training and in evaluations."""
    seen = {}

    def reward(completions, trainer_state, **columns):
        seen[trainer_state.global_step, len(completions)] = torch.is_autocast_enabled("cpu")
        return [float(len(str(completion))) for completion in completions]

    options = dict(precision="bf16", eval_rows=text_rows(3), eval_greedy=False, max_steps=1)
    trainer_for(tmp_path, rewards=reward, **options).train()
    assert seen == {(0, 3): False, (0, 8): False, (1, 3): False}


def test_what_is_frozen_is_cast_once_and_the_rest_is_not():
    model, _ = tiny("qwen2_5_vl", dtype=torch.bfloat16)
    options = config(precision="bf16", kl_coef=0.1)
    reference = policy.frozen_copy(model, options, torch.device("cpu"))
    linear, convolutions = layers_of(reference, nn.Linear), layers_of(reference, nn.Conv3d)
    assert linear.pop("lm_head").weight.dtype == torch.float32
    assert convolutions and linear
    cast = {*linear.values(), *convolutions.values()}
    for layer in cast:
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    rest = [m for m in reference.modules() if m not in cast]
    kept = [p for m in rest for p in m.parameters(recurse=False)]
    assert {p.dtype for p in kept} == {torch.float32}

    lora = config(precision="bf16", lora=cppo.LoraConfig(r=2))
    adapted = policy.prepare(copy.deepcopy(model), lora, CPU)
    assert dtypes(adapted, True) == {torch.float32}
    assert dtypes(adapted, False) == {torch.float32, torch.bfloat16}
    whole_model = policy.prepare(copy.deepcopy(model), config(precision="bf16"), CPU)
    assert dtypes(whole_model, True) == {torch.float32} and not dtypes(whole_model, False)
    single = policy.prepare(copy.deepcopy(model), config(precision="fp32"), CPU)
    assert dtypes(single, True) == {torch.float32}
    assert {b.dtype for b in single.buffers() if b.is_floating_point()} == {torch.float32}
    lora = config(precision="fp32", lora=cppo.LoraConfig(r=2))
    assert dtypes(policy.prepare(model, lora, CPU), False) == {torch.float32}


def test_a_model_in_fp64_stays_in_fp64():
    for precision in ("fp32", "bf16"):
        model, _ = tiny("text", dtype=torch.float64)
        model = policy.prepare(model, config(precision=precision), CPU)
        assert dtypes(model, True) == {torch.float64}


BIT_FOR_BIT = ("qwen3", "opt", "phi", "mixtral", "qwen2_moe", "deepseek_v3", "gemma3n_text")
BIT_FOR_BIT += ("ernie4_5_moe", "cohere2", "longcat_flash", "minicpm3", "jetmoe", "gpt_oss")


@pytest.mark.parametrize("family", BIT_FOR_BIT)
def test_under_autocast_frozen_weights_give_the_same_bits(family):
    ids = torch.arange(24).view(2, 12) * 5 % 60 + 3
    logits = []
    for is_held in (False, True):
        model = tiny_family(family).requires_grad_(False)
        if is_held:
            hold_weights(model, "bf16", may_round=True)
            assert torch.bfloat16 in dtypes(model, False)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits.append(model(input_ids=ids).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_under_autocast_a_frozen_vision_model_gives_the_same_bits(family):
    logits = []
    for is_held in (False, True):
        model, processor = tiny(family)
        prompts = encode_questions(model, processor, questions_for(family)[:2])
        images = prompts.images
        assert images is not None
        model.requires_grad_(False)
        if is_held:
            hold_weights(model, "bf16", may_round=True)
            assert model.model.visual.patch_embed.proj.weight.dtype == torch.bfloat16
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            output = model(
                input_ids=prompts.input_ids,
                attention_mask=prompts.attention_mask.long(),
                pixel_values=images.joined("pixel_values"),
                image_grid_thw=images.joined("image_grid_thw"),
                mm_token_type_ids=image_token_mask(model, prompts.input_ids).int(),
            )
        logits.append(output.logits)
    assert torch.equal(*logits)


ADAPTERS = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "on the head": {"target_modules": ["lm_head", "v_proj"]},
    "copy of the head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(kind):
    torch.manual_seed(0)
    model = get_peft_model(tiny_family("qwen3"), LoraConfig(r=2, **ADAPTERS[kind]))
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model


@pytest.mark.parametrize("kind", ADAPTERS)
def test_under_autocast_adapters_get_the_same_gradients(kind):
    ids = torch.arange(24).view(2, 12) * 5 % 60 + 3
    results = []
    for is_held in (False, True):
        model = adapted(kind)
        if is_held:
            hold_weights(model, "bf16", may_round=True)
        forward.set_attention(model, "sdpa")
        mask = torch.ones_like(ids)
        stream = cppo.pack_completions(ids, mask, mask * (torch.arange(12) >= 4))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits
            hidden = cppo.packed_hidden(model, stream)
            head = forward.lm_head(model, dtype=hidden.dtype)._asdict()
            stats = cppo.linear_token_stats(hidden, targets=stream.targets, **head)
        (logits.float().sin().sum() + stats.logps.sum()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({**gradients, "logits": logits, "logps": stats.logps})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    wide = {n for n, m in layers_of(model, nn.Linear).items() if m.weight.dtype == torch.float32}
    assert ("model.layers.0.self_attn.q_proj.base_layer" in wide) == (kind == "dora")
    assert "model.layers.0.self_attn.k_proj" not in wide


def test_shared_weights_and_those_a_family_keeps_in_fp32_stay_in_fp32():
    model = tiny_family("qwen3").requires_grad_(False)
    first, second = model.model.layers
    first.mlp.up_proj.weight = second.mlp.up_proj.weight
    first.self_attn.k_proj.weight.requires_grad_(True)
    model._keep_in_fp32_modules = ["v_proj"]
    hold_weights(model, "bf16", may_round=True)
    for layer in (first, second):
        assert layer.self_attn.q_proj.weight.dtype == torch.bfloat16
        assert layer.mlp.up_proj.weight.dtype == torch.float32
        assert layer.self_attn.v_proj.weight.dtype == torch.float32
    assert first.self_attn.k_proj.weight.dtype == torch.float32
    assert second.self_attn.k_proj.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize("is_bf16", [True, False])
def test_a_frozen_vision_tower_is_saved_as_it_was(is_bf16, tmp_path):
    model, _ = tiny("qwen2_5_vl")
    if is_bf16:  # as most checkpoints are
        model = model.bfloat16().float()
    start = weights_of(model)
    options = dict(precision="bf16", freeze_vision_tower=True, max_steps=1)
    trainer = trainer_for(tmp_path, "qwen2_5_vl", model=model, **options)
    tower = trainer.model.model.visual
    held = tower.patch_embed.proj.weight.dtype
    assert held == (torch.bfloat16 if is_bf16 else torch.float32)
    trainer.train()
    assert tower.patch_embed.proj.weight.dtype == held
    folder = last_checkpoint(tmp_path)
    saved = load_model(folder)
    for name, value in weights_of(saved).items():
        is_frozen = ".visual." in name
        assert torch.equal(value, start[name]) >= is_frozen, name
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    plain = type(saved).from_pretrained(folder)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}


def test_a_run_with_a_frozen_tower_is_resumed_bit_for_bit(tmp_path):
    def trainer(name):
        model, _ = tiny("qwen2_5_vl", dtype=torch.bfloat16)
        options = dict(precision="bf16", freeze_vision_tower=True, save_every=1)
        return trainer_for(tmp_path / name, "qwen2_5_vl", model=model, max_steps=2, **options)

    straight = trainer("straight")
    straight.train()
    interrupted = trainer("parts")
    interrupted.train()
    resumed = trainer("parts")
    resumed.train(resume_from=tmp_path / "parts" / "checkpoint-000001", overwrite=True)
    ours, expected = weights_of(resumed.model), weights_of(straight.model)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert {n: v.dtype for n, v in ours.items()} == {n: v.dtype for n, v in expected.items()}


def test_whole_is_only_for_a_while():
    model = tiny_family("qwen3").bfloat16().requires_grad_(False)
    hold_weights(model, "bf16", may_round=False)
    before = weights_of(model)
    with whole(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    after = weights_of(model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert {v.dtype for v in after.values()} == {torch.float32, torch.bfloat16}
    model = adapted("lora")
    hold_weights(model, "bf16", may_round=True)
    with whole(model):  # a base of 7 B is not cast to save its adapters
        assert dtypes(model, False) == {torch.float32, torch.bfloat16}
