"""One dataset row in TRL's or verl's format as a question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image

from cppo.questions.errors import QuestionError
from cppo.questions.images import load_images, numbered
from cppo.questions.messages import Messages, place_images, read_messages, sequence

# Keyword arguments that rewards are given besides the columns, here or by TRL.
_RESERVED = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_metric",
    "log_extra",
    "generation_prompts",
    "group_size",
)
_UNREAD = ("videos", "audios")  # verl's columns


class Question(NamedTuple):
    """One question, as the trainer asks it.

    Fields:
        messages: chat messages; a content is a string, or a list of {"type": "image"} and
            {"type": "text", "text": ...} parts where there are images.
        images: upright RGB or L images, in the order of the image parts.
        columns: every column of the row but the prompt, `image` and `images` as they stand; the
            ground truth is columns["answer"].
        is_conversational: whether the row's prompt was messages; False for a string, which stands
            in one user message here. Rewards are called accordingly, as TRL calls them.
        row: its number in the dataset, named in errors; None where it is not known.
    """

    messages: Messages
    images: list[Image.Image]
    columns: dict[str, Any]
    is_conversational: bool = True
    row: int | None = None


def as_question(row: Any, index: int | None = None, *, min_image_side: int = 0) -> Question:
    r"""Return a dataset row as a Question.

    Args:
        row: a mapping in TRL's format (`prompt`: a string or messages; `image` or `images`) or
            verl's (`<image>` markers in the content, `reward_model.ground_truth`). Images stand in
            a column or inside the messages ({"type": "image", "image" | "url" | "path" | "base64":
            ...}, {"type": "image_url", ...}) in any form that `load_image` reads; those of a column
            without any marker or image part go before the first user text.
        index: position in the dataset, named in errors.
        min_image_side: images with a shorter side are enlarged to it, in proportion (pixels; 0
            leaves them alone; the Qwen-VL families need 28).
    Returns: a Question; `answer` comes from the column `answer`, else `reward_model.ground_truth`,
        else `solution`, and is taken as it is; absent where none of them is.
    Raises: TypeError for a row that is no mapping; QuestionError (a ValueError) naming the row: no
        prompt, a prompt without text and image, malformed messages, an unknown role, markers and
        images that disagree in number, an image that cannot be read, videos or sounds, a column
        that has the name of a reward's own argument.
    """
    where = "cppo.as_question: " + (f"row {index}: " if index is not None else "")
    if not isinstance(row, Mapping):
        raise TypeError(f"{where}expected a mapping, got {type(row).__name__}")
    prompt = row.get("prompt")
    if prompt is None:
        raise QuestionError(
            f"{where}has no 'prompt' (columns: {', '.join(map(str, row)) or 'none'})"
        )
    messages, inline = read_messages(prompt, where)
    column = _image_column(row, where)
    if inline and column:
        raise QuestionError(f"{where}images stand both in the messages and in a column; keep one")
    sources = inline or numbered(column)
    place_images(messages, len(sources), where)
    return Question(
        messages,
        load_images(sources, where, min_image_side),
        _columns(row, where),
        not isinstance(prompt, str),
        index,
    )


def _image_column(row: Mapping[str, Any], where: str) -> list[Any]:
    given = {name: row[name] for name in ("image", "images") if row.get(name) is not None}
    if len(given) == 2:
        raise QuestionError(f"{where}has both 'image' and 'images'; keep one")
    for value in given.values():
        several = sequence(value)
        if several is None and getattr(value, "ndim", 0) == 4:  # one numeric array of N images
            several = list(value)
        return [value] if several is None else several
    return []


def _columns(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    columns = {name: value for name, value in row.items() if name != "prompt"}
    for name in _RESERVED:
        if name in columns:
            raise QuestionError(f"{where}the column {name!r} is an argument of rewards; rename it")
    for name in _UNREAD:
        if sequence(columns.get(name)):
            raise QuestionError(f"{where}has {name}, which no model here is given")
    answer = columns.get("answer")
    if answer is None and isinstance(columns.get("reward_model"), Mapping):
        answer = columns["reward_model"].get("ground_truth")
    if answer is None:
        answer = columns.get("solution")
    if answer is not None:
        columns["answer"] = answer
    return columns
