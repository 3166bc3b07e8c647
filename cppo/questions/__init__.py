"""Questions: dataset rows in TRL's or verl's format, read into one shape.

    row -> Question(messages, images, columns)

A dataset is anything with `__len__` and an integer `__getitem__` that gives rows: a list of
dictionaries, a `datasets.Dataset`, or what the loaders of `cppo.questions.loaders` return.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image

from cppo.questions.images import enlarge, load_image
from cppo.questions.loaders import (
    Rows,
    load_geometry3k,
    load_gsm8k,
    load_math,
    load_rows,
    load_virl39k,
)

__all__ = [
    "DatasetSummary",
    "Question",
    "Rows",
    "as_question",
    "check_dataset",
    "load_geometry3k",
    "load_gsm8k",
    "load_image",
    "load_math",
    "load_rows",
    "load_virl39k",
    "split_rows",
]

ROLES = ("system", "user", "assistant", "tool")
IMAGE_MARKER = "<image>"
_NOT_COLUMNS = ("prompt", "image", "images")
_RESERVED = ("prompts", "completions", "completion_ids")


class Question(NamedTuple):
    """One question, as the trainer asks it.

    Fields:
        messages: chat messages; a user's content is a string, or a list of {"type": "image"} and
            {"type": "text", "text": ...} parts where there are images.
        images: RGB or L images, in the order of the image parts.
        columns: every other column of the row; the ground truth is columns["answer"].
    """

    messages: list[dict[str, Any]]
    images: list[Image.Image]
    columns: dict[str, Any]


def as_question(row: Any, index: int | None = None, *, min_image_side: int = 0) -> Question:
    r"""Return a dataset row as a Question.

    Args:
        row: a mapping in TRL's format (`prompt`: a string or messages; `image` or `images`) or
            verl's (`<image>` markers in the content, `reward_model.ground_truth`). An image is a
            PIL image, a path, encoded bytes, or a {"bytes", "path"} mapping as `datasets` stores
            it. Images without any marker or image part go before the first user text.
        index: position in the dataset, named in errors.
        min_image_side: images with a shorter side are enlarged to it, in proportion (pixels; 0
            leaves them alone; the Qwen-VL families need 28).
    Returns: a Question; `answer` comes from the column `answer`, else `reward_model.ground_truth`,
        else `solution`; of "... #### 42" only "42" is kept; absent where none of them is.
    Raises: TypeError or ValueError naming the row: no prompt, empty or malformed messages, an
        unknown role, markers and images that disagree in number, an image that cannot be read, a
        column that has the name of a reward's own argument.
    """
    where = "cppo.as_question: " + (f"row {index}: " if index is not None else "")
    if not isinstance(row, Mapping):
        raise TypeError(f"{where}expected a mapping, got {type(row).__name__}")
    if row.get("prompt") is None:
        raise ValueError(f"{where}has no 'prompt' (columns: {', '.join(map(str, row)) or 'none'})")
    messages, inline = _messages(row["prompt"], where)
    column = _image_column(row, where)
    if inline and column:
        raise ValueError(f"{where}images stand both in the messages and in a column; keep one")
    sources = inline or column
    _place_images(messages, len(sources), where)
    images = [
        enlarge(load_image(source, f"{where}image {i}: "), min_image_side)
        for i, source in enumerate(sources)
    ]
    columns = {name: value for name, value in row.items() if name not in _NOT_COLUMNS}
    for name in _RESERVED:
        if name in columns:
            raise ValueError(f"{where}the column {name!r} is what rewards are given; rename it")
    answer = _answer(row, where)
    if answer is not None:
        columns["answer"] = answer
    return Question(messages, images, columns)


def _sequence(value: Any) -> list[Any] | None:
    """A list, tuple or numpy array (what pandas reads from parquet) as a list, else None."""
    if isinstance(value, (list, tuple)) or type(value).__name__ == "ndarray":
        return list(value)
    return None


def _messages(prompt: Any, where: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages with `<image>` markers turned into parts, and the images given inside them."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    given = _sequence(prompt)
    if given is None:
        raise TypeError(f"{where}prompt must be a string or messages, got {type(prompt).__name__}")
    if not given:
        raise ValueError(f"{where}prompt has no messages")
    inline: list[Any] = []
    messages = []
    for position, message in enumerate(given):
        place = f"{where}prompt[{position}]"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"{place} must have 'role' and 'content', got {message!r:.200}")
        if message["role"] not in ROLES:
            raise ValueError(
                f"{place}: role must be one of {', '.join(ROLES)}, got {message['role']!r}"
            )
        content = message["content"]
        parts = _sequence(content)
        if isinstance(content, str):
            content = _split_markers(content)
        elif parts is not None:
            content = [_part(part, inline, place) for part in parts]
        else:
            raise TypeError(
                f"{place}: content must be a string or a list of parts, got {content!r:.200}"
            )
        messages.append({"role": message["role"], "content": content})
    return messages, inline


def _split_markers(text: str) -> str | list[dict[str, Any]]:
    if IMAGE_MARKER not in text:
        return text
    parts: list[dict[str, Any]] = []
    for piece in re.split(f"({IMAGE_MARKER})", text):
        if piece == IMAGE_MARKER:
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _part(part: Any, inline: list[Any], place: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        if part.get("image") is not None:
            inline.append(part["image"])
        return {"type": "image"}
    raise ValueError(
        f"{place}: a part must be {{'type': 'image'}} or {{'type': 'text', 'text': ...}}, "
        f"got {part!r:.200}"
    )


def _image_column(row: Mapping[str, Any], where: str) -> list[Any]:
    given = {name: row[name] for name in ("image", "images") if row.get(name) is not None}
    if len(given) == 2:
        raise ValueError(f"{where}has both 'image' and 'images'; keep one")
    for value in given.values():
        several = _sequence(value)
        return [value] if several is None else several
    return []


def _place_images(messages: list[dict[str, Any]], count: int, where: str) -> None:
    """Check that image parts and images agree; without parts, put them before the user's text."""
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    marked = sum(part["type"] == "image" for part in parts)
    if marked == 0 and count:
        for message in messages:
            if message["role"] == "user":
                text = message["content"]
                rest = text if isinstance(text, list) else [{"type": "text", "text": text}]
                message["content"] = [{"type": "image"} for _ in range(count)] + rest
                return
        raise ValueError(f"{where}has {count} images but no user message to put them in")
    if marked != count:
        raise ValueError(
            f"{where}the messages mark {marked} images ({IMAGE_MARKER} or image parts), "
            f"the row has {count}"
        )


def _answer(row: Mapping[str, Any], where: str) -> Any:
    answer = row.get("answer")
    if answer is None and isinstance(row.get("reward_model"), Mapping):
        answer = row["reward_model"].get("ground_truth")
    if answer is None:
        answer = row.get("solution")
    if isinstance(answer, str) and "####" in answer:
        final = answer.rsplit("####", 1)[1].strip().replace(",", "")
        if not final:
            raise ValueError(f"{where}nothing follows the '####' of the answer {answer!r:.200}")
        return final
    return answer


class DatasetSummary(NamedTuple):
    """What `check_dataset` saw.

    Fields: rows (in the dataset), checked (rows read), with_images, with_answers (of those
        checked), max_images (of one row), mean_characters (of a prompt), columns (names).
    """

    rows: int
    checked: int
    with_images: int
    with_answers: int
    max_images: int
    mean_characters: float
    columns: tuple[str, ...]


def check_dataset(
    dataset: Any, *, limit: int | None = None, require_answer: bool = False
) -> DatasetSummary:
    """Read the rows of a dataset as questions and return what they hold.

    Args:
        dataset: anything with `__len__` and an integer `__getitem__`.
        limit: check only that many rows, spread evenly; None checks all.
        require_answer: whether a row without ground truth is an error.
    Returns: counts over the rows checked.
    Raises: TypeError or ValueError for an empty dataset or something else than a dataset, for the
        first row that is no question, and for a row whose columns are not those of the first.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            "cppo.check_dataset: dataset must have __len__ and __getitem__ (a list of rows, a "
            f"datasets.Dataset), got {type(dataset).__name__}"
        )
    if isinstance(dataset, Mapping):
        raise TypeError(
            "cppo.check_dataset: dataset must be one dataset, got a mapping of "
            f"{', '.join(map(str, dataset))}; take one of them"
        )
    rows = len(dataset)
    if rows == 0:
        raise ValueError("cppo.check_dataset: the dataset is empty")
    count = rows if limit is None else max(1, min(rows, limit))
    indices = [i * rows // count for i in range(count)]
    questions = 0
    with_images = with_answers = max_images = characters = 0
    columns: tuple[str, ...] = ()
    for index in indices:
        question = as_question(dataset[index], index)
        names = tuple(sorted(question.columns))
        if questions and names != columns:
            raise ValueError(
                f"cppo.check_dataset: row {index} has the columns {', '.join(names) or 'none'}, "
                f"row {indices[0]} has {', '.join(columns) or 'none'}; rewards take every column "
                "of every row"
            )
        if require_answer and question.columns.get("answer") is None:
            raise ValueError(f"cppo.check_dataset: row {index} has no ground truth ('answer')")
        columns = names
        questions += 1
        with_images += bool(question.images)
        with_answers += question.columns.get("answer") is not None
        max_images = max(max_images, len(question.images))
        characters += sum(_characters(message["content"]) for message in question.messages)
    return DatasetSummary(
        rows, questions, with_images, with_answers, max_images, characters / questions, columns
    )


def _characters(content: str | list[dict[str, Any]]) -> int:
    if isinstance(content, str):
        return len(content)
    return sum(len(part.get("text", "")) for part in content)


def split_rows(dataset: Any, held_out: int | float, *, seed: int = 0) -> tuple[Rows, Rows]:
    """Return (training rows, held-out rows), disjoint and together everything.

    Args:
        dataset: anything with `__len__` and an integer `__getitem__`.
        held_out: number of held-out rows, or their share if below 1 (rounded).
        seed: of the shuffle; each part keeps the dataset's order.
    Raises: ValueError if either part would be empty.
    """
    total = len(dataset)
    count = round(held_out * total) if 0 < held_out < 1 else int(held_out)
    if not 0 < count < total:
        raise ValueError(
            f"cppo.split_rows: held_out must leave both parts non-empty of {total} rows, "
            f"got {held_out!r}"
        )
    chosen = set(random.Random(seed).sample(range(total), count))
    train = [i for i in range(total) if i not in chosen]
    return Rows(dataset, indices=train), Rows(dataset, indices=sorted(chosen))
