"""Docstrings of this project as mkdocstrings reads them: an extension of griffe.

A section here may be one line (`Raises: ValueError for ...`), and follows the one before without a
blank line. Griffe takes the first for a title and the second for text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

SECTION = re.compile(r"(Args|Returns|Raises|Fields|Attributes|Specification|Example):(?: (.*))?$")
PAGES = Path(__file__).resolve().parents[1] / "docs" / "api"
NAMES = re.findall(
    r"^::: (\S+)", "\n".join(page.read_text() for page in sorted(PAGES.glob("*.md"))), re.MULTILINE
)
# By its last word too, in docstrings; of two things with one the first.
SHORT = {name.rsplit(".", 1)[1]: name for name in NAMES[::-1]}


def sections(text: str) -> str:
    """A docstring with sections as griffe reads them; one on a line is a paragraph."""
    lines: list[str] = []
    inside = False  # a section whose text began on its first line
    for line in text.splitlines():
        if found := SECTION.match(line):
            title, words = found.groups()
            inside = bool(words)
            if title == "Example":  # code, which Markdown knows by its indent
                lines += ["", "**Example:**", ""]
            else:
                title = "Attributes" if title == "Fields" and not words else title
                lines += ["", f"**{title}:** {words}" if inside else f"{title}:"]
        elif inside and line.startswith("    "):
            lines.append(line.strip())  # else it would be code
        else:
            inside = False
            lines.append(line)
    return "\n".join(lines).strip()


def references(text: str, own: str) -> str:
    """A docstring in which the names of what is documented are links, but for its own."""

    def reference(found: re.Match[str]) -> str:
        name = SHORT.get(found[1], found[1])
        if not name.startswith("cppo.") or own.startswith(name):
            return found[0]
        return f'<autoref identifier="{name}" optional><code>{found[1]}</code></autoref>'

    return re.sub(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)", reference, text)


class Docstrings(griffe.Extension):
    """Applies both to every docstring, before anything of it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = references(sections(obj.docstring.value), obj.path)
