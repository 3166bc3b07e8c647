"""Rewards for the length of a completion and for not repeating itself; see `cppo.rewards`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from cppo.options.values import is_finite_number
from cppo.rewards.checks import is_count, require
from cppo.rewards.completions import completion_text
from cppo.rewards.functions import ACCURACIES, math_verify
from cppo.rewards.symbolic import require_math_verify

UNITS = ("characters", "tokens")


def _pieces(name: str, unit: str, completions: Any, columns: Mapping[str, Any]) -> list[Any]:
    """Each completion as the sequence of its characters or of its token ids."""
    if unit == "characters":
        return [completion_text(completion) for completion in completions]
    ids = columns.get("completion_ids")
    if ids is None:
        raise ValueError(
            f"cppo.rewards.{name}: unit 'tokens' needs `completion_ids` from the trainer; "
            "without them use unit 'characters'"
        )
    return list(ids)


def _lengths(name: str, unit: str, completions: Any, columns: Mapping[str, Any]) -> list[int]:
    return [len(pieces) for pieces in _pieces(name, unit, completions, columns)]


def _check_length_options(name: str, unit: Any, accuracy: Any = "boxed") -> None:
    require(
        name,
        unit=(unit in UNITS, "'characters' or 'tokens'", unit),
        accuracy=(accuracy in ACCURACIES, f"one of {', '.join(ACCURACIES)}", accuracy),
    )
    if ACCURACIES[accuracy] is math_verify:
        require_math_verify(name)


@dataclasses.dataclass(frozen=True)
class Length:
    """Short among the completions of its question: +-0.5 when right, at most 0 when wrong.

    Specification: Kimi k1.5 (arXiv 2501.12599): `s = 0.5 - (length - min) / (max - min)` over the
    completions of a question; right: s, wrong: min(0, s); 0 where all are equally long. A
    question's completions are `group_size` neighbouring rows, which the trainer says; in TRL, which
    does not, set the field to its `num_generations`.
    Fields: accuracy (the reward that says what is right, if above 0), unit (characters | tokens),
        group_size (completions per question, where the trainer does not pass `group_size`).
    """

    name: ClassVar[str] = "length"
    accuracy: str = "boxed"
    unit: str = "characters"
    group_size: int | None = None

    def __post_init__(self) -> None:
        _check_length_options(self.name, self.unit, self.accuracy)
        good = self.group_size is None or is_count(self.group_size)
        require(self.name, group_size=(good, "a whole number >= 1, or None", self.group_size))

    def __call__(
        self, completions: Any, *, group_size: int | None = None, **columns: Any
    ) -> list[Any]:
        right = ACCURACIES[self.accuracy](completions, **columns)
        lengths = _lengths(self.name, self.unit, completions, columns)
        size = self._group_size(group_size, len(lengths))
        rewards: list[Any] = []  # None where the accuracy has none
        for start in range(0, len(lengths), size):
            group = lengths[start : start + size]
            short, long = min(group), max(group)
            for length, is_right in zip(group, right[start:], strict=False):
                score = 0.5 - (length - short) / (long - short) if short < long else 0.0
                is_known = is_right is not None
                rewards.append((score if is_right > 0 else min(0.0, score)) if is_known else None)
        return rewards

    def _group_size(self, given: int | None, rows: int) -> int:
        size = self.group_size if given is None else given
        if size is None:
            raise ValueError(
                "cppo.rewards.length: needs to know which rows are one question's: `group_size` "
                "from the trainer, or the field Length(group_size=...), TRL's num_generations"
            )
        require(self.name, group_size=(is_count(size), "a whole number >= 1", size))
        if rows % size:
            raise ValueError(
                f"cppo.rewards.length: rows must be a multiple of group_size = {size}, got {rows}"
            )
        return size


@dataclasses.dataclass(frozen=True)
class CosineLength:
    """Right answers earn more the shorter, wrong ones lose less the longer, along half a cosine.

    Specification: arXiv 2502.03373: `end + (start - end) (1 + cos(pi x)) / 2` with
    `x = min(length / max_length, 1)`; `correct` and `wrong` are (start, end): the value at length 0
    and that at max_length.
    Fields: max_length (in `unit`), correct, wrong, accuracy, unit (characters | tokens).
    """

    name: ClassVar[str] = "cosine_length"
    max_length: int = 1000
    correct: tuple[float, float] = (1.0, 0.5)
    wrong: tuple[float, float] = (-1.0, -0.5)
    accuracy: str = "boxed"
    unit: str = "characters"

    def __post_init__(self) -> None:
        _check_length_options(self.name, self.unit, self.accuracy)
        pairs = {"correct": self.correct, "wrong": self.wrong}
        good = {
            key: isinstance(pair, tuple) and len(pair) == 2 and all(map(is_finite_number, pair))
            for key, pair in pairs.items()
        }
        require(
            self.name,
            max_length=(is_count(self.max_length), "a whole number >= 1", self.max_length),
            correct=(good["correct"], "(at length 0, at max_length)", self.correct),
            wrong=(good["wrong"], "(at length 0, at max_length)", self.wrong),
        )

    def __call__(self, completions: Any, **columns: Any) -> list[Any]:
        right = ACCURACIES[self.accuracy](completions, **columns)
        rewards = []
        lengths = _lengths(self.name, self.unit, completions, columns)
        for is_right, length in zip(right, lengths, strict=True):
            start, end = self.correct if is_right and is_right > 0 else self.wrong
            share = (1 + math.cos(math.pi * min(length / self.max_length, 1.0))) / 2
            rewards.append(None if is_right is None else end + (start - end) * share)
        return rewards


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """`max_penalty` times the share of n-grams that occurred before in the completion.

    Specification: arXiv 2502.03373, appendix C.2: `max_penalty (1 - distinct / all)`. The n-grams
    are of tokens, because white space is no bound of words in every language; they need
    `completion_ids`, which cppo's trainer and TRL pass.
    Fields: ngram_size (in `unit`, >= 1), max_penalty (<= 0), unit (tokens | characters).
    """

    name: ClassVar[str] = "repetition_penalty"
    ngram_size: int = 3
    max_penalty: float = -1.0
    unit: str = "tokens"

    def __post_init__(self) -> None:
        _check_length_options(self.name, self.unit)
        good = is_finite_number(self.max_penalty) and self.max_penalty <= 0
        require(
            self.name,
            ngram_size=(is_count(self.ngram_size), "a whole number >= 1", self.ngram_size),
            max_penalty=(good, "a number <= 0", self.max_penalty),
        )

    def __call__(self, completions: Any, **columns: Any) -> list[float]:
        rewards = []
        for pieces in _pieces(self.name, self.unit, completions, columns):
            pieces = pieces.tolist() if hasattr(pieces, "tolist") else pieces
            size = min(self.ngram_size, len(pieces) + 1)  # one more than there are: no n-gram
            ngrams = list(zip(*(pieces[i:] for i in range(size)), strict=False))
            repeated = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
            rewards.append(self.max_penalty * repeated if repeated else 0.0)
        return rewards


@dataclasses.dataclass(frozen=True)
class Overlong:
    """0 up to `max_length - buffer`, falling linearly to -1 at `max_length`, -1 beyond.

    Specification: DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13).
    Fields: max_length, buffer (1 ... max_length), unit (tokens | characters).
    """

    name: ClassVar[str] = "overlong"
    max_length: int = 1024
    buffer: int = 256
    unit: str = "tokens"

    def __post_init__(self) -> None:
        _check_length_options(self.name, self.unit)
        good = is_count(self.buffer) and is_count(self.max_length)
        require(
            self.name,
            max_length=(is_count(self.max_length), "a whole number >= 1", self.max_length),
            buffer=(good and self.buffer <= self.max_length, "in 1 ... max_length", self.buffer),
        )

    def __call__(self, completions: Any, **columns: Any) -> list[float]:
        allowed = self.max_length - self.buffer
        lengths = _lengths(self.name, self.unit, completions, columns)
        return [-min(1.0, max(0.0, (length - allowed) / self.buffer)) + 0.0 for length in lengths]
