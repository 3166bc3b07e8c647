"""What became of TRL's tests with each variant of the trainer, against TRL alone.

python compare.py FOLDER        # with the files of plugin.py
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARIANTS = {
    "plain": "TRL alone",
    "off": "the adapter with everything off",
    "pruned": "CPPO(prune_rate=0.5), without contrast",
    "late": "the same with early=False",
    "contrast": "CPPO(cpl_coef=1), tests with images",
}
SAME = {"off": "plain", "late": "pruned"}  # whose trainings must end with the same numbers
Outcomes = dict[str, dict[str, Any]]


def counts(outcomes: Outcomes) -> str:
    of = Counter(test["outcome"] for test in outcomes.values())
    return ", ".join(f"{of[name]} {name}" for name in sorted(of, key=lambda name: -of[name]))


def changed(plain: Outcomes, other: Outcomes) -> Iterator[str]:
    """The tests that end otherwise than with TRL alone, and why."""
    for name, test in other.items():
        before = plain[name]["outcome"]
        if test["outcome"] != before:
            why = test.get("why", plain[name].get("why", ""))
            yield f"  {name}: {test['outcome']}, TRL alone {before}. {why}"


def equal(one: Outcomes, other: Outcomes) -> str:
    """How many trainings end with the same numbers."""
    pairs = [
        pair
        for name, test in other.items()
        for pair in zip(one[name].get("digests", []), test.get("digests", []), strict=True)
    ]
    same = sum(ours == theirs for ours, theirs in pairs)
    return f"{same} of {len(pairs)} trainings end with the same logs and parameters, bit for bit"


def report(folder: Path) -> Iterator[str]:
    paths = {name: folder / f"{name}.json" for name in VARIANTS}
    of: dict[str, Outcomes] = {name: json.loads(path.read_text()) for name, path in paths.items()}
    for name, words in VARIANTS.items():
        yield f"{words}: {counts(of[name])}"
        yield from changed(of["plain"], of[name])
        if name in SAME:
            yield f"  as {VARIANTS[SAME[name]]}: {equal(of[SAME[name]], of[name])}"
    yield "TRL alone, failed:"
    for name, test in of["plain"].items():
        if test["outcome"] == "failed":
            yield f"  {name}: {test['why']}"


if __name__ == "__main__":
    print(*report(Path(sys.argv[1])), sep="\n")
