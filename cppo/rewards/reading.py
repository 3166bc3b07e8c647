r"""What a reward function takes for a completion's answer, for a right one, and for the same one.

pass@k needs to know what is right, a vote which answers are the same, and a reader of predictions
which part of a completion was judged. Only the rewards that ship here and compare answers say so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from cppo.rewards.answers import (
    answer_part,
    behind_hashes,
    last_boxed,
    marked_answer,
    stated_answer,
    without_delimiters,
)
from cppo.rewards.completions import after_thought, completion_text
from cppo.rewards.functions import ACCURACIES, math_verify
from cppo.rewards.judging import JUDGED
from cppo.rewards.quantities import read_quantity
from cppo.rewards.registry import Combined
from cppo.rewards.sentences import last_number
from cppo.rewards.spelling import same_answer

_RIGHT = {"gsm8k": 1.5}  # a right number outside of the tag; of every other reward 1


class Reading(NamedTuple):
    """How a reward that compares answers reads a completion.

    Fields:
        right: the least that a right answer earns.
        extract: (completion, generation prompt) -> the answer that is judged, None without one.
        same: whether two answers that `extract` returned are the same.
    """

    right: float
    extract: Callable[[str, str], str | None]
    same: Callable[[str, str], bool]


def reading_of(function: Any) -> Reading | None:
    """Return how a reward function reads answers.

    Args:
        function: a reward that ships here and compares answers, with options set or without; or a
            sum of one of them and of rewards that together weigh less than a right answer, such as
            `perception_reward`.
    Returns: None for any other function, of which nobody but its author knows what is right.
    """
    if isinstance(function, Combined):
        return _of_sum(function)
    options = getattr(function, "keywords", {})
    function = getattr(function, "func", function)  # of a functools.partial
    name = next((name for name, own in ACCURACIES.items() if own is function), "")
    if not name:
        return None
    judges_thoughts = options.get("unfinished_thought") == JUDGED
    extract = functools.partial(_extract, name, judges_thoughts)
    same = _same_formula if function is math_verify else same_answer
    return Reading(_RIGHT.get(name, 1.0), extract, same)


def _of_sum(function: Combined) -> Reading | None:
    parts = list(zip(map(reading_of, function.functions), function.weights, strict=True))
    known = [(part, weight) for part, weight in parts if part is not None]
    if len(known) != 1:
        return None
    (part, weight), others = known[0], [abs(weight) for own, weight in parts if own is None]
    right = weight * part.right
    # Formats earn 0 to 1: a wrong answer in the best form must stay below a right one.
    return part._replace(right=right) if right > sum(others) else None


def _extract(
    name: str, judges_thoughts: bool, completion: str, generation_prompt: str = ""
) -> str | None:
    whole = completion_text(completion, generation_prompt)
    text = after_thought(whole)
    if text is None:
        if not judges_thoughts:
            return None
        text = whole.rpartition("</think>")[2]
    return (_SHOWN.get(name, _stated)(text) or "").strip() or None


def _stated(text: str) -> str | None:
    """What is marked, said or the last number, in the order in which the rewards look."""
    found = marked_answer(text) or behind_hashes(text) or stated_answer(text)
    if found is not None:
        return without_delimiters(found)
    number = read_quantity(text, letters=True) or last_number(text)
    return f"{number.value} {number.unit}" if number is not None else None


def _in_box(text: str) -> str:
    return without_delimiters(last_boxed(text) or "")


_SHOWN: dict[str, Callable[[str], str | None]] = {
    "boxed": _in_box,
    "mathvista": _in_box,
    "exact_match": answer_part,
}


@functools.lru_cache(maxsize=4096)
def _same_formula(answer: str, other: str) -> bool:
    """Equal for `math_verify`, which reads one of them as the ground truth."""
    try:
        return math_verify([f"\\boxed{{{answer}}}"], answer=[other]) == [1.0]
    except ValueError:  # the other one says nothing, such as "..."
        return False
