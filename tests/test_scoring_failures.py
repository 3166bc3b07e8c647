"""Reward functions that fail: what the error says, and what a run may rely on."""

import asyncio
import math
import re
import threading
import time

import pytest
import torch
from scoring_cases import conversations, lengths, scores_of, strings

from cppo.train import reward_call
from cppo.train.scoring import RewardError
from cppo.train.stopping import Stopped


@pytest.fixture
def rollouts():
    return strings(conversations())


# What happens when they fail


# What a function returns for four completions, and what the error says of it.
BAD_RETURNS = [
    *(([1.0] * n, f"must return one number per completion = 4, got {n}") for n in (0, 1, 5)),
    *(
        (value, f"must return a list of one number per completion, got {type(value).__name__}")
        for value in (1.0, None, "1234", bytearray(4), memoryview(b"1234"), {0.0: 5.0}, {1.0, 2.0})
    ),
]
# What it returns for the third one.
BAD_NUMBERS = [
    (math.nan, "returned nan"),
    (math.inf, "returned inf"),
    ("right", "returned 'right', which is no number"),
    ("1_0", "returned '1_0', which is no number"),
    (b"1", "returned b'1', which is no number"),
    (1e308, r"returned 1e\+308, no finite number up to 1e\+100"),
    (-1e308, r"returned -1e\+308, no finite number"),
    (10**400, "OverflowError: "),
    ([1.0], "TypeError: "),
    (torch.tensor([1.0, 2.0]), "RuntimeError: |ValueError: |TypeError: "),
]


@pytest.mark.parametrize(("value", "words"), BAD_RETURNS)
def test_something_that_is_no_list_of_rewards(rollouts, value, words):
    def broken(completions, **columns):
        return value

    with pytest.raises(RewardError, match=f"reward function 'broken' {words}"):
        scores_of(rollouts, broken)


@pytest.mark.parametrize(("value", "words"), BAD_NUMBERS)
def test_a_bad_reward_names_function_question_and_completion(rollouts, value, words):
    def broken(completions, **columns):
        return [value if len(text) == 3 else 0.0 for text in completions]

    with pytest.raises(RewardError, match=rf"reward function 'broken' failed \(({words})") as error:
        scores_of(rollouts, lengths, broken)
    message = str(error.value)
    assert repr(rollouts.prompts.questions[1].messages) in message  # the third completion's
    assert f"completion: {rollouts.texts[2]!r}" in message and "answer: '1'" in message


def test_a_raising_reward_names_the_completion_found_by_halving(rollouts):
    sizes = []

    def broken(completions, **columns):
        sizes.append(len(completions))
        return [1 / (len(text) - 3) for text in completions]

    with pytest.raises(RewardError, match="'broken' failed .ZeroDivisionError: ") as error:
        scores_of(rollouts, broken)
    assert f"completion: {rollouts.texts[2]!r}" in str(error.value)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert sizes == [4, 2, 2, 1]


def test_what_a_reward_logs_of_a_part_is_not_to_blame(rollouts):
    def broken(completions, log_extra, **columns):
        log_extra("length", [len(text) for text in completions])
        return [1 / (len(text) - 3) for text in completions]

    with pytest.raises(RewardError, match="'broken' failed .ZeroDivisionError: ") as error:
        scores_of(rollouts, broken)
    assert f"completion: {rollouts.texts[2]!r}" in str(error.value)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_reward_that_compares_the_completions_of_a_question_names_one(rollouts, length):
    def compares(completions, group_size, **columns):
        groups = [completions[i : i + group_size] for i in range(0, len(completions), group_size)]
        assert all(len(group) == group_size for group in groups), "not whole groups"
        return [1 / (len(text) - length) for text in completions]

    with pytest.raises(RewardError, match="'compares' failed .ZeroDivisionError: ") as error:
        scores_of(rollouts, compares)
    assert f"completion: {rollouts.texts[length - 1]!r}" in str(error.value)


def test_a_reward_that_raises_on_the_whole_batch_only_says_so(rollouts):
    def no_batches(completions, **columns):
        if len(completions) > 1:
            raise RuntimeError("one at a time")
        return [1.0]

    words = "one at a time.* no completion was found that fails by itself"
    with pytest.raises(RewardError, match=words):
        scores_of(rollouts, no_batches)


def exits(completions, **columns):
    if any(len(text) == 3 for text in completions):
        raise SystemExit(0)
    return [0.0] * len(completions)


async def exits_later(completions, **columns):
    # As tasks of its own, which end the loop that runs them.
    return [(await asyncio.gather(_exit(text)))[0] for text in completions]


async def _exit(text):
    return exits([text])[0]


def cancels(completions, **columns):
    raise asyncio.CancelledError


def closes(completions, **columns):
    raise GeneratorExit


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize(
    ("function", "words"),
    [(exits, "SystemExit: 0"), (exits_later, "SystemExit: 0"), (cancels, "CancelledError"),
     (closes, "GeneratorExit")],
)  # fmt: skip
def test_a_reward_that_ends_the_process_fails_like_one_that_raises(
    rollouts, function, words, timeout
):
    name = function.__name__
    with pytest.raises(RewardError, match=f"'{name}' failed .{words}") as error:
        scores_of(rollouts, function, timeout=timeout)
    if "SystemExit" in words:
        assert f"completion: {rollouts.texts[2]!r}" in str(error.value)

    async def fine(completions, **columns):
        return [1.0] * len(completions)

    assert scores_of(rollouts, fine).total.tolist() == [1.0] * 4  # the loop goes on


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped])
def test_what_is_for_the_run_goes_through_a_reward(rollouts, error):
    def interrupted(completions, **columns):
        raise error

    with pytest.raises(error):
        scores_of(rollouts, interrupted)


def test_a_returned_generator_belongs_to_its_function(rollouts):
    """Its rewards are computed within the time limit, and within the search for the culprit."""

    def generator(completions, **columns):
        return map(lambda text: 1 / (len(text) - 3), completions)

    with pytest.raises(RewardError, match="'generator' failed .ZeroDivisionError") as error:
        scores_of(rollouts, generator)
    assert f"completion: {rollouts.texts[2]!r}" in str(error.value)

    def slow(completions, **columns):
        for _ in completions:
            time.sleep(1.0)
            yield 0.0

    with pytest.raises(RewardError, match="'slow' did not return within reward_timeout = 0.2"):
        scores_of(rollouts, slow, timeout=0.2)


def test_the_search_for_the_culprit_ends(rollouts, monkeypatch):
    monkeypatch.setattr(reward_call, "_SEARCH_SECONDS", 0.2)
    calls = []

    def slow(completions, **columns):
        calls.append(1)
        if len(calls) > 1:
            time.sleep(5)
        raise RuntimeError("no answer")

    began = time.monotonic()
    with pytest.raises(RewardError, match="'slow' failed .RuntimeError: no answer. on the whole"):
        scores_of(rollouts, slow)
    assert len(calls) == 2 and time.monotonic() - began < 4


@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_is_called_again_when_asked(rollouts, monkeypatch, is_async):
    waits = []
    monkeypatch.setattr(reward_call.time, "sleep", waits.append)
    said = []
    calls = []

    def flaky(completions, log_metric, **columns):
        calls.append(1)
        log_metric("judged", len(calls))
        if len(calls) < 3:
            raise ConnectionError("busy")
        return lengths(completions)

    async def flaky_later(completions, log_metric, **columns):
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


@pytest.mark.parametrize("value", [math.nan, math.inf, "x"])
def test_a_logged_metric_is_a_number(rollouts, value):
    def logs(completions, log_metric, **columns):
        log_metric("x", value)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'logs' failed .ValueError: (log_metric|could not)"):
        scores_of(rollouts, logs)


# What happens when they do not return


def endless(completions, **columns):
    while True:
        try:
            time.sleep(60)
        except Exception:  # what careful functions do
            continue


def endless_expression(completions, **columns):
    re.fullmatch(r"(a+)+b", "a" * 60)  # holds the interpreter for years
    return [0.0] * len(completions)


async def endless_judge(completions, **columns):
    await asyncio.sleep(3600)
    return [0.0] * len(completions)


@pytest.mark.parametrize("function", [endless, endless_expression, endless_judge])
def test_a_reward_that_never_returns_is_named(rollouts, function):
    began = time.monotonic()
    words = "did not return within reward_timeout = 0.5 seconds for 4 completions"
    with pytest.raises(RewardError, match=f"'{function.__name__}' {words}"):
        scores_of(rollouts, lengths, function, timeout=0.5)
    assert time.monotonic() - began < 20
    assert scores_of(rollouts, lengths, timeout=0.5).total.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_time_limit_in_another_thread(rollouts):
    words = []

    def run():
        try:
            scores_of(rollouts, endless, timeout=0.3)
        except RewardError as error:
            words.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert not thread.is_alive() and "'endless' did not return" in words[0]


def test_a_function_s_own_timeout_is_its_own(rollouts):
    def times_out(completions, **columns):
        raise TimeoutError("the judge takes too long")

    for timeout in (None, 30.0):
        with pytest.raises(RewardError, match="TimeoutError: the judge takes too long"):
            scores_of(rollouts, times_out, timeout=timeout)
