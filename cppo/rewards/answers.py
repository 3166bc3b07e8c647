r"""Answers inside text: find them, read them as numbers, compare them.

Every function takes any string and never raises; what cannot be found or read is None.
"""

from __future__ import annotations

import math
import re

TOLERANCE = 1e-6

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)(?:\.\d+)?|\.\d+"
_UNSIGNED = rf"(?:{_DIGITS})(?:[eE][-+]?\d{{1,4}})?"
# A sign counts only where nothing to subtract from comes before it: "10 - 5" ends in 5,
# "= -5" in -5.
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}.])[-+])?(?:{_UNSIGNED})", re.ASCII)
_WHOLE_NUMBER = re.compile(rf"[-+]?(?:{_UNSIGNED})", re.ASCII)
_FRACTION = re.compile(
    rf"([-+]?)(?:\\frac\{{({_WHOLE_NUMBER.pattern})\}}\{{({_WHOLE_NUMBER.pattern})\}}"
    rf"|({_UNSIGNED})/({_UNSIGNED}))",
    re.ASCII,
)
_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)

_REMOVED = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\^\{?\\circ\}?|\\degree|\\?[%$]|\u00b0|~|\s"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\{([^{}]*)\}")


def last_boxed(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` holds, braces balanced; None if there is none.

    A last box that is never closed (a truncated completion) counts as none.
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth, position = 1, begin
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1  # an escaped brace, as in \{ 1, 2 \}, is no group
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[begin:position]
        position += 1
    return None


def last_tagged(text: str) -> str | None:
    """Return what the last closed `<answer>...</answer>` holds, stripped; None if there is none."""
    found = _ANSWER_TAG.findall(text)
    return found[-1].strip() if found else None


def final_answer(text: str) -> str:
    r"""Return the answer part of a completion.

    The last `<answer>` tag, else the last `\boxed{}`, else the text behind the last `####`, else
    what follows the last `</think>` (everything where there is none); stripped.
    """
    tagged = last_tagged(text)
    if tagged is not None:
        return tagged
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    return text.rsplit("</think>", 1)[-1].rsplit("####", 1)[-1].strip()


def normalize_answer(text: str) -> str:
    r"""Return an answer in one spelling: no spaces, units of angle, `$`, `%`, `\text` or `x =`."""
    text = _TEXT.sub(r"\1", text.strip().replace("\u2212", "-").replace("{,}", ","))
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = _REMOVED.sub("", text).rstrip(".")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text, flags=re.ASCII)
    text = re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", text, flags=re.ASCII)
    text = re.sub(r"^[A-Za-z]=(?=.)", "", text)
    choice = re.fullmatch(r"\(([A-Za-z])\)", text)
    if choice:
        return choice.group(1)
    return text.replace(",", "") if _WHOLE_NUMBER.fullmatch(text) else text


def read_number(text: str) -> float | None:
    r"""Return the value of a text that is one number or fraction (`-1,234.5`, `\frac{3}{4}`)."""
    text = normalize_answer(text)
    if _WHOLE_NUMBER.fullmatch(text):
        return _finite(text)
    fraction = _FRACTION.fullmatch(text)
    if fraction is None:
        return None
    sign, *parts = fraction.groups()
    over, under = (_finite(part) for part in parts if part is not None)
    if over is None or not under:
        return None
    value = (-over if sign == "-" else over) / under
    return value if math.isfinite(value) else None


def last_number(text: str) -> float | None:
    """Return the last number in a text; thousands separators, `$` and `%` are read over."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\", "")
    found = _NUMBER.findall(text.replace("$", "").replace("%", ""))
    return _finite(found[-1]) if found else None


def _finite(text: str) -> float | None:
    value = float(text.replace(",", "").replace(" ", ""))
    return value if math.isfinite(value) else None


def find_number(text: str) -> float | None:
    """Return the number of a completion: its answer part read as one, else the last in it."""
    answer = final_answer(text)
    for value in (read_number(answer), last_number(answer)):
        if value is not None:
            return value
    return last_number(text)


def same_number(first: float | None, second: float | None) -> bool:
    """Whether both are numbers at most 1e-6 apart."""
    return first is not None and second is not None and abs(first - second) <= TOLERANCE


def same_answer(first: str, second: str) -> bool:
    """Whether two answers agree in their normalised spelling, or as numbers within 1e-6."""
    if normalize_answer(first) == normalize_answer(second):
        return True
    return same_number(read_number(first), read_number(second))
