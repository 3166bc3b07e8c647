"""The rows that a configuration names: read, and checked before anything starts."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cppo.cli.config_file import ConfigError
from cppo.cli.run_config import LOADERS, DataConfig, DatasetConfig
from cppo.options.places import load_object
from cppo.questions import Rows, rename_columns
from cppo.questions.columns import columns_of, likely_column
from cppo.questions.files import with_system
from cppo.questions.rows import question_at

if TYPE_CHECKING:
    from cppo.train.trainer import Dataset

CHECKED_ROWS = 32  # rows of each dataset that are read before anything starts, spread evenly
READ_ROWS = 10_000  # the same for text alone, which takes a second or two


def load_questions(data: DatasetConfig, system_prompt: str | None, key: str) -> Dataset:
    """Load the rows of a dataset.

    Args:
        data: which.
        system_prompt: replaces each question's system message; None: nothing changes.
        key: its place in the configuration file, for errors: "data.train".
    Raises: ConfigError if the files, the split or a column are missing.
    """
    try:
        rows = _load(data)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise ConfigError(f"{key}: {error}", key) from error
    _check_prompt(rows, data, key)
    if data.skip >= len(rows):
        raise ConfigError(f"{key}.skip must be below the {len(rows)} rows, got {data.skip}", key)
    taken = range(data.skip, len(rows))[: data.limit]
    return Rows(rows, lambda row, index: with_system(row, system_prompt), taken)


def overlap(data: DataConfig) -> str:
    """What to say of held-out questions that are trained on; an empty text if there are none."""
    train, held_out = data.train, data.eval

    def source(one: DatasetConfig) -> tuple[Any, ...]:
        return one.loader, one.path and Path(one.path).expanduser().resolve(), _split(one)

    if held_out is None or source(train) != source(held_out):
        return ""
    ends = [one.skip + one.limit if one.limit else sys.maxsize for one in (train, held_out)]
    if max(train.skip, held_out.skip) >= min(ends):
        return ""
    apart = f"; data.train.skip={ends[1]} keeps them apart" if held_out.limit else ""
    return f"data.eval has questions that data.train trains on{apart}"


def _split(data: DatasetConfig) -> str | None:
    """The split of a dataset: that which a loader takes if it is not told."""
    if data.split is not None or data.loader not in LOADERS:
        return data.split
    loader = load_object(LOADERS[data.loader], "loader")
    default: str | None = inspect.signature(loader).parameters["split"].default
    return default


def _check_prompt(rows: Dataset, data: DatasetConfig, key: str) -> None:
    """Raise ConfigError for rows of the user's whose questions are in a column of another name."""
    if "prompt_key" in data.keys or data.is_demo:
        return
    try:
        first = rows[0]
    except Exception:  # `check_rows` says what is wrong with a row
        return
    if isinstance(first, Mapping) and "prompt" not in first:
        columns = columns_of(first)
        likely = likely_column("prompt_key", columns)
        example = f", for example {key}.prompt_key: {likely}" if likely else ""
        raise ConfigError(
            f"{key}: the rows have no column 'prompt' (but {', '.join(columns) or 'none'}); "
            f"{key}.prompt_key names the column of the questions{example}",
            key,
        )


def _load(data: DatasetConfig) -> Any:
    """What the loader returns; it is called with `path` and `split` as far as they are given."""
    place = LOADERS.get(data.loader, data.loader)
    arguments = (data.path,) if data.split is None else (data.path, data.split)
    # The other loaders know their columns, and a function of the user's gives rows of any kind.
    keys = data.keys if data.loader == "rows" else {}
    rows = load_object(place, "loader")(*(() if arguments == (None,) else arguments), **keys)
    is_sequence = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    if not is_sequence or isinstance(rows, (Mapping, str)):
        raise TypeError(
            f"{data.loader} must return rows with len() and [i], such as a list of mappings, got "
            f"{type(rows).__name__}"
        )
    if len(rows) == 0:
        raise ValueError(f"{data.loader} returned no rows")
    return rename_columns(rows, **data.keys, where="") if data.keys and not keys else rows


def check_rows(
    rows: Dataset, spec: DatasetConfig, functions: list[Any], *, skip_bad: bool = False
) -> None:
    """Read rows of a dataset, more of them where that decodes no images.

    Args:
        skip_bad: whether rows that are no question are left out, as training may do.
    Raises: ValueError or TypeError naming a row that is no question, or whose ground truth one of
        the reward functions cannot read.
    """
    from cppo.questions import check_dataset

    try:
        is_text = not spec.is_demo and not question_at(rows, 0).images
    except (TypeError, ValueError):  # `check_dataset` says what is wrong with it
        is_text = False
    limit = READ_ROWS if is_text else CHECKED_ROWS
    # A reward of the user's may read any ground truth.
    check_dataset(
        rows, limit=limit, read_answer=False, rewards=functions, skip_bad_questions=skip_bad
    )
