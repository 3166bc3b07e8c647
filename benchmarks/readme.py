"""Every measured number in a text is generated from committed rows.

    python benchmarks/readme.py README.md docs/*.md      writes the numbers anew

    <!-- table: FILE KIND --> ... <!-- /table -->        a table of results/FILE.csv
    <!-- ratio: FILE; OP; SHAPE; DTYPE; MODE; PEER -->12.3x<!-- /ratio -->
                                                         the peer's time over ours
    <!-- agree: FILE; FILE -->52 of 66<!-- /agree -->    ratios of two runs within 15 %; of the
                                                         brief table alone: FILE; FILE brief

KIND is logits, brief, linear, host or steps (show.py). Without it the table is the `summary` of the
script FILE.py beside this one, or of demo_runs.py for FILE = <task>_runs.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cppo.benchmarks import rows, show
from cppo.benchmarks.rows import Row, row_kind

RESULTS = Path(__file__).resolve().parent / "results"
_TABLE = re.compile(r"(<!-- table: (\w+) ?(\w*) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
_AGREE = re.compile(r"(<!-- agree: (\w+); (\w+) ?(\w*) -->)(.*?)(<!-- /agree -->)", re.DOTALL)
_RATIO = re.compile(r"(<!-- ratio: ([^>]*?) -->)(.*?)(<!-- /ratio -->)", re.DOTALL)


def rendered(text: str) -> str:
    """The text with its tables and ratios as the committed rows give them."""

    def table(found: re.Match[str]) -> str:
        name, kind = found[2], found[3]
        committed = rows.read(RESULTS / f"{name}.csv")
        made = show.summary(committed, kind) if kind else _script(name).summary(committed)
        return f"{found[1]}{made}\n{found[5]}"

    def one_ratio(found: re.Match[str]) -> str:
        name, *words = [word.strip() for word in found[2].split(";")]
        committed = rows.read(RESULTS / f"{name}.csv")
        return f"{found[1]}{ratio(committed, words):.1f}x{found[4]}"

    def agreement(found: re.Match[str]) -> str:
        first, second = (rows.read(RESULTS / f"{name}.csv") for name in (found[2], found[3]))
        if found[4] == "brief":
            first = list(filter(show.in_brief, first))
        return f"{found[1]}{agreeing(first, second)}{found[6]}"

    return _AGREE.sub(agreement, _RATIO.sub(one_ratio, _TABLE.sub(table, text)))


def _script(name: str) -> Any:
    own = "demo_runs" if name.endswith("_runs") else name
    return importlib.import_module(f"cppo.benchmarks.{own}")


def ratio(committed: Sequence[Row], words: Sequence[str]) -> float:
    """Time of a peer over that of our fastest backend, in the same case and mode."""
    op, shape, dtype, mode, peer = words
    members = [
        row
        for row in committed
        if (row["op"], row["shape"], row["dtype"], row["mode"]) == (op, shape, dtype, mode)
    ]
    theirs = [float(row["ms_p50"]) for row in members if row["peer"] == peer]
    ours = [float(row["ms_p50"]) for row in members if row["backend"]]
    if not theirs or not ours:
        raise ValueError(f"no committed rows of both sides for {'; '.join(words)}")
    return theirs[0] / min(ours)


def agreeing(first: Sequence[Row], second: Sequence[Row]) -> str:
    """How many ratios to a peer, of those in both runs, differ by at most 15 %."""

    def ratios(run: Sequence[Row]) -> dict[tuple[str, ...], float]:
        cases = [(row["op"], row["shape"], row["dtype"], row["mode"], row["peer"]) for row in run]
        timed = [
            case
            for case, row in zip(cases, run, strict=True)
            if row["peer"] and row_kind(row) == "logits"
        ]
        return {case: ratio(run, case) for case in timed}

    before, after = ratios(first), ratios(second)
    both = before.keys() & after.keys()
    within = [case for case in both if abs(after[case] / before[case] - 1) <= 0.15]
    return f"{len(within)} of {len(both)}"


def main(paths: Sequence[str]) -> int:
    for path in map(Path, paths):
        text = path.read_text()
        path.write_text(rendered(text))
        print(f"{path}: {'changed' if rendered(text) != text else 'as committed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
