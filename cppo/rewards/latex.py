r"""LaTeX in one spelling: the same formula, written in two ways, becomes the same text.

`plain` keeps what a formula says (numbers, units, `\text`); `cppo.rewards.spelling` goes on from
there to what may be compared letter by letter.
"""

from __future__ import annotations

import functools
import re
import unicodedata

LONGEST = 2000  # characters; anything longer is not an answer

_SAME = (  # characters of Unicode that have no decomposition, and what says the same
    ("\u2212\u2013\u2010", "-"),
    ("\u200b\u2060\ufeff", ""),
    ("\u2215\u00f7", "/"),
    *(("\u00d7", r"\times "), ("\u22c5\u00b7", r"\cdot "), ("\u00b1", r"\pm ")),
    *(("\u2264", r"\le "), ("\u2265", r"\ge "), ("\u2260", r"\ne "), ("\u2248", r"\approx ")),
    *(("\u222a", r"\cup "), ("\u2229", r"\cap "), ("\u2208", r"\in "), ("\u2205", r"\emptyset ")),
    *(("\u2220", r"\angle "), ("\u25b3", r"\triangle "), ("\u22a5", r"\perp ")),
    *(("\u2225", r"\parallel "), ("\u2261", r"\equiv "), ("\u2192", r"\to ")),
    *(
        ("\u221e", r"\infty "),
        ("\u221a", r"\sqrt "),
        ("\u221b", r"\sqrt[3]"),
        ("\u00b0", r"^\circ "),
    ),
    *(("\u2019\u2032", "'"), ("\u3002", ".")),
)
_CHARACTERS = {ord(character): text for characters, text in _SAME for character in characters}
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho "
    "varsigma sigma tau upsilon phi chi psi omega"
).split()
_CHARACTERS |= {0x3B1 + place: rf"\{name} " for place, name in enumerate(GREEK)}
_CHARACTERS |= {
    0x391 + place: rf"\{GREEK[place].title()} " for place in (2, 3, 7, 10, 13, 15, 18, 21, 22, 23)
}
# As calculators have it: "2*pi", "sqrt(2)", "2**10". Between words "**" is bold print.
_CALCULATOR = (
    (re.compile(r"(?<=[\w)}\]])(\*\*|\s\*\*\s)(?=[-\w({\\])"), "^"),
    (re.compile(r"\^\{(\d+)\}/_\{(\d+)\}"), r"\\frac{\1}{\2}"),
    (re.compile(rf"(?<![A-Za-z\\])({'|'.join(GREEK)})(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"(?<![A-Za-z\\])infinity(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"(?<![A-Za-z\\])sqrt ?\(([^()]{1,100})\)"), r"\\sqrt{\1}"),
)
# A row's end, `\\`, comes first in each pattern, so that no command begins with its second half.
_SPACE = re.compile(
    r"(\\\\)|\\[,;:> ]|~|\\(?:q?quad|enspace|thinspace|displaystyle|textstyle|nolimits|limits)"
    r"(?![A-Za-z])|\\hspace\*?\{[^{}]*\}"
)
_NOTHING = re.compile(
    r"(\\\\)|\s*\\!\s*|\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])(?:\s*\.(?!\d))?"
    r"|\\(?:text)?color\{[^{}]*\}"
)
_DELIMITER = re.compile(r"(\\\\)|(\\\$)|\$|\\[()\[\]]")
_END = re.compile(r"(?: |[.,;]|\\)+$")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_ROOT = re.compile(r"(\\sqrt ?\[[^\[\]]*\]) ?([^\s{\\])")
_ARGUMENTS = {"\\frac": 2, "\\binom": 2, "\\sqrt": 1, "^": 1, "_": 1, "\\mathbb": 1}
_NAMES = {
    **dict.fromkeys(("\\dfrac", "\\tfrac", "\\cfrac"), "\\frac"),
    **dict.fromkeys(("\\dbinom", "\\tbinom"), "\\binom"),
    **{"\\leq": "\\le", "\\geq": "\\ge", "\\neq": "\\ne", "\\lt": "<", "\\gt": ">"},
    **{"\\leqslant": "\\le", "\\geqslant": "\\ge", "\\varnothing": "\\emptyset"},
    **{"\\lbrace": "\\{", "\\rbrace": "\\}", "\\lbrack": "[", "\\rbrack": "]", "\\div": "/"},
    **{"\\ast": "*", "\\degree": "^\\circ", "\\infin": "\\infty", "\\rightarrow": "\\to"},
    **{"\\ldots": "\\dots", "\\cdots": "\\dots", "\\colon": ":", "\\percent": "\\%"},
}


@functools.lru_cache(maxsize=4096)
def plain(text: str) -> str:
    r"""Return a formula without its delimiters, in one spelling.

    `$`, `\(` and `\[` are removed; `\$` and a lone `$` stay as the sign of a currency. All spaces
    of TeX become " ". `\left`, `\right`, colours, and full stops and commas at the end are removed.
    Arguments get braces (`\frac12`, `x^2`). Of several names for a command one is kept, and ASCII
    replaces what ASCII can say.
    """
    text = _ascii(text)
    for pattern, latex in _CALCULATOR:
        text = pattern.sub(latex, text)
    text = _SPACE.sub(lambda found: found[1] or " ", text)
    text = _NOTHING.sub(lambda found: found[1] or "", text).replace("{,}", ",")
    text = " ".join(_without_delimiters(text).split())
    text = _ROOT.sub(r"\1{\2}", text.replace("{ ", "{").replace(" }", "}"))
    return _outside_braces(_END.sub("", _with_braces(text).strip()))


def _ascii(text: str) -> str:
    """The text with what Unicode has one character for (powers, fractions, symbols) in LaTeX."""
    pieces, script = [], ""
    for character in text if not text.isascii() else ():
        kind, _, codes = unicodedata.decomposition(character).partition("> ")
        # Of decompositions without a kind, those of accented letters, none is wanted.
        same = "".join(chr(int(code, 16)) for code in codes.split()) or character
        sign = {"<super": "^", "<sub": "_"}.get(kind, "")
        if sign != script:
            pieces.append(("}" if script else "") + (sign and sign + "{"))
            script = sign
        if kind == "<fraction":
            top, _, bottom = same.partition("\u2044")
            same = rf"\frac{{{top}}}{{{bottom or 1}}}"
        pieces.append(same)
    if not pieces:
        return text
    return "".join([*pieces, "}" if script else ""]).replace("\u2044", "/").translate(_CHARACTERS)


def _without_delimiters(text: str) -> str:
    lone = sum(found[0] == "$" for found in _DELIMITER.finditer(text)) % 2 == 1

    def replace(found: re.Match[str]) -> str:
        if found[1]:
            return found[1]
        return "$" if found[2] or (lone and found[0] == "$") else " "

    return _DELIMITER.sub(replace, text)


def _with_braces(text: str) -> str:
    """The text with every argument of a fraction, root, power or index in braces."""
    tokens = _TOKEN.findall("".join(_NAMES.get(token, token) for token in _TOKEN.findall(text)))
    ends = closing_braces(tokens)
    for place, token in enumerate(tokens):
        start = place + 1
        for _ in range(_ARGUMENTS.get(token, 0)):
            while tokens[start : start + 1] == [" "]:
                tokens[start] = ""
                start += 1
            stop = ends.get(start, -1) + 1 or _end_of_argument(tokens, start, token in "^_")
            if start not in ends and stop > start:
                tokens[start] = "{" + tokens[start]
                tokens[stop - 1] += "}"
            start = stop
    return "".join(tokens)


def _end_of_argument(tokens: list[str], start: int, is_script: bool) -> int:
    """Behind the argument without braces at `start`; there, if there is none that can be told.

    A power without braces has all of its digits, as people write 10^-23 where TeX would need them.
    """
    if tokens[start : start + 1] == ["-"] and is_script:
        digits = start + 1
    else:
        digits = start
    stop = digits
    while is_script and stop < len(tokens) and tokens[stop].isdigit():
        stop += 1
    if stop > digits:
        return stop
    has_one = start < len(tokens) and tokens[start] not in (*_ARGUMENTS, *"{}[-")
    return start + 1 if has_one else start


def closing_braces(tokens: list[str]) -> dict[int, int]:
    """The place of the closing brace of each opening one that has one."""
    ends, opened = {}, []
    for place, token in enumerate(tokens):
        if token == "{":
            opened.append(place)
        elif token == "}" and opened:
            ends[opened.pop()] = place
    return ends


def _outside_braces(text: str) -> str:
    """The text without braces around all of it."""
    tokens = _TOKEN.findall(text)
    ends = closing_braces(tokens)
    first, last = 0, len(tokens) - 1
    while ends.get(first) == last and first < last:
        first, last = first + 1, last - 1
    return "".join(tokens[first : last + 1]).strip()
