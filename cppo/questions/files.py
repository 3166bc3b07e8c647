"""The rows of files: parquet, JSON, JSON lines, CSV, TSV, and what the package `datasets` saved.

Files are read from the disk, never downloaded; pyarrow and datasets are imported when a file needs
them.
"""

from __future__ import annotations

import bisect
import io
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cppo.questions.columns import check_keys, named, renamed
from cppo.questions.delimited import delimited_rows
from cppo.questions.messages import sequence
from cppo.questions.near import images_near
from cppo.questions.rows import Rows
from cppo.rewards.ground_truth import widened

_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
_ABOUT = "dataset_infos.json"  # what the hub once wrote beside the rows


def load_rows(
    path: str | Path,
    split: str | None = None,
    *,
    system_prompt: str | None = None,
    prompt_key: str | None = None,
    answer_key: str | None = None,
    images_key: str | None = None,
) -> Rows:
    """Return the rows of a file or folder.

    Relative paths of images, in a column or inside messages, are those of the folder of the file,
    and where there is no such file, of the working directory.

    Args:
        path: a .parquet, .jsonl, .json (an array of objects), .csv or .tsv file; a folder saved by
            `datasets`; or a folder (or its subfolder `data`) of such files, all of one suffix, in
            name order. Text is UTF-8, or UTF-16 or UTF-32 as JSON's standard tells them apart, with
            or without a byte-order mark. The first row of a .csv or .tsv file names the columns;
            its cells are text, and an empty one is None. Parquet files may store a column as
            different types of one kind (int32 and int64, or nothing but nulls); each row keeps the
            value of its file. Floats of 16 and 32 bits are read as
            `cppo.rewards.ground_truth.widened` reads them.
        split: of a folder: take the files of that name ("test" is test.jsonl or
            test-00000-of-00002.parquet), else those whose name starts with it; or the saved split.
            Other files in the folder do not matter.
        system_prompt: a system message put before each prompt, or in place of its own.
        prompt_key, answer_key, images_key: the columns that become `prompt`, `answer` and `images`,
            see `cppo.questions.rename_columns`.
    Raises: ValueError for a path that is not there, an unknown suffix, a split that is not there
        (with those that are), files without rows, malformed JSON or CSV (with file and line),
        parquet files whose columns do not go together (with file and column), a key that is no
        column. A row whose image is not there raises QuestionError when it is taken.
    """
    place = Path(path).expanduser()
    source = read_source(place, split)
    folder = _folder(place, split)
    keys = named(prompt_key=prompt_key, answer_key=answer_key, images_key=images_key)
    check_keys(keys, source, "cppo.load_rows: ")
    kinds = {name: getattr(kind, "dtype", "") for name, kind in _features(source).items()}
    narrow = {name: kind for name, kind in kinds.items() if kind in ("float16", "float32")}

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"cppo.load_rows: row {index}: "
        stored = {name: _widened(row[name], kind) for name, kind in narrow.items()}
        row = renamed({**row, **stored}, keys, where)
        return with_system(images_near(row, folder, where), system_prompt)

    return Rows(source, convert)


def _features(source: Any) -> Mapping[str, Any]:
    """The types of the columns of a dataset that was saved by `datasets`."""
    return getattr(source, "features", None) or {}


def with_system(row: dict[str, Any], system_prompt: str | None) -> dict[str, Any]:
    """The row with a system message before its prompt, in place of one that is there."""
    if system_prompt is None or row.get("prompt") is None:
        return row
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = sequence(prompt) or []
    rest = [one for one in messages if not isinstance(one, Mapping) or one.get("role") != "system"]
    contents = (one.get("content") if isinstance(one, Mapping) else one for one in rest)
    has_image = any(row.get(name) is not None for name in ("image", "images"))
    if not has_image and not any(str(content or "").strip() for content in contents):
        return row  # `as_question` says what is wrong with it, which a system prompt would hide
    return {**row, "prompt": [{"role": "system", "content": system_prompt}, *rest]}


def read_source(path: Path, split: str | None) -> Any:
    """What holds the rows of a file or folder; `column` reads one of its columns."""
    if not path.exists():
        raise ValueError(f"cppo.load_rows: there is no file or folder {path}")
    if _is_saved(path):
        return _saved(path, split)
    files = _files(path, split) if path.is_dir() else [path]
    suffix = files[0].suffix.lower()
    if suffix == ".parquet":
        source: Any = _Shards(_tables(files))
    elif suffix == ".jsonl":
        source = [row for file in files for row in _json_lines(file)]
    elif suffix == ".json":
        source = [row for file in files for row in _json_array(file)]
    elif suffix in (".csv", ".tsv"):
        source = [row for file in files for row in delimited_rows(_text(file), file)]
    else:
        known = ", ".join(_SUFFIXES)
        raise ValueError(f"cppo.load_rows: {files[0]} must be a {known} file")
    if len(source) == 0:
        raise ValueError(f"cppo.load_rows: {path} has no rows")
    return source


def column(source: Any, name: str) -> list[Any]:
    """The values of a column of a source, as they are stored: no image is decoded.

    None where there is no such column.
    """
    if isinstance(source, list):
        return [row.get(name) for row in source]
    tables = source.tables if isinstance(source, _Shards) else [source.with_format("arrow")[:]]
    if name not in tables[0].column_names:
        return [None] * len(source)
    return [value for table in tables for value in _values(table.column(name))]


def _values(stored: Any) -> list[Any]:
    """The values of a column, floats of less than 64 bits as what they stand for, not as stored."""
    values = stored.to_pylist()
    kind = {"float": "float32", "halffloat": "float16"}.get(str(stored.type))
    return [_widened(value, kind) for value in values] if kind else values


def _widened(value: Any, kind: str) -> Any:
    return value if value is None or not np.isfinite(value) else widened(np.dtype(kind).type(value))


class _Shards:
    """The rows of Arrow tables one after the other, read one by one (images stay encoded)."""

    def __init__(self, tables: Sequence[Any]) -> None:
        self.tables = tables
        self._ends = list(itertools.accumulate(table.num_rows for table in tables))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        table = self.tables[shard]
        row = table.slice(index - self._ends[shard] + table.num_rows, 1)
        return {name: _values(row.column(name))[0] for name in row.column_names}


def _is_saved(path: Path) -> bool:
    """Whether `datasets` saved a folder."""
    return any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))


def _folder(path: Path, split: str | None) -> Path:
    """The folder of the files of a path."""
    if _is_saved(path):
        return path
    return _files(path, split)[0].parent if path.is_dir() else path.parent


def splits_of(folder: Path, words: Iterable[str]) -> dict[str, str]:
    """The splits of a folder that are called by some words, or begin with them: {word: split}.

    Raises: ValueError for a folder without rows, and one that `datasets` did not save whole.
    """
    if _is_saved(folder):
        names = _saved_splits(folder)
        starts = ((word, [n for n in names if n.startswith(word)]) for word in words)
        return {word: word if word in found else found[0] for word, found in starts if found}
    files = _files(folder, None)
    return {word: word for word in words if any(file.name.startswith(word) for file in files)}


def _saved_splits(folder: Path) -> list[str]:
    file = folder / "dataset_dict.json"
    if not file.is_file():
        return []
    try:
        return [str(name) for name in json.loads(file.read_bytes())["splits"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cppo.load_rows: {file} does not name the splits") from error


def _files(folder: Path, split: str | None) -> list[Path]:
    """The files of the first suffix and place that has any; a folder may hold others as well."""
    kinds = [
        [file for file in sorted(place.glob(f"*{suffix}")) if file.name != _ABOUT]
        for place in (folder, folder / "data")
        for suffix in _SUFFIXES
    ]
    if split is not None:
        named = [[file for file in files if _is_of(file, split)] for files in kinds]
        begun = [[file for file in files if file.name.startswith(split)] for files in kinds]
    for chosen in kinds if split is None else [*named, *begun]:
        if chosen:
            return chosen
    if any(kinds):
        names = ", ".join(file.name for files in kinds for file in files)
        raise ValueError(
            f"cppo.load_rows: {folder} has no file of the split {split!r}, only {names}"
        )
    raise ValueError(f"cppo.load_rows: {folder} holds no {', '.join(_SUFFIXES)} file")


def _is_of(file: Path, split: str) -> bool:
    """test.jsonl and test-00000-of-00002.parquet are of the split "test", not testmini.parquet."""
    return re.fullmatch(re.escape(split) + r"(-\d+(-of-\d+)?)?\.\w+", file.name) is not None


def _saved(folder: Path, split: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"cppo.load_rows: {folder} was saved by the package datasets: pip install 'cppo[data]'"
        ) from error
    loaded = datasets.load_from_disk(str(folder))
    if not isinstance(loaded, Mapping):
        return loaded
    if split is None and len(loaded) == 1:
        (split,) = loaded
    if split not in loaded:
        raise ValueError(
            f"cppo.load_rows: {folder} has no split {split!r}, only {', '.join(map(str, loaded))}"
        )
    return loaded[split]


def _tables(files: Sequence[Path]) -> list[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"cppo.load_rows: {files[0]} needs the package pyarrow: pip install 'cppo[data]'"
        ) from error
    tables: list[Any] = []
    for file in files:
        try:
            tables.append(pyarrow.parquet.read_table(file, partitioning=None))
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"cppo.load_rows: cannot read {file}: {error}") from error
    _check_schemas(files, [table.schema for table in tables])
    return tables


def _check_schemas(files: Sequence[Path], schemas: Sequence[Any]) -> None:
    """Require the same columns in all files, of types that go together."""
    import pyarrow

    known: dict[str, tuple[Any, Path]] = {}
    for file, schema in zip(files, schemas, strict=True):
        if set(schema.names) != set(schemas[0].names):
            raise ValueError(
                f"cppo.load_rows: {file} has the columns {', '.join(schema.names) or 'none'}, "
                f"{files[0]} has {', '.join(schemas[0].names) or 'none'}"
            )
        for name, kind in zip(schema.names, map(_plain_type, schema.types), strict=True):
            before, first = known.get(name, (kind, file))
            try:
                both = [pyarrow.schema([(name, own)]) for own in (before, kind)]
                common = pyarrow.unify_schemas(both, promote_options="permissive").field(0).type
            except pyarrow.ArrowException as error:
                raise ValueError(
                    f"cppo.load_rows: the column {name!r} is {before} in {first} and {kind} in "
                    f"{file}"
                ) from error
            known[name] = (common, file if pyarrow.types.is_null(before) else first)


def _plain_type(kind: Any) -> Any:
    """A type without how its values are stored."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return pyarrow.string() if pyarrow.types.is_string_view(kind) else kind


def _json_lines(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(io.StringIO(_text(file), newline=None), 1):
        line = line.lstrip("\ufeff")  # of files that were put one behind the other
        if line.strip():
            rows.append(_object(_json(line, file, number), f"{file}, line {number}"))
    return rows


def _json_array(file: Path) -> list[dict[str, Any]]:
    rows = _json(_text(file), file)
    if not isinstance(rows, list):
        raise ValueError(
            f"cppo.load_rows: {file} must hold an array of objects, got {type(rows).__name__}"
        )
    return [_object(row, f"row {index} of {file}") for index, row in enumerate(rows)]


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"cppo.load_rows: {place} must be an object, got {type(row).__name__}")
    return row


def _text(file: Path) -> str:
    data = file.read_bytes()
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "replace").count("\n") + 1
        raise ValueError(
            f"cppo.load_rows: {file}, line {line} is not {encoding}: {error.reason}"
        ) from error


def _json(text: str, file: Path, line: int = 0) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = ""
        if not line and error.msg == "Extra data" and text.lstrip().startswith("{"):
            hint = "; JSON lines belong in a .jsonl file"
        raise ValueError(
            f"cppo.load_rows: {file}, line {line or error.lineno} is not JSON: {error.msg} "
            f"(column {error.colno}){hint}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        place = f"{file}, line {line}" if line else str(file)
        raise ValueError(f"cppo.load_rows: {place} cannot be read: {error}") from error
