"""Dataset rows and loaders: both formats, images in every form, worded errors."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cppo.questions import (
    Rows,
    as_question,
    check_dataset,
    load_geometry3k,
    load_gsm8k,
    load_image,
    load_math,
    load_rows,
    load_virl39k,
    split_rows,
)

DATA = Path(os.environ.get("CPPO_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))


def needs(name: str):
    return pytest.mark.skipif(
        not (DATA / name).exists(),
        reason=f"no {name} in the data folder (CPPO_DATA_DIR, default ../shared/data)",
    )


def picture(width: int = 30, height: int = 20, value: int = 200, mode: str = "RGB"):
    return Image.new(mode, (width, height), value if mode == "L" else (value, 10, 20))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


# ---- TRL rows


def test_plain_prompt():
    question = as_question({"prompt": "2 + 2?", "answer": "4", "level": 1})
    assert question.messages == [{"role": "user", "content": "2 + 2?"}]
    assert question.images == [] and question.columns == {"answer": "4", "level": 1}


def test_messages_keep_roles_and_order():
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "1."},
        {"role": "user", "content": "2?", "name": None},
    ]
    question = as_question({"prompt": prompt})
    assert [m["role"] for m in question.messages] == ["system", "user", "assistant", "user"]
    assert all(set(message) == {"role", "content"} for message in question.messages)
    assert "answer" not in question.columns


@pytest.mark.parametrize("column", ["image", "images"])
def test_images_without_parts_go_before_the_first_user_text(column):
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "What?"}]
    value = picture() if column == "image" else [picture(), picture(8, 9)]
    question = as_question({"prompt": prompt, column: value})
    count = 1 if column == "image" else 2
    assert question.messages[1]["content"] == [IMAGE] * count + [text("What?")]
    assert len(question.images) == count and column not in question.columns


def test_image_parts():
    content = [text("a"), {"type": "image", "text": None}, text("b"), IMAGE]
    row = {"prompt": [{"role": "user", "content": content}], "images": [picture(1), picture(2)]}
    question = as_question(row)
    assert question.messages[0]["content"] == [text("a"), IMAGE, text("b"), IMAGE]
    assert [image.width for image in question.images] == [1, 2]


def test_images_inside_the_parts():
    content = [{"type": "image", "image": picture(7)}, text("a")]
    question = as_question({"prompt": [{"role": "user", "content": content}]})
    assert question.messages[0]["content"] == [IMAGE, text("a")]
    assert question.images[0].width == 7


def test_the_row_is_not_changed():
    row = {"prompt": [{"role": "user", "content": "<image>x"}], "images": [picture()]}
    as_question(row)
    assert row["prompt"] == [{"role": "user", "content": "<image>x"}] and len(row["images"]) == 1


# ---- verl rows


def test_verl_row():
    row = {
        "data_source": "d",
        "prompt": [{"role": "user", "content": "<image>\nHow many? <image>"}],
        "images": [{"bytes": encoded(picture(5)), "path": None}, {"bytes": encoded(picture(6))}],
        "reward_model": {"style": "rule", "ground_truth": "3"},
        "extra_info": {"index": 0},
    }
    question = as_question(row, 0)
    assert question.messages[0]["content"] == [IMAGE, text("\nHow many? "), IMAGE]
    assert [image.width for image in question.images] == [5, 6]
    assert question.columns["answer"] == "3"
    assert question.columns["reward_model"]["style"] == "rule"


def test_numpy_arrays_as_pandas_reads_them():
    prompt = np.array([{"role": "user", "content": "<image>x"}], dtype=object)
    images = np.empty(1, dtype=object)
    images[0] = {"bytes": encoded(picture()), "path": "x.png"}
    assert len(as_question({"prompt": prompt, "images": images}).images) == 1


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"answer": "6*7=42\n#### 42"}, "42"),
        ({"answer": "#### 1,234"}, "1234"),
        ({"answer": 7}, 7),
        ({"solution": "x"}, "x"),
        ({"answer": "a", "reward_model": {"ground_truth": "b"}}, "a"),
        ({"answer": None, "reward_model": {"ground_truth": "b"}, "solution": "c"}, "b"),
    ],
)
def test_answers(row, answer):
    assert as_question({"prompt": "?", **row}).columns["answer"] == answer


# ---- images


@pytest.mark.parametrize("form", ["pil", "path", "str", "bytes", "dict bytes", "dict path"])
def test_image_forms(form, tmp_path):
    image = picture(13, 11)
    file = tmp_path / "a.png"
    image.save(file)
    source = {
        "pil": image,
        "path": file,
        "str": str(file),
        "bytes": encoded(image),
        "dict bytes": {"bytes": encoded(image), "path": "elsewhere.png"},
        "dict path": {"bytes": None, "path": str(file)},
    }[form]
    (found,) = as_question({"prompt": "?", "image": source}).images
    assert found.mode == "RGB" and found.tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("mode", "result"), [("L", "L"), ("1", "L"), ("P", "RGB"), ("CMYK", "RGB"), ("RGB", "RGB")]
)
def test_image_modes(mode, result):
    assert load_image(picture().convert(mode)).mode == result


def test_transparency_is_white():
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)
    half = load_image(Image.new("RGBA", (2, 2), (0, 0, 0, 128))).getpixel((0, 0))
    assert half == (127, 127, 127)


def test_photos_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    buffer = io.BytesIO()
    picture(30, 20).save(buffer, "JPEG", exif=exif)
    assert load_image(buffer.getvalue()).size == (20, 30)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((14, 20), (28, 40)), ((20, 14), (40, 28)), ((28, 28), (28, 28)), ((1, 100), (28, 2800))],
)
def test_min_image_side(size, expected):
    question = as_question({"prompt": "?", "image": picture(*size)}, min_image_side=28)
    assert question.images[0].size == expected
    assert as_question({"prompt": "?", "image": picture(*size)}).images[0].size == size


# ---- bad rows

USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "expected a mapping, got str"),
        ({}, r"has no 'prompt' \(columns: none\)"),
        ({"question": "x", "answer": 1}, r"has no 'prompt' \(columns: question, answer\)"),
        ({"prompt": None}, "has no 'prompt'"),
        ({"prompt": 3}, "prompt must be a string or messages, got int"),
        ({"prompt": []}, "prompt has no messages"),
        ({"prompt": ["x"]}, r"prompt\[0\] must have 'role' and 'content', got 'x'"),
        ({"prompt": [USER, {"role": "user"}]}, r"prompt\[1\] must have 'role' and 'content'"),
        ({"prompt": [{"role": "usr", "content": "x"}]}, "role must be one of .*, got 'usr'"),
        ({"prompt": [{"role": "user", "content": None}]}, "content must be a string or a list"),
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "a part must be"),
        ({"prompt": [{"role": "user", "content": ["x"]}]}, "a part must be .* got 'x'"),
        ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "a part must be"),
        ({"prompt": "<image> x"}, "messages mark 1 images .* the row has 0"),
        ({"prompt": "<image><image>", "image": picture()}, "mark 2 images .* the row has 1"),
        ({"prompt": "<image>", "images": [picture()] * 2}, "mark 1 images .* the row has 2"),
        ({"prompt": "x", "image": picture(), "images": [picture()]}, "has both 'image' and"),
        (
            {"prompt": [{"role": "system", "content": "x"}], "image": picture()},
            "has 1 images but no user message",
        ),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "image", "image": picture()}]}],
                "image": picture(),
            },
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
        ({"prompt": "x", "answer": "so ####"}, "nothing follows the '####'"),
        ({"prompt": "x", "completions": 1}, "the column 'completions' is what rewards are given"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises((TypeError, ValueError), match=f"^cppo.as_question: row 17: .*{message}"):
        as_question(row, 17)


# ---- files


def write_parquet(rows, path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


ROWS = [{"prompt": f"{i}?", "answer": str(i)} for i in range(4)]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_load_rows_files_and_folders(suffix, tmp_path):
    for split, rows in (("train-00000", ROWS[:2]), ("train-00001", ROWS[2:3]), ("test", ROWS[3:])):
        file = tmp_path / "data" / f"{split}.{suffix}"
        file.parent.mkdir(exist_ok=True)
        if suffix == "parquet":
            write_parquet(rows, file)
        else:
            lines = "\n\n".join(map(json.dumps, rows)) + "\n"
            file.write_text(json.dumps(rows) if suffix == "json" else lines)
    assert list(load_rows(tmp_path, "train")) == ROWS[:3]
    assert list(load_rows(tmp_path / "data", "test")) == ROWS[3:]
    assert list(load_rows(str(tmp_path / "data" / f"test.{suffix}"))) == ROWS[3:]
    assert len(load_rows(tmp_path)) == 4


def test_load_rows_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'data'")
    rows = datasets.Dataset.from_list([{**row, "image": picture()} for row in ROWS])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "two")
    assert len(as_question(load_rows(tmp_path / "one")[3]).images) == 1
    assert [len(load_rows(tmp_path / "two", split)) for split in ("train", "test")] == [4, 1]
    with pytest.raises(ValueError, match="has no split 'dev', only train, test"):
        load_rows(tmp_path / "two", "dev")
    assert as_question(rows[1], 1).columns["answer"] == "1"  # a Dataset is a dataset as it is


def test_load_rows_system_prompt(tmp_path):
    file = tmp_path / "a.json"
    own = [{"role": "system", "content": "old"}, {"role": "user", "content": "x"}]
    file.write_text(json.dumps([{"prompt": "x"}, {"prompt": own}]))
    expected = [{"role": "system", "content": "new"}, {"role": "user", "content": "x"}]
    assert [row["prompt"] for row in load_rows(file, system_prompt="new")] == [expected] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", "{}", "must hold an array of objects, got dict"),
        ("a.json", "[1]", "row 0 of .*a.json must be an object, got int"),
        ("a.json", "[]", "has no rows"),
        ("a.jsonl", '{"a": 1}\nx\n', "a.jsonl, line 2 is not JSON"),
        ("a.csv", "a,b", "must be a .parquet, .jsonl, .json file"),
        ("a.parquet", "no", "cannot read .*a.parquet"),
        ("missing.json", None, "there is no file or folder .*missing.json"),
    ],
)
def test_bad_files(name, content, message, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"cppo.load_rows: .*{message}"):
        load_rows(tmp_path / name)


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="holds no .parquet, .jsonl, .json file"):
        load_rows(tmp_path)
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(ValueError, match="no file of the split 'test', only train.json"):
        load_rows(tmp_path, "test")


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_missing_packages_name_the_extra(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    if module == "pyarrow":
        (tmp_path / "a.parquet").write_bytes(b"")
    else:
        (tmp_path / "dataset_info.json").write_text("{}")
    path = tmp_path / "a.parquet" if module == "pyarrow" else tmp_path
    with pytest.raises(ImportError, match=r"pip install 'cppo\[data\]'"):
        load_rows(path)


# ---- named datasets


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


@needs("math")
def test_math_as_it_ships():
    pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    rows = load_math(DATA / "math", "test")
    assert len(rows) == 500
    assert rows[0]["answer"] == r"\left( 3, \frac{\pi}{2} \right)"
    assert check_dataset(rows, require_answer=True)[:4] == (500, 500, 0, 500)


def test_gsm8k_original_columns(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"question": "6 x 7?", "answer": "6*7 = 42\n#### 1,042"}))
    (row,) = load_gsm8k(tmp_path)
    assert row["answer"] == "1042" and row["question"] == "6 x 7?"
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert "<answer>" in row["prompt"][0]["content"]
    own = load_gsm8k(tmp_path, system_prompt="Mine.")[0]["prompt"]
    assert [message["content"] for message in own] == ["Mine.", "6 x 7?"]


def test_math_original_columns(tmp_path):
    file = tmp_path / "train.json"
    rows = [
        {"problem": "?", "solution": r"so \boxed{\frac{1}{2}}."},
        {"problem": "?", "solution": "x"},
    ]
    file.write_text(json.dumps(rows))
    loaded = load_math(tmp_path)
    assert loaded[0]["answer"] == r"\frac{1}{2}"
    with pytest.raises(ValueError, match=r"cppo.load_math: row 1 has no \\boxed{} in 'x'"):
        loaded[1]


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
    assert question.columns["answer"] == "2"
    assert question.images[0].size == (56, 28)  # 20 x 10 enlarged to a short side of 28
    assert load_geometry3k(tmp_path, min_image_side=0)[0]["images"][0].size == (20, 10)
    own = as_question(load_geometry3k(tmp_path, system_prompt="Mine.")[0])
    assert own.messages[0] == {"role": "system", "content": "Mine."}
    assert own.messages[1]["content"] == [IMAGE, text("Find x0.")]


def test_geometry3k_as_verl_prepares_it(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": "<image>Find x. Think."}],
            "images": [{"bytes": encoded(picture()), "path": None}],
            "reward_model": {"style": "rule", "ground_truth": "7"},
        }
    ]
    write_parquet(rows, tmp_path / "train.parquet")
    question = as_question(load_geometry3k(tmp_path)[0])
    assert question.columns["answer"] == "7" and len(question.images) == 1


def virl_folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        picture(14, 28).save(tmp_path / "images" / f"{name}.png")
    common = {"PassRate_32BTrained": 0.5, "PassRate_7BBase": 0.1, "category": "c", "source": "s"}
    rows = [
        {
            "question": "<image>\nOne?",
            "answer": r"\boxed{1}",
            "image": ["images/a.png"],
            "qid": "0",
        },
        {
            "question": "Two?",
            "answer": "two",
            "image": ["images/a.png", "images/b.png"],
            "qid": "1",
        },
        {"question": "Three?", "answer": r"\boxed{3}", "image": ["images/b.png"], "qid": "2"},
    ]
    write_parquet([{**row, **common} for row in rows], tmp_path / "39Krelease.parquet")
    return tmp_path


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


def test_virl39k_missing_image_names_the_row(tmp_path):
    folder = virl_folder(tmp_path)
    (folder / "images" / "b.png").unlink()
    rows = load_virl39k(folder)
    assert len(as_question(rows[0]).images) == 1
    with pytest.raises(ValueError, match="cppo.load_virl39k: row 2: image 0: there is no file"):
        rows[1]


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


# ---- datasets


def test_rows_are_lazy_sequences():
    taken = []

    def convert(row, index):
        taken.append(index)
        return {**row, "index": index}

    rows = Rows(ROWS, convert)
    assert len(rows) == 4 and taken == []
    assert rows[-1]["answer"] == "3" and taken == [3]
    part = rows[1:3]
    assert [row["index"] for row in part] == [1, 2]
    with pytest.raises(IndexError):
        rows[4]
    assert ROWS[0] == {"prompt": "0?", "answer": "0"}


def test_check_dataset():
    rows = [{"prompt": "abcd", "answer": "1"}, {"prompt": "ab", "answer": "2", "image": picture()}]
    summary = check_dataset(rows)
    assert summary == (2, 2, 1, 2, 1, 3.0, ("answer",))
    assert check_dataset(rows * 10, limit=4).checked == 4


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "the dataset is empty"),
        (3, "must have __len__ and __getitem__ .*got int"),
        (iter(ROWS), "must have __len__ and __getitem__"),
        ({"train": ROWS}, "got a mapping of train; take one of them"),
        ([ROWS[0], {"prompt": "x"}], "row 1 has the columns none, row 0 has answer"),
        ([ROWS[0], {"prompt": "x", "answer": None}], "row 1 has no ground truth"),
        ([ROWS[0], {"answer": "x"}], "cppo.as_question: row 1: has no 'prompt'"),
    ],
)
def test_bad_datasets(dataset, message):
    with pytest.raises((TypeError, ValueError), match=message):
        check_dataset(dataset, require_answer=True)


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
