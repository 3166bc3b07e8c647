"""Questions about images composed of real handwritten digits: "What is the sum of the digits?"

The 1,797 scans are scikit-learn's (`load_digits`, 8 x 8 pixels, the test set of UCI's "optical
recognition of handwritten digits"). 500 of them are held out: no held-out scan is ever in a
training image. The data does not name the writers, so they may be in both parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from cppo.rewards import boxed

QUESTION = "What is the sum of the digits?"
SPLITS = ("train", "heldout")
SLOT = 24  # pixels: one digit per slot, one image token per slot
PRINT_SIZE = (16, 22)  # pixels: the smallest and the largest digit
NUM_QUESTIONS = 100_000  # of a loader; a question is made when it is taken
_NUM_HELDOUT = 500


def load_digit_sums(path: None = None, split: str = "train") -> DigitSums:
    """The demo's 100,000 questions of a split, as the loader "digits" of a configuration.

    Raises: ImportError if scikit-learn, which holds the scans, is not installed.
    """
    rows = DigitSums(split, NUM_QUESTIONS)
    handwriting(split)
    return rows


class DemoRows:
    """What the datasets of the demo share: a split, a size, and a random stream for each row."""

    def __init__(self, split: str, size: int, seed: int) -> None:
        owner = type(self).__name__
        if split not in SPLITS:
            raise ValueError(f"{owner}: split must be one of {SPLITS}, got {split!r}")
        if size < 0:
            raise ValueError(f"{owner}: size must be >= 0, got {size}")
        self.split, self.size, self.seed = split, size, seed

    def __len__(self) -> int:
        return self.size

    def _rng(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.size:
            owner = type(self).__name__
            raise IndexError(f"{owner}: index must be in [0, {self.size}), got {index}")
        return np.random.default_rng((self.seed, SPLITS.index(self.split), index))


class DigitSums(DemoRows):
    """A dataset of scenes of digits side by side, each with the question of their sum.

    Row i depends on (split, seed, i) only. Its columns are `prompt` (chat messages with one image
    part), `images` ([PIL image, RGB, 24 pixels high, 24 per digit wide]), `answer` (the sum, as
    text), `digits` (list of int), and two right completions: `worked` shows the work, `direct` is
    the answer alone.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 4096,
        *,
        seed: int = 0,
        num_digits: tuple[int, int] = (2, 3),
        noise: float = 0.08,
        print_size: tuple[int, int] = PRINT_SIZE,
    ) -> None:
        """Args:
            split: "train" or "heldout", which decides whose handwriting is used.
            size: number of rows.
            seed: of the scenes.
            num_digits: fewest and most digits in a scene, each equally likely.
            noise: standard deviation of the pixel noise, for pixels in [0, 1].
            print_size: smallest and largest digit in pixels, each equally likely.
        Raises: ValueError for an unknown split, size < 0, a bad range or negative noise.
        """
        super().__init__(split, size, seed)
        low, high = num_digits
        if not 1 <= low <= high:
            raise ValueError(
                f"DigitSums: num_digits must be (low, high), 1 <= low <= high, got {num_digits}"
            )
        if noise < 0:
            raise ValueError(f"DigitSums: noise must be >= 0, got {noise}")
        smallest, largest = print_size
        if not 1 <= smallest <= largest <= SLOT:
            raise ValueError(
                "DigitSums: print_size must be (smallest, largest), 1 <= smallest <= largest <= "
                f"{SLOT}, got {print_size}"
            )
        self.num_digits, self.noise, self.print_size = (low, high), noise, (smallest, largest)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = self._rng(index)
        digits, image = self._scene(rng)
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        return {
            "prompt": [{"role": "user", "content": content}],
            "images": [image],
            "answer": str(sum(digits)),
            "digits": digits,
            "worked": worked_answer(digits),
            "direct": direct_answer(digits),
        }

    def _scene(self, rng: np.random.Generator) -> tuple[list[int], Image.Image]:
        scans, labels = handwriting(self.split)
        chosen = rng.integers(
            len(labels), size=rng.integers(self.num_digits[0], self.num_digits[1] + 1)
        )
        image = compose_scene(
            [scans[i] for i in chosen], rng, noise=self.noise, print_size=self.print_size
        )
        return [int(labels[i]) for i in chosen], image


def compose_scene(
    scans: Sequence[np.ndarray],
    rng: np.random.Generator,
    *,
    noise: float = 0.08,
    print_size: tuple[int, int] = PRINT_SIZE,
) -> Image.Image:
    """Return an image of digits side by side, each somewhere in its slot.

    Args:
        scans: (8, 8) arrays in [0, 1], ink bright.
        rng: draws size, place, brightness, contrast and noise.
        noise: standard deviation of the pixel noise.
        print_size: smallest and largest digit in pixels.
    """
    canvas = np.zeros((SLOT, SLOT * len(scans)), dtype=np.float32)
    for slot, scan in enumerate(scans):
        side = int(rng.integers(print_size[0], print_size[1] + 1))
        top, left = rng.integers(SLOT - side + 1, size=2)
        scaled = Image.fromarray(scan).resize((side, side), Image.Resampling.BILINEAR)
        canvas[top : top + side, slot * SLOT + left : slot * SLOT + left + side] = np.asarray(
            scaled
        )
    contrast, brightness = rng.uniform(0.6, 1.0), rng.uniform(0.0, 0.2)
    noisy = canvas * contrast + brightness + rng.normal(0.0, noise, canvas.shape)
    pixels = (np.clip(noisy, 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB")


@cache
def handwriting(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the scans (n, 8, 8) fp32 in [0, 1] and the labels (n,) of one split, disjoint by scan.

    Raises: ImportError if scikit-learn, which holds the scans, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "cppo.demo: the handwritten digits come with scikit-learn: pip install 'cppo[demo]'"
        ) from error
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    part = order[:_NUM_HELDOUT] if split == "heldout" else order[_NUM_HELDOUT:]
    return (data.images[part] / 16).astype(np.float32), data.target[part]


def worked_answer(digits: Sequence[int]) -> str:
    r"""Return a right completion with its work: `I see 3, 5, 9. 3+5=8, 8+9=17. \boxed{17}`."""
    total, steps = digits[0], []
    for digit in digits[1:]:
        steps.append(f"{total}+{digit}={total + digit}")
        total += digit
    work = ", ".join(steps) + ". " if steps else ""
    return f"I see {', '.join(map(str, digits))}. {work}\\boxed{{{total}}}"


def direct_answer(digits: Sequence[int]) -> str:
    r"""Return the right completion without work: `\boxed{17}`."""
    return f"\\boxed{{{sum(digits)}}}"


def digit_sum_accuracy(
    completions: Sequence[Any], *, answer: Sequence[str], **columns: Any
) -> list[float]:
    """Reward 1 for the right sum in the last box, else 0: `cppo.rewards.boxed` on this task."""
    return boxed(completions, answer=answer)
