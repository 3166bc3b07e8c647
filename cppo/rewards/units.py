r"""The unit behind a number: `\text{ cm}^2`, `^\circ`, `\%`, ` apples`, `_{2}` (a base)."""

from __future__ import annotations

import re

LONGEST_UNIT = 80  # characters
PERCENT = "percent"
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
SCALES["trillion"] = 10**12

# A unit's one name and its others. Plurals in -s are read as well.
_NAMES = {
    **{"m": "meter metre", "cm": "centimeter centimetre", "mm": "millimeter millimetre"},
    **{"km": "kilometer kilometre", "in": "inch inches", "ft": "foot feet", "yd": "yard"},
    **{"mi": "mile", "g": "gram", "kg": "kilogram", "mg": "milligram", "lb": "lbs pound"},
    **{"oz": "ounce", "s": "sec second", "min": "minute", "h": "hr hour"},
    **{"L": "l liter litre", "mL": "ml milliliter millilitre", "mph": "", "Hz": "hertz"},
    **{"N": "newton", "J": "joule", "W": "watt", "kW": "kilowatt", "V": "volt", "A": "ampere amp"},
    **{"K": "kelvin", "celsius": "", "fahrenheit": "", "rad": "radian", "degree": "deg"},
    **{PERCENT: "% pct", "dollar": "USD", "cent": "\u00a2", "euro": "EUR", "sterling": "GBP"},
    **{"yen": "JPY", "day": "", "week": "", "year": "yr"},
}
CURRENCIES = {"US$": "dollar", "$": "dollar", "\u20ac": "euro", "\u00a3": "sterling"}
CURRENCIES["\u00a5"] = "yen"
_KNOWN = {name: unit for unit, names in _NAMES.items() for name in (unit, *names.split())}
_KNOWN |= CURRENCIES
# Words behind a number that make another number of it, or go on with one.
CHANGES = frozenset(
    "and or not plus minus negative times over more less than squared cubed factorial half halves "
    "third thirds quarter quarters hundred thousand million billion trillion choose modulo base "
    "root where when with such that sqrt sin cos tan sinh cosh tanh log ln exp infinity".split()
)
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
    (re.compile(r"\bper\b|/"), " / "),
)
_WORD = re.compile(r"([A-Za-z'$%\u00a2\u20ac\u00a3\u00a5-]+)\.?(\^-?\d)?")


def read_unit(text: str) -> tuple[int, str] | None:
    r"""Return what a number is multiplied by and its unit's one name, from the text behind it.

    Args:
        text: in the spelling of `latex.plain`: `^{\circ}`, ` \text{cm}^{2}`, ` million dollars`.
    Returns: (1, "") for no text; None for text that is no unit: letters that may be variables
        (`2x`, `5 m` outside of `\text`), operators, further numbers.
    """
    if len(text) > LONGEST_UNIT:
        return None
    base = _BASE.fullmatch(text)
    if base:
        return 1, "" if base[1] == "10" else f"base {base[1]}"
    unit = _TEXT.sub(r" \1", text)
    is_text, is_apart = unit != text, unit[:1] == " "
    for pattern, name in _REWRITTEN:
        unit = pattern.sub(name, unit)
    words = unit.split()
    scale = SCALES.get(words[0].lower(), 1) if words else 1
    names = [
        word if word == "/" else _name(word, is_text, is_apart, "/" in words)
        for word in words[scale != 1 :]
    ]
    return None if None in names else (scale, " ".join(map(str, names)))


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
        if unit is not None and unit[0] == 1 and (is_sign or re.search(r"\d", formula)):
            return formula, unit[1]
    return text, ""


def _name(word: str, is_text: bool, is_apart: bool, is_ratio: bool) -> str | None:
    """The one name of a word of a unit; None where it may be something else."""
    found = _WORD.fullmatch(word)
    if found is None:
        return None
    letters, power = found[1], found[2] or ""
    lower = letters.lower()
    singular = lower[:-1] if len(lower) > 3 and lower.endswith("s") else lower
    known = next((_KNOWN[name] for name in (letters, lower, singular) if name in _KNOWN), None)
    if known is not None:
        may_be_variable = len(letters) == 1 and letters.isalpha()
        return known + power if is_text or not may_be_variable or (is_apart and is_ratio) else None
    if lower in CHANGES or len(letters) < (2 if is_text else 4) or not (is_text or is_apart):
        return None
    return singular + power
