"""The packed forward: the padded one's numbers without its padding, for every model family."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from trainer_cases import (
    FAMILIES,
    VISION_FAMILIES,
    fixed_batch,
    fixed_rollouts,
    gradients,
    packed,
    padded_logps,
    questions_for,
    relative_difference,
    tiny,
)

import cppo
from cppo.model import attention, forward
from cppo.model.prompts import encode_questions
from cppo.ops.pack import pack_completions
from cppo.packed_batch import PackedBatch
from cppo.rollouts.sampler import _draw
from cppo.train.batch import Batch
from cppo.train.views import anchor_hidden

FP64 = 1e-6  # the families' RMSNorm runs in fp32 whatever the dtype of the model


def packed_logps(model: Any, batch: Batch, rows: Tensor) -> tuple[Tensor, PackedBatch]:
    """(T,) log-probabilities of the targets by the packed forward."""
    stream = batch.pack(rows)
    hidden = anchor_hidden(model, batch, stream)
    weight = forward.lm_head(model).weight
    logps = F.linear(hidden, weight).log_softmax(-1)
    return logps.gather(-1, stream.targets[:, None])[:, 0], stream


def weighted(values: Tensor, mask: Tensor) -> Tensor:
    """A sum that gives every token its own weight, so that no two may be confused."""
    weights = torch.linspace(0.5, 1.5, mask.numel(), dtype=values.dtype).view(mask.shape)
    return (values * weights * mask).sum()


# Even lengths run as one padded attention call, uneven ones one by one.
LENGTHS = {"even": [5, 6, 5, 6, 6, 5, 6, 5], "uneven": [200, 1, 1, 2, 1, 1, 2, 1]}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded_in_logps_and_gradients(family: str, lengths: str) -> None:
    stock, processor = tiny(family, dtype=torch.float64)
    rollouts = fixed_rollouts(stock, processor, questions_for(family), lengths=LENGTHS[lengths])
    mask = rollouts.completion_mask
    expected = padded_logps(stock, rollouts)
    expected_gradients = gradients(stock, weighted(expected, mask))

    model = packed(tiny(family, dtype=torch.float64)[0])
    batch = fixed_batch(rollouts)
    values, stream = packed_logps(model, batch, batch.kept)
    ours = stream.unpack(values)

    assert stream.input_ids.numel() == int(rollouts.attention_mask.sum())
    is_uneven = stream.max_seqlen * len(batch.kept) > 2 * stream.input_ids.numel()
    assert is_uneven == (lengths == "uneven")
    torch.testing.assert_close(ours, expected * mask, rtol=0, atol=FP64)
    got = gradients(model, weighted(ours, mask))
    assert relative_difference(got, expected_gradients) < FP64
    if family != "text":
        assert any("visual" in name for name in got)


@pytest.mark.parametrize("family", FAMILIES)
def test_order_and_padding_side_of_the_batch_do_not_matter(family: str) -> None:
    model, processor = tiny(family, dtype=torch.float64)
    model = packed(model)
    rollouts = fixed_rollouts(model, processor, questions_for(family))
    batch = fixed_batch(rollouts)
    straight, stream = packed_logps(model, batch, batch.kept)
    whole = stream.unpack(straight)

    order = torch.tensor([5, 0, 7, 2, 6, 1, 3, 4])
    permuted, stream = packed_logps(model, batch, order)
    torch.testing.assert_close(stream.unpack(permuted), whole, rtol=0, atol=FP64)

    # Three more columns: padding on both sides, the same tokens.
    def moved(x: Tensor) -> Tensor:
        return F.pad(x, (0, 3))

    shifted = dataclasses.replace(
        rollouts,
        input_ids=moved(rollouts.input_ids),
        attention_mask=moved(rollouts.attention_mask),
        completion_mask=moved(rollouts.completion_mask),
        positions=None if rollouts.positions is None else moved(rollouts.positions),
    )
    values, stream = packed_logps(model, fixed_batch(shifted), batch.kept)
    torch.testing.assert_close(stream.unpack(values)[:, :-3], whole, rtol=0, atol=0)


def test_right_padded_prompts_pack_to_the_same_stream() -> None:
    model, processor = tiny("text", dtype=torch.float64)
    model = packed(model)
    rollouts = fixed_rollouts(model, processor, questions_for("text"))
    batch = fixed_batch(rollouts)
    expected, stream = packed_logps(model, batch, batch.kept)
    rows = [(ids[m], c[m]) for ids, m, c in zip(
        rollouts.input_ids, rollouts.attention_mask, rollouts.completion_mask, strict=True
    )]  # fmt: skip
    right = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True)
    completion = torch.nn.utils.rnn.pad_sequence([c for _, c in rows], batch_first=True)
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    mask = torch.arange(right.shape[1]) < lengths[:, None]
    moved = dataclasses.replace(
        rollouts, input_ids=right, attention_mask=mask, completion_mask=completion
    )
    values, other = packed_logps(model, fixed_batch(moved), batch.kept)
    assert torch.equal(other.input_ids, stream.input_ids)
    assert torch.equal(values, expected)


@pytest.mark.parametrize(
    ("lengths", "calls"), [([5, 4, 6], 1), ([20, 1, 1, 1], 4), ([3], 1), ([4, 0, 4], 1)]
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_stays_within_each_sequence(
    lengths: list[int], calls: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(lengths)
    query = torch.randn(1, 4, total, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, kv_heads, total, 8, dtype=torch.float64)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (owner[:, None] == owner) & torch.ones(total, total, dtype=torch.bool).tril()
    k, v = (x.repeat_interleave(4 // kv_heads, 1) for x in (key, value))
    scores = (query @ k.transpose(-1, -2) * 0.3).masked_fill(~allowed, -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)

    seen = []
    stock = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: (seen.append(1), stock(*a, **k))[1]
    )
    out, _ = attention.attend(
        None, torch.nn.Identity(), query, key, value, scaling=0.3, cu_seq_lens_q=cu,
        max_length_k=max(lengths),
    )  # fmt: skip
    torch.testing.assert_close(out, expected)
    assert len(seen) == calls


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl", "qwen3_vl"])
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    results = []
    for enabled in (False, True):
        model, processor = tiny(family, dtype=torch.float64)
        model = packed(model).train()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = fixed_batch(fixed_rollouts(model, processor, questions_for(family)))
        values, _ = packed_logps(model, batch, batch.kept)
        results.append(gradients(model, weighted(values, torch.ones_like(values))))
    assert relative_difference(results[1], results[0]) < 1e-12


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_an_image_is_encoded_once_however_many_completions_see_it(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny(family)
    model = packed(model)
    batch = fixed_batch(fixed_rollouts(model, processor, questions_for(family), group_size=4))
    encoded = []
    stock = model.model.get_image_features

    def encode(pixels: Tensor, grid: Tensor, **options: Any) -> Any:
        encoded.append((len(pixels), len(grid)))
        return stock(pixels, grid, **options)

    monkeypatch.setattr(
        model.model,
        "get_image_features",
        encode,
    )
    images = batch.rollouts.prompts.images
    patches = images.image_grid_thw.prod(1).tolist()
    packed_logps(model, batch, batch.kept)
    packed_logps(model, batch, torch.tensor([4, 5, 6, 7]))  # the question with two images
    packed_logps(model, batch, torch.tensor([8, 9]))  # the question without any
    assert encoded == [(sum(patches), 4), (sum(patches[1:3]), 2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_set_attention_leaves_padded_batches_and_generate_right(family: str) -> None:
    stock, processor = tiny(family)
    prompts = encode_questions(stock, processor, questions_for(family))
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask.long()}
    if prompts.images is not None:
        inputs["pixel_values"] = prompts.images.pixel_values
        inputs["image_grid_thw"] = prompts.images.image_grid_thw
        inputs["mm_token_type_ids"] = forward.image_token_mask(stock, prompts.input_ids).int()
    options = {"max_new_tokens": 8, "do_sample": False}
    model = packed(tiny(family)[0])
    with torch.no_grad():
        expected, ours = stock(**inputs).logits, model(**inputs).logits
        mask = prompts.attention_mask
        torch.testing.assert_close(ours[mask], expected[mask], rtol=1e-4, atol=1e-5)
        assert torch.equal(model.generate(**inputs, **options), stock.generate(**inputs, **options))
        # A prompt alone and among longer ones goes on alike: the padding is masked.
        alone = {"input_ids": prompts.input_ids[2:3][:, mask[2]]}
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        long = model.generate(**inputs, **options)[2, -8:]
        assert torch.equal(model.generate(**alone, **options)[0, -8:], long)


def test_lm_head_of_suppressed_tokens_and_a_bias() -> None:
    model, _ = tiny("text")
    weight, bias, *_ = forward.lm_head(model)
    assert weight is model.lm_head.weight and bias is None
    bias = forward.lm_head(model, [3, 5]).bias
    assert bias.isneginf().nonzero()[:, 0].tolist() == [3, 5]
    assert bias[bias.isfinite()].eq(0).all()

    head = torch.nn.Linear(32, model.config.vocab_size, bias=True)
    model.set_output_embeddings(head)
    weight, bias, *_ = forward.lm_head(model, [2], torch.float64)
    assert weight.dtype == bias.dtype == torch.float64
    expected = head.bias.double().clone()
    expected[2] = -torch.inf
    assert torch.equal(bias, expected)
    bias[0].backward()
    assert head.bias.grad.nonzero()[:, 0].tolist() == [0]


def test_lm_head_includes_its_adapter_and_gradients_reach_it() -> None:
    from peft import LoraConfig, get_peft_model

    stock, _ = tiny("text")
    stock.config.tie_word_embeddings = False
    stock.lm_head.weight = torch.nn.Parameter(stock.lm_head.weight.detach().clone())
    model = get_peft_model(stock, LoraConfig(r=2, lora_alpha=6, target_modules=["lm_head"]))
    head = model.get_base_model().lm_head
    torch.nn.init.normal_(head.lora_B["default"].weight)
    hidden = torch.randn(5, 32)
    weight = forward.lm_head(model).weight
    expected = head(hidden)
    torch.testing.assert_close(hidden @ weight.T, expected)
    plain = hidden @ head.base_layer.weight.T
    assert (expected - plain).abs().max() > 0.1
    (hidden @ weight.T).sum().backward()
    assert head.lora_A["default"].weight.grad.abs().max() > 0
    assert head.lora_B["default"].weight.grad.abs().max() > 0
    with model.disable_adapter():
        weight = forward.lm_head(model).weight
        assert weight is head.base_layer.weight


def tiny_of(family: str, **options: Any) -> Any:
    """A model of any family of transformers."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16, pad_token_id=0)
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, **options)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    "family, options",
    [
        ("Gemma2", {"final_logit_softcapping": 0.3, "attn_logit_softcapping": None}),
        ("Cohere", {"logit_scale": 0.0625}),
        ("Granite", {"logits_scaling": 8.0}),
    ],
)
def test_scaled_and_capped_heads_give_the_logits_of_the_model(family: str, options: Any) -> None:
    torch.manual_seed(0)
    model = tiny_of(family, **options)
    forward.check_supported(model)
    ids = torch.randint(64, (2, 9))
    with torch.no_grad():
        logits, hidden = model(ids).logits, model.model(ids).last_hidden_state
        stats = cppo.linear_token_stats(hidden, targets=ids, **forward.lm_head(model)._asdict())
        plain = cppo.linear_token_stats(hidden, forward.lm_head(model).weight, ids)
        expected = cppo.token_stats(logits, ids, backend="reference")
        head = forward.lm_head(model, [int(logits[0, -1].argmax())])
        drawn = _draw(hidden[:, -1], head, None, torch.zeros(2))
    torch.testing.assert_close(stats.logps, expected.logps)
    assert (plain.logps - expected.logps).abs().max() > 1e-3
    without_best = logits[0, -1].index_fill(0, logits[0, -1].argmax(), -torch.inf)
    assert drawn[0] == without_best.argmax()


def test_models_that_there_is_no_way_of_calling_are_refused() -> None:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlavaConfig,
        LlavaForConditionalGeneration,
        MambaConfig,
        MambaForCausalLM,
    )

    text = dict(model_type="llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    text |= dict(num_attention_heads=2, vocab_size=64)
    vision = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=32)
    vision |= dict(num_hidden_layers=1, num_attention_heads=2, image_size=24, patch_size=12)
    llava = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    with pytest.raises(ValueError, match="must be of the Qwen2-VL, .* got model_type 'llava'"):
        forward.check_supported(llava)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    for model in (mamba, gpt2, torch.nn.Linear(2, 2)):
        words = f"with its body in `model` and an LM head, got {type(model).__name__}"
        with pytest.raises(ValueError, match=words):
            forward.check_supported(model)


def stream_of(lengths: list[int]) -> PackedBatch:
    """Sequences of different tokens, every token but the first a response."""
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = (torch.arange(width) * 7 + torch.arange(len(lengths))[:, None] * 11) % 60
    return pack_completions(ids, mask, mask & (torch.arange(width) >= 1))


@pytest.mark.parametrize("window", [2, 3, 8, 9])
def test_sequences_longer_than_a_sliding_window(window: int) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, use_sliding_window=True,
        sliding_window=window, max_window_layers=1, pad_token_id=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).double().eval()
    lengths = [9, 30, 8, 2]
    batch = stream_of(lengths)
    model.set_attn_implementation("eager")
    alone = [
        model.model(input_ids=ids[None]).last_hidden_state[0, :-1]
        for ids in batch.input_ids.split(lengths)
    ]
    hidden = cppo.packed_hidden(packed(model), batch)
    torch.testing.assert_close(hidden, torch.cat(alone), rtol=0, atol=FP64)


def test_flash_attention_on_a_cpu_is_an_error() -> None:
    with pytest.raises(ValueError, match="one that runs here .*'flash_attention_2': .*"):
        forward.choose_attention("flash_attention_2", "cpu")
    assert forward.choose_attention("auto", "cpu") == "sdpa"
    assert forward.choose_attention("sdpa", "cuda") == "sdpa"
