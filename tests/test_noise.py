"""A model's own dropout: the completions were sampled without it, so the update runs without it."""

import json

import peft
import pytest
import torch
from torch import nn
from trainer_cases import config, same, tiny, trainer_for, weights_of
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

import cppo
from cppo.train import policy

CPU = torch.device("cpu")
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
SIZES |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=128)
FAMILIES = {
    "phi": (
        PhiForCausalLM,
        PhiConfig,
        dict(resid_pdrop=0.5, embd_pdrop=0.3, attention_dropout=0.4),
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig,
        dict(dropout=0.5, attention_dropout=0.4, activation_dropout=0.3, layerdrop=0.5),
    ),
    "persimmon": (
        PersimmonForCausalLM,
        PersimmonConfig,
        dict(hidden_dropout=0.5, attention_dropout=0.4),
    ),
    "phimoe": (
        PhimoeForCausalLM,
        PhimoeConfig,
        dict(attention_dropout=0.4, router_jitter_noise=0.3, input_jitter_noise=0.3),
    ),
}


def family(name, *, noisy):
    model_class, config_class, noise = FAMILIES[name]
    torch.manual_seed(0)
    own = {"ffn_dim": 24, "word_embed_proj_dim": 16} if name == "opt" else {}
    if name == "phimoe":
        own = {"num_key_value_heads": 2, "num_local_experts": 4}
    sizes = {**SIZES, **own, "vocab_size": len(tiny("text")[1])}
    return model_class(config_class(**sizes, **(noise if noisy else dict.fromkeys(noise, 0.0))))


def length(completions, **columns):
    return [float(sum(map(ord, completion))) for completion in completions]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_update_is_that_of_the_model_without_dropout(name, tmp_path):
    after = []
    for noisy in (False, True):
        model = family(name, noisy=noisy)
        trainer = trainer_for(
            tmp_path / str(noisy), model=model, rewards=length, max_steps=2, optimizer_steps=2
        )
        trainer.train()
        after.append(weights_of(trainer.model))
        # The config, and so what is saved, is as it was.
        saved = json.loads((tmp_path / str(noisy) / "checkpoint-000002/config.json").read_text())
        for option, rate in FAMILIES[name][2].items():
            assert saved[option] == getattr(model.config, option) == (rate if noisy else 0.0)
    assert same(*after)


@pytest.mark.parametrize("start", ["lora", "PeftModel"])
def test_the_dropout_of_adapters_stays(start):
    model, options = family("phi", noisy=True), config()
    if start == "lora":
        options = config(lora=cppo.LoraConfig(r=2, dropout=0.25, target_modules=["q_proj"]))
    else:
        own = peft.LoraConfig(r=2, lora_dropout=0.25, target_modules=["q_proj"])
        model = peft.get_peft_model(model, own)
    model = policy.prepare(model, options, CPU)
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    ours = {rate for name, rate in rates.items() if "lora_dropout" in name}
    assert ours == {0.25}
    assert {rate for name, rate in rates.items() if "lora_dropout" not in name} == {0.0}


def test_noise_that_no_attribute_turns_off_is_refused(tmp_path):
    model, processor = tiny("text")

    def noisy(layer, inputs, output):
        return nn.functional.dropout(output, 0.1, training=layer.training)

    model.model.layers[0].mlp.register_forward_hook(noisy)
    words = "model_type 'qwen3' cannot be trained here: in training mode its hidden states are off"
    with pytest.raises(ValueError, match=words):
        trainer_for(tmp_path, model=model, processor=processor)


def test_a_vision_tower_has_no_dropout_either():
    model, _ = tiny("qwen2_5_vl")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    policy.prepare(model, config(), CPU)
    assert {m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")} == {
        0.0
    }
