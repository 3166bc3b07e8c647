r"""The unit behind a number: `\text{ cm}^2`, `^\circ`, `\%`, ` apples`, `_{2}` (a base)."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

LONGEST_UNIT = 80  # characters
PERCENT = "percent"
# Words behind a number that multiply it. Plurals in -s are read as well.
_WORTH = (
    "ten:10 dozen:12 gross:144 hundred:1e2 thousand:1e3 lakh:1e5 million:1e6 mn:1e6 crore:1e7 "
    "billion:1e9 bn:1e9 trillion:1e12 tn:1e12 half:1/2 halve:1/2 third:1/3 fourth:1/4 quarter:1/4 "
    "fifth:1/5 sixth:1/6 seventh:1/7 eighth:1/8 ninth:1/9 tenth:1/10 eleventh:1/11 twelfth:1/12 "
    "sixteenth:1/16 twentieth:1/20 hundredth:1/100 thousandth:1/1000 millionth:1/1000000"
)
SCALES = {word: Fraction(worth) for word, _, worth in (x.partition(":") for x in _WORTH.split())}

# A unit's one name and its others. Plurals in -s are read as well.
_NAMES = (
    "m:meter,metre cm:centimeter,centimetre mm:millimeter,millimetre km:kilometer,kilometre "
    "in:inch,inches ft:foot,feet yd:yard nm:nanometer,nanometre mi:mile g:gram kg:kilogram,kilo "
    "mg:milligram lb:lbs,pound oz:ounce ton tonne acre hectare:ha s:sec,second ms:millisecond "
    "min:minute h:hr,hour day week month year:yr decade century:centuries am pm o'clock knot "
    "L:l,liter,litre mL:ml,milliliter,millilitre gallon:gal quart:qt pint:pt cup tablespoon:tbsp "
    "teaspoon:tsp Hz:hertz kHz MHz GHz rpm N:newton J:joule kJ cal:calorie kcal Pa:pascal kPa "
    "atm W:watt kW:kilowatt V:volt A:ampere,amp mA ohm mol:mole kelvin celsius fahrenheit "
    "rad:radian degree:deg bit byte KB MB GB unit percent:%,pct dollar:USD,buck "
    "cent:\xa2,penny,pennies euro:EUR sterling:GBP yen:JPY yuan:RMB,CNY rupee:INR peso "
    "person:people child:children man:men woman:women way time goose:geese mouse:mice die:dice "
    "tooth:teeth ox:oxen kWh hp:horsepower"
)
CURRENCIES = {"US$": "dollar", "$": "dollar", "\u20ac": "euro", "\u00a3": "sterling"}
CURRENCIES |= {"\u00a5": "yen", "\u20b9": "rupee", "Rs.": "rupee", "USD": "dollar", "EUR": "euro"}
_KNOWN = {
    name: names.partition(":")[0] for names in _NAMES.split() for name in re.split("[:,]", names)
}
_KNOWN |= CURRENCIES
# Words behind a number that make another number of it, or go on with one.
CHANGES = frozenset(
    "and or not plus minus negative over more less than squared cubed factorial choose "
    "modulo base root where when with such that sqrt sin cos tan sinh cosh tanh log ln exp "
    "infinity always equals exceeds does".split()
)
# Plurals behind a number that are no unit: those of number words, and verbs and words that deny.
_NO_UNIT = re.compile(
    r"(?:[a-z]*illion|myriad|pair|score|double|triple|quadruple|reciprocal|minuse|negative|and|or|"
    r"maybe|fail|misse|lie|lack|differ|contradict|denie|exceed|equal|doe|i|ha|wa)s?"
    r"|wrong|incorrect|false|are|were|no|never|below|above|under|at|up|for|than|but"
)
# Plurals without -s.
_PLURAL = re.compile(
    r"[a-z]*(?:men|people|children|fish|feet|teeth|geese|mice|dice|lice|oxen|craft)"
    r"|sheep|deer|cattle|series|species|salmon|trout|shrimp|moose|offspring|cacti|fungi|bacteria"
)
_MORE = re.compile(r"^ ?(?:more|fewer|less|other|additional|extra) (?=[A-Za-z])")
_BASE = re.compile(r" ?_\{(\d+)\}")
_GROUP = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
FONT = re.compile(r"\\(?:(?:text|math)[a-z]*|mbox|hbox|operatorname)" + _GROUP)
_TEXT = re.compile(r"\\(?:text[a-z]*|mathrm|mbox|hbox)" + _GROUP)
_START = re.compile(rf" ?(?:{_TEXT.pattern}|\^\{{\\circ|\\?%)")
_REWRITTEN = (
    (re.compile(r"\^\{?\\circ ?\}? ?"), " degree "),
    (re.compile(r"\bdegrees? (?:C\b|[Cc]elsius)"), "celsius"),
    (re.compile(r"\bdegrees? (?:F\b|[Ff]ahrenheit)"), "fahrenheit"),
    (re.compile(r"\\?%|\bper ?cent\b"), f" {PERCENT} "),
    (re.compile(r"\^\{(-?\d)\}"), r"^\1"),
    (re.compile(r"\b(?:square|sq)\b\.? ([A-Za-z]+)|\b([A-Za-z]+) squared\b"), r"\1\2^2"),
    (re.compile(r"\b(?:cubic|cu)\b\.? ([A-Za-z]+)|\b([A-Za-z]+) cubed\b"), r"\1\2^3"),
    (re.compile(r"\b([ap])\. ?m\b\.?"), r"\1m"),
    (re.compile(r"\bmph\b"), "mi / h"),
    (re.compile(r"\bkph\b"), "km / h"),
    (re.compile(r"\bper\b|/"), " / "),
)
_WORD = re.compile(r"([A-Za-z'$%\u00a2\u20ac\u00a3\u00a5-]+)\.?(\^-?\d)?")


class Unit(NamedTuple):
    """What follows a number.

    Fields: scale (the factor that its number words say: 12 for "dozen"), name (one for each unit;
        "" for none), is_known (whether every word is a unit listed here or the plural of what is
        counted; other words are a unit only where the ground truth has the same).
    """

    scale: Fraction
    name: str
    is_known: bool = True


def read_unit(text: str, *, letters: bool = False) -> Unit | None:
    r"""Return the unit that the text behind a number is.

    Args:
        text: in the spelling of `latex.plain`: `^{\circ}`, ` \text{cm}^{2}`, ` million dollars`.
        letters: whether letters outside of `\text` are units and not variables (`5 m`, a length).
    Returns: the unit, with an empty name for no text; None for text that is not a unit: letters
        that may be variables (`2x`), operators, further numbers.
    """
    if len(text) > LONGEST_UNIT:
        return None
    base = _BASE.fullmatch(text)
    if base:
        return Unit(Fraction(1), "" if base[1] == "10" else f"base {base[1]}")
    unit = re.sub(" +", " ", _TEXT.sub(r" \1", text))
    is_text, is_apart = letters or unit != text, unit[:1] == " "
    for pattern, name in _REWRITTEN:
        unit = pattern.sub(name, unit)
    words, scale = _MORE.sub(" ", unit).split(), Fraction(1)
    while words and _singular(words[0]) in SCALES:
        scale *= SCALES[_singular(words.pop(0))]
    if words[-1:] == ["/"]:
        return None
    names, known = [], []
    # "gallons of paint" are gallons.
    of = words.index("of") if "of" in words[1:-1] else len(words)
    words, what = words[:of], words[of:]
    for word in words:
        own = (word, True) if word == "/" else _name(word, is_text, is_apart, "/" in words)
        if own is None:
            return None
        names.append(own[0])
        known.append(own[1])
    # Words before a unit or a plural say of what kind it is: "different ways".
    is_known = all(known[i] for i in range(len(names)) if names[i + 1 : i + 2] in ([], ["/"]))
    if what and not (is_known and all(_name(word, is_text, True, False) for word in what[1:])):
        return None
    return Unit(scale, " ".join(names), is_known and names.count(PERCENT) < 2)


def same_unit(one: str, other: str) -> bool:
    """Whether two names are one unit, or one of them also says its kind: different ways."""
    longer, shorter = sorted((f" {one}", f" {other}"), key=len, reverse=True)
    return one == other or ("/" not in longer and longer.endswith(shorter))


def split_unit(text: str) -> tuple[str, str]:
    r"""Return a formula and the unit behind it, or the currency before it; "" for none.

    Args: text: in the spelling of `latex.plain`: `3\sqrt{5} \text{ cm}`.
    """
    if text.startswith("$"):
        return text[1:].lstrip(), CURRENCIES["$"]
    for start in _START.finditer(text, max(1, len(text) - LONGEST_UNIT)):
        formula = text[: start.start()].rstrip()
        unit = read_unit(text[start.start() :])
        is_sign = start[1] is None
        if (
            unit is not None
            and unit.scale == 1
            and unit.is_known
            and (is_sign or re.search(r"\d", formula))
        ):
            return formula, unit.name
    return text, ""


def _singular(word: str) -> str:
    lower = word.lower().rstrip(".")
    return lower[:-1] if len(lower) > 3 and lower.endswith("s") and lower != "gross" else lower


def _name(word: str, is_text: bool, is_apart: bool, is_ratio: bool) -> tuple[str, bool] | None:
    """The one name of a word of a unit, and whether it is a known unit or a plural.

    None where the word may be something else.
    """
    found = _WORD.fullmatch(word)
    if found is None:
        return None
    letters, power = found[1], found[2] or ""
    lower, singular = letters.lower(), _singular(letters)
    names = (letters, lower, singular) if len(letters) > 1 else (letters,)  # no M, no G
    known = next((_KNOWN[name] for name in names if name in _KNOWN), None)
    if known is not None:
        may_be_variable = len(letters) == 1 and letters.isalpha()
        is_unit = is_text or not may_be_variable or (is_apart and is_ratio)
        return (known + power, True) if is_unit else None
    if (
        lower in CHANGES
        or _NO_UNIT.fullmatch(lower)
        or singular in SCALES
        or len(letters) < (2 if is_text else 4)
        or not (is_text or is_apart)
    ):
        return None
    is_plural = len(lower) > 3 and lower.isalpha() and lower.endswith("s")
    is_plural = is_plural and not lower.endswith(("ss", "us", "is", "ths"))
    return singular + power, is_plural or _PLURAL.fullmatch(lower) is not None
