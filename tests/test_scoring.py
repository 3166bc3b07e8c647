"""Reward functions: how they are called, what their answers mean, and how they fail."""

import asyncio
import copy
import dataclasses
import functools
import re
import threading

import numpy as np
import pytest
import torch
from scoring_cases import conversations, lengths, scores_of, strings
from trainer_cases import fixed_rollouts, question, tiny
from transformers import TrainerState

from cppo.rewards import exact_match
from cppo.train.scoring import RewardError, check_signature, metric_name, reward_name, score


@pytest.fixture
def rollouts():
    return strings(conversations())


# What they are given


def test_rewards_are_called_as_trl_calls_them():
    talks = conversations()
    calls = []

    def watch(completions, *, completion_ids, prompts, answer):
        calls.append((completions, completion_ids, prompts, answer))
        return [0] * len(completions)

    scores_of(talks, watch)
    scores_of(strings(talks), watch)
    first, second = (question.messages for question in talks.prompts.questions)
    ids = [
        row[mask].tolist() for row, mask in zip(talks.input_ids, talks.completion_mask, strict=True)
    ]
    answers = ["0", "0", "1", "1"]
    messages = [[{"role": "assistant", "content": text}] for text in talks.texts]
    assert calls[0] == (messages, ids, [first, first, second, second], answers)
    texts = ["How many?"] * 2 + ["What is the sum of the digits?"] * 2
    assert calls[1] == (talks.texts, ids, texts, answers)


def test_what_is_given_on_request(rollouts):
    seen = {}

    def takes_all(completions, **everything):
        seen.update(everything)
        return [0.0] * len(completions)

    def names_some(completions, prompts, completion_ids, answer, group_size):
        seen["named"] = group_size
        return [0.0] * len(completions)

    scores_of(rollouts, takes_all, names_some, state="the state")
    assert seen["trainer_state"] == "the state"
    assert seen["group_size"] == 2 and seen["named"] == 2
    assert seen["generation_prompts"] == [rollouts.prompts.generation_prompts[0]] * 4
    assert callable(seen["log_metric"]) and callable(seen["log_extra"])


def test_a_column_that_only_some_questions_have_is_none_for_the_others():
    model, tokenizer = tiny("text")
    mixed = [question("Hi", answer="1"), question("Hi", level=2)]
    seen = {}

    def watch(completions, **columns):
        seen.update(columns)
        return [0.0] * len(completions)

    scores_of(fixed_rollouts(model, tokenizer, mixed, group_size=2), watch)
    assert seen["answer"] == ["1", "1", None, None] and seen["level"] == [None, None, 2, 2]


def test_what_functions_log(rollouts):
    def logs(completions, log_metric, log_extra, **columns):
        log_metric("judge/seconds", 2)
        log_metric("judge/seconds", 4)
        log_extra("extracted", [text.upper() for text in completions])
        return [0.0] * len(completions)

    scores = scores_of(rollouts, logs)
    assert scores.logged == {"judge/seconds": [2.0, 4.0]}
    assert scores.extra == {"extracted": [text.upper() for text in rollouts.texts]}

    def logs_too_little(completions, log_extra, **columns):
        log_extra("extracted", ["1"])
        return [0.0] * len(completions)

    words = re.escape("log_extra('extracted', ...) needs a value per completion = 4, got 1")
    with pytest.raises(RewardError, match=words):
        scores_of(rollouts, logs_too_little)


# What they return


def test_rewards_are_weighted_sums_of_what_applies(rollouts):
    def applies_to_some(completions, **columns):
        return [None, 1.0, None, 3.0]

    def applies_to_few(completions, **columns):
        return [None, None, 2.0, None]

    # The completions have 1, 2, 3 and 4 letters.
    total, by_name, *_ = score([lengths, applies_to_some], [0.5, 2.0], rollouts)
    assert total.tolist() == [0.5, 3.0, 1.5, 8.0]
    assert by_name["lengths"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert by_name["applies_to_some"].isnan().tolist() == [True, False, True, False]
    # Where nothing applies there is no reward, which is not a reward of 0.
    total, *_ = score([applies_to_some, applies_to_few], [1.0, 10.0], rollouts)
    assert total[1:].tolist() == [1.0, 20.0, 3.0] and total[0].isnan()


def test_rewards_are_summed_in_fp64(rollouts):
    def large(completions, **columns):
        return [1e9 + i for i in range(len(completions))]

    total = scores_of(rollouts, large).total
    assert total.dtype == torch.float64 and total.diff().tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("value", [1, True, torch.tensor(1.0), torch.ones(1), np.float32(1)])
def test_numbers_of_any_kind(rollouts, value):
    assert scores_of(rollouts, lambda completions, **_: [value] * 4).total.tolist() == [1.0] * 4


def test_rewards_may_be_asynchronous(rollouts):
    started = threading.Barrier(2, timeout=10)
    loops = []

    async def first(completions, **columns):
        loops.append(asyncio.get_running_loop())
        await asyncio.get_running_loop().run_in_executor(None, started.wait)
        return [1.0] * len(completions)

    class Second:
        async def __call__(self, completions, **columns):
            # Both are on their way at the same time, or this waits in vain.
            await asyncio.get_running_loop().run_in_executor(None, started.wait)
            return [2.0] * len(completions)

    for _ in range(2):
        scores = scores_of(rollouts, first, lengths, Second())
        assert scores.total.tolist() == [4.0, 5.0, 6.0, 7.0]
    # A client that a function keeps from one step to the next belongs to one loop.
    assert loops[0] is loops[1]

    async def fails(completions, **columns):
        if any(len(text) == 3 for text in completions):
            raise ConnectionError("the judge is gone")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="'fails' failed .ConnectionError: the judge is gone"):
        scores_of(rollouts, fails)


# What they are called


class Named:
    name = "my_reward"

    def __call__(self, completions, **columns):
        return [1.0] * len(completions)


def test_the_name_of_a_reward(rollouts):
    assert reward_name(Named()) == "my_reward"
    assert reward_name(lengths) == "lengths"
    short = functools.partial(lengths, limit=3)
    long = functools.partial(lengths, limit=9, unit="tokens")
    assert reward_name(short) == "lengths(limit=3)"
    assert reward_name(long) == "lengths(limit=9, unit='tokens')"
    assert list(scores_of(rollouts, short, long, Named()).by_name) == [
        reward_name(short), reward_name(long), "my_reward",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("accuracy", "accuracy"),
        ("accuracy_std", "accuracy_std"),
        ("mean", "mean_reward"),
        ("std", "std_reward"),
        ("reward", "reward_reward"),
        ("reward_std", "reward_std_reward"),
        ("tokens", "tokens_reward"),
        ("tokens_std", "tokens_std_reward"),
    ],
)
def test_no_reward_takes_the_name_of_another_metric(name, metric):
    def function(completions, **columns):
        return lengths(completions)

    function.__name__ = name
    assert metric_name(function) == metric


# What they get is their own


def test_the_trainer_state_is_a_copy_for_every_call(rollouts):
    seen = []

    def changes(completions, trainer_state, **columns):
        seen.append(trainer_state.global_step)
        trainer_state.global_step = 999
        return [0.0] * len(completions)

    state = TrainerState(global_step=3)
    scores_of(rollouts, changes, changes, state=state)
    assert seen == [3, 3] and state.global_step == 3


def test_columns_with_the_names_of_our_options(rollouts):
    asked = [q._replace(columns={"answer": "d", "timeout": 10}) for q in rollouts.prompts.questions]
    prompts = dataclasses.replace(rollouts.prompts, questions=asked)
    rollouts = dataclasses.replace(rollouts, prompts=prompts)
    seen = []

    def own(completions, timeout, **columns):
        seen.append(timeout)
        return [0.0] * len(completions)

    for function in (exact_match, functools.partial(exact_match, unfinished_thought=1), own):
        check_signature(function, asked[0])
        scores_of(rollouts, function)
    assert seen == [[10] * 4]


def test_what_a_reward_gets_is_its_own():
    talks = conversations()
    columns = {"nested": {"key": [1]}, "array": np.arange(3), "list": ["a"], "map": {"a": [1]}}
    asked = [
        q._replace(columns=copy.deepcopy(columns), messages=copy.deepcopy(q.messages))
        for q in talks.prompts.questions
    ]
    prompts = dataclasses.replace(talks.prompts, questions=asked)
    rollouts = dataclasses.replace(talks, prompts=prompts)
    before = repr(asked), copy.deepcopy(rollouts.completion_ids)
    seen = []

    def edits(completions, **given):
        given = {name: value for name, value in given.items() if isinstance(value, list)}
        seen.append(repr(given))
        for prompt, ids in zip(given["prompts"], given["completion_ids"], strict=True):
            prompt[0]["content"] = "?"
            prompt.append("more")
            ids.append(-1)
        for i in range(len(completions)):
            given["nested"][i]["key"].append(2)
            given["map"][i]["new"] = 1
            given["array"][i][:] = 0
            given["list"][i].append("b")
        for values in given.values():
            values.clear()
        return [0.0] * len(completions)

    scores_of(rollouts, edits, functools.partial(edits))
    assert seen[0] == seen[1] and "more" not in seen[0]
    # Two completions of a question do not share what they get either.
    assert seen[0].count("'key': [1]") == 4
    assert (repr(asked), rollouts.completion_ids) == before


def test_a_signature_that_cannot_be_called(rollouts):
    question = rollouts.prompts.questions[0]

    def only(completions):
        return lengths(completions)

    def misses(completions, solution, **kwargs):
        return lengths(completions)

    class Judge:
        def __call__(self, prompts, completions):
            return lengths(completions)

    for function, words in (
        (only, "'only' is called with .*an unexpected keyword argument 'completion_ids'"),
        (misses, "'misses' is called with .*missing a required argument: 'solution'"),
        (Judge(), "'Judge' is called with .* should end with .*kwargs"),
    ):
        with pytest.raises(TypeError, match=f"cppo.CPPOTrainer: reward function {words}"):
            check_signature(function, question)
    for fits in (lengths, functools.partial(misses, solution=[]), max):
        check_signature(fits, question)
