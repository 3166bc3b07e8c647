"""What of a completion is judged: the template's opening, the end of the thought, the last turn."""

import functools

import pytest
import reward_cases
from reward_cases import reward_of

from cppo import rewards
from cppo.rewards import completion_text, from_names, gsm8k_reward

OPENED = "<|im_start|>assistant\n<think>\n"
SWITCHED_OFF = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
PLAIN = "<|im_start|>assistant\n"


one = functools.partial(reward_cases.one, gold="4")


# ---- what the chat template opened


@pytest.mark.parametrize(
    ("prompt", "text", "think", "think_answer", "think_boxed", "tags"),
    [
        (OPENED, "x</think>\n<answer>4</answer>", 1, 1, 0, 1.0),
        (OPENED, "x</think>\nso \\boxed{4}", 1, 0, 1, 0.5),
        (OPENED, "<think>x</think>4", 0, 0, 0, 0.25),  # opened twice
        (OPENED, "x", 0, 0, 0, 0.25),
        (SWITCHED_OFF, "<answer>4</answer>", 1, 1, 0, 1.0),
        (SWITCHED_OFF, r"\boxed{4}", 1, 0, 1, 0.5),
        (SWITCHED_OFF, "", 0, 0, 0, 0.5),
        (OPENED + "x</think>\n<answer>", "4</answer>", 1, 1, 0, 1.0),
        (PLAIN, "x</think>\n<answer>4</answer>", 0, 0, 0, 0.75),
        (PLAIN, "<think>x</think>\n<answer>4</answer>", 1, 1, 0, 1.0),
        ("", "<think>x</think>\n<answer>4</answer>", 1, 1, 0, 1.0),
        (None, "<think>x</think>\n<answer>4</answer>", 1, 1, 0, 1.0),
    ],
)
def test_formats_are_judged_on_what_was_given_and_written(
    prompt, text, think, think_answer, think_boxed, tags
):
    for prompts in (prompt, [prompt]):
        for completion in (text, [{"role": "assistant", "content": text}]):
            columns = {"generation_prompts": prompts}
            assert one(rewards.think_format, completion, **columns) == think
            assert one(rewards.think_answer_format, completion, **columns) == think_answer
            assert one(rewards.think_boxed_format, completion, **columns) == think_boxed
            assert one(rewards.tag_count, completion, **columns) == tags


def test_gsm8k_under_a_template_that_opens_the_thought():
    text = "x</think>\n<answer>4</answer>"
    assert one(gsm8k_reward, text, generation_prompts=[OPENED]) == 3.0
    assert one(gsm8k_reward, text, generation_prompts=[PLAIN]) == 2.0
    assert one(gsm8k_reward, "4 or 5, so <answer>4</answer>", generation_prompts=[OPENED]) == 0.0
    found = gsm8k_reward([text] * 2, answer=["4"] * 2, generation_prompts=[OPENED, PLAIN])
    assert found == [3.0, 2.0]


def test_a_template_can_be_set_where_the_trainer_does_not_pass_it():
    function = functools.partial(rewards.think_format, generation_prompts="<think>")
    assert function(["x</think>4", "4"], prompts=["?"] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("name", ["boxed", "exact_match", "numeric", "math_verify", "gsm8k"])
def test_bad_generation_prompts(name):
    function = reward_of(name)
    with pytest.raises(ValueError, match=f"{name}: generation_prompts must have one entry per com"):
        one(function, "4", generation_prompts=["<think>"] * 2)
    with pytest.raises(TypeError, match=f"{name}: generation_prompts must be strings, got 5"):
        one(function, "4", generation_prompts=[5])


# ---- where the answer stands

PLACES = [
    ("<think>7</think> @", 1),
    ("<think>maybe @", 0),  # cut off
    ("<think>@</think>", 0),
    ("<think>@</think> I do not know", 0),
    ("<think>@</think> <think>7</think>", 0),
    ("<think>7</think> <think>or 8</think> @", 1),
    ("<think>7</think> @ <think>or 8", 0),  # the thought goes on
    ("7</think> @", 1),
    ("@ <think>7</think>", 0),
    ("@", 1),
]


@pytest.mark.parametrize(("text", "reward"), PLACES)
@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("boxed", r"\boxed{4}"),
        ("exact_match", "4"),
        ("exact_match", "<answer>4</answer>"),
        ("numeric", "4"),
        ("numeric", r"\boxed{4}"),
        ("math_verify", "<answer>4</answer>"),
    ],
)
def test_the_answer_stands_behind_the_thought(name, answer, text, reward):
    assert one(reward_of(name), text.replace("@", answer)) == reward


def test_the_answer_stands_behind_the_thought_for_gsm8k():
    for text, reward in PLACES:
        assert one(rewards.gsm8k, text.replace("@", "<answer>4</answer>")) == 2 * reward


@pytest.mark.parametrize("name", ["boxed", "exact_match", "numeric", "math_verify", "gsm8k"])
def test_what_an_unfinished_thought_earns(name):
    function, cut_off = reward_of(name), r"<answer>4</answer> maybe \boxed{4}"
    right = 2.0 if name == "gsm8k" else 1.0
    columns = {"generation_prompts": OPENED}
    assert one(function, cut_off, **columns) == 0.0
    assert one(function, cut_off, unfinished_thought=-1, **columns) == -1.0
    assert one(function, cut_off, unfinished_thought=None, **columns) is None
    assert one(function, cut_off, unfinished_thought="judged", **columns) == right
    assert one(function, "7</think>" + cut_off, unfinished_thought=-1, **columns) == right
    ((configured,), _) = from_names([{name: {"unfinished_thought": -0.5}}])
    assert configured.__name__ == name
    assert one(configured, cut_off, **columns) == -0.5
    for value in ("zero", float("nan"), True, [0]):
        with pytest.raises(ValueError, match=f"{name}: unfinished_thought must be a finite number"):
            from_names([{name: {"unfinished_thought": value}}])


# ---- conversations

SAYS = {"role": "assistant", "content": r"\boxed{4}"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [{"name": "calculator"}]}
TOOL = {"role": "tool", "content": r"\boxed{4}"}
USER = {"role": "user", "content": r"\boxed{4}"}
WRONG = {"role": "assistant", "content": r"\boxed{5}"}


@pytest.mark.parametrize(
    ("messages", "reward"),
    [
        ([SAYS], 1),
        ([WRONG, SAYS], 1),
        ([SAYS, WRONG], 0),
        ([SAYS, TOOL], 1),
        ([SAYS, USER], 1),
        ([WRONG, TOOL], 0),
        ([WRONG, USER], 0),
        ([CALLS, TOOL], 0),
        ([SAYS, CALLS, TOOL], 0),
        ([CALLS, TOOL, SAYS], 1),
        ([TOOL], 0),
        ([USER], 0),
        ([{"content": r"\boxed{4}"}], 1),
        ([{"role": "assistant"}], 0),
        ([{"role": "assistant", "content": ""}], 0),
        ([{"role": "assistant", "content": []}], 0),
        ([{"role": "assistant", "content": [{"type": "text", "text": r"\boxed{4}"}]}], 1),
        ([{"role": "assistant", "content": [{"type": "image"}, {"text": r"\boxed{4}"}]}], 1),
        ([{"role": "assistant", "content": [r"\boxed", "{4}"]}], 1),
        # thoughts in a field or a part of their own
        ([{**SAYS, "reasoning_content": r"\boxed{5}"}], 1),
        ([{**WRONG, "thinking": r"\boxed{4}"}], 0),
        ([{**SAYS, "reasoning": {"effort": "low"}}], 1),
        ([{"role": "assistant", "content": None, "reasoning": r"\boxed{4}"}], 0),
        ([{"role": "assistant", "content": None, "reasoning_content": r"\boxed{4}"}], 0),
        ([{"role": "assistant", "content": "", "thinking": r"\boxed{4}"}], 0),
        ([{"role": "assistant", "content": [{"type": "thinking", "thinking": r"\boxed{4}"}]}], 0),
    ],
)
def test_the_assistants_last_message_is_judged(messages, reward):
    assert one(rewards.boxed, messages) == reward


@pytest.mark.parametrize("prompt", [None, PLAIN, OPENED])
def test_a_thought_in_a_field_of_its_own_has_its_format(prompt):
    message = {"role": "assistant", "reasoning_content": "x", "content": "<answer>4</answer>"}
    columns = {"generation_prompts": prompt}
    assert one(rewards.think_answer_format, [message], **columns) == 1
    assert one(gsm8k_reward, [message], **columns) == 3.0
    assert one(rewards.think_format, [{**message, "content": ""}], **columns) == 0


def test_completion_text():
    assert completion_text("x") == "x"
    assert completion_text("x", OPENED) == "<think>\nx"
    assert completion_text([{**SAYS, "thinking": "t"}], OPENED) == "<think>t</think>\n\\boxed{4}"
    assert completion_text([TOOL]) == ""


@pytest.mark.parametrize(
    "completion",
    [None, 5, [], ["text"], {"role": "assistant"}, [{"role": "assistant", "content": 5}]],
)
def test_bad_completions(completion):
    with pytest.raises(TypeError, match="a completion must be a string or a list of messages"):
        rewards.tag_count([completion], prompts=["?"])


# ---- TRL's call


@pytest.mark.parametrize("name", [*rewards.NAMES, "repetition_penalty"])
def test_trl_calls_with_more_than_columns(name):
    if name.startswith("math"):
        pytest.importorskip("math_verify", reason="the extra 'math' is not installed")
    entry = {"length": {"group_size": 2}} if name == "length" else name
    ((function,), _) = from_names([entry])
    texts = ["<think>x</think>\n<answer>4</answer>", r"<think>x</think> \boxed{5}"]
    columns = {
        "answer": ["4", "4"],
        "completion_ids": [[1, 2, 3, 4], [1, 2]],
        "trainer_state": object(),
        "log_extra": lambda name, values: None,
        "log_metric": lambda name, value: None,
        "environments": [None, None],
        "subject": ["a", "b"],
    }
    as_strings = function(completions=texts, prompts=["?", "?"], **columns)
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    prompts = [[{"role": "user", "content": "?"}]] * 2
    assert function(completions=messages, prompts=prompts, **columns) == as_strings
    assert all(type(reward) is float for reward in as_strings)
