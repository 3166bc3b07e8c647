"""Files of rows: parquet, JSON, JSON lines, saved datasets, and what is wrong with them."""

import codecs
import json
import sys

import numpy as np
import pytest
from question_cases import ROWS, picture, write_parquet

from cppo.questions import Rows, as_question, load_rows
from cppo.rewards import boxed


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
    with pytest.raises(IndexError):
        load_rows(tmp_path)[4]


def test_other_files_of_a_folder_do_not_hide_its_rows(tmp_path):
    """As the hub has them: about.json beside the folder of the rows, a table beside a split."""
    (tmp_path / "data").mkdir()
    for split, rows in (("train", ROWS[:1]), ("test", ROWS[1:])):
        write_parquet(rows, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert len(load_rows(tmp_path)) == len(ROWS)
    for name in ("annotations.json", "test_pictures.json", "data/dev.csv"):
        (tmp_path / name).write_text("prompt\nHow many?\n")
    sizes = {split: len(load_rows(tmp_path, split)) for split in ("train", "test", "dev")}
    assert sizes == {"train": 1, "test": 3, "dev": 1}
    with pytest.raises(
        ValueError, match="no file of the split 'val', only annotations.json, .*dev"
    ):
        load_rows(tmp_path, "val")


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


def test_floats_of_few_bits_in_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'data'")
    features = datasets.Features(prompt=datasets.Value("string"), answer=datasets.Value("float32"))
    rows = [{"prompt": "?", "answer": answer} for answer in (0.1, 1 / 3, None)]
    datasets.Dataset.from_list(rows, features).save_to_disk(tmp_path / "one")
    assert [row["answer"] for row in load_rows(tmp_path / "one")] == [0.1, 1 / 3, None]


def test_load_rows_system_prompt(tmp_path):
    file = tmp_path / "a.json"
    own = [{"role": "system", "content": "old"}, {"role": "user", "content": "x"}]
    file.write_text(json.dumps([{"prompt": "x"}, {"prompt": own}]))
    expected = [{"role": "system", "content": "new"}, {"role": "user", "content": "x"}]
    assert [row["prompt"] for row in load_rows(file, system_prompt="new")] == [expected] * 2


# ---- JSON

ENCODINGS = [
    ("utf-8", b""),
    ("utf-8", codecs.BOM_UTF8),
    ("utf-16-le", codecs.BOM_UTF16_LE),
    ("utf-16-be", codecs.BOM_UTF16_BE),
    ("utf-16-le", b""),
    ("utf-32-le", codecs.BOM_UTF32_LE),
]


@pytest.mark.parametrize(("encoding", "mark"), ENCODINGS)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_json_in_every_encoding_of_its_standard(encoding, mark, suffix, end, tmp_path):
    # U+2028 and U+0085 end lines for str.splitlines, not in JSON.
    rows = [{"prompt": "π\u2028?\u0085", "answer": "3.14…"}, {"prompt": "😀", "answer": "4"}]
    text = json.dumps(rows, ensure_ascii=False)
    if suffix == "jsonl":
        text = end.join(["", json.dumps(rows[0], ensure_ascii=False), "  ", "", ""])
        text += json.dumps(rows[1], ensure_ascii=False)  # the last line may have no end
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(mark + text.encode(encoding))
    assert list(load_rows(file)) == rows


def test_byte_order_marks_of_files_put_together(tmp_path):
    part = codecs.BOM_UTF8 + b'{"prompt": "?"}\n'
    (tmp_path / "a.jsonl").write_bytes(part + b"\n" + part + part)
    assert list(load_rows(tmp_path / "a.jsonl")) == [{"prompt": "?"}] * 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "a.json, line 1 is not JSON: Expecting property name"),
        ("a.json", b'[\n{"a": 1},\n]', "a.json, line [23] is not JSON"),
        ("a.json", b"{}", "must hold an array of objects, got dict"),
        ("a.json", b"[1]", "row 0 of .*a.json must be an object, got int"),
        ("a.json", b"[]", "has no rows"),
        (
            "a.json",
            b'{"a": 1}\n{"a": 2}',
            "line 2 is not JSON: Extra data .*belong in a .jsonl file",
        ),
        ("a.json", b"[" * 100_000, "a.json cannot be read: .*recursion"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "a.json cannot be read: Exceeds the limit"),
        ("a.jsonl", b'{"a": 1}\nx\n', r"a.jsonl, line 2 is not JSON: Expecting value \(column 1\)"),
        ("a.jsonl", b'\n\n{"a": 1},\n', r"a.jsonl, line 3 is not JSON: Extra data \(column 9\)"),
        ("a.jsonl", b'{"a": 1,}\n', "a.jsonl, line 1 is not JSON"),
        ("a.jsonl", b'{"a": 1}\n[2]', "a.jsonl, line 2 must be an object, got list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', "a.jsonl, line 2 is not utf-8: invalid"),
        ("a.json", b'[\n\n{"a": "caf\xe9"}]', "a.json, line 3 is not utf-8: invalid"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.txt", b"a,b", "must be a .parquet, .jsonl, .json, .csv, .tsv file"),
        ("a.parquet", b"no", "cannot read .*a.parquet"),
        ("missing.json", None, "there is no file or folder .*missing.json"),
    ],
)
def test_bad_files(name, content, message, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"cppo.load_rows: .*{message}"):
        load_rows(tmp_path / name)


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="holds no .parquet, .jsonl, .json, .csv, .tsv file"):
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


# ---- Parquet shards


def shards(folder, *columns):
    """One file per list of values of a column `x`; a type may be given with them."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    parquet = pytest.importorskip("pyarrow.parquet")
    for number, (values, kind) in enumerate(columns):
        array = pyarrow.array(values, getattr(pyarrow, kind)() if kind else None)
        table = pyarrow.table({"prompt": [f"{number}?"] * len(values), "x": array})
        parquet.write_table(table, folder / f"train-{number}.parquet")
    return load_rows(folder, "train")


@pytest.mark.parametrize(
    "columns",
    [
        [([None, None], None), (["a", None], "string")],
        [(["a"], "string"), ([None], None), (["b"], "large_string")],
        [([1, 2], "int32"), ([2**40, None], "int64")],
        [([1], "int64"), ([2.5], "float64")],  # 1 stays the whole number 1
        [([1], "uint8"), ([-1], "int8"), ([2**63], "uint64")],
        [([["a"], []], None), ([[], []], None), ([None], None)],
        [([{"a": 1}], None), ([{"a": 2, "b": "c"}], None)],
        [([], "string"), (["a"], "string")],
    ],
)
def test_shards_of_one_kind_keep_their_values(columns, tmp_path):
    rows = shards(tmp_path, *columns)
    expected = [value for values, _ in columns for value in values]
    found = [row["x"] for row in rows]
    assert found == expected and list(map(type, found)) == list(map(type, expected))
    assert [rows[i]["x"] for i in range(len(rows))] == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            [(["4"], "string"), ([4], "int64")],
            r"'x' is string in \S*train-0.parquet and int64 in \S*train-1.parquet",
        ),
        (
            [([None], None), ([4], "int32"), (["4"], "string")],
            r"'x' is int32 in \S*train-1.parquet and string in \S*train-2.parquet",
        ),
        ([([True], "bool_"), ([1], "int64")], "is bool in .* and int64 in"),
        ([(["a"], None), ([["a"]], None)], "is string in .* and list<"),
        ([([{"a": 1}], None), ([{"a": "b"}], None)], "is struct<a: int64> in .* and struct<a: str"),
    ],
)
def test_shards_that_do_not_go_together(columns, message, tmp_path):
    with pytest.raises(ValueError, match=f"cppo.load_rows: the column .*{message}"):
        shards(tmp_path, *columns)


def test_shards_with_other_columns(tmp_path):
    write_parquet(ROWS, tmp_path / "a.parquet")
    write_parquet([{"prompt": "?"}], tmp_path / "b.parquet")
    message = r"b.parquet has the columns prompt, \S*a.parquet has prompt, answer"
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path)
    write_parquet([{"answer": "1", "prompt": "?"}], tmp_path / "b.parquet")
    assert len(load_rows(tmp_path)) == 5


def test_categories_are_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    parquet = pytest.importorskip("pyarrow.parquet")
    for name, array in (
        ("a", pyarrow.array(["x", "y"]).dictionary_encode()),
        ("b", pyarrow.array(["z"])),
    ):
        parquet.write_table(pyarrow.table({"x": array}), tmp_path / f"{name}.parquet")
    assert [row["x"] for row in load_rows(tmp_path)] == ["x", "y", "z"]


# ---- Rows


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


@pytest.mark.parametrize("kind", ["float32", "halffloat", "float64"])
def test_floats_of_few_bits_are_what_they_stand_for(kind, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra 'data'")
    numbers = [0.1, 1 / 3, 2 / 3, 0.25, 5.0]
    stored = np.array(numbers, {"halffloat": "float16"}.get(kind, kind))
    column = pa.array([*stored, None], getattr(pa, {"halffloat": "float16"}.get(kind, kind))())
    parquet.write_table(pa.table({"prompt": ["?"] * 6, "answer": column}), tmp_path / "a.parquet")
    rows = load_rows(tmp_path / "a.parquet")
    assert [row["answer"] for row in rows] == [*numbers, None]
    texts = [rf"\boxed{{{answer}}}" for answer in ("0.1", "1/3", r"\frac23", "1/4", "5")]
    assert boxed(texts, answer=[row["answer"] for row in rows][:5]) == [1.0] * 5
