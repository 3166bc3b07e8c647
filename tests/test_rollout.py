"""Sampling from exactly the distribution that is trained, and scoring what was sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trainer_cases import config, packed, question, questions_for, tiny

from cppo.model.prompts import encode_questions
from cppo.questions import Question
from cppo.rollouts.rollout import Rollouts, sample_completions
from cppo.train.batch import Batch
from cppo.train.views import token_logps


def sampled(model: Any, processor: Any, questions: list[Question], **options: Any) -> Rollouts:
    prompts = encode_questions(model, processor, questions)
    defaults = {"group_size": 4, "max_new_tokens": 6, "temperature": 1.0}
    return sample_completions(model, processor, prompts, **(defaults | options))


def peaked(model: Any, factor: float = 4.0) -> Any:
    """The model with larger embeddings: a distribution far from uniform."""
    model.get_input_embeddings().weight.data *= factor
    return model


def test_sampling_is_on_policy_whatever_the_checkpoint_asks_for() -> None:
    model, tokenizer = tiny("text")
    model = packed(peaked(model))
    # What checkpoints ship with; any of it would make another distribution.
    model.generation_config.update(
        top_k=5, top_p=0.5, min_p=0.2, repetition_penalty=1.5, no_repeat_ngram_size=2
    )
    number = 4000
    torch.manual_seed(1)
    rollouts = sampled(
        model, tokenizer, [question("Hi")], group_size=number, max_new_tokens=1, temperature=0.7,
        suppressed=[0, 1], batch_size=number,
    )  # fmt: skip
    tokens = rollouts.input_ids[rollouts.completion_mask]
    assert len(tokens) == number
    frequency = tokens.bincount(minlength=len(tokenizer)) / number
    # The log-probability of each token that came, once.
    rows = torch.tensor([int((tokens == token).nonzero()[0]) for token in tokens.unique()])
    batch = Batch(rollouts, torch.ones(number), rows, suppressed=(0, 1))
    logps = token_logps(model, batch, config(temperature=0.7))[rows, -1]
    probability = torch.zeros(len(tokenizer)).index_put((tokens[rows],), logps.exp())
    # Every token that came, about as often as its probability says: within 5 standard errors.
    error = (probability * (1 - probability) / number).sqrt() + 1 / number
    assert ((frequency - probability).abs() < 5 * error).all()
    assert (frequency > 0).sum() > 20
    assert 0.9 < probability.sum() <= 1 + 1e-5


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl"])
def test_suppressed_tokens_never_come(family: str) -> None:
    model, processor = tiny(family)
    letters = list(range(9, 60))
    torch.manual_seed(0)
    free = sampled(model, processor, questions_for(family), group_size=32)
    held = sampled(model, processor, questions_for(family), group_size=32, suppressed=letters)
    mask_free, mask_held = free.completion_mask, held.completion_mask
    assert torch.isin(free.input_ids[mask_free], torch.tensor(letters)).any()
    assert not torch.isin(held.input_ids[mask_held], torch.tensor(letters)).any()


def test_a_completion_ends_with_its_closing_token() -> None:
    model, tokenizer = tiny("text")
    eos = tokenizer.eos_token_id
    # A head that makes closing likely: completions of every length.
    bias = torch.zeros(len(tokenizer))
    bias[eos] = 2.5
    model.set_output_embeddings(torch.nn.Linear(32, len(tokenizer), bias=True))
    model.lm_head.bias.data = bias
    model.config.tie_word_embeddings = False
    rollouts = sampled(model, tokenizer, questions_for("text"), group_size=16, max_new_tokens=8)
    width = rollouts.prompts.input_ids.shape[1]
    seen = set()
    masks = rollouts.completion_mask
    for ids, mask, text, truncated in zip(
        rollouts.input_ids, masks, rollouts.texts, rollouts.truncated, strict=True
    ):
        own = ids[mask].tolist()
        assert not mask[:width].any()
        assert mask[width:].int().diff().le(0).all()  # no gap
        assert truncated == (eos not in own)
        assert eos not in own[:-1]
        assert len(own) == 8 if truncated else own[-1] == eos
        assert text == tokenizer.decode(own, skip_special_tokens=True)
        seen.add(len(own))
    assert len(seen) > 4 and 0 < rollouts.truncated.sum() < 64
    together = rollouts.prompts.attention_mask.repeat_interleave(16, 0)
    assert torch.equal(rollouts.attention_mask[:, :width], together)
    assert torch.equal(rollouts.attention_mask[:, width:], rollouts.completion_mask[:, width:])


@pytest.mark.parametrize("family", ["text", "qwen2_vl"])
@pytest.mark.parametrize("batch_size", [1, 5, 8, 100])
def test_generating_in_chunks_gives_every_question_its_completions(
    family: str, batch_size: int
) -> None:
    model, processor = tiny(family)
    questions = questions_for(family)
    whole = sampled(model, processor, questions, temperature=None, group_size=1)
    for group_size in (1, 4):
        rollouts = sampled(
            model,
            processor,
            questions,
            temperature=None if group_size == 1 else 1.0,
            group_size=group_size,
            batch_size=batch_size,
        )
        total = 4 * group_size
        width = rollouts.prompts.input_ids.shape[1]
        assert rollouts.input_ids.shape == rollouts.completion_mask.shape
        assert len(rollouts.input_ids) == len(rollouts.texts) == len(rollouts.truncated) == total
        prompts = rollouts.prompts.input_ids.repeat_interleave(group_size, 0)
        assert torch.equal(rollouts.input_ids[:, :width], prompts)
        assert [rollouts.question_of(row) for row in range(total)] == [
            questions[row // group_size] for row in range(total)
        ]
        if group_size == 1:
            assert rollouts.texts == whole.texts


def test_sampling_leaves_the_model_in_its_mode() -> None:
    model, tokenizer = tiny("text")
    for mode in (True, False):
        model.train(mode)
        sampled(model, tokenizer, questions_for("text"))
        assert model.training == mode
