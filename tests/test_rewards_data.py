"""Every ground truth of GSM8K and MATH-500 against itself in every wrapping, and its neighbour."""

import re

import pytest
from question_cases import DATA
from reward_cases import reward_of

from cppo.questions import load_gsm8k, load_math

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


def mutated(gold):
    """Other answers that look like a ground truth: another digit, another sign, other letters."""
    digits = [place for place, character in enumerate(gold) if character.isdigit()]
    for place in {*digits[:1], *digits[-1:]}:
        yield gold[:place] + str((int(gold[place]) + 1) % 10) + gold[place + 1 :]
    if digits and gold != "0" and not gold.startswith("-"):
        yield f"-{gold}"
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{4,}", gold)
    for word in words[:1]:
        yield gold.replace(word, word[::-1])
    yield from (f"{gold} = 987654", f"987654 = {gold}", f"{gold} + 987654", rf"\text{{not }}{gold}")


@pytest.mark.parametrize(
    ("data", "name"), [*(("math", name) for name in ("boxed", "math_verify")), ("gsm8k", "numeric")]
)
def test_no_changed_ground_truth_equals_it(data, name):
    golds, function = list(dict.fromkeys(golds_of(data)))[:1000], reward_of(name)
    pairs = [(gold, other) for gold in golds for other in mutated(gold)]
    texts = [rf"\boxed{{{other}}}" for _, other in pairs]
    found = function(texts, prompts=["?"] * len(texts), answer=[gold for gold, _ in pairs])
    assert [pair for pair, reward in zip(pairs, found, strict=True) if reward] == []
