"""Dataset rows as questions: TRL's and verl's format, images in every place, worded errors."""

import base64

import numpy as np
import pytest
from PIL import Image
from question_cases import IMAGE, encoded, picture, text

from cppo.questions import QuestionError, as_question

# ---- TRL rows


def test_plain_prompt():
    question = as_question({"prompt": "2 + 2?", "answer": "4", "level": 1})
    assert question.messages == [{"role": "user", "content": "2 + 2?"}]
    assert question.images == [] and question.columns == {"answer": "4", "level": 1}


def test_messages_keep_what_a_template_reads():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    prompt = [
        {"role": "developer", "content": "Use tools."},
        {"role": "user", "content": "1?", "name": "Ann", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "content": "2", "tool_call_id": "x"},
    ]
    messages = as_question({"prompt": prompt}).messages
    assert messages[0] == {"role": "developer", "content": "Use tools."}
    assert messages[1] == {"role": "user", "content": "1?", "name": "Ann"}
    assert messages[2] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert messages[3]["reasoning_content"] == "Hm." and messages[3]["content"] == ""
    assert messages[4]["tool_call_id"] == "x"


@pytest.mark.parametrize(
    ("prompt", "is_conversational"),
    [("2?", False), ([{"role": "user", "content": "2?"}], True), (np.str_("2?"), False)],
)
def test_whether_the_prompt_was_a_conversation(prompt, is_conversational):
    question = as_question({"prompt": prompt}, 5)
    assert question.is_conversational is is_conversational and question.row == 5
    assert question.messages == [{"role": "user", "content": "2?"}]
    assert as_question({"prompt": prompt, "image": picture()}).is_conversational is (
        is_conversational
    )


@pytest.mark.parametrize("column", ["image", "images"])
def test_images_without_parts_go_before_the_first_user_text(column):
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "What?"}]
    value = picture() if column == "image" else [picture(), picture(8, 9)]
    question = as_question({"prompt": prompt, column: value})
    count = 1 if column == "image" else 2
    assert question.messages[1]["content"] == [IMAGE] * count + [text("What?")]
    assert len(question.images) == count and question.columns == {column: value}
    # as they stand: TRL passes every column but the prompt


def test_image_parts():
    content = [text("a"), {"type": "image", "text": None}, text("b"), IMAGE]
    row = {"prompt": [{"role": "user", "content": content}], "images": [picture(1), picture(2)]}
    question = as_question(row)
    assert question.messages[0]["content"] == [text("a"), IMAGE, text("b"), IMAGE]
    assert [image.width for image in question.images] == [1, 2]


def test_the_row_is_not_changed():
    row = {"prompt": [{"role": "user", "content": "<image>x"}], "images": [picture()]}
    as_question(row)
    assert row["prompt"] == [{"role": "user", "content": "<image>x"}] and len(row["images"]) == 1


# ---- Images inside the messages


@pytest.mark.parametrize(
    "form", ["image", "image path", "url", "data", "path", "base64", "image_url", "short", "nulls"]
)
def test_images_inside_the_parts(form, tmp_path):
    file = tmp_path / "with space.png"
    picture(7).save(file)
    base = base64.b64encode(encoded(picture(7))).decode()
    address = f"data:image/png;base64,{base}"
    part = {
        "image": {"type": "image", "image": picture(7)},
        "image path": {"type": "image", "image": str(file)},
        "url": {"type": "image", "url": file.as_uri()},
        "data": {"type": "image", "url": address},
        "path": {"type": "image", "path": str(file)},
        "base64": {"type": "image", "base64": base},
        "image_url": {"type": "image_url", "image_url": {"url": address, "detail": "low"}},
        "short": {"type": "image_url", "image_url": file.as_uri()},
        "nulls": {"type": "image", "image": None, "text": None, "url": None, "path": str(file)},
    }[form]
    question = as_question({"prompt": [{"role": "user", "content": [part, text("a")]}]})
    assert question.messages[0]["content"] == [IMAGE, text("a")]
    assert question.images[0].size == (7, 20) and question.images[0].getpixel((0, 0))[0] == 200


def test_several_images_inside_the_parts_keep_their_order():
    content = [{"type": "image", "image": picture(w)} for w in (3, 1)]
    prompt = [
        {"role": "user", "content": [content[0], text("a")]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [text("c"), content[1]]},
    ]
    assert [image.width for image in as_question({"prompt": prompt}).images] == [3, 1]


# ---- verl rows


def test_verl_row():
    row = {
        "data_source": "d",
        "prompt": [{"role": "user", "content": "<image>\nHow many? <image>"}],
        "images": [{"bytes": encoded(picture(5)), "path": None}, {"bytes": encoded(picture(6))}],
        "videos": None,
        "reward_model": {"style": "rule", "ground_truth": "3"},
        "extra_info": {"index": 0},
    }
    question = as_question(row, 0)
    assert question.messages[0]["content"] == [IMAGE, text("\nHow many? "), IMAGE]
    assert [image.width for image in question.images] == [5, 6]
    assert question.columns["answer"] == "3" and question.columns["data_source"] == "d"
    assert question.columns["reward_model"]["style"] == "rule"


def test_numpy_arrays_as_pandas_reads_them():
    prompt = np.array([{"role": "user", "content": "<image>x"}], dtype=object)
    images = np.empty(1, dtype=object)
    images[0] = {"bytes": encoded(picture()), "path": "x.png"}
    assert len(as_question({"prompt": prompt, "images": images}).images) == 1


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"answer": 7}, 7),
        ({"answer": ["4", "four"]}, ["4", "four"]),
        ({"solution": "x"}, "x"),
        ({"answer": "a", "reward_model": {"ground_truth": "b"}}, "a"),
        ({"answer": None, "reward_model": {"ground_truth": "b"}, "solution": "c"}, "b"),
        ({"reward_model": {"ground_truth": ["b", 2]}}, ["b", 2]),
        # Markdown, code, and GSM8K's mark: nothing here knows which of them it is.
        ({"answer": "#### Heading\ntext"}, "#### Heading\ntext"),
        ({"answer": "x = 1  #### not 2"}, "x = 1  #### not 2"),
        ({"answer": "so ####"}, "so ####"),
    ],
)
def test_answers_are_taken_as_they_are(row, answer):
    assert as_question({"prompt": "?", **row}).columns["answer"] == answer


# ---- Bad rows

USER = {"role": "user", "content": "x"}


def asks(*content):
    return {"prompt": [{"role": "user", "content": list(content)}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r"has no 'prompt' \(columns: none\)"),
        ({"question": "x", "answer": 1}, r"has no 'prompt' \(columns: question, answer\)"),
        ({"prompt": None}, "has no 'prompt'"),
        ({"prompt": 3}, "prompt must be a string or messages, got int"),
        ({"prompt": []}, "prompt has no messages"),
        ({"prompt": ["x"]}, r"prompt\[0\] must have 'role' and 'content', got 'x'"),
        ({"prompt": [USER, {"role": "user"}]}, r"prompt\[1\] must have 'role' and 'content'"),
        ({"prompt": [{"role": "usr", "content": "x"}]}, "role must be one of .*, got 'usr'"),
        ({"prompt": [{"role": None, "content": "x"}]}, "role must be one of .*, got None"),
        (
            {"prompt": [USER, {"role": "user", "content": None}]},
            r"prompt\[1\]: content must be a string or a list of parts, got None",
        ),
        ({"prompt": [{"role": "user", "content": 3}]}, "content must be a string .*, got 3"),
        ({"prompt": ""}, "prompt asks nothing"),
        ({"prompt": " \n"}, "prompt asks nothing"),
        ({"prompt": [{"role": "system", "content": ""}, {"role": "user", "content": " "}]}, "asks"),
        (asks(text(" ")), "prompt asks nothing"),
        (asks(), "prompt asks nothing"),
        (asks({"type": "video"}), r"prompt\[0\] part 0: a part must be .*'video'"),
        (asks(text("x"), {"type": "audio", "audio": "a.wav"}), "part 1: a part must be .*'audio'"),
        (asks("x"), "a part must be .* got 'x'"),
        (asks({"type": "text"}), "a part must be"),
        (asks({"image": "a.png"}), "a part must be"),
        (asks({"type": "image_url", "image_url": None}), "image_url must hold an address"),
        (asks({"type": "image", "image": "a", "url": "b"}), "hold one image, got image and url"),
        (asks({"type": "image", "base64": "!"}), "base64 must be the text of an image, got '!'"),
        (
            asks(text("x"), {"type": "image", "url": "https://a.b/c.png"}),
            r"image 0 \(prompt\[0\] part 1\): nothing is downloaded, got the address 'https://a",
        ),
        (
            asks({"type": "image_url", "image_url": {"url": "HTTP://a.b/c.png"}}),
            r"image 0 \(prompt\[0\] part 0\): nothing is downloaded",
        ),
        (asks({"type": "image", "path": "none.png"}), "there is no file none.png"),
        ({"prompt": "<image> x"}, "messages mark 1 images .* the row has 0"),
        ({"prompt": "<image><image>", "image": picture()}, "mark 2 images .* the row has 1"),
        ({"prompt": "<image>", "images": [picture()] * 2}, "mark 1 images .* the row has 2"),
        ({"prompt": "x", "image": picture(), "images": [picture()]}, "has both 'image' and"),
        ({"prompt": "x", "videos": [{"video": "a.mp4"}]}, "has videos, which no model here is"),
        (
            {"prompt": [{"role": "system", "content": "x"}], "image": picture()},
            "has 1 images but no user message",
        ),
        (
            {**asks({"type": "image", "image": picture()}), "image": picture()},
            "both in the messages and in a column",
        ),
        ({"prompt": "x", "image": "none.png"}, "image 0: there is no file none.png"),
        ({"prompt": "x", "images": [picture(), b"abc"]}, r"image 1: cannot read .*\(3 bytes\)"),
        ({"prompt": "x", "image": encoded(picture())[:60]}, "image 0: cannot read the image"),
        ({"prompt": "x", "image": {"bytes": None}}, "image 0: has neither 'bytes' nor 'path'"),
        ({"prompt": "x", "image": 3}, "image 0: must be a PIL image, .* got int"),
        ({"prompt": "x", "images": [None]}, "image 0: must be a PIL image, .* got NoneType"),
        ({"prompt": "x", "image": "https://a.b/c.png"}, "image 0: nothing is downloaded"),
        ({"prompt": "x", "image": Image.new("RGB", (0, 3))}, r"image 0: has size \(0, 3\)"),
        ({"prompt": "x", "completions": 1}, "the column 'completions' is an argument of rewards"),
        ({"prompt": "x", "log_metric": 1}, "the column 'log_metric' is an argument of rewards"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(QuestionError, match=f"^cppo.as_question: row 17: .*{message}"):
        as_question(row, 17)


def test_no_row_at_all():
    with pytest.raises(TypeError, match="row 17: expected a mapping, got str"):
        as_question("text", 17)


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "system", "content": ""}, USER],
        [USER, {"role": "assistant", "content": ""}],
        [{"role": "system", "content": "x"}],
        [{"role": "user", "content": [text(""), text("x")]}],
    ],
)
def test_some_messages_may_be_empty(prompt):
    assert as_question({"prompt": prompt}).messages == prompt


def test_an_image_alone_asks_something():
    question = as_question({"prompt": "", "image": picture()})
    assert question.messages[0]["content"] == [IMAGE, text("")]
