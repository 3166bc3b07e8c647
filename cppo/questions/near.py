"""Paths of images in the rows of a file, which its author wrote relative to the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cppo.questions.errors import QuestionError
from cppo.questions.images import is_relative_path
from cppo.questions.messages import each, sequence

_IN_PARTS = ("image", "path", "url", "image_url")


def images_near(row: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Return a row whose relative paths of images can be opened from the working directory.

    Args:
        row: with images in `image`, `images` or the messages of `prompt`, or without.
        folder: of the row's file. A path that is not there is looked for in the working directory.
        where: the beginning of error messages.
    Raises: QuestionError for a file that is in neither of them.
    """

    def near(source: Any) -> Any:
        return _near(source, folder, where)

    def part(one: Any) -> Any:
        if not isinstance(one, Mapping):
            return one
        return {**one, **{name: near(one[name]) for name in _IN_PARTS if name in one}}

    def message(one: Any) -> Any:
        parts = sequence(one.get("content")) if isinstance(one, Mapping) else None
        return one if parts is None else {**one, "content": [part(p) for p in parts]}

    changed: dict[str, Any] = {
        name: each(near, row[name]) for name in ("image", "images") if name in row
    }
    messages = sequence(row.get("prompt"))
    if messages is not None:
        changed["prompt"] = [message(one) for one in messages]
    return {**row, **changed}


def _near(source: Any, folder: Path, where: str) -> Any:
    if isinstance(source, Mapping):
        held = {name: source[name] for name in ("path", "url") if source.get(name)}
        if source.get("bytes"):
            return source
        return {**source, **{name: _near(path, folder, where) for name, path in held.items()}}
    if not isinstance(source, str) or not is_relative_path(source):
        return source
    beside = os.path.join(folder, source)
    for path in (beside, source):
        if os.path.isfile(path):
            return path
    here = Path.cwd()
    places = f"in {here}" if folder.resolve() == here else f"neither in {folder} nor in {here}"
    raise QuestionError(f"{where}there is no file {source[:200]}, {places}")
