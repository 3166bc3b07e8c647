r"""Numbers, exact, with their units.

A whole number, a fraction and a mixed fraction are what they say. A number with a decimal part
stands for its neighbours as well: for those within a relative 1e-8 and, from six significant digits
on, for those that round to it (0.333333 for 1/3). Every function takes any string and never raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from cppo.rewards.latex import LONGEST, plain
from cppo.rewards.units import CURRENCIES, FONT, PERCENT, Unit, read_unit, same_unit

TOLERANCE = Fraction(1, 10**8)
ROUNDED_DIGITS = 6
LARGEST = 1000  # digits of a number, and the largest exponent of ten

# Thousands are set apart by commas or by spaces, in groups of three: 12,000 and 12 000 are one
# number; 3 4 and 1,2 are two. No number has more groups than LARGEST digits, so that a search does
# not read a text of nothing but groups again from every one of them.
_DIGITS = (
    r"(?:(?:\d{1,3}(?:,\d{3}){1,334}(?!,?\d)|[1-9]\d{0,2}(?: \d{3}){1,334}(?! ?\d)|\d+)(?:\.\d*)?"
    r"|\.\d+)"
)
_SIMPLE = rf"{_DIGITS}(?:[eE][-+]?\d+)?"
# One form of several for a number, 1/2 and 5e3, so that all patterns read only these.
_REPEATING = re.compile(r"(\d{0,20})\.(\d{0,20})\\(?:overline|bar|dot) ?\{?(\d{1,20})\}?(?!\d)")
_TEN = r"10 ?(?:\^|\*\*) ?\{?([-+]?\d+)\}?"
_FORMS = (
    (re.compile(rf"(?<![\d.,])({_DIGITS}) ?(?:\\times|\\cdot|[*xX]) ?{_TEN}"), r"\1e\2"),
    (re.compile(rf"(?<![\d.,]){_TEN}"), r"1e\1"),
    (re.compile(rf"(\d?) ?\\frac\{{([-+]?{_SIMPLE})\}}\{{({_SIMPLE})\}}"), r"\1 \2/\3"),
)
CURRENCY = rf"(?P<currency>{'|'.join(map(re.escape, CURRENCIES))})"
NUMBER = (
    rf"(?:(?:(?P<whole>\d+) (?=[1-9]\d* ?/ ?\d))?(?P<over>{_SIMPLE}) ?/ ?(?P<under>{_SIMPLE})"
    rf"|(?P<simple>{_SIMPLE}))"
)
_QUANTITY = re.compile(
    rf"(?P<sign>[-+]?) ?(?:{CURRENCY} ?(?P<inner>[-+]?))? ?{NUMBER}(?P<unit>.*)", re.ASCII
)
_SIGN_IN_TEXT = re.compile(r"\\text\{ ?\\?(\$|[A-Z]{3}|Rs\.?) ?\} ?(?=\d)")
_WHOLE_TEXT = re.compile(FONT.pattern)  # "\text{18 dollars}"


@dataclass(frozen=True)
class Quantity:
    """A number with its unit.

    Args:
        value: the number as it is written.
        slack: how far from it the number may be that it stands for; 0 if it is exact.
        unit: one name per unit ("cm", "percent"); "" for none.
        is_known: whether the unit is one, or the plural of what is counted. Any other words count
            only where the ground truth has the same.
    """

    value: Fraction
    slack: Fraction
    unit: str = ""
    is_known: bool = True


def same_quantity(answer: Quantity, truth: Quantity) -> bool:
    """Whether two numbers are equal as the module says, in the same unit or one without a unit.

    A percentage equals a number without a unit in either reading: 50 % is 50, and it is 0.5. An
    answer in another base than ten needs a truth in that base.
    """
    units = {answer.unit, truth.unit} - {""}
    if len(units) == 2 and same_unit(*units):
        units = {truth.unit}
    is_base = answer.unit.startswith("base")
    if len(units) > 1 or (not truth.unit and (is_base or not answer.is_known)):
        return False
    readings = [answer.value - truth.value]
    if units == {PERCENT} and not (answer.unit and truth.unit):
        share, number = (answer, truth) if answer.unit else (truth, answer)
        readings.append(share.value / 100 - number.value)
    return min(map(abs, readings)) <= max(answer.slack, truth.slack)


def read_quantity(text: str, *, letters: bool = False) -> Quantity | None:
    r"""Return the number that a text is, with its unit: `-1,234.5`, `1\frac{1}{2} \text{ cm}`.

    Args: letters: as in `units.read_unit`.
    """
    if len(text) > LONGEST:
        return None
    text = _SIGN_IN_TEXT.sub(r"\1", plain(text))
    whole = _WHOLE_TEXT.fullmatch(text)
    found = _QUANTITY.fullmatch(one_form(plain(whole[1]) if whole else text).strip())
    if found is None:
        return None
    unit = read_unit(found["unit"], letters=letters or whole is not None)
    number = number_of(found, negative=(found["sign"] == "-") != (found["inner"] == "-"))
    if unit is None or number is None:
        return None
    return with_unit(number, unit, found["currency"])


def one_form(text: str) -> str:
    r"""Return a text with its numbers in one form: 1/2 for \frac{1}{2}, 5e3 for 5 \times 10^{3}."""
    text = _REPEATING.sub(_fraction, text)
    for pattern, form in _FORMS:
        text = pattern.sub(form, text)
    return text


def _fraction(found: re.Match[str]) -> str:
    """The fraction that a repeating decimal is."""
    whole, start, period = found[1] or "0", found[2], found[3]
    nines = 10 ** len(period) - 1
    over = int(whole + start) * nines + int(period)
    return f"{over}/{nines * 10 ** len(start)}"


def with_unit(number: Quantity, unit: Unit, currency: str | None) -> Quantity:
    name = f"{CURRENCIES[currency]} {unit.name}".strip() if currency else unit.name
    value, slack = number.value * unit.scale, number.slack * unit.scale
    return Quantity(value, slack, name, unit.is_known)


def number_of(found: re.Match[str], negative: bool) -> Quantity | None:
    """Return the number that `NUMBER` found; None if it is too long, divides by zero or is a mixed
    fraction that is not proper (1 3/2).
    """
    simple, whole = found["simple"], found["whole"]
    number = _decimal(simple) if simple else _ratio(found["over"], found["under"])
    if number is not None and whole:
        front = _decimal(whole)
        if front is None or not 0 < number.value < 1:
            return None
        number = Quantity(front.value + number.value, Fraction(0))
    return Quantity(-number.value, number.slack) if number is not None and negative else number


def _ratio(over: str, under: str) -> Quantity | None:
    top, bottom = _decimal(over), _decimal(under)
    if top is None or bottom is None or bottom.value == 0:
        return None
    value = top.value / bottom.value
    return Quantity(value, abs(value) * TOLERANCE if top.slack or bottom.slack else Fraction(0))


def _decimal(text: str) -> Quantity | None:
    """`1,234.5` or `1.5e3`; None beyond `LARGEST` digits or powers of ten."""
    mantissa, _, exponent = text.lower().replace(",", "").replace(" ", "").partition("e")
    if max(len(mantissa), len(exponent)) > LARGEST:
        return None
    shift = int(exponent or "0")
    if abs(shift) > LARGEST:
        return None
    value = Fraction(mantissa) * Fraction(10) ** shift
    if value.denominator == 1:
        return Quantity(value, Fraction(0))
    digits = mantissa.replace(".", "").lstrip("+-0")
    last_place = Fraction(10) ** (shift - len(mantissa.partition(".")[2]))
    rounding = last_place / 2 if len(digits) >= ROUNDED_DIGITS else Fraction(0)
    return Quantity(value, max(abs(value) * TOLERANCE, rounding))
