"""A task in which looking is the bottleneck: a hint in the question that used to be always right.

"A friend says they are 3, 5. What is the sum of the digits?" In the warm-up the images are so
noisy that they are hard to read, and the friend is always right: the model learns to copy the
friend. In RL and in the held-out questions the images are clear and the friend is wrong half of the
time, about one digit: only the image tells, and only the truth is rewarded. The warm-up starts from
the digits checkpoint, so that the model can read digits; it just does not look.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from cppo.demo.digits import QUESTION, DigitSums
from cppo.demo.warmup import CHECKPOINTS, Phase, supervise
from cppo.model.load import load_model, load_processor

_PHASES = (Phase(90, (2, 3), 0.0),)
_PEAK_LR = 1e-3
_WARM_UP_NOISE = 0.6  # standard deviation, for pixels in [0, 1]; DigitSums has 0.08


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


def warm_up_shortcut(
    seed: int = 0, *, report: Callable[[str], None] = lambda line: None
) -> tuple[PreTrainedModel, Any]:
    """Train the digits checkpoint on noisy images with hints that are always right, to copy these.

    Args:
        seed: of the questions.
        report: is called with a line of progress now and then.
    Returns: (model in eval mode, fp32; processor). Seed 0: right in 82 % of
        held-out questions with a right hint and in 13 % with a wrong one (sampled, 200 each).
    """
    model = load_model(CHECKPOINTS / "digits")
    processor = load_processor(CHECKPOINTS / "digits")
    supervise(
        model,
        processor,
        _PHASES,
        lambda split, size, seed, parts: HintedSums(
            split, size, hint_right=1.0, seed=seed, num_digits=parts, noise=_WARM_UP_NOISE
        ),
        seed=seed,
        peak_lr=_PEAK_LR,
        report=report,
    )
    return model, processor
