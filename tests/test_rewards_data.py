"""Every ground truth of GSM8K and MATH-500 against itself in every wrapping, and its neighbour."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cppo import rewards
from cppo.questions import load_gsm8k, load_math

DATA = Path(os.environ.get("CPPO_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))
ALONE = ["@", "$@$", r"\(@\)", "<think>7</think>\n<answer>@</answer>", "<answer> $@$ </answer>"]
BOXED = [r"so $\boxed{@}$.", r"\fbox { @ }", r"<answer>\boxed{@}</answer>"]
PLACES = {
    "boxed": BOXED,
    "math_verify": ALONE + BOXED,
    "exact_match": ALONE + BOXED,
    "numeric": ALONE + BOXED,
    "gsm8k": ALONE + BOXED,
}


def golds_of(name):
    if not (DATA / name).exists():
        pytest.skip(f"no {name} in the data folder (CPPO_DATA_DIR, default ../shared/data)")
    pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    if name == "math":
        return [row["answer"] for row in load_math(DATA / name, "test")]
    return [row["answer"] for split in ("train", "test") for row in load_gsm8k(DATA / name, split)]


def reward_of(name):
    if name == "math_verify":
        pytest.importorskip("math_verify", reason="the extra 'math' is not installed")
    return getattr(rewards, name)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        *(("math", name) for name in ("boxed", "math_verify", "exact_match")),
        *(("gsm8k", name) for name in PLACES),
    ],
)
def test_every_ground_truth_equals_itself(data, name):
    golds, function = golds_of(data), reward_of(name)
    for place in PLACES[name]:
        texts = [place.replace("@", gold) for gold in golds]
        found = function(texts, prompts=["?"] * len(golds), answer=golds)
        assert [gold for gold, reward in zip(golds, found, strict=True) if not reward] == []


@pytest.mark.parametrize(
    ("name", "equal"),
    [("exact_match", []), ("boxed", [("5", "x=5")]), ("math_verify", [("5", "x=5")])],
)
def test_different_neighbours_of_math(name, equal):
    golds, function = golds_of("math"), reward_of(name)
    pairs = [(a, b) for a, b in zip(golds, golds[1:], strict=False) if a != b]
    texts, answers = [rf"\boxed{{{b}}}" for _, b in pairs], [a for a, _ in pairs]
    found = function(texts, prompts=["?"] * len(texts), answer=answers)
    assert [pair for pair, reward in zip(pairs, found, strict=True) if reward] == equal
