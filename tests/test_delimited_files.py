"""CSV and TSV files as rows, and what is wrong with them."""

import codecs
import json

import pytest

from cppo.questions import check_dataset, load_rows
from cppo.rewards import boxed, numeric

GOOD = [
    (
        "a.csv",
        'prompt,answer\r\n"What is 1,\n000 + ""1""?",1001\r\n\r\n2?,\r\n',
        [{"prompt": 'What is 1,\n000 + "1"?', "answer": "1001"}, {"prompt": "2?", "answer": None}],
    ),
    ("a.tsv", "prompt\tanswer\na, b?\t7", [{"prompt": "a, b?", "answer": "7"}]),
    ("a.csv", 'prompt, answer\nx, "1, 2"\n', [{"prompt": "x", "answer": "1, 2"}]),
    ("a.csv", "prompt\nπ?\n", [{"prompt": "π?"}]),
    ("a.CSV", "prompt\nx\n", [{"prompt": "x"}]),
    ("a.csv", 'prompt,answer\nx,"[1, 2]"\n', [{"prompt": "x", "answer": "[1, 2]"}]),
]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE])
@pytest.mark.parametrize(("name", "text", "rows"), GOOD, ids=range(6))
def test_cells_are_text_and_an_empty_one_is_none(name, text, rows, mark, tmp_path):
    encoding = "utf-16-le" if mark == codecs.BOM_UTF16_LE else "utf-8"
    (tmp_path / name).write_bytes(mark + text.encode(encoding))
    assert list(load_rows(tmp_path / name)) == rows


def test_a_long_cell(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\n" + "a b " * 100_000)
    assert len(load_rows(tmp_path / "a.csv")[0]["prompt"]) == 400_000


def test_a_folder_of_them(tmp_path):
    for name in ("train-0", "train-1", "test"):
        (tmp_path / f"{name}.csv").write_text(f"prompt\n{name}\n")
    assert [row["prompt"] for row in load_rows(tmp_path, "train")] == ["train-0", "train-1"]
    with pytest.raises(ValueError, match="no file of the split 'dev', only test.csv, train-0.csv"):
        load_rows(tmp_path, "dev")


def test_numbers_as_text_are_answers(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,answer\n1?,42\n2?,"1,042"\n3?,0.5\n')
    rows = load_rows(tmp_path / "a.csv")
    assert check_dataset(rows, rewards=[numeric, boxed]).with_answers == 3
    said = [r"\boxed{42}", r"\boxed{1042}", r"\boxed{1/2}"]
    answers = [row["answer"] for row in rows]
    assert numeric(said, answer=answers) == boxed(said, answer=answers) == [1.0] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("prompt,answer\n", "has no rows"),
        ("prompt,answer\n1,2\n3\n", "a.csv, line 3 has 1 cells, the first row names 2 columns"),
        ('prompt,answer\n"a\nb",2\n3,4,5\n', "a.csv, line 4 has 3 cells, .*quote a cell"),
        (",prompt\n0,x\n", r"line 1: column 1 of 2 has no name; pandas .*to_csv\(index=False\)"),
        ("prompt,,answer\n1,2,3\n", "line 1: column 2 of 3 has no name"),
        ("prompt,answer,prompt\n1,2,3\n", "line 1: the column 'prompt' appears twice"),
        ("prompt;answer\n1;2\n", "line 1: the columns must be divided by commas .*'prompt;answer'"),
        ('prompt\nx\n"never closed\n', "a.csv, line 3 cannot be read: unexpected end of data"),
        ('prompt\n"a"b\n', "a.csv, line 2 cannot be read: ',' expected after '\"'"),
    ],
)
def test_bad_files_are_named_with_the_line(text, message, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=f"cppo.load_rows: .*{message}"):
        load_rows(tmp_path / "a.csv")


def test_other_encodings_are_refused_with_the_line(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt\nx\ncafé\n".encode("cp1252"))
    with pytest.raises(ValueError, match="a.csv, line 3 is not utf-8: invalid"):
        load_rows(tmp_path / "a.csv")


def test_json_beside_csv_goes_first(tmp_path):
    (tmp_path / "notes.csv").write_text("x\n1\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "?"}))
    assert list(load_rows(tmp_path)) == [{"prompt": "?"}]
