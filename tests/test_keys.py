"""`cppo keys`, docs/options.md, `cppo train --help` and `cppo --version`: the options, once."""

import re
from pathlib import Path

import pytest
from cli_cases import cppo

import cppo as package
from cppo.cli import keys, main
from cppo.cli.config_file import all_keys
from cppo.cli.run_config import RunConfig

PAGE = Path(__file__).parents[1] / "docs" / "options.md"


def test_the_page_is_current():
    # `cppo keys --markdown > docs/options.md` writes it anew.
    assert PAGE.read_text() == keys.page()


def test_every_key_is_listed_and_documented():
    listed = {key.name: key for group in keys.groups() for key in group.keys}
    assert all(key.text and key.kind for key in listed.values())
    groups = {group.name for group in keys.groups()}
    expected = {key for key in all_keys(RunConfig) if not key.startswith("data.eval.")}
    assert {*listed, *groups} - {""} == expected
    assert listed["trainer.seed"].default == "0" and listed["trainer.eval_greedy"].default == "true"
    assert listed["trainer.lora"].default == "null" and listed["rewards"].default == ""


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("trainer.loss.tau", ["trainer.loss.tau"]),
        ("trainer.lora", [f"trainer.lora{n}" for n in ("", ".r", ".alpha", ".dropout", ".targ")]),
        ("data.eval.limit", ["data.train.limit"]),
    ],
)  # fmt: skip
def test_keys_below_a_prefix(prefix, names, capsys):
    status, out, _ = cppo(capsys, "keys", prefix)
    found = re.findall(r"^(\S+)", out, re.MULTILINE)
    assert status == 0 and len(found) == len(names)
    assert all(one.startswith(name) for one, name in zip(found, names, strict=True))


def test_all_keys_and_a_wrong_one(capsys):
    status, out, _ = cppo(capsys, "keys")
    assert status == 0 and "trainer.prune_rate = 0.0  (float)\n    Share of each question's" in out
    status, _, err = cppo(capsys, "keys", "trainer.los")
    assert status == 2
    assert err == "cppo keys: error: there is no key 'trainer.los'; did you mean 'trainer.loss'?\n"


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_of_train_names_every_key_and_that_of_eval_its_arguments(capsys):
    text = help_of(capsys, "train", "--help")
    for key in all_keys(RunConfig):
        assert re.search(rf"\b{key.rpartition('.')[2]}\b", text), key
    for words in (
        "cppo init",
        "--dry-run",
        "trainer.loss:",
        "group_size=8",
        "`cppo keys",
        "options.md",
    ):
        assert words in text
    text = help_of(capsys, "eval", "--help")
    for words in (
        "folder of a run",
        "completions per question",
        "which questions",
        "cppo eval runs",
    ):
        assert words in text


def test_version(capsys):
    assert help_of(capsys, "--version") == f"cppo {package.__version__}\n"
    text = help_of(capsys, "--help")
    assert "init" in text and "keys" in text and "--version" in text


def test_defaults_are_those_of_the_place():
    """The trainer's loss does not contrast; `LossConfig` by itself does."""
    (loss,) = (group for group in keys.groups() if group.name == "trainer.loss")
    assert next(key.default for key in loss.keys if key.name.endswith(".cpl_coef")) == "0.0"
