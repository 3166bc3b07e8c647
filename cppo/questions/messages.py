"""The prompt of a row as chat messages, and where its images stand in them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from cppo.questions.errors import QuestionError
from cppo.questions.images import decode_base64

ROLES = ("system", "developer", "user", "assistant", "tool")
IMAGE_MARKER = "<image>"
# Where an image part holds its image, in transformers' words.
_IMAGE_KEYS = ("image", "url", "path", "base64")

Messages = list[dict[str, Any]]
Sources = dict[str, Any]


def sequence(value: Any) -> list[Any] | None:
    """A list, a tuple or a numpy array of objects (what pandas reads) as a list, else None."""
    if isinstance(value, (list, tuple)):
        return list(value)
    is_array = type(value).__name__ == "ndarray" and value.ndim > 0
    return list(value) if is_array and (value.dtype.kind in "OUS" or value.shape == (0,)) else None


def each(function: Callable[[Any], Any], value: Any) -> Any:
    """The function of a value, or of each element of a sequence."""
    several = sequence(value)
    return function(value) if several is None else [function(one) for one in several]


def read_messages(prompt: Any, where: str) -> tuple[Messages, Sources]:
    """Return messages with `<image>` markers turned into parts, and the images given inside them.

    The images are what `load_image` reads, by a name that says where they stand. A message keeps
    what a chat template may read (tool_calls, name, reasoning_content); what is None in it is
    dropped, as transformers does. Raises: QuestionError that begins with `where`.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    inline: Sources = {}
    try:
        messages = _messages(prompt, inline)
    except QuestionError as error:
        raise QuestionError(f"{where}{error}") from None
    return messages, inline


def place_images(messages: Messages, count: int, where: str) -> None:
    """Put images that no part marks before the first user text.

    Raises: QuestionError that begins with `where`, if parts and images disagree in number or the
    messages have neither text nor an image.
    """
    marked = sum(part["type"] == "image" for part in parts_of(messages))
    texts = [part["text"] for part in parts_of(messages) if part["type"] == "text"]
    if not count and not marked and not "".join(texts).strip():
        raise QuestionError(f"{where}prompt asks nothing: it has neither text nor an image")
    if marked == 0 and count:
        for message in messages:
            if message["role"] == "user":
                text = message["content"]
                rest = text if isinstance(text, list) else [{"type": "text", "text": text}]
                message["content"] = [{"type": "image"} for _ in range(count)] + rest
                return
        raise QuestionError(f"{where}has {count} images but no user message to put them in")
    if marked != count:
        raise QuestionError(
            f"{where}the messages mark {marked} images ({IMAGE_MARKER} or image parts), "
            f"the row has {count}"
        )


def parts_of(messages: Messages) -> list[dict[str, Any]]:
    """The text and image parts of all messages, in order; a plain text is one part."""
    return [
        part
        for message in messages
        for part in (
            message["content"]
            if isinstance(message["content"], list)
            else [{"type": "text", "text": message["content"]}]
        )
    ]


def texts_of(content: str | list[dict[str, Any]]) -> list[str]:
    """The texts of a content; text parts that follow each other are one."""
    if isinstance(content, str):
        return [content]
    runs = itertools.groupby(content, key=lambda part: part["type"] == "text")
    return ["".join(part["text"] for part in run) for is_text, run in runs if is_text]


def strings_in(message: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a message and all strings of what else a template may read of it."""
    yield from texts_of(message["content"])
    stack = [value for key, value in message.items() if key not in ("role", "content")]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, (list, tuple)):
            stack += value


def question_text(messages: Messages) -> str:
    """The text of the last message, without its images."""
    return " ".join(texts_of(messages[-1]["content"]))


def with_last_text(message: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The message with its last text changed; one is added where there is none."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": change(content)}
    places = [i for i, part in enumerate(content) if part["type"] == "text"]
    place = places[-1] if places else len(content)
    text = content[place]["text"] if places else ""
    part = {"type": "text", "text": change(text)}
    return {**message, "content": [*content[:place], part, *content[place + 1 :]]}


def with_images(messages: Messages, images: Iterable[Any]) -> Messages:
    """The messages with the images in their parts, where transformers looks for them."""
    left = iter(images)

    def filled(content: Any) -> Any:
        if isinstance(content, str):
            return content
        return [
            {**part, "image": next(left)} if part["type"] == "image" else part for part in content
        ]

    return [{**message, "content": filled(message["content"])} for message in messages]


def _messages(prompt: Any, inline: Sources) -> Messages:
    given = sequence(prompt)
    if given is None:
        raise QuestionError(f"prompt must be a string or messages, got {type(prompt).__name__}")
    if not given:
        raise QuestionError("prompt has no messages")
    return [_message(message, inline, f"prompt[{i}]") for i, message in enumerate(given)]


def _message(message: Any, inline: Sources, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise QuestionError(f"{place} must have 'role' and 'content', got {message!r:.200}")
    given = {key: value for key, value in message.items() if value is not None}
    calls_tools = given.get("role") == "assistant" and "tool_calls" in given
    if "role" not in message or ("content" not in message and not calls_tools):
        raise QuestionError(f"{place} must have 'role' and 'content', got {message!r:.200}")
    if given.get("role") not in ROLES:
        raise QuestionError(
            f"{place}: role must be one of {', '.join(ROLES)}, got {message['role']!r}"
        )
    content = given.get("content", "" if calls_tools else None)
    return {**given, "content": _content(content, inline, place)}


def _content(content: Any, inline: Sources, place: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return _split_markers(content)
    parts = sequence(content)
    if parts is None:
        raise QuestionError(
            f"{place}: content must be a string or a list of parts, got {content!r:.200}"
        )
    return [_part(part, inline, f"{place} part {i}") for i, part in enumerate(parts)]


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


def _part(part: Any, inline: Sources, place: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":  # OpenAI's form: {"image_url": {"url": ...}}
        address = part.get("image_url")
        part = {"url": address.get("url") if isinstance(address, Mapping) else address}
        if not isinstance(part["url"], str):
            raise QuestionError(f"{place}: image_url must hold an address, got {address!r:.200}")
    if kind in ("image", "image_url"):
        sources = {key: part[key] for key in _IMAGE_KEYS if part.get(key) is not None}
        if len(sources) > 1:
            raise QuestionError(f"{place} must hold one image, got {' and '.join(sources)}")
        for key, source in sources.items():
            inline[f"image {len(inline)} ({place})"] = (
                _decoded(source, place) if key == "base64" else source
            )
        return {"type": "image"}
    raise QuestionError(
        f"{place}: a part must be {{'type': 'text', 'text': ...}}, {{'type': 'image'}} (with "
        f"'image', 'url', 'path' or 'base64', or without) or an image_url, got {part!r:.200}"
    )


def _decoded(source: Any, place: str) -> Any:
    """The bytes of a base64 text; a `data:` address as it is."""
    if isinstance(source, str) and source.startswith("data:"):
        return source
    decoded = decode_base64(source) if isinstance(source, str) else None
    if not decoded:
        raise QuestionError(f"{place}: base64 must be the text of an image, got {source!r:.100}")
    return decoded
