"""One reward function, called on the completions of some rollouts."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import Future
from typing import Any, NamedTuple

from cppo.questions import Question
from cppo.rollouts.rollout import Rollouts
from cppo.train import fingerprint
from cppo.train.reward_functions import (
    RewardError,
    RewardFunction,
    accepted,
    is_async,
    reward_name,
)
from cppo.train.time_limit import TooLong, started, within

# Options of the rewards that ship here, which no column of the same name sets.
_OUR_OPTIONS = ("timeout", "unfinished_thought")
# Seconds for which a function is called again and again, to find the completion to blame.
_SEARCH_SECONDS = 30.0
# Beyond this, sums and squares of rewards leave what a float can hold.
_LARGEST_REWARD = 1e100
# What a function may raise by itself. Everything else is for the run: Ctrl-C, a time limit, a stop.
_RAISED = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError)
_TEXT = (str, bytes, bytearray, memoryview)


class Retry(NamedTuple):
    """How often a function that raises is called again, and who is told."""

    times: int
    say: Callable[[str], None]


class Call:
    """One reward function on all completions of some rollouts."""

    def __init__(
        self,
        function: RewardFunction,
        rollouts: Rollouts,
        state: Any,
        timeout: float | None,
        retry: Retry,
    ) -> None:
        self.name = reward_name(function)
        self._retry = retry
        self.log = _Log(len(rollouts.texts))
        self.function, self._rollouts, self._timeout = function, rollouts, timeout
        self._everything = range(len(rollouts.texts))
        self._extras = accepted(
            function,
            {
                "trainer_state": state,
                **self.log.functions,
                "group_size": rollouts.group_size,
            },
        )
        self._wants_prefix = bool(accepted(function, {"generation_prompts": None}))

    def start(self) -> Future[Any] | None:
        """Starts an async function; None for any other."""
        if not is_async(self.function):
            return None

        return started(lambda: self._evaluate(self._everything, self.log))

    def finish(self, begun: Future[Any] | None) -> list[float]:
        """A number per completion, NaN for None."""
        for attempt in range(self._retry.times + 1):
            if attempt:
                self.log.clear()
                begun = self.start()
            try:
                return self._result(begun)
            except TooLong as error:
                raise RewardError(
                    f"cppo: reward function {self.name!r} did not return within reward_timeout = "
                    f"{self._timeout:g} seconds for {len(self._everything)} completions"
                ) from error
            except RewardError:
                raise
            except _RAISED as error:
                if attempt == self._retry.times:
                    raise RewardError(self._describe(self._culprit(), error)) from error
                self._retry.say(
                    f"reward function {self.name!r} raised {type(error).__name__}: {error}; it is "
                    f"called again ({attempt + 1} of {self._retry.times})"
                )
                time.sleep(2.0**attempt)
        raise AssertionError

    def _result(self, begun: Future[Any] | None) -> list[float]:
        def wait() -> list[float]:
            # A generator that is returned computes its rewards while they are read.
            everything = self._everything
            returned = begun.result() if begun else self._evaluate_now(everything, self.log)
            return self._numbers(returned)

        try:
            return within(self._timeout, wait)
        except TooLong:
            if begun is not None:
                begun.cancel()
            raise

    def _evaluate(self, completions: Sequence[int], log: _Log) -> Any:
        rollouts = self._rollouts
        questions = [rollouts.question_of(index) for index in completions]
        names = sorted({name for question in questions for name in question.columns})
        if fingerprint.is_ours(self.function):
            names = [name for name in names if name not in _OUR_OPTIONS]
        pictures: dict[int, Any] = {}
        columns = {
            name: [_own(question.columns.get(name), pictures) for question in questions]
            for name in names
        }
        if self._wants_prefix:
            columns["generation_prompts"] = [
                rollouts.generation_prompt_of(index) for index in completions
            ]
        logging = {name: own for name, own in log.functions.items() if name in self._extras}
        extras = {**self._extras, **logging}
        if "group_size" in extras:  # of a part of a question, which the culprit is looked for in
            extras["group_size"] = min(extras["group_size"], len(completions))
        if "trainer_state" in extras:
            extras["trainer_state"] = _own(extras["trainer_state"], pictures)
        return self.function(
            completions=[_completion(rollouts, index) for index in completions],
            completion_ids=[list(rollouts.completion_ids[index]) for index in completions],
            prompts=[_own(_prompt(question), pictures) for question in questions],
            **{**columns, **extras},
        )

    def _evaluate_now(self, completions: Sequence[int], log: _Log) -> Any:
        returned = self._evaluate(completions, log)
        if not inspect.isawaitable(returned):
            return returned
        return started(lambda: returned).result()

    def _numbers(self, returned: Any) -> list[float]:
        if not _is_list(returned):
            raise RewardError(
                f"cppo: reward function {self.name!r} must return a list of one number "
                f"per completion, got {type(returned).__name__}"
            )
        values = list(returned)
        if len(values) != len(self._everything):
            raise RewardError(
                f"cppo: reward function {self.name!r} must return one number per "
                f"completion = {len(self._everything)}, got {len(values)}"
            )
        numbers: list[float] = []
        for index, value in zip(self._everything, values, strict=True):
            if isinstance(value, _TEXT):  # float() reads even '1_0'
                raise RewardError(self._describe(index, f"returned {value!r}, which is no number"))
            try:
                number = math.nan if value is None else float(value)
            except _RAISED as error:
                raise RewardError(self._describe(index, error)) from error
            if value is not None and not abs(number) <= _LARGEST_REWARD:
                words = f"returned {number}, no finite number up to {_LARGEST_REWARD:g}"
                raise RewardError(self._describe(index, words))
            numbers.append(number)
        return numbers

    def _culprit(self) -> int | None:
        """A completion on which the function raises by itself, if halving finds one in time."""
        begun, completions, is_found = time.monotonic(), list(self._everything), False
        while len(completions) > 1:
            # Whole questions while there are several: a function may compare their completions.
            group = self._rollouts.group_size
            unit = group if len(completions) > group else 1
            half = len(completions) // unit // 2 * unit
            for part in (completions[:half], completions[half:]):
                if time.monotonic() - begun > _SEARCH_SECONDS:
                    return None
                if self._fails(part):
                    completions, is_found = part, True
                    break
            else:
                return None
        return completions[0] if completions and (is_found or self._fails(completions)) else None

    def _fails(self, completions: Sequence[int]) -> bool:
        log = _Log(len(completions))  # else it would fail for what it logs of a part
        try:
            within(
                min(self._timeout or _SEARCH_SECONDS, _SEARCH_SECONDS),
                lambda: _read(self._evaluate_now(completions, log)),
            )
        except (*_RAISED, TooLong):
            return True
        return False

    def _describe(self, index: int | None, what: object) -> str:
        cause = f"{type(what).__name__}: {what}" if isinstance(what, BaseException) else str(what)
        head = f"cppo: reward function {self.name!r} failed ({cause})"
        if index is None:
            return head + " on the whole batch; no completion was found that fails by itself"
        question = self._rollouts.question_of(index)
        place = "" if question.row is None else f" of row {question.row}"
        return (
            f"{head}\n  question{place}: {question.messages!r}\n  answer: "
            f"{question.columns.get('answer')!r}\n  completion: {self._rollouts.texts[index]!r}"
        )


def _is_list(returned: Any) -> bool:
    """Whether it may hold rewards: the keys of a dict are none, a set has no order."""
    return isinstance(returned, Iterable) and not isinstance(returned, (*_TEXT, Mapping, Set))


def _read(returned: Any) -> None:
    """Computes what a generator has left to compute."""
    if _is_list(returned):
        list(returned)


def _completion(rollouts: Rollouts, index: int) -> Any:
    text = rollouts.texts[index]
    if rollouts.question_of(index).is_conversational:
        return [{"role": "assistant", "content": text}]
    return text


def _own(value: Any, pictures: dict[int, Any]) -> Any:
    """A copy for a reward function, which may change it.

    Args:
        pictures: copies that were made before, by the original's id: one for all completions.
    """
    if value is None or isinstance(value, (str, int, float, bool, bytes)):
        return value
    if type(value) in (list, tuple):
        return type(value)([_own(entry, pictures) for entry in value])
    if type(value) is dict:
        return {key: _own(entry, pictures) for key, entry in value.items()}
    if hasattr(value, "getpixel"):
        if id(value) not in pictures:
            pictures[id(value)] = value.copy()
        return pictures[id(value)]
    try:
        return copy.deepcopy(value)
    except Exception:  # what cannot be copied, an open file for example
        return value


def _prompt(question: Question) -> Any:
    """The prompt in the form that the data set has it: messages or a string."""
    if question.is_conversational:
        return question.messages
    content = question.messages[0]["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "<image>") for part in content)


class _Log:
    """What a reward function logs while it runs."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.metrics: dict[str, list[float]] = {}
        self.columns: dict[str, list[Any]] = {}

    @property
    def functions(self) -> dict[str, Callable[..., None]]:
        """What a reward function may name among its arguments."""
        return {"log_metric": self.log_metric, "log_extra": self.log_extra}

    def clear(self) -> None:
        self.metrics.clear()
        self.columns.clear()

    def log_metric(self, name: str, value: float) -> None:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"log_metric({name!r}, ...) needs a finite number, got {value!r}")
        self.metrics.setdefault(str(name), []).append(number)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        values = list(values)
        if len(values) != self._count:
            raise ValueError(
                f"log_extra({column!r}, ...) needs a value per completion = {self._count}, "
                f"got {len(values)}"
            )
        self.columns[str(column)] = values
