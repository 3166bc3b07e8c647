"""What an engine is sent: the weights as a checkpoint on the hub has them, adapters merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from trainer_cases import (
    same,
    tiny,
)

from cppo.model.hub_weights import hub_weights


@pytest.mark.parametrize("family", ["text", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_names_are_those_of_a_checkpoint(family: str, tmp_path: Any) -> None:
    from safetensors.torch import load_file

    model, _ = tiny(family)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    sent = dict(hub_weights(model))
    # A tied head, which a checkpoint leaves out, is sent as well: an engine may have a copy of it.
    assert sent.keys() - saved.keys() <= {"lm_head.weight"} and saved.keys() <= sent.keys()
    assert "lm_head.weight" in sent
    assert all(torch.equal(sent[name], saved[name]) for name in saved)


def test_adapters_are_merged_and_the_model_stays_as_it_is() -> None:
    model, _ = tiny("text")
    plain = {name: value.clone() for name, value in hub_weights(model)}
    adapted = _adapted(model, target_modules="all-linear", modules_to_save=["norm"])
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    sent = dict(hub_weights(adapted))
    assert sent.keys() == plain.keys()
    assert same(before, dict(adapted.state_dict()))
    changed = {name for name in sent if not torch.equal(sent[name], plain[name])}
    assert changed == {name for name in sent if "_proj." in name or "norm." in name}
    with adapted.disable_adapter():  # the reference policy, while it is asked for
        off = dict(hub_weights(adapted))
    assert same(off, plain)
    merged = dict(adapted.merge_and_unload().state_dict())
    for name, value in sent.items():
        torch.testing.assert_close(value, merged[name], atol=1e-6, rtol=0)


def _adapted(model: Any, **options: Any) -> Any:
    """With adapters that have learned something."""
    from peft import LoraConfig as Adapters
    from peft import get_peft_model

    adapted = get_peft_model(model, Adapters(r=2, **options))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    return adapted


def test_what_vllm_starts_from_has_tied_weights_under_both_names(tmp_path: Any) -> None:
    from safetensors.torch import load_file

    from cppo.rollouts.vllm_engine import _save

    model, processor = tiny("text")
    _save(model, processor, str(tmp_path))
    assert same(load_file(tmp_path / "model.safetensors"), dict(hub_weights(model)))


def test_experts_are_sent_one_by_one_with_their_adapters(tmp_path: Any) -> None:
    """peft wraps the experts twice, for the first and for the second of their projections."""
    from safetensors.torch import load_file
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = dict(vocab_size=32, hidden_size=16, head_dim=8, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, num_experts=4)
    sizes |= dict(num_experts_per_tok=2, moe_intermediate_size=8)
    adapted = _adapted(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)), target_modules="all-linear")
    sent = dict(hub_weights(adapted))
    adapted.merge_and_unload().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert sent.keys() == saved.keys() and "model.layers.1.mlp.experts.3.up_proj.weight" in saved
    for name, value in sent.items():
        torch.testing.assert_close(value, saved[name], atol=1e-6, rtol=0)


def test_of_several_adapters_the_active_one_is_sent() -> None:
    from peft import LoraConfig as Adapters

    options: dict[str, Any] = dict(target_modules=["q_proj"], modules_to_save=["norm"])
    adapted = _adapted(tiny("text")[0], **options)
    adapted.add_adapter("other", Adapters(r=2, **options))
    for name in ("default", "other"):
        adapted.set_adapter(name)
        merged = dict(copy.deepcopy(adapted).merge_and_unload().state_dict())
        for key, value in hub_weights(adapted):
            torch.testing.assert_close(value, merged[key], atol=1e-6, rtol=0)


def test_adapters_on_one_of_two_tied_weights_are_refused() -> None:
    """An engine has one tensor for both, and would keep the one that comes last."""
    for options in ({"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head"]},
                    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}):  # fmt: skip
        model, _ = tiny("text")
        assert model.config.tie_word_embeddings
        with pytest.raises(ValueError, match="embed_tokens.weight and lm_head.weight are one w"):
            dict(hub_weights(_adapted(model, **options)))
