"""The rewards: hand-computed values, the papers' combinations, fuzzed texts, worded errors."""

from __future__ import annotations

import builtins
import math
import threading

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cppo import rewards
from cppo.rewards import answers, combine, from_names, gsm8k_reward, perception_reward


def one(function, text, gold="42", **columns):
    """The reward of a single completion."""
    (reward,) = function([text], prompts=["?"], answer=[gold], **columns)
    assert type(reward) is float
    return reward


# ---- answers in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{17}", "17"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{ 1, 2 \right\}}", r"\left\{ 1, 2 \right\}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{\}", None),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed{}", ""),
        (r"\boxed{{{}}}", "{{}}"),
        (r"\boxed{\boxed{3}}", "3"),
        ("boxed{3}", None),
        ("", None),
        ("\\boxed{" + "{" * 50_000, None),
    ],
)
def test_last_boxed(text, expected):
    assert answers.last_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3+5=8, 8+9=17.", 17.0),
        ("$1,234.50", 1234.5),
        ("that is 1,234, I think", 1234.0),
        ("1,2,3", 3.0),
        ("12,345,678 in all", 12345678.0),
        ("45%", 45.0),
        (r"\$5 or 50\%", 50.0),
        ("10 - 5", 5.0),
        ("x = -5", -5.0),
        ("-$7", -7.0),
        ("5-3", 3.0),
        ("(2)-3", 3.0),
        ("minus \u22124", -4.0),
        ("3.14.", 3.14),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("1{,}000", 1000.0),
        ("9" * 400, None),
        ("no digits", None),
        ("", None),
    ],
)
def test_last_number(text, expected):
    assert answers.last_number(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", 42.0),
        ("3/4", 0.75),
        (r"-\frac{3}{4}", -0.75),
        (r"\dfrac34", 0.75),
        (r"90^\circ", 90.0),
        ("-1,234.5", -1234.5),
        ("x = 5", 5.0),
        (r"\text{7}", 7.0),
        ("1/0", None),
        ("3 and 4", None),
        ("x", None),
        ("1e9999", None),
    ],
)
def test_read_number(text, expected):
    assert answers.read_number(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>1</think>\n<answer> 42 </answer>", "42"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        ("steps\n#### 42", "42"),
        ("<think>5</think> it is 6", "it is 6"),
        (" plain ", "plain"),
        ("<answer>5", "<answer>5"),
    ],
)
def test_final_answer(text, expected):
    assert answers.final_answer(text) == expected


# ---- correctness


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        ("42", "42", 1),
        (" 42\n", "42", 1),
        ("<answer>two  words</answer>", "two words", 1),
        (r"\boxed{A}", "A", 1),
        ("42.0", "42", 0),
        ("a", "A", 0),
        ("", "42", 0),
        ("42", 42, 1),
    ],
)
def test_exact_match(text, gold, reward):
    assert one(rewards.exact_match, text, gold) == reward


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        ("so it is 42.", "42", 1),
        ("42 apples and 7 pears", "42", 0),
        (r"\boxed{42} because 1+41", "42", 1),
        ("$1,000,000", "1000000", 1),
        ("1000001", "1000000", 0),  # a relative tolerance of 1e-6 would let this pass
        ("41.9999999", "42", 1),
        ("41.99999", "42", 0),
        ("42%", "42", 1),
        (r"\frac{1}{2}", "0.5", 1),
        ("0.5", "1/2", 1),
        ("<answer>forty-two</answer> 42", "42", 1),
        ("x", "42", 0),
        ("42", "#### 42", 1),
        ("-42", "42", 0),
        ("9" * 400, "42", 0),
    ],
)
def test_numeric(text, gold, reward):
    assert one(rewards.numeric, text, gold) == reward


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        (r"\boxed{42}", "42", 1),
        (r"\boxed{42}", r"so \boxed{42}", 1),
        (r"\boxed{ 42.0 }", "42", 1),
        (r"\boxed{\dfrac{14}{3}}", r"\frac{14}{3}", 1),
        (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"\left( 3, \frac{\pi}{2} \right)", 1),
        (r"\boxed{Evelyn}", r"\text{Evelyn}", 1),
        (r"\boxed{90}", r"90^\circ", 1),
        (r"\boxed{x=5}", "5", 1),
        (r"\boxed{(B)}", "B", 1),
        (r"\boxed{2,220}", "2220", 1),
        (r"\boxed{1,2}", "12", 0),
        (r"\boxed{43}", "42", 0),
        (r"\boxed{42", "42", 0),
        (r"\boxed{}", "42", 0),
        ("42", "42", 0),
    ],
)
def test_boxed(text, gold, reward):
    assert one(rewards.boxed, text, gold) == reward


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        (r"\boxed{\frac{28}{6}}", r"\frac{14}{3}", 1),
        (r"so $2\sqrt{2}$", r"\sqrt{8}", 1),
        (r"\boxed{q - p}", "p - q", 0),
        (r"\boxed{-q + p}", "p - q", 1),
        (r"<answer>\boxed{0.5}</answer>", r"$\frac{1}{2}$", 1),
        ("no idea", "42", 0),
        ("", "42", 0),
    ],
)
def test_math_verify(text, gold, reward):
    pytest.importorskip("math_verify", reason="the extra 'math' is not installed")
    assert one(rewards.math_verify, text, gold) == reward


def test_math_verify_runs_outside_the_main_thread():
    pytest.importorskip("math_verify", reason="the extra 'math' is not installed")
    found = []
    thread = threading.Thread(
        target=lambda: found.append(one(rewards.math_verify, r"\boxed{1/2}", "0.5"))
    )
    thread.start()
    thread.join()
    assert found == [1.0]


def test_math_verify_missing_names_the_extra(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "math_verify":
            raise ImportError("No module named 'math_verify'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'cppo\[math\]'"):
        one(rewards.math_verify, "1", "1")


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        ("<think>a</think>\n<answer>42</answer>", "42", 2.0),
        ("<answer>1,042</answer>", "1042", 2.0),
        ("<answer>42.0</answer>", "42", 1.5),
        ("<answer>$42 per day</answer>", "42", 1.5),
        ("it is 42", "42", 1.5),
        ("<answer>43</answer> 42", "42", 0.0),
        ("42 or 43", "42", 0.0),
        ("<answer>42</answer>", "steps\n#### 42", 2.0),
        ("", "42", 0.0),
    ],
)
def test_gsm8k(text, gold, reward):
    assert one(rewards.gsm8k, text, gold) == reward


# ---- format

THINK = "<think>a</think>\n"


@pytest.mark.parametrize(
    ("text", "think", "think_answer", "think_boxed", "tags"),
    [
        (THINK + "<answer>4</answer>", 1, 1, 0, 1.0),
        (THINK + r"so \boxed{4}.", 1, 0, 1, 0.5),
        ("\n" + THINK + "4", 1, 0, 0, 0.5),
        (THINK, 0, 0, 0, 0.5),
        ("<think>a</think><answer></answer>", 1, 1, 0, 1.0),
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


# ---- length


def box(length, value=42):
    """A completion of `length` characters with a boxed value."""
    return rf"\boxed{{{value}}}".rjust(length, ".")


def test_length_is_relative_to_the_question():
    # Question a: lengths 10, 20, 30; question b: 100, 200 (on its own scale).
    texts = [box(10), box(20), box(30, 7), box(100, 7), box(200)]
    prompts = ["a", "a", "a", "b", "b"]
    found = rewards.Length()(texts, prompts=prompts, answer=["42"] * 5)
    assert found == [0.5, 0.0, -0.5, 0.0, -0.5]
    assert rewards.Length()([box(10)] * 3, prompts=["a"] * 3, answer=["42"] * 3) == [0.0] * 3
    assert rewards.Length()([], prompts=[], answer=[]) == []


def test_length_tells_questions_with_equal_text_apart_by_their_answer():
    texts = [box(10), box(20), box(10, 7), box(20, 7)]
    found = rewards.Length()(texts, prompts=["a"] * 4, answer=["42", "42", "7", "7"])
    assert found == [0.5, -0.5, 0.5, -0.5]


def test_length_in_tokens():
    texts, ids = [box(10), box(10)], [[1] * 4, [1] * 8]
    function = rewards.Length(unit="tokens")
    assert function(texts, prompts=["a"] * 2, answer=["42"] * 2, completion_ids=ids) == [0.5, -0.5]
    with pytest.raises(ValueError, match="unit 'tokens' needs `completion_ids`"):
        function(texts, prompts=["a"] * 2, answer=["42"] * 2)


@pytest.mark.parametrize(
    ("length", "value", "expected"),
    [(100, 42, 0.75), (200, 42, 0.5), (300, 42, 0.5), (100, 7, -0.75), (200, 7, -0.5)],
)
def test_cosine_length(length, value, expected):
    function = rewards.CosineLength(max_length=200)
    assert one(function, box(length, value)) == pytest.approx(expected)


def test_cosine_length_at_a_third():
    # cos(pi / 3) = 1/2: three quarters of the way from the end value back to the start value.
    assert one(rewards.CosineLength(max_length=300), box(100)) == pytest.approx(0.875)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("a b", 0.0),
        ("a b c d", 0.0),
        ("a b a b", -1 / 3),  # ab, ba, ab: two distinct of three
        ("A a a A", -2 / 3),
        ("a " * 101, -0.99),
    ],
)
def test_repetition_penalty(text, expected):
    assert one(rewards.RepetitionPenalty(ngram_size=2), text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0), (75, 0), (80, -0.2), (100, -1), (101, -1)]
)
def test_overlong(length, expected):
    function = rewards.Overlong(max_length=100, buffer=25)
    assert one(function, "x", completion_ids=[[0] * length]) == pytest.approx(expected)
    assert math.copysign(1, one(function, "x", completion_ids=[[0]])) == 1  # no -0.0


# ---- call shape


def test_message_completions_are_accepted():
    say = [{"role": "assistant", "content": r"\boxed{42}"}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": r"\boxed{42}"}]}]
    none = [{"role": "assistant", "content": None}]
    found = rewards.boxed([say, parts, none], prompts=["?"] * 3, answer=["42"] * 3, other=[1, 2, 3])
    assert found == [1.0, 1.0, 0.0]


def test_every_reward_has_a_metric_name():
    functions, _ = from_names(list(rewards.NAMES))
    for function in functions:
        name = getattr(function, "name", None) or function.__name__
        assert name.isidentifier()


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


def test_a_none_of_a_part_counts_zero():
    function = rewards.Combined("c", (lambda c, **k: [None, 1.0], rewards.tag_count), (1.0, 1.0))
    assert function(["", ""]) == [0.0, 1.0]


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
        (["boxd"], "unknown reward 'boxd'; did you mean 'boxed'"),
        (["cosine"], "unknown reward 'cosine'"),
        (
            [{"cosine_length": {"max_len": 5}}],
            "'cosine_length' 'max_len'; did you mean 'max_length'",
        ),
        ([{"boxed": {"a": 1}}], "'boxed' takes no parameters, got {'a': 1}"),
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


@pytest.mark.parametrize(
    ("function", "golds", "message"),
    [
        (rewards.boxed, ["1", None], "boxed: row 1 has no ground truth, got None"),
        (rewards.boxed, ["1", "  "], "boxed: row 1 has no ground truth"),
        (rewards.boxed, ["1", r"\boxed{2"], "boxed: row 1: ground truth must be an answer"),
        (rewards.exact_match, ["", "1"], "exact_match: row 0 has no ground truth"),
        (rewards.numeric, ["1", "abc"], "numeric: row 1: ground truth must be a number, got 'abc'"),
        (rewards.numeric, ["1/0", "1"], "numeric: row 0: ground truth must be a number"),
        (rewards.gsm8k, ["1", "12 apples"], "gsm8k: row 1: ground truth must be a number"),
        (rewards.boxed, ["1"], "answer must have one entry per completion = 2, got 1"),
        (rewards.boxed, None, "boxed: needs the column 'answer'"),
        (rewards.boxed, "12", "boxed: needs the column 'answer', .* got '12'"),
    ],
)
def test_bad_ground_truths(function, golds, message):
    with pytest.raises(ValueError, match=message):
        function(["x", "y"], prompts=["?", "?"], answer=golds)


def test_unparsable_ground_truth_is_an_error_for_math_verify():
    pytest.importorskip("math_verify", reason="the extra 'math' is not installed")
    with pytest.raises(ValueError, match="math_verify: row 1: ground truth must be an expression"):
        rewards.math_verify(["1", "2"], prompts=["?"] * 2, answer=["1", "$$"])


@pytest.mark.parametrize("completion", [None, 5, [], ["text"], {"role": "assistant"}])
def test_bad_completions(completion):
    with pytest.raises(TypeError, match="a completion must be a string or a list of messages"):
        rewards.tag_count([completion], prompts=["?"])


# ---- any text

PIECES = st.sampled_from(
    [
        *("<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "{", "\\", "\\frac{"),
        *("1,000", "-", "$", "%", "/", "0", "9" * 330, "e9", "####", "\n", "\u0663", "\u00b2"),
        *(".", ",", "^", "\\text{", "=", "\\left", "{,}", "1/0", "nan", "inf"),
    ]
)
TEXTS = st.text() | st.lists(PIECES | st.text(max_size=4), max_size=25).map("".join)
PLAIN = [name for name in rewards.NAMES if name not in ("math_verify", "math_reward")]


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


@settings(max_examples=30, deadline=None, derandomize=True)
@given(TEXTS)
def test_no_text_raises_in_math_verify(text):
    pytest.importorskip("math_verify", reason="the extra 'math' is not installed")
    assert one(rewards.math_verify, text) in (0.0, 1.0)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "piece", ["1,", "<answer>", "{", "\\boxed{", "<think>", "-", "9", " ", "$", "1/"]
)
def test_long_texts_take_no_long_time(piece):
    text = piece * (100_000 // len(piece))
    for function in from_names(PLAIN)[0]:
        one(function, text, completion_ids=[[0]])
