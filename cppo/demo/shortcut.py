"""A task in which looking is the bottleneck: a hint in the question that used to be always right.

"A friend says they are 3, 5. What is the sum of the digits?" In the warm-up the images are hard to
read and the friend is always right, so the model learns to copy the friend. In RL and in the
held-out questions the images are clear, and half of the time the friend is wrong about one digit:
only the image tells, and only the truth is rewarded.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cppo.demo.digits import QUESTION, DigitSums


class HintedSums(DigitSums):
    """`DigitSums` whose question names digits that a friend claims to see.

    Two more columns: `hint` (list of int, the friend's digits) and `hint_is_right` (bool). A wrong
    hint differs from the truth in exactly one digit, so its sum is always wrong.
    """

    def __init__(
        self, split: str = "train", size: int = 4096, *, hint_right: float = 0.5, **options: Any
    ) -> None:
        """Args:
            split, size: as for `DigitSums`.
            hint_right: share of right hints, in [0, 1].
            options: seed, num_digits and noise, as for `DigitSums`.
        Raises: ValueError as `DigitSums`, and for a share outside [0, 1].
        """
        super().__init__(split, size, **options)
        if not 0 <= hint_right <= 1:
            raise ValueError(f"HintedSums: hint_right must be in [0, 1], got {hint_right}")
        self.hint_right = hint_right

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        # Its own stream: the scenes are those of DigitSums with the same seed, whatever the hints.
        rng = np.random.default_rng((self.seed, index, 7))
        is_right, hint = bool(rng.random() < self.hint_right), list(row["digits"])
        place, shift = int(rng.integers(len(hint))), int(rng.integers(1, 10))
        if not is_right:
            hint[place] = (hint[place] + shift) % 10
        question = f"A friend says they are {', '.join(map(str, hint))}. {QUESTION}"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = [{"role": "user", "content": content}]
        return row | {"prompt": prompt, "hint": hint, "hint_is_right": is_right}
