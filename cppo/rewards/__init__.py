r"""Rewards for completions: correct answers, their format and their length.

A reward function is called as TRL calls it, `fn(completions, *, prompts, **columns)`. Every column
is a list with one entry per completion. The function returns one number per completion, or None
where it does not apply. The rewards here accept strings or TRL's messages as completions and read
the ground truth from the column `answer`. They never raise for what a completion says. A ground
truth that cannot be read raises ValueError with the completion's place in the call, because such a
reward would train on nothing. `cppo.rewards.functions` describes the arguments that they share.
"""

from __future__ import annotations

from cppo.rewards.completions import completion_text
from cppo.rewards.functions import (
    ACCURACIES,
    boxed,
    check_ground_truth,
    exact_match,
    gsm8k,
    math_verify,
    mathvista,
    numeric,
    tag_count,
    think_answer_format,
    think_boxed_format,
    think_format,
)
from cppo.rewards.lengths import CosineLength, Length, Overlong, RepetitionPenalty
from cppo.rewards.registry import (
    GSM8K,
    MATH,
    NAMES,
    VIRL39K,
    Combined,
    answer_rewards,
    combine,
    from_names,
    gsm8k_reward,
    math_reward,
    perception_reward,
)

__all__ = [
    "ACCURACIES",
    "GSM8K",
    "MATH",
    "NAMES",
    "Combined",
    "CosineLength",
    "Length",
    "Overlong",
    "RepetitionPenalty",
    "VIRL39K",
    "answer_rewards",
    "boxed",
    "check_ground_truth",
    "combine",
    "completion_text",
    "exact_match",
    "from_names",
    "gsm8k",
    "gsm8k_reward",
    "math_reward",
    "math_verify",
    "mathvista",
    "numeric",
    "perception_reward",
    "tag_count",
    "think_answer_format",
    "think_boxed_format",
    "think_format",
]
