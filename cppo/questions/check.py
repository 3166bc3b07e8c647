"""A dataset read to its last row, before a run depends on it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cppo.questions.columns import columns_of, hint
from cppo.questions.errors import QuestionError
from cppo.questions.messages import parts_of
from cppo.questions.question import Question
from cppo.questions.rows import Dataset, question_at, require_dataset
from cppo.rewards import answer_rewards, check_ground_truth

SHOWN = 10  # bad rows that are described


class DatasetSummary(NamedTuple):
    """What `check_dataset` saw.

    Fields: rows (in the dataset), checked (rows read), with_images, with_answers (of those
        checked), max_images (of one row), mean_characters (of a prompt), columns (names),
        max_tokens (of the longest prompt; None without a processor).
    """

    rows: int
    checked: int
    with_images: int
    with_answers: int
    max_images: int
    mean_characters: float
    columns: tuple[str, ...]
    max_tokens: int | None = None


class _Row(NamedTuple):
    """What is kept of a row."""

    number: int
    images: int
    has_answer: bool
    characters: int
    tokens: int
    columns: tuple[str, ...]


def check_dataset(
    dataset: Dataset,
    *,
    limit: int | None = None,
    require_answer: bool = False,
    read_answer: bool = True,
    rewards: Sequence[Any] = (),
    processor: Any = None,
    chat_template_kwargs: Mapping[str, Any] = {},
    skip_bad_questions: bool = False,
) -> DatasetSummary:
    """Read the rows of a dataset as questions and return what they hold.

    Args:
        dataset: anything with `__len__` and an integer `__getitem__`.
        limit: check only that many rows, spread evenly; None checks all.
        require_answer: whether a row without ground truth is an error.
        read_answer: whether a ground truth must be one that `cppo.rewards` reads: text, a number
            or a list of these. A reward of your own may read anything else.
        rewards: the reward functions of a run. Those that ship here and compare answers are asked
            whether they can read every ground truth; your own are not called.
        processor: the processor or tokenizer of a model, with which each row checked is then
            encoded as in training.
        chat_template_kwargs: for the chat template, such as {"enable_thinking": False}.
        skip_bad_questions: leave out rows that are no question or cannot be encoded, as a run with
            this option does, as long as one is left.
    Returns: counts over the rows checked.
    Raises: TypeError or ValueError for an empty dataset or something else than a dataset, and for
        chat_template_kwargs that the template does not read. ValueError that says how many rows
        cannot be used, and why the first ten cannot: a row that is no question or cannot be
        encoded, a ground truth that no answer can equal or a reward refuses, none where the first
        row has one, columns other than the first row's.
    """
    require_dataset("cppo.check_dataset: dataset", dataset)
    encoder, readers = _encoder(processor, chat_template_kwargs), answer_rewards(rewards)
    total = len(dataset)
    count = total if limit is None else max(1, min(total, limit))
    good: list[_Row] = []
    bad: dict[int, str] = {}
    left_out: dict[int, str] = {}
    for index in (i * total // count for i in range(count)):
        try:
            question = question_at(dataset, index)
            first = good[0] if good else None
            _check_columns(question, first)
            needs_answer = require_answer or bool(readers) or bool(first and first.has_answer)
            _check_answer(question.columns, needs_answer, read_answer, readers)
            tokens = len(encoder(question).input_ids) if encoder else 0
        except (TypeError, ValueError) as error:
            may_go = skip_bad_questions and isinstance(error, QuestionError)
            (left_out if may_go else bad)[index] = str(error)
        else:
            good.append(_row(index, question, tokens))
    if bad or not good:
        bad = bad or left_out
        raise ValueError(f"cppo.check_dataset: {describe_bad_rows(bad, count)}")
    return DatasetSummary(
        total,
        count,
        sum(row.images > 0 for row in good),
        sum(row.has_answer for row in good),
        max(row.images for row in good),
        sum(row.characters for row in good) / len(good),
        good[0].columns,
        max(row.tokens for row in good) if encoder else None,
    )


def _encoder(processor: Any, chat_template_kwargs: Mapping[str, Any]) -> Any:
    """The trainer's encoder of a question; None without a processor."""
    if processor is None:
        return None
    from cppo.model.prompts import PromptEncoder  # torch and transformers: rows do not need them

    return PromptEncoder(processor, chat_template_kwargs)


def describe_bad_rows(bad: Mapping[int, str], count: int) -> str:
    """Return how many of `count` rows are bad, and the first of them with their reasons."""
    lines = []
    for index, reason in list(bad.items())[:SHOWN]:
        # The reasons name their own function and, mostly, the row.
        words = reason.split(f"row {index}: ", 1)[-1]
        lines.append(f"row {index}: {words}")
    if len(bad) > SHOWN:
        lines.append(f"and {len(bad) - SHOWN} more, up to row {max(bad)}")
    return f"{len(bad)} of {count} rows read cannot be used:\n  " + "\n  ".join(lines)


def _check_columns(question: Question, first: _Row | None) -> None:
    names = _columns(question)
    if first is not None and names != first.columns:
        raise ValueError(
            f"has the columns {', '.join(names) or 'none'}, row {first.number} has "
            f"{', '.join(first.columns) or 'none'}; rewards take every column of every row"
        )


def _columns(question: Question) -> tuple[str, ...]:
    """The columns that every row must have: images may be those of some rows only."""
    return tuple(sorted(name for name in question.columns if name not in ("image", "images")))


def _check_answer(
    columns: Mapping[str, Any], required: bool, read: bool, readers: Sequence[Any]
) -> None:
    answer = columns.get("answer")
    if answer is None and required and (read or readers):
        near = hint("answer_key", (name for name in columns_of(columns) if name != "answer"))
        raise ValueError(f"has no ground truth ('answer'){near}")
    if answer is not None and read:
        check_ground_truth(answer)
    for reader in readers:
        try:
            reader([""], answer=[answer])
        except ValueError as error:
            raise ValueError(re.sub(r"completion 0:? ", "", str(error))) from error


def _row(index: int, question: Question, tokens: int) -> _Row:
    texts = [part["text"] for part in parts_of(question.messages) if part["type"] == "text"]
    return _Row(
        index,
        len(question.images),
        question.columns.get("answer") is not None,
        sum(map(len, texts)),
        tokens,
        _columns(question),
    )
