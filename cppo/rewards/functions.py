r"""Rewards for what a completion says: correctness of its answer and format; see `cppo.rewards`.

The arguments that they share:
    completions: strings, or TRL's messages, of which the assistant's last is judged.
    answer: one ground truth per completion: a string, a number, or a list of accepted answers.
    generation_prompts: what the chat template wrote behind the last message, one string per
        completion or one for all ("<think>" with `functools.partial`, in TRL); a completion is
        judged on that text from its first `<think>` or `<answer>` on, and its own.
    unfinished_thought: the reward of a completion whose last `<think>` is not closed: a number;
        None, which leaves the completion out; or "judged", which looks for the answer in the
        thought. In any other completion the answer follows the last `</think>`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

from cppo.options.values import is_finite_number
from cppo.rewards.answers import (
    answer_part,
    behind_hashes,
    formulas,
    last_boxed,
    last_tagged,
    marked_answer,
    stated_answer,
    without_delimiters,
)
from cppo.rewards.checks import require
from cppo.rewards.completions import judged_texts
from cppo.rewards.ground_truth import accepted_answers
from cppo.rewards.judging import Judged, Rewards
from cppo.rewards.latex import LONGEST
from cppo.rewards.quantities import Quantity, read_quantity, same_quantity
from cppo.rewards.sentences import is_denied, last_number, only_number, said, stated_number
from cppo.rewards.spelling import compare, for_algebra, normalize_answer, same_answer
from cppo.rewards.symbolic import equal_pairs, require_math_verify
from cppo.rewards.units import PERCENT

_THOUSANDS = re.compile(r"[-+]?\D?\d{1,3}(?:,\d{3})+(?!\d)[^,]*")

_SAYS = re.compile(r"[A-Za-z]{2}|[=#]|^\s*\*")  # a word, an equation, a heading, an item


def exact_match(
    completions: Any,
    *,
    answer: Any = None,
    generation_prompts: Any = None,
    unfinished_thought: Any = 0.0,
    **columns: Any,
) -> Rewards:
    r"""1 where the completion's answer is the ground truth, letter by letter.

    The answer is the last `<answer>`, or else the last box, or else all that follows the thought.
    Any white space counts as one space; `$`, `\(` or `\[` around the whole answer do not count.

    Args: see `cppo.rewards.functions`.
    Returns: 0.0 or 1.0 per completion.
    Raises: ValueError naming a completion without ground truth.
    """
    judged = Judged("exact_match", completions, answer, generation_prompts, unfinished_thought)
    truths = judged.truths(lambda gold: answer_part(gold).split(), "an answer")
    return judged.rewards(truths, lambda text, truth: float(answer_part(text).split() == truth))


def numeric(
    completions: Any,
    *,
    answer: Any = None,
    generation_prompts: Any = None,
    unfinished_thought: Any = 0.0,
    **columns: Any,
) -> Rewards:
    r"""1 where the completion's number equals the ground truth; see `cppo.rewards.quantities`.

    The last `<answer>`, or else the last box, must hold one number: alone, with a unit, or among
    words that do not change it. Several numbers ("18 apples for 3 people"), other words or a
    formula there earn 0. Without a tag or a box, or without a digit in it, the number is the one
    behind "the answer is", or else the last one after the thought, unless something beside it makes
    it another number. Thousands may be separated (1,234 and 12 000) and fractions mixed (1 1/2).
    Units must agree where both have one. 50 % equals 50 and 0.5.

    Args: see `cppo.rewards.functions`; a ground truth is one number, with a unit or without, or
        has one behind its last `####`.
    Returns: 0.0 or 1.0 per completion.
    Raises: ValueError naming a completion whose ground truth is not a number.
    """
    judged = Judged("numeric", completions, answer, generation_prompts, unfinished_thought)
    truths = judged.truths(_number_of_truth, "a number")
    return judged.rewards(truths, lambda text, truth: float(_equal(_stated_number(text), truth)))


def _number_of_truth(gold: str) -> Quantity | None:
    marked = read_quantity(behind_hashes(gold) or "", letters=True)
    return marked or only_number(answer_part(gold))


def _stated_number(text: str) -> Quantity | None:
    marked, stated = marked_answer(text), stated_answer(text)
    if marked is not None and _has_digit(marked):
        return only_number(marked, in_sentences=True)
    if stated is not None and _has_digit(stated):
        return stated_number(stated)
    return read_quantity(text, letters=True) or last_number(text)


def _has_digit(text: str) -> bool:
    return any(character.isdigit() for character in text)


def _equal(number: Quantity | None, truth: Quantity) -> bool:
    return number is not None and same_quantity(number, truth)


def boxed(
    completions: Any,
    *,
    answer: Any = None,
    generation_prompts: Any = None,
    unfinished_thought: Any = 0.0,
    **columns: Any,
) -> Rewards:
    r"""1 where the last box holds the ground truth, in spelling or in value, element by element.

    `cppo.rewards.answers.last_boxed` says what a box is, `cppo.rewards.spelling` what is equal.

    Args: see `cppo.rewards.functions`; a ground truth is bare, or in `$`, a box or `<answer>`.
    Returns: 0.0 or 1.0 per completion; no closed box behind the thought is 0.
    Raises: ValueError naming a completion without ground truth.
    """
    judged = Judged("boxed", completions, answer, generation_prompts, unfinished_thought)
    truths = judged.truths(_truth, "an answer, bare or in a closed \\boxed{}")
    return judged.rewards(
        truths,
        lambda text, truth: float(same_answer(without_delimiters(last_boxed(text) or ""), truth)),
    )


def mathvista(
    completions: Any,
    *,
    answer: Any = None,
    precision: Any = None,
    generation_prompts: Any = None,
    unfinished_thought: Any = 0.0,
    **columns: Any,
) -> Rewards:
    r"""`boxed`, with numbers rounded to the decimals that a row of MathVista asks for.

    Args: see `cppo.rewards.functions`.
        precision: the decimals that count, one entry per completion; None or NaN for rows that ask
            for no rounding, as all do without this column. With 1, an answer of 1.23 is 1.2.
    Returns: 0.0 or 1.0 per completion.
    Raises: ValueError naming a completion without ground truth.
    """
    judged = Judged("mathvista", completions, answer, generation_prompts, unfinished_thought)
    truths = judged.truths(_truth, "an answer, bare or in a closed \\boxed{}")
    places = [None] * len(truths) if precision is None else precision
    return judged.rewards(
        [[(truth, own) for truth in each] for each, own in zip(truths, places, strict=True)],
        lambda text, truth: float(_same_rounded(last_boxed(text) or "", *truth)),
    )


def _same_rounded(box: str, truth: str, decimals: Any) -> bool:
    answer = without_delimiters(box)
    number, exact = read_quantity(answer), read_quantity(truth)
    if not is_finite_number(decimals) or number is None or exact is None:
        return same_answer(answer, truth)
    return same_quantity(number, replace(exact, slack=Fraction(1, 2 * 10 ** int(decimals))))


def check_ground_truth(value: Any) -> None:
    """Raise ValueError for a ground truth of a row that no answer can equal."""
    if not any(map(_truth, accepted_answers(value))):
        raise ValueError(
            "has a ground truth that is no answer, bare or in a closed \\boxed{}, "
            f"got {value!r:.200}"
        )


def _truth(gold: str) -> str:
    """The answer part of a ground truth; "" if it says nothing or its box is not closed."""
    truth = answer_part(gold)
    says_something = len(truth) > LONGEST or normalize_answer(truth) != ""
    return truth if says_something and "\\boxed" not in truth else ""


def math_verify(
    completions: Any,
    *,
    answer: Any = None,
    generation_prompts: Any = None,
    unfinished_thought: Any = 0.0,
    timeout: float = 2.0,
    **columns: Any,
) -> Rewards:
    r"""1 where the completion's answer equals the ground truth, by spelling, value or math-verify.

    The answer is the last `<answer>`, or else the last box, or else what follows "the answer is",
    or else all that follows the thought. In text around formulas (`$`, `\(` or `\[`) the last
    formula counts as well; behind "the answer is" it is the first. In text without LaTeX the only
    number counts, among words that do not change it. math-verify decides where
    `cppo.rewards.spelling` cannot tell. It runs in a process of its own (`cppo.rewards.symbolic`),
    so that the time limit holds in any thread.

    Args: see `cppo.rewards.functions`.
        timeout: seconds for one comparison; an answer that takes longer earns 0.
    Returns: 0.0 or 1.0 per completion; None, with a warning, for one that was not compared because
        too many others took too long.
    Raises: ImportError without the package math-verify (`pip install "cppo[math]"`); ValueError
        naming a completion without ground truth.
    """
    require_math_verify("math_verify")
    require(
        "math_verify", timeout=(is_finite_number(timeout) and timeout > 0, "a number > 0", timeout)
    )
    judged = Judged("math_verify", completions, answer, generation_prompts, unfinished_thought)
    truths = judged.truths(_readings_of_truth, "an expression or a word")
    verdicts = {
        (text, truth): _verdict(text, truth)
        for text, accepted in zip(judged.texts, truths, strict=True)
        for truth in accepted
        if text is not None
    }
    asked = [verdict for verdict in verdicts.values() if isinstance(verdict, tuple)]
    equal = equal_pairs(asked, timeout)

    def rate(text: str, truth: tuple[str, ...]) -> bool | None:
        verdict = verdicts[text, truth]
        return equal[verdict] if isinstance(verdict, tuple) else verdict

    return judged.rewards(truths, rate)


def _verdict(text: str, truth: tuple[str, ...]) -> bool | tuple[str, str]:
    """Whether the answer of a text is the truth; what algebra has to compare, if only that can."""
    readings = _readings(text)
    found = [compare(reading, gold, any_order=True) for reading in readings for gold in truth]
    if True in found or _says_number(text, truth[-1]):
        return True
    if not readings or found[-1] is False:
        return False
    return for_algebra(readings[-1], truth[-1]) or False


def _says_number(text: str, truth: str) -> bool:
    """Whether words or an equation without LaTeX say the truth's number, as `numeric` reads them.

    What is read is the marked answer or, without one, the text; of a text with formulas, its last
    line.
    """
    number, marked = read_quantity(truth), marked_answer(text)
    line = text if marked is None else marked
    if marked is None and formulas(text):
        line = text.strip().rpartition("\n")[2]
    if number is None or formulas(line) or not _SAYS.search(line):
        return False
    if marked is None:
        return _equal(_stated_number(line.lstrip("# ")), number)
    return _equal(only_number(marked, in_sentences=marked == last_tagged(text)), number)


def _readings(text: str) -> tuple[str, ...]:
    """What the answer of a text may be: its answer part, and one formula in that.

    The formula is the last, or the first behind "the answer is". It does not count where words say
    that it is not the answer.
    """
    part = answer_part(text)
    stated = stated_answer(part)
    part = part if stated is None else stated
    found = [formula for formula in formulas(part) if formula]
    found = found[-1:] if stated is None else found[:1]
    for formula in found:
        before, _, behind = part.rpartition(formula) if stated is None else part.partition(formula)
        if is_denied(before.rstrip("$\\([ "), behind.lstrip("$\\)]")):
            found = []
    return tuple(reading for reading in (part, *found, said(part)) if reading)


def _readings_of_truth(gold: str) -> tuple[str, ...]:
    """What a ground truth may be: all of it, and the formula in it if there is only one."""
    truth = _truth(gold)
    found = formulas(truth)
    return tuple(reading for reading in [truth, *found] if reading)[: 2 if len(found) == 1 else 1]


def gsm8k(
    completions: Any,
    *,
    answer: Any = None,
    generation_prompts: Any = None,
    unfinished_thought: Any = 0.0,
    **columns: Any,
) -> Rewards:
    """2.0 for the exact answer in `<answer>` tags, 1.5 for the right number, else 0.

    Specification: the reward of arXiv 2503.22342's GSM8K runs. Exact means that the tag holds the
    ground truth, with commas removed; an equal number in the tag, or else at the end of the text,
    earns 1.5. Numbers are found and compared as in `numeric`. Without a tag or a box, a number
    marked by a line `#### 42`, as in GSM8K's own solutions, goes before the last one.

    Args: see `cppo.rewards.functions`; a ground truth is one number ("#### 42" counts as 42).
    Returns: 0.0, 1.5 or 2.0 per completion.
    Raises: ValueError naming a completion whose ground truth is not a number.
    """
    judged = Judged("gsm8k", completions, answer, generation_prompts, unfinished_thought)
    truths = judged.truths(_gsm8k_truth, "a number")
    return judged.rewards(truths, _gsm8k_reward)


def _gsm8k_truth(gold: str) -> tuple[str, Quantity] | None:
    spelled = behind_hashes(gold) or answer_part(gold)
    number = read_quantity(spelled)
    if number is None or number.unit not in ("", PERCENT, "dollar"):
        return None
    return _without_commas(spelled), number


def _without_commas(number: str) -> str:
    """A number without the commas that set thousands apart; any other text as it is."""
    return number.replace(",", "") if _THOUSANDS.fullmatch(number) else number


def _gsm8k_reward(text: str, truth: tuple[str, Quantity]) -> float:
    spelled, number = truth
    if _without_commas(last_tagged(text) or "") == spelled:
        return 2.0
    stated = _stated_number(text)
    if marked_answer(text) is None:
        stated = read_quantity(behind_hashes(text) or "") or stated
    return 1.5 if _equal(stated, number) else 0.0


def _thinks_once(text: str) -> str | None:
    """What follows `<think>...</think>`, if the text starts with it and holds it only once."""
    text = text.lstrip()
    if text.count("<think>") != 1 or text.count("</think>") != 1 or not text.startswith("<think>"):
        return None
    return text.partition("</think>")[2].strip()


def think_format(
    completions: Any, *, generation_prompts: Any = None, **columns: Any
) -> list[float]:
    """1 where a completion is `<think>...</think>`, once, followed by an answer; else 0."""
    texts = judged_texts("think_format", completions, generation_prompts)
    return [float(bool(_thinks_once(text))) for text in texts]


def think_answer_format(
    completions: Any, *, generation_prompts: Any = None, **columns: Any
) -> list[float]:
    """1 where a completion is `<think>...</think>` then `<answer>...</answer>` and nothing else.

    Each tag stands there once, and the answer is not empty; the thought may be.
    """
    texts = judged_texts("think_answer_format", completions, generation_prompts)
    return [float(_is_one_tag(text, _thinks_once(text) or "")) for text in texts]


def _is_one_tag(text: str, answer: str) -> bool:
    is_whole = answer.startswith("<answer>") and answer.endswith("</answer>")
    is_only = text.count("<answer>") == 1 and text.count("</answer>") == 1
    return is_whole and is_only and bool(answer[len("<answer>") : -len("</answer>")].strip())


def think_boxed_format(
    completions: Any, *, generation_prompts: Any = None, **columns: Any
) -> list[float]:
    r"""1 where a completion is `<think>...</think>`, once, then text with a closed `\boxed{}`."""
    texts = judged_texts("think_boxed_format", completions, generation_prompts)
    return [float(last_boxed(_thinks_once(text) or "") is not None) for text in texts]


def tag_count(completions: Any, *, generation_prompts: Any = None, **columns: Any) -> list[float]:
    """A quarter for each of `<think>`, `</think>`, `<answer>`, `</answer>` that occurs once."""
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    texts = judged_texts("tag_count", completions, generation_prompts)
    return [sum(text.count(tag) == 1 for tag in tags) / 4 for text in texts]


ACCURACIES: dict[str, Callable[..., Rewards]] = {
    "exact_match": exact_match,
    "numeric": numeric,
    "boxed": boxed,
    "math_verify": math_verify,
    "gsm8k": gsm8k,
    "mathvista": mathvista,
}
