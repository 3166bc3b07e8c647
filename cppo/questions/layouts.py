"""How a named data set is read: which columns hold what, and every row looked at when it loads."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from cppo.questions.check import describe_bad_rows
from cppo.questions.files import column, read_source, with_system
from cppo.questions.images import load_images, numbered
from cppo.questions.messages import IMAGE_MARKER, each, place_images, read_messages, sequence
from cppo.questions.rows import Rows
from cppo.rewards import check_ground_truth


@dataclass(frozen=True)
class Layout:
    """The columns of one form of a data set.

    Args:
        columns: those that a file must have; the first holds the question, a text or messages.
        answers: what reads the answer in a column, or each of a list of answers; the first column
            that a row has decides. It raises ValueError for a value without an answer. Of verl's
            `reward_model` it is given the `ground_truth`.
        system: the system prompt where the user gives none; None: what the file has.
        instruction: behind each question where the user gives no system prompt.
        images: the column of images or their paths.
        image_folder: what paths are relative to.
        single_image: take only rows of one image.
    """

    columns: tuple[str, ...]
    answers: Mapping[str, Callable[[Any], Any]]
    system: str | None = None
    instruction: str = ""
    images: str | None = None
    image_folder: Path = Path()
    single_image: bool = False


@dataclass(frozen=True)
class Loader:
    """Reads a data set of one of several layouts; calling it gives its `Rows`.

    Args:
        name: of the public function, for errors.
        layouts: in order of preference.
        system_prompt, skip_bad_rows, min_image_side: as the public functions have them.
    """

    name: str
    layouts: tuple[Layout, ...]
    system_prompt: str | None
    skip_bad_rows: bool
    min_image_side: int = 0

    def __call__(self, path: str | Path, split: str | None) -> Rows:
        source = read_source(Path(path).expanduser(), split)
        layout = self._layout(source[0])
        read = self._read(source, layout)
        if not read.kept:
            raise ValueError(f"cppo.{self.name}: {path} has no row of one image")
        if read.bad:
            words = f"cppo.{self.name}: {describe_bad_rows(read.bad, len(read.kept))}"
            if not self.skip_bad_rows or len(read.bad) == len(read.kept):
                raise ValueError(f"{words}\nskip_bad_rows=True leaves them out")
            warnings.warn(f"{words}\nThey are left out.", stacklevel=3)

        def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
            if layout.images:
                sources = numbered(_sources(row.pop(layout.images), layout.image_folder))
                where = f"cppo.{self.name}: row {index}: "
                row["images"] = load_images(sources, where, self.min_image_side)
            return {**row, "prompt": read.prompts[index], "answer": read.answers[index]}

        return Rows(source, convert, [i for i in read.kept if i not in read.bad])

    def _layout(self, first: Mapping[str, Any]) -> Layout:
        for layout in self.layouts:
            if all(name in first for name in layout.columns):
                return layout
        expected = " or ".join(" + ".join(layout.columns) for layout in self.layouts)
        raise ValueError(
            f"cppo.{self.name}: expected the columns {expected}, got {', '.join(first) or 'none'}"
        )

    def _read(self, source: Any, layout: Layout) -> _Read:
        read, folders = _Read(), _Folders()
        questions = column(source, layout.columns[0])
        answers = {name: column(source, name) for name in layout.answers}
        images = column(source, layout.images) if layout.images else [None] * len(questions)
        for index, (question, stored) in enumerate(zip(questions, images, strict=True)):
            sources = _sources(stored, layout.image_folder)
            if layout.single_image and len(sources) != 1:
                continue
            read.kept.append(index)
            try:
                read.prompts[index] = self._prompt(question, len(sources), layout)
                values = {name: column[index] for name, column in answers.items()}
                read.answers[index] = _answer(values, layout)
                for number, image in enumerate(sources):
                    folders.check(image, f"image {number}: ")
            except ValueError as error:
                read.bad[index] = str(error)
        return read

    def _prompt(self, question: Any, num_images: int, layout: Layout) -> list[dict[str, Any]]:
        """The messages of a question, with as many markers as images."""
        if isinstance(question, str) and question.strip():
            if IMAGE_MARKER not in question and num_images:
                question = IMAGE_MARKER * num_images + "\n" + question
            if layout.instruction and self.system_prompt is None:
                question = f"{question} {layout.instruction}"
            question = [{"role": "user", "content": question}]
        messages, _ = read_messages(question, "")
        place_images(messages, num_images, "")
        system_prompt = layout.system if self.system_prompt is None else self.system_prompt
        return with_system({"prompt": question}, system_prompt)["prompt"]


@dataclass(frozen=True)
class _Read:
    """What was read when the files were loaded, by row."""

    kept: list[int] = field(default_factory=list)
    prompts: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    answers: dict[int, Any] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)


class _Folders:
    """Which image files there are: each folder is listed once, 39,000 files in a tenth of a second.

    Opening every file would take four seconds from a warm disk and minutes from a network's. Images
    that are stored in the rows are at hand: their headers are read.
    """

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def check(self, source: Any, where: str) -> None:
        """Raise ValueError for a file that is not there and for bytes that are no image's."""
        if isinstance(source, Mapping):
            source = source.get("bytes") or source.get("path")
        if isinstance(source, bytes):
            try:
                Image.open(io.BytesIO(source)).close()
            except Exception as error:  # as in load_image
                raise ValueError(f"{where}cannot read the image: {error}") from error
        elif isinstance(source, (str, os.PathLike)):
            folder, name = os.path.split(source)
            if "://" not in folder and name not in self._listed(folder):
                raise ValueError(f"{where}there is no file {source}")
        else:
            raise ValueError(f"{where}must be a path or bytes, got {type(source).__name__}")

    def _listed(self, folder: str) -> set[str]:
        if folder not in self._names:
            try:
                self._names[folder] = set(os.listdir(folder or "."))
            except OSError:
                self._names[folder] = set()
        return self._names[folder]


def _sources(stored: Any, folder: Path) -> list[Any]:
    several = sequence(stored)
    listed = ([] if stored is None else [stored]) if several is None else several
    return [str(folder / source) if isinstance(source, str) else source for source in listed]


def _answer(values: Mapping[str, Any], layout: Layout) -> Any:
    for name, read in layout.answers.items():
        value = values.get(name)
        if name == "reward_model" and isinstance(value, Mapping):
            value = value.get("ground_truth")
        if value is not None:
            answer = each(read, value)
            check_ground_truth(answer)
            return answer
    raise ValueError(f"has no answer; looked in {', '.join(values)}")
