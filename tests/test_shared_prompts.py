"""A prompt that stands in the stream once gives the numbers of one that is repeated."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer_cases import FAMILIES, fixed_case, gradients, relative_difference

import cppo
from cppo.model.shared_prompts import share_prompts
from cppo.train.views import anchor_hidden

FP64 = 1e-6  # the families' RMSNorm runs in fp32 whatever the dtype of the model


def hidden_of(model, batch, rows):
    return anchor_hidden(model, batch, batch.pack(rows))


# Of four questions with four completions each: 4, 1, 0 and 2 kept.
KEPT = torch.tensor([0, 1, 2, 3, 6, 12, 15])


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_are_those_of_the_packed_stream(family):
    lengths = [3, 9, 1, 5, 2, 4, 6, 1, 7, 2, 2, 3, 30, 4, 1, 2]
    options = dict(dtype=torch.float64, group_size=4, lengths=lengths)
    model, _, batch = fixed_case(family, **options)
    sharing = dataclasses.replace(batch, share_prompts=True)
    results = []
    for one in (batch, sharing):
        hidden = hidden_of(model, one, KEPT)
        weights = torch.linspace(0.5, 1.5, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
        results.append((hidden, gradients(model, (hidden * weights).sum())))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=FP64)
    assert relative_difference(results[1][1], results[0][1]) < FP64

    stream = batch.pack(KEPT)
    shared = share_prompts(stream, [0, 0, 0, 0, 1, 3, 3])
    prompts = (batch.rollouts.attention_mask & ~batch.rollouts.completion_mask).sum(1)
    repeated = 3 * prompts[0] + prompts[12]
    assert len(shared.token_index) == len(stream.input_ids) - repeated
    assert shared.first == [0, 4, 5]


@pytest.mark.parametrize("family", ["text", "qwen2_vl"])
def test_micro_batches_keep_a_question_together_as_far_as_the_budget_goes(family):
    batch = dataclasses.replace(fixed_case(family, group_size=4)[2], share_prompts=True)
    lengths = batch.lengths(batch.kept)
    for budget in (max(lengths), 2 * max(lengths), 10**6):
        parts = batch.microbatches(batch.kept, budget)
        assert sorted(torch.cat(parts).tolist()) == batch.kept.tolist()
        for rows in parts:
            shared = share_prompts(batch.pack(rows), (rows // 4).tolist())
            assert len(shared.token_index) <= budget
        cut = sum(len(set((rows // 4).tolist())) for rows in parts)
        assert cut >= 4 and (budget < 10**6 or cut == 4)


@st.composite
def batches(draw):
    """Questions with prompts of any length and completions of any, also none; holes in both."""
    ids, attention, marks, questions = [], [], [], []
    for question in range(draw(st.integers(1, 4))):
        prompt = [100 * question + i for i in range(draw(st.integers(1, 5)))]
        holes = draw(st.integers(0, 2))
        for _ in range(draw(st.integers(1, 3))):
            answer = draw(st.integers(0, 5))
            own = draw(st.integers(0, 2))
            ids.append(prompt + [0] * holes + list(range(900, 900 + answer)) + [0] * own)
            attention.append([1] * len(prompt) + [0] * holes + [1] * answer + [0] * own)
            marks.append([0] * (len(prompt) + holes) + [1] * (answer + own))
            questions.append(question)
    width = max(map(len, ids))
    padded = [[row + [0] * (width - len(row)) for row in rows] for rows in (ids, attention, marks)]
    return *(torch.tensor(rows) for rows in padded), questions


@given(batch=batches())
def test_every_token_is_there_and_sees_what_it_saw(batch):
    ids, attention, marks, questions = batch
    stream = cppo.pack_completions(ids, attention, marks)
    shared = share_prompts(stream, questions)
    assert torch.equal(
        stream.input_ids[shared.token_index][shared.rows], stream.input_ids[stream.rows]
    )
    tokens = stream.input_ids[shared.token_index]
    positions = stream.position_ids[shared.token_index]
    bounds, key_bounds = shared.cu_seqlens.tolist(), shared.cu_key_seqlens.tolist()
    assert shared.max_seqlen == max(shared.cu_seqlens.diff().tolist(), default=0)
    assert shared.max_key_seqlen == max(shared.cu_key_seqlens.diff().tolist(), default=0)
    histories = set()
    for piece in range(len(bounds) - 1):
        keys = shared.key_index[key_bounds[piece] : key_bounds[piece + 1]]
        # Causal from the end: the last query sees all its keys, the one before all but one.
        for offset in range(bounds[piece + 1] - bounds[piece]):
            seen = keys[: len(keys) - (bounds[piece + 1] - bounds[piece]) + offset + 1]
            assert positions[seen].tolist() == list(range(len(seen)))
            assert int(seen[-1]) == bounds[piece] + offset
            histories.add(tuple(tokens[seen].tolist()))
    cu = stream.cu_seqlens.tolist()
    expected = {
        tuple(stream.input_ids[start : end + 1].tolist())
        for start, stop in zip(cu[:-1], cu[1:], strict=True)
        for end in range(start, stop)
    }
    assert histories == expected
    assert len(tokens) <= len(stream.input_ids)


def test_prompts_that_differ_are_refused():
    ids = torch.tensor([[1, 2, 7], [1, 3, 7]])
    marks = torch.tensor([[0, 0, 1], [0, 0, 1]])
    stream = cppo.pack_completions(ids, torch.ones_like(ids), marks)
    with pytest.raises(ValueError, match="must begin with the same prompt, their first 2 tokens"):
        share_prompts(stream, [0, 0])
    assert share_prompts(stream, [0, 1]).token_index.tolist() == list(range(6))
