"""Where a file of the repository stands on the site, and the links between them."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
# Files outside docs/ that are pages of their own, and their names on the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "recipes/README.md": "recipes.md",
    "examples/digits.ipynb": "digits.md",
}
COPIED = (".png", ".jpg", ".svg", ".html")  # a browser shows them as they are
FENCED = re.compile(r"^(`{3,}|~{3,}).*?^\1[ ]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s#]+)([^)\s]*\))")


def slug(heading: str, separator: str = "-") -> str:
    """The anchor of a heading, as forges make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def prose(text: str) -> str:
    """A text without its fenced blocks of code."""
    return FENCED.sub("", text)


def links(text: str) -> list[str]:
    """Files that a text links to, as it names them."""
    found = [link[2] for link in LINK.finditer(prose(text))]
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def origin_of(page: str) -> str:
    """The file in the repository that a page of the site is made of."""
    of_page = {name: origin for origin, name in PAGES.items()}
    if page in of_page:
        return of_page[page]
    is_source = page.startswith("source/")
    return page.removeprefix("source/").removesuffix(".md") if is_source else f"docs/{page}"


def page_of(origin: str) -> str:
    """The place on the site of a file or a folder in the repository: origin_of, backwards."""
    if f"{origin}/README.md" in PAGES:
        origin = f"{origin}/README.md"
    if origin in PAGES:
        return PAGES[origin]
    if origin.startswith("docs/"):
        return origin.removeprefix("docs/")
    return f"source/{origin}" if origin.endswith(COPIED) else f"source/{origin}.md"


def linked(origin: str, link: str) -> str | None:
    """The file in the repository that `link` in `origin` names; None where there is none."""
    place = os.path.normpath(PurePosixPath(origin).parent / link)
    return place if (ROOT / place).exists() and not place.startswith("..") else None
