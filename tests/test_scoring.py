"""Reward functions: how they are called, what their answers mean, and how they fail."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import math
import re
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from trainer_cases import fixed_rollouts, question, questions_for, tiny
from transformers import TrainerState

from cppo.rewards import completion_text, exact_match
from cppo.rollouts.rollout import Rollouts
from cppo.train import reward_call
from cppo.train.scoring import RewardError, Scores, check_signature, metric_name, reward_name, score
from cppo.train.stopping import Stopped


def strings(rollouts: Rollouts) -> Rollouts:
    """The same rollouts of a data set whose prompts are strings."""
    questions = [q._replace(is_conversational=False) for q in rollouts.prompts.questions]
    prompts = dataclasses.replace(rollouts.prompts, questions=questions)
    return dataclasses.replace(rollouts, prompts=prompts)


@pytest.fixture(scope="module")
def conversations() -> Rollouts:
    model, tokenizer = tiny("text")
    return fixed_rollouts(model, tokenizer, questions_for("text", 2), lengths=[1, 2, 3, 4])


@pytest.fixture(scope="module")
def rollouts(conversations: Rollouts) -> Rollouts:
    return strings(conversations)


def lengths(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion_text(text))) for text in completions]


def scores_of(rollouts: Rollouts, *functions: Any, **options: Any) -> Scores:
    return score(list(functions), [1.0] * len(functions), rollouts, **options)


# What they are given


def test_rewards_are_called_as_trl_calls_them(conversations: Rollouts) -> None:
    calls = []

    def watch(completions: Any, *, completion_ids: Any, prompts: Any, answer: Any) -> list[float]:
        calls.append((completions, completion_ids, prompts, answer))
        return [0] * len(completions)

    scores_of(conversations, watch)
    scores_of(strings(conversations), watch)
    first, second = (question.messages for question in conversations.prompts.questions)
    ids = [row[mask].tolist() for row, mask in zip(
        conversations.input_ids, conversations.completion_mask, strict=True
    )]  # fmt: skip
    answers = ["0", "0", "1", "1"]
    messages = [[{"role": "assistant", "content": text}] for text in conversations.texts]
    assert calls[0] == (messages, ids, [first, first, second, second], answers)
    texts = ["How many?"] * 2 + ["What is the sum of the digits?"] * 2
    assert calls[1] == (conversations.texts, ids, texts, answers)


def test_what_is_given_on_request(rollouts: Rollouts) -> None:
    seen: dict[str, Any] = {}

    def takes_all(completions: Any, **everything: Any) -> list[float]:
        seen.update(everything)
        return [0.0] * len(completions)

    def names_some(completions: Any, prompts: Any, completion_ids: Any, answer: Any,
                   group_size: int) -> list[float]:  # fmt: skip
        seen["named"] = group_size
        return [0.0] * len(completions)

    scores_of(rollouts, takes_all, names_some, state="the state")
    assert seen["trainer_state"] == "the state"
    assert seen["group_size"] == 2 and seen["named"] == 2
    assert seen["generation_prompts"] == [rollouts.prompts.generation_prompts[0]] * 4
    assert callable(seen["log_metric"]) and callable(seen["log_extra"])


def test_a_column_that_only_some_questions_have_is_none_for_the_others() -> None:
    model, tokenizer = tiny("text")
    mixed = [question("Hi", answer="1"), question("Hi", level=2)]
    seen: dict[str, Any] = {}

    def watch(completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns)
        return [0.0] * len(completions)

    scores_of(fixed_rollouts(model, tokenizer, mixed, group_size=2), watch)
    assert seen["answer"] == ["1", "1", None, None] and seen["level"] == [None, None, 2, 2]


def test_what_functions_log(rollouts: Rollouts) -> None:
    def logs(completions: Any, log_metric: Any, log_extra: Any, **columns: Any) -> list[float]:
        log_metric("judge/seconds", 2)
        log_metric("judge/seconds", 4)
        log_extra("extracted", [text.upper() for text in completions])
        return [0.0] * len(completions)

    scores = scores_of(rollouts, logs)
    assert scores.logged == {"judge/seconds": [2.0, 4.0]}
    assert scores.extra == {"extracted": [text.upper() for text in rollouts.texts]}

    def logs_too_little(completions: Any, log_extra: Any, **columns: Any) -> list[float]:
        log_extra("extracted", ["1"])
        return [0.0] * len(completions)

    words = re.escape("log_extra('extracted', ...) needs a value per completion = 4, got 1")
    with pytest.raises(RewardError, match=words):
        scores_of(rollouts, logs_too_little)


# What they return


def test_rewards_are_weighted_sums_of_what_applies(rollouts: Rollouts) -> None:
    def applies_to_some(completions: list[str], **columns: Any) -> list[float | None]:
        return [None, 1.0, None, 3.0]

    def applies_to_few(completions: list[str], **columns: Any) -> list[float | None]:
        return [None, None, 2.0, None]

    # The completions have 1, 2, 3 and 4 letters.
    total, by_name, *_ = score([lengths, applies_to_some], [0.5, 2.0], rollouts)
    assert total.tolist() == [0.5, 3.0, 1.5, 8.0]
    assert by_name["lengths"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert by_name["applies_to_some"].isnan().tolist() == [True, False, True, False]
    # Where nothing applies there is no reward, which is not a reward of 0.
    total, *_ = score([applies_to_some, applies_to_few], [1.0, 10.0], rollouts)
    assert total[1:].tolist() == [1.0, 20.0, 3.0] and total[0].isnan()


def test_rewards_are_summed_in_fp64(rollouts: Rollouts) -> None:
    def large(completions: list[str], **columns: Any) -> list[float]:
        return [1e9 + i for i in range(len(completions))]

    total = scores_of(rollouts, large).total
    assert total.dtype == torch.float64 and total.diff().tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("value", [1, True, torch.tensor(1.0), torch.ones(1), np.float32(1)])
def test_numbers_of_any_kind(rollouts: Rollouts, value: Any) -> None:
    assert scores_of(rollouts, lambda completions, **_: [value] * 4).total.tolist() == [1.0] * 4


def test_rewards_may_be_asynchronous(rollouts: Rollouts) -> None:
    started = threading.Barrier(2, timeout=10)
    loops = []

    async def first(completions: list[str], **columns: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        await asyncio.get_running_loop().run_in_executor(None, started.wait)
        return [1.0] * len(completions)

    class Second:
        async def __call__(self, completions: list[str], **columns: Any) -> list[float]:
            # Both are on their way at the same time, or this waits in vain.
            await asyncio.get_running_loop().run_in_executor(None, started.wait)
            return [2.0] * len(completions)

    for _ in range(2):
        scores = scores_of(rollouts, first, lengths, Second())
        assert scores.total.tolist() == [4.0, 5.0, 6.0, 7.0]
    # A client that a function keeps from one step to the next belongs to one loop.
    assert loops[0] is loops[1]

    async def fails(completions: list[str], **columns: Any) -> list[float]:
        if any(len(text) == 3 for text in completions):
            raise ConnectionError("the judge is gone")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="'fails' failed .ConnectionError: the judge is gone"):
        scores_of(rollouts, fails)


# What they are called


class Named:
    name = "my_reward"

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)


def test_the_name_of_a_reward(rollouts: Rollouts) -> None:
    assert reward_name(Named()) == "my_reward"
    assert reward_name(lengths) == "lengths"
    short = functools.partial(lengths, limit=3)
    long = functools.partial(lengths, limit=9, unit="tokens")
    assert reward_name(short) == "lengths(limit=3)"
    assert reward_name(long) == "lengths(limit=9, unit='tokens')"
    assert list(scores_of(rollouts, short, long, Named()).by_name) == [
        reward_name(short), reward_name(long), "my_reward",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["reward", "tokens", "mean", "std"])
def test_a_reward_named_like_another_metric(name: str) -> None:
    def function(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    function.__name__ = name
    assert reward_name(function) == name and metric_name(function) == f"{name}_reward"


# What happens when they fail


def _third(completions: list[str], value: Any) -> list[Any]:
    return [value if len(text) == 3 else 0.0 for text in completions]


def raises(completions: list[str], **columns: Any) -> list[float]:
    return [1 / (len(text) - 3) for text in completions]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (math.nan, "returned nan"),
        (math.inf, "returned inf"),
        ("right", "returned 'right', which is no number"),
        ("1_0", "returned '1_0', which is no number"),
        (b"1", "returned b'1', which is no number"),
        (1e308, r"returned 1e\+308, no finite number up to 1e\+100"),
        (-1e308, r"returned -1e\+308, no finite number"),
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
        scores_of(rollouts, lengths, broken)
    message = str(error.value)
    assert repr(rollouts.prompts.questions[1].messages) in message  # the third completion's
    assert f"completion: {rollouts.texts[2]!r}" in message and "answer: '1'" in message


def test_a_raising_reward_names_the_completion_on_which_it_raises(rollouts: Rollouts) -> None:
    with pytest.raises(RewardError, match="'raises' failed .ZeroDivisionError: ") as error:
        scores_of(rollouts, raises)
    assert f"completion: {rollouts.texts[2]!r}" in str(error.value)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_reward_that_raises_on_the_whole_batch_only_says_so(rollouts: Rollouts) -> None:
    def no_batches(completions: list[str], **columns: Any) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("one at a time")
        return [1.0]

    words = "one at a time.* no completion was found that fails by itself"
    with pytest.raises(RewardError, match=words):
        scores_of(rollouts, no_batches)


@pytest.mark.parametrize("value", [[1.0], [], [1.0] * 5])
def test_a_wrong_number_of_rewards(rollouts: Rollouts, value: list[float]) -> None:
    def short(completions: list[str], **columns: Any) -> list[float]:
        return value

    words = f"'short' must return one number per completion = 4, got {len(value)}"
    with pytest.raises(RewardError, match=words):
        scores_of(rollouts, short)


def exits(completions: list[str], **columns: Any) -> list[float]:
    if any(len(text) == 3 for text in completions):
        raise SystemExit(0)
    return [0.0] * len(completions)


async def exits_later(completions: list[str], **columns: Any) -> list[float]:
    # As tasks of its own, which end the loop that runs them.
    return [(await asyncio.gather(_exit(text)))[0] for text in completions]


async def _exit(text: str) -> float:
    return exits([text])[0]


def cancels(completions: list[str], **columns: Any) -> list[float]:
    raise asyncio.CancelledError


def closes(completions: list[str], **columns: Any) -> list[float]:
    raise GeneratorExit


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize(
    ("function", "words"),
    [(exits, "SystemExit: 0"), (exits_later, "SystemExit: 0"), (cancels, "CancelledError"),
     (closes, "GeneratorExit")],
)  # fmt: skip
def test_a_reward_that_ends_the_process_fails_like_one_that_raises(
    rollouts: Rollouts, function: Any, words: str, timeout: float | None
) -> None:
    name = function.__name__
    with pytest.raises(RewardError, match=f"'{name}' failed .{words}") as error:
        scores_of(rollouts, function, timeout=timeout)
    if "SystemExit" in words:
        assert f"completion: {rollouts.texts[2]!r}" in str(error.value)

    async def fine(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    assert scores_of(rollouts, fine).total.tolist() == [1.0] * 4  # the loop goes on


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped])
def test_what_is_for_the_run_goes_through_a_reward(rollouts: Rollouts, error: Any) -> None:
    def interrupted(completions: list[str], **columns: Any) -> list[float]:
        raise error

    with pytest.raises(error):
        scores_of(rollouts, interrupted)


def test_a_returned_generator_belongs_to_its_function(rollouts: Rollouts) -> None:
    """Its rewards are computed within the time limit, and within the search for the culprit."""

    def generator(completions: list[str], **columns: Any) -> Any:
        return map(lambda text: 1 / (len(text) - 3), completions)

    with pytest.raises(RewardError, match="'generator' failed .ZeroDivisionError") as error:
        scores_of(rollouts, generator)
    assert f"completion: {rollouts.texts[2]!r}" in str(error.value)

    def slow(completions: list[str], **columns: Any) -> Any:
        for _ in completions:
            time.sleep(1.0)
            yield 0.0

    with pytest.raises(RewardError, match="'slow' did not return within reward_timeout = 0.2"):
        scores_of(rollouts, slow, timeout=0.2)


def test_the_trainer_state_is_a_copy_for_every_call(rollouts: Rollouts) -> None:
    seen = []

    def changes(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
        seen.append(trainer_state.global_step)
        trainer_state.global_step = 999
        return [0.0] * len(completions)

    state = TrainerState(global_step=3)
    scores_of(rollouts, changes, changes, state=state)
    assert seen == [3, 3] and state.global_step == 3


def test_the_culprit_is_found_by_halving(rollouts: Rollouts) -> None:
    sizes = []

    def broken(completions: list[str], **columns: Any) -> list[float]:
        sizes.append(len(completions))
        return raises(completions)

    with pytest.raises(RewardError, match="'broken' failed .ZeroDivisionError: ") as error:
        scores_of(rollouts, broken)
    assert f"completion: {rollouts.texts[2]!r}" in str(error.value)
    assert sizes == [4, 2, 2, 1]


def test_the_search_for_the_culprit_ends(
    rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_call, "_SEARCH_SECONDS", 0.2)
    calls = []

    def slow(completions: list[str], **columns: Any) -> list[float]:
        calls.append(1)
        if len(calls) > 1:
            time.sleep(5)
        raise RuntimeError("no answer")

    began = time.monotonic()
    with pytest.raises(RewardError, match="'slow' failed .RuntimeError: no answer. on the whole"):
        scores_of(rollouts, slow)
    assert len(calls) == 2 and time.monotonic() - began < 4


@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_is_called_again_when_asked(
    rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(reward_call.time, "sleep", waits.append)
    said: list[str] = []
    calls = []

    def flaky(completions: list[str], log_metric: Any, **columns: Any) -> list[float]:
        calls.append(1)
        log_metric("judged", len(calls))
        if len(calls) < 3:
            raise ConnectionError("busy")
        return lengths(completions)

    async def flaky_later(completions: list[str], log_metric: Any, **columns: Any) -> list[float]:
        return flaky(completions, log_metric, **columns)

    function = flaky_later if is_async else flaky
    scores = scores_of(rollouts, function, retries=2, say=said.append)
    assert scores.total.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert scores.logged == {"judged": [3.0]}  # of the call that counts
    assert waits == [1.0, 2.0] and len(said) == 2
    assert "raised ConnectionError: busy; it is called again (1 of 2)" in said[0]
    calls.clear()
    with pytest.raises(RewardError, match="failed .ConnectionError: busy"):
        scores_of(rollouts, function, retries=1, say=said.append)


def test_columns_with_the_names_of_our_options(rollouts: Rollouts) -> None:
    asked = [q._replace(columns={"answer": "d", "timeout": 10}) for q in rollouts.prompts.questions]
    prompts = dataclasses.replace(rollouts.prompts, questions=asked)
    rollouts = dataclasses.replace(rollouts, prompts=prompts)
    seen = []

    def own(completions: list[str], timeout: list[int], **columns: Any) -> list[float]:
        seen.append(timeout)
        return [0.0] * len(completions)

    for function in (exact_match, functools.partial(exact_match, unfinished_thought=1), own):
        check_signature(function, asked[0])
        scores_of(rollouts, function)
    assert seen == [[10] * 4]


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("accuracy", "accuracy"),
        ("accuracy_std", "accuracy_std"),
        ("mean", "mean_reward"),
        ("reward", "reward_reward"),
        ("reward_std", "reward_std_reward"),
        ("tokens", "tokens_reward"),
        ("tokens_std", "tokens_std_reward"),
    ],
)
def test_no_reward_takes_the_name_of_another_metric(name: str, metric: str) -> None:
    def function(completions: list[str], **columns: Any) -> list[float]:
        return lengths(completions)

    function.__name__ = name
    assert metric_name(function) == metric


def test_what_a_reward_gets_is_its_own(conversations: Rollouts) -> None:
    columns = {"nested": {"key": [1]}, "array": np.arange(3), "list": ["a"], "map": {"a": [1]}}
    asked = [
        q._replace(columns=copy.deepcopy(columns), messages=copy.deepcopy(q.messages))
        for q in conversations.prompts.questions
    ]
    prompts = dataclasses.replace(conversations.prompts, questions=asked)
    rollouts = dataclasses.replace(conversations, prompts=prompts)
    before = repr(asked), copy.deepcopy(rollouts.completion_ids)
    seen = []

    def edits(completions: Any, **given: Any) -> list[float]:
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


@pytest.mark.parametrize(
    ("value", "words"),
    [({0.0: 5.0, 1.0: 2.0, 2.0: 1.0, 3.0: 0.0}, "got dict"), ({1.0, 2.0, 3.0, 4.0}, "got set")],
)
def test_keys_are_no_rewards(rollouts: Rollouts, value: Any, words: str) -> None:
    with pytest.raises(RewardError, match=f"must return a list of one number .*{words}"):
        scores_of(rollouts, lambda completions, **columns: value)


def test_a_number_that_no_float_holds(rollouts: Rollouts) -> None:
    def huge(completions: list[str], **columns: Any) -> list[int]:
        return _third(completions, 10**400)

    with pytest.raises(RewardError, match="'huge' failed .OverflowError: ") as error:
        scores_of(rollouts, huge)
    assert f"completion: {rollouts.texts[2]!r}" in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, "x"])
def test_a_logged_metric_is_a_number(rollouts: Rollouts, value: Any) -> None:
    def logs(completions: list[str], log_metric: Any, **columns: Any) -> list[float]:
        log_metric("x", value)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'logs' failed .ValueError: (log_metric|could not)"):
        scores_of(rollouts, logs)


def test_a_signature_that_cannot_be_called(rollouts: Rollouts) -> None:
    question = rollouts.prompts.questions[0]

    def only(completions: list[str]) -> list[float]:
        return lengths(completions)

    def misses(completions: list[str], solution: list[str], **kwargs: Any) -> list[float]:
        return lengths(completions)

    class Judge:
        def __call__(self, prompts: Any, completions: Any) -> list[float]:
            return lengths(completions)

    for function, words in (
        (only, "'only' is called with .*an unexpected keyword argument 'completion_ids'"),
        (misses, "'misses' is called with .*missing a required argument: 'solution'"),
        (Judge(), "'Judge' is called with .* should end with .*kwargs"),
    ):
        with pytest.raises(TypeError, match=f"cppo.CPPOTrainer: reward function {words}"):
            check_signature(function, question)
    for fits in (lengths, raises, functools.partial(misses, solution=[]), max):
        check_signature(fits, question)


@pytest.mark.parametrize("value", [1.0, None, "1234", bytearray(4), memoryview(b"1234")])
def test_something_that_is_no_list_of_rewards(rollouts: Rollouts, value: Any) -> None:
    def scalar(completions: list[str], **columns: Any) -> Any:
        return value

    words = f"'scalar' must return a list of one number per completion, got {type(value).__name__}"
    with pytest.raises(RewardError, match=words):
        scores_of(rollouts, scalar)


# What happens when they do not return


def endless(completions: list[str], **columns: Any) -> list[float]:
    while True:
        try:
            time.sleep(60)
        except Exception:  # what careful functions do
            continue


def endless_expression(completions: list[str], **columns: Any) -> list[float]:
    re.fullmatch(r"(a+)+b", "a" * 60)  # holds the interpreter for years
    return [0.0] * len(completions)


async def endless_judge(completions: list[str], **columns: Any) -> list[float]:
    await asyncio.sleep(3600)
    return [0.0] * len(completions)


@pytest.mark.parametrize("function", [endless, endless_expression, endless_judge])
def test_a_reward_that_never_returns_is_named(rollouts: Rollouts, function: Any) -> None:
    began = time.monotonic()
    words = "did not return within reward_timeout = 0.5 seconds for 4 completions"
    with pytest.raises(RewardError, match=f"'{function.__name__}' {words}"):
        scores_of(rollouts, lengths, function, timeout=0.5)
    assert time.monotonic() - began < 20
    assert scores_of(rollouts, lengths, timeout=0.5).total.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_time_limit_in_another_thread(rollouts: Rollouts) -> None:
    words: list[str] = []

    def run() -> None:
        try:
            scores_of(rollouts, endless, timeout=0.3)
        except RewardError as error:
            words.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert not thread.is_alive() and "'endless' did not return" in words[0]


def test_a_function_s_own_timeout_is_its_own(rollouts: Rollouts) -> None:
    def times_out(completions: list[str], **columns: Any) -> list[float]:
        raise TimeoutError("the judge takes too long")

    for timeout in (None, 30.0):
        with pytest.raises(RewardError, match="TimeoutError: the judge takes too long"):
            scores_of(rollouts, times_out, timeout=timeout)
