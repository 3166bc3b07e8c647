"""Preparing a policy: what cannot be trained is refused before anything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from trainer_cases import config, tiny, trainer_for

import cppo
from cppo import policy

CPU = torch.device("cpu")
LORA = {"lora": cppo.LoraConfig(r=2)}


def adapted(kind: str = "PeftModel") -> Any:
    model, options = tiny("text")[0], LoraConfig(r=2, target_modules=["q_proj"])
    if kind == "injected":
        return peft.inject_adapter_in_model(options, model)
    return getattr(peft, kind)(model, options)


@pytest.mark.parametrize("kind", ["PeftModel", "PeftMixedModel", "injected"])
def test_adapters_are_not_added_to_adapters(kind: str, tmp_path: Path) -> None:
    words = "CPPOConfig.lora must be None for a model that has adapters already, got "
    model = adapted(kind)
    with pytest.raises(ValueError, match=words + type(model).__name__):
        policy.prepare(model, config(**LORA), CPU)
    if kind == "PeftModel":
        with pytest.raises(ValueError, match=words + r"PeftModel with \['default'\]"):
            trainer_for(tmp_path, model=model, **LORA)
        assert not list(tmp_path.glob("**/*.jsonl"))


def test_lora_without_peft_names_the_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cppo.extras.find_spec", lambda name: None)
    words = r"CPPOConfig.lora needs the package peft: pip install 'cppo\[peft\]'"
    with pytest.raises(ImportError, match=words):
        trainer_for(tmp_path, **LORA)
    trainer_for(tmp_path)


def test_a_model_with_nothing_to_train_is_refused(tmp_path: Path) -> None:
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


def test_a_model_of_which_only_the_frozen_tower_was_to_be_trained() -> None:
    model, _ = tiny("qwen2_5_vl")
    model.requires_grad_(False)
    model.model.visual.requires_grad_(True)
    policy.prepare(model, config(), CPU)
    with pytest.raises(ValueError, match="must have parameters to train"):
        policy.prepare(model, config(freeze_vision_tower=True), CPU)


def test_a_model_that_would_run_wrongly_is_refused_by_the_trainer(tmp_path: Path) -> None:
    from families import tiny_family

    _, tokenizer = tiny("text")
    model = tiny_family("lfm2")
    model.resize_token_embeddings(len(tokenizer))
    with pytest.raises(ValueError, match="'lfm2' .*on packed sequences, its logits are off by"):
        trainer_for(tmp_path, model=model)


def test_shared_prompts_are_checked_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(policy, "check_model", lambda model, shares: asked.append(shares))
    for shares in (False, True):
        policy.prepare(tiny("text")[0], config(share_prompts=shares), CPU)
    assert asked == [False, True]
