"""Hooks of mkdocs: the pages of the site that are not in docs/, and links that hold in both places.

The texts of the repository link to each other as a forge shows them: `docs/trl.md` in README.md,
`../tests/test_metrics.py` in docs/metrics.md. On the site README.md is the first page, and every
file outside docs/ that a page names has a page with its source, one that nothing names has none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from places import COPIED, FENCED, LINK, PAGES, ROOT, linked, links, origin_of, page_of, slug

LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".cpp": "cpp", ".h": "cpp"}
# Marks of generated numbers. One that stands on a line of its own takes the line with it, since a
# table must follow a blank line.
COMMENT = re.compile(r"^<!--.*?-->\n|<!--.*?-->", re.MULTILINE | re.DOTALL)


def notebook(text: str) -> str:
    """The cells of a notebook."""
    cells = json.loads(text)["cells"]
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    fenced = "```python\n{}\n```".format
    return "\n\n".join(fenced(code) if kind == "code" else code for kind, code in sources)


def source(origin: str) -> str:
    """The page of a file that is not Markdown, or of a folder."""
    path = ROOT / origin
    # What it holds is searched for in an editor, not here.
    head = f"---\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n# `{origin}`\n\n"
    if path.is_dir():
        names = sorted(one.name for one in path.iterdir() if one.is_file())
        return head + "\n".join(f"- [`{name}`]({path.name}/{name})" for name in names)
    # A fence that no line of the file can end.
    return f"{head}~~~~~~~~ {LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n~~~~~~~~\n"


def on_config(config: MkDocsConfig) -> None:
    config.mdx_configs["toc"] = {**config.mdx_configs.get("toc", {}), "slugify": slug}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages of what is outside docs/: PAGES, and every file that a page links to."""
    waiting = [origin for origin in PAGES if (ROOT / origin).exists()]
    waiting += [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        origin = waiting.pop()
        text = page_text(origin)
        if not origin.startswith("docs/"):
            files.append(new_file(config, origin, text))
        places = {place for link in links(text or "") if (place := linked(origin, link))}
        new = {place for place in places if not place.startswith("docs/")} - seen
        waiting += new
        seen |= new


def page_text(origin: str) -> str | None:
    """The Markdown of a page; None for a file that is copied."""
    if origin.endswith(COPIED):
        return None
    if origin.endswith(".md"):
        return (ROOT / origin).read_text()
    return notebook((ROOT / origin).read_text()) if origin in PAGES else source(origin)


def new_file(config: MkDocsConfig, origin: str, text: str | None) -> File:
    """A file of the site that is not in docs/."""
    if text is None:
        return File.generated(config, page_of(origin), abs_src_path=str(ROOT / origin))
    level = InclusionLevel.INCLUDED if origin in PAGES else InclusionLevel.NOT_IN_NAV
    return File.generated(config, page_of(origin), content=text, inclusion=level)


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` applied to all that is not a fenced block of code."""
    parts, end = [], 0
    for block in FENCED.finditer(text):
        parts += [change(text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(text[end:])])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Takes comments out, and makes links of the repository links of the site."""
    here = page.file.src_uri
    origin = origin_of(here)

    def change(link: re.Match[str]) -> str:
        place = linked(origin, link[2])
        if place is None:
            return link[0]  # mkdocs says what is wrong with it
        there = os.path.relpath(page_of(place), PurePosixPath(here).parent)
        return f"{link[1]}{there}{link[3]}"

    return outside_fences(markdown, lambda text: LINK.sub(change, COMMENT.sub("", text)))
