"""`cppo data to-verl`: verl's parquet from our loaders, and our rewards as verl calls them."""

import io

import pytest
from cli_cases import cppo
from PIL import Image
from question_cases import DATA, encoded, needs, picture, write_parquet

from cppo.integrations.verl_rewards import compute_score
from cppo.questions import QuestionError, as_question, load_gsm8k, load_rows
from cppo.questions.to_verl import verl_row, write_verl


@needs("gsm8k")
def test_gsm8k_as_verl_prepares_it(tmp_path, capsys):
    pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    file = tmp_path / "test.parquet"
    folder = str(DATA / "gsm8k")
    command = ("data", "to-verl", "gsm8k", folder, str(file), "--split", "test", "--limit", "300")
    assert cppo(capsys, *command) == (0, f"{file}: 300 rows\n", "")
    rows, source = load_rows(file), load_gsm8k(folder, "test")
    assert len(rows) == 300  # more than are written at once
    for index in (0, 255, 256, 299):
        row, prepared = rows[index], source[index]
        assert row["prompt"] == prepared["prompt"] and row["images"] == []
        assert row["data_source"] == "openai/gsm8k" and row["ability"] == "math"
        assert row["reward_model"] == dict(style="rule", ground_truth=prepared["answer"])
        assert row["extra_info"] == dict(split="test", index=index, columns="{}")
    assert [row["answer"] for row in load_gsm8k(file)[:9]] == [row["answer"] for row in source[:9]]

    status, out, err = cppo(capsys, *command)
    assert (status, out) == (2, "") and err.endswith("is there; --overwrite replaces it\n")
    assert cppo(capsys, *command, "--overwrite", "--system-prompt", "Be brief.")[0] == 0
    assert load_rows(file)[0]["prompt"][0] == dict(role="system", content="Be brief.")
    assert list(tmp_path.iterdir()) == [file]


def test_images_go_along(tmp_path, capsys):
    pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    image = picture()
    rows = [dict(problem="<image>How long?", images=[dict(bytes=encoded(image))], answer="7")]
    write_parquet(rows, tmp_path / "train.parquet")
    file = tmp_path / "out" / "geo.parquet"
    file.parent.mkdir()
    assert cppo(capsys, "data", "to-verl", "geometry3k", str(tmp_path), str(file))[0] == 0
    (row,) = load_rows(file)
    assert row["data_source"] == "hiyouga/geometry3k" and row["extra_info"]["split"] == "train"
    assert row["prompt"][-1]["content"].startswith("<image>How long?")
    written = Image.open(io.BytesIO(row["images"][0]["bytes"]))
    question = as_question(row)
    assert written.format == "PNG" and question.columns["answer"] == "7"
    assert question.images[0].tobytes() == written.tobytes() and min(written.size) >= 28


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mth", "x", "o.parquet"], "loader must be one of 'gsm8k', 'math'"),
        (["math", "nowhere", "o.parquet"], "there is no file or folder nowhere"),
        (["math", "x", "o.json"], "OUTPUT must end in .parquet, got o.json"),
        (["math", "x", "no/o.parquet"], "there is no folder no"),
        (["math", "x", "o.parquet", "--limit", "0"], "limit must be"),
    ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = cppo(capsys, "data", "to-verl", *arguments)
    assert (status, out) == (2, "") and words in err
    assert err.startswith("cppo data: error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_rows_that_verl_would_misread_are_refused(tmp_path):
    pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    part = dict(type="text", text="a <video> of")
    seen = [dict(role="user", content=[dict(type="image"), part])]
    for row, words in (
        (dict(prompt="?", answer=["1", "2"]), r"row 0: verl's ground_truth is a text, got the ans"),
        (dict(prompt="?"), "row 0: verl's ground_truth is a text, got the answer None"),
        (dict(prompt=seen, images=[picture()], answer="1"), "row 0: a text has <video>"),
        (dict(prompt=[dict(role="user", content="?", name="n")], answer="1"), "a message has name"),
    ):
        with pytest.raises(QuestionError, match=words):
            write_verl([row], tmp_path / "o.parquet", data_source="d")
        assert not list(tmp_path.iterdir())
    # Without images verl does not look for markers.
    question = as_question(dict(prompt=[dict(role="user", content=[part])], answer=1.5), 3)
    row = verl_row(question, "d", "math", "train")
    assert row["prompt"] == [dict(role="user", content="a <video> of")]
    assert row["reward_model"]["ground_truth"] == "1.5" and row["extra_info"]["index"] == 3


def test_rewards_have_the_columns_that_they_have_in_the_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "def seen(completions, unit, **columns): return [float(unit == ['cm'])]\n"
    (tmp_path / "mine.py").write_text(text)
    rewards = ["mathvista", "mine.py:seen"]
    question = as_question(dict(prompt="?", answer="1.2", precision=1.0, unit="cm", tags=[1]), 0)
    written = verl_row(question, "d", "math", "test")["extra_info"]
    for extra in (written, dict(precision=1, unit="cm", columns="no JSON", answer="9")):
        found = compute_score("d", "\\boxed{1.23}", "1.2", extra, rewards=rewards)
        assert found["mathvista"] == found["seen"] == 1.0
    assert compute_score("d", "\\boxed{1.23}", "1.2", {}, rewards=rewards[:1])["score"] == 0.0
    own = dict(completions="9", columns=dict(precision=1))
    assert compute_score("d", "\\boxed{1.23}", "1.2", own, rewards=["mathvista"])["score"] == 1.0


def test_our_rewards_as_verl_calls_them():
    rewards = [dict(accuracy={}, weight=0.9), dict(format={}, weight=0.1)]
    right = "<think>so</think>\\boxed{7}"
    for text, score, acc in ((right, 1.0, 1.0), ("\\boxed{7}", 0.9, 1.0), ("7", 0.0, 0.0)):
        found = compute_score("d", text, "7", dict(index=0), rewards=rewards, num_turns=2)
        assert found["score"] == pytest.approx(score) and found["acc"] == acc
        assert set(found) == {"score", "acc", "boxed", "think_boxed_format"}
    assert compute_score("d", right, "7")["score"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="reward"):
        compute_score("d", right, "7", rewards=["bxed"])


def test_a_reward_that_has_the_name_of_one_of_verls_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "def score(completions, **columns): return [0.5 for _ in completions]\n"
    (tmp_path / "mine.py").write_text(text)
    found = compute_score("d", "7", "7", rewards=[{"mine.py:score": {}, "weight": 2.0}])
    assert found == {"score": 1.0, "acc": 0.5, "score_reward": 0.5}
