r"""Where in a text its answer stands: in `<answer>`, in a box, in a formula, behind `####`.

Every function takes any string, reads it in linear time and never raises.
"""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox|framebox(?:\s*\[[^\[\]{}]{0,20}\]){0,2})(?![A-Za-z])\s*")
# TeX would box only the first digit of a number without braces, which nobody means.
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3}){1,9}(?!,?\d)|\d+)(?:\.\d+)?(?:/\d+)?")
_COMMAND = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
_ARGUMENT = re.compile(r"\s*([\[{]|\w)")
_NUM_ARGUMENTS = {"\\frac": 2, "\\dfrac": 2, "\\tfrac": 2, "\\cfrac": 2, "\\sqrt": 1}
# Behind a digit or at the end of a group, % is a percent sign, as people write it. Elsewhere it
# begins a comment, as in TeX.
_BRACE = re.compile(r"\\.|[{}]|(%\n|(?<!\d)%(?!\s*[}$])[^\n]{0,200}\n)", re.DOTALL)
_DELIMITER = re.compile(r"\\\\|\\\$|\$\$|\$|\\[()\[\]]")
_CLOSING = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}
_MOST_BOXES = 50  # of a list
_TAIL = 20_000  # characters, in which formulas are looked for
_BETWEEN = re.compile(r"\s*(?:[,;]|[,;]?\s*(?:and|or))\s*")
_BETWEEN_BOXES = re.compile(r"\s{0,9}\$?\s{0,9}(?:[,;]|[,;]?\s{0,9}(?:and|or))\s{0,9}\$?\s{0,9}")
# "Hence the final answer is", "Answer:", and not "the square of the answer is".
_STATEMENT = re.compile(
    r"(?:^|[.,;:!?*>]|\b(?:so|hence|thus|therefore|then|and|that))\s{0,9}"
    r"(?:(?:the|my|our|final|correct)\s{1,9}){0,3}answer(?:\s{1,9}to\s[\w\s]{1,60}?)?"
    r"(?:\s{1,9}(?:is|(?:would|should|must|will)\s{1,9}be)\b(?:\s{1,9}(?:indeed|simply|thus)\b)?"
    r"|\s{0,9}[:=])[\s:*]{0,9}",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)|\n\s*\n")


def last_boxed(text: str) -> str | None:
    r"""Return what the last box holds, braces balanced, without comments; None if there is none.

    A box is `\boxed{...}`, `\fbox{...}` or `\framebox{...}`, or, as TeX has it, one of these before
    a number, a letter or a command with its arguments: `\boxed 5`, `\boxed\frac12`. A last box that
    is never closed (a truncated completion) counts as none. Boxes that only commas, "and" and "or"
    separate are one list.
    """
    held: list[str] = []
    begin = -1
    for box in reversed(list(_BOX.finditer(text))):
        found = _held(text, box.end())
        if found is None or (held and not _BETWEEN_BOXES.fullmatch(text, found[1], begin)):
            break
        held.insert(0, found[0])
        begin = box.start()
        if len(held) == _MOST_BOXES:
            break
    return ", ".join(held) if held else None


def _held(text: str, start: int) -> tuple[str, int] | None:
    """What the box holds whose command ends at `start`, and where that ends."""
    return (_group if text.startswith("{", start) else _unbraced)(text, start)


def _group(text: str, start: int) -> tuple[str, int] | None:
    """What the group that opens at `start` holds, and where it ends; None if it does not."""
    pieces, depth, begin = [], 0, start + 1
    for found in _BRACE.finditer(text, start):
        if found[1]:
            pieces.append(text[begin : found.start()])
            begin = found.end()
        elif found[0] in "{}":
            depth += 1 if found[0] == "{" else -1
            if depth == 0:
                pieces.append(text[begin : found.start()])
                return "".join(pieces), found.end()
    return None


def _unbraced(text: str, start: int) -> tuple[str, int] | None:
    found = _NUMBER.match(text, start) or _COMMAND.match(text, start)
    if found is None:
        return None
    stop, missing = found.end(), _NUM_ARGUMENTS.get(found[0], 0)
    while found.re is _COMMAND and (argument := _ARGUMENT.match(text, stop)):
        if argument[1] == "[" and found[0] == "\\sqrt" and "]" in text[stop : stop + 20]:
            stop = text.index("]", stop) + 1
            continue
        if argument[1] == "[" or (missing <= 0 and text[stop] != "{"):
            break
        group = _group(text, argument.start(1)) if argument[1] == "{" else ("", argument.end())
        if group is None:
            return None
        stop, missing = group[1], missing - 1
    return text[start:stop], stop


def last_tagged(text: str) -> str | None:
    """Return what the last closed `<answer>...</answer>` holds, stripped; None if there is none."""
    start = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    if start < 0:
        return None
    return text[start + len("<answer>") : text.index("</answer>", start)].strip()


def marked_answer(text: str) -> str | None:
    r"""Return what is marked as the answer, stripped; None if nothing is.

    That is the last `<answer>` or, without one, the last box; or the last box in that `<answer>`.
    """
    tagged = last_tagged(text)
    boxed = last_boxed(text if tagged is None else tagged)
    return tagged if boxed is None else boxed.strip()


def answer_part(text: str) -> str:
    """Return the marked answer, or all of the text, without `$` or `**` around it; stripped."""
    marked = marked_answer(text)
    return without_delimiters(text if marked is None else marked)


def stated_answer(text: str) -> str | None:
    """Return the rest of the last sentence with "answer is" or "answer:"; None without one."""
    text = text[-_TAIL:]
    starts = [found.end() for found in _STATEMENT.finditer(text)]
    if not starts or starts[-1] == len(text):
        return None
    end = _SENTENCE_END.search(text, starts[-1])
    stated = text[starts[-1] : end.start() if end else len(text)].strip()
    return without_delimiters(stated.removesuffix("**") if stated.count("**") == 1 else stated)


def without_delimiters(text: str) -> str:
    """Return a text without the `$` or `**` around all of it; stripped."""
    text = text.strip()
    for opening, closing in (("**", "**"), *reversed(_CLOSING.items())):
        if text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            if not any(mark in inner.replace("\\$", "") for mark in (opening, closing)):
                text = inner.strip()
    return text


def formulas(text: str) -> list[str]:
    r"""Return what stands in `$...$`, `$$...$$`, `\(...\)` and `\[...\]`, in order.

    Formulas that only commas, "and" and "or" separate are one list: "$x = 1$ or $x = 2$". A dollar
    sign that opens a formula has a character behind it, one that closes it has one before it and no
    digit behind it: "from $5 to $7" has no formula.
    """
    text, end = text[-_TAIL:], 0
    found: list[list[str]] = []
    opening: re.Match[str] | None = None
    for mark in _DELIMITER.finditer(text):
        if opening is not None and mark[0] == _CLOSING[opening[0]] and _may_close(text, mark):
            formula = text[opening.end() : mark.start()].strip()
            if found and _BETWEEN.fullmatch(text, end, opening.start()):
                found[-1].append(formula)
            else:
                found.append([formula])
            opening, end = None, mark.end()
        elif mark[0] in _CLOSING and (opening is None or opening[0] == "$" == mark[0]):
            opening = mark if mark[0] != "$" or text[mark.end() : mark.end() + 1].strip() else None
    return [", ".join(parts) for parts in found]


def _may_close(text: str, mark: re.Match[str]) -> bool:
    if mark[0] != "$":
        return True
    return bool(text[mark.start() - 1].strip()) and not text[mark.end() : mark.end() + 1].isdigit()


def behind_hashes(text: str) -> str | None:
    """Return the rest of the line behind the last `####`; None if there is none."""
    _, mark, rest = text.rpartition("####")
    return rest.strip().split("\n", 1)[0].strip() if mark else None
