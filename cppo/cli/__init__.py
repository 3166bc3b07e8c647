"""The command line: `cppo train`, `cppo eval`, `cppo info`, `cppo demo`, `cppo bench`.

A mistake in a configuration or in data is one line on stderr and exit status 2; CPPO_DEBUG=1 shows
where it was raised. transformers is imported only once there is something to run.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cppo.cli import run_config
from cppo.cli.config_file import ConfigError

if TYPE_CHECKING:
    from cppo.cli.run_config import RunConfig

_CONFIG_NAME = "config.yaml"
_EVAL_COLUMNS = (
    *("model", "data", "split", "questions"),
    *("mode", "metric", "samples", "mean", "std"),
)
_FORWARDED = {
    "info": "which backend of each op runs here, and why another does not",
    "bench": "measure every op against the peers that are installed and the machine's limits",
    "demo": "train a tiny vision-language model on handwritten digits, with a report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for a mistake of the user, 130 for Ctrl-C.

    Args:
        argv: the arguments without the program's name. None: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else ""
    try:
        return _run(command, arguments)
    except ConfigError as error:
        if os.environ.get("CPPO_DEBUG") == "1":
            raise
        print(f"cppo {command}: error: {str(error).removeprefix('cppo: ')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        words = f"; {error}" if str(error) else ""
        print(f"\ncppo {command}: interrupted{words}", file=sys.stderr)
        return 130


def _run(command: str, arguments: list[str]) -> int:
    if command == "info":
        from cppo.cli import info

        return info.main(arguments[1:]) or 0
    if command == "demo":
        from cppo.demo import run

        return run.main(arguments[1:])
    if command == "bench":
        from cppo.cli import bench

        return bench.main(arguments[1:])
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    # argparse takes positionals in one stretch only: overrides may also stand behind an option
    options.overrides += [word for word in rest if not word.startswith("-")]
    if unknown := [word for word in rest if word.startswith("-")]:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cppo", description="Completion pruning and contrastive perception for RL finetuning."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    train = commands.add_parser("train", help="train from a YAML file", description=_train.__doc__)
    train.add_argument("config", metavar="CONFIG.yaml")
    train.add_argument("--dry-run", action="store_true", help="print what it would take and stop")
    train.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from a checkpoint; without a folder from the newest in trainer.output_dir",
    )
    train.add_argument(
        "--overwrite", action="store_true", help="remove the run that trainer.output_dir holds"
    )
    evaluate = commands.add_parser(
        "eval", help="accuracy of a run, a checkpoint or a model", description=_evaluate.__doc__
    )
    evaluate.add_argument("target", metavar="RUN|CHECKPOINT|CONFIG.yaml")
    evaluate.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of a run")
    evaluate.add_argument("--samples", type=int, metavar="N", help="completions per question")
    evaluate.add_argument("--data", choices=("eval", "train"), default="eval")
    evaluate.add_argument("--csv", metavar="FILE", help="append here (eval.csv beside the run)")
    for command, run in ((train, _train), (evaluate, _evaluate)):
        command.add_argument("overrides", nargs="*", metavar="key=value", default=[])
        command.set_defaults(run=run, parser=command)
    for name, text in _FORWARDED.items():
        commands.add_parser(name, help=text)
    return parser


def _train(options: argparse.Namespace) -> int:
    """Train the model of a configuration file; key=value sets single options over it."""
    resume, overrides = options.resume, list(options.overrides)
    if resume and "=" in resume:  # `--resume key=value`: the word is an override, not a folder
        resume, overrides = "auto", [*overrides, resume]
    config = run_config.load(options.config, overrides)
    if options.dry_run:
        from cppo.cli import dry_run

        print(dry_run.report(config))
        return 0
    from cppo.cli.info import ops_line
    from cppo.cli.run_parts import make_trainer
    from cppo.train.checkpoint import last_checkpoint
    from cppo.train.output_dir import claim_output_dir
    from cppo.train.processes import ProcessError
    from cppo.train.scoring import RewardError

    output_dir = Path(config.trainer.output_dir)
    try:
        claim = claim_output_dir(
            output_dir,
            resume,
            overwrite=options.overwrite,
            needed=[config.model.path] if config.model.path else [],
            writes_config=True,
            ways="go on with --resume, start anew with --overwrite, or choose another "
            "trainer.output_dir",
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    trainer = make_trainer(config)
    trainer.files[_CONFIG_NAME] = run_config.dump(config)
    if trainer.processes.rank == 0:
        print(ops_line(trainer.accelerator.device))
    try:
        trainer.train(resume_from=claim.start, overwrite=options.overwrite)
    except KeyboardInterrupt as stopped:
        words = str(stopped) or f"the newest checkpoint is {last_checkpoint(output_dir) or 'none'}"
        raise KeyboardInterrupt(f"{words}; go on with --resume") from None
    except (FloatingPointError, ProcessError, RewardError, ValueError, TypeError) as error:
        if not str(error).startswith("cppo"):
            raise  # not one of our checks: a defect, whose traceback is wanted
        newest = last_checkpoint(output_dir)
        raise ConfigError(f"{error}\n  last checkpoint: {newest or 'none'}") from error
    if trainer.processes.rank == 0:
        print(f"written to {output_dir}; next: cppo eval {output_dir}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    """Measure greedy and sampled rewards on held-out questions, and append them to a CSV file."""
    from dataclasses import replace

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
    data = getattr(config.data, options.data)
    if data is None:
        raise ConfigError(f"{options.target}: data.{options.data} is missing, nothing to measure")
    name = str(checkpoint or config.model.path or config.model.builder)
    path = Path(options.csv or folder / "eval.csv")
    _check_csv(path)
    device = default_device()
    print(ops_line(device))
    metrics, num_questions = evaluate_policy(config, checkpoint, options.data, device)
    rows = [
        {
            "model": name,
            "data": data.path or data.loader,
            "split": data.split or "",
            "questions": num_questions,
            "mode": mode,
            "metric": metric,
            "samples": config.trainer.eval_samples if mode == "sampled" else 1,
            "mean": f"{value:.4f}",
            "std": f"{std:.4f}" if (std := metrics.get(f"{mode}/{metric}_std")) is not None else "",
        }
        for mode, metric, value in (
            (*key.split("/", 1), value)
            for key, value in metrics.items()
            if not key.endswith("_std")
        )
    ]
    print(f"{name} on {num_questions} questions")
    for row in rows:
        spread = f" +- {row['std']}" if row["std"] else ""
        passes = f"avg@{row['samples']}" if row["mode"] == "sampled" else ""
        print(f"  {row['mode']:<8} {passes:<7} {row['metric']:<24} {row['mean']}{spread}")
    _append_csv(path, rows)
    print(f"appended to {path}")
    return 0


def _target(options: argparse.Namespace) -> tuple[RunConfig, Path | None, Path]:
    """The configuration, the checkpoint (None: the configured weights), the folder of the run.

    A run may have been moved since: its folder is where it is, not its trainer.output_dir.
    """
    from cppo.train.checkpoint import best_checkpoint, last_checkpoint

    target = Path(options.target)
    if not target.exists():
        raise ConfigError(f"{target}: no such file or folder")
    if target.is_file():
        config = run_config.load(target, options.overrides)
        return config, None, Path(config.trainer.output_dir)
    if (target / _CONFIG_NAME).is_file():
        run, checkpoint = target, last_checkpoint(target)
        if options.checkpoint == "best":
            checkpoint = best_checkpoint(target) or checkpoint
        if checkpoint is None:
            raise ConfigError(f"{target}: this run has not written a checkpoint yet")
    else:
        run, checkpoint = target.resolve().parent, target
    if not (run / _CONFIG_NAME).is_file():
        raise ConfigError(
            f"{target}: neither a run of `cppo train` nor a checkpoint in one (no {_CONFIG_NAME}); "
            "for another model give a configuration file and model.path=FOLDER"
        )
    return run_config.load(run / _CONFIG_NAME, options.overrides), checkpoint, run


def _check_csv(path: Path) -> None:
    """Rows are appended: to a file of other columns they would be nonsense."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise ConfigError(f"--csv: {path} cannot be written ({error.strerror})") from None
    if path.is_file() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            columns = next(csv.reader(file), [])
        if tuple(columns) != _EVAL_COLUMNS:
            raise ConfigError(f"--csv: {path} has other columns than `cppo eval` writes: {columns}")


def _append_csv(path: Path, rows: list[dict[str, object]]) -> None:
    is_new = path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _EVAL_COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
