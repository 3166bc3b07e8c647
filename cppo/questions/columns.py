"""Columns of one's own data by their names there: which holds the question, the answer, the images.

question, final_answer, picture  ->  prompt, answer, images
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from cppo.options.values import suggestion
from cppo.questions.errors import QuestionError
from cppo.questions.rows import Dataset, Rows

# The options that name a column, and what the column becomes.
KEYS = {"prompt_key": "prompt", "answer_key": "answer", "images_key": "images"}
# What people call such columns, the likeliest first.
_USUAL = {
    "prompt_key": (
        *("prompt", "question", "problem", "instruction", "query", "user_prompt", "messages"),
        *("extra_info.question", "task", "input", "text", "content"),
    ),
    "answer_key": (
        *("answer", "final_answer", "correct_answer", "ground_truth", "reward_model.ground_truth"),
        *("gold", "label", "target", "expected", "solution", "extra_info.answer", "output"),
        *("response", "reference", "result"),
    ),
    "images_key": (
        *("images", "image", "picture", "pictures", "photo", "img", "image_path", "image_paths"),
        *("image_file", "images_path", "file_name", "filename"),
    ),
}
MISSING = object()


def rename_columns(
    rows: Dataset,
    *,
    prompt_key: str | None = None,
    answer_key: str | None = None,
    images_key: str | None = None,
    where: str = "cppo.rename_columns: ",
) -> Rows:
    """Return rows whose columns have the names that `as_question` reads.

    Args:
        rows: mappings, by number.
        prompt_key: the column that becomes `prompt`: a text or messages.
        answer_key: the column that becomes `answer`: what the rewards compare with.
        images_key: the column that becomes `images`: one image or a list of images. Rows without it
            have no image.
            A name with a dot reads a mapping: "reward_model.ground_truth". A column that has such a
            name itself goes first. None: the row's own `prompt`, `answer`, `image` or `images`.
        where: the beginning of error messages.
    Returns: the rows. A named column is moved, its old name is free; it replaces one that already
        has the new name. What is read of a mapping stays there as well.
    Raises: ValueError for a column that the first row does not have (with the nearest name and all
        of them), and for one column under two keys. A later row without it raises QuestionError
        when it is taken.
    """
    keys = named(prompt_key=prompt_key, answer_key=answer_key, images_key=images_key)
    check_keys(keys, rows, where)
    return Rows(rows, lambda row, index: renamed(row, keys, f"{where}row {index}: "))


def named(**keys: str | None) -> dict[str, str]:
    """The keys that name a column."""
    return {key: name for key, name in keys.items() if name is not None}


def check_keys(keys: Mapping[str, str], rows: Dataset, where: str) -> None:
    """Raise ValueError for a column that the first row does not have, or that two keys name.

    Images may be those of some rows only: of a list one row must have them.
    """
    if shared := shared_column(keys):
        raise ValueError(f"{where}{shared[0]} and {shared[1]} must name different columns")
    first: Any = rows[0] if keys else None
    for key, name in keys.items() if isinstance(first, Mapping) else ():
        looked_at: list[Any] = [first]
        if key == "images_key" and isinstance(rows, list):
            looked_at = rows
        if all(value_at(row, name) is MISSING for row in looked_at):
            raise ValueError(where + _no_column(key, name, first))


def shared_column(keys: Mapping[str, str]) -> tuple[str, str] | None:
    """Two keys that name the same column, if there are such."""
    by_name: dict[str, str] = {}
    for key, name in keys.items():
        if name in by_name:
            return by_name[name], key
        by_name[name] = key
    return None


def renamed(row: dict[str, Any], keys: Mapping[str, str], where: str) -> dict[str, Any]:
    """A row with the columns that `keys` name under their new names."""
    values = {KEYS[key]: value_at(row, name) for key, name in keys.items()}
    if values.get("images") is MISSING:
        values["images"] = None
    for key, name in keys.items():
        if values[KEYS[key]] is MISSING:
            raise QuestionError(where + _no_column(key, name, row))
    if values.get("prompt", "") is None:
        raise QuestionError(f"{where}the column {keys['prompt_key']!r} (prompt_key) is empty")
    moved = {*keys.values(), *(("image",) if "images" in values else ())}
    return {**{name: value for name, value in row.items() if name not in moved}, **values}


def columns_of(row: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """The names of a row's columns, those inside mappings with dots."""
    found = []
    for name, value in row.items():
        found.append(f"{prefix}{name}")
        if isinstance(value, Mapping):
            found += columns_of(value, f"{prefix}{name}.")
    return found


def likely_column(key: str, columns: Iterable[str]) -> str | None:
    """Which of the columns a key probably means, by what people call such columns."""
    spelt = {re.sub(r"[\s-]+", "_", name.strip().lower()): name for name in reversed([*columns])}
    return next((spelt[name] for name in _USUAL[key] if name in spelt), None)


def hint(key: str, columns: Iterable[str]) -> str:
    """The words "; answer_key can name another column, such as 'label'", or an empty text."""
    likely = likely_column(key, columns)
    return f"; {key} can name another column, such as {likely!r}" if likely else ""


def value_at(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of a name with dots inside mappings; MISSING if there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value


def _no_column(key: str, name: str, row: Mapping[str, Any]) -> str:
    columns = columns_of(row)
    listed = ", ".join(columns) or "none"
    return f"{key} must be a column of the rows, got {name!r}{suggestion(name, columns)} ({listed})"
