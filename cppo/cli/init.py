"""`cppo init`: a commented recipe for one's own data, and a reward to start from."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from cppo.cli.config_file import ConfigError
from cppo.cli.own_data import Findings, look_at
from cppo.cli.run_config import BUILDERS
from cppo.cli.strict_yaml import scalar

_FOLDER = Path(__file__).parent
_EXAMPLE = Findings(path="my.jsonl")  # what the recipe shows without a file


def main(argv: Sequence[str] | None = None) -> int:
    """Write a recipe for your own data, with comments; --data fills in what your rows tell."""
    arguments = _parser().parse_args(argv)
    recipe = Path(arguments.recipe)
    reward = None if arguments.reward is None else Path(arguments.reward)
    _check_output(recipe, (".yaml", ".yml"), arguments.overwrite)
    if reward is not None:
        _check_output(reward, (".py",), arguments.overwrite)
    keys = {key: getattr(arguments, key) for key in ("prompt_key", "answer_key", "images_key")}
    found = _EXAMPLE._replace(**keys)
    if arguments.data is not None:
        try:
            found = look_at(arguments.data, arguments.eval_data, keys, needs_answer=reward is None)
        except (ValueError, OSError, ImportError) as error:
            raise ConfigError(str(error).replace("cppo.load_rows", "--data")) from error
    elif arguments.eval_data is not None:
        raise ConfigError("--eval-data needs --data, the questions to train on")
    files = {recipe: recipe_text(found, recipe, arguments.model, reward)}
    if reward is not None:
        files[reward] = (_FOLDER / "own_reward.py").read_text(encoding="utf-8")
    for path, text in files.items():
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
        print(f"written: {path}")
    for words in found.said():
        print(f"  {words}")
    print(f"next: cppo train {shlex.quote(str(recipe))} --dry-run")
    return 0


def recipe_text(found: Findings, recipe: Path, model: str | None, reward: Path | None) -> str:
    """Return the text of a recipe.

    Args:
        found: what is known of the data.
        recipe: where it will be, for its comments and the folder of the run.
        model: a folder, a hub name or a demo checkpoint; None: one that fits the data.
        reward: the file of a reward of one's own.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(scalar=scalar, shell=shlex.quote)
    environment.filters["oneline"] = lambda text: " ".join(text.split())
    usual = "Qwen/Qwen2.5-VL-3B-Instruct" if found.has_images else "Qwen/Qwen2.5-1.5B-Instruct"
    is_tiny = model in BUILDERS
    return environment.get_template("my_data.yaml.jinja").render(
        found=found,
        file=str(recipe),
        output_dir=f"runs/{recipe.stem}",
        builder=model if is_tiny else None,
        model=model or usual,
        is_tiny=is_tiny,
        reward=reward.as_posix() if reward else None,
    )


def _check_output(path: Path, suffixes: tuple[str, ...], overwrite: bool) -> None:
    if path.suffix not in suffixes:
        hint = f"; your rows are given by --data {path}" if ".py" not in suffixes else ""
        raise ConfigError(f"the file to write must end in {suffixes[0]}, got {path}{hint}")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent}")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} is there; --overwrite replaces it")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cppo init", description=main.__doc__)
    add = parser.add_argument
    add("recipe", metavar="FILE", nargs="?", default="my_data.yaml", help="to write (my_data.yaml)")
    add("--data", metavar="ROWS", help="your questions: .jsonl, .json, .csv, .tsv, .parquet")
    add("--eval-data", metavar="ROWS", help="held-out questions; else some of --data are held out")
    add("--model", help=f"a folder, a hub name, or {' or '.join(BUILDERS)}")
    add("--prompt-key", metavar="COLUMN", help="the column of the questions")
    add("--answer-key", metavar="COLUMN", help="the column of the right answers")
    add("--images-key", metavar="COLUMN", help="the column of images or their paths")
    add(
        "--reward",
        metavar="FILE",
        nargs="?",
        const="my_reward.py",
        help="write a reward of your own to start from (my_reward.py)",
    )
    add("--overwrite", action="store_true", help="replace files that are there")
    return parser
