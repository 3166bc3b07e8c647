"""The user's own functions by their place: files, modules, what shadows what, every mistake."""

import importlib
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import DIGITS, cppo

from cppo.cli import run_config, run_parts
from cppo.cli.datasets import load_questions
from cppo.options import places
from cppo.rewards import from_names

REWARD = "def right(completions, **columns):\n    return [1.0 for _ in completions]\n"


@pytest.fixture(autouse=True)
def _work(tmp_path, monkeypatch):
    """A working directory of its own; what a test imports is forgotten after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "_FILES", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(name, text=REWARD):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("place", ["own_reward.py", "./own_reward.py", "own_reward", "{here}.py"])
def test_a_function_of_a_file_or_a_module_in_the_working_directory(place, tmp_path):
    write("own_reward.py")
    ((function,), (weight,)) = from_names(
        [f"{place.replace('{here}', str(tmp_path / 'own_reward'))}:right"]
    )
    assert function(["a", "b"], prompts=["", ""]) == [1.0, 1.0] and weight == 1.0
    # What a checkpoint remembers of it does not depend on where the file lies.
    assert (function.__module__, function.__qualname__) == ("own_reward", "right")


def test_a_file_in_a_folder_sees_its_neighbours_and_the_working_directory():
    write("rewards_of_mine/beside.py", "ONE = 1.0\n")
    write("in_cwd.py", "TWO = 2.0\n")
    text = "from beside import ONE\nfrom in_cwd import TWO\ndef both(completions, **_):\n"
    write("rewards_of_mine/main_reward.py", text + "    return [ONE + TWO for _ in completions]\n")
    function = places.load_object("rewards_of_mine/main_reward.py:both", "reward")
    assert function(["x"]) == [3.0] and function.__module__ == "main_reward"


def test_a_package_in_the_working_directory():
    write("own_package/__init__.py", "")
    write("own_package/deep/__init__.py", "")
    write("own_package/deep/rewards.py", "class Of:\n    @staticmethod\n    def one(c): return c\n")
    found = places.load_object("own_package.deep.rewards:Of.one", "reward")
    assert found(3) == 3


@pytest.mark.parametrize("first", ["counted.py:a", "counted:a"])
def test_one_file_is_one_module_however_it_is_named(first, tmp_path):
    write("counted.py", "RUNS = []\nRUNS.append(1)\ndef a(): return RUNS\ndef b(): return RUNS\n")
    (tmp_path / "link.py").symlink_to("counted.py")
    names = [first, "counted.py:a", "./counted.py:b", f"{tmp_path}/counted.py:a", "counted:b"]
    runs = [places.load_object(name, "reward")() for name in [*names, "link.py:a"]]
    assert all(found is runs[0] for found in runs) and runs[0] == [1]


@pytest.mark.parametrize("name", ["math", "json", "datasets", "numpy", "wave", "sys"])
def test_a_file_named_like_a_real_module_shadows_nothing(name):
    real = importlib.import_module(name)
    write(f"{name}.py", REWARD + "import json, math, wave\nassert math.pi and json.loads\n")
    function = places.load_object(f"{name}.py:right", "reward")
    assert function(["x"]) == [1.0]
    assert sys.modules[name] is real and importlib.import_module(name) is real
    assert function.__module__ == f"{name}_2" and sys.modules[f"{name}_2"].right is function


def test_two_files_of_one_name_are_two_modules():
    for folder in ("first", "second"):
        write(f"{folder}/same_name.py", f"def f(): return {folder!r}\n")
    one, two = (places.load_object(f"{d}/same_name.py:f", "x") for d in ("first", "second"))
    assert (one(), two()) == ("first", "second")
    assert (one.__module__, two.__module__) == ("same_name", "same_name_2")


def test_dataclasses_and_pickle_work_inside():
    text = (
        "from __future__ import annotations\nimport dataclasses\n"
        "@dataclasses.dataclass\nclass Half:\n    scale: float = 0.5\n"
        "    def __call__(self, completions, **columns):\n"
        "        return [self.scale for _ in completions]\nhalf = Half()\n"
    )
    write("with-dataclass.py", text)
    ((function,), _) = from_names(["with-dataclass.py:half"])
    assert function(["x"]) == [0.5]
    again = pickle.loads(pickle.dumps(function))
    assert again == function and type(again) is type(function)


def test_a_child_process_finds_the_function_again():
    """As a loader's worker processes do, which get the path and a pickle."""
    write("for_children.py")
    function = places.load_object("for_children.py:right", "reward")
    code = f"import sys, pickle; sys.path[:] = {sys.path!r}\n"
    code += f"print(pickle.loads({pickle.dumps(function)!r})(['x']))"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.stdout.strip() == "[1.0]", done.stderr


MISTAKES = {
    "zzz.py:f": "there is no file .*/zzz.py$",
    "own_rewrd.py:right": "there is no file .*/own_rewrd.py; did you mean 'own_reward.py'",
    "no/folder/x.py:f": "there is no file .*/no/folder/x.py",
    ".:f": "must be FILE.py:NAME or package.module:NAME$",
    "./own_reward:f": "must be FILE.py:NAME .*; for the file write ./own_reward.py:NAME",
    "own_reward.py:rigth": ".*/own_reward.py has no 'rigth'; did you mean 'right'",
    "own_reward.py:right.more": "right has no 'more'",
    "own_reward.py:": "must be FILE.py:NAME or package.module:NAME",
    ":right": "must be FILE.py:NAME or package.module:NAME",
    "own_reward.py": "must be FILE.py:NAME or package.module:NAME",
    "no_such:f": "there is no module 'no_such', neither installed nor in the working directory /",
    "own_package.no_such:f": "there is no module 'own_package'",
    "json.no_such:f": "there is no module 'json.no_such'",
    "folder/nested:f": r"no module 'folder/nested'.*; for the file write folder/nested.py:NAME",
    "json:right": r"has no 'right'; for the file write json.py:NAME",
    "syntax.py:f": r"syntax.py, line 2: (expected|invalid)",
    "syntax:f": r"syntax.py, line 2: (expected|invalid)",
    "raises.py:f": r"raises.py, line 3: KeyError: 'no_such_key'",
    "raises:f": r"raises.py, line 3: KeyError: 'no_such_key'",
    "needs.py:f": r"needs.py, line 1: ModuleNotFoundError: No module named 'not_installed_at_all'",
    "needs:f": r"needs.py, line 1: ModuleNotFoundError: No module named 'not_installed_at_all'",
    "exits.py:f": r"exits.py, line 2: SystemExit: 3",
    "latin.py:f": r"latin.py, line \d+: ",
}


@pytest.mark.parametrize(("place", "words"), MISTAKES.items(), ids=list(MISTAKES))
def test_mistakes_name_the_place_and_the_line(place, words):
    write("own_reward.py")
    write("json.py")
    write("folder/nested.py")
    write("syntax.py", "x = 1\ndef f(:\n")
    write("raises.py", "def look(d):\n    # no such key\n    return d['no_such_key']\nlook({})\n")
    write("needs.py", "import not_installed_at_all\n")
    write("exits.py", "import sys\nsys.exit(3)\n")
    Path("latin.py").write_bytes(b"NAME = '\xe9t\xe9'\n")
    name = place.replace("[", r"\[")
    with pytest.raises(ValueError, match=f"cannot import the reward '{name}': .*{words}"):
        places.load_object(place, "reward")
    assert not [m for m in sys.modules if m.startswith(("syntax", "raises", "needs", "exits"))]


def test_what_is_no_function_is_refused():
    write("values.py", "RATE = 0.5\nclass Reward:\n    pass\n")
    with pytest.raises(TypeError, match="the reward 'values.py:RATE' must be a function, got 0.5"):
        places.load_object("values.py:RATE", "reward")
    with pytest.raises(TypeError, match="got the class Reward: name an instance of it"):
        from_names(["values.py:Reward"])


def test_a_file_that_was_wrong_can_be_loaded_once_it_is_right():
    write("mended.py", "raise ValueError('not yet')\n")
    with pytest.raises(ValueError, match="line 1: ValueError: not yet"):
        places.load_object("mended.py:right", "reward")
    write("mended.py", REWARD)
    assert places.load_object("mended.py:right", "reward")(["x"]) == [1.0]


# In a configuration

OWN = """
from cppo.demo.digits import DigitSums
from cppo.demo.tiny import build_tiny_vlm

def reward(completions, **columns):
    return [float(len(text[0]["content"]) % 3) for text in completions]

def load(path=None, split="train"):
    rows = DigitSums(split, 6)
    assert path in (None, "some/folder")
    return [rows[i] for i in range(len(rows))]

def build():
    return build_tiny_vlm(seed=3, size="test")

def no_pair():
    return build()[0]

def generate(path=None, split=None):
    yield from load()

def named(path=None, split=None):
    return {"train": load()}

def nothing(path=None, split=None):
    return []

def strict(path, split):
    return load(path, split)
"""
RUN = [
    "rewards=['own.py:reward']",
    "model={builder: 'own.py:build'}",
    "data.train={loader: 'own.py:load', limit: 4}",
    "data.eval={loader: 'own.py:load', limit: 4, split: heldout}",
    *"trainer.max_steps=1 trainer.batch_size=2 trainer.group_size=4 trainer.prune_rate=0.5".split(),
    *"trainer.max_completion_tokens=4 trainer.warmup_steps=0 trainer.eval_greedy=false".split(),
    "trainer.output_dir=run",
]


@pytest.fixture
def run(capsys):
    """Trains with the user's own functions: the status, stdout and stderr."""
    write("own.py", OWN)
    return lambda *more: cppo(capsys, "train", DIGITS, *RUN, *more)


def test_reward_loader_and_builder_of_ones_own(run, capsys):
    assert run()[0] == 0
    status, out, _ = cppo(capsys, "eval", "run")
    assert status == 0 and "sampled  avg@1   reward" in out
    further = ["train", "run/config.yaml", "trainer.max_steps=2", "--resume"]
    status, out, _ = cppo(capsys, *further)
    assert status == 0 and "resumed from run/checkpoint-000001" in out
    # The evaluation is of the checkpoint, not of what the builder makes anew.
    config = run_config.load("run/config.yaml")
    loaded, _ = run_parts.load_policy(config.model, "run/checkpoint-000002")
    built, _ = run_parts.load_policy(config.model)
    pairs = zip(loaded.parameters(), built.parameters(), strict=True)
    assert any(not one.equal(other) for one, other in pairs) and type(loaded) is type(built)


def test_adapters_go_onto_the_model_of_ones_own(run, capsys):
    pytest.importorskip("peft")
    assert run("trainer.lora.r=2")[0] == 0
    status, out, _ = cppo(capsys, "eval", "run")
    assert status == 0 and "checkpoint-000001 on 4 questions" in out


def test_a_dry_run_does_not_build_the_model(run):
    write("own.py", OWN + "def build():\n    raise SystemExit('the model was built')\n")
    status, out, _ = run("--dry-run")
    assert status == 0
    assert "train: 4 questions (own.py:load, generated)" in out and "first question:" in out
    assert "sizes unknown, no memory estimate: a dry run does not call own.py:build" in out


@pytest.mark.parametrize(
    ("path", "split", "given"),
    [
        (None, None, ()),
        ("some/folder", None, ("some/folder",)),
        (None, "heldout", (None, "heldout")),
        ("some/folder", "heldout", ("some/folder", "heldout")),
    ],
)
def test_a_loader_is_called_with_what_is_given(path, split, given, monkeypatch):
    write("own.py", OWN)
    seen = []
    module = sys.modules[places.load_object("own.py:load", "loader").__module__]
    monkeypatch.setattr(module, "load", lambda *words: seen.append(words) or [{"prompt": "?"}])
    data = run_config.DatasetConfig("own.py:load", path, split)
    assert len(load_questions(data, None, "data.train")) == 1
    assert seen == [given]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rewards=['own.py:rewrd']", "command line: rewards: .*did you mean 'reward'"),
        ("data.train.loader=own.py:lod", "data.train.loader: cannot import the loader .*'load'"),
        ("data.eval.loader=absent.py:load", "data.eval.loader: cannot import .*there is no file"),
        ("model={builder: 'own.py:bild'}", "model.builder: cannot import the builder .*'build'"),
        ("data.train.loader=own.py", "data.train.loader: .*must be FILE.py:NAME or package"),
        ("data.train.loader=own", "data.train.loader must be one of .*place such as 'my_loader"),
        ("model={builder: own}", "model.builder must be one of .*place such as 'my_model.py:bui"),
        ("model={builder: 'own.py:no_pair'}", r"no_pair must return \(model, processor\), got"),
        ("data.train.loader=own.py:generate", "data.train: .*with len.. and .i., .*generator"),
        ("data.train.loader=own.py:named", "data.train: own.py:named must return rows .*dict"),
        ("data.train.loader=own.py:nothing", "data.train: own.py:nothing returned no rows"),
        ("data.train.loader=own.py:strict", "data.train: strict.. missing .*'path' and 'split'"),
    ],
)
def test_mistakes_in_a_configuration_are_one_line(override, words, run):
    status, _, err = run("data.train.split=null", override)
    (error,) = err.strip().splitlines()
    assert status == 2 and re.search(words, error)
