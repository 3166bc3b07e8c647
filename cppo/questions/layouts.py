"""How a named data set is read: which columns hold what, and every row looked at when it loads."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from cppo.questions.check import describe_bad_rows
from cppo.questions.files import column, read_source, with_system
from cppo.questions.images import load_images, numbered
from cppo.questions.messages import IMAGE_MARKER, each, place_images, read_messages, sequence
from cppo.questions.rows import Rows
from cppo.rewards import check_ground_truth


class Asked(NamedTuple):
    """What a row asks, where that is made of several of its columns.

    Fields: question, a text or messages; answer; images: the columns of its images in the order of
        their markers, None for those of the layout.
    """

    question: Any
    answer: Any = None
    images: tuple[str, ...] | None = None


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
        images: the column of images or their paths, or several such columns.
        image_folder: what paths are relative to.
        single_image: take only rows of one image.
        ask: makes question and answer of a row, given as the columns of `reads`, `answers`, the
            question and the images; it raises ValueError for a row that it cannot use. None: the
            question is the first column, and `answers` reads the answer.
        reads: further columns, which a file may have, for `ask`.
    """

    columns: tuple[str, ...]
    answers: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    system: str | None = None
    instruction: str = ""
    images: str | tuple[str, ...] | None = None
    image_folder: Path = Path()
    single_image: bool = False
    ask: Callable[[Mapping[str, Any]], Asked] | None = None
    reads: tuple[str, ...] = ()

    @property
    def image_columns(self) -> tuple[str, ...]:
        """The columns of images; none for a data set of text."""
        return (self.images,) if isinstance(self.images, str) else self.images or ()


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
                named = read.images.get(index, layout.image_columns)
                sources = numbered(_sources(row, named, layout.image_folder))
                row = {name: row[name] for name in row if name not in layout.image_columns}
                if "image" in row:  # the path of what another column holds
                    row["image_name"] = row.pop("image")
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
        ask = layout.ask or (lambda row: Asked(row[layout.columns[0]]))
        names = (layout.columns[0], *layout.answers, *layout.reads, *layout.image_columns)
        columns = {name: column(source, name) for name in names}
        for index in range(len(source)):
            row = {name: values[index] for name, values in columns.items()}
            sources = _sources(row, layout.image_columns, layout.image_folder)
            if layout.single_image and len(sources) != 1:
                continue
            read.kept.append(index)
            try:
                asked = ask(row)
                if asked.images is not None:
                    read.images[index] = asked.images
                    sources = _sources(row, asked.images, layout.image_folder)
                read.prompts[index] = self._prompt(asked.question, len(sources), layout)
                read.answers[index] = asked.answer if layout.ask else _answer(row, layout)
                check_ground_truth(read.answers[index])
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
    images: dict[int, tuple[str, ...]] = field(default_factory=dict)  # where `ask` names columns
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


def _sources(row: Mapping[str, Any], columns: Iterable[str], folder: Path) -> list[Any]:
    """The images of some columns of a row, paths with their folder."""
    listed: list[Any] = []
    for name in columns:
        stored = row.get(name)
        several = sequence(stored)
        listed += ([] if stored is None else [stored]) if several is None else several
    return [str(folder / source) if isinstance(source, str) else source for source in listed]


def _answer(row: Mapping[str, Any], layout: Layout) -> Any:
    for name, read in layout.answers.items():
        value = row.get(name)
        if name == "reward_model" and isinstance(value, Mapping):
            value = value.get("ground_truth")
        if value is not None:
            return each(read, value)
    raise ValueError(f"has no answer; looked in {', '.join(layout.answers)}")
