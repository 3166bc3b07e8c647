"""Rollouts taken apart by question and put together again are the same rollouts."""

import dataclasses

import pytest
import torch
from trainer_cases import (
    Alone,
    fixed_batch,
    fixed_case,
    fixed_rollouts,
    packed,
    questions_for,
    tiny,
)

from cppo.rollouts.rollout import merge, take_questions
from cppo.train.balance import _joined, _piece, _plan, balanced
from cppo.train.views import anchor_hidden

FAMILIES = ("text", "qwen2_5_vl")


def hidden_of(model, rollouts):
    batch = fixed_batch(rollouts)
    return anchor_hidden(model, batch, batch.pack(batch.kept))


@pytest.mark.parametrize("family", FAMILIES)
def test_taken_apart_and_merged_in_another_order(family):
    model, _, batch = fixed_case(family)
    whole = batch.rollouts
    parts = [take_questions(whole, [2]), take_questions(whole, [0, 3]), take_questions(whole, [1])]
    merged = merge(parts)
    again = take_questions(merged, [1, 3, 0, 2])
    assert torch.equal(again.input_ids, whole.input_ids)
    assert again.texts == whole.texts and again.completion_ids == whole.completion_ids
    assert [q.columns for q in again.prompts.questions] == [
        q.columns for q in whole.prompts.questions
    ]
    torch.testing.assert_close(hidden_of(model, again), hidden_of(model, whole))
    if family != "text":
        assert merged.prompts.images.per_question == (0, 1, 1, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_rollouts_of_different_width_give_the_same_numbers(family):
    model, processor = tiny(family)
    model = packed(model)
    questions = questions_for(family)
    # Encoded apart: other prompt widths, other completion widths, and no images in the third.
    parts = [
        fixed_rollouts(model, processor, [question], lengths=[3 + i, 2], seed=i)
        for i, question in enumerate(questions)
    ]
    assert len({part.prompts.input_ids.shape[1] for part in parts}) > 1
    merged = merge(parts)
    expected = torch.cat([hidden_of(model, part) for part in parts])
    torch.testing.assert_close(hidden_of(model, merged), expected, rtol=1e-4, atol=1e-5)
    assert merge(parts[:1]) is parts[0]


def test_what_the_loss_takes_per_token_goes_with_its_completion_to_another_process():
    model, processor = tiny("text")
    # From two processes, of other widths: prompt, completion, prompt again.
    parts = [
        fixed_rollouts(model, processor, [own], lengths=[2 + 3 * i, 1], seed=i)
        for i, own in enumerate(questions_for("text")[:2])
    ]
    batches = []
    for number, part in enumerate(parts):
        places = torch.arange(part.input_ids.numel()).view(part.input_ids.shape)
        weights = {"token_weights": 1000.0 * number + places}
        batches.append(dataclasses.replace(fixed_batch(part), per_token=weights))
    expected = [own.pack(own.kept).per_token["token_weights"] for own in batches]
    whole = _joined(batches[0], [_piece(own, [0]) for own in reversed(batches)])
    found = whole.pack(whole.kept).per_token["token_weights"]
    assert torch.equal(found, torch.cat(expected[::-1]))


def test_no_question_at_all():
    whole = fixed_case("qwen2_5_vl")[2].rollouts
    none = take_questions(whole, [])
    assert none.texts == [] and len(none.input_ids) == 0
    assert merge([none, whole]).texts == whole.texts


def test_the_plan_moves_what_it_must_and_nothing_else():
    # Tokens of the kept completions, by process and question.
    plan = _plan([{0: 100, 1: 90, 3: 110}, {0: 100}, {}, {}])
    assert plan is not None
    assert sorted(key for members in plan for key in members) == [(0, 0), (0, 1), (0, 3), (1, 0)]
    assert [len(members) for members in plan] == [1, 1, 1, 1]
    assert plan[1] == [(1, 0)]  # what is there stays
    assert _plan([{0: 100}, {0: 98}]) is None  # even already
    assert _plan([{0: 1000}, {0: 10}]) is None  # nothing that would help
    assert _plan([{}, {}]) is None


def test_one_process_keeps_its_batch():
    batch = fixed_case("text")[2]
    assert balanced(batch, Alone()) is batch
