"""Columns under names of one's own, and images beside the file of their rows."""

from pathlib import Path

import pytest
from cli_cases import DIGITS, TINY, cppo
from question_cases import encoded, picture, write_jsonl, write_parquet

from cppo.cli import run_config
from cppo.cli.config_file import ConfigError
from cppo.cli.datasets import load_questions, overlap
from cppo.cli.run_config import DataConfig, DatasetConfig
from cppo.questions import QuestionError, as_question, load_rows, rename_columns
from cppo.questions.columns import likely_column

VERL = {
    "prompt": [{"role": "user", "content": "old"}],
    "extra_info": {"question": "1 + 1?", "answer": "2"},
    "reward_model": {"ground_truth": "3"},
    "level": 1,
}

pytestmark = pytest.mark.usefixtures("empty_folder")


def questions(rows, **options):
    data = DatasetConfig(path=write_jsonl(rows), **options)
    return load_questions(data, None, "data.train")


RENAMED = [
    (
        {"question": "1?", "label": 1, "level": 2},
        {"prompt_key": "question", "answer_key": "label"},
        {"prompt": "1?", "answer": 1, "level": 2},
    ),
    # a named column replaces one that has the new name already
    (
        {"prompt": "old", "question": "1?", "answer": "long", "final": "1"},
        {"prompt_key": "question", "answer_key": "final"},
        {"prompt": "1?", "answer": "1"},
    ),
    ({"answer": "1?", "prompt": "1"}, {"prompt_key": "answer", "answer_key": "prompt"},
     {"prompt": "1?", "answer": "1"}),
    ({"prompt": "1?", "answer": "1"}, {"prompt_key": "prompt", "answer_key": "answer"},
     {"prompt": "1?", "answer": "1"}),
    # inside mappings, and a name that has a dot itself
    (VERL, {"prompt_key": "extra_info.question", "answer_key": "extra_info.answer"},
     {**VERL, "prompt": "1 + 1?", "answer": "2"}),
    ({"a.b": "1?", "a": {"b": "2?"}}, {"prompt_key": "a.b"}, {"prompt": "1?", "a": {"b": "2?"}}),
    # the name of an argument of rewards is free again
    ({"prompts": "1?"}, {"prompt_key": "prompts"}, {"prompt": "1?"}),
    ({"prompt": "1?", "answer": None, "right": ["a", "b"]}, {"answer_key": "right"},
     {"prompt": "1?", "answer": ["a", "b"]}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "keys", "expected"), RENAMED, ids=range(len(RENAMED)))
def test_a_named_column_becomes_what_a_question_has(row, keys, expected):
    assert list(questions([row], **keys)) == [expected]
    assert list(load_rows("my.jsonl", **keys)) == [expected]
    assert list(rename_columns([row], **keys)) == [expected]
    assert as_question(questions([row], **keys)[0]).columns.keys() == expected.keys() - {"prompt"}


@pytest.mark.parametrize(
    ("row", "keys", "words"),
    [
        (
            {"question": "1?", "label": 1},
            {"prompt_key": "qestion"},
            r"prompt_key must be a column of the rows, got 'qestion'; did you mean 'question'\? "
            r"\(question, label\)",
        ),
        (VERL, {"answer_key": "reward_model.groundtruth"}, "mean 'reward_model.ground_truth'"),
        (VERL, {"answer_key": "level.x"}, "answer_key must be a column .*got 'level.x'"),
        ({"prompt": "?"}, {"images_key": "image"}, "images_key must be a column .*got 'image'"),
        (
            {"question": "1?", "label": 1},
            {},
            r"the rows have no column 'prompt' \(but question, label\); data.train.prompt_key "
            "names the column of the questions, for example data.train.prompt_key: question",
        ),
        ({"Problem": "1?"}, {}, "for example data.train.prompt_key: Problem"),
        ({"zzz": "1?"}, {}, "names the column of the questions$"),
    ],
)
def test_a_column_that_is_not_there_is_answered_with_those_that_are(row, keys, words):
    with pytest.raises(ConfigError, match=f"^data.train: .*{words}"):
        questions([row], **keys)


def test_a_later_row_without_the_column_is_named():
    rows = questions([{"q": "1?"}, {"p": "2?"}, {"q": None}], prompt_key="q")
    with pytest.raises(QuestionError, match="row 1: prompt_key must be a column .*'q'.*(p)"):
        rows[1]
    with pytest.raises(QuestionError, match="row 2: the column 'q' .prompt_key. is empty"):
        rows[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loader": "gsm8k", "prompt_key": "question"}, "prompt_key must be left out: loader 'gsm"),
        ({"loader": "digits", "path": None, "answer_key": "a"}, "answer_key must be left out"),
        ({"prompt_key": "a", "answer_key": "a"}, "answer_key must be another column than prompt_k"),
        ({"images_key": " "}, "images_key must be the name of a column, got ' '"),
        ({"skip": -1}, "skip must be an integer >= 0, got -1"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(ValueError, match=f"DatasetConfig.{words}"):
        DatasetConfig(**{"path": "x.jsonl", **options})
    if "answer_key" in options and "prompt_key" in options:
        with pytest.raises(ValueError, match="prompt_key and answer_key must name different col"):
            rename_columns([{"a": 1}], prompt_key="a", answer_key="a")


def test_the_rows_of_a_loader_of_ones_own_are_mapped_alike(capsys):
    text = "def load(path=None):\n    return [{'q': f'{i}?', 'a': str(i)} for i in range(8)]\n"
    Path("their_loader.py").write_text(text)
    data = DatasetConfig("their_loader.py:load", prompt_key="q", answer_key="a")
    assert load_questions(data, None, "data.train")[3] == {"prompt": "3?", "answer": "3"}
    with pytest.raises(ConfigError, match="data.train.prompt_key names the column"):
        load_questions(DatasetConfig("their_loader.py:load"), None, "data.train")
    train = "data.train={loader: 'their_loader.py:load', prompt_key: Q, answer_key: a}"
    status, _, err = cppo(capsys, "train", DIGITS, *TINY, train)
    words = "data.train: prompt_key must be a column of the rows, got 'Q'; did you mean 'q'? (q, a)"
    assert status == 2 and words in err


def test_a_missing_answer_suggests_the_key(capsys):
    rows = [{"question": f"{i}?", "label": str(i)} for i in range(8)]
    train = f"data.train={{path: {write_jsonl(rows)}, prompt_key: question}}"
    status, _, err = cppo(capsys, "train", DIGITS, *TINY, train)
    words = "row 0: has no ground truth ('answer'); answer_key can name another column, such as "
    assert status == 2 and words + "'label'" in err


def test_a_reserved_name_that_is_not_mapped_is_refused():
    rows = questions([{"q": "1?", "completions": "x"}], prompt_key="q")
    with pytest.raises(QuestionError, match="the column 'completions' is an argument of rewards"):
        as_question(rows[0], 0)


def test_likely_columns():
    assert likely_column("prompt_key", ["instruction", "input", "output"]) == "instruction"
    assert likely_column("answer_key", ["instruction", "input", "output"]) == "output"
    assert likely_column("answer_key", ["Final Answer", "id"]) == "Final Answer"
    assert likely_column("images_key", ["id"]) is None


# ---- Held out of one file


def test_rows_are_held_out_by_number():
    rows = [{"prompt": f"{i}?"} for i in range(10)]
    train = questions(rows, skip=3)
    held_out = questions(rows, limit=3)
    assert [row["prompt"] for row in held_out] == ["0?", "1?", "2?"]
    assert [row["prompt"] for row in train] == [f"{i}?" for i in range(3, 10)]
    assert [row["prompt"] for row in questions(rows, skip=3, limit=2)] == ["3?", "4?"]
    assert len(questions(rows, skip=8, limit=5)) == 2
    with pytest.raises(ConfigError, match="data.train.skip must be below the 10 rows, got 10"):
        questions(rows, skip=10)


@pytest.mark.parametrize(
    ("train", "held_out", "words"),
    [
        ({}, {"limit": 3}, "trains on; data.train.skip=3 keeps them apart"),
        ({"skip": 2}, {"limit": 3}, "data.train.skip=3 keeps"),
        ({"skip": 3}, {"limit": 3}, ""),
        ({"limit": 7}, {"skip": 7}, ""),
        ({"limit": 7}, {"skip": 6}, "data.eval has questions that data.train trains on"),
        ({}, {}, "data.eval has questions that data.train trains on"),
        ({}, {"path": "other.jsonl"}, ""),
        ({}, {"path": "./my.jsonl"}, "data.eval has questions"),
        ({"split": "train"}, {"split": "test"}, ""),
    ],
)
def test_held_out_questions_that_are_trained_on_are_said(train, held_out, words):
    both = [DatasetConfig(**{"path": "my.jsonl", **options}) for options in (train, held_out)]
    found = overlap(DataConfig(*both))
    assert words in found and bool(words) == bool(found)


def test_a_run_says_so(capsys):
    write_jsonl([{"prompt": f"{i}?", "answer": str(i)} for i in range(8)])
    given = ["data.train={path: my.jsonl}", "data.eval={path: my.jsonl, limit: 2}"]
    for more in ([], ["--dry-run"]):
        status, out, _ = cppo(capsys, "train", DIGITS, *TINY, *given, *more)
        assert status == 0
        assert "data.eval has questions that data.train trains on; data.train.skip=2" in out
    assert run_config.load("run/config.yaml").data.eval.limit == 2


# ---- Images beside the file


def pictures(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        picture(7).save(name)


IMAGES = [
    ({"image": "pics/1.png"}, {}),
    ({"images": ["pics/1.png"]}, {}),
    ({"picture": "pics/1.png"}, {"images_key": "picture"}),
    ({"media": {"files": ["pics/1.png"]}}, {"images_key": "media.files"}),
    ({"images": [{"bytes": None, "path": "pics/1.png"}]}, {}),
    # what stands in the row gives way to what is named
    ({"image": "nowhere.png", "picture": "pics/1.png"}, {"images_key": "picture"}),
    *(
        ({"messages": [{"role": "user", "content": [part, {"type": "text", "text": "How many?"}]}]},
         {"prompt_key": "messages"})
        for part in (
            {"type": "image", "image": "pics/1.png"},
            {"type": "image", "path": "pics/1.png"},
            {"type": "image", "url": "pics/1.png"},
            {"type": "image_url", "image_url": "pics/1.png"},
            {"type": "image_url", "image_url": {"url": "pics/1.png"}},
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "keys"), IMAGES, ids=range(len(IMAGES)))
@pytest.mark.parametrize("place", ["data/pics/1.png", "pics/1.png", None])
def test_paths_are_relative_to_the_file_then_to_the_working_directory(row, keys, place):
    pictures(*filter(None, [place]))
    if place == "data/pics/1.png":  # it goes first
        pictures("pics/2.png")
        Path("pics/2.png").rename("pics/1.png")
        Path("pics/1.png").write_bytes(b"no image")
    row = row if "messages" in row else {"prompt": "How many?", **row}
    name = write_jsonl([row], "data/my.jsonl")
    rows = load_questions(DatasetConfig(path=name, **keys), None, "data.train")
    if place is None:
        words = f"row 0: there is no file pics/1.png, neither in data nor in {Path.cwd()}"
        with pytest.raises(QuestionError, match=words):
            rows[0]
        return
    assert [image.width for image in as_question(rows[0], 0).images] == [7]


def test_other_images_stay_as_they_are():
    import base64

    text = base64.b64encode(encoded(picture(7))).decode()
    pictures("a b.png")
    sources = [str(Path("a b.png").resolve()), Path("a b.png").resolve().as_uri(), text,
               f"data:image/png;base64,{text}"]  # fmt: skip
    write_jsonl([{"prompt": "?", "image": source} for source in sources] + [{"prompt": "?"}])
    rows = load_rows("my.jsonl")
    assert [row.get("image") for row in rows] == [*sources, None]
    assert [len(as_question(row).images) for row in rows] == [1, 1, 1, 1, 0]
    write_parquet([{"prompt": "?", "image": {"bytes": encoded(picture()), "path": "gone.png"}}],
                  Path("a.parquet"))  # fmt: skip
    assert len(as_question(load_rows("a.parquet")[0]).images) == 1


def test_no_image_in_some_rows():
    pictures("2.png")
    rows = questions([{"prompt": "a?"}, {"prompt": "b?", "files": ["2.png"]}], images_key="files")
    assert [len(as_question(row).images) for row in rows] == [0, 1]
    pictures("1.png")
    Path("my.csv").write_text("question,picture\na?,1.png\nb?,\n")
    rows = load_rows("my.csv", prompt_key="question", images_key="picture")
    assert [len(as_question(row).images) for row in rows] == [1, 0]
