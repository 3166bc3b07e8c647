"""`cppo eval`: rewards of a run, a checkpoint or a model on held-out questions."""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

from cppo.cli.config_file import ConfigError
from cppo.cli.run_config import CONFIG_NAME, RunConfig, load

_COLUMNS = (
    *("model", "data", "split", "questions"),
    *("mode", "metric", "samples", "mean", "std"),
)


def main(options: argparse.Namespace) -> int:
    """Measure greedy and sampled rewards on held-out questions, and append them to a CSV file."""
    from cppo.cli.engines import engine_words
    from cppo.cli.info import default_device, ops_line
    from cppo.cli.run_parts import evaluate_policy
    from cppo.train.checkpoint import CheckpointError

    try:
        config, checkpoint, folder = _target(options)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise ConfigError(f"{options.target:.100}: cannot be read ({error.strerror})") from error
    if options.samples is not None:
        try:
            config = replace(config, trainer=replace(config.trainer, eval_samples=options.samples))
        except ValueError:
            raise ConfigError(f"--samples must be >= 1, got {options.samples}") from None
    if getattr(config.data, options.data) is None:
        raise ConfigError(f"{options.target}: data.{options.data} is missing, nothing to measure")
    path = Path(options.csv or folder / "eval.csv")
    _check_csv(path)
    device = default_device()
    print(ops_line(device))
    if config.trainer.engine != "builtin":
        print(f"rollouts: {engine_words(config.trainer)}")
    metrics, num_questions = evaluate_policy(config, checkpoint, options.data, device)
    name = str(checkpoint or config.model.path or config.model.builder)
    rows = _rows(metrics, config, options.data, model=name, questions=num_questions)
    print(f"{name} on {num_questions} questions")
    for row in rows:
        spread = f" +- {row['std']}" if row["std"] else ""
        passes = f"avg@{row['samples']}" if row["mode"] == "sampled" else ""
        print(f"  {row['mode']:<8} {passes:<7} {row['metric']:<24} {row['mean']}{spread}")
    _append_csv(path, rows)
    print(f"appended to {path}")
    return 0


def _rows(
    metrics: dict[str, float], config: RunConfig, dataset: str, **columns: object
) -> list[dict[str, object]]:
    """A row of the CSV file for each metric "mode/reward"; "mode/reward_std" is its spread."""
    data, rows = getattr(config.data, dataset), []
    for key, value in metrics.items():
        if key.endswith("_std"):
            continue
        mode, metric = key.split("/", 1)
        std = metrics.get(f"{key}_std")
        row = columns | {
            "data": data.path or data.loader,
            "split": data.split or "",
            "mode": mode,
            "metric": metric,
            "samples": config.trainer.eval_samples if mode == "sampled" else 1,
            "mean": f"{value:.4f}",
            "std": "" if std is None else f"{std:.4f}",
        }
        rows.append(row)
    return rows


def _target(options: argparse.Namespace) -> tuple[RunConfig, Path | None, Path]:
    """The configuration, the checkpoint (None: the configured weights), the folder of the run.

    The folder is where the run is now, not its trainer.output_dir: it may have been moved.
    """
    from cppo.train.checkpoint import best_checkpoint, last_checkpoint

    target = Path(options.target)
    if not target.exists():
        raise ConfigError(f"{target}: no such file or folder")
    if target.is_file():
        config = load(target, options.overrides)
        return config, None, Path(config.trainer.output_dir)
    if (target / CONFIG_NAME).is_file():
        run, checkpoint = target, last_checkpoint(target)
        if options.checkpoint == "best":
            checkpoint = best_checkpoint(target) or checkpoint
        if checkpoint is None:
            raise ConfigError(f"{target}: this run has not written a checkpoint yet")
    else:
        run, checkpoint = target.resolve().parent, target
    if not (run / CONFIG_NAME).is_file():
        raise ConfigError(
            f"{target}: neither a run of `cppo train` nor a checkpoint in one (no {CONFIG_NAME}); "
            "for another model give a configuration file and model.path=FOLDER"
        )
    return load(run / CONFIG_NAME, options.overrides), checkpoint, run


def _check_csv(path: Path) -> None:
    """Raise ConfigError for a file that cannot be written, or whose columns are others."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise ConfigError(f"--csv: {path} cannot be written ({error.strerror})") from None
    if path.is_file() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            columns = next(csv.reader(file), [])
        if tuple(columns) != _COLUMNS:
            raise ConfigError(f"--csv: {path} has other columns than `cppo eval` writes: {columns}")


def _append_csv(path: Path, rows: list[dict[str, object]]) -> None:
    is_new = path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
