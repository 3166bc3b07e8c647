r"""Answers compared by their spelling and their values, without algebra."""

from __future__ import annotations

import functools
import re

from cppo.rewards.latex import LONGEST, plain
from cppo.rewards.quantities import read_quantity, same_quantity
from cppo.rewards.units import CHANGES, FONT, split_unit

_DEEPEST = 4  # tuples within tuples, and equations in a chain

_MATRIX = re.compile(
    r"[\[(] ?\\begin\{(?:matrix\}|array\} ?\{[clr| ]*\})(.*?)(?:\\\\ ?)?"
    r"\\end\{(?:matrix|array)\} ?[\])]"
    r"|\\begin\{[bp]matrix\}(.*?)(?:\\\\ ?)?\\end\{[bp]matrix\}"
)
_FONT_SWITCH = re.compile(r"\\(?:bf|rm|it)(?![A-Za-z])")
_PERCENT = re.compile(r"\\?%")
_PRIMES = re.compile(r"\^\{((?:\\prime ?)+)\}")
# A space says something behind a command before a letter, between digits and between words.
_SPACE = re.compile(r"(\\[A-Za-z]+ (?=[A-Za-z])|\d (?=\d)|[A-Za-z]{2} (?=[A-Za-z]{2}))| ", re.ASCII)
_CAPITAL = re.compile(r"(?<![A-Za-z\\])(?:[A-Z](?=[a-z]{2,}(?![A-Za-z]))|N(?=o(?![A-Za-z])))")
_CHOICE = re.compile(r"\(?([A-Za-z])\)")
# "x =", "f'(x) =", "AB =", "m\\angle ABC =", "=".
_LEFT_SIDE = re.compile(
    r"(?:(?:[A-Za-z]|[A-Z]{2,3}|m? ?\\angle ?[A-Z]{1,3}|\\[A-Za-z]+)"
    r"(?:_\{[^{}]*\}|'|\([A-Za-z]\))*)? ?(?:=|\\(?:in|approx)(?![A-Za-z])) ?(?=.)"
)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z]")
_NAMES = frozenset("infinity alpha beta gamma delta theta lambda sigma omega".split())
_SHORT_WORDS = frozenset("no yes odd all one two six ten".split())
_BRACKETS = re.compile(r"\\.|[()\[\]{},;]")
_OPENING, _CLOSING = ("\\{", "(", "[", "{"), ("\\}", ")", "]", "}")


@functools.lru_cache(maxsize=4096)
def normalize_answer(text: str) -> str:
    r"""Return an answer in the one spelling in which two answers are compared.

    On top of `latex.plain`: without fonts (`\text`), spaces that say nothing and the capital of a
    word ("Even"); `(B)` and `B)` are B; matrices in round and in square brackets are alike.
    """
    text = _MATRIX.sub(r"\\begin{pmatrix}\1\2\\end{pmatrix}", plain(text))
    while FONT.search(text):
        text = FONT.sub(r" \1 ", text)
    text = _PERCENT.sub(r"\\%", _FONT_SWITCH.sub("", " ".join(text.split())))
    text = _PRIMES.sub(lambda found: "'" * found[1].count("p"), text)
    text = _SPACE.sub(lambda found: found[1] or "", text)
    text = _CAPITAL.sub(lambda found: found[0].lower(), text.strip())
    choice = _CHOICE.fullmatch(text)
    return choice[1] if choice else text


def same_answer(answer: str, truth: str) -> bool:
    """Whether two answers agree in their spelling or as numbers, element by element in a tuple."""
    return compare(answer, truth) is True


def compare(answer: str, truth: str, depth: int = 0) -> bool | None:
    """Whether two answers agree; None where only algebra can tell."""
    if max(len(answer), len(truth)) > LONGEST:
        return answer.split() == truth.split()
    number, truth_number = read_quantity(answer), read_quantity(truth)
    if number is not None and truth_number is not None:
        return same_quantity(number, truth_number)
    (formula, unit), (true_formula, true_unit) = map(split_unit, (plain(answer), plain(truth)))
    if unit and true_unit and unit != true_unit:
        return False
    spelled = normalize_answer(formula), normalize_answer(true_formula)
    if "" in spelled or spelled[0] == spelled[1]:
        return "" not in spelled
    bare = _without_left_side(plain(answer), plain(truth))
    if bare is not None and depth < _DEEPEST:
        return compare(*bare, depth + 1)
    if _are_words(answer) or _are_words(truth) or _differ_in_letters(*spelled):
        return False
    return _compare_elements(formula, true_formula, depth)


def for_algebra(text: str) -> str | None:
    """The formula that algebra compares where `compare` cannot tell, without its unit.

    None for text that is no formula: two words outside of `\\text`, or numbers side by side.
    """
    formula = " ".join(split_unit(plain(text))[0].replace("$", " ").split())
    words = re.findall(r"(?<![A-Za-z\\])[A-Za-z]{4,}", FONT.sub("", formula))
    is_prose = len(set(words) - CHANGES) > 1
    return None if is_prose or re.search(r"\d \d", formula) else formula


def _without_left_side(answer: str, truth: str) -> tuple[str, str] | None:
    """Both without the left side that one or both have; None if they have two different ones."""
    found, other = _LEFT_SIDE.match(answer), _LEFT_SIDE.match(truth)
    if found is None and other is None:
        return None
    if found and other and normalize_answer(found[0]) != normalize_answer(other[0]):
        return None
    return answer[found.end() if found else 0 :], truth[other.end() if other else 0 :]


def _are_words(text: str) -> bool:
    """Whether an answer is words, which algebra would take for a product of letters."""
    words = normalize_answer(text)
    is_text = " " in words or len(words) > 3 or words in _SHORT_WORDS or bool(FONT.search(text))
    return is_text and _WORDS.fullmatch(words) is not None and words not in _NAMES


def _differ_in_letters(answer: str, truth: str) -> bool:
    """Whether the answers are two letters, one has a letter of the other in another case, or has
    more primes: what math-verify does not look at.
    """
    if len(answer) == len(truth) == 1:
        return answer.isalpha() and truth.isalpha()
    if answer.count("'") != truth.count("'"):
        return True
    letters = [set(re.findall(r"[A-Za-z]", _COMMAND.sub("", text))) for text in (answer, truth)]
    return any(
        letter not in letters[1] and letter.swapcase() in letters[1] - letters[0]
        for letter in letters[0]
    )


def _elements(text: str) -> tuple[str, str, list[str]]:
    """The brackets around all of a text, "" if there are none, and what its commas separate."""
    depth, commas, is_enclosed = 0, [], text.startswith(_OPENING)
    for found in _BRACKETS.finditer(text):
        if found[0] in _OPENING:
            depth += 1
        elif found[0] in _CLOSING:
            depth -= 1
            is_enclosed = is_enclosed and (depth > 0) == (found.end() < len(text))
        elif found[0] in ",;":
            commas.append((depth, found.start()))
    opening = closing = ""
    if is_enclosed and depth == 0:
        opening = next(bracket for bracket in _OPENING if text.startswith(bracket))
        closing = next(bracket for bracket in _CLOSING if text.endswith(bracket))
    cuts = [place for level, place in commas if level == (1 if opening else 0)]
    starts = [len(opening), *(place + 1 for place in cuts)]
    stops = [*cuts, len(text) - len(closing)]
    return opening, closing, [text[a:b].strip() for a, b in zip(starts, stops, strict=True)]


def _compare_elements(answer: str, truth: str, depth: int) -> bool | None:
    """Compare tuples, intervals, sets and lists, also with a number; None for anything else."""
    *brackets, elements = _elements(answer)
    *other_brackets, others = _elements(truth)
    if len(elements) != len(others) and (read_quantity(answer) or read_quantity(truth)):
        return False
    if min(len(elements), len(others)) < 2 or depth == _DEEPEST:
        return None
    if brackets != other_brackets:
        return False if brackets[0] and other_brackets[0] else None
    if len(elements) != len(others):
        return None
    found = [compare(*pair, depth + 1) for pair in zip(elements, others, strict=True)]
    if all(found):
        return True
    has_order = brackets[0] in ("(", "[")
    return False if has_order and False in found else None
