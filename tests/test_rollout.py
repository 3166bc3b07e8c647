"""Sampling from exactly the distribution that is trained, and scoring what was sampled."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from trainer_cases import config, fixed_rollouts, packed, question, questions_for, tiny

from cppo.prompts import encode_questions
from cppo.questions import Question
from cppo.rollout import Rollouts, sample_completions
from cppo.scoring import RewardError, score
from cppo.step import Batch, token_logps


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


def test_the_log_probabilities_are_those_of_the_distribution_that_generate_used() -> None:
    model, tokenizer = tiny("text")
    model = packed(peaked(model))
    prompts = encode_questions(model, tokenizer, questions_for("text"))
    options: Any = {"temperature": 0.7, "suppressed": (0, 1)}
    rollouts = sample_completions(
        model, tokenizer, prompts, group_size=2, max_new_tokens=5, **options
    )
    batch = Batch(rollouts, torch.ones(8), torch.arange(8), suppressed=(0, 1))
    logps = token_logps(model, batch, config(temperature=0.7))
    width = prompts.input_ids.shape[1]
    logits = model(
        input_ids=rollouts.input_ids,
        attention_mask=rollouts.attention_mask.long(),
        position_ids=(rollouts.attention_mask.long().cumsum(1) - 1).clamp(min=0),
    ).logits
    logits[..., [0, 1]] = -torch.inf
    expected = (logits / 0.7).log_softmax(-1)[:, width - 1 : -1]
    expected = expected.gather(-1, rollouts.input_ids[:, width:, None])[..., 0]
    mask = rollouts.completion_mask[:, width:]
    torch.testing.assert_close(logps[:, width:][mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert logps[~rollouts.completion_mask].eq(0).all()


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


def test_greedy_is_the_argmax_and_repeats() -> None:
    model, tokenizer = tiny("text")
    model = peaked(model)
    first = sampled(model, tokenizer, questions_for("text"), group_size=1, temperature=None)
    second = sampled(model, tokenizer, questions_for("text"), group_size=1, temperature=None)
    assert torch.equal(first.input_ids, second.input_ids)
    width = first.prompts.input_ids.shape[1]
    alone = first.input_ids[0][first.attention_mask[0]][None]
    logits = model(input_ids=alone).logits[0]
    start = int(first.attention_mask[0, :width].sum())
    assert logits[start - 1 : -1].argmax(-1).tolist() == alone[0, start:].tolist()


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


def test_images_for_a_text_model_are_an_error() -> None:
    model, tokenizer = tiny("text")
    with pytest.raises(ValueError, match="questions have images, but the model takes none"):
        encode_questions(model, tokenizer, questions_for("qwen2_vl"))


# Scoring


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    model, tokenizer = tiny("text")
    return fixed_rollouts(model, tokenizer, questions_for("text", 2), lengths=[1, 2, 3, 4])


def lengths(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def test_rewards_are_weighted_sums_and_none_counts_zero(rollouts: Rollouts) -> None:
    def applies_to_some(completions: list[str], **columns: Any) -> list[float | None]:
        return [None, 1.0, None, 3.0]

    total, by_name = score([lengths, applies_to_some], [0.5, 2.0], rollouts)
    # The completions have 1, 2, 3 and 4 letters.
    assert total.tolist() == [0.5, 3.0, 1.5, 8.0]
    assert total.dtype == torch.float32
    assert by_name["lengths"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert by_name["applies_to_some"].tolist() == [0.0, 1.0, 0.0, 3.0]


def test_rewards_are_called_as_trl_calls_them(rollouts: Rollouts) -> None:
    calls = []

    def watch(completions: Any, *, completion_ids: Any, prompts: Any, answer: Any) -> list[float]:
        calls.append((completions, completion_ids, prompts, answer))
        return [0] * len(completions)

    score([watch], [1.0], rollouts)
    first, second = (question.messages for question in rollouts.prompts.questions)
    ids = [row[mask].tolist() for row, mask in zip(
        rollouts.input_ids, rollouts.completion_mask, strict=True
    )]  # fmt: skip
    assert calls == [(rollouts.texts, ids, [first, first, second, second], ["0", "0", "1", "1"])]


def test_a_column_that_only_some_questions_have_is_none_for_the_others() -> None:
    model, tokenizer = tiny("text")
    mixed = [question("Hi", answer="1"), question("Hi", level=2)]
    seen: dict[str, Any] = {}

    def watch(completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns)
        return [0.0] * len(completions)

    score([watch], [1.0], fixed_rollouts(model, tokenizer, mixed, group_size=2))
    assert seen["answer"] == ["1", "1", None, None] and seen["level"] == [None, None, 2, 2]


class Named:
    name = "my_reward"

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)


def test_a_reward_object_goes_by_its_name(rollouts: Rollouts) -> None:
    assert list(score([Named()], [1.0], rollouts)[1]) == ["my_reward"]


def _third(completions: list[str], value: Any) -> list[Any]:
    return [value if len(text) == 3 else 0.0 for text in completions]


def raises(completions: list[str], **columns: Any) -> list[float]:
    return [1 / (len(text) - 3) for text in completions]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (math.nan, "returned nan"),
        (math.inf, "returned inf"),
        ("right", "ValueError: could not convert string to float: 'right'"),
        ([1.0], "TypeError: "),
        (torch.tensor([1.0, 2.0]), "RuntimeError: |ValueError: |TypeError: "),
    ],
)
def test_a_bad_reward_names_function_question_and_completion(
    rollouts: Rollouts, value: Any, words: str
) -> None:
    def broken(completions: list[str], **columns: Any) -> list[Any]:
        return _third(completions, value)

    with pytest.raises(RewardError, match=rf"reward function 'broken' failed \(({words})") as error:
        score([lengths, broken], [1.0, 1.0], rollouts)
    message = str(error.value)
    assert repr(rollouts.prompts.questions[1].messages) in message  # the third completion's
    assert f"completion: {rollouts.texts[2]!r}" in message and "answer: '1'" in message


def test_a_raising_reward_names_the_completion_on_which_it_raises(rollouts: Rollouts) -> None:
    with pytest.raises(RewardError, match="'raises' failed .ZeroDivisionError: ") as error:
        score([raises], [1.0], rollouts)
    assert f"completion: {rollouts.texts[2]!r}" in str(error.value)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_reward_that_raises_on_the_whole_batch_only_says_so(rollouts: Rollouts) -> None:
    def no_batches(completions: list[str], **columns: Any) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("one at a time")
        return [1.0]

    with pytest.raises(RewardError, match="one at a time.* on no completion by itself"):
        score([no_batches], [1.0], rollouts)


@pytest.mark.parametrize("value", [[1.0], [], [1.0] * 5])
def test_a_wrong_number_of_rewards(rollouts: Rollouts, value: list[float]) -> None:
    def short(completions: list[str], **columns: Any) -> list[float]:
        return value

    words = f"'short' must return one number per completion = 4, got {len(value)}"
    with pytest.raises(RewardError, match=words):
        score([short], [1.0], rollouts)


@pytest.mark.parametrize("value", [1.0, None, "1234"])
def test_something_that_is_no_list_of_rewards(rollouts: Rollouts, value: Any) -> None:
    def scalar(completions: list[str], **columns: Any) -> Any:
        return value

    words = f"'scalar' must return a list of one number per completion, got {type(value).__name__}"
    with pytest.raises(RewardError, match=words):
        score([scalar], [1.0], rollouts)
