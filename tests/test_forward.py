"""The packed forward: the padded one's numbers without its padding, for every model family."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from trainer_cases import (
    FAMILIES,
    fixed_batch,
    fixed_case,
    fixed_rollouts,
    gradients,
    packed,
    padded_logps,
    questions_for,
    relative_difference,
    tiny,
)

import cppo
from cppo.model import forward
from cppo.model.images import image_token_mask
from cppo.model.prompts import encode_questions
from cppo.model.wrappers import unwrap
from cppo.ops.packed_batch import PackedBatch
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
    model, _, batch = fixed_case(family, dtype=torch.float64)
    rollouts = batch.rollouts
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


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl", "qwen3_vl"])
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    results = []
    for enabled in (False, True):
        model, _, batch = fixed_case(family, dtype=torch.float64)
        model.train()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        values, _ = packed_logps(model, batch, batch.kept)
        results.append(gradients(model, weighted(values, torch.ones_like(values))))
    assert relative_difference(results[1], results[0]) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_set_attention_leaves_padded_batches_and_generate_right(family: str) -> None:
    stock, processor = tiny(family)
    prompts = encode_questions(stock, processor, questions_for(family))
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask.long()}
    if prompts.images is not None:
        inputs["pixel_values"] = prompts.images.joined("pixel_values")
        inputs["image_grid_thw"] = prompts.images.joined("image_grid_thw")
        inputs["mm_token_type_ids"] = image_token_mask(stock, prompts.input_ids).int()
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
    suppressing = forward.lm_head(model, [3, 5])
    assert suppressing.bias is None and suppressing.suppressed.tolist() == [3, 5]
    logits = suppressing.logits(torch.randn(2, 32))
    assert logits.isneginf().nonzero()[:, 1].tolist() == [3, 5, 3, 5]

    head = torch.nn.Linear(32, model.config.vocab_size, bias=True)
    model.set_output_embeddings(head)
    weight, bias, suppressed, *_ = forward.lm_head(model, [2], torch.float64)
    assert weight.dtype == bias.dtype == torch.float64
    assert torch.equal(bias, head.bias.double()) and suppressed.tolist() == [2]
    bias[0].backward()
    assert head.bias.grad.nonzero()[:, 0].tolist() == [0]


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
        drawn, _ = _draw(hidden[:, -1], head, None, torch.zeros(2))
    torch.testing.assert_close(stats.logps, expected.logps)
    assert (plain.logps - expected.logps).abs().max() > 1e-3
    without_best = logits[0, -1].index_fill(0, logits[0, -1].argmax(), -torch.inf)
    assert drawn[0] == without_best.argmax()


# Its attention: without it nothing runs, and every wrapper gets it


def stream_of(lengths):
    """Sequences of different tokens, every token but the first a response."""
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = (torch.arange(width) * 7 + torch.arange(len(lengths))[:, None] * 11) % 60
    return cppo.pack_completions(ids, mask, mask & (torch.arange(width) >= 1))


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl"])
def test_a_batch_of_nothing_has_a_loss_of_zero(family: str) -> None:
    """As in a loop of one's own, where all rewards of a step are equal."""
    model, _ = tiny(family)
    packed(model).requires_grad_(False)
    ids, mask = torch.full((4, 5), 7), torch.ones(4, 5)
    advantages, kept = cppo.advantages_and_prune(torch.ones(4), 2, 0.5, drop_zero=True)
    batch = cppo.pack_completions(ids, mask, mask.triu(2), kept)
    hidden = cppo.packed_hidden(model, batch)
    output = cppo.linear_cppo_loss(
        hidden,
        model.lm_head.weight,
        batch.targets,
        advantages[kept],
        cu_seqlens=batch.row_cu_seqlens,
    )
    output.loss.backward()
    assert output.loss.item() == 0 and len(hidden) == len(batch.targets) == 0


def test_without_the_packed_attention_a_stream_is_refused():
    model, _ = tiny("text")
    batch = stream_of([6, 4])
    words = r"must have the attention of packed .* cppo\.set_attention\(model, \"auto\"\) once"
    with pytest.raises(ValueError, match=words):
        cppo.packed_hidden(model, batch)
    cppo.set_attention(model, "auto")
    cppo.packed_hidden(model, batch)
    copied = copy.deepcopy(model)  # a frozen reference, say
    assert torch.equal(cppo.packed_hidden(copied, batch), cppo.packed_hidden(model, batch))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=words):
        cppo.packed_hidden(model, batch)
    with pytest.raises(ValueError, match=words):
        cppo.packed_hidden(torch.nn.Linear(2, 2), batch)
    with pytest.raises(TypeError, match="batch must be the PackedBatch of .* got dict"):
        cppo.packed_hidden(model, {"input_ids": batch.input_ids})


def test_set_attention_through_wrappers_and_its_errors():
    from peft import LoraConfig, PeftMixedModel, get_peft_model
    from transformers import BloomConfig, BloomForCausalLM

    options = LoraConfig(r=2, target_modules=["q_proj"])
    for wrap in (
        lambda model: get_peft_model(model, options),
        lambda model: PeftMixedModel(model, options),
        lambda model: torch.compile(model, backend="eager"),
    ):
        model = wrap(tiny("text")[0])
        cppo.set_attention(model, "sdpa")
        assert forward.is_packed(unwrap(model))
        assert cppo.packed_hidden(model, stream_of([5, 3])).shape == (6, 32)
    model, _ = tiny("text")
    with pytest.raises(ValueError, match="name must be one of .*'auto', 'sdpa'.* got 'eager'"):
        cppo.set_attention(model, "eager")
    with pytest.raises(
        ValueError, match="name must be .auto. or one that runs here .sdpa., got .varlen."
    ):
        cppo.set_attention(model, "varlen")
    with pytest.raises(ValueError, match="must be a model of transformers, got Linear"):
        cppo.set_attention(torch.nn.Linear(2, 2), "sdpa")
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="must let its attention be chosen .* got .*'bloom'"):
        cppo.set_attention(bloom, "sdpa")
