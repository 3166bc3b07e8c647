"""The rewards: hand-computed values, the papers' combinations, fuzzed texts, worded errors."""

import math
import threading
import time

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from reward_cases import one, reward_of

from cppo import rewards
from cppo.rewards import combine, from_names, gsm8k_reward, perception_reward
from cppo.rewards.answers import last_boxed
from cppo.rewards.spelling import normalize_answer

# ---- format

THINK = "<think>a</think>\n"


@pytest.mark.parametrize(
    ("text", "think", "think_answer", "think_boxed", "tags"),
    [
        (THINK + "<answer>4</answer>", 1, 1, 0, 1.0),
        ("<think></think><answer> </answer>", 1, 0, 0, 1.0),
        ("<think></think><answer>4</answer>", 1, 1, 0, 1.0),
        ("<think>a <answer>4</answer></think><answer>5</answer>", 1, 0, 0, 0.5),
        (THINK + r"so \boxed{4}.", 1, 0, 1, 0.5),
        ("\n" + THINK + "4", 1, 0, 0, 0.5),
        (THINK, 0, 0, 0, 0.5),
        ("<think>a</think><answer></answer>", 1, 0, 0, 1.0),
        ("Well. " + THINK + "4", 0, 0, 0, 0.5),
        ("<think>a<think>b</think>4", 0, 0, 0, 0.25),
        (THINK + "<answer>4</answer> bye", 1, 0, 0, 1.0),
        (THINK + "<answer>4</answer><answer>5</answer>", 1, 0, 0, 0.5),
        (r"<think>\boxed{4}</think> 4", 1, 0, 0, 0.5),
        ("</think>4<think>", 0, 0, 0, 0.5),
        ("", 0, 0, 0, 0.0),
    ],
)
def test_formats(text, think, think_answer, think_boxed, tags):
    assert one(rewards.think_format, text) == think
    assert one(rewards.think_answer_format, text) == think_answer
    assert one(rewards.think_boxed_format, text) == think_boxed
    assert one(rewards.tag_count, text) == tags


# ---- names and combinations


def test_papers_combinations():
    right, format_only = THINK + r"\boxed{42}", THINK + r"\boxed{7}"
    golds = {"prompts": ["?"] * 3, "answer": ["42"] * 3}
    assert perception_reward([right, format_only, r"\boxed{42}"], **golds) == pytest.approx(
        [1.0, 0.1, 0.9]
    )
    texts = [THINK + "<answer>42</answer>", THINK + "<answer>42.0</answer>", "it is 42"]
    assert gsm8k_reward(texts, **golds) == [3.0, 2.5, 1.5]


def test_combine():
    function = combine({"accuracy": 0.9, "format": 0.1})
    assert function.name == "accuracy+format"
    assert one(function, r"\boxed{42}") == pytest.approx(0.9)
    assert combine({"boxed": 2}, name="mine").name == "mine"


def test_a_none_of_a_part_is_left_out_of_the_sum():
    first = lambda completions, **columns: [None, None, 1.0]  # noqa: E731
    second = lambda completions, **columns: [None, 2.0, 3.0]  # noqa: E731
    function = rewards.Combined("c", (first, second), (10.0, 0.5))
    assert function(["", "", ""]) == [None, 1.0, 11.5]


def test_a_part_that_leaves_a_row_out_in_a_combination():
    ((boxed,), _) = from_names([{"boxed": {"unfinished_thought": None}}])
    function = rewards.Combined("c", (boxed, rewards.tag_count), (1.0, 1.0))
    texts = ["<think>cut off", r"<think>a</think> \boxed{4}"]
    assert function(texts, prompts=["?"] * 2, answer=["4"] * 2) == [0.25, 1.5]


def test_from_names():
    functions, weights = from_names(
        [
            "boxed",
            {"cosine_length": {"max_length": 512, "correct": [2.0, 1.0]}, "weight": 0.5},
            {"tag_count": None, "weight": 2},
            rewards.numeric,
            "cppo.rewards.functions:think_format",
        ]
    )
    assert functions == [
        rewards.boxed,
        rewards.CosineLength(512, (2.0, 1.0)),
        rewards.tag_count,
        rewards.numeric,
        rewards.think_format,
    ]
    assert weights == [1.0, 0.5, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["my_reward.py"], "must be FILE.py:NAME"),
        (["boxd"], "unknown reward 'boxd'; did you mean 'boxed'"),
        (["cosine"], "unknown reward 'cosine'"),
        (
            [{"cosine_length": {"max_len": 5}}],
            "'cosine_length' 'max_len'; did you mean 'max_length'",
        ),
        ([{"boxed": {"a": 1}}], r"parameter of 'boxed' 'a' \(allowed: unfinished_thought\)"),
        ([{"boxed": {"unfinished": 1}}], "did you mean 'unfinished_thought'"),
        ([{"boxed": {"answer": 1}}], "unknown parameter of 'boxed' 'answer'"),
        ([{"tag_count": {"a": 1}}], "'tag_count' takes no parameters, got {'a': 1}"),
        ([{"gsm8k_reward": {"a": 1}}], "'gsm8k_reward' takes no parameters"),
        ([{"boxed": 5}], "parameters of 'boxed' must be a mapping, got 5"),
        ([{"boxed": None, "numeric": None}], "an entry is a name or"),
        ([{"weight": 1}], "an entry is a name or"),
        ([7], "an entry is a name or"),
        ([{"boxed": None, "weight": "x"}], "weight of 'boxed' must be a finite number, got 'x'"),
        ([{"boxed": None, "weight": float("nan")}], "weight of 'boxed'"),
        ([], "at least one reward"),
        ("boxed", "must be a list"),
        (["no_such_module:f"], "cannot import the reward 'no_such_module:f'"),
        (["math:no_such"], "cannot import the reward 'math:no_such'"),
        (["math:pi"], "'math:pi' must be a function"),
        ([{"length": {"unit": "words"}}], "unit must be 'characters' or 'tokens', got 'words'"),
        ([{"length": {"accuracy": "vibes"}}], "accuracy must be one of exact_match"),
        ([{"cosine_length": {"max_length": 0}}], "max_length must be a whole number >= 1, got 0"),
        ([{"cosine_length": {"wrong": [1]}}], "wrong must be"),
        ([{"repetition_penalty": {"max_penalty": 1}}], "max_penalty must be a number <= 0, got 1"),
        ([{"repetition_penalty": {"ngram_size": 0}}], "ngram_size"),
        ([{"repetition_penalty": {"unit": "words"}}], "unit must be 'characters' or 'tokens'"),
        ([{"length": {"group_size": 0}}], "group_size must be a whole number >= 1, or None, got 0"),
        ([{"overlong": {"max_length": 10, "buffer": 20}}], "buffer must be in 1 ... max_length"),
    ],
)
def test_bad_names(entries, message):
    with pytest.raises((ValueError, TypeError), match=message):
        from_names(entries)


@pytest.mark.parametrize("weights", [{}, None, {"boxed": "1"}, {"boxd": 1.0}, {"boxed": math.inf}])
def test_bad_combinations(weights):
    with pytest.raises(ValueError, match="cppo.rewards"):
        combine(weights)


# ---- ground truths that cannot be read


ONE_OF_TWO = [
    ("boxed", ["1", None], "completion 1 has no ground truth, got None"),
    ("boxed", ["1", "  "], "completion 1 has no ground truth"),
    ("boxed", ["1", r"\boxed{2"], "completion 1: ground truth must be an answer"),
    ("exact_match", ["", "1"], "completion 0 has no ground truth"),
    ("numeric", ["1", "abc"], "completion 1: ground truth must be a number, got 'abc'"),
    ("numeric", ["1/0", "1"], "completion 0: ground truth must be a number"),
    ("gsm8k", ["1", "12 apples"], "completion 1: ground truth must be a number"),
    ("boxed", ["1", {"a": 1}], "completion 1 has a ground truth that is not a string"),
    ("numeric", ["1", ["a", "b"]], r"completion 1: .* must be a number, got \['a', 'b'\]"),
    ("boxed", ["1"], "answer must have one entry per completion = 2, got 1"),
    ("boxed", None, "needs the column 'answer'"),
    ("boxed", "12", "needs the column 'answer', .* got '12'"),
]


@pytest.mark.parametrize(("name", "golds", "message"), ONE_OF_TWO)
def test_bad_ground_truths(name, golds, message):
    with pytest.raises(ValueError, match=f"^cppo.rewards.{name}: {message}"):
        reward_of(name)(["x", "y"], prompts=["?", "?"], answer=golds)


# ---- any text

PIECES = st.sampled_from(
    [
        *("<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "{", "\\", "\\frac{"),
        *("1,000", "-", "$", "%", "/", "0", "9" * 330, "e9", "####", "\n", "\u0663", "\u00b2"),
        *(".", ",", "^", "\\text{", "=", "\\left", "{,}", "1/0", "nan", "inf"),
    ]
)
TEXTS = st.text() | st.lists(PIECES | st.text(max_size=4), max_size=25).map("".join)
PLAIN = [name for name in rewards.NAMES if name not in ("math_verify", "math_reward", "length")]
PLAIN = [*PLAIN, {"length": {"group_size": 1}}]
GOLDS = st.sampled_from(["42", r"\frac{1}{2}", "(1, 2)", "Evelyn", r"5\text{ cm}", "x = 1"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(TEXTS, min_size=1, max_size=4))
@example(["\\boxed{\\", "\\frac{1}{0}", "1/" * 99, "\ud800"])
def test_no_text_raises(texts):
    columns = {"prompts": ["?"] * len(texts), "answer": ["42"] * len(texts)}
    columns["completion_ids"] = [[0]] * len(texts)
    for function in from_names(PLAIN)[0]:
        found = function(texts, **columns)
        assert len(found) == len(texts)
        assert all(type(reward) is float and math.isfinite(reward) for reward in found)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TEXTS, GOLDS)
def test_no_answer_raises(text, gold):
    for function in (rewards.boxed, rewards.exact_match):
        assert one(function, rf"\boxed{{{text}}}", gold) in (0.0, 1.0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TEXTS)
def test_an_answer_equals_itself(text):
    box = rf"\boxed{{{text}}}"
    assume("think>" not in text and last_boxed(box) == text and normalize_answer(text))
    assert one(rewards.boxed, box, box) == 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(TEXTS, GOLDS)
def test_no_text_raises_in_math_verify(text, gold):
    assert one(reward_of("math_verify"), text, gold, timeout=2.0) in (0.0, 1.0)


REPEATED = [
    *("<think>", "<answer>", "</answer>", "\\boxed{", "####", "$a$,", "$", "{", "\\", "%\n"),
    *("1,", "1,234", "1 234", "1/", "9", "-", " ", "\0", "\ud800", ",000", "(", "\\frac", "1/2"),
    *("^", "=", "a ", "\u00bd", "\\boxed{1},", "the answer is 5. ", "not ", "\\sqrt{", "\n- "),
]
SECONDS = 3.0  # of work, for a reward of a million characters
LONG = {
    **{piece: piece * (1_000_000 // len(piece)) for piece in REPEATED},
    "parentheses": "(" * 100_000 + ")" * 100_000,
    "a box of parentheses": r"\boxed{" + "(" * 100_000 + ")" * 100_000 + "}",
    "a box of digits": r"\boxed{" + "9" * 1_000_000 + "}",
    "nested boxes": r"\boxed{" * 100_000 + "1" + "}" * 100_000,
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 180 + "2" + "}" * 181,
    "nested fonts": r"\boxed{" + r"\text{" * 300 + "x" + "}" * 301,
    "nested tuples": r"\boxed{" + "(1," * 600 + "2" + ")" * 600 + "}",
    "equations": r"\boxed{" + "x=" * 900 + "1}",
    "powers": r"\boxed{" + "^" * 1900 + "}",
    "percentages": r"\boxed{" + "=%" * 950 + "}",
    "white space in a tag": "<answer>" + " " * 1_000_000 + "</answer>",
    "an exponent": r"\boxed{1e999999999}",
}


def in_a_thread(clock, function, text, **columns):
    """The reward of a single completion, asked in a thread, and the seconds that it takes."""
    found = []

    def ask():
        began = clock()
        found.extend([one(function, text, **columns), clock() - began])

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return found


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", LONG, ids=ascii)
def test_no_text_takes_long(name):
    for function in from_names(PLAIN)[0]:
        reward, seconds = in_a_thread(time.thread_time, function, LONG[name], completion_ids=[[0]])
        assert seconds < SECONDS
        if function in rewards.ACCURACIES.values():
            assert reward == 0.0


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", LONG, ids=ascii)
def test_no_text_takes_long_in_math_verify(name):
    math_verify = reward_of("math_verify")
    for gold in ("42", r"\sqrt{2}"):
        reward, seconds = in_a_thread(
            time.monotonic, math_verify, LONG[name], gold=gold, timeout=1.0
        )
        assert reward == 0.0 and seconds < SECONDS + 3  # for a new process
