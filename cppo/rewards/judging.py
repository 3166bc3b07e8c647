"""One call of a correctness reward: what follows each thought, and its ground truths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cppo.options.values import is_finite_number
from cppo.rewards.checks import require
from cppo.rewards.completions import after_thought, judged_texts
from cppo.rewards.ground_truth import accepted_answers

JUDGED = "judged"
# Of floats, and of None where `unfinished_thought` is None or an answer was not compared.
Rewards = list[Any]


class Judged:
    """The completions of a call.

    Args:
        name: the reward, for errors.
        completions, answer, generation_prompts, unfinished_thought: as the rewards take them.
    Attributes:
        texts: what each completion says after its thought; None where the thought is unfinished,
            unless that is judged too.
        answers: the accepted answers of each completion.
    Raises: ValueError naming the completion whose ground truth is none, by its place in the call;
        TypeError or ValueError for other arguments that cannot be read.
    """

    def __init__(
        self,
        name: str,
        completions: Any,
        answer: Any,
        generation_prompts: Any,
        unfinished_thought: Any,
    ) -> None:
        self.name = name
        self._unfinished = _reward_of_unfinished(name, unfinished_thought)
        texts = judged_texts(name, completions, generation_prompts)
        self.texts = [after_thought(text) for text in texts]
        if unfinished_thought == JUDGED:
            self.texts = [text.rpartition("</think>")[2] for text in texts]
        self.answers = _accepted(name, answer, len(texts))

    def truths(self, read: Callable[[str], Any], expected: str) -> list[list[Any]]:
        """What `read` makes of the accepted answers of each completion.

        Answers of which it makes nothing are left out ("four" beside "4", for numbers).

        Raises: ValueError naming a completion that has none left.
        """
        truths = []
        for place, accepted in enumerate(self.answers):
            truths.append([truth for truth in map(read, accepted) if truth])
            if not truths[-1]:
                got = accepted[0] if len(accepted) == 1 else accepted
                raise ValueError(
                    f"cppo.rewards.{self.name}: completion {place}: ground truth must be "
                    f"{expected}, got {got!r}"
                )
        return truths

    def rewards(
        self, truths: list[list[Any]], rate: Callable[[str, Any], float | bool | None]
    ) -> Rewards:
        """The best `rate(text, truth)` of each completion, or what an unfinished thought earns.

        None where the best is 0 and another one is None.
        """
        rewards: Rewards = []
        for text, accepted in zip(self.texts, truths, strict=True):
            rates = [] if text is None else [rate(text, truth) for truth in accepted]
            best = max(float(found or 0.0) for found in rates) if rates else self._unfinished
            rewards.append(None if None in rates and not best else best)
        return rewards


def _reward_of_unfinished(name: str, value: Any) -> float | None:
    if value is None or value == JUDGED:
        return None
    expected = f"a finite number, None or {JUDGED!r}"
    require(name, unfinished_thought=(is_finite_number(value), expected, value))
    return float(value)


def _accepted(name: str, answer: Any, count: int) -> list[list[str]]:
    if answer is None or isinstance(answer, str):
        raise ValueError(
            f"cppo.rewards.{name}: needs the column 'answer', one entry per completion, "
            f"got {answer!r}"
        )
    if len(answer) != count:
        raise ValueError(
            f"cppo.rewards.{name}: answer must have one entry per completion = {count}, "
            f"got {len(answer)}"
        )
    accepted = []
    for place, value in enumerate(answer):
        try:
            accepted.append(accepted_answers(value))
        except ValueError as error:
            raise ValueError(f"cppo.rewards.{name}: completion {place} {error}") from None
    return accepted
