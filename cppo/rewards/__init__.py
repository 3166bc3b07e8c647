r"""Rewards of completions: the answers' correctness, their format and their length.

A reward function is called as TRL calls it, `fn(completions, *, prompts, **columns)`, every column
a list with one entry per completion, and returns one number per completion (None: does not apply).
Those here accept strings or TRL's messages as completions, read the ground truth from the
column `answer`, never raise on what a completion says, and raise ValueError naming the completion,
by its place in the call, for a ground truth that cannot be read: rewarding such a row would train
on nothing. What they share, and how an answer is found, says `cppo.rewards.functions`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cppo.places import is_place, load_object
from cppo.rewards.checks import is_real, require
from cppo.rewards.completions import completion_text
from cppo.rewards.functions import (
    ACCURACIES,
    boxed,
    check_ground_truth,
    exact_match,
    gsm8k,
    math_verify,
    numeric,
    tag_count,
    think_answer_format,
    think_boxed_format,
    think_format,
)
from cppo.rewards.judging import Rewards
from cppo.rewards.lengths import (
    CosineLength,
    Length,
    Overlong,
    RepetitionPenalty,
)
from cppo.rewards.symbolic import require_math_verify

__all__ = [
    "ACCURACIES",
    "GSM8K",
    "MATH",
    "NAMES",
    "Combined",
    "CosineLength",
    "Length",
    "Overlong",
    "RepetitionPenalty",
    "VIRL39K",
    "answer_rewards",
    "boxed",
    "check_ground_truth",
    "combine",
    "completion_text",
    "exact_match",
    "from_names",
    "gsm8k",
    "gsm8k_reward",
    "math_reward",
    "math_verify",
    "numeric",
    "perception_reward",
    "tag_count",
    "think_answer_format",
    "think_boxed_format",
    "think_format",
]

RewardFunction = Callable[..., Sequence[float | None]]

_FUNCTIONS: dict[str, RewardFunction] = {
    **ACCURACIES,
    "think_format": think_format,
    "think_answer_format": think_answer_format,
    "think_boxed_format": think_boxed_format,
    "tag_count": tag_count,
    "accuracy": boxed,
    "format": think_boxed_format,
}
_PASSED = ("completions", "answer", "generation_prompts", "columns")  # by the trainer
_CLASSES: dict[str, Any] = {
    kind.name: kind for kind in (Length, CosineLength, RepetitionPenalty, Overlong)
}


@dataclasses.dataclass(frozen=True)
class Combined:
    """A weighted sum of reward functions under one name.

    A part that does not apply to a row (None) is left out of its sum; where no part applies, the
    sum does not either.
    """

    name: str
    functions: tuple[RewardFunction, ...]
    weights: tuple[float, ...]

    def __call__(self, completions: Any, **columns: Any) -> Rewards:
        total: Rewards = [None] * len(completions)
        for function, weight in zip(self.functions, self.weights, strict=True):
            for row, reward in enumerate(function(completions, **columns)):
                if reward is not None:
                    total[row] = (total[row] or 0.0) + weight * reward
        return total


def combine(weights: Mapping[str, float], *, name: str | None = None) -> Combined:
    r"""Return the weighted sum of named rewards as one reward function.

    Args:
        weights: {name: weight}; "accuracy" stands for `boxed`, "format" for `think_boxed_format`.
        name: its metric name; the terms joined by "+" if left out.
    Returns: a reward function.
    Raises: ValueError for no terms, an unknown name or a weight that is not a finite number;
        ImportError for "math_verify" without its package.
    """
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"cppo.rewards.combine: weights must be {{name: weight}}, got {weights!r}")
    for key, weight in weights.items():
        require("combine", **{f"weight of {key!r}": (is_real(weight), "a finite number", weight)})
    functions = tuple(_build(key, None) for key in weights)
    return Combined(name or "+".join(weights), functions, tuple(map(float, weights.values())))


def from_names(entries: Sequence[Any]) -> tuple[list[RewardFunction], list[float]]:
    """Return the reward functions and weights that configuration entries name.

    Args:
        entries: each a name of `NAMES` ("boxed"); a mapping of a name to its parameters and,
            optionally, a weight ({"boxed": {"unfinished_thought": -1}, "weight": 0.5}); the place
            of a function of one's own ("my_reward.py:function", relative to the working
            directory, or "package.module:function", see `cppo.places`); or a function.
    Returns: (functions, weights), one each per entry, in order; a weight left out is 1.
    Raises: TypeError or ValueError naming the entry, for an unknown name or parameter (with a
        suggestion), a function that cannot be imported and a weight that is not a finite number;
        ImportError for `math_verify`, and what is made of it, without its package.
    """
    if isinstance(entries, (str, Mapping)) or not isinstance(entries, Sequence):
        raise TypeError(f"cppo.rewards.from_names: entries must be a list, got {entries!r}")
    if not entries:
        raise ValueError("cppo.rewards.from_names: entries must name at least one reward")
    functions, weights = [], []
    for entry in entries:
        function, weight = _from_entry(entry)
        functions.append(function)
        weights.append(weight)
    return functions, weights


def answer_rewards(functions: Sequence[Any]) -> list[RewardFunction]:
    """Return those of reward functions, and of their parts, that ship here and compare answers."""
    found: list[RewardFunction] = []
    for function in functions:
        accuracy = getattr(function, "accuracy", None)
        function = getattr(function, "func", function)  # of a functools.partial
        if isinstance(function, Combined):
            found += answer_rewards(function.functions)
        elif isinstance(function, tuple(_CLASSES.values())) and accuracy is not None:
            found.append(ACCURACIES[accuracy])
        elif function in ACCURACIES.values():
            found.append(function)
    return list(dict.fromkeys(found))


def _from_entry(entry: Any) -> tuple[RewardFunction, float]:
    if isinstance(entry, str):
        return _build(entry, None), 1.0
    if callable(entry):
        return entry, 1.0
    names = [key for key in entry if key != "weight"] if isinstance(entry, Mapping) else []
    if len(names) != 1:
        raise TypeError(
            "cppo.rewards.from_names: an entry is a name or "
            f"{{name: parameters, 'weight': number}}, got {entry!r}"
        )
    weight = entry.get("weight", 1.0)
    require(
        "from_names", **{f"weight of {names[0]!r}": (is_real(weight), "a finite number", weight)}
    )
    return _build(names[0], entry[names[0]]), float(weight)


def _build(name: Any, parameters: Any) -> RewardFunction:
    if not isinstance(parameters, (Mapping, type(None))):
        raise TypeError(
            f"cppo.rewards: the parameters of {name!r} must be a mapping, got {parameters!r}"
        )
    if name in _CLASSES:
        allowed = [field.name for field in dataclasses.fields(_CLASSES[name])]
        values = {}
        for key, value in (parameters or {}).items():
            if key not in allowed:
                raise ValueError(_unknown(f"parameter of {name!r}", key, allowed))
            values[key] = tuple(value) if isinstance(value, list) else value
        return _CLASSES[name](**values)
    if name not in _FUNCTIONS and not is_place(name):
        raise ValueError(_unknown("reward", name, NAMES))
    function = _FUNCTIONS[name] if name in _FUNCTIONS else _import(name)
    if function is math_verify or math_verify in getattr(function, "functions", ()):
        require_math_verify("math_verify")
    return _with_parameters(name, function, parameters) if parameters else function


def _with_parameters(
    name: str, function: RewardFunction, parameters: Mapping[str, Any]
) -> RewardFunction:
    """The function with some of its options set, under its own name."""
    if name not in _FUNCTIONS or isinstance(function, Combined):
        allowed = []
    else:
        allowed = [key for key in inspect.signature(function).parameters if key not in _PASSED]
    if not allowed:
        raise ValueError(f"cppo.rewards: {name!r} takes no parameters, got {dict(parameters)!r}")
    for key in parameters:
        if key not in allowed:
            raise ValueError(_unknown(f"parameter of {name!r}", key, allowed))
    bound = functools.update_wrapper(functools.partial(function, **parameters), function)
    bound([], prompts=[], answer=[])  # which checks the values
    return bound


def _import(place: str) -> RewardFunction:
    try:
        function = load_object(place, "reward")
    except (ValueError, TypeError) as error:
        raise type(error)(f"cppo.rewards: {error}") from error
    if isinstance(function, type):
        raise TypeError(
            f"cppo.rewards: the reward {place!r} must be a function, or an object that can be "
            f"called, got the class {function.__name__}: name an instance of it"
        )
    return function


def _unknown(what: str, name: Any, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), allowed, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"cppo.rewards: unknown {what} {name!r}{hint} (allowed: {', '.join(allowed)})"


def _of_paper(name: str, weights: Mapping[str, float]) -> Combined:
    """A combination that is there whether or not the packages of its parts are."""
    functions = tuple(_FUNCTIONS[part] for part in weights)
    return Combined(name, functions, tuple(weights.values()))


VIRL39K = {"accuracy": 0.9, "format": 0.1}
GSM8K = {"gsm8k": 1.0, "think_answer_format": 1.0}
MATH = {"math_verify": 2.0, "think_answer_format": 1.0}
perception_reward = _of_paper("perception_reward", VIRL39K)
gsm8k_reward = _of_paper("gsm8k_reward", GSM8K)
math_reward = _of_paper("math_reward", MATH)
for _combination in (perception_reward, gsm8k_reward, math_reward):
    _FUNCTIONS[_combination.name] = _combination
NAMES = (*_FUNCTIONS, *_CLASSES)
