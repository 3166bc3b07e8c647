"""Preparing a policy: what cannot be trained is refused before anything is."""

import re

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from trainer_cases import config, tiny, trainer_for

import cppo
from cppo.model import ways
from cppo.train import policy

CPU = torch.device("cpu")
LORA = {"lora": cppo.LoraConfig(r=2)}


def adapted(kind="PeftModel"):
    model, options = tiny("text")[0], LoraConfig(r=2, target_modules=["q_proj"])
    if kind == "injected":
        return peft.inject_adapter_in_model(options, model)
    return getattr(peft, kind)(model, options)


@pytest.mark.parametrize("kind", ["PeftModel", "PeftMixedModel", "injected"])
def test_adapters_are_not_added_to_adapters(kind, tmp_path):
    words = "CPPOConfig.lora must be None for a model that has adapters already, got "
    model = adapted(kind)
    with pytest.raises(ValueError, match=words + type(model).__name__):
        policy.prepare(model, config(**LORA), CPU)
    if kind == "PeftModel":
        with pytest.raises(ValueError, match=words + r"PeftModel with \['default'\]"):
            trainer_for(tmp_path, model=model, **LORA)
        assert not list(tmp_path.glob("**/*.jsonl"))


def test_lora_without_peft_names_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setattr("cppo.extras.find_spec", lambda name: None)
    words = r"CPPOConfig.lora needs the package peft: pip install 'cppo\[peft\]'"
    with pytest.raises(ImportError, match=words):
        trainer_for(tmp_path, **LORA)


def test_a_model_with_nothing_to_train_is_refused(tmp_path):
    model, _ = tiny("text")
    words = "model must have parameters to train, but all are frozen"
    with pytest.raises(ValueError, match=words + r" \(requires_grad is False\)$"):
        policy.prepare(model.requires_grad_(False), config(), CPU)
    model, _ = tiny("text")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    frozen = peft.PeftModel.from_pretrained(tiny("text")[0], tmp_path)
    with pytest.raises(ValueError, match=words + r" .*: load .*is_trainable=True"):
        trainer_for(tmp_path, model=frozen)
    trained = peft.PeftModel.from_pretrained(tiny("text")[0], tmp_path, is_trainable=True)
    trainer_for(tmp_path, model=trained)
    # A frozen model is what adapters are added to.
    policy.prepare(tiny("text")[0].requires_grad_(False), config(**LORA), CPU)


def test_a_model_of_which_only_the_frozen_tower_was_to_be_trained():
    model, _ = tiny("qwen2_5_vl")
    model.requires_grad_(False)
    model.model.visual.requires_grad_(True)
    policy.prepare(model, config(), CPU)
    with pytest.raises(ValueError, match="must have parameters to train"):
        policy.prepare(model, config(freeze_vision_tower=True), CPU)


def family_model(name):
    from families import tiny_family

    model = tiny_family(name)
    model.resize_token_embeddings(len(tiny("text")[1]))
    return model


def test_a_model_that_would_run_wrongly_is_refused_by_the_trainer(tmp_path):
    words = "'modernbert-decoder' .*by its LM head, its logits are off by"
    with pytest.raises(ValueError, match=words):
        trainer_for(tmp_path, model=family_model("modernbert-decoder"))


@pytest.mark.parametrize("family", ["lfm2", "gpt_oss", "gemma2"])
def test_a_model_that_cannot_be_packed_is_padded_and_the_run_says_so(family, tmp_path, capsys):
    model = family_model(family)
    trainer = trainer_for(tmp_path, model=model, share_prompts=True)
    assert not trainer.policy.ways.text
    # Sinks and caps are computed by the model's own attention alone.
    own = "cppo_plain" if family == "lfm2" else "eager"
    assert model.config._attn_implementation == own
    said = capsys.readouterr().out
    assert "padded (all), because packed sequences would be wrong: model_type" in said
    assert "share_prompts has no effect" in said


def test_shared_prompts_are_checked_where_they_are_asked_for(monkeypatch):
    asked = []

    def checked(model, *, shares=False, **_):
        asked.append(shares)

    monkeypatch.setattr(ways, "check_model", checked)
    for shares in (False, True):
        policy.prepare(tiny("text")[0], config(share_prompts=shares), CPU)
    assert asked == [False, True]


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("attention", ["varlen", "flash_attention_2"])
def test_an_attention_that_cannot_run_is_refused_by_its_option(attention, kl_coef, tmp_path):
    words = r"CPPOConfig.attention must be 'auto' or one that runs here \(sdpa\), got "
    with pytest.raises(ValueError, match=words + f"'{attention}': "):
        trainer_for(tmp_path, attention=attention, kl_coef=kl_coef)


def test_the_reference_has_the_attention_of_its_own_device(monkeypatch):
    asked = []
    monkeypatch.setattr(
        policy.forward,
        "choose_attention",
        lambda name, device, *_: asked.append(torch.device(device).type) or "sdpa",
    )
    monkeypatch.setattr(policy, "choose_ways", lambda *_, **__: ways.Ways())
    policy.frozen_copy(tiny("text")[0], config(), torch.device("meta"))
    assert asked == ["meta"]


def test_a_tower_that_there_is_not_cannot_be_frozen(tmp_path):
    words = "CPPOConfig.freeze_vision_tower must be False for a model without a vision tower, got T"
    with pytest.raises(ValueError, match=words):
        trainer_for(tmp_path, freeze_vision_tower=True)


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (("nope",), "there is no 'nope'"),
        (("q_proj", "v_prj"), "there is no 'v_prj'"),
        (("proj",), "there is no 'proj'"),
        ("nope", "it matches no layer"),
        ("q_proj", "it matches no layer"),  # one text is a regular expression for a whole name
        (("norm",), "Target module .* is not supported"),
        (("model",), "Target module .* is not supported"),
    ],
)
def test_layers_that_there_are_not_are_refused(targets, reason, tmp_path):
    lora = cppo.LoraConfig(r=2, target_modules=targets)
    words = (
        r"LoraConfig.target_modules must be 'all-linear' or name layers of the model \(linear "
        rf"ones: down_proj, .*, up_proj, v_proj\), got {re.escape(repr(targets))}: {reason}"
    )
    with pytest.raises(ValueError, match=words):
        trainer_for(tmp_path, lora=lora)


def test_layers_that_are_all_frozen_are_refused():
    model, _ = tiny("qwen2_5_vl")
    lora = cppo.LoraConfig(r=2, target_modules=("qkv",))
    policy.prepare(tiny("qwen2_5_vl")[0], config(lora=lora), CPU)
    with pytest.raises(ValueError, match=r"LoraConfig.target_modules must be .* got \('qkv',\): "):
        policy.prepare(model, config(lora=lora, freeze_vision_tower=True), CPU)


@pytest.mark.parametrize(
    "targets", ["all-linear", r".*\.q_proj", ("q_proj", "mlp.up_proj"), ("lm_head",)]
)
def test_layers_that_there_are_get_adapters(targets):
    model, _ = tiny("text")
    lora = cppo.LoraConfig(r=2, target_modules=targets)
    prepared = policy.prepare(model, config(lora=lora, seed=2**63 - 1), CPU)
    assert any("lora_A" in name for name, p in prepared.named_parameters() if p.requires_grad)


def test_checkpointing_is_on_where_it_is_asked_for_and_the_model_knows_it():
    for wanted in (False, True):
        model = policy.prepare(tiny("text")[0], config(gradient_checkpointing=wanted), CPU)
        assert model.is_gradient_checkpointing == wanted
    model, _ = tiny("text")
    model.supports_gradient_checkpointing = False
    words = "CPPOConfig.gradient_checkpointing must be False for this model: .* does not support"
    with pytest.raises(ValueError, match=words):
        policy.prepare(model, config(gradient_checkpointing=True), CPU)


def test_adapters_fork_the_generator_of_their_own_gpu_alone(monkeypatch):
    """Of all GPUs of a machine, `fork_rng` warns."""
    model, forked, fork = tiny("text")[0], [], torch.random.fork_rng
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda *devices: forked.append(devices) or fork(devices=[])
    )
    policy.prepare(model, config(**LORA), CPU)
    assert forked and set(map(str, forked)) == {"([],)"}
