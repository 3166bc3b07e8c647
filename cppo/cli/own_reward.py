"""A reward of your own, which `rewards: [my_reward.py:right_answer]` names in a recipe.

`right_answer` is called with the completions of a step and with every column of the data, each a
list with one entry per completion, and returns a number for each of them: docs/rewards.md. Change
`score`; everything else can stay.
"""

from __future__ import annotations

import re
from typing import Any


def right_answer(completions: list[Any], answer: list[Any], **columns: list[Any]) -> list[float]:
    """Return a number for each completion; `None` for one says that the reward does not apply."""
    return [score(text_of(one), right) for one, right in zip(completions, answer, strict=True)]


def score(text: str, right: Any) -> float:
    """1 for the right answer, 0.1 for another one in a box, else 0."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", text)
    said = boxes[-1] if boxes else text.strip().rpartition("\n")[2]
    if said.strip().lower() == str(right).strip().lower():
        return 1.0
    return 0.1 if boxes else 0.0


def text_of(completion: Any) -> str:
    """The text of a completion: of its last message where the prompts are messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
