"""What CONTRIBUTING says of the code itself: short files, and no import in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = ("cppo", "triton_kernels", "csrc", "benchmarks", "tests", "examples", "docs_site")
SUFFIXES = {".py", ".cpp", ".cu", ".h", ".cuh", ".sh"}
LONGEST = 400
LONG = {"cppo/reference.py"}  # the specification reads from top to bottom


def test_no_file_is_long() -> None:
    files = [f for name in CODE for f in (ROOT / name).rglob("*") if f.suffix in SUFFIXES]
    lines = {f.relative_to(ROOT).as_posix(): len(f.read_text().splitlines()) for f in files}
    assert {name for name, count in lines.items() if count > LONGEST} == LONG


def modules() -> dict[str, Path]:
    """The modules of the package by their names; triton_kernels/ is installed as one of them."""
    found = {}
    for folder, package in (("cppo", "cppo"), ("triton_kernels", "cppo.triton_kernels")):
        for file in (ROOT / folder).rglob("*.py"):
            parts = (package, *file.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules that a module imports, at once or later."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for whole in (f"{node.module}.{alias.name}" for alias in node.names):
                names.add(whole if whole in known else node.module)
    return names & known


def test_no_import_is_in_a_circle() -> None:
    known = modules()
    assert len(known) > 150
    graph = {}
    for name, file in known.items():
        # `cppo` itself gathers the public names of what is below it.
        graph[name] = imports(ast.parse(file.read_text()), known.keys() - {name, "cppo"})
    TopologicalSorter(graph).prepare()  # raises CycleError
