"""The scripts that measure pruning and shared prompts run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "columns"),
    [
        ("prune_rates.py", ["prune_rate", "update_speedup", "step_speedup", "paper_speedup"]),
        ("shared_prompts.py", ["tokens_shared", "speedup", "gradient_error"]),
    ],
)
def test_at_toy_size(script: str, columns: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), "--smoke"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    header, rule, *rows = done.stdout.splitlines()
    names = [name.strip() for name in header.strip("|").split("|")]
    assert set(columns) <= set(names) and rule.startswith("|---")
    table = [row for row in rows if row.startswith("|")]
    assert all(len(row.strip("|").split("|")) == len(names) for row in table)
    if script == "prune_rates.py":
        # Five rates, packed and padded, with and without allocation; at rate 0 they are the same.
        assert len(table) == 5 * 2 * 2 - 2
        assert rows[-1].startswith("padded / packed at rate 0: ")
