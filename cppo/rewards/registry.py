"""Rewards by name: what configurations can name, and sums of several under one name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cppo.options.places import is_place, load_object
from cppo.options.registry import build, check_parameters, name_and_parameters, require_entries
from cppo.options.values import is_finite_number, unknown
from cppo.rewards.checks import require
from cppo.rewards.functions import (
    ACCURACIES,
    boxed,
    math_verify,
    tag_count,
    think_answer_format,
    think_boxed_format,
    think_format,
)
from cppo.rewards.judging import Rewards
from cppo.rewards.lengths import CosineLength, Length, Overlong, RepetitionPenalty
from cppo.rewards.symbolic import require_math_verify

RewardFunction = Callable[..., Sequence[float | None]]

VIRL39K = {"accuracy": 0.9, "format": 0.1}
GSM8K = {"gsm8k": 1.0, "think_answer_format": 1.0}
MATH = {"math_verify": 2.0, "think_answer_format": 1.0}

_FUNCTIONS: dict[str, RewardFunction] = {
    **ACCURACIES,
    "think_format": think_format,
    "think_answer_format": think_answer_format,
    "think_boxed_format": think_boxed_format,
    "tag_count": tag_count,
    "accuracy": boxed,
    "format": think_boxed_format,
}
_CLASSES: dict[str, Any] = {
    kind.name: kind for kind in (Length, CosineLength, RepetitionPenalty, Overlong)
}
_PASSED = ("completions", "answer", "precision", "generation_prompts", "columns")  # by the trainer


@dataclasses.dataclass(frozen=True)
class Combined:
    """A weighted sum of reward functions under one name.

    A part that does not apply to a completion (None) is left out of its sum; where no part applies,
    the sum does not either.
    """

    name: str
    functions: tuple[RewardFunction, ...]
    weights: tuple[float, ...]

    def __call__(self, completions: Any, **columns: Any) -> Rewards:
        total: Rewards = [None] * len(completions)
        for function, weight in zip(self.functions, self.weights, strict=True):
            for place, reward in enumerate(function(completions, **columns)):
                if reward is not None:
                    total[place] = (total[place] or 0.0) + weight * reward
        return total


Combined.__module__ = "cppo.rewards"  # its public place, by which a run's files name it


def _of_paper(name: str, weights: Mapping[str, float]) -> Combined:
    """A combination that exists whether or not the packages of its parts are installed."""
    functions = tuple(_FUNCTIONS[part] for part in weights)
    return Combined(name, functions, tuple(weights.values()))


perception_reward = _of_paper("perception_reward", VIRL39K)
gsm8k_reward = _of_paper("gsm8k_reward", GSM8K)
math_reward = _of_paper("math_reward", MATH)
for _combination in (perception_reward, gsm8k_reward, math_reward):
    _FUNCTIONS[_combination.name] = _combination
NAMES = (*_FUNCTIONS, *_CLASSES)


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
        _check_weight("combine", key, weight)
    functions = tuple(_reward(key, None) for key in weights)
    return Combined(name or "+".join(weights), functions, tuple(map(float, weights.values())))


def from_names(entries: Sequence[Any]) -> tuple[list[RewardFunction], list[float]]:
    """Return the reward functions and weights that configuration entries name.

    Args:
        entries: each a name of `NAMES` ("boxed"); a mapping of a name to its parameters and,
            optionally, a weight ({"boxed": {"unfinished_thought": -1}, "weight": 0.5}); the place
            of a function of one's own ("my_reward.py:function", relative to the working
            directory, or "package.module:function", see `cppo.options.places`); or a function.
    Returns: (functions, weights), one each per entry, in order; a weight left out is 1.
    Raises: TypeError or ValueError naming the entry, for an unknown name or parameter (with a
        suggestion), a function that cannot be imported and a weight that is not a finite number;
        ImportError for `math_verify`, and what is made of it, without its package.
    """
    require_entries("cppo.rewards.from_names", "reward", entries)
    functions, weights = zip(*map(_from_entry, entries), strict=True)
    return list(functions), list(weights)


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
    if callable(entry):
        return entry, 1.0
    name, parameters = name_and_parameters("cppo.rewards.from_names", entry, "weight")
    weight = entry.get("weight", 1.0) if isinstance(entry, Mapping) else 1.0
    _check_weight("from_names", name, weight)
    return _reward(name, parameters), float(weight)


def _check_weight(where: str, name: Any, weight: Any) -> None:
    check = (is_finite_number(weight), "a finite number", weight)
    require(where, **{f"weight of {name!r}": check})


def _reward(name: Any, parameters: Any) -> RewardFunction:
    """The reward of a name or a place, with some of its options set."""
    if name in _CLASSES:
        return build("cppo.rewards", _CLASSES[name], name, parameters)
    if name not in _FUNCTIONS and not is_place(name):
        raise ValueError(f"cppo.rewards: {unknown('reward', name, NAMES)}")
    function = _FUNCTIONS[name] if name in _FUNCTIONS else _import(name)
    options: list[str] = []
    if name in _FUNCTIONS and not isinstance(function, Combined):
        options = [key for key in inspect.signature(function).parameters if key not in _PASSED]
    values = check_parameters("cppo.rewards", name, parameters, options)
    if function is math_verify or math_verify in getattr(function, "functions", ()):
        require_math_verify("math_verify")
    if not values:
        return function
    bound = functools.update_wrapper(functools.partial(function, **values), function)
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
