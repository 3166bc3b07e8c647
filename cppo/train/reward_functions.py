"""What a reward function is: its name in errors and metrics, and the arguments that it takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from cppo.questions import Question
from cppo.train import fingerprint

RewardFunction = Callable[..., Any]
# Names beside those of the reward functions in `reward/...` and `eval/sampled/...`.
_METRICS = ("mean", "std", "zero_variance_share", "scored_share", "reward", "tokens")
# Only a function that names these arguments, or takes `**kwargs`, gets them.
_OPTIONAL = ("trainer_state", "log_metric", "log_extra", "generation_prompts", "group_size")


class RewardError(RuntimeError):
    """A reward function raised, took too long, or returned something else than numbers."""


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
    names += [name for name in _OPTIONAL if name not in names and accepted(function, {name: None})]
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


def accepted(function: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function names, or all if it takes any."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins have none
        return {}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def is_async(function: RewardFunction) -> bool:
    """Whether calling the function returns a coroutine."""
    call = getattr(function, "__call__", None)  # noqa: B004  (an object whose call is async)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
