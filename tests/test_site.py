"""The site: every page is in its navigation, every link leads somewhere, and it builds."""

import importlib
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SITE = runpy.run_path(str(ROOT / "docs_site" / "places.py"))
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
TEXTS = [
    *(name for name in SITE["PAGES"] if name.endswith(".md")),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
]
MODULES = ["cppo", "cppo.questions", "cppo.report", "cppo.rewards", "cppo.views"]
MKDOCS = shutil.which("mkdocs", path=str(Path(sys.executable).parent))


def pages(nav):
    """Files that a navigation names, in its order."""
    for entry in nav:
        (value,) = entry.values()
        yield from pages(value) if isinstance(value, list) else [value]


def anchors(text):
    """Where a link to a part of a text may lead."""
    headings = re.findall(r"^#+ (.*)", SITE["prose"](text), re.MULTILINE)
    return {SITE["slug"](re.sub(r"<!--.*?-->|[`*]", "", heading)) for heading in headings}


def lost(origin, text):
    """The links of a text, which stands in the file `origin`, that lead nowhere."""
    for link in re.findall(r"\]\(([^)\s]+)\)", SITE["prose"](text)):
        if re.match(r"(https?|mailto):", link):
            continue
        name, _, anchor = link.partition("#")
        place = SITE["linked"](origin, name) if name else origin
        target = text if place == origin else place and place.endswith(".md") and read(place)
        if place is None or (anchor and anchor not in anchors(target or "")):
            yield link


def read(name):
    return (ROOT / name).read_text()


def test_every_page_is_in_the_navigation_once():
    named = list(pages(CONFIG["nav"]))
    there = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(named) == sorted([*there, *SITE["PAGES"].values()])


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_somewhere(name):
    assert not list(lost(name, read(name)))


def test_a_link_that_leads_nowhere_is_found():
    text = "# Here\n[a](b.md) [c](trl.md#nowhere) [d](#here) [e](trl.md)\n```\n[f](g.md)\n```\n"
    assert list(lost("docs/x.md", text)) == ["b.md", "trl.md#nowhere"]


def test_a_place_on_the_site_tells_its_file():
    for origin in (*TEXTS, "cppo/reference.py", "examples/digits.ipynb"):
        assert SITE["origin_of"](SITE["page_of"](origin)) == origin
    assert SITE["page_of"]("recipes") == SITE["page_of"]("recipes/README.md")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module):
    reference = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    described = set(re.findall(r"^::: (\S+)", reference, re.MULTILINE))
    public = importlib.import_module(module).__all__
    assert public
    assert {f"{module}.{name}" for name in public} <= described


def build(*options):
    """Builds a site as `make docs` does."""
    if not MKDOCS:
        pytest.skip("mkdocs is not installed: pip install 'cppo[docs]'")
    (words,) = re.findall(r"/mkdocs (build.*)", read("Makefile"))
    command = [MKDOCS, *words.split(), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_broken_page_is_refused(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n[b](b.md) [nowhere](#nowhere)")
    (tmp_path / "docs" / "forgotten.md").write_text("# B")
    rules = {name: CONFIG[name] for name in ("strict", "validation")}
    config = {"site_name": "site", "plugins": [], "nav": [{"A": "index.md"}], **rules}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    done = build("--config-file", str(tmp_path / "mkdocs.yml"))
    assert done.returncode != 0 and "3 warnings in strict mode" in done.stdout
    assert all(word in done.stderr for word in ("b.md", "#nowhere", "forgotten.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site's pages by name, built anew."""
    folder = tmp_path_factory.mktemp("site")
    done = build("--site-dir", str(folder))
    assert done.returncode == 0, done.stderr
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.html")
    }


def test_the_site_loads_nothing_from_elsewhere(site):
    assert len(site) > len(TEXTS)
    loaded = r"""<(?:script|img|iframe|link)\b[^>]*(?:src|href)=["']?(?:https?:)?//[^>]*>"""
    assert not {tag for page in site.values() for tag in re.findall(loaded, page)}


def test_marks_are_invisible_and_links_are_those_of_the_site(site):
    assert not [name for name, page in site.items() if "/table --" in page]
    assert "<td>" in site["benchmarks.html"]
    assert 'href="source/tests/test_metrics.py.html"' in site["metrics.html"]
    assert "test_metrics.py" in site["source/tests/test_metrics.py.html"]


def test_docstrings_are_read_by_section(site):
    page = site["api/ops.html"]
    assert not re.findall(r"<p>(?:Args|Returns|Raises|Specification|Fields): ?", page)
    assert re.search(r"<code>targets</code>\s*</(?:b|strong)>", page)
    assert 'href="reference.html#cppo.reference.cppo_loss"' in page
