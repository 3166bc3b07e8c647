"""Two-step word problems for a text model: "Tom has 12 apples, buys 7 and then loses 5. ..."

The numbers decide the split: a combination of numbers that is held out is never trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cppo.demo.digits import NUM_QUESTIONS, DemoRows
from cppo.rewards import boxed

QUESTION = "How many are left?"
_NAMES = ("Tom", "Ann", "Ben", "Eva", "Sam", "Mia")
_THINGS = ("apples", "pens", "books", "coins", "cards", "shells")
_VERBS = {"+": ("finds", "buys"), "-": ("gives away", "loses")}


def load_arithmetic(path: None = None, split: str = "train") -> ArithmeticProblems:
    """The demo's 100,000 questions of a split, as the loader "arithmetic" of a configuration."""
    return ArithmeticProblems(split, NUM_QUESTIONS)


class ArithmeticProblems(DemoRows):
    """A dataset of word problems of one or two steps, in the form of `DigitSums` without images.

    Row i depends on (split, seed, i) only. Columns: `prompt`, `answer`, and two right completions,
    `worked` (`12+7=19, 19-5=14. \\boxed{14}`) and `direct` (`\\boxed{14}`).
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 4096,
        *,
        seed: int = 0,
        num_steps: tuple[int, int] = (2, 2),
    ) -> None:
        """Args:
            split: "train" or "heldout", which decides the combinations of numbers.
            size: number of rows.
            seed: of the problems.
            num_steps: fewest and most calculation steps, within 1 to 2, each equally likely.
        Raises: ValueError for an unknown split, size < 0 or a bad range.
        """
        super().__init__(split, size, seed)
        low, high = num_steps
        if not 1 <= low <= high <= 2:
            raise ValueError(
                f"ArithmeticProblems: num_steps must be within (1, 2), got {num_steps}"
            )
        self.num_steps = (low, high)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = self._rng(index)
        while True:
            question, steps, total = _problem(
                rng, int(rng.integers(*self.num_steps, endpoint=True))
            )
            if total >= 0 and _is_heldout(steps) == (self.split == "heldout"):
                break
        return {
            "prompt": [{"role": "user", "content": question}],
            "answer": str(total),
            "worked": f"{', '.join(steps)}. \\boxed{{{total}}}",
            "direct": f"\\boxed{{{total}}}",
        }


def arithmetic_accuracy(
    completions: Sequence[Any], *, answer: Sequence[str], **columns: Any
) -> list[float]:
    """Reward 1 for the right number in the last box, else 0: `cppo.rewards.boxed` on this task."""
    return boxed(completions, answer=answer)


def _problem(rng: np.random.Generator, num_steps: int) -> tuple[str, list[str], int]:
    """The question, its calculation steps and its result (negative: draw again)."""
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    steps = []
    if rng.random() < 0.4:
        boxes, each = (int(n) for n in rng.integers(2, 7, size=2))
        total = boxes * each
        steps.append(f"{boxes}*{each}={total}")
        start = f"{name} packs {boxes} boxes of {each} {thing}"
    else:
        total = int(rng.integers(5, 21))
        start = f"{name} has {total} {thing}"
    actions = []
    while len(steps) < num_steps:
        sign, amount = str(rng.choice(("+", "-"))), int(rng.integers(2, 10))
        result = total + amount if sign == "+" else total - amount
        steps.append(f"{total}{sign}{amount}={result}")
        actions.append(f"{rng.choice(_VERBS[sign])} {amount}")
        total = result if result >= 0 else -(10**6)
    parts = [", ".join([start, *actions[:-1]]), *actions[-1:]]
    return f"{' and then '.join(parts)}. {QUESTION}", steps, total


def _is_heldout(steps: list[str]) -> bool:
    """Whether a problem's numbers are among the held-out fifth of all combinations."""
    sides = [step.split("=")[0].replace("*", "+").replace("-", "+").split("+") for step in steps]
    numbers = [int(sides[0][0]), *(int(side[1]) for side in sides)]
    # Weights 1, 2, 3: no chain of signs makes the held-out results all alike modulo 5.
    return sum(weight * number for weight, number in enumerate(numbers, start=1)) % 5 == 0
