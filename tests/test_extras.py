"""What needs an optional package or a tracker is refused before anything is loaded or measured."""

import sys
from pathlib import Path

import pytest
from cli_cases import DIGITS, cppo

from cppo.extras import require_package
from cppo.train.arguments import check_trackers

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def without(monkeypatch):
    """Takes a package away."""
    return lambda name: monkeypatch.setitem(sys.modules, name, None)


def test_a_missing_package_is_named_with_its_extra(without):
    require_package("--plot", "numpy", "bench")
    require_package("trainer.lora", "scikit-learn", "demo", module="json")
    words = r"trainer.lora needs the package no-such: pip install 'cppo\[peft\]'"
    with pytest.raises(ImportError, match=words):
        require_package("trainer.lora", "no-such", "peft")
    without("numpy")
    with pytest.raises(ImportError, match="needs the package numpy"):
        require_package("--plot", "numpy", "bench")


@pytest.mark.parametrize(
    ("option", "package", "words"),
    [
        ("trainer.lora.r=2", "peft", "error: trainer.lora needs the package peft: pip install"),
        ("trainer.engine=vllm", "vllm", "error: trainer.engine: vllm needs the package vllm: pip"),
        ("rewards=[math_verify]", "math_verify", "error: rewards: math_verify needs the package"),
        ("rewards=[{math_verify: null, weight: 2}]", "math_verify", "'cppo[math]'"),
        ("rewards=[boxed, math_reward]", "math_verify", "error: rewards: math_reward needs"),
        ("trainer.trackers=[wandb]", "wandb", "error: trainer.trackers: 'wandb' is not installed"),
    ],
)
def test_train_stops_before_it_loads_anything(option, package, words, without, monkeypatch, capsys):
    without(package)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    # Neither the data nor the model is there: the package is missed first.
    absent = ["model={path: no/such}", "data.train={loader: rows, path: no_such.jsonl}"]
    status, _, err = cppo(capsys, "train", DIGITS, option, *absent)
    assert status == 2 and words in err and len(err.splitlines()) == 1
    # A dry run needs no package; it says what a real one would miss.
    status, out, _ = cppo(capsys, "train", DIGITS, option, "--dry-run")
    assert status == 0 and "a real run would stop: " in out


@pytest.mark.parametrize(
    ("package", "path", "file"),
    [("pyarrow", "rows.parquet", "rows.parquet"), ("datasets", "saved", "saved/dataset_info.json")],
)
def test_data_that_need_a_package_are_met_before_the_model(package, path, file, without, capsys):
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).touch()
    without(package)
    given = [f"data.train={{loader: rows, path: {path}}}", "model={path: no/such}"]
    status, _, err = cppo(capsys, "train", DIGITS, *given)
    assert status == 2 and "cppo train: error: data.train: " in err
    assert "pip install 'cppo[data]'" in err


@pytest.mark.parametrize("last", [[], ["--dry-run"]], ids=str)
def test_an_unknown_tracker_stops_a_dry_run_too(last, capsys):
    status, _, err = cppo(capsys, "train", DIGITS, "trainer.trackers=[tensorbord]", *last)
    assert status == 2 and "trainer.trackers must be of aim, all, " in err
    assert "got 'tensorbord'; did you mean 'tensorboard'?" in err


def test_an_evaluation_needs_the_packages_of_its_rewards_and_its_engine(
    without, monkeypatch, capsys
):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    evaluate = ["eval", DIGITS, "data.eval.limit=1", "trainer.max_completion_tokens=2"]
    assert cppo(capsys, *evaluate, "trainer.trackers=[wandb]", "trainer.lora.r=2")[0] == 0
    without("vllm")
    status, _, err = cppo(capsys, *evaluate, "trainer.engine=vllm")
    assert status == 2 and "pip install 'cppo[vllm]'" in err
    without("math_verify")
    status, _, err = cppo(capsys, *evaluate, "rewards=[math_verify]")
    assert status == 2 and "needs the package math-verify" in err


@pytest.mark.parametrize(
    ("installed", "names", "error", "words"),
    [
        ([], [], None, ""),
        ([], ["wandb"], ImportError, "'wandb' is not installed: pip install wandb$"),
        ([], ["comet_ml"], ImportError, "pip install comet-ml$"),
        ([], ["tensorboard"], ImportError, r"pip install 'cppo\[tracking\]'$"),
        ([], ["all"], ImportError, "'all' finds no tracker"),
        (["wandb"], ["all"], None, ""),
        (["wandb"], ["wandb"], None, ""),
        (["wandb"], ["wandb", "tensorboard"], ImportError, "'tensorboard' is not installed"),
        (["wandb"], ["wanb"], ValueError, "got 'wanb'; did you mean 'wandb'"),
        (["wandb"], ["WandB"], ValueError, "got 'WandB'; did you mean 'wandb'"),
        (["wandb"], ["none"], ValueError, "got 'none'$"),
        (["wandb"], [3], ValueError, "CPPOConfig.trackers must be of .*, got 3$"),
    ],
)
def test_trackers(installed, names, error, words, monkeypatch):
    tracking = pytest.importorskip("accelerate.tracking")
    kinds = [tracking.LoggerType(name) for name in installed]
    monkeypatch.setattr(tracking, "_available_trackers", kinds)
    if error is None:
        return check_trackers(names)
    with pytest.raises(error, match=words):
        check_trackers(names)


def test_a_tracker_of_ones_own(monkeypatch):
    tracking = pytest.importorskip("accelerate.tracking")

    class Mine(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "mine", False, None

        def __init__(self):
            pass

    with pytest.raises(ValueError, match="got 'mine'"):
        check_trackers(["mine"])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mine", Mine)
    check_trackers(["mine", Mine()])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--plot"], "--plot needs the package matplotlib: pip install 'cppo[bench]'"),
        (["--plot-only"], "--plot needs the package matplotlib: pip install 'cppo[bench]'"),
        (["--compare", "absent.csv"], "--compare: there is no file absent.csv"),
        (["--compare", "table.csv"], "table.csv is no file of `cppo bench`: no column op, shape"),
        (["--output", "table.csv"], "table.csv is no file of `cppo bench`: no column op, shape"),
    ],
)
def test_bench_stops_before_it_measures_anything(options, words, without, monkeypatch, capsys):
    without("matplotlib")
    monkeypatch.setattr("cppo.benchmarks.run.bench", lambda *_: pytest.fail("it was measured"))
    Path("table.csv").write_text("name,backend\na,b\n")
    status, _, err = cppo(capsys, "bench", "--shapes", "toy", *options)
    assert status == 2 and f"cppo bench: error: {words}" in err
    assert Path("table.csv").read_text() == "name,backend\na,b\n"
