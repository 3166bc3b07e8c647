"""Questions as rows of verl's parquet files, which its `RLHFDataset` reads.

prompt        [{role, content}], with `<image>` where an image stands
data_source   which data set, by which verl picks a reward and groups its validation metrics
ability       a word, which verl carries along
reward_model  {style: "rule", ground_truth: a text}
extra_info    {split, index, columns: the question's other columns as JSON, for rewards}
images        [{bytes: a PNG}], empty for a text
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from cppo.extras import require_package
from cppo.questions.errors import QuestionError
from cppo.questions.messages import IMAGE_MARKER
from cppo.questions.question import Question
from cppo.questions.rows import Dataset, question_at

_MARKERS = (IMAGE_MARKER, "<video>", "<audio>")  # verl cuts prompts with images at each of them
_PLACED = {"answer", "data_source", "ability"}  # columns that verl's rows have
_ROWS_AT_ONCE = 256


def verl_row(question: Question, data_source: str, ability: str, split: str) -> dict[str, Any]:
    """Return a question as a row of verl's parquet; its number is `question.row`.

    Raises: QuestionError naming the row: no answer, one that is no text or number, a message with
        more than a role and a content, a text with a marker beside images.
    """
    where = f"cppo.to_verl: row {question.row}: "
    answer = question.columns.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise QuestionError(f"{where}verl's ground_truth is a text, got the answer {answer!r:.100}")
    return dict(
        prompt=[_message(message, bool(question.images), where) for message in question.messages],
        data_source=data_source,
        ability=ability,
        reward_model=dict(style="rule", ground_truth=str(answer)),
        extra_info=dict(split=split, index=question.row, columns=_as_text(question.columns)),
        images=[dict(bytes=_png(image)) for image in question.images],
    )


def write_verl(
    rows: Dataset, path: str | Path, *, data_source: str, ability: str = "math", split: str = ""
) -> int:
    """Write a dataset as a parquet file of verl's, and return the number of its rows.

    Args:
        rows: what `cppo.questions.as_question` reads, such as the loaders return.
        path: of the file. It is there once it is complete.
        data_source, ability, split: of every row.
    Raises: QuestionError for the first row that cannot be written, OSError, ImportError without
        pyarrow.
    """
    require_package("cppo.to_verl", "pyarrow", "data")
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.string()
    schema = pyarrow.schema(
        dict(
            prompt=pyarrow.list_(pyarrow.struct(dict(role=text, content=text))),
            data_source=text,
            ability=text,
            reward_model=pyarrow.struct(dict(style=text, ground_truth=text)),
            extra_info=pyarrow.struct(dict(split=text, index=pyarrow.int64(), columns=text)),
            images=pyarrow.list_(pyarrow.struct(dict(bytes=pyarrow.binary()))),
        )
    )
    partial = Path(f"{path}.part")
    made = (
        verl_row(question_at(rows, index), data_source, ability, split)
        for index in range(len(rows))
    )
    try:
        with parquet.ParquetWriter(partial, schema) as writer:
            for some in _chunks(made):
                writer.write_table(pyarrow.Table.from_pylist(some, schema))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return len(rows)


def _as_text(columns: Mapping[str, Any]) -> str:
    """Texts and numbers of a row that have no other place: one type for rows of any kind."""
    plain = {n: v for n, v in columns.items() if isinstance(v, (str, int, float, type(None)))}
    own = {name: value for name, value in plain.items() if name not in _PLACED}
    return json.dumps(own, ensure_ascii=False)


def _message(message: dict[str, Any], has_images: bool, where: str) -> dict[str, str]:
    if more := set(message) - {"role", "content"}:
        found = ", ".join(sorted(more))
        raise QuestionError(f"{where}a message has {found}; verl's rows hold role and content")
    content = message["content"]
    parts = [dict(type="text", text=content)] if isinstance(content, str) else content
    words = ""
    for part in parts:
        if part["type"] == "image":
            words += IMAGE_MARKER
            continue
        for marker in _MARKERS if has_images else ():
            if marker in part["text"]:
                raise QuestionError(f"{where}a text has {marker}; verl would put media there")
        words += part["text"]
    return dict(role=message["role"], content=words)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _chunks(made: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    rows = iter(made)
    while some := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        yield some
