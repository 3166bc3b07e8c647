"""A data set checked before a run: every bad row in one error, with a model's processor or not."""

import datetime

import numpy as np
import pytest
from PIL import Image
from prompt_cases import GEMMA, LLAMA, THINKING, chat_tokenizer
from question_cases import ROWS, encoded, picture
from trainer_cases import VISION_FAMILIES, tiny

from cppo.questions import QuestionError, Rows, check_dataset, split_rows
from cppo.questions.stream import QuestionStream, all_questions
from cppo.rewards import from_names


def test_check_dataset():
    rows = [{"prompt": "abcd", "answer": "1"}, {"prompt": "ab", "answer": "2", "image": picture()}]
    summary = check_dataset(rows)
    assert summary == (2, 2, 1, 2, 1, 3.0, ("answer",), None)
    assert check_dataset(rows * 10, limit=4).checked == 4


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "dataset must have rows, got none"),
        (3, "dataset must have __len__ and an integer __getitem__ .*got int"),
        ("rows.json", "dataset must have __len__ and an integer __getitem__ .*got str"),
        (iter(ROWS), "dataset must have __len__ and an integer __getitem__"),
        ({"train": ROWS}, "got dict of train; take one of them"),
        ([ROWS[0], {"prompt": "x"}], "row 1: has the columns none, row 0 has answer"),
        ([ROWS[0], {"prompt": "x", "answer": None}], "row 1: has no ground truth"),
        ([ROWS[0], {"answer": "x"}], "1 of 2 rows .*\n  row 1: has no 'prompt'"),
        ([ROWS[0], {"prompt": "x", "answer": r"\\boxed{5"}], "row 1: has a ground truth that"),
        ([ROWS[0], {"prompt": "x", "answer": "..."}], "that is no answer"),
        ([ROWS[0], 3], "row 1: expected a mapping, got int"),
    ],
)
def test_bad_datasets(dataset, message):
    with pytest.raises((TypeError, ValueError), match=f"(?s)^cppo.check_dataset: .*{message}"):
        check_dataset(dataset, require_answer=True)


def test_a_row_without_answer_among_others():
    rows = [ROWS[0], {"prompt": "x", "answer": None}]
    with pytest.raises(ValueError, match="row 1: has no ground truth"):
        check_dataset(rows)
    assert check_dataset(rows, read_answer=False).with_answers == 1  # as a reward of one's own
    assert check_dataset([rows[1]]).with_answers == 0


@pytest.mark.parametrize(
    ("reward", "answer", "message"),
    [
        ("numeric", "five", "numeric: ground truth must be a number, got 'five'"),
        ("gsm8k_reward", "five", "gsm8k: ground truth must be a number"),
        ({"exact_match": {"unfinished_thought": 0}}, " ", "has no ground truth"),
        ({"length": {"accuracy": "numeric"}}, "five", "numeric: ground truth must be a number"),
        ("boxed", "...", "boxed: ground truth must be an answer"),
        ("boxed", None, "has no ground truth"),
    ],
)
def test_rewards_that_cannot_read_a_ground_truth(reward, answer, message):
    ((function,), _) = from_names([reward])
    rows = [{"prompt": "x", "answer": "5"}, {"prompt": "x", "answer": answer}]
    with pytest.raises(ValueError, match=f"\n  row 1: .*{message}"):
        check_dataset(rows, rewards=[function], read_answer=False)
    with pytest.raises(ValueError, match="\n  row 0: "):
        check_dataset([{"prompt": "x", "answer": answer}], rewards=[function], read_answer=False)


def test_rewards_of_ones_own_and_of_the_form_read_what_they_like():
    def own(completions, **columns):
        raise AssertionError

    rows = [{"prompt": "x", "answer": {"a": 1}}, {"prompt": "x", "answer": None}]
    functions = [own, *from_names(["think_format", "tag_count"])[0]]
    assert check_dataset(rows, rewards=functions, read_answer=False).rows == 2


def test_a_data_frame_is_no_sequence_of_rows():
    frame = type("DataFrame", (dict,), {})(prompt=["?"])
    with pytest.raises(TypeError, match=r"got DataFrame; take its to_dict\('records'\)"):
        check_dataset(frame)


def test_all_bad_rows_are_said():
    rows = [dict(row) for row in ROWS] * 10
    for index in range(1, 36, 2):
        rows[index] = {"prompt": "", "answer": "1"}
    rows[1] = {"prompt": "x", "image": "none.png", "answer": "1"}
    with pytest.raises(ValueError) as caught:
        check_dataset(rows)
    lines = str(caught.value).splitlines()
    assert lines[0] == "cppo.check_dataset: 18 of 40 rows read cannot be used:"
    assert lines[1] == "  row 1: image 0: there is no file none.png"
    assert lines[2].startswith("  row 3: prompt asks nothing")
    assert len(lines) == 12 and lines[11] == "  and 8 more, up to row 35"


# Which values are ground truths says test_rewards_ground_truth.py.
@pytest.mark.parametrize("value", [4, ["4", "four"], np.array(["4", "four"]), np.float32(0.5)])
def test_ground_truths(value):
    assert check_dataset([ROWS[0], {"prompt": "?", "answer": value}]).with_answers == 2


@pytest.mark.parametrize(
    "value",
    [{"value": "4"}, [["4"], ["5"]], float("nan"), [], " ", ["4", None], datetime.date(2026, 1, 1)],
)
def test_values_that_are_no_ground_truth(value):
    with pytest.raises(ValueError, match="row 1: has (no|a) ground truth"):
        check_dataset([ROWS[0], {"prompt": "?", "answer": value}])
    with pytest.raises(ValueError, match="row 0: has (no|a) ground truth"):
        check_dataset([{"prompt": "?", "reward_model": {"ground_truth": value}}])


# ---- With a processor


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_images_go_through_the_processor(family):
    _, processor = tiny(family)
    rows = [{"prompt": "?", "image": Image.new("RGB", size)} for size in [(48, 48), (24, 24)] * 2]
    # <|im_start|>, "user\n", 4 of the image between its marks, "?", <|im_end|>, a line break,
    # <|im_start|>, "assistant\n"
    assert check_dataset(rows, processor=processor).max_tokens == 2 + (1 + 4 + 1) + 1 + 2 + 2
    rows[2]["image"] = Image.new("RGB", (4000, 10))
    rows.append({"prompt": "<|image_pad|>?", "image": picture(24, 24)})
    assert check_dataset(rows).checked == 5  # nothing to see without the processor
    with pytest.raises(ValueError) as caught:
        check_dataset(rows, processor=processor)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("2 of 5 rows read cannot be used:")
    assert lines[1].startswith("  row 2: the image processor refused image 0 (4000 x 10): absolute")
    assert lines[2].startswith("  row 4: prompt[0] has the special token '<|image_pad|>'")


def test_texts_go_through_the_tokenizer_and_the_template():
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]
    rows = [{"prompt": "?"}, {"prompt": system}, {"prompt": "x<|eot|>"}]
    with pytest.raises(ValueError) as caught:
        check_dataset(rows, processor=chat_tokenizer(GEMMA))
    lines = str(caught.value).splitlines()
    assert lines[1] == (
        "  row 1: the chat template refused it: TemplateError: System role not supported"
    )
    assert "row 2: prompt[0] has the special token '<|eot|>' in its text" in lines[2]
    with pytest.raises(ValueError, match="1 of 3 rows"):
        check_dataset(rows, processor=chat_tokenizer(LLAMA))
    # <s>, <|start|>, user, <|end|>, ?, <|eot|>, <|start|>, assistant, <|end|>
    assert check_dataset(rows[:1], processor=chat_tokenizer(LLAMA)).max_tokens == 1 + 18 + 1


def test_images_of_a_text_model():
    rows = [{"prompt": "?"}, {"prompt": "?", "image": picture()}]
    with pytest.raises(ValueError, match="row 1: has images, which a tokenizer does not prepare"):
        check_dataset(rows, processor=chat_tokenizer(LLAMA))


def test_chat_template_kwargs_are_used_and_checked():
    tokenizer = chat_tokenizer(THINKING)
    lengths = [
        check_dataset([ROWS[0]], processor=tokenizer, chat_template_kwargs=arguments).max_tokens
        for arguments in ({}, {"enable_thinking": False})
    ]
    assert lengths[1] - lengths[0] == 4  # "\n</think>\n\n" is a tag and three line breaks
    with pytest.raises(ValueError, match="^cppo: chat_template_kwargs has 'enable_thinkin'"):
        check_dataset(ROWS, processor=tokenizer, chat_template_kwargs={"enable_thinkin": True})


# ---- Rows that the dataset itself cannot give


def test_images_that_datasets_cannot_decode(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'data'")
    good, cut = encoded(picture(99, 99)), encoded(picture(99, 99))[:80]
    rows = datasets.Dataset.from_list(
        [{"prompt": "?", "image": {"bytes": data, "path": None}} for data in (good, cut, good)]
    ).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match="1 of 3 rows .*\n  row 1: .*(dataset cannot|cannot read)"):
        check_dataset(rows)
    stream, seen, failed = QuestionStream(rows, 0), [], 0
    for _ in range(6):
        try:
            seen.append(next(stream).row)
        except QuestionError:
            failed += 1
    assert failed == 2 and sorted(seen) == [0, 0, 2, 2]  # two epochs
    with pytest.raises(QuestionError, match="row 1"):
        all_questions(rows)


def test_a_row_that_cannot_be_taken_is_named():
    def convert(row, index):
        if index == 2:
            raise OSError("gone")
        return row

    with pytest.raises(ValueError, match="row 2: the dataset cannot give it: OSError: gone"):
        check_dataset(Rows(ROWS, convert))
    assert [question.row for question in all_questions(ROWS)] == [0, 1, 2, 3]


def test_split_rows():
    train, held_out = split_rows(list(range(100)), 0.2, seed=1)
    numbers = [*train, *held_out]
    assert len(held_out) == 20 and sorted(numbers) == list(range(100))
    again = split_rows(list(range(100)), 20, seed=1)[1]
    assert list(again) == list(held_out)
    assert list(split_rows(list(range(100)), 20, seed=2)[1]) != list(again)


@pytest.mark.parametrize("held_out", [0, 4, -1, 0.01, 1.0 * 9])
def test_bad_splits(held_out):
    with pytest.raises(ValueError, match="must leave both parts non-empty of 4 rows"):
        split_rows(ROWS, held_out)
