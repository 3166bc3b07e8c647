"""The notebook runs from its first cell to its last."""

import ast
import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "digits.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
SMALL = {
    '"runs/notebook"': "OUTPUT_DIR",
    "max_steps=20": "max_steps=2",
    "eval_every=5": "eval_every=1",
    "max_completion_tokens=32": "max_completion_tokens=24",
    '"heldout", 100': '"heldout", 4',
}


def run(source, names):
    """Runs a cell; returns what a notebook would show under it: its last expression."""
    *statements, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        exec(source, names)
        return None
    exec(compile(ast.Module(statements, []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_notebook_is_committed_without_outputs():
    for cell in CELLS:
        assert cell["cell_type"] == "markdown" or not cell["outputs"]


def test_the_notebook_runs(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'cppo[demo]'")
    matplotlib = pytest.importorskip("matplotlib", reason="pip install 'cppo[bench]'")
    matplotlib.use("agg")
    code = "\0".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code")
    for printed, small in SMALL.items():
        assert printed in code
        code = code.replace(printed, small)
    names = {"OUTPUT_DIR": str(tmp_path)}
    shown = [run(source, names) for source in code.split("\0")]
    # Both looks are shown as pages, in a frame that holds them whole.
    assert shown[-1] is names["after"] and names["before"] in shown
    assert names["after"]._repr_html_().count("<") == 2
    assert names["before"].json() != names["after"].json()
    lines = names["plt"].gca().get_lines()
    assert [list(line.get_xdata()) for line in lines] == [[1, 2], [0, 1, 2]]
