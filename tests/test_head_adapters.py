"""Adapters of peft, on the LM head above all: whatever peft computes is what is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from families import tiny_family
from peft import LoraConfig, get_peft_model
from torch import Tensor
from trainer_cases import tiny, trainer_for, weights_of

from cppo.model import check as model_check
from cppo.model import forward
from cppo.ops.pack import pack_completions

HEAD: dict[str, Any] = {"target_modules": ["lm_head"]}
ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, target_modules=["lm_head", "q_proj"]),
    "rslora": lambda: LoraConfig(r=4, use_rslora=True, **HEAD),
    "dora": lambda: LoraConfig(r=4, use_dora=True, **HEAD),
    "patterns": lambda: LoraConfig(
        r=4, rank_pattern={"lm_head": 2}, alpha_pattern={"lm_head": 7}, **HEAD
    ),
    "lora_bias": lambda: LoraConfig(r=4, lora_bias=True, **HEAD),
    "modules_to_save": lambda: LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "tokens": lambda: LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 7]),
    "tokens_of_the_head": lambda: LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"lm_head": [25, 40]}
    ),
    "embedding": lambda: LoraConfig(r=4, target_modules=["embed_tokens"]),
    "all_linear": lambda: LoraConfig(r=4, target_modules="all-linear"),
    "ia3": lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    "loha": lambda: peft.LoHaConfig(r=4, **HEAD),
    "lokr": lambda: peft.LoKrConfig(r=4, **HEAD),
    "vera": lambda: peft.VeraConfig(r=4, **HEAD),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, **HEAD),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **HEAD),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **HEAD),
    "layer_norms": lambda: peft.LNTuningConfig(target_modules=["norm"]),
}


def base_of(is_tied: bool) -> Any:
    """A tiny Qwen3 with a bias-free head, its own or the embedding's."""
    model = tiny_family("qwen3")
    if is_tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
        assert model.lm_head.weight is model.get_input_embeddings().weight
    return model


def moved(model: Any) -> Any:
    """The model with every trained parameter away from its start."""
    draw = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.data = parameter.data + 0.05 * noise.to(parameter.dtype)
    return model


def by_both_ways(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of three sequences by the packed forward and by the model itself."""
    ids = torch.arange(27).view(3, 9) * 5 % 60 + 3
    mask = torch.ones_like(ids)
    batch = pack_completions(ids, mask, mask * (torch.arange(9) >= 3))
    head = forward.lm_head(model)
    ours = torch.nn.functional.linear(
        forward.run_packed(model, forward.Stream(batch)), head.weight, head.bias
    )
    return ours, torch.cat([row[2:8] for row in model(input_ids=ids).logits])


def gradients_of(model: Any, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
    (logits * weights.sin()).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("is_tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_logits_and_gradients_are_those_of_peft(kind: str, is_tied: bool) -> None:
    torch.manual_seed(0)
    model = get_peft_model(base_of(is_tied), ADAPTERS[kind]())
    forward.set_attention(model, "sdpa")
    model_check.check_model(model)
    model = moved(model.double()).train()
    ours, own = by_both_ways(model)
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-7)
    got, expected = gradients_of(model, ours), gradients_of(model, by_both_ways(model)[1])
    assert got.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-6 * largest)
    with model.disable_adapter(), torch.no_grad():
        ours, plain = by_both_ways(model)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-7)
    assert (plain - own).abs().max() > 1e-3


def test_several_active_merged_and_rescaled_adapters() -> None:
    torch.manual_seed(0)
    model = get_peft_model(base_of(False), ADAPTERS["dora"]())
    model.add_adapter("second", ADAPTERS["lora"]())
    forward.set_attention(model, "sdpa")
    model.base_model.set_adapter(["default", "second"])
    model = moved(model.double())
    results = []
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: model.base_model.model.lm_head.scale_layer(3.0),
            lambda: model.base_model.set_adapter("second"),
            model.merge_adapter,
            model.unmerge_adapter,
        ):
            change()
            model_check.check_model(model)
            ours, own = by_both_ways(model)
            torch.testing.assert_close(ours, own, rtol=0, atol=1e-9)
            results.append(own)
    assert all((results[i] - results[i + 1]).abs().max() > 1e-3 for i in range(2))


@pytest.mark.parametrize("wrap", ["mixed", "inject"])
def test_other_ways_of_adding_an_adapter(wrap: str) -> None:
    model = base_of(False)
    if wrap == "mixed":
        model = peft.PeftMixedModel(model, ADAPTERS["lora"]())
    else:
        model = peft.inject_adapter_in_model(ADAPTERS["lora"](), model)
    forward.set_attention(model, "sdpa")
    model_check.check_model(model)
    ours, own = by_both_ways(moved(model.double()))
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-9)


def test_a_head_that_is_narrower_than_the_model() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = dict(vocab_size=64, hidden_size=32, ffn_dim=32, num_hidden_layers=1)
    config = OPTConfig(**sizes, num_attention_heads=2, word_embed_proj_dim=16)
    model = get_peft_model(OPTForCausalLM(config), LoraConfig(r=2, **HEAD)).double().eval()
    forward.set_attention(model, "sdpa")
    model_check.check_model(model)
    ours, own = by_both_ways(moved(model))
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-9)


def test_a_head_with_a_bias_keeps_its_digits_in_half_precision() -> None:
    model = tiny_family("phi").bfloat16()
    assert model.lm_head.bias is not None
    torch.nn.init.constant_(model.lm_head.bias, 10.0)
    adapted = get_peft_model(model, LoraConfig(r=2, **HEAD), autocast_adapter_dtype=False)
    weight, bias, *_ = forward.lm_head(adapted)
    layer = adapted.get_base_model().lm_head.base_layer
    torch.testing.assert_close(weight.float(), layer.weight.float(), rtol=0.008, atol=1e-3)
    assert torch.equal(bias, layer.bias)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (LoraConfig(r=2, lora_dropout=0.1, **HEAD), "no dropout, .* got 0.1 .*lora_dropout"),
        (peft.LoHaConfig(r=2, rank_dropout=0.2, **HEAD), "no dropout, .* got 0.2 "),
        (peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "got PREFIX_TUNI"),
        (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "got PROMPT_TUNI"),
        (peft.PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "got P_TUNING"),
        (
            LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[5, 6],
                       task_type="CAUSAL_LM"),
            "got an activated LoRA",
        ),
    ],
    ids=["dropout", "rank_dropout", "prefix", "prompt", "p_tuning", "alora"],
)  # fmt: skip
def test_adapters_that_are_not_computed_are_refused(options: Any, words: str) -> None:
    model = get_peft_model(base_of(False), options)
    forward.set_attention(model, "sdpa")
    with pytest.raises(ValueError, match=words):
        model_check.check_model(model)


def test_dropout_elsewhere_is_fine() -> None:
    options = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"])
    model = get_peft_model(base_of(False), options).train()
    forward.set_attention(model, "sdpa")
    model_check.check_model(model)


@pytest.mark.parametrize("kind", ["dora", "modules_to_save", "tokens_of_the_head"])
def test_a_run_trains_what_is_on_the_head(kind: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    base, _ = tiny("text")
    base.config.tie_word_embeddings = False
    base.lm_head.weight = torch.nn.Parameter(torch.randn_like(base.lm_head.weight) * 0.05)
    model = get_peft_model(base, ADAPTERS[kind]())
    before = weights_of(model)
    trainer_for(tmp_path, model=model, learning_rate=1e-2).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    on_head = {name for name, p in model.named_parameters() if p.requires_grad and "head" in name}
    if kind == "dora":
        assert any("magnitude" in name for name in on_head)
    assert on_head and on_head <= changed
