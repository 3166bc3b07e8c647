"""Datasets: anything with a length whose rows are taken by number."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from cppo.questions.errors import QuestionError
from cppo.questions.question import Question, as_question

Convert = Callable[[dict[str, Any], int], dict[str, Any]]


class Dataset(Protocol):
    """Rows by number: a list of dicts, a `datasets.Dataset`, anything alike."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


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
        if self._convert is None or not isinstance(row, Mapping):  # `as_question` refuses others
            return row
        return self._convert(dict(row), position)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[position] for position in range(len(self)))

    def __repr__(self) -> str:
        return f"Rows({len(self)} rows)"


def require_dataset(name: str, dataset: Any) -> None:
    """Raise TypeError for what is no dataset, ValueError for one without rows."""
    is_one = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    got = type(dataset).__name__
    if not is_one or isinstance(dataset, (str, bytes, Mapping)) or got == "DataFrame":
        if got == "DataFrame":
            got += "; take its to_dict('records')"
        elif isinstance(dataset, Mapping):
            got += f" of {', '.join(map(str, dataset)) or 'nothing'}; take one of them"
        raise TypeError(
            f"{name} must have __len__ and an integer __getitem__ (a list of rows, a "
            f"datasets.Dataset), got {got}"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} must have rows, got none")


def question_at(dataset: Dataset, index: int) -> Question:
    """Return a row of a dataset as a question.

    Raises: as `as_question`; QuestionError also for a row that the dataset itself cannot give, such
        as an image that `datasets` decodes when the row is taken.
    """
    try:
        row = dataset[index]
    except QuestionError:
        raise
    except Exception as error:  # datasets and their conversions are other people's code
        raise QuestionError(
            f"cppo.as_question: row {index}: the dataset cannot give it: "
            f"{type(error).__name__}: {error}"
        ) from error
    return as_question(row, index)


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
