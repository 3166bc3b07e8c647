"""The rows of a CSV or TSV file, whose first row has the names of the columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LONGEST_CELL = 2**31 - 1  # of csv's own limit, 131,072 characters, an image in base64 is more


def delimited_rows(text: str, file: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV (commas) or TSV (tabs) text.

    Args:
        text: the content of the file.
        file: its path, whose suffix says which of the two it is, and which errors name.
    Returns: a dictionary per row. Cells are text, also those that look like numbers or lists; an
        empty cell is None. Empty lines are left out.
    Raises: ValueError with the file and the line, for a column without a name or with the name of
        another, for a row with more or fewer cells, and for quotes that do not fit together.
    """
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        return _rows(text, file)
    finally:
        csv.field_size_limit(limit)


def _rows(text: str, file: Path) -> list[dict[str, Any]]:
    lines = _lines(text, file)
    header, number = next(lines, ([], 1))
    names = [name.strip() for name in header]
    _check_names(names, f"cppo.load_rows: {file}, line {number}")
    rows = []
    for cells, number in lines:
        if len(cells) != len(names):
            raise ValueError(
                f"cppo.load_rows: {file}, line {number} has {len(cells)} cells, the first row "
                f"names {len(names)} columns; quote a cell that holds the separator or a line break"
            )
        rows.append({name: cell or None for name, cell in zip(names, cells, strict=True)})
    return rows


def _lines(text: str, file: Path) -> Iterator[tuple[list[str], int]]:
    """The cells of each row, and the line on which it begins."""
    is_csv = file.suffix.lower() == ".csv"
    source = io.StringIO(text.lstrip("\ufeff"), newline="")
    reader = csv.reader(
        source, delimiter="," if is_csv else "\t", strict=True, skipinitialspace=is_csv
    )
    start = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"cppo.load_rows: {file}, line {start} cannot be read: {error}"
            ) from error
        if cells:
            yield cells, start
        start = reader.line_num + 1


def _check_names(names: list[str], where: str) -> None:
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        raise ValueError(
            f"{where}: the columns must be divided by commas (.csv) or tabs (.tsv), got "
            f"{names[0]!r}"
        )
    for place, name in enumerate(names):
        if not name:
            hint = "; pandas writes none with to_csv(index=False)" if place == 0 else ""
            raise ValueError(f"{where}: column {place + 1} of {len(names)} has no name{hint}")
        if name in names[:place]:
            raise ValueError(f"{where}: the column {name!r} appears twice")
