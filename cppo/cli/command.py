"""Which command of `cppo` runs, with which arguments, and how its errors are shown.

A mistake in a configuration or in data is one line on stderr and exit status 2; CPPO_DEBUG=1 shows
where it was raised. transformers is imported only once there is something to run.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

import cppo
from cppo.cli import evaluate, train
from cppo.cli.config_file import ConfigError
from cppo.options import foreign_names

_TRAIN_EXAMPLES = """examples:
  cppo init my_data.yaml --data my.jsonl        # a recipe for your own data
  cppo train my_data.yaml --dry-run             # what it would take
  cppo train my_data.yaml trainer.group_size=16 trainer.loss.kl_coef=0.01
  cppo train my_data.yaml --resume              # go on after a stop

keys of CONFIG.yaml, each of which key=value sets (default; or the type, where that is null or the
key must be given). `cppo keys trainer.loss` says what they mean, docs/options.md has them all."""
_EVAL_EXAMPLES = """examples:
  cppo eval runs/my_data                        # the best checkpoint of a run
  cppo eval runs/my_data --checkpoint last --samples 8
  cppo eval my_data.yaml                        # the model before training"""
# Commands with a module of their name, which is imported when it runs.
_FORWARDED = {
    "init": "write a commented recipe for your own data, and a reward",
    "keys": "every key of a configuration file, with what it means",
    "info": "which backend of each op runs here, and why another does not",
    "bench": "measure every op against the peers that are installed and the machine's limits",
    "inspect": "show which tokens of a model's answer depend on an image",
    "report": "make the page of a run anew, or compare runs side by side",
    "data": "write a data set as the parquet file that verl trains on",
    "demo": "train a tiny vision-language model on handwritten digits, with a report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for a mistake of the user, 130 for Ctrl-C.

    Args:
        argv: the arguments without the program's name. None: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else ""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Questions may hold what the terminal cannot show, which must not end a run.
        sys.stdout.reconfigure(errors="backslashreplace")
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
    if command in _FORWARDED:
        forwarded: int = importlib.import_module(f"cppo.cli.{command}").main(arguments[1:])
        return forwarded
    parser = _parser(command)
    options, rest = parser.parse_known_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    # argparse takes positionals in one stretch only: overrides may also stand behind an option
    options.overrides += [word for word in rest if not word.startswith("-")]
    if unknown := [word for word in rest if word.startswith("-")]:
        hint = "; keys are set as key=value" if options.command in ("train", "eval") else ""
        name, _, value = unknown[0].lstrip("-").replace("-", "_").partition("=")
        if answer := foreign_names.answer(name, value):
            hint += f", and {name}: {answer[1]}"
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return options.run(options)


def _parser(command: str = "") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cppo", description="Completion pruning and contrastive perception for RL finetuning."
    )
    parser.add_argument("--version", action="version", version=f"cppo {cppo.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    as_written = argparse.RawDescriptionHelpFormatter
    _add_train_options(
        commands.add_parser(
            "train",
            help="train from a YAML file",
            description=train.main.__doc__,
            epilog=_train_epilog() if command == "train" else None,
            formatter_class=as_written,
        )
    )
    _add_eval_options(
        commands.add_parser(
            "eval",
            help="accuracy of a run, a checkpoint or a model",
            description=evaluate.main.__doc__,
            epilog=_EVAL_EXAMPLES,
            formatter_class=as_written,
        )
    )
    for name, text in _FORWARDED.items():
        commands.add_parser(name, help=text)
    return parser


def _train_epilog() -> str:
    from cppo.cli import keys

    return f"{_TRAIN_EXAMPLES}\n\n{keys.summary()}"


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the recipe; `cppo init` writes one")
    parser.add_argument("--dry-run", action="store_true", help="print what it would take and stop")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from a checkpoint; without a folder from the newest in trainer.output_dir",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="remove the run that trainer.output_dir holds"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", default=[], help="a key set over the file"
    )
    parser.set_defaults(run=train.main, parser=parser)


def _add_eval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="RUN|CHECKPOINT|CONFIG.yaml|MODEL",
        help="folder of a run or of a checkpoint in it; a recipe, for the model before training; "
        "any model, with --loader",
    )
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of a run")
    parser.add_argument("--samples", type=int, metavar="N", help="completions per question")
    parser.add_argument(
        "--data", choices=("eval", "train"), default="eval", help="which questions (eval)"
    )
    of_model = parser.add_argument_group("a MODEL (folder or hub name) without a configuration")
    of_model.add_argument(
        "--loader", metavar="NAME", help="data set: math500, mathvista, rows, ..."
    )
    of_model.add_argument("--path", metavar="FILE", help="its file or folder")
    of_model.add_argument("--split", metavar="NAME", help="its split")
    parser.add_argument("--metric", metavar="NAME", help="reward that says what is right")
    parser.add_argument("--right", type=float, metavar="R", help="right from this reward on")
    parser.add_argument("--pass-k", metavar="K,...", help="of pass@k (1,2,4,... up to N)")
    parser.add_argument("--csv", metavar="FILE", help="append here (eval.csv beside the run)")
    parser.add_argument("--predictions", metavar="FILE", help="JSON lines (beside the CSV file)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", default=[], help="a key set over the run's"
    )
    parser.set_defaults(run=evaluate.main, parser=parser)
