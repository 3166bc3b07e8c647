"""Rewards for what a completion says: correctness of its answer and format; see `cppo.rewards`."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cppo.rewards.answers import (
    final_answer,
    find_number,
    last_boxed,
    last_tagged,
    read_number,
    same_answer,
    same_number,
)


def completion_text(completion: Any) -> str:
    """Return the text of a completion: a string, or the last of TRL's messages.

    Raises: TypeError for anything else.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and completion and isinstance(completion[-1], Mapping):
        content = completion[-1].get("content")
        if content is None or isinstance(content, str):
            return content or ""
        if isinstance(content, Sequence):
            return "".join(str(part.get("text") or "") for part in content)
    raise TypeError(
        "cppo.rewards: a completion must be a string or a list of messages "
        f"({{'role', 'content'}}), got {completion!r:.200}"
    )


def texts_of(completions: Iterable[Any]) -> list[str]:
    return [completion_text(completion) for completion in completions]


def _pairs(name: str, completions: Any, answer: Any) -> list[tuple[str, str]]:
    """Each completion's text with its ground truth as a string."""
    texts = texts_of(completions)
    if answer is None or isinstance(answer, str):
        raise ValueError(
            f"cppo.rewards.{name}: needs the column 'answer', one entry per completion, "
            f"got {answer!r}"
        )
    if len(answer) != len(texts):
        raise ValueError(
            f"cppo.rewards.{name}: answer must have one entry per completion = {len(texts)}, "
            f"got {len(answer)}"
        )
    golds = []
    for row, gold in enumerate(answer):
        if gold is None or not str(gold).strip():
            raise ValueError(f"cppo.rewards.{name}: row {row} has no ground truth, got {gold!r}")
        golds.append(str(gold).strip())
    return list(zip(texts, golds, strict=True))


def _unreadable(name: str, row: int, gold: str, expected: str) -> ValueError:
    return ValueError(
        f"cppo.rewards.{name}: row {row}: ground truth must be {expected}, got {gold!r}"
    )


def _gold_number(name: str, row: int, gold: str) -> float:
    value = read_number(final_answer(gold))
    if value is None:
        raise _unreadable(name, row, gold, "a number")
    return value


def exact_match(completions: Any, *, answer: Any = None, **columns: Any) -> list[float]:
    r"""1 where the answer part of the completion is the ground truth, up to white space.

    Args:
        completions: strings or messages; the answer part is the last `<answer>` tag, else the last
            `\boxed{}`, else what follows `####` or `</think>`.
        answer: ground truths.
    Returns: 0.0 or 1.0 per completion.
    Raises: ValueError naming a row without ground truth.
    """
    pairs = _pairs("exact_match", completions, answer)
    return [float(final_answer(text).split() == final_answer(gold).split()) for text, gold in pairs]


def numeric(completions: Any, *, answer: Any = None, **columns: Any) -> list[float]:
    """1 where the completion's number equals the ground truth within 1e-6.

    Args:
        completions: strings or messages; their number is the answer part read as a number or
            fraction, else the last number; thousands separators, `$` and `%` are read over.
        answer: ground truths, one number each ("#### 42" counts as 42).
    Returns: 0.0 or 1.0 per completion.
    Raises: ValueError naming a row whose ground truth is not a number.
    """
    pairs = _pairs("numeric", completions, answer)
    golds = [_gold_number("numeric", row, gold) for row, (_, gold) in enumerate(pairs)]
    return [
        float(same_number(find_number(text), gold))
        for (text, _), gold in zip(pairs, golds, strict=True)
    ]


def boxed(completions: Any, *, answer: Any = None, **columns: Any) -> list[float]:
    r"""1 where the last `\boxed{}` holds the ground truth, in spelling or in value.

    Args:
        completions: strings or messages.
        answer: ground truths, bare or in a `\boxed{}` of their own.
    Returns: 0.0 or 1.0 per completion; no closed box is 0.
    Raises: ValueError naming a row without ground truth.
    """
    rewards = []
    for row, (text, gold) in enumerate(_pairs("boxed", completions, answer)):
        truth = last_boxed(gold) if "\\boxed" in gold else gold
        if truth is None or not truth.strip():
            raise _unreadable("boxed", row, gold, "an answer, bare or in a closed \\boxed{}")
        found = last_boxed(text)
        rewards.append(float(found is not None and same_answer(found, truth)))
    return rewards


def math_verify(completions: Any, *, answer: Any = None, **columns: Any) -> list[float]:
    r"""1 where math-verify finds the completion's answer equivalent to the ground truth.

    Args:
        completions: strings or messages; a `\boxed{}` is looked at first.
        answer: ground truths in LaTeX, bare, in `$...$` or in `\boxed{}`.
    Returns: 0.0 or 1.0 per completion.
    Raises: ImportError without the package math-verify (`pip install "cppo[math]"`); ValueError
        naming a row whose ground truth cannot be parsed.
    """
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise ImportError(
            "cppo.rewards.math_verify: needs the package math-verify: pip install 'cppo[math]'"
        ) from error
    # math-verify stops a parse with a signal, which only the main thread may set.
    limit = 5 if threading.current_thread() is threading.main_thread() else 0
    options = {
        "extraction_config": [
            LatexExtractionConfig(boxed_match_priority=0),
            ExprExtractionConfig(),
        ],
        "parsing_timeout": limit,
    }
    truths: dict[str, list[Any]] = {}
    rewards = []
    for row, (text, gold) in enumerate(_pairs("math_verify", completions, answer)):
        if gold not in truths:
            marked = gold if "\\boxed" in gold or "$" in gold else f"${gold}$"
            truths[gold] = parse(marked, **options)
        if not truths[gold]:
            raise _unreadable("math_verify", row, gold, "an expression math-verify can parse")
        try:
            tagged = last_tagged(text)
            found = parse(text if tagged is None else tagged, **options)
            rewards.append(float(verify(truths[gold], found, timeout_seconds=limit)))
        except Exception:  # whatever sympy makes of a sampled text, it is not the answer
            rewards.append(0.0)
    return rewards


def gsm8k(completions: Any, *, answer: Any = None, **columns: Any) -> list[float]:
    """2.0 for the exact answer in `<answer>` tags, 1.5 for the right number, else 0.

    Specification: the reward of arXiv 2503.22342's GSM8K runs: commas removed, the tag's content
    equal to the ground truth is exact; numerically equal, or else the text's last number, is 1.5.
    Args:
        completions: strings or messages.
        answer: ground truths, one number each ("#### 42" counts as 42).
    Returns: 0.0, 1.5 or 2.0 per completion.
    Raises: ValueError naming a row whose ground truth is not a number.
    """
    rewards = []
    for row, (text, gold) in enumerate(_pairs("gsm8k", completions, answer)):
        value = _gold_number("gsm8k", row, gold)
        tagged = last_tagged(text)
        exact = tagged is not None and tagged.replace(",", "") == final_answer(gold).replace(
            ",", ""
        )
        close = same_number(find_number(text), value)
        rewards.append(2.0 if exact else 1.5 if close else 0.0)
    return rewards


def _thinks_once(text: str) -> str | None:
    """What follows `<think>...</think>`, if the text starts with it and holds it only once."""
    if text.count("<think>") != 1 or text.count("</think>") != 1:
        return None
    match = re.fullmatch(r"\s*<think>.*?</think>(.*)", text, re.DOTALL)
    return match.group(1) if match else None


def think_format(completions: Any, **columns: Any) -> list[float]:
    """1 where a completion is `<think>...</think>`, once, followed by an answer; else 0."""
    return [float(bool((_thinks_once(text) or "").strip())) for text in texts_of(completions)]


def think_answer_format(completions: Any, **columns: Any) -> list[float]:
    """1 where a completion is `<think>...</think>` then `<answer>...</answer>` and nothing else."""
    pattern = re.compile(r"\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL)
    rests = [_thinks_once(text) for text in texts_of(completions)]
    return [float(rest is not None and pattern.fullmatch(rest) is not None) for rest in rests]


def think_boxed_format(completions: Any, **columns: Any) -> list[float]:
    r"""1 where a completion is `<think>...</think>`, once, then text with a closed `\boxed{}`."""
    rests = [_thinks_once(text) for text in texts_of(completions)]
    return [float(rest is not None and last_boxed(rest) is not None) for rest in rests]


def tag_count(completions: Any, **columns: Any) -> list[float]:
    """A quarter for each of `<think>`, `</think>`, `<answer>`, `</answer>` that occurs once."""
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    return [sum(text.count(tag) == 1 for tag in tags) / 4 for text in texts_of(completions)]


ACCURACIES: dict[str, Callable[..., list[float]]] = {
    "exact_match": exact_match,
    "numeric": numeric,
    "boxed": boxed,
    "math_verify": math_verify,
    "gsm8k": gsm8k,
}
