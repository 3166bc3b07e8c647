"""The decoding loop draws what `generate` would, and finished rows change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trainer_cases import padded_logps
from transformers import GenerationConfig

import cppo.rollouts.sampler
from cppo.demo.digits import DigitSums
from cppo.demo.tiny import build_tiny_text_model, build_tiny_vlm
from cppo.demo.warmup import CHECKPOINTS
from cppo.model import forward
from cppo.model.images import image_token_mask
from cppo.model.load import load_model, load_processor, special_token_ids_to_suppress
from cppo.model.prompts import Prompts, encode_questions
from cppo.questions import as_question
from cppo.rollouts.rollout import Rollouts, sample_completions

FAMILIES = ("text", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TOKENS = 16


def _prompts(family: str) -> tuple[Any, Any, Prompts]:
    if family == "text":
        model, processor = build_tiny_text_model(size="test")
        rows = [{"prompt": text} for text in ("What is 1+2?", "Hi", "What is the sum of 1?")]
    else:
        model, processor = build_tiny_vlm(family, size="test")
        rows = [DigitSums(size=3)[i] for i in range(3)]
        rows.append({"prompt": "No image here.", "answer": "1"})
    forward.set_attention(model, "sdpa")
    return model, processor, encode_questions(model, processor, [as_question(r) for r in rows])


def _sample(model: Any, processor: Any, prompts: Prompts, **options: Any) -> Rollouts:
    options = {"group_size": 2, "max_new_tokens": TOKENS, "temperature": None, **options}
    return sample_completions(model, processor, prompts, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_completions_are_those_of_generate(family: str) -> None:
    model, processor, prompts = _prompts(family)
    inputs: dict[str, Any] = {
        "input_ids": prompts.input_ids,
        "attention_mask": prompts.attention_mask.long(),
    }
    if prompts.images is not None:
        inputs["pixel_values"] = prompts.images.joined("pixel_values")
        inputs["image_grid_thw"] = prompts.images.joined("image_grid_thw")
        inputs["mm_token_type_ids"] = image_token_mask(model, prompts.input_ids).int()
    options = GenerationConfig(do_sample=False, max_new_tokens=TOKENS)
    expected = model.generate(**inputs, generation_config=options)
    ours = _sample(model, processor, prompts)
    assert torch.equal(ours.input_ids[0::2], expected)
    assert torch.equal(ours.input_ids[1::2], expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_comes_with_the_log_probability_it_was_sampled_with(
    family: str, temperature: float | None
) -> None:
    model, processor, prompts = _prompts(family)
    suppressed = special_token_ids_to_suppress(model, processor)
    torch.manual_seed(0)
    rollouts = _sample(model, processor, prompts, temperature=temperature, suppressed=suppressed)
    model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, logits: (
            logits.index_fill(-1, torch.tensor(suppressed), -torch.inf) / (temperature or 1.0)
        )
    )
    expected = padded_logps(model, rollouts).masked_fill(~rollouts.completion_mask, 0)
    assert expected.sum() < -1 and rollouts.sampling_logps is not None
    torch.testing.assert_close(rollouts.sampling_logps, expected, atol=2e-5, rtol=0)


def test_rows_that_leave_the_batch_change_no_other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    # The shipped checkpoint's answers differ; with some digits as closing tokens, in length too.
    model, processor = load_model(CHECKPOINTS / "digits"), load_processor(CHECKPOINTS / "digits")
    forward.set_attention(model, "sdpa")
    digits = processor.tokenizer.convert_tokens_to_ids(["5", "6", "7", "8"])
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, *digits]
    questions = [as_question(DigitSums(size=12)[i]) for i in range(12)]
    prompts = encode_questions(model, processor, questions)
    kept_in = {}
    for share in (0.0, 2.0):
        monkeypatch.setattr(cppo.rollouts.sampler, "_DROP_SHARE", share)
        kept_in[share] = _sample(model, processor, prompts).completion_ids
    assert kept_in[0.0] == kept_in[2.0]
    assert len({len(ids) for ids in kept_in[0.0]}) > 1


def test_samples_follow_the_softmax_at_the_temperature() -> None:
    model, processor, prompts = _prompts("text")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    torch.manual_seed(0)
    rollouts = _sample(
        model,
        processor,
        prompts,
        group_size=4000,
        max_new_tokens=1,
        temperature=2.0,
        batch_size=4000,
    )
    logits = model(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask.long()
    ).logits[:, -1]
    expected = torch.softmax(logits.double() / 2.0, -1)
    first = rollouts.input_ids[:, -1].view(len(expected), -1)
    share = torch.stack([torch.bincount(row, minlength=expected.shape[1]) for row in first]) / 4000
    # Five standard errors of a share of 4,000 draws.
    assert (share - expected).abs().max() < 5 * (0.25 / 4000) ** 0.5
    assert expected.max() > 0.1


def _watched(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, tokens) of every call of the model below its head."""
    calls = []
    stock = model.model.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        calls.append(tuple(options["input_ids"].shape))
        return stock(*arguments, **options)

    monkeypatch.setattr(model.model, "forward", forward)
    return calls


def test_memory_does_not_grow_with_questions_times_group(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, prompts = _prompts("text")
    calls = _watched(model, monkeypatch)
    width = prompts.input_ids.shape[1]
    for batch_size, rows in ((4, 1), (8, 2), (100, 3)):
        calls.clear()
        rollouts = _sample(model, processor, prompts, group_size=4, batch_size=batch_size)
        assert len(rollouts.texts) == 12
        # A prompt is run once, for all its completions; no call has more rows than asked for.
        assert max(n for n, tokens in calls if tokens == width) == rows
        assert sum(n for n, tokens in calls if tokens == width) == 3
        assert max(n for n, tokens in calls if tokens == 1) == 4 * rows
    calls.clear()
    _sample(model, processor, prompts, group_size=4, batch_size=1)
    assert max(n for n, tokens in calls if tokens == 1) == 4  # a group stays in one piece


def test_sampling_stops_at_the_longest_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, prompts = _prompts("text")
    calls = _watched(model, monkeypatch)
    ends = iter([[0, 1], [2, 5], [3], [4], []])  # rows of the batch that close at each step

    def draw(hidden: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = torch.full((len(hidden),), 7)
        for row in next(ends):
            drawn[min(row, len(hidden) - 1)] = processor.eos_token_id
        return drawn, torch.zeros(len(drawn))

    monkeypatch.setattr(cppo.rollouts.sampler, "_draw", draw)
    monkeypatch.setattr(cppo.rollouts.sampler, "_DROP_SHARE", 2.0)  # rows stay where they are
    rollouts = _sample(model, processor, prompts, max_new_tokens=1000)
    lengths = [len(ids) for ids in rollouts.completion_ids]
    assert sorted(lengths) == [1, 1, 2, 2, 3, 4] and not rollouts.truncated.any()
    assert len(calls) == 4  # the prompts, and one call for each further token
    assert rollouts.input_ids.shape[1] == prompts.input_ids.shape[1] + 4
