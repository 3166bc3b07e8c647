"""Loaders: the files of GSM8K, MATH, geometry3k, ViRL39K, and rows of any parquet or JSON file.

Each returns `Rows`: a sequence of dictionaries with a `prompt` of messages and an `answer`, which
`cppo.questions.as_question` reads. Files are read from the disk, never downloaded; pyarrow and
datasets are imported when a file needs them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cppo.questions.images import enlarge, load_image
from cppo.rewards.answers import last_boxed

_TAGS_SYSTEM = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think>\n"
    "<answer> answer here </answer>."
)
_BOXED_INSTRUCTION = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the "
    "final answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final "
    "answer MUST BE put in \\boxed{}."
)
_SUFFIXES = (".parquet", ".jsonl", ".json")

Convert = Callable[[dict[str, Any], int], dict[str, Any]]


class Rows(Sequence[dict[str, Any]]):
    """A read-only sequence of rows over a source, converted when they are taken.

    Args:
        source: anything with `__len__` and an integer `__getitem__` that gives mappings.
        convert: makes the row from the source's row and its index in the source.
        indices: the rows of the source to take, in order; all if left out.
    """

    def __init__(
        self, source: Any, convert: Convert | None = None, indices: Sequence[int] | None = None
    ) -> None:
        self._source = source
        self._convert = convert
        self._indices = range(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Rows(self._source, self._convert, self._indices[index])
        position = self._indices[index]
        row = self._source[position]
        return row if self._convert is None else self._convert(dict(row), position)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[position] for position in range(len(self)))

    def __repr__(self) -> str:
        return f"Rows({len(self)} rows)"


class _Table:
    """The rows of an Arrow table, read one by one (images stay encoded bytes)."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._table.slice(index, 1).to_pylist()[0]


def load_rows(
    path: str | Path, split: str | None = None, *, system_prompt: str | None = None
) -> Rows:
    """Return the rows of a file or folder.

    Args:
        path: a .parquet, .jsonl or .json file (an array of objects); a folder saved by `datasets`;
            or a folder (or its subfolder `data`) of such files, all of one suffix, in name order.
        split: of a folder: take the files whose name starts with it, or the saved split.
        system_prompt: a system message put before each prompt, or in place of its own.
    Raises: ValueError for a path that is not there, an unknown suffix, a split that is not there
        (with those that are), files without rows and malformed JSON (with the line).
    """
    source = _source(Path(path).expanduser(), split)
    if system_prompt is None:
        return Rows(source)
    return Rows(source, lambda row, index: _with_system(row, system_prompt))


def _source(path: Path, split: str | None) -> Any:
    """What holds the rows of a file or folder."""
    if not path.exists():
        raise ValueError(f"cppo.load_rows: there is no file or folder {path}")
    if path.is_dir():
        if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
            return _saved(path, split)
        files = _files(path, split)
    else:
        files = [path]
    suffix = files[0].suffix
    if suffix == ".parquet":
        source: Any = _Table(_parquet(files))
    elif suffix == ".jsonl":
        source = [row for file in files for row in _json_lines(file)]
    elif suffix == ".json":
        source = [row for file in files for row in _json_array(file)]
    else:
        known = ", ".join(_SUFFIXES)
        raise ValueError(f"cppo.load_rows: {files[0]} must be a {known} file")
    if len(source) == 0:
        raise ValueError(f"cppo.load_rows: {path} has no rows")
    return source


def _files(folder: Path, split: str | None) -> list[Path]:
    for place in (folder, folder / "data"):
        for suffix in _SUFFIXES:
            found = sorted(place.glob(f"*{suffix}"))
            chosen = [file for file in found if split is None or file.name.startswith(split)]
            if found and not chosen:
                names = ", ".join(file.name for file in found)
                raise ValueError(
                    f"cppo.load_rows: {folder} has no file of the split {split!r}, only {names}"
                )
            if chosen:
                return chosen
    raise ValueError(f"cppo.load_rows: {folder} holds no {', '.join(_SUFFIXES)} file")


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


def _parquet(files: Sequence[Path]) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"cppo.load_rows: {files[0]} needs the package pyarrow: pip install 'cppo[data]'"
        ) from error
    try:
        tables = [pyarrow.parquet.read_table(file) for file in files]
        return pyarrow.concat_tables(tables)
    except (OSError, pyarrow.ArrowException) as error:
        names = ", ".join(map(str, files))
        raise ValueError(f"cppo.load_rows: cannot read {names}: {error}") from error


def _json_lines(file: Path) -> list[dict[str, Any]]:
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_json(line, f"{file}, line {number}"))
    return _objects(rows, file)


def _json_array(file: Path) -> list[dict[str, Any]]:
    value = _json(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(value, list):
        raise ValueError(
            f"cppo.load_rows: {file} must hold an array of objects, got {type(value).__name__}"
        )
    return _objects(value, file)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"cppo.load_rows: {where} is not JSON: {error}") from error


def _objects(rows: list[Any], file: Path) -> list[dict[str, Any]]:
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"cppo.load_rows: row {index} of {file} must be an object, got {type(row).__name__}"
            )
    return rows


def _check_columns(name: str, rows: Rows, *alternatives: tuple[str, ...]) -> None:
    """Require that the first row has all columns of one alternative."""
    first = rows[0]
    if not any(all(column in first for column in columns) for columns in alternatives):
        expected = " or ".join(" + ".join(columns) for columns in alternatives)
        raise ValueError(
            f"cppo.{name}: expected the columns {expected}, got {', '.join(first) or 'none'}"
        )


def load_gsm8k(path: str | Path, split: str = "train", *, system_prompt: str | None = None) -> Rows:
    """Return GSM8K as rows of `prompt`, `answer` (a number as a string) and the file's columns.

    Args:
        path: the folder of train.parquet and test.parquet, or one file; with the columns of verl's
            preparation (prompt, reward_model) or the original's (question, answer).
        split: "train" or "test", if `path` is a folder.
        system_prompt: in place of the papers' (think and answer tags).
    Raises: ValueError as `load_rows` does, and for other columns.
    """
    rows = load_rows(path, split)
    _check_columns("load_gsm8k", rows, ("prompt", "reward_model"), ("question", "answer"))

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        if "prompt" in row:
            answer = row["reward_model"]["ground_truth"]
        else:
            answer = row["answer"]
            row = _with_system({**row, "prompt": row["question"]}, _TAGS_SYSTEM)
        answer = str(answer).rsplit("####", 1)[-1].strip().replace(",", "")
        return _with_system({**row, "answer": answer}, system_prompt)

    return Rows(rows, convert)


def load_math(path: str | Path, split: str = "train", *, system_prompt: str | None = None) -> Rows:
    r"""Return MATH (or MATH-500) as rows of `prompt`, `answer` (LaTeX) and the file's columns.

    Args:
        path: a folder or file; with the columns of verl's preparation (prompt, reward_model) or the
            original's (problem, solution). A column `answer` is taken as it is, else the answer is
            the last `\boxed{}` of the solution.
        split: "train" or "test", if `path` is a folder.
        system_prompt: in place of the file's own, or of the default (think tags and a box).
    Raises: ValueError as `load_rows` does, for other columns, and naming a row without an answer.
    """
    rows = load_rows(path, split)
    _check_columns("load_math", rows, ("prompt", "reward_model"), ("problem", "solution"))

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        if "prompt" in row:
            solution = str(row["reward_model"]["ground_truth"])
        else:
            solution = row["solution"]
            row = _with_system({**row, "prompt": row["problem"]}, _BOXED_INSTRUCTION)
        answer = row.get("answer") or last_boxed(solution)
        if not answer:
            raise ValueError(f"cppo.load_math: row {index} has no \\boxed{{}} in {solution!r:.200}")
        return _with_system({**row, "answer": answer}, system_prompt)

    return Rows(rows, convert)


def load_geometry3k(
    path: str | Path,
    split: str = "train",
    *,
    system_prompt: str | None = None,
    min_image_side: int = 28,
) -> Rows:
    """Return geometry3k as rows of `prompt` (with <image> markers), `images` and `answer`.

    Args:
        path: the folder (of data/train-*.parquet) or a file; with the columns of the original
            (images, problem, answer) or of verl's preparation (prompt, images, reward_model).
        split: "train", "validation" or "test", if `path` is a folder.
        system_prompt: in place of the papers' instruction behind each question.
        min_image_side: images with a shorter side are enlarged to it (pixels; 0: never).
    Raises: ValueError as `load_rows` does, for other columns, and naming a row whose image cannot
        be read.
    """
    rows = load_rows(path, split)
    verl, original = ("prompt", "images", "reward_model"), ("problem", "images", "answer")
    _check_columns("load_geometry3k", rows, verl, original)

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        images = _images(row["images"], f"cppo.load_geometry3k: row {index}: ", min_image_side)
        if "prompt" in row:
            answer, prompt = row["reward_model"]["ground_truth"], row["prompt"]
        else:
            answer, prompt = row["answer"], _instructed(row["problem"], system_prompt)
        row = {**row, "prompt": prompt, "images": images, "answer": answer}
        return _with_system(row, system_prompt)

    return Rows(rows, convert)


def load_virl39k(
    path: str | Path,
    split: str = "train",
    *,
    system_prompt: str | None = None,
    image_folder: str | Path | None = None,
    single_image: bool = True,
    min_image_side: int = 28,
) -> Rows:
    r"""Return ViRL39K as rows of `prompt` (with <image> markers), `images` and `answer`.

    Args:
        path: 39Krelease.parquet or its folder; with the columns question, answer (`\boxed{}`)
            and image (a list of paths).
        split: "train", the only one there is.
        system_prompt: in place of the papers' instruction behind each question.
        image_folder: what the paths are relative to; the file's folder if left out.
        single_image: keep only rows of one image, as in arXiv 2601.00501.
        min_image_side: images with a shorter side are enlarged to it (pixels; 0: never).
    Raises: ValueError as `load_rows` does, for other columns, and naming a row without an answer
        or with an image that cannot be read.
    """
    if split != "train":
        raise ValueError(f"cppo.load_virl39k: split must be 'train', got {split!r}")
    rows = load_rows(path)
    _check_columns("load_virl39k", rows, ("question", "answer", "image"))
    path = Path(path).expanduser()
    folder = Path(image_folder or (path if path.is_dir() else path.parent)).expanduser()

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"cppo.load_virl39k: row {index}: "
        paths = [str(folder / name) for name in _names(row.pop("image"))]
        text, gold = row["question"], row["answer"]
        if "<image>" not in text:
            text = "<image>" * len(paths) + "\n" + text
        answer = last_boxed(gold) if "\\boxed" in gold else gold
        if not answer:
            raise ValueError(f"{where}has no answer in {gold!r}")
        prompt = _instructed(text, system_prompt)
        images = _images(paths, where, min_image_side)
        row = {**row, "prompt": prompt, "images": images, "answer": answer}
        return _with_system(row, system_prompt)

    keep = [i for i, row in enumerate(rows) if not single_image or len(_names(row["image"])) == 1]
    if not keep:
        raise ValueError(f"cppo.load_virl39k: {path} has no row of one image")
    return Rows(rows, convert, keep)


def _names(image: Any) -> list[str]:
    return [image] if isinstance(image, str) else list(image)


def _images(sources: Any, where: str, min_side: int) -> list[Any]:
    return [
        enlarge(load_image(source, f"{where}image {i}: "), min_side)
        for i, source in enumerate(sources)
    ]


def _instructed(question: str, system_prompt: str | None) -> str:
    return question if system_prompt is not None else f"{question} {_BOXED_INSTRUCTION}"


def _with_system(row: dict[str, Any], system_prompt: str | None) -> dict[str, Any]:
    """The row with a system message before its prompt, in place of one that is there."""
    if system_prompt is None or "prompt" not in row:
        return row
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    rest = [message for message in prompt if message.get("role") != "system"]
    return {**row, "prompt": [{"role": "system", "content": system_prompt}, *rest]}
