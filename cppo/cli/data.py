"""`cppo data to-verl`: a data set that cppo loads, as the parquet file that verl trains on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cppo.cli.config_file import ConfigError
from cppo.cli.datasets import load_questions
from cppo.cli.run_config import DatasetConfig
from cppo.questions.to_verl import write_verl

# The names by which verl's own reward functions know them; it has none for ViRL39K.
_SOURCES = {
    "gsm8k": "openai/gsm8k",
    "math": "DigitalLearningGmbH/MATH-lighteval",
    "geometry3k": "hiyouga/geometry3k",
    "virl39k": "TIGER-Lab/ViRL39K",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write a data set as verl's parquet."""
    arguments = _parser().parse_args(argv)
    output = Path(arguments.output)
    if output.suffix != ".parquet":
        raise ConfigError(f"OUTPUT must end in .parquet, got {arguments.output}")
    if output.exists() and not arguments.overwrite:
        raise ConfigError(f"{output} is there; --overwrite replaces it")
    if not output.parent.is_dir():
        raise ConfigError(f"there is no folder {output.parent}")
    try:
        loader, path, split = arguments.loader, arguments.path, arguments.split
        data = DatasetConfig(loader, path, split, limit=arguments.limit)
    except ValueError as error:
        raise ConfigError(str(error).removeprefix("DatasetConfig.")) from error
    rows = load_questions(data, arguments.system_prompt, arguments.loader)
    try:
        count = write_verl(
            rows,
            output,
            data_source=arguments.data_source or _SOURCES.get(arguments.loader, arguments.loader),
            ability=arguments.ability,
            split=arguments.split or "train",
        )
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(str(error)) from error
    print(f"{output}: {count} rows")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cppo data", description="Data sets in other formats.")
    formats = parser.add_subparsers(dest="format", metavar="FORMAT", required=True)
    to_verl = formats.add_parser(
        "to-verl", help="the parquet file that verl trains on", description=main.__doc__
    )
    add = to_verl.add_argument
    add("loader", metavar="LOADER", help=f"{', '.join(_SOURCES)}, rows, or my_loader.py:load")
    add("path", metavar="PATH", help="its file or folder; nothing is downloaded")
    add("output", metavar="OUTPUT.parquet")
    add("--split", help="of a folder: train, test, ...")
    add("--limit", type=int, metavar="N", help="the first N rows")
    add("--system-prompt", metavar="TEXT", help="in place of the loader's or the file's")
    add("--data-source", metavar="NAME", help="by which verl picks its reward (that of LOADER)")
    add("--ability", default="math", help="a word that verl carries along (math)")
    add("--overwrite", action="store_true", help="replace OUTPUT.parquet")
    return parser
