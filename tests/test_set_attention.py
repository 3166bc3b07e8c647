"""A packed forward needs its attention: without it nothing runs, and every wrapper gets it."""

import copy

import pytest
import torch
from trainer_cases import tiny

import cppo
from cppo.model import forward
from cppo.ops.pack import pack_completions


def stream_of(lengths):
    """Sequences of different tokens, every token but the first a response."""
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = (torch.arange(width) * 7 + torch.arange(len(lengths))[:, None] * 11) % 60
    return pack_completions(ids, mask, mask & (torch.arange(width) >= 1))


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
        assert forward.is_packed(forward.unwrap(model))
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
