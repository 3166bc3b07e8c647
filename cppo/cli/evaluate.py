"""`cppo eval`: rewards of a run, a checkpoint or a model on held-out questions."""

from __future__ import annotations

import argparse
import csv
import inspect
import io
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cppo.cli.config_file import ConfigError, apply_overrides, build
from cppo.cli.run_config import BUILDERS, CONFIG_NAME, DatasetConfig, RunConfig, load
from cppo.options.places import is_place, load_object
from cppo.options.values import is_finite_number, unknown

if TYPE_CHECKING:
    from cppo.cli.measures import Measure, Verdicts

_COLUMNS = (
    *("model", "data", "split", "questions"),
    *("mode", "metric", "samples", "mean", "std", "stderr"),
)
# The rewards of `cppo eval MODEL --loader NAME`, where no configuration names any.
_REWARDS = {"gsm8k": "gsm8k_reward", "mathvista": "mathvista"}


def main(options: argparse.Namespace) -> int:
    """Measure greedy and sampled rewards on held-out questions: avg@N, pass@k and maj@N.

    The table is appended to a CSV file, and every completion is written to a file of JSON lines.
    docs/evaluation.md says what each number is.
    """
    from cppo.cli import measures
    from cppo.cli.engines import engine_words
    from cppo.cli.info import default_device, ops_line
    from cppo.cli.predictions import Predictions, default_name, fingerprint, part_of
    from cppo.cli.run_parts import evaluate_policy
    from cppo.train.sealed import CheckpointError

    try:
        config, checkpoint, folder = _target(options)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise ConfigError(f"{options.target:.100}: cannot be read ({error.strerror})") from error
    config = _with_samples(config, options.samples)
    data = getattr(config.data, options.data)
    if data is None:
        raise ConfigError(f"{options.target}: data.{options.data} is missing, nothing to measure")
    verdicts, functions = _verdicts(config, options)
    code = _files_of([*functions, *_makers(config, data)])
    ks = _ks(options.pass_k, config.trainer.eval_samples)
    path = Path(options.csv or folder / "eval.csv")
    _check_csv(path)
    name = str(checkpoint or config.model.path or config.model.builder)
    modes = {"sampled": config.trainer.eval_samples}
    modes |= {"greedy": 1} if config.trainer.eval_greedy else {}
    predictions = Predictions(
        Path(options.predictions or path.with_name(default_name(data))),
        name,
        modes,
        fingerprint(config, options.data, checkpoint, code),
        verdicts.reading,
    )
    device = default_device()
    print(ops_line(device))
    if config.trainer.engine != "builtin":
        print(f"rollouts: {engine_words(config.trainer)}")
    if predictions.resumed:
        print(f"{predictions.resumed} completions of an evaluation that did not end are taken over")
    result = evaluate_policy(config, checkpoint, options.data, device, predictions)
    rows = result.completions
    table = measures.means(rows, result.metrics)
    other = measures.unclear(rows, verdicts) if ks else None
    if other is None:
        table += measures.of_samples(rows, verdicts, ks)
    predictions.finish()
    count = len({row["question"] for row in rows})
    print(f"{name} on {count} questions")
    _show(table)
    if other is not None:
        print(
            f"no pass@k and maj@N: {verdicts.metric} gives {other:g} as well as 0 and 1; say with "
            "--right from which reward on an answer is right"
        )
    columns = {"model": name, "data": data.path or data.loader, "split": part_of(data)}
    _append_csv(path, [{**columns, "questions": count, **_cells(measure)} for measure in table])
    print(f"appended to {path}; predictions in {predictions.path}")
    return 0


def _with_samples(config: RunConfig, samples: int | None) -> RunConfig:
    if samples is None:
        return config
    try:
        return replace(config, trainer=replace(config.trainer, eval_samples=samples))
    except ValueError:
        raise ConfigError(f"--samples must be >= 1, got {samples}") from None


def _verdicts(config: RunConfig, options: argparse.Namespace) -> tuple[Verdicts, list[Any]]:
    """What says that a completion is right, and the reward functions."""
    from cppo.cli.measures import Verdicts
    from cppo.cli.run_parts import check_packages, in_keys, trainer_options
    from cppo.rewards.reading import reading_of
    from cppo.train.scoring import metric_name

    try:
        check_packages(config, training=False)
        functions, _ = trainer_options(config)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(in_keys(str(error))) from error
    named = {metric_name(function): function for function in functions}
    readings = {name: reading_of(function) for name, function in named.items()}
    metric = options.metric or next((n for n, reading in readings.items() if reading), [*named][0])
    if metric not in (*named, "reward"):
        raise ConfigError(f"--metric: {unknown('reward', metric, (*named, 'reward'))}")
    reading = readings.get(metric)
    right = options.right if options.right is not None else reading and reading.right
    if right is not None and not is_finite_number(right):
        raise ConfigError(f"--right must be a number, got {right}")
    return Verdicts(metric, right, reading), functions


def _makers(config: RunConfig, data: DatasetConfig) -> list[Any]:
    """The functions of the user's own that make the questions and the model."""
    found = []
    for place in filter(is_place, (data.loader, config.model.builder)):
        with suppress(ValueError, TypeError):  # said where it is called
            found.append(load_object(str(place), "function"))
    return found


def _files_of(functions: Sequence[Any]) -> list[str]:
    files = []
    for function in functions:
        try:
            files.append(inspect.getsourcefile(inspect.unwrap(getattr(function, "func", function))))
        except TypeError:  # an object
            files.append(inspect.getsourcefile(type(function)))
    return [file for file in files if file]


def _ks(given: str | None, samples: int) -> list[int]:
    """The k of pass@k: those given as "1,2,4", or powers of two, if there are several samples."""
    from cppo.train.estimators import powers_of_two

    if given is None:
        return powers_of_two(samples) if samples > 1 else []
    words = given.replace(",", " ").split()
    ks = sorted({int(word) for word in words if re.fullmatch("[0-9]{1,9}", word)})
    if len(ks) < len(set(words)) or not ks or ks[0] < 1 or ks[-1] > samples:
        raise ConfigError(
            "--pass-k must be whole numbers such as 1,2,4, from 1 to the samples per question = "
            f"{samples} (--samples), got {given!r}"
        )
    return ks


def _show(table: Sequence[Measure]) -> None:
    rewards = {row.metric for row in table if "@" not in row.metric} - {"reward", "tokens"}
    for row in table:
        if row.metric == "reward" and len(rewards) == 1:
            continue  # a weighted sum of one
        error = "" if row.error is None else f" +- {row.error:.4f}"
        spread = "" if row.std is None else f"  (std over the passes {row.std:.4f})"
        passes = f"avg@{row.samples}" if row.mode == "sampled" and "@" not in row.metric else ""
        print(f"  {row.mode:<8} {passes:<7} {row.metric:<24} {row.mean:.4f}{error}{spread}")
    if any(row.error is not None for row in table):
        print("+- is the standard error over the questions")


def _cells(measure: Measure) -> dict[str, object]:
    spreads = {"std": measure.std, "stderr": measure.error}
    return {
        "mode": measure.mode,
        "metric": measure.metric,
        "samples": measure.samples,
        "mean": f"{measure.mean:.4f}",
        **{name: "" if value is None else f"{value:.4f}" for name, value in spreads.items()},
    }


def _target(options: argparse.Namespace) -> tuple[RunConfig, Path | None, Path]:
    """The configuration, the checkpoint (None: the configured weights), the folder of the run.

    The folder is where the run is now, not its trainer.output_dir: it may have been moved.
    """
    from cppo.cli.run_parts import checkpoint_of

    target = Path(options.target)
    if options.loader is not None:
        return _of_model(options), None, Path.cwd()
    if options.path is not None or options.split is not None:
        raise ConfigError("--path and --split need --loader: they say what a model is measured on")
    if not target.exists():
        raise ConfigError(f"{target}: no such file or folder")
    if target.is_file():
        config = load(target, options.overrides)
        return config, None, Path(config.trainer.output_dir)
    if (target / CONFIG_NAME).is_file():
        run, checkpoint = target, checkpoint_of(target, options.checkpoint)
    else:
        run, checkpoint = target.resolve().parent, target
    if not (run / CONFIG_NAME).is_file():
        raise ConfigError(
            f"{target}: neither a run of `cppo train` nor a checkpoint in one (no {CONFIG_NAME}); "
            "for another model give --loader NAME --path FILE, or a configuration file and "
            "model.path=FOLDER"
        )
    return load(run / CONFIG_NAME, options.overrides), checkpoint, run


def _of_model(options: argparse.Namespace) -> RunConfig:
    """The configuration that the command line alone describes."""
    data = {"loader": options.loader, "path": options.path, "split": options.split}
    is_builder = options.target in BUILDERS or is_place(options.target)
    tree: dict[str, Any] = {
        "model": {"builder" if is_builder else "path": options.target},
        "data": {"train": data, "eval": dict(data)},
        "rewards": [_REWARDS.get(options.loader, "boxed")],
    }
    apply_overrides(tree, options.overrides)
    try:
        return build(RunConfig, tree)
    except ConfigError as error:
        words = str(error).replace("data.train.", "--")
        raise ConfigError(f"command line: {words}") from None


def _check_csv(path: Path) -> None:
    """Raise ConfigError for a file that cannot be written, or whose columns are others."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("a"):
            pass
        if is_new:
            path.unlink()  # the evaluation may still be refused
    except OSError as error:
        raise ConfigError(f"--csv: {path} cannot be written ({error.strerror})") from None
    if path.is_file() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            columns = next(csv.reader(file), [])
        if tuple(columns) != _COLUMNS:
            raise ConfigError(
                f"--csv: {path} has other columns than `cppo eval` writes: {columns}; give another "
                "file"
            )


def _append_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """Append all rows or none. Raises ConfigError where the file does not take them."""
    from cppo.train.progress import append_bytes

    before = path.read_bytes() if path.is_file() else b""  # a pipe has nothing to read
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS)
    if not before:
        writer.writeheader()
    elif not before.endswith((b"\n", b"\r")):  # an editor may leave the last line open
        text.write("\n")
    writer.writerows(rows)
    try:
        append_bytes(path, text.getvalue().encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise ConfigError(f"--csv: {path} cannot be written ({error.strerror})") from error
