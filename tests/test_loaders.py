"""The named data sets: both layouts, every bad row said when they load, and how long that takes."""

import json
import time

import pytest
from question_cases import DATA, IMAGE, encoded, needs, picture, text, write_parquet

from cppo.questions import (
    QuestionError,
    as_question,
    check_dataset,
    load_geometry3k,
    load_gsm8k,
    load_math,
    load_virl39k,
)


def write_json(folder, rows):
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


def verl(answer, prompt="?"):
    return {
        "data_source": "d",
        "prompt": [{"role": "user", "content": prompt}],
        "reward_model": {"style": "rule", "ground_truth": answer},
    }


# ---- GSM8K


@needs("gsm8k")
def test_gsm8k_as_it_ships():
    pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    train, test = load_gsm8k(DATA / "gsm8k"), load_gsm8k(DATA / "gsm8k", "test")
    assert (len(train), len(test)) == (7473, 1319)
    question = as_question(train[0], 0)
    assert question.columns["answer"] == "72" and len(question.messages) == 2
    assert question.messages[1]["content"].startswith("Natalia sold clips")
    assert all(float(test[i]["answer"]) is not None for i in range(0, 1319, 100))
    assert check_dataset(test, limit=50, require_answer=True).checked == 50


def test_gsm8k_original_columns(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"question": "6 x 7?", "answer": "6*7 = 42\n#### 1,042"}))
    (row,) = load_gsm8k(tmp_path)
    assert row["answer"] == "1042" and row["question"] == "6 x 7?"
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert "<answer>" in row["prompt"][0]["content"]
    own = load_gsm8k(tmp_path, system_prompt="Mine.")[0]["prompt"]
    assert [message["content"] for message in own] == ["Mine.", "6 x 7?"]
    assert as_question(row).is_conversational


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("#### 1,234", "1234"), ("42", "42"), (72, "72"), (["#### 4", "5"], ["4", "5"])]
    + [("#### 5\nnote", "5"), ("so #### -5.", "-5."), ("#### $1,000", "$1000")],
)
def test_gsm8k_answers(answer, expected, tmp_path):
    (row,) = load_gsm8k(write_json(tmp_path, [verl(answer)]))
    assert as_question(row).columns["answer"] == expected


# ---- MATH


@needs("math")
def test_math_as_it_ships():
    pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    rows = load_math(DATA / "math", "test")
    assert len(rows) == 500
    assert rows[0]["answer"] == r"\left( 3, \frac{\pi}{2} \right)"
    assert check_dataset(rows, require_answer=True)[:4] == (500, 500, 0, 500)


def test_math_original_columns(tmp_path):
    rows = [
        {"problem": "?", "solution": r"so \boxed{\frac{1}{2}}."},
        {"problem": "?", "solution": "x", "answer": "3"},
    ]
    loaded = load_math(write_json(tmp_path, rows))
    assert [row["answer"] for row in loaded] == [r"\frac{1}{2}", "3"]
    assert loaded[0]["prompt"][0]["role"] == "system"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("42", "42"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"Then \boxed{7}.", "7"),
        (42, 42),
        (["4", r"\boxed{four}"], ["4", "four"]),
    ],
)
def test_math_as_verl_prepares_it(answer, expected, tmp_path):
    (row,) = load_math(write_json(tmp_path, [verl(answer)]))
    question = as_question(row, 0)
    assert question.columns["answer"] == expected and question.columns["data_source"] == "d"
    assert [message["role"] for message in question.messages] == ["user"]


def test_seven_thousand_rows_of_math_load_at_once(tmp_path):
    steps = "We have $x^2 + \\frac{1}{2}x = {y}$. " * 12
    rows = [
        {"problem": f"What is {i}?" * 5, "solution": f"{steps}So \\boxed{{{i}}}.", "level": "1"}
        for i in range(7500)
    ]
    write_parquet(rows, tmp_path / "train.parquet")
    start = time.process_time()
    loaded = load_math(tmp_path)
    assert time.process_time() - start < 1.5  # 0.25 s on a free core
    assert loaded[7499]["answer"] == "7499"


# ---- Bad rows


@pytest.mark.parametrize(
    ("load", "good", "bad"),
    [
        (
            load_gsm8k,
            {"question": "?", "answer": "#### 4"},
            {
                "nothing follows the '####' of the answer 'so ####'": {"answer": "so ####"},
                "has no number behind '####', and is none itself: 'five'": {"answer": "five"},
                "has no number behind '####', and is none itself: '3 apples, so 7'": {
                    "answer": "3 apples, so 7"
                },
                "has no number behind '####', and is none itself: '#### seven'": {
                    "answer": "#### seven"
                },
                "has no answer; looked in answer": {"answer": None},
                "prompt must be a string or messages, got NoneType": {"question": None},
                "prompt asks nothing": {"question": " "},
            },
        ),
        (
            load_math,
            {"problem": "?", "solution": r"\boxed{4}"},
            {
                r"has no \boxed{} in 'x'": {"solution": "x"},
                r"has no \boxed{} in '\\boxed{4'": {"solution": r"\boxed{4"},
                r"has no \boxed{} in '\\boxed{}'": {"solution": r"\boxed{}"},
                "prompt asks nothing": {"problem": ""},
            },
        ),
        (
            load_math,
            verl("4"),
            {
                "has no answer; looked in answer, reward_model": {"reward_model": {}},
                "has no answer; looked in answer, reward_model ": {"reward_model": None},
                "has a \\boxed without an answer": verl(r"so \boxed{4"),
                "prompt[0]: role must be one of": {"prompt": [{"role": "human", "content": "?"}]},
            },
        ),
    ],
)
def test_every_bad_row_is_said_when_the_files_load(load, good, bad, tmp_path):
    write_json(tmp_path, [good, *({**good, **change} for change in bad.values()), good])
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    first, *lines = str(caught.value).splitlines()
    assert first == f"cppo.{load.__name__}: {len(bad)} of {len(bad) + 2} rows read cannot be used:"
    for number, (words, line) in enumerate(zip(bad, lines, strict=False), 1):
        assert line.startswith(f"  row {number}: {words.strip()}")
    assert lines[-1] == "skip_bad_rows=True leaves them out"
    with pytest.warns(UserWarning, match=f"{len(bad)} of {len(bad) + 2} rows"):
        rows = load(tmp_path, skip_bad_rows=True)
    assert len(rows) == 2 and len([as_question(row) for row in rows]) == 2


def test_many_bad_rows_are_counted(tmp_path):
    write_json(tmp_path, [{"problem": "?", "solution": "x"} for _ in range(25)])
    with pytest.raises(ValueError) as caught:
        load_math(tmp_path, skip_bad_rows=True)  # nothing would be left
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("25 of 25 rows read cannot be used:")
    assert len(lines) == 13 and lines[11] == "  and 15 more, up to row 24"


def test_ground_truths_that_no_answer_can_equal(tmp_path):
    write_json(tmp_path, [verl({"a": 1}), verl([]), verl(float("nan")), verl("4")])
    with pytest.raises(ValueError, match="load_math: 3 of 4 rows read cannot be used"):
        load_math(tmp_path)


# ---- geometry3k


def geometry_rows(count=3):
    stored = {"bytes": encoded(picture(20, 10)), "path": None}
    return [
        {"images": [stored], "problem": f"<image>Find x{i}.", "answer": str(i)}
        for i in range(count)
    ]


def test_geometry3k_layout(tmp_path):
    write_parquet(geometry_rows(), tmp_path / "data" / "train-00000-of-00001.parquet")
    write_parquet(geometry_rows(1), tmp_path / "data" / "test-00000-of-00001.parquet")
    rows = load_geometry3k(tmp_path)
    assert (len(rows), len(load_geometry3k(tmp_path, "test"))) == (3, 1)
    question = as_question(rows[2], 2)
    image, content = question.messages[0]["content"]
    assert image == IMAGE and content["text"].startswith("Find x2. You FIRST think")
    assert question.columns["answer"] == "2" and question.is_conversational
    assert question.images[0].size == (56, 28)  # 20 x 10 enlarged to a short side of 28
    assert load_geometry3k(tmp_path, min_image_side=0)[0]["images"][0].size == (20, 10)
    own = as_question(load_geometry3k(tmp_path, system_prompt="Mine.")[0])
    assert own.messages[0] == {"role": "system", "content": "Mine."}
    assert own.messages[1]["content"] == [IMAGE, text("Find x0.")]


def test_geometry3k_as_verl_prepares_it(tmp_path):
    stored = [{"bytes": encoded(picture()), "path": None}]
    rows = [{**verl("7", "<image>Find x. Think."), "images": stored}]
    rows.append({**verl("8", "Find x."), "images": stored})  # no marker: as_question puts it first
    write_parquet(rows, tmp_path / "train.parquet")
    for row, answer in zip(load_geometry3k(tmp_path), ("7", "8"), strict=True):
        question = as_question(row)
        assert question.columns["answer"] == answer and len(question.images) == 1


def test_geometry3k_saved_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'data'")
    rows = [{"images": [picture(20, 10)], "problem": "<image>x", "answer": str(i)} for i in (1, 2)]
    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        problem=datasets.Value("string"),
        answer=datasets.Value("string"),
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    loaded = load_geometry3k(tmp_path / "saved")
    assert [as_question(row).columns["answer"] for row in loaded] == ["1", "2"]
    assert loaded[1]["images"][0].size == (56, 28)


def test_geometry3k_images_are_looked_at(tmp_path):
    rows = geometry_rows(6)
    rows[1]["images"] = [{"bytes": b"no image", "path": None}]
    rows[2]["images"] = []
    rows[3]["images"] = [{"bytes": None, "path": str(tmp_path / "none.png")}]
    rows[4]["images"] = [{"bytes": encoded(picture(99, 99))[:100], "path": None}]  # header is fine
    write_parquet(rows, tmp_path / "train.parquet")
    with pytest.raises(ValueError) as caught:
        load_geometry3k(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "cppo.load_geometry3k: 3 of 6 rows read cannot be used:"
    assert lines[1].startswith("  row 1: image 0: cannot read the image")
    assert lines[2].startswith("  row 2: the messages mark 1 images")
    assert lines[3].startswith("  row 3: image 0: there is no file")
    with pytest.warns(UserWarning):
        loaded = load_geometry3k(tmp_path, skip_bad_rows=True)
    assert len(loaded) == 3
    with pytest.raises(QuestionError, match="cppo.load_geometry3k: row 4: image 0: cannot read"):
        loaded[1]
    assert as_question(loaded[2]).columns["answer"] == "5"


# ---- ViRL39K


def virl_folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        picture(14, 28).save(tmp_path / "images" / f"{name}.png")
    common = {"PassRate_32BTrained": 0.5, "PassRate_7BBase": 0.1, "category": "c", "source": "s"}
    rows = [
        ("<image>\nOne?", r"\boxed{1}", ["images/a.png"]),
        ("Two?", "two", ["images/a.png", "images/b.png"]),
        ("Three?", r"\boxed{3}", ["images/b.png"]),
    ]
    rows = [
        {"question": question, "answer": answer, "image": image, "qid": str(i), **common}
        for i, (question, answer, image) in enumerate(rows)
    ]
    write_parquet(rows, tmp_path / "39Krelease.parquet")
    return tmp_path


def test_boxes_side_by_side_are_one_answer(tmp_path):
    (row,) = load_math(
        write_json(tmp_path, [{"problem": "?", "solution": r"\boxed{A} or \boxed{B}"}])
    )
    assert row["answer"] == "A, B"


def test_virl39k_layout(tmp_path):
    folder = virl_folder(tmp_path)
    rows = load_virl39k(folder)
    assert [row["qid"] for row in rows] == ["0", "2"]
    questions = [as_question(row, i) for i, row in enumerate(rows)]
    assert [q.columns["answer"] for q in questions] == ["1", "3"]
    for question, word in zip(questions, ("One", "Three"), strict=True):
        image, content = question.messages[0]["content"]
        assert image == IMAGE and content["text"].startswith(f"\n{word}? You FIRST")
        assert question.images[0].size == (28, 56)
        assert "image" not in question.columns and question.columns["category"] == "c"
    several = load_virl39k(folder / "39Krelease.parquet", single_image=False)
    assert len(several) == 3 and len(as_question(several[1]).images) == 2
    own = load_virl39k(folder, system_prompt="Mine.")[0]["prompt"]
    assert [message["content"] for message in own] == ["Mine.", "<image>\nOne?"]


def test_virl39k_missing_image_names_the_row(tmp_path):
    folder = virl_folder(tmp_path)
    (folder / "images" / "b.png").unlink()
    with pytest.raises(ValueError, match="1 of 2 rows .*\n  row 2: image 0: there is no file .*b"):
        load_virl39k(folder)
    with pytest.raises(ValueError, match="2 of 3 rows .*\n  row 1: image 1: there is no file"):
        load_virl39k(folder, single_image=False)
    with pytest.raises(ValueError, match="2 of 2 rows .*\n  row 0: image 0: there is no file"):
        load_virl39k(folder, image_folder=tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="They are left out"):
        rows = load_virl39k(folder, skip_bad_rows=True)
    assert [row["qid"] for row in rows] == ["0"]


# ---- Columns


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (load_gsm8k, "prompt . reward_model or question . answer"),
        (load_math, "prompt . reward_model or problem . solution"),
        (load_geometry3k, "prompt . images . reward_model or problem . images . answer"),
        (load_virl39k, "question . answer . image"),
    ],
)
def test_other_columns_are_an_error(load, expected, tmp_path):
    (tmp_path / "train.json").write_text('[{"text": 1}]')
    message = f"cppo.{load.__name__}: expected the columns {expected}, got text"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_virl39k_has_one_split(tmp_path):
    with pytest.raises(ValueError, match="split must be 'train', got 'test'"):
        load_virl39k(tmp_path, "test")
