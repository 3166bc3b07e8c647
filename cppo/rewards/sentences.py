r"""The number that words say: alone, in a sentence, at the end of a text.

Every function takes any string and never raises.
"""

from __future__ import annotations

import re
from fractions import Fraction

from cppo.rewards.latex import LONGEST, plain
from cppo.rewards.quantities import (
    CURRENCY,
    NUMBER,
    Quantity,
    number_of,
    one_form,
    read_quantity,
    with_unit,
)
from cppo.rewards.sums import worths_before
from cppo.rewards.units import CHANGES, FONT, LONGEST_UNIT, PERCENT, Unit, read_unit

# In front of a number "x =" and "x is" say nothing.
_ASIDE = re.compile(
    r"(?<![\w)\]}^\\.])(?:(?:[A-Za-z]|[A-Z]?[a-z]{3,}|[A-Z]{2,3})(?:_\{\w+\})? ?)?(?:=|\\approx) ?"
    r"|\b[a-zA-Z](?= is\b)"
)
_MINUS = re.compile(r"\b(?:negative|minus) (?=[\d.$])")
_BULLET = re.compile(r"^[ \t]*(?:[*\u2022]|[-+](?=.*\n|.*[A-Za-z])) +", re.MULTILINE)
# Tags, also those of a tokenizer, and the annotations of GSM8K's solutions.
_TAGS = re.compile(r"</?[a-z]{1,20}>|<\|[a-z_]{1,20}\|>|(?P<note><<[^<>\n]{1,200}>>)")
_POWER = re.compile(r"(?<![\\A-Za-z])([A-Za-z]+)\^\{([23])\}")
_MARKS = ' \n\t.,;:"()*'
# The words that may stand around the one number of an answer. Any other may change the number
# ("twice 5", "at least 5", "5 is wrong"), and there is no end of those.
_SAYS_NOTHING = frozenset(
    "the a an my our your his her its their this that it he she they we you there here so thus "
    "hence therefore then now finally final correct right answer answers result value solution "
    "sum total totals amount number count set is are was were will be equal equals to of about "
    "approximately approx around roughly exactly only just precisely in all altogether overall "
    "left remaining more each every per have has had get gets got find need needs for as old it's "
    "that's there's ratio probability fraction percentage area perimeter volume length width "
    "height distance speed age price cost mean median average option choice profit loss change "
    "interest savings revenue income earnings tip tax discount away apart long wide tall high "
    "deep old year-old years-old fewer less later longer older taller higher bigger larger "
    "faster cheaper shorter smaller lower slower younger earlier farther further wider deeper "
    "heavier".split()
)
_SAYS = ("is", "are", "=", "option", "choice")  # what the answer follows
_WINDOW = 300  # characters: no number in running text is longer
_IN_TEXT = re.compile(rf"(?P<sign>){CURRENCY}?{NUMBER}(?P<unit> ?\\?%)?", re.ASCII)
# A minus is a sign where nothing to subtract from comes before it: "= -5", "is - 5".
_SIGN = re.compile(r"(?:(?<![\w)\]}!%.])[-+]|(?:(?<=[=:(])|\b(?:is|are|equals|be|approx)\b) ?- )$")
# What makes a number part of another one, or of something else: in front of it, and behind it.
_BOUND_BEFORE = re.compile(
    r"(?:[_^{\\/*+!<|\u221a] ?|(?<![-=])> ?|[A-Za-z]\(?|\d[.:]"
    r"|\\(?!approx|to|implies|Rightarrow|therefore)[A-Za-z]+(?:[_^]\{[^{}]*\})? ?"
    r"|(?:\d[A-Za-z]|(?<!\d )\b(?!is|be|so|to)[a-z]{2}|[A-Za-z]\^\{[^{}]*\}) ?= ?"
    r"|(?:[\d)\]}!%]|(?<![A-Za-z])[A-Za-z]) ?- ?)$"
)
# Words beside a number that deny it, and all that make another number of it or of its sentence.
_DENYING = frozenset(
    "not never cannot neither nor no n't wrong incorrect false nobody nothing anything hardly lie "
    "fails misses lacks differs contradicts denies maybe perhaps".split()
)
_JOINS = frozenset("and or with where when such that more".split())
_CHANGING = (
    CHANGES
    | _DENYING
    | frozenset(
        "times least most twice thrice double triple quadruple quintuple under above below exceed "
        "exceeds half except but by beyond almost nearly up out between square cube one two three "
        "four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy "
        "eighty ninety as many much percent fraction ratio without zero mod".split()
    )
) - _JOINS
_JUST_BEFORE = _CHANGING - {"equals", "as"}
_BOUND_BEHIND = re.compile(
    r" ?(?:[*^!<>+|]|/(?![a-z]{2})|-(?=[\w(\\])|- [\d\\(]|\\(?!%|circ)|\}|[(_])"
    rf"| (?:{'|'.join(CHANGES - _JOINS)})\b| times (?!to\b)\w| more than \S*\d"
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|cannot|neither|nor|no|nobody|hardly|as [a-z]+ as"
    r"|(?:square|cube|root|half|double|twice) of (?:the|my) (?:answer|result|number))\b"
    r"|n['\u2019]t\b)[^.,;:\d]*$"
    # one of two numbers of a kind, the end of another one, and the number of a step
    r"|(?<![\d$.,])\d[\d.,]{0,30}(?: \w+)? or \W*$|\bbetween [^.;:]{1,40} and \W*$"
    r"|(?:\b(?:off|hundred|thousand|[mb]illion|step|eqn?|equation|problem|question|page|figure)\.?"
    r" |[A-Za-z]{3}-)\W*$",
    re.I,
)
# "18, not 17", "18 because 9 + 9 = 18", "18 and not 17".
_CLAUSE_END = re.compile(
    r"[,;:](?!\d)|(?<=\w) \("
    r"|\b(?:because|since|as|which|(?:and|but) not|not|rather than|instead of)\b"
)
_LAST_WORD = re.compile(r"([A-Za-z-]+)(?: (?:of|to|the|an?|by))*[ $]*$")
_DENIED_BEHIND = re.compile(
    r"\W*(?:(?:is|are|was|were) (?:not|wrong|incorrect|false)|(?:is|are|was)n['\u2019]t|wrong)\b"
    r"| ?\?| is a lie\b| below zero\b| at (?:most|least)\b"
    r"| (?:or|and) (?:more|less|fewer|higher|lower|above|below|an?)\b",
    re.I,
)


# "Janet makes ", "In May Tom Smith sold "; or, behind a number, "a week", "for this week".
_BEGINS = re.compile(r"[A-Z][\w'\u2019.]*,? (?:[A-Z][\w'\u2019.]*,? ){0,4}[a-z]{2,}\b")
_GOES_ON = re.compile(r"\W*(?:an?|of|for|from|on|in|at|to|by|per|each|every|with) [a-z]")
# What stands in brackets behind a number or a word says no more, without a variable in it.
_IN_BRACKETS = re.compile(
    r"(?<=[\w.%]) \((?![^()]*(?<![\w.])(?![aI]\b|[xX] \d)[A-Za-z](?![\w.]))"
    r"([^()]*(?:[A-Za-z]{2}|i\.e\.)[^()]*|[^()]*[-+*/=][^()]*(?=\) [a-z]{2}))\)(?! ?[=*/+^-])"
)


def only_number(text: str, *, in_sentences: bool = False) -> Quantity | None:
    """Return the one number of a text: alone, with its unit, or among words that change nothing
    ("The answer is 18 apples").

    None for several numbers, and for words that are not known to change nothing.

    Args:
        in_sentences: whether a sentence of any words counts ("Janet makes $18 every day"), as long
            as none of them is known to change or to deny a number.
    """
    quantity = read_quantity(text, letters=True)
    if (quantity is not None and quantity.is_known) or len(text) > LONGEST:
        return quantity
    text = _running(text)
    if in_sentences and (front := worths_before(text)) is not None:
        return _last_side(front, text.rpartition("=")[2])
    text = _ASIDE.sub(" ", text)
    found = list(_IN_TEXT.finditer(text))
    place = _in_its_place(found[0], text) if len(found) == 1 else None
    if place is None:
        return quantity
    # With a unit in front, any words are of what the number counts: "18 students passed".
    is_of = place[0].unit not in ("", PERCENT) and not text[: found[0].start()].strip()
    is_sentence = is_of or _BEGINS.match(text) or _GOES_ON.match(place[1])
    says_no_more = _say_nothing(place[1]) or (
        in_sentences and is_sentence and not _has_word(place[1], _CHANGING)
    )
    return place[0] if says_no_more else quantity


def _has_word(text: str, words: frozenset[str]) -> bool:
    return not words.isdisjoint(word.strip(_MARKS).lower() for word in text.split())


def _last_side(front: tuple[str, set[Fraction | None]], last: str) -> Quantity | None:
    """The number of the last side of an equation, if the others are worth the same."""
    found = _IN_TEXT.search(last)
    place = _in_its_place(found, last) if found and not last[: found.start()].strip() else None
    if found is None or place is None or re.search(r"[,;:.] .*\d", last[found.end() :]):
        return None
    if _has_word(front[0], _DENYING) or is_denied(front[0], ""):
        return None
    worths, number = front[1], place[0]
    slack = number.slack
    decimals = re.search(r"\.(\d+)", found[0])
    if decimals:  # as people round
        slack = Fraction(1, 2 * 10 ** len(decimals[1]))
    value = number.value
    wanted = (value, value / 100 if number.unit == PERCENT else value)
    differ = [w for w in worths if w is None or min(abs(w - x) for x in wanted) > slack]
    return None if differ else number


def _say_nothing(words: str) -> bool:
    stripped = (word.strip(_MARKS) for word in words.split())
    return all(word.lower() in _SAYS_NOTHING or word in ("", "I") for word in stripped)


def said(text: str) -> str:
    """Return what follows the words at the beginning of a text that say nothing ("The set is").

    "" if it does not begin with such words.
    """
    words = text[:LONGEST].split(" ")
    start = next((i for i, word in enumerate(words) if not _say_nothing(word)), len(words))
    return " ".join(words[start:]) if start and words[start - 1].lower() in _SAYS else ""


def last_number(text: str) -> Quantity | None:
    """Return the last number in a text, with the unit behind it.

    None if it is part of something else (a power, a sum, a product), or if the words beside it say
    that it is not the answer or another number.
    """
    end = max(text.rfind(digit) for digit in "0123456789") + 1
    start = max(0, end - _WINDOW)
    text = _running(_BULLET.sub(" ", text[start : end + LONGEST_UNIT]))
    found = list(_IN_TEXT.finditer(text))
    if not found or (start > 0 and found[-1].start() == 0):
        return None  # there is none, or it is longer than anything that is read
    place = _in_its_place(found[-1], text)
    return place and place[0]


def first_number(text: str) -> Quantity | None:
    """Return the first number in a text, as `last_number` does the last."""
    text = _running(text[:_WINDOW])
    found = _IN_TEXT.search(text)
    place = found and _in_its_place(found, text)
    return place and place[0]


def stated_number(text: str) -> Quantity | None:
    """Return the number of what follows "the answer is": the first if it stands alone up to the end
    of its clause ("18, as 9 + 9 = 18"), else the last.
    """
    clause = _CLAUSE_END.split(text[:_WINDOW], maxsplit=1)[0]
    is_alone = len(list(_IN_TEXT.finditer(_running(clause)))) == 1
    return only_number(text) or (first_number(clause) if is_alone else last_number(text))


def _running(text: str) -> str:
    """Running text in one spelling, without tags, fonts and bold print."""
    text = plain(_TAGS.sub(lambda tag: "" if tag["note"] else ". ", text))
    text = FONT.sub(r" \1 ", text).replace("**", " ").replace(" ^", "^")
    text = _IN_BRACKETS.sub(lambda own: own[0] if _has_word(own[1], _CHANGING) else "", text)
    text = one_form(_POWER.sub(_in_words, text))
    return _MINUS.sub("-", " ".join(text.split()))


def _in_words(found: re.Match[str]) -> str:
    """The power of a unit without a digit: "square cm"."""
    unit = read_unit(f" {found[1]}", letters=True)
    is_unit = unit is not None and unit.is_known
    return f"{'square' if found[2] == '2' else 'cubic'} {found[1]}" if is_unit else found[0]


def is_denied(before: str, behind: str) -> bool:
    """Whether the words beside an answer say that it is none, or another one."""
    before, behind = before[-_WINDOW:], behind[:_WINDOW]
    word = _LAST_WORD.search(before)
    is_changed = word is not None and word[1].lower() in _JUST_BEFORE
    return is_changed or bool(_DENIED_BEFORE.search(before) or _DENIED_BEHIND.match(behind))


def _in_its_place(found: re.Match[str], text: str) -> tuple[Quantity, str] | None:
    """A number in a sentence, with its unit, and all other words; None if it is bound or denied."""
    before, behind = text[: found.start()][-_WINDOW:], text[found.end() :][:_WINDOW]
    sign = _SIGN.search(before)
    number = number_of(found, negative=sign is not None and "-" in sign[0])
    if sign is not None:
        before = before.rstrip()[:-1]
    glued = re.match(r"[A-Za-z]*", behind)
    is_bound = _BOUND_BEFORE.search(before) or _BOUND_BEHIND.match(behind)
    is_circle = behind.startswith("^{\\circ")
    if number is None or (is_bound and not is_circle) or is_denied(before, behind):
        return None
    unit = Unit(Fraction(1), PERCENT if found["unit"] else "")
    words = [] if unit.name else re.split(r"[.,;:?!)]", behind)[0].split(" ")[:5]
    rest = behind
    for stop in range(len(words), 0, -1):
        own = read_unit(" ".join(words[:stop]), letters=True)
        says = own and own.is_known and (own.name or own.scale != 1)
        if own and says and not (words[1:stop] == ["in"] and words[2:]):
            unit, rest = own, behind[len(" ".join(words[:stop])) :]
            break
    else:
        if glued and glued[0] or is_circle:
            return None
    of = re.match(r" of ([a-z]+)(?![a-z])", rest)  # cups of flour
    if of and unit.scale == 1 and unit.name not in ("", PERCENT) and not is_denied(of[1], ""):
        rest = rest[of.end() :]
    return with_unit(number, unit, found["currency"]), f"{before} {rest}"
