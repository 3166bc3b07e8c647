"""Calls reward functions as TRL calls them and adds their rewards up.

    rollouts -> score -> Scores(total, by_name)

A function is called with keyword arguments alone, one entry per completion in each list:

    prompts              messages, or strings where the data set's prompts are strings
    completions          `[{"role": "assistant", "content": text}]`, or strings likewise
    completion_ids       token ids, with the closing one
    <column>             every other column of the data set

and, if it names them or takes `**kwargs`, with

    trainer_state        a `transformers.TrainerState`: `global_step`, `max_steps`
    log_metric           `log_metric(name, value)`: its mean in a step is the metric `logged/<name>`
    log_extra            `log_extra(column, values)`: a value per completion, for completions.jsonl
    generation_prompts   what the chat template put behind the last message, `<think>` for example
    group_size           completions per question; those of a question are neighbours

It returns a number per completion, or None where it does not apply. It may be `async`. What it gets
is its own: lists, messages and arrays may be changed (pictures are the same for all completions of
a question).
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import math
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from cppo.questions import Question
from cppo.rollouts.rollout import Rollouts
from cppo.train import fingerprint
from cppo.train.progress import as_json

RewardFunction = Callable[..., Any]
# Names beside those of the reward functions in `reward/...` and `eval/sampled/...`.
_METRICS = ("mean", "std", "zero_variance_share", "scored_share", "reward", "tokens")
# Only a function that names these arguments, or takes `**kwargs`, gets them.
_OPTIONAL = ("trainer_state", "log_metric", "log_extra", "generation_prompts", "group_size")
# Options of the rewards that ship here, which no column of the same name sets.
_OUR_OPTIONS = ("timeout", "unfinished_thought")
# To find the completion to blame, the function is called again and again, for so many seconds.
_SEARCH_SECONDS = 30.0
# Beyond this, sums and squares of rewards leave what a float can hold.
_LARGEST_REWARD = 1e100
# What a function may raise by itself. Everything else is for the run: Ctrl-C, a time limit, a stop.
_RAISED = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError)
_TEXT = (str, bytes, bytearray, memoryview)
_T = TypeVar("_T")


class RewardError(RuntimeError):
    """A reward function raised, took too long, or returned something else than numbers."""


class Scores(NamedTuple):
    """What the reward functions say of B completions.

    total: (B,) fp64, the weighted sum of the rewards that apply; NaN where none does.
    by_name: {function: (B,) fp64}; NaN where the function does not apply.
    logged: {name: the numbers that functions passed to `log_metric`}.
    extra: {column: B values that functions passed to `log_extra`}, as JSON has them.
    """

    total: Tensor
    by_name: dict[str, Tensor]
    logged: dict[str, list[float]]
    extra: dict[str, list[Any]]


def score(
    functions: Sequence[RewardFunction],
    weights: Sequence[float],
    rollouts: Rollouts,
    *,
    state: Any = None,
    timeout: float | None = None,
    retries: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Scores:
    """Rewards of every completion.

    A None is left out of the sum; where all functions return None there is no reward, and the
    completion takes part in nothing (as in TRL >= 1.16).

    Args:
        functions, weights: as many of both.
        state: the `trainer_state` that functions get.
        timeout: seconds that a function may take for all completions. None: no limit.
        retries: times that a function which raises is called again, a second later, then two, four
            and so on. One that takes too long or returns something wrong is not.
        say: is told of every retry.
    Raises: RewardError naming the function, and the question and completion if one is to blame.
    """
    retry = _Retry(retries, say)
    calls = [_Call(function, rollouts, state, timeout, retry) for function in functions]
    started = [call.start() for call in calls]  # async functions run while the others are called
    by_name = {
        metric_name(call.function): torch.tensor(call.finish(begun), dtype=torch.float64)
        for call, begun in zip(calls, started, strict=True)
    }
    rewards = torch.stack(list(by_name.values()))
    total = (rewards.nan_to_num(0.0) * torch.tensor(list(weights))[:, None].double()).sum(0)
    total = total.masked_fill(rewards.isnan().all(0), math.nan)
    logged: dict[str, list[float]] = {}
    extra: dict[str, list[Any]] = {}
    for call in calls:
        for name, values in call.log.metrics.items():
            logged.setdefault(name, []).extend(values)
        extra |= {name: as_json(values) for name, values in call.log.columns.items()}
    return Scores(total, by_name, logged, extra)


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of several rollouts as one, in the order of `merge`."""
    columns = dict.fromkeys(column for part in parts for column in part.extra)
    names = dict.fromkeys(name for part in parts for name in part.logged)
    return Scores(
        torch.cat([part.total for part in parts]),
        {name: torch.cat([part.by_name[name] for part in parts]) for name in parts[0].by_name},
        {name: [x for part in parts for x in part.logged.get(name, [])] for name in names},
        {
            column: [
                value
                for part in parts
                for value in part.extra.get(column, [None] * len(part.total))
            ]
            for column in columns
        },
    )


def reward_name(function: RewardFunction) -> str:
    """The name under which a reward function appears in errors, and mostly in metrics.

    A `functools.partial` goes by its function's name and the arguments that it fixes; an argument
    that is an object, by its type (its `repr` often has its address, another one in each process).
    """
    name = getattr(function, "name", None) or getattr(function, "__name__", None)
    if name is None and isinstance(function, functools.partial):
        fixed = [fingerprint.words(value) for value in function.args]
        fixed += [f"{key}={fingerprint.words(value)}" for key, value in function.keywords.items()]
        return f"{reward_name(function.func)}({', '.join(fixed)})"
    return str(name or type(function).__name__)


def metric_name(function: RewardFunction) -> str:
    """The last part of a reward function's metrics: its name, unless another metric has it."""
    name = reward_name(function)
    return f"{name}_reward" if name.removesuffix("_std") in _METRICS else name


def check_signature(function: RewardFunction, question: Question) -> None:
    """Raises TypeError for a reward function that cannot be called with a question's columns."""
    if fingerprint.is_ours(function):
        return
    names = ["completions", "completion_ids", "prompts", *question.columns]
    names += [name for name in _OPTIONAL if name not in names and _accepted(function, {name: None})]
    try:
        inspect.signature(function).bind(**dict.fromkeys(names))
    except ValueError:  # some builtins have no signature
        return
    except TypeError as error:
        raise TypeError(
            f"cppo.CPPOTrainer: reward function {reward_name(function)!r} is called with the "
            f"keyword arguments {', '.join(names)}, but it has another signature ({error}); it "
            "should end with **kwargs, and name only columns of the data set"
        ) from error


class _Log:
    """What a reward function logs while it runs."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.metrics: dict[str, list[float]] = {}
        self.columns: dict[str, list[Any]] = {}

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


class _Retry(NamedTuple):
    times: int
    say: Callable[[str], None]


class _Call:
    """One reward function on all completions of some rollouts."""

    def __init__(
        self,
        function: RewardFunction,
        rollouts: Rollouts,
        state: Any,
        timeout: float | None,
        retry: _Retry,
    ) -> None:
        self.name = reward_name(function)
        self._retry = retry
        self.log = log = _Log(len(rollouts.texts))
        self.function, self._rollouts, self._timeout = function, rollouts, timeout
        self._rows = range(len(rollouts.texts))
        self._extras = _accepted(
            function,
            {
                "trainer_state": state,
                "log_metric": log.log_metric,
                "log_extra": log.log_extra,
                "group_size": rollouts.group_size,
            },
        )
        self._wants_prefix = bool(_accepted(function, {"generation_prompts": None}))

    def start(self) -> Future[Any] | None:
        """Starts an async function; None for any other."""
        if not _is_async(self.function):
            return None

        async def run() -> Any:
            return await self._evaluate(self._rows)

        return asyncio.run_coroutine_threadsafe(run(), _event_loop())

    def finish(self, begun: Future[Any] | None) -> list[float]:
        """A number per completion, NaN for None."""
        for attempt in range(self._retry.times + 1):
            if attempt:
                self.log.clear()
                begun = self.start()
            try:
                return self._result(begun)
            except _TooLong as error:
                raise RewardError(
                    f"cppo: reward function {self.name!r} did not return within reward_timeout = "
                    f"{self._timeout:g} seconds for {len(self._rows)} completions"
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
            returned = self._evaluate_now(self._rows) if begun is None else begun.result()
            return self._numbers(returned)

        try:
            return _within(self._timeout, wait)
        except _TooLong:
            if begun is not None:
                begun.cancel()
            raise

    def _evaluate(self, rows: Sequence[int]) -> Any:
        rollouts = self._rollouts
        questions = [rollouts.question_of(row) for row in rows]
        names = sorted({name for question in questions for name in question.columns})
        if fingerprint.is_ours(self.function):
            names = [name for name in names if name not in _OUR_OPTIONS]
        pictures: dict[int, Any] = {}
        columns = {
            name: [_own(question.columns.get(name), pictures) for question in questions]
            for name in names
        }
        if self._wants_prefix:
            columns["generation_prompts"] = [rollouts.generation_prompt_of(row) for row in rows]
        extras = {**self._extras}
        if "trainer_state" in extras:
            extras["trainer_state"] = _own(extras["trainer_state"], pictures)
        return self.function(
            completions=[_completion(rollouts, row) for row in rows],
            completion_ids=[list(rollouts.completion_ids[row]) for row in rows],
            prompts=[_own(_prompt(question), pictures) for question in questions],
            **{**columns, **extras},
        )

    def _evaluate_now(self, rows: Sequence[int]) -> Any:
        returned = self._evaluate(rows)
        if not inspect.isawaitable(returned):
            return returned
        return asyncio.run_coroutine_threadsafe(_awaited(returned), _event_loop()).result()

    def _numbers(self, returned: Any) -> list[float]:
        if not _is_list(returned):
            raise RewardError(
                f"cppo: reward function {self.name!r} must return a list of one number "
                f"per completion, got {type(returned).__name__}"
            )
        values = list(returned)
        if len(values) != len(self._rows):
            raise RewardError(
                f"cppo: reward function {self.name!r} must return one number per "
                f"completion = {len(self._rows)}, got {len(values)}"
            )
        numbers: list[float] = []
        for row, value in zip(self._rows, values, strict=True):
            if isinstance(value, _TEXT):  # float() reads even '1_0'
                raise RewardError(self._describe(row, f"returned {value!r}, which is no number"))
            try:
                number = math.nan if value is None else float(value)
            except _RAISED as error:
                raise RewardError(self._describe(row, error)) from error
            if value is not None and not abs(number) <= _LARGEST_REWARD:
                words = f"returned {number}, no finite number up to {_LARGEST_REWARD:g}"
                raise RewardError(self._describe(row, words))
            numbers.append(number)
        return numbers

    def _culprit(self) -> int | None:
        """A row on which the function raises by itself, if halving finds one in time."""
        started, rows, is_found = time.monotonic(), list(self._rows), False
        while len(rows) > 1:
            half = len(rows) // 2
            for part in (rows[:half], rows[half:]):
                if time.monotonic() - started > _SEARCH_SECONDS:
                    return None
                if self._fails(part):
                    rows, is_found = part, True
                    break
            else:
                return None
        return rows[0] if rows and (is_found or self._fails(rows)) else None

    def _fails(self, rows: Sequence[int]) -> bool:
        try:
            _within(
                min(self._timeout or _SEARCH_SECONDS, _SEARCH_SECONDS),
                lambda: _read(self._evaluate_now(rows)),
            )
        except (*_RAISED, _TooLong):
            return True
        return False

    def _describe(self, row: int | None, what: object) -> str:
        cause = f"{type(what).__name__}: {what}" if isinstance(what, BaseException) else str(what)
        head = f"cppo: reward function {self.name!r} failed ({cause})"
        if row is None:
            return head + " on the whole batch; no completion was found that fails by itself"
        question = self._rollouts.question_of(row)
        place = "" if question.row is None else f" of row {question.row}"
        return (
            f"{head}\n  question{place}: {question.messages!r}\n  answer: "
            f"{question.columns.get('answer')!r}\n  completion: {self._rollouts.texts[row]!r}"
        )


def _is_list(returned: Any) -> bool:
    """Whether it may hold rewards: the keys of a dict are none, a set has no order."""
    return isinstance(returned, Iterable) and not isinstance(returned, (*_TEXT, Mapping, Set))


def _read(returned: Any) -> None:
    """Computes what a generator has left to compute."""
    if _is_list(returned):
        list(returned)


def _completion(rollouts: Rollouts, row: int) -> Any:
    text = rollouts.texts[row]
    if rollouts.question_of(row).is_conversational:
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


def _accepted(function: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function names, or all if it takes any."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins have none
        return {}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


# Running with a time limit, and asynchronously


def _is_async(function: RewardFunction) -> bool:
    call = getattr(function, "__call__", None)  # noqa: B004  (an object whose call is async)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


async def _awaited(value: Awaitable[_T]) -> _T:
    return await value


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the whole run: the clients that reward functions keep belong to it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=_run_on, args=(loop,), name="cppo rewards", daemon=True).start()
    return loop


def _run_on(loop: asyncio.AbstractEventLoop) -> None:
    """Runs the loop though a function exits: its caller, who waits for it, gets the same error."""
    while True:
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            continue


class _TooLong(BaseException):
    """The time limit is over. No Exception, which a reward function may well catch."""


def _within(seconds: float | None, call: Callable[[], _T]) -> _T:
    """What `call` returns. Raises _TooLong if that takes longer."""
    if seconds is None:
        return call()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and hasattr(signal, "setitimer"):
        return _within_by_signal(seconds, call)
    return _within_by_thread(seconds, call)


def _within_by_signal(seconds: float, call: Callable[[], _T]) -> _T:
    """Interrupts also a regular expression without an end, which no other thread can."""

    def stop(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _within_by_thread(seconds: float, call: Callable[[], _T]) -> _T:
    """Leaves the thread behind when the time is over: it cannot be stopped."""
    done: Future[_T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError as error:
        if done.done():
            raise  # the function's own
        raise _TooLong from error
