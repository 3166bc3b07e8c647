"""What a run that goes on must have in common with the one that wrote the checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import io
import os
import re
import subprocess
import sys
import threading
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from PIL import Image
from trainer_cases import digit_share, image, text_rows, trainer_for

from cppo.options.trainer import CPPOConfig
from cppo.rewards import (
    Combined,
    CosineLength,
    boxed,
    combine,
    completion_text,
    gsm8k_reward,
    math_reward,
)
from cppo.train import fingerprint
from cppo.train.run_options import run_options
from cppo.views import GaussianBlur


def test_rows_as_pandas_reads_them_and_a_picture_that_breaks_off() -> None:
    """The bytes of an array of objects are addresses; a picture that is cut off can be opened."""
    file = io.BytesIO()
    image(64, 64, 1).save(file, "PNG")

    def rows() -> list[dict[str, Any]]:
        messages = np.empty(1, dtype=object)
        messages[0] = {"role": "user", "content": "Hi"}
        cut = Image.open(io.BytesIO(file.getvalue()[:-40]))
        return [{"prompt": messages, "image": image(8, 8, 1)}, {"prompt": messages, "image": cut}]

    one, other = rows(), rows()
    assert fingerprint.of_dataset(one) == fingerprint.of_dataset(other)
    other[0]["prompt"][0]["content"] = "Ho"
    assert fingerprint.of_dataset(one) != fingerprint.of_dataset(other)


class Turned:
    def __call__(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return pixels.flip(-1)


class OwnTracker(GeneralTracker):
    name, requires_logging_directory, tracker = "own", False, None

    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_options_that_are_objects_go_by_names_that_every_process_has() -> None:
    """A repr has an address in memory, and what holds a lock cannot be copied."""

    def options() -> dict[str, Any]:
        views = Turned(), functools.partial(torch.mul, other=2), GaussianBlur(), "rotation"
        return run_options(CPPOConfig(positive_views=views, trackers=(OwnTracker(),)), 1)

    found = options()
    assert found == options() and found["trackers"] == ["own"]
    blur = {"kernel_size": 3, "sigma": 1.0}
    assert found["positive_views"] == ["Turned", "mul(other=2)", blur, "rotation"]


def letter_share(completions: list[Any], **columns: Any) -> list[float]:
    texts = map(completion_text, completions)
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in texts]


def other_rows(count: int = 6) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i} - {i}?", "answer": "0"} for i in range(count)]


CHANGES = {
    "another data set": ({"rows": other_rows()}, "train_dataset .was '6 rows, digest "),
    "a row less": ({"rows": text_rows(5)}, "train_dataset .was '6 rows, .*is '5 rows, "),
    "another order": ({"rows": text_rows()[::-1]}, "train_dataset .was "),
    "one answer": (
        {"rows": [*text_rows(5), {"prompt": "What is 5 + 5?", "answer": "11"}]},
        "train_dataset .was ",
    ),
    "another reward": ({"rewards": letter_share}, "rewards .was .*digit_share.*letter_share"),
    "one more reward": ({"rewards": [digit_share, letter_share]}, "rewards .was "),
    "other held-out rows": ({"eval_rows": other_rows(1)}, "eval_dataset .was '1 rows, "),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    path = tmp_path_factory.mktemp("run")
    trainer_for(path, max_steps=1, eval_rows=text_rows(1)).train()
    return path


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_or_rewards_are_refused_in_words(folder: Path, change: str) -> None:
    options, words = CHANGES[change]
    options = {"max_steps": 2, "eval_rows": text_rows(1), **options}
    trainer = trainer_for(folder, **options)
    with pytest.raises(ValueError, match=f"changed: .*{words}"):
        trainer.train(resume_from="auto")
    assert trainer.step == 0


def test_a_repaired_reward_goes_on_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_for(tmp_path, max_steps=1).train()
    again = trainer_for(tmp_path, max_steps=2, rewards=letter_share, resume_with_changes=True)
    again.train(resume_from="auto")
    assert again.step == 2
    assert "resumed although it changed: rewards" in " ".join(capsys.readouterr().out.split())


def test_another_option_is_refused_all_the_same(folder: Path) -> None:
    trainer = trainer_for(
        folder, max_steps=2, eval_rows=text_rows(1), learning_rate=0.5, resume_with_changes=True
    )
    with pytest.raises(ValueError, match=r"changed: learning_rate \(was 0.001, is 0.5\)$"):
        trainer.train(resume_from="auto")


def test_the_schedule_is_that_of_the_run_that_goes_on(tmp_path: Path) -> None:
    options = dict(lr_scheduler="linear", learning_rate=1e-3)
    trainer_for(tmp_path / "short", max_steps=2, **options).train()
    longer = trainer_for(tmp_path / "longer", max_steps=4, **options)
    checkpoint = tmp_path / "short" / "checkpoint-000002"
    longer.train(resume_from=checkpoint)
    rates = [row["learning_rate"] for row in longer.history]
    # 1 and 1/2 of the rate in the run of two steps; 2/4 and 1/4 in that of four.
    assert rates == pytest.approx([1e-3, 0.5e-3, 0.5e-3, 0.25e-3])


def test_a_step_without_completions_moves_the_schedule_on(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path, rewards=lambda completions, **_: [1.0] * len(completions), max_refills=0,
        drop_zero_variance=True, lr_scheduler="linear", learning_rate=1e-3, max_steps=4,
    )  # fmt: skip
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.history]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


# Fingerprints


SCALE = 1.0


def scaled(completions: list[Any], **columns: Any) -> list[float]:
    return [SCALE * helper(text) for text in completions]


def helper(text: Any) -> float:
    return float(len(completion_text(text)))


class Judge:
    def __init__(self, scale: float, inner: Any = None) -> None:
        self.scale, self.inner = scale, inner

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        return [self.scale] * len(completions)

    def judge(self, completions: list[Any], **columns: Any) -> list[float]:
        return [self.scale] * len(completions)


def closed_over(scale: float) -> Any:
    def reward(completions: list[Any], **columns: Any) -> list[float]:
        return [scale] * len(completions)

    return reward


@dataclasses.dataclass(frozen=True)
class Named:
    function: Any
    scale: float = 1.0

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        return self.function(completions, **columns)


def marked(reward: Any, **names: Any) -> Any:
    """The fingerprint of a function, its globals changed for the moment."""
    before = dict(globals())
    globals().update(names)
    try:
        return fingerprint.of_function(reward)
    finally:
        globals().update(before)


PATTERN, TABLE, ARRAY = re.compile("1"), {"a": len}, np.array([1.0])
PARTIAL, CACHED = functools.partial(helper, 1), functools.lru_cache(helper)


def names_globals(completions: list[Any], **columns: Any) -> list[Any]:
    return [PATTERN, TABLE, ARRAY, PARTIAL, CACHED, completions]


class Base:
    def shared(self) -> float:
        return SCALE


class Slotted(Base):
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        return [self.scale * self.shared() * helper(text) for text in completions]


def with_default(completions: list[Any], scale: float = 1.0) -> list[float]:
    return [scale] * len(completions)


def with_other_default(completions: list[Any], scale: float = 2.0) -> list[float]:
    return [scale] * len(completions)


DIFFERENT: dict[str, list[Any]] = {
    "functions": [digit_share, letter_share, boxed, gsm8k_reward, math_reward],
    "closures": [closed_over(1.0), closed_over(-1.0)],
    "defaults": [with_default, with_other_default],
    "objects": [Judge(1.0), Judge(-1.0), Judge(1.0, Judge(2.0)), Judge(1.0, Judge(3.0))],
    "methods": [Judge(1.0).judge, Judge(-1.0).judge],
    # One line, so that their source is the same.
    "lambdas": [lambda completions: len(completions), lambda completions: str(completions)],
    "partials": [functools.partial(scaled, judge=Judge(x)) for x in (1.0, 2.0)],
    "nested": [functools.partial(closed_over(x), a=1) for x in (1.0, 2.0)],
    "options": [CosineLength(max_length=10), CosineLength(max_length=20)],
    "fields": [Named(scaled), Named(helper), Named(scaled, 2.0)],
    "arguments": [functools.partial(scaled, f=helper), functools.partial(scaled, f=scaled)],
    "combinations": [
        *(combine({name: 1}, name="r") for name in ("boxed", "numeric")),
        *(Combined("r", (functools.partial(boxed, unfinished_thought=x),), (1.0,)) for x in (1, 0)),
    ],
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_functions_that_differ_have_other_fingerprints(kind: str) -> None:
    marks = [fingerprint.of_function(function) for function in DIFFERENT[kind]]
    assert len(set(marks)) == len(marks)
    assert marks == [fingerprint.of_function(function) for function in DIFFERENT[kind]]
    assert not any(" at 0x" in mark for mark in marks), marks


def test_fingerprints_can_be_read() -> None:
    assert fingerprint.of_function(boxed) == "cppo.rewards.functions:boxed"
    assert "Named(function=scaled, scale=2)" in fingerprint.of_function(Named(scaled, 2.0))


def test_what_a_function_names_counts() -> None:
    changes: list[dict[str, Any]] = [
        {"PATTERN": re.compile("2")},
        {"PATTERN": re.compile("1", re.I)},
        {"TABLE": {"a": max}},
        {"TABLE": {"b": len}},
        {"ARRAY": np.array([2.0])},
        {"PARTIAL": functools.partial(helper, 2)},
        {"PARTIAL": functools.partial(scaled, 1)},
        {"CACHED": functools.lru_cache(scaled)},
    ]
    marks = [marked(names_globals), *(marked(names_globals, **change) for change in changes)]
    assert len(set(marks)) == len(marks)
    names_globals.weight = 1.0  # type: ignore[attr-defined]
    assert marked(names_globals) not in marks
    del names_globals.weight  # type: ignore[attr-defined]
    # Objects: their slots, and what their methods name, in a base class too.
    other = {"SCALE": -1.0}, {"helper": closed_over(1.0)}
    for named in (scaled, Slotted(1.0)):
        marks = [marked(named), *(marked(named, **change) for change in other)]
        assert len(set(marks)) == len(marks)
    assert marked(Slotted(2.0)) != marked(Slotted(1.0))


def test_a_helper_in_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "reward_of_mine.py").write_text(
        "from helper_of_mine import share\n"
        "def reward(completions, **kwargs):\n    return [share(c) for c in completions]\n"
    )
    script = "import reward_of_mine as m; from cppo.train import fingerprint as f;"
    script += "print(f.of_function(m.reward))"
    said = []
    for body in ("return 1.0", "return 2.0", "return 1.0"):
        (tmp_path / "helper_of_mine.py").write_text(f"def share(text):\n    {body}\n")
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", script]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        said.append(done.stdout)
    assert said[0] == said[2] != said[1]


def test_equal_arguments_are_the_same() -> None:
    pairs = [
        [functools.partial(boxed, unfinished_thought=x) for x in (-1, -1.0)],
        [functools.partial(scaled, units=set(x)) for x in (("a", "b", "c"), ("c", "a", "b"))],
        [Judge(1), Judge(1.0)],
    ]
    for first, second in pairs:
        assert fingerprint.of_function(first) == fingerprint.of_function(second)


def test_a_function_is_the_same_in_the_next_process(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "import functools, threading\n"
        "class Judge:\n"
        "    def __init__(self):\n"
        "        self.lock, self.names = threading.Lock(), {'b', 'a', 'c'}\n"
        "def reward(completions, judge, **kwargs):\n    return [0.0] * len(completions)\n"
        "made = functools.partial(reward, judge=Judge())\n"
    )
    script = (
        "import theirs; from cppo.train import fingerprint, scoring;"
        "print(fingerprint.of_function(theirs.made), scoring.metric_name(theirs.made),"
        "fingerprint.of_dataset([{'prompt': 'a', 'odd': theirs.Judge()}]))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    (words,) = said
    assert "reward(judge=Judge)" in words and " object at " not in words


def test_fingerprints_of_rows() -> None:
    values: list[Any] = [
        *("1", 1, 1.0, True, None, b"1", ["1"], ["1", "2"], ["12"], [["1"], "2"], {"a": "1"}),
        *(np.array([1, 2]), np.array([1.0, 2.0]), [1, 2], np.array([[1, 2]]), torch.ones(2)),
        *(torch.zeros(2), torch.ones(2).half(), torch.ones(2).bfloat16(), np.ones(2, "float32")),
        *(Decimal(4), Decimal(5), Decimal("4.0"), Fraction(4), datetime.date(2026, 1, 4)),
        *(datetime.date(2026, 1, 5), {4}, {5}, {4, 5}, np.float64(4), np.float32(4), np.int64(4)),
        *(image(24, 24, 1), image(24, 24, 2), Image.new("RGB", (2, 8)), Image.new("RGB", (8, 2))),
    ]
    rows: list[Any] = [{"prompt": "a", "answer": value} for value in values]
    rows += [{"prompt": "b", "answer": "1"}, {"prompt": [{"role": "user", "content": "a"}]}]
    marks = [fingerprint.of_dataset([row]) for row in rows]
    assert len(set(marks)) == len(marks)
    assert [fingerprint.of_dataset([copy.deepcopy(row)]) for row in rows] == marks


def test_every_row_counts() -> None:
    many = [{"prompt": str(i)} for i in range(3000)]
    whole = fingerprint.of_dataset(many)
    for place in range(0, len(many), 97):
        changed = list(many)
        changed[place] = {"prompt": "other"}
        assert fingerprint.of_dataset(changed) != whole
    # Of very many, or of those with pictures, some: the first and the last among them.
    pictures = [{"prompt": str(i), "images": []} for i in range(1000)]
    for place in (0, -1):
        changed = list(pictures)
        changed[place] = {"prompt": "other", "images": []}
        assert fingerprint.of_dataset(changed) != fingerprint.of_dataset(pictures)


def test_fingerprints_do_not_depend_on_addresses() -> None:
    @dataclasses.dataclass
    class Odd:
        value: torch.Tensor

    first, second = ([{"prompt": "a", "odd": Odd(torch.ones(1))}] for _ in range(2))
    assert fingerprint.of_dataset(first) == fingerprint.of_dataset(second)
