"""The demo's four tasks: their questions, their rewards, and the curriculum of their warm-up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cppo.demo.arithmetic import ArithmeticProblems, arithmetic_accuracy
from cppo.demo.digits import DigitSums, digit_sum_accuracy
from cppo.demo.shortcut import HintedSums
from cppo.demo.tiny import build_tiny_text_model, build_tiny_vlm
from cppo.model.load import load_model, load_processor

CHECKPOINTS = Path(__file__).parent / "checkpoints"


class Phase(NamedTuple):
    """A stretch of a warm-up's curriculum.

    steps: optimizer steps; rows: options of the task's dataset; direct_fraction: share of
    completions that give the answer without its work.
    """

    steps: int
    rows: Mapping[str, Any]
    direct_fraction: float = 0.0


@dataclass(frozen=True)
class Task:
    """A demo task: its questions, its reward, and how its model is made.

    rows: a dataset class, called with (split, size, seed=..., and options of its own).
    build: makes the model and processor that the warm-up starts from, given a seed.
    is_shipped: whether the package holds the checkpoint after the warm-up.
    """

    title: str
    rows: Callable[..., Any]
    reward: Callable[..., list[float]]
    max_completion_tokens: int
    has_images: bool
    build: Callable[[int], tuple[Any, Any]]
    phases: tuple[Phase, ...]
    peak_lr: float = 2e-3
    is_shipped: bool = True


def _digits_checkpoint(seed: int) -> tuple[Any, Any]:
    folder = CHECKPOINTS / "digits"
    return load_model(folder), load_processor(folder)


_DIGITS = Task(
    title="Sums of handwritten digits",
    rows=DigitSums,
    reward=digit_sum_accuracy,
    max_completion_tokens=32,
    has_images=True,
    build=lambda seed: build_tiny_vlm("qwen2_5_vl", seed),
    phases=(
        Phase(80, {"num_digits": (1, 1)}),
        Phase(60, {"num_digits": (1, 2)}),
        Phase(150, {"num_digits": (2, 3)}),
        Phase(90, {"num_digits": (2, 3)}, direct_fraction=0.6),
    ),
)

TASKS = {
    "digits": _DIGITS,
    # In the warm-up the hint is always right and the images are hard to read (`DigitSums` has
    # noise 0.08), so that the model learns to copy the hint. It starts from a model that can read
    # digits. Seed 0 ends right in 82 % of held-out questions with a right hint and in 13 % with a
    # wrong one (sampled, 200 each).
    "shortcut": replace(
        _DIGITS,
        title="Sums of handwritten digits, with a hint that misleads half of the time",
        rows=HintedSums,
        build=_digits_checkpoint,
        phases=(Phase(90, {"num_digits": (2, 3), "hint_right": 1.0, "noise": 0.6}),),
        peak_lr=1e-3,
        is_shipped=False,
    ),
    # The sums of "digits" in smaller print, so that looking is what fails. Seed 0 ends right in
    # 30 % of 300 held-out questions, sampled. Where it shows its work it reads all digits right in
    # 48 %, and of those sums 99 % are right.
    "print": replace(
        _DIGITS,
        title="Sums of handwritten digits in small print",
        rows=partial(DigitSums, print_size=(14, 18)),
        build=_digits_checkpoint,
        phases=(
            Phase(60, {"print_size": (10, 18)}),
            Phase(60, {"print_size": (10, 18)}, direct_fraction=0.4),
        ),
        is_shipped=False,
    ),
    "arithmetic": Task(
        title="Word problems in arithmetic",
        rows=ArithmeticProblems,
        reward=arithmetic_accuracy,
        max_completion_tokens=48,
        has_images=False,
        build=build_tiny_text_model,
        phases=(
            Phase(100, {"num_steps": (1, 1)}),
            Phase(200, {"num_steps": (1, 2)}),
            Phase(80, {"num_steps": (2, 2)}, direct_fraction=0.6),
        ),
    ),
}
