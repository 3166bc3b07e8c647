"""The published sets: rows in the layouts of their files, made here by hand."""

import json
import math
from pathlib import Path

import pytest
from cli_cases import cppo
from question_cases import encoded, picture

from cppo.cli.run_config import LOADERS
from cppo.demo.warmup import CHECKPOINTS
from cppo.options.places import load_object
from cppo.questions import (
    as_question,
    check_dataset,
    load_aime,
    load_amc,
    load_logicvista,
    load_math500,
    load_mathverse,
    load_mathvision,
    load_mathvista,
    load_mmmu_pro,
    load_wemath,
)
from cppo.rewards import boxed, from_names, math_verify, mathvista

pa = pytest.importorskip("pyarrow", reason="needs the extra 'data'")
parquet = pytest.importorskip("pyarrow.parquet")

TEXT, IMAGE = pa.string(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PICTURE = {"bytes": encoded(picture()), "path": "1.png"}
OTHER = {"bytes": encoded(picture(44, 33, 90)), "path": "2.png"}
PICK = "Answer with the letter of the right choice."

MATHVISTA = {
    **{"pid": TEXT, "question": TEXT, "image": TEXT, "decoded_image": IMAGE},
    **{"choices": pa.list_(TEXT), "unit": TEXT, "precision": pa.float64(), "answer": TEXT},
    **{"question_type": TEXT, "answer_type": TEXT},
    "metadata": pa.struct([("category", TEXT), ("img_height", pa.int64())]),
    "query": TEXT,
}
MATHVERSE = {
    **{"sample_index": TEXT, "problem_index": TEXT, "problem_version": TEXT, "question": TEXT},
    **{"image": IMAGE, "answer": TEXT, "question_type": TEXT},
    "metadata": pa.struct([("subject", TEXT)]),
    **{"query_wo": TEXT, "query_cot": TEXT, "question_for_eval": TEXT},
}
MATHVISION = {
    **{"id": TEXT, "question": TEXT, "options": pa.list_(TEXT), "image": TEXT},
    **{"decoded_image": IMAGE, "answer": TEXT, "solution": TEXT, "level": pa.int64()},
    "subject": TEXT,
}
LOGICVISTA = {"id": TEXT, "question": TEXT, "answer": TEXT, "image": IMAGE, "skill": TEXT}
WEMATH = {
    **{"ID": TEXT, "split": TEXT, "knowledge concept": TEXT, "question": TEXT, "option": TEXT},
    **{"answer": TEXT, "image_path": IMAGE, "key": TEXT, "question number": pa.int64()},
    "knowledge concept description": TEXT,
}
MMMU_PRO = {
    **{"id": TEXT, "question": TEXT, "options": TEXT, "explanation": TEXT},
    **{f"image_{number}": IMAGE for number in range(1, 8)},
    **{"img_type": TEXT, "answer": TEXT, "topic_difficulty": TEXT, "subject": TEXT},
}
VISION = {"id": TEXT, "image": IMAGE, "options": TEXT, "answer": TEXT, "subject": TEXT}


def write(path, schema, *rows):
    """A file of the hub: rows have what they name of the columns, the others are null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    full = [{name: row.get(name) for name in schema} for row in rows]
    assert all(set(row) <= set(schema) for row in rows)
    parquet.write_table(pa.Table.from_pylist(full, pa.schema(list(schema.items()))), path)
    return path


def asked(row):
    """What the model is asked, without the instruction, and the sizes of its images."""
    question = as_question(row)
    content = question.messages[-1]["content"]
    parts = [content] if isinstance(content, str) else content
    words = [p if isinstance(p, str) else p.get("text", "<image>") for p in parts]
    text = "".join(words)
    assert "\\boxed{}" in str(question.messages)
    return text.split(" You FIRST")[0], [image.size for image in question.images]


def right(row, answer, reward=boxed):
    return reward([f"so \\boxed{{{answer}}}"], answer=[row["answer"]])[0] == 1.0


# ---- Text


@pytest.mark.parametrize(
    ("load", "rows", "answers"),
    [
        (load_math500, [{"problem": "?", "solution": "x", "answer": r"\frac{1}{2}"}], ["1/2"]),
        (load_amc, [{"id": 0, "question": "?", "answer": "27.0", "url": "u"}], ["27"]),
        (load_amc, [{"id": 0, "problem": "?", "answer": 27.0}], ["27"]),
        (load_aime, [{"id": 60, "problem": "?", "solution": "s", "answer": "204"}], ["204"]),
        (load_aime, [{"id": 60, "problem": "?", "solution": r"\boxed{204}", "url": "u"}], ["204"]),
        (
            load_aime,
            [{"question": "?", "answer": "70"}, {"question": "!", "answer": "033"}],
            "70 33",
        ),
        (load_aime, [{"ID": "2024-I-4", "Problem": "?", "Solution": "s", "Answer": 116}], ["116"]),
    ],
)
def test_text_sets(load, rows, answers, tmp_path):
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = load(tmp_path)
    answers = answers.split() if isinstance(answers, str) else answers
    assert len(loaded) == len(rows)
    for row, answer in zip(loaded, answers, strict=True):
        assert asked(row)[0] in "?!" and right(row, answer) and not right(row, "5")
        assert set(rows[0]) <= set(row)


def test_the_split_of_a_set_is_not_that_of_another(tmp_path):
    schema = {"problem": TEXT, "answer": TEXT}
    for name in ("testmini-00000-of-00001", "test-00000-of-00002", "test-00001-of-00002"):
        row = {"problem": name, "answer": "1"}
        write(tmp_path / "data" / f"{name}.parquet", schema, row)
    assert [asked(row)[0][:10] for row in load_math500(tmp_path)] == ["test-00000", "test-00001"]
    assert asked(load_math500(tmp_path, "testmini")[0])[0].startswith("testmini")


# ---- MathVista


def vista(tmp_path, **columns):
    row = {"pid": "1", "image": "images/1.jpg", "decoded_image": PICTURE, "question": "How many?"}
    row |= {"question_type": "free_form", "answer_type": "text", "query": "Hint: ..."}
    return write(tmp_path / "data" / "testmini-0.parquet", MATHVISTA, row | columns)


def test_mathvista_choices(tmp_path):
    vista(tmp_path, choices=["3", "-3", "Yes"], answer="-3", question_type="multi_choice")
    (row,) = load_mathvista(tmp_path)
    assert asked(row) == (f"<image>\nHow many?\nA. 3\nB. -3\nC. Yes\n{PICK}", [(42, 28)])
    assert row["answer"] == ["B", "-3"] and row["image_name"] == "images/1.jpg"
    good = ["B", "(B)", "B.", r"\text{B}", r"\textbf{(B)}", "-3", "(B) -3", "B. -3"]
    good += ["the answer is B", "The answer is (B).", "Answer: B", "Option B", "choice (B)"]
    for answer in good:
        assert right(row, answer) and right(row, answer, math_verify), answer
    bad = ["A", "3", "(C) -3", "AB", "A or B", "the answer is A", "not B", "Option BC", "an answer"]
    for answer in bad:
        assert not right(row, answer) and not right(row, answer, math_verify), answer


@pytest.mark.parametrize(
    ("choices", "answer", "accepted"),
    [
        (["B", "A"], "A", ["B"]),  # a letter is a label
        (["0.5", "1/2"], "1/2", ["B"]),  # two choices say the same
        (["5", "7"], "7", ["B", "7"]),
        (["2", "2"], "2", ["A", "B", "2"]),
    ],
)
def test_the_text_of_a_choice_counts_where_it_says_which(choices, answer, accepted, tmp_path):
    vista(tmp_path, choices=choices, answer=answer, question_type="multi_choice")
    assert load_mathvista(tmp_path)[0]["answer"] == accepted


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        ({"answer": "7", "answer_type": "integer"}, "Answer with a whole number."),
        (
            {"answer": "1.2", "answer_type": "float", "precision": 1.0, "unit": "cm"},
            "Answer with a number of 1 decimal place.",
        ),
        ({"answer": "[1, 2]", "answer_type": "list"}, "Answer with a list, such as [1, 2, 3]."),
    ],
)
def test_mathvista_free_form(columns, form, tmp_path):
    (row,) = load_mathvista(vista(tmp_path, **columns))
    unit = " (Unit: cm)" if "unit" in columns else ""
    assert asked(row)[0] == f"<image>\nHow many?{unit}\n{form}"
    assert right(row, columns["answer"], mathvista)


def test_mathvista_rounds_to_the_precision_of_the_row():
    def rewards(answers, truth, precision):
        texts = [f"\\boxed{{{answer}}}" for answer in answers]
        count = len(texts)
        return mathvista(texts, answer=[truth] * count, precision=[precision] * count)

    assert rewards(["1.23", "1.2", "1.249", "1.26", "1.1", "x"], "1.2", 1.0) == [1, 1, 1, 0, 0, 0]
    assert rewards(["1.23 cm", "1.25 kg"], "1.2 cm", 1.0) == [1, 0]
    assert rewards(["7", "7.2"], "7", None) == rewards(["7", "7.2"], "7", math.nan) == [1, 0]
    assert rewards(["B", "C"], ["B", "1.2"], None) == [1, 0]
    assert mathvista([r"\boxed{1.2}", "1.2"], answer=["1.2", "1.2"]) == [1, 0]
    assert boxed([r"\boxed{1.23}"], answer=["1.2"]) == [0]
    (function,), _ = from_names(["mathvista"])
    assert function is mathvista
    with pytest.raises(ValueError, match="precision"):
        from_names([{"mathvista": {"precision": 2}}])


# ---- MathVerse


def test_mathverse(tmp_path):
    choice = {"question": "Find x.\nChoices:\nA:3\nB:5", "answer": "B", "image": PICTURE}
    rows = [
        choice | {"question_type": "multi-choice", "problem_version": "Text Dominant"},
        choice
        | {"question_type": "multi-choice", "problem_version": "Vision Only", "question": ""},
        {"question": "y?", "question_type": "free-form", "answer": "6.2"}
        | {"problem_version": "Text Only"},
    ]
    first, second, third = load_mathverse(write(tmp_path / "testmini.parquet", MATHVERSE, *rows))
    assert asked(first) == (f"<image>\n{choice['question']}\n{PICK}", [(42, 28)])
    assert asked(second)[0] == f"<image>\nAnswer the question that is shown in the image.\n{PICK}"
    assert asked(third) == ("y?", []) and right(third, "6.2")
    assert right(first, "B") and not right(first, "A") and first["problem_version"]


# ---- MathVision


def test_mathvision(tmp_path):
    row = {"id": "4", "question": "Which?\n<image1>", "image": "images/4.jpg", "level": 2}
    row |= {"decoded_image": PICTURE, "subject": "counting", "answer": "B"}
    rows = [
        row | {"options": [], "answer": "60"},
        row | {"options": list("ABCDE")},
        row | {"options": ["<image2>", "$\\frac{1}{2}$"]},
        row | {"options": ["3", "4"], "question": "How many?"},
    ]
    write(tmp_path / "data" / "test-00000-of-00001.parquet", MATHVISION, *rows)
    free, shown, mixed, plain = load_mathvision(tmp_path)
    assert asked(free) == ("Which?\n<image>", [(42, 28)]) and right(free, "60")
    assert asked(shown)[0] == f"Which?\n<image>\n{PICK}" and shown["answer"] == "B"
    lines = "A. [image 2]\nB. $\\frac{1}{2}$"
    assert asked(mixed)[0] == f"Which?\n<image>\n{lines}\n{PICK}" and right(mixed, "0.5")
    assert asked(plain)[0] == f"<image>\nHow many?\nA. 3\nB. 4\n{PICK}"
    assert plain["level"] == 2 and plain["image_name"] == "images/4.jpg"


# ---- LogicVista, We-Math


def test_logicvista(tmp_path):
    row = {"id": "v1_1", "question": "Which one? Select from A, B and C.", "image": PICTURE}
    rows = [row | {"answer": "C"}, row | {"answer": "A, C"}]
    one, two = load_logicvista(write(tmp_path / "test.parquet", LOGICVISTA, *rows))
    assert asked(one)[0].startswith("<image>\nWhich one? Select from A, B and C.\nAnswer with")
    assert right(one, "C") and not right(one, "A, C")
    assert right(two, "A, C") and right(two, "A and C") and not right(two, "A")


def test_wemath(tmp_path):
    row = {"ID": "3steps_165", "question": "Area?", "answer": "B", "image_path": PICTURE}
    row |= {"option": "A. 200.96;B. 32 ;C. D; D. No correct answer", "key": "3steps_3"}
    (loaded,) = load_wemath(write(tmp_path / "testmini.parquet", WEMATH, row))
    lines = "A. 200.96\nB. 32\nC. D\nD. No correct answer"
    assert asked(loaded) == (f"<image>\nArea?\n{lines}\n{PICK}", [(42, 28)])
    assert loaded["answer"] == ["B", "32"] and loaded["key"] == "3steps_3"


def test_wemath_with_images_beside_its_file(tmp_path):
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "1.png")
    row = {"question": "?", "option": "A. 1; B. 2", "answer": "A", "image_path": "images/1.png"}
    (tmp_path / "testmini.json").write_text(json.dumps([row]))
    assert asked(load_wemath(tmp_path)[0])[1] == [(42, 28)]
    row["image_path"] = "images/2.png"
    (tmp_path / "testmini.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match="row 0: image 0: there is no file .*images/2.png"):
        load_wemath(tmp_path)


# ---- MMMU-Pro


def test_mmmu_pro(tmp_path):
    row = {"id": "test_1", "question": "<image 2> and <image 1>?", "answer": "B"}
    row |= {"image_1": PICTURE, "image_2": OTHER, "subject": "Art"}
    rows = [
        row | {"options": "['$6', \"it's <image 1>\", '7']"},
        row | {"options": "['x', 'yes']", "question": "None named?"},
    ]
    named, unnamed = load_mmmu_pro(write(tmp_path / "test-00000-of-00001.parquet", MMMU_PRO, *rows))
    text = f"<image> and <image>?\nA. $6\nB. it's <image>\nC. 7\n{PICK}"
    assert asked(named) == (text, [(44, 33), (42, 28), (42, 28)]) and named["answer"] == ["B"]
    assert asked(unnamed)[1] == [(42, 28), (44, 33)] and unnamed["answer"] == ["B", "yes"]
    assert "image_1" not in named and check_dataset([named, unnamed]).max_images == 3


def test_mmmu_pro_in_pictures(tmp_path):
    row = {"id": "1", "image": PICTURE, "options": "['3', '4']", "answer": "A", "subject": "Art"}
    (loaded,) = load_mmmu_pro(write(tmp_path / "test-0.parquet", VISION, row))
    text = f"<image>\nAnswer the question that is shown in the image.\n{PICK}"
    assert asked(loaded) == (text, [(42, 28)]) and loaded["answer"] == ["A", "3"]


# ---- Bad rows


BAD = [
    (load_mathvista, MATHVISTA, {"choices": ["1", "2"], "answer": "3"}, "none of its choices"),
    (load_mathvista, MATHVISTA, {"decoded_image": None}, "has no image in 'decoded_image'"),
    (load_mathvista, MATHVISTA, {"answer": ""}, "has no answer"),
    (load_mathvista, MATHVISTA, {"question": " "}, "has no question"),
    (load_mathverse, MATHVERSE, {"image": None}, "has no image in 'image'"),
    (load_mathverse, MATHVERSE, {"answer": "3"}, "has the answer '3'"),
    (load_mathvision, MATHVISION, {"options": ["1", "2"], "answer": "C"}, "choices are A to B"),
    (load_mathvision, MATHVISION, {"decoded_image": {"bytes": b"no", "path": None}}, "cannot read"),
    (load_logicvista, LOGICVISTA, {"answer": None}, "has no answer"),
    (load_logicvista, LOGICVISTA, {"image": {"bytes": None, "path": None}}, "must be a path or by"),
    (load_wemath, WEMATH, {"option": "3 or 4"}, "has an option that is not 'A. ...; B. ...'"),
    (load_wemath, WEMATH, {"option": "A. 3; C. 4"}, "has an option that is not"),
    (load_wemath, WEMATH, {"answer": "E"}, "has the answer 'E', and its choices are A to B"),
    (load_mmmu_pro, MMMU_PRO, {"options": "['1', '2'"}, "has options that are no list"),
    (load_mmmu_pro, MMMU_PRO, {"options": "{1: 2}"}, "must have a list of up to 26 options"),
    (load_mmmu_pro, MMMU_PRO, {"options": "[" * 500}, "has options that are no list"),
    (load_mmmu_pro, MMMU_PRO, {"options": "[]"}, "its choices are none"),
    (load_mmmu_pro, MMMU_PRO, {"question": "<image 3>?"}, "has no image in 'image_3'"),
    (load_mmmu_pro, MMMU_PRO, {"question": "<image 9>?"}, "has no image in 'image_9'"),
    (load_mmmu_pro, VISION, {"answer": "F"}, "its choices are A to B"),
]
GOOD = {"question": "Q?", "answer": "A", "question_type": "multi-choice"}
GOOD |= {"image": PICTURE, "decoded_image": PICTURE, "image_path": PICTURE, "image_1": PICTURE}
GOOD |= {"problem_version": "Text Lite", "option": "A. 1; B. 2"}


def good(schema):
    options = ["1", "2"] if schema is MATHVISION else "['1', '2']"
    row = {**GOOD, "options": options, "choices": ["A", "B"]}
    row = {name: value for name, value in row.items() if name in schema}
    return {name: "x" if schema[name] == TEXT and v is PICTURE else v for name, v in row.items()}


@pytest.mark.parametrize(("load", "schema", "bad", "words"), BAD, ids=[bad[3][:30] for bad in BAD])
def test_bad_rows_are_refused_with_their_number(load, schema, bad, words, tmp_path):
    file = write(tmp_path / "test.parquet", schema, good(schema), good(schema) | bad)
    with pytest.raises(ValueError, match=r"1 of 2 rows read cannot be used:\n  row 1: ") as error:
        load(file)
    assert words in str(error.value) and load.__name__ in str(error.value)
    with pytest.warns(UserWarning, match="They are left out"):
        assert len(load(file, skip_bad_rows=True)) == 1


PUBLISHED = "math500 amc23 aime24 aime25 mathvista mathverse mathvision logicvista wemath mmmu_pro"


@pytest.mark.parametrize("name", PUBLISHED.split())
def test_other_columns_are_named(name, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"frage": "?", "antwort": "1"}')
    with pytest.raises(ValueError, match="expected the columns .*, got frage, antwort"):
        load_object(LOADERS[name], "loader")(tmp_path / "test.jsonl")


# ---- The command


def test_a_checkpoint_is_evaluated_on_a_set_from_its_file(empty_folder, capsys):
    row = {"pid": "1", "image": "images/1.jpg", "decoded_image": PICTURE, "question": "1 + 2"}
    row |= {"question_type": "multi_choice", "answer_type": "text", "answer": "3"}
    row |= {"choices": ["3", "4"], "metadata": {"category": "general-vqa", "img_height": 20}}
    free = row | {"choices": None, "question_type": "free_form", "answer_type": "float"}
    free |= {"precision": 1.0, "answer": "1.2", "pid": "2"}
    write(Path("MathVista/data/testmini-00000-of-00001.parquet"), MATHVISTA, row, free)
    short = ["--samples", "2", "trainer.max_completion_tokens=4"]
    recipe = Path(__file__).parents[1] / "recipes" / "digits.yaml"
    given = ["data.eval={loader: mathvista, path: MathVista}", "rewards=[mathvista]"]
    status, out, err = cppo(capsys, "eval", str(recipe), *given, *short, "--csv", "eval.csv")
    assert status == 0 and "mathvista/pass@2" in out and "tiny_digits on 2 questions" in out, err
    model = ["--loader", "mathvista", "--path", "MathVista"]
    again = cppo(capsys, "eval", str(CHECKPOINTS / "digits"), *model, *short)
    assert again[0] == 0 and "mathvista/maj@2" in again[1], again[2]
    lines = [json.loads(line) for line in open("predictions_mathvista.jsonl")]
    assert [line["row"] for line in lines] == [0, 0, 1, 1, 0, 1]
    first, third = lines[0], lines[2]
    assert first["images"] == ["images/1.jpg"] and first["answer"] == ["A", "3"]
    assert first["columns"]["pid"] == "1" and first["columns"]["metadata"]["img_height"] == 20
    assert third["columns"]["precision"] == 1.0 and third["answer"] == "1.2"
    assert "A. 3\nB. 4" in first["question"] and first["model"].endswith("digits")


def test_a_bad_row_is_said_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "test.parquet", VISION, good(VISION), good(VISION) | {"answer": "Z"})
    status, _, err = cppo(capsys, "eval", "no/model", "--loader=mmmu_pro", f"--path={file}")
    assert status == 2 and "load_mmmu_pro: 1 of 2 rows" in err and "row 1: has the answer" in err
    assert not list(tmp_path.glob("predictions*"))
