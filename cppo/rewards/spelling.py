r"""Answers compared by their spelling and their values, without algebra."""

from __future__ import annotations

import functools
import re

from cppo.rewards.latex import GREEK, LONGEST, plain
from cppo.rewards.quantities import read_quantity, same_quantity
from cppo.rewards.units import CHANGES, FONT, split_unit

_DEEPEST = 4  # tuples within tuples, and equations in a chain
_MOST_IN_ANY_ORDER = 20  # elements

_MATRIX = re.compile(
    r"[\[(] ?\\begin\{(?:matrix\}|array\} ?\{[clr| ]*\})(.*?)(?:\\\\ ?)?"
    r"\\end\{(?:matrix|array)\} ?[\])]"
    r"|\\begin\{[bp]matrix\}(.*?)(?:\\\\ ?)?\\end\{[bp]matrix\}"
)
_FONT_SWITCH = re.compile(r"\\(?:bf|rm|it)(?![A-Za-z])")
_PERCENT = re.compile(r"\\?%")
_PRIMES = re.compile(r"\^\{((?:\\prime ?)+)\}")
# A space matters between a command and a letter, between digits and between words.
_SPACE = re.compile(r"(\\[A-Za-z]+ (?=[A-Za-z])|\d (?=\d)|[A-Za-z]{2} (?=[A-Za-z]{2}))| ", re.ASCII)
_CAPITAL = re.compile(r"(?<![A-Za-z\\])(?:[A-Z](?=[a-z]{2,}(?![A-Za-z]))|N(?=o(?![A-Za-z])))")
_CHOICE = re.compile(r"\(?([A-Za-z])\)")
# Words around the letter of a choice: "The answer is B", "Option (B)", "Answer: B".
_CHOSEN = re.compile(
    r" ?(?i:(?:the )?(?:(?:final|correct|right) )?(?:answer|option|choice)(?: is)? ?:? ?"
    r"(?:option |choice )?)(\(?[A-Z]\)?) ?"
)
# "(C) 21", "C. 21", and not "(C) or (D)" or "(C) is wrong".
_LABELLED = re.compile(
    r"\(?([A-J])(?:\)|[.:](?= )) *(?!.*(?:\([A-J]\)|\b(?:and|or)\b)|[A-J]\b"
    r"|(?:is|are|was|has|can|cannot|does|would|could|must|not|wrong|incorrect)\b|\w+n['\u2019]t\b)"
    r"((?:[\w\\$(]|-[\d\\.]).*)"
)
# Left sides that name a value: "x =", "f'(2) =", "AB =", "m\\angle ABC =", "Total area =", "=".
_OWN_NAME = (
    r"(?:(?:[A-Za-z]{3,} ){0,4}(?:[A-Z]?[a-z]{3,}|[A-Z]{2,3}|[A-Za-z])|\|[A-Z]{2}\|"
    r"|\((?:[A-Za-z], ?)+[A-Za-z]\)|(?:m ?)?\\(?:angle|triangle) ?[A-Z]{1,4}"
    r"|\\(?:text|mathrm|mathbf|operatorname|overline|vec|hat|bar|overrightarrow|widehat)\{[^{}]*\}"
    rf"|\\(?:ell|{'|'.join(name for name in GREEK if name != 'pi')}|[A-Z][a-z]+))"
    r"(?:_\{[^{}]*\}|'|\((?:[\w ,]|\\(?:cap|cup|mid|pi)(?![A-Za-z]))*\))*"
)
_LEFT_SIDE = re.compile(rf"(?:{_OWN_NAME})? ?(?:=|\\(?:in|approx)(?![A-Za-z])) ?(?=.)")
# In any other left side of an answer: letters, each with its index, and functions of them.
_UNKNOWN = re.compile(r"\\([A-Za-z]+)|([A-Za-z])(_\{[^{}]*\})?(['^({-]*\()?")
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan log ln lg exp det gcd lcm arg dim min max deg "
    "sum prod int lim lfloor lceil binom Re Im".split()
)
_BRACKETED = re.compile(r"\|[^|]*\||\\\|.*\\\||\\l[vV]ert .*")
_CLAIM = re.compile(r"\\(?:approx|ne|equiv|sim|cong|to)(?![A-Za-z])|\d ?: ?\d")
_COMMAND = re.compile(r"\\(?:begin|end)\{[a-z]*\}|\\[A-Za-z]+")
# Letters alone are words or the names of points, not products: "act" is not "cat". So are two
# capitals in a row and words of four letters anywhere.
_WORDS = re.compile(r"[A-Za-z]{2,}(?:(?:[ ']|-(?=[A-Za-z]{3}))[A-Za-z]+)*")
_NAME = re.compile(r"[A-Z]{2,}|[A-Za-z]{4,}")
_ITEM = re.compile(r"[,;=:&]|\\[{}\\]")
_PRODUCTS = frozenset("xyz")  # whose products are no words
_JOIN = re.compile(r",? ?(?:\\text[a-z]*\{ ?(?:and|or) ?\}|\b(?:and|or)\b) ?")  # of a list
_LETTER = re.compile(r"\\(?:text[a-z]*|mathrm)\{ ?([A-Za-z]) ?\}")
# What math-verify would ignore: numbers side by side, operators without a second operand.
_UNREAD = re.compile(r"\d \d|\d ?_|[-+*/^=]$")
_WHOLE_FONT = re.compile(rf"^ *{FONT.pattern} *$")
_BRACKETS = re.compile(r"\\.|[()\[\]{},;]")
_OPENING, _CLOSING = ("\\{", "(", "[", "{"), ("\\}", ")", "]", "}")


@functools.lru_cache(maxsize=4096)
def normalize_answer(text: str) -> str:
    r"""Return an answer in the one spelling in which two answers are compared.

    On top of `latex.plain`: without fonts (`\text`), spaces that say nothing and the capital of a
    word ("Even"); `(B)`, `B)` and `Option B` are B; round and square brackets of matrices are
    alike.
    """
    text = _MATRIX.sub(r"\\begin{pmatrix}\1\2\\end{pmatrix}", plain(text))
    while FONT.search(text):
        text = FONT.sub(r" \1 ", text)
    text = _PERCENT.sub(r"\\%", _FONT_SWITCH.sub("", " ".join(text.split())))
    chosen = _CHOSEN.fullmatch(text)
    text = chosen[1] if chosen else text
    text = _PRIMES.sub(lambda found: "'" * found[1].count("p"), text)
    text = _SPACE.sub(lambda found: found[1] or "", text)
    text = _CAPITAL.sub(lambda found: found[0].lower(), text.strip())
    choice = _CHOICE.fullmatch(text)
    return choice[1] if choice else text


def same_answer(answer: str, truth: str) -> bool:
    """Whether two answers agree in their spelling or as numbers, element by element in a tuple."""
    return compare(answer, truth) is True


def compare(answer: str, truth: str, depth: int = 0, *, any_order: bool = False) -> bool | None:
    """Whether two answers agree; None where only algebra can tell.

    Args: any_order: whether lists and sets agree in any order of their elements.
    """
    if answer.split() == truth.split():
        return bool(answer.strip())
    if max(len(answer), len(truth)) > LONGEST:
        return False
    number, truth_number = read_quantity(answer), read_quantity(truth)
    if number is not None and truth_number is not None:
        return same_quantity(number, truth_number)
    (formula, unit), (true_formula, true_unit) = map(split_unit, (plain(answer), plain(truth)))
    if unit and true_unit and unit != true_unit:
        return False
    spelled = normalize_answer(formula), normalize_answer(true_formula)
    if "" in spelled or spelled[0] == spelled[1]:
        return "" not in spelled
    formula, true_formula = (_JOIN.sub(", ", text) for text in (formula, true_formula))
    if depth == 0 and (choices := _labelled(answer, truth)):
        return any(compare(*pair, 1, any_order=any_order) is True for pair in choices)
    spaced = (_JOIN.sub(", ", plain(text)) for text in (answer, truth))
    bare = _without_left_side(depth == 0, *spaced)
    if bare is not None and depth < _DEEPEST:
        return compare(*bare, depth + 1, any_order=any_order)
    if _names(formula) != _names(true_formula) or _differ_in_letters(*spelled):
        in_order = _compare_elements(formula, true_formula, depth, any_order)
        return in_order or False
    return _compare_elements(formula, true_formula, depth, any_order)


def _labelled(answer: str, truth: str) -> list[tuple[str, str]]:
    """The pairs to compare where an answer or a truth is the label of a choice with its content.

    One of them must agree: the labels, or the contents.
    """
    answer, truth = (" ".join(FONT.sub(r" \1 ", plain(text)).split()) for text in (answer, truth))
    own, true = _LABELLED.fullmatch(answer), _LABELLED.fullmatch(truth)
    if own and true:
        return [(own[2], true[2])] if own[1] == true[1] else [("A", "B")]
    if true:
        return [(answer, true[1]), (answer, true[2])]
    return [(own[1], truth)] if own and len(normalize_answer(truth)) == 1 else []


_DEEPEST_BRACKETS = 12  # in one another: the parser's time doubles with each; MATH-500 has 2


def _depth(formula: str) -> int:
    """How deep the brackets of a formula are nested."""
    deepest = depth = 0
    for character in formula:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def for_algebra(answer: str, truth: str) -> tuple[str, str] | None:
    """Return the formulas that algebra compares where `compare` cannot tell, the truth's first.

    They have no units. None for text that is no formula (two words outside of `\\text`, numbers
    side by side) and for a formula that is nested too deep for the parser.
    """
    formulas = []
    for text, other in ((truth, answer), (answer, truth)):
        formula = _LETTER.sub(r"\1", _JOIN.sub(", ", split_unit(plain(text))[0]))
        formula = " ".join(formula.replace("$", " ").split())
        words = re.findall(r"(?<![A-Za-z\\])[A-Za-z]{4,}", FONT.sub("", formula))
        is_deep = _depth(formula) > _DEEPEST_BRACKETS
        if len(set(words) - CHANGES) > 1 or _UNREAD.search(formula) or is_deep:
            return None
        if "=" in formula and "=" not in other:
            *_, elements = _elements(formula)
            left = [_left_side(element, is_answer=text == answer) for element in elements]
            if all(left):
                formula = ", ".join(
                    element[end:] for element, end in zip(elements, left, strict=True)
                )
        formulas.append(formula)
    if len({bool(_CLAIM.search(formula)) for formula in formulas}) > 1:
        return None
    return formulas[0], formulas[1]


def _without_left_side(is_whole: bool, answer: str, truth: str) -> tuple[str, str] | None:
    """Both without the left side that one or both have; None if they have two different ones."""
    other = _left_side(truth)
    found = _left_side(answer, is_answer=is_whole and "=" not in truth)
    if not found and not other:
        return None
    if found and other and normalize_answer(answer[:found]) != normalize_answer(truth[:other]):
        return None
    return answer[found:], truth[other:]


def _left_side(text: str, *, is_answer: bool = False) -> int:
    """Where the left side that names a quantity ends; 0 if there is none.

    An answer to a ground truth without an equation may have, besides a name, a formula of two
    letters or more ("a + b = 5") or one with a function, a norm or brackets. One unknown with a
    coefficient, a power or a root is an equation still to be solved: 2x = 5. Numbers must be equal:
    1 + 1 = 2.
    """
    named = _LEFT_SIDE.match(text)
    if named or not is_answer:
        return named.end() if named else 0
    depth, stop = 0, 0
    for found in re.finditer(r"[({\[]|[)}\]]|[<>,;:]|\\(?:n|l|g)eq?(?![A-Za-z])|=", text[:LONGEST]):
        depth += (found[0] in "({[") - (found[0] in ")}]")
        if depth == 0 and found[0] == "=":
            stop = found.start()
            break
        if depth == 0 and found[0] not in ")}]":
            return 0
    left, unknown, is_function = text[:stop].strip(), set(), False
    words = set(re.findall(r"[A-Za-z]{2,}", _COMMAND.sub(" ", left)))
    if words & (CHANGES | {"is", "are"}) or any(
        len(word) > 3 for word in words & set(FONT.sub("", left).split())
    ):
        return 0
    for found in _UNKNOWN.finditer(FONT.sub(lambda own: own[1][:1], left)):
        if found[1] in GREEK[:-1] and found[1] != "pi":
            unknown.add(found[1])
        elif found[1]:
            is_function = is_function or found[1] in _FUNCTIONS
        elif found[2] not in "ei":
            unknown.add((found[2], found[3]))
            is_function = is_function or (found[2] in "fghFGHPE" and found[4] is not None)
    is_name = len(unknown) > 1 or (unknown and (is_function or _BRACKETED.fullmatch(left)))
    return stop + 1 if is_name else 0


def _names(text: str) -> list[str]:
    """The words and names of points in a formula, which algebra would take for products."""
    texts = [own for own in FONT.findall(text) if len(own) > 1]
    text = normalize_answer(text)
    items = (item.strip("()[] '\"!?") for item in _ITEM.split(_COMMAND.sub(r" \\ ", text)))
    words = [item for item in items if _WORDS.fullmatch(item) and not set(item) <= _PRODUCTS]
    return sorted([*texts, *words, *_NAME.findall(_COMMAND.sub(" ", text))])


def _differ_in_letters(answer: str, truth: str) -> bool:
    """Whether the answers differ in a way that math-verify ignores.

    They are two letters, one has a letter of the other in another case, or one has more primes.
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


def _compare_elements(answer: str, truth: str, depth: int, any_order: bool) -> bool | None:
    """Compare tuples, intervals, sets and lists, also with a number; None for anything else."""
    answer, truth = (_WHOLE_FONT.sub(r"\1", text) for text in (answer, truth))
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
    if any_order and not has_order and len(elements) <= _MOST_IN_ANY_ORDER:
        for element in elements:
            same = [i for i, other in enumerate(others) if compare(element, other, depth + 1)]
            if not same:
                break
            others.pop(same[0])
        if not others:
            return True
    return False if has_order and False in found else None
