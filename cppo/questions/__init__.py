"""Questions: dataset rows in TRL's or verl's format, read into one shape.

    row -> Question(messages, images, columns)

A dataset is anything with `__len__` and an integer `__getitem__` that gives rows: a list of
dictionaries, a `datasets.Dataset`, or what the loaders of `cppo.questions.loaders` return.
"""

from __future__ import annotations

from cppo.questions.check import DatasetSummary, check_dataset
from cppo.questions.columns import rename_columns
from cppo.questions.errors import QuestionError
from cppo.questions.images import load_image, thumbnails
from cppo.questions.loaders import (
    load_geometry3k,
    load_gsm8k,
    load_math,
    load_rows,
    load_virl39k,
)
from cppo.questions.messages import question_text
from cppo.questions.published import (
    load_aime,
    load_amc,
    load_logicvista,
    load_math500,
    load_mathverse,
    load_mathvision,
    load_mathvista,
    load_mmmu_pro,
    load_wemath,
)
from cppo.questions.question import Question, as_question
from cppo.questions.rows import Rows, split_rows

__all__ = [
    "DatasetSummary",
    "Question",
    "QuestionError",
    "Rows",
    "as_question",
    "check_dataset",
    "load_aime",
    "load_amc",
    "load_geometry3k",
    "load_gsm8k",
    "load_image",
    "load_logicvista",
    "load_math",
    "load_math500",
    "load_mathverse",
    "load_mathvision",
    "load_mathvista",
    "load_mmmu_pro",
    "load_rows",
    "load_virl39k",
    "load_wemath",
    "question_text",
    "rename_columns",
    "split_rows",
    "thumbnails",
]
