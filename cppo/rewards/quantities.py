r"""Numbers in text, exact, with their units.

A whole number, a fraction and a mixed fraction are what they say. A number with a decimal part
stands for its neighbours as well: for those within a relative 1e-8 and, from six significant digits
on, for those that round to it (0.333333 for 1/3). Every function takes any string and never raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from cppo.rewards.latex import LONGEST, plain
from cppo.rewards.units import CHANGES, CURRENCIES, FONT, PERCENT, read_unit

TOLERANCE = Fraction(1, 10**8)
ROUNDED_DIGITS = 6
LARGEST = 1000  # digits of a number, and the largest exponent of ten

# Thousands are set apart by commas or by spaces, in groups of three: 12,000 and 12 000 are one
# number; 3 4 and 1,2 are two.
_SIMPLE = (
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!,?\d)|[1-9]\d{0,2}(?: \d{3})+(?! ?\d)|\d+)(?:\.\d*)?|\.\d+)"
    r"(?:[eE][-+]?\d+)?"
)
_TEN = r"10 ?(?:\^|\*\*) ?\{?"
_NUMBER = (
    rf"(?:(?P<mantissa>{_SIMPLE}) ?(?:\\times|\\cdot|[*xX]) ?{_TEN}(?P<exponent>[-+]?\d+)\}}?"
    rf"|{_TEN}(?P<power>[-+]?\d+)\}}?"
    r"|(?P<whole>\d+)(?: ?\\frac\{(?P<over>\d+)\}\{(?P<under>\d+)\}"
    r"| (?P<top>[1-9]\d*) ?/ ?(?P<bottom>\d+))"
    rf"|\\frac\{{(?P<numerator>[-+]?{_SIMPLE})\}}\{{(?P<denominator>[-+]?{_SIMPLE})\}}"
    rf"|(?P<left>{_SIMPLE}) ?/ ?(?P<right>{_SIMPLE})"
    rf"|(?P<simple>{_SIMPLE}))"
)
_CURRENCY = rf"(?P<currency>{'|'.join(map(re.escape, CURRENCIES))})"
_QUANTITY = re.compile(
    rf"(?P<sign>[-+]?) ?(?:{_CURRENCY} ?(?P<inner>[-+]?))? ?{_NUMBER}(?P<unit>.*)", re.ASCII
)
# In front of a number "x =" says nothing, and neither do "**" and the power of a unit around it.
_ASIDE = re.compile(
    r"(?:\\?[A-Za-z]+(?:_\{\w+\})? ?)?(?:=|\\approx) ?|\*\*|(?<=[A-Za-z])\^\{-?\d\}"
)
_CALL = re.compile(r"[A-Za-z]\(")
_BETWEEN_WORDS = re.compile(r"[\s.,;:?'\"()/-]+")
_WINDOW = 300  # characters: no number in running text is longer
# Inside of text a sign counts only where nothing to subtract from comes before it: "10 - 5" ends
# in 5, "= -5" in -5.
_IN_TEXT = re.compile(
    rf"(?:(?<![\w)\]}}.])(?P<sign>[-+]))?{_CURRENCY}?{_NUMBER}(?P<unit> ?\\?%)?", re.ASCII
)


@dataclass(frozen=True)
class Quantity:
    """A number with its unit.

    Args:
        value: the number as it is written.
        slack: how far from it the number may be that it stands for; 0 if it is exact.
        unit: one name per unit ("cm", "percent"); "" for none.
    """

    value: Fraction
    slack: Fraction
    unit: str = ""


def same_quantity(answer: Quantity, truth: Quantity) -> bool:
    """Whether two numbers are equal as the module says, in the same unit or one without a unit.

    A percentage equals a number without a unit in either reading: 50 % is 50, and it is 0.5. An
    answer in another base than ten needs a truth in that base.
    """
    units = {answer.unit, truth.unit} - {""}
    if len(units) > 1 or (answer.unit.startswith("base") and not truth.unit):
        return False
    readings = [answer.value - truth.value]
    if units == {PERCENT} and not (answer.unit and truth.unit):
        share, number = (answer, truth) if answer.unit else (truth, answer)
        readings.append(share.value / 100 - number.value)
    return min(map(abs, readings)) <= max(answer.slack, truth.slack)


def read_quantity(text: str) -> Quantity | None:
    r"""Return the number that a text is, with its unit: `-1,234.5`, `1\frac{1}{2} \text{ cm}`."""
    if len(text) > LONGEST:
        return None
    found = _QUANTITY.fullmatch(plain(text))
    if found is None:
        return None
    unit = read_unit(found["unit"])
    number = _number(found, negative=(found["sign"] == "-") != (found["inner"] == "-"))
    if unit is None or number is None:
        return None
    scale, name = unit
    if found["currency"]:
        name = f"{CURRENCIES[found['currency']]} {name}".strip()
    return Quantity(number.value * scale, number.slack * scale, name)


def only_number(text: str) -> Quantity | None:
    """Return the one number among the words of a text ("about 18 apples").

    None for several numbers, and for what may be a formula or change the number: operators,
    commands, single letters, words like "squared".
    """
    quantity = read_quantity(text)
    if quantity is not None or len(text) > LONGEST:
        return quantity
    text = _ASIDE.sub("", FONT.sub(r" \1 ", plain(text)))
    found = list(_IN_TEXT.finditer(text))
    if len(found) != 1 or _CALL.search(text):
        return None
    words = _BETWEEN_WORDS.split(f"{text[: found[0].start()]} {text[found[0].end() :]}")
    return _quantity_in_text(found[0]) if all(map(_is_word, words)) else None


def _is_word(word: str) -> bool:
    if len(word) < 2 and word.isascii():
        return word in ("", *"aAI", *"mgshlLNJWVKCF")
    return word.isalpha() and word.lower() not in CHANGES


def last_number(text: str) -> Quantity | None:
    """Return the last number in a text, with its signs of percent and currency, if it has them."""
    end = max(text.rfind(digit) for digit in "0123456789") + 1
    start = max(0, end - _WINDOW)
    found = list(_IN_TEXT.finditer(plain(text[start : end + 8])))
    if not found or (start > 0 and found[-1].start() == 0):
        return None  # there is none, or it is longer than anything that is read
    return _quantity_in_text(found[-1])


def _quantity_in_text(found: re.Match[str]) -> Quantity | None:
    number = _number(found, negative=found["sign"] == "-")
    if number is None:
        return None
    unit = PERCENT if found["unit"] else CURRENCIES.get(found["currency"], "")
    return Quantity(number.value, number.slack, unit)


def _number(found: re.Match[str], negative: bool) -> Quantity | None:
    """The number that `_NUMBER` found; None if it is too long or divides by zero."""
    part = found.groupdict()
    if part["simple"]:
        number = _decimal(part["simple"])
    elif part["mantissa"] or part["power"]:
        number = _decimal(part["mantissa"] or "1", part["exponent"] or part["power"])
    elif part["whole"]:
        number = _mixed(part["whole"], part["over"] or part["top"], part["under"] or part["bottom"])
    else:
        number = _ratio(part["numerator"] or part["left"], part["denominator"] or part["right"])
    if number is None or not negative:
        return number
    return Quantity(-number.value, number.slack)


def _mixed(whole: str, over: str, under: str) -> Quantity | None:
    """A whole number and a proper fraction: 1 1/2 is 3/2, and 1 3/2 is nothing."""
    front, fraction = _decimal(whole), _ratio(over, under)
    if front is None or fraction is None or not 0 < fraction.value < 1:
        return None
    return Quantity(front.value + fraction.value, Fraction(0))


def _ratio(over: str, under: str) -> Quantity | None:
    top, bottom = _decimal(over), _decimal(under)
    if top is None or bottom is None or bottom.value == 0:
        return None
    value = top.value / bottom.value
    return Quantity(value, abs(value) * TOLERANCE if top.slack or bottom.slack else Fraction(0))


def _decimal(text: str, power: str = "0") -> Quantity | None:
    """`1,234.5` or `1.5e3` times a power of ten; None beyond `LARGEST` digits or powers."""
    mantissa, _, exponent = text.lower().replace(",", "").replace(" ", "").partition("e")
    if max(len(mantissa), len(exponent), len(power)) > LARGEST:
        return None
    shift = int(exponent or "0") + int(power)
    if abs(shift) > LARGEST:
        return None
    value = Fraction(mantissa) * Fraction(10) ** shift
    if value.denominator == 1:
        return Quantity(value, Fraction(0))
    digits = mantissa.replace(".", "").lstrip("+-0")
    last_place = Fraction(10) ** (shift - len(mantissa.partition(".")[2]))
    rounding = last_place / 2 if len(digits) >= ROUNDED_DIGITS else Fraction(0)
    return Quantity(value, max(abs(value) * TOLERANCE, rounding))
