"""Rewards for the length of a completion and for not repeating itself; see `cppo.rewards`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from cppo.rewards.functions import ACCURACIES, texts_of


def _lengths(name: str, unit: str, completions: Any, columns: Mapping[str, Any]) -> list[int]:
    if unit == "characters":
        return [len(text) for text in texts_of(completions)]
    ids = columns.get("completion_ids")
    if ids is None:
        raise ValueError(
            f"cppo.rewards.{name}: unit 'tokens' needs `completion_ids` from the trainer; "
            "without them use unit 'characters'"
        )
    return [len(row) for row in ids]


def require(name: str, **checks: tuple[bool, str, Any]) -> None:
    for field, (holds, expected, value) in checks.items():
        if not holds:
            raise ValueError(f"cppo.rewards.{name}: {field} must be {expected}, got {value!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_real(*values: Any) -> bool:
    return all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )


def _check_length_options(name: str, unit: Any, accuracy: Any = "boxed") -> None:
    require(
        name,
        unit=(unit in ("characters", "tokens"), "'characters' or 'tokens'", unit),
        accuracy=(accuracy in ACCURACIES, f"one of {', '.join(ACCURACIES)}", accuracy),
    )


@dataclasses.dataclass(frozen=True)
class Length:
    """Short among the completions of its question: +-0.5 when right, at most 0 when wrong.

    Specification: Kimi k1.5 (arXiv 2501.12599): `s = 0.5 - (length - min) / (max - min)` over the
    completions of a question (contiguous rows of equal prompt and answer); right: s, wrong:
    min(0, s); 0 where all are equally long.
    Fields: accuracy (the reward that says what is right, if above 0), unit (characters | tokens).
    """

    name: ClassVar[str] = "length"
    accuracy: str = "boxed"
    unit: str = "characters"

    def __post_init__(self) -> None:
        _check_length_options(self.name, self.unit, self.accuracy)

    def __call__(self, completions: Any, *, prompts: Any = None, **columns: Any) -> list[float]:
        right = ACCURACIES[self.accuracy](completions, **columns)
        lengths = _lengths(self.name, self.unit, completions, columns)
        rewards: list[float] = []
        for start, stop in _questions(len(lengths), prompts, columns.get("answer")):
            short, long = min(lengths[start:stop]), max(lengths[start:stop])
            for row in range(start, stop):
                if short == long:
                    rewards.append(0.0)
                    continue
                score = 0.5 - (lengths[row] - short) / (long - short)
                rewards.append(score if right[row] > 0 else min(0.0, score))
        return rewards


def _questions(count: int, prompts: Any, answer: Any) -> list[tuple[int, int]]:
    """(start, stop) of each run of rows with one prompt and one ground truth."""
    changes = [
        row
        for row in range(1, count)
        if (prompts is not None and prompts[row] != prompts[row - 1])
        or (answer is not None and answer[row] != answer[row - 1])
    ]
    edges = [0, *changes, count] if count else []
    return list(zip(edges, edges[1:], strict=False))


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
            key: isinstance(pair, tuple) and len(pair) == 2 and is_real(*pair)
            for key, pair in pairs.items()
        }
        require(
            self.name,
            max_length=(_is_count(self.max_length), "a whole number >= 1", self.max_length),
            correct=(good["correct"], "(at length 0, at max_length)", self.correct),
            wrong=(good["wrong"], "(at length 0, at max_length)", self.wrong),
        )

    def __call__(self, completions: Any, **columns: Any) -> list[float]:
        right = ACCURACIES[self.accuracy](completions, **columns)
        rewards = []
        lengths = _lengths(self.name, self.unit, completions, columns)
        for is_right, length in zip(right, lengths, strict=True):
            start, end = self.correct if is_right > 0 else self.wrong
            share = (1 + math.cos(math.pi * min(length / self.max_length, 1.0))) / 2
            rewards.append(end + (start - end) * share)
        return rewards


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """`max_penalty` times the share of word n-grams that occurred before in the completion.

    Specification: arXiv 2502.03373, appendix C.2: `max_penalty (1 - distinct / all)`.
    Fields: ngram_size (words, >= 1), max_penalty (<= 0).
    """

    name: ClassVar[str] = "repetition_penalty"
    ngram_size: int = 3
    max_penalty: float = -1.0

    def __post_init__(self) -> None:
        good = is_real(self.max_penalty) and self.max_penalty <= 0
        require(
            self.name,
            ngram_size=(_is_count(self.ngram_size), "a whole number >= 1", self.ngram_size),
            max_penalty=(good, "a number <= 0", self.max_penalty),
        )

    def __call__(self, completions: Any, **columns: Any) -> list[float]:
        rewards = []
        for text in texts_of(completions):
            words = text.lower().split()
            count = len(words) - self.ngram_size + 1
            ngrams = {tuple(words[i : i + self.ngram_size]) for i in range(max(0, count))}
            repeated = 1 - len(ngrams) / count if count > 0 else 0.0
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
        good = _is_count(self.buffer) and _is_count(self.max_length)
        require(
            self.name,
            max_length=(_is_count(self.max_length), "a whole number >= 1", self.max_length),
            buffer=(good and self.buffer <= self.max_length, "in 1 ... max_length", self.buffer),
        )

    def __call__(self, completions: Any, **columns: Any) -> list[float]:
        allowed = self.max_length - self.buffer
        lengths = _lengths(self.name, self.unit, completions, columns)
        return [-min(1.0, max(0.0, (length - allowed) / self.buffer)) + 0.0 for length in lengths]
