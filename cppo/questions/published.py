r"""Loaders of the sets on which results are published, in the layouts of their files on the hub.

Nothing is downloaded: each takes a file or folder that the user has. The prompt is the question of
the set, its choices as lines "A. ...", what form the answer has, and the instruction to think and
to put the final answer in `\boxed{}`. Of a question with choices the ground truth is the letter,
and also the text of the choice where no other choice says the same. docs/evaluation.md has a table.

The arguments that they share:
    path: the folder of the set's files, or one file.
    split: of a folder: which files.
    system_prompt: in place of the papers' instruction.
    min_image_side: images with a shorter side are enlarged to it (pixels; 0: never).
    skip_bad_rows: leave out rows that cannot be used, with a warning, instead of raising.
They raise ValueError as `load_rows` does, for other columns, and for rows without a question, an
answer or an image that can be used: how many there are, and the first ten.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cppo.questions import published_rows as asked
from cppo.questions.layouts import Layout, Loader
from cppo.questions.loaders import BOXED_INSTRUCTION, folder_of
from cppo.questions.rows import Rows


def load_math500(
    path: str | Path,
    split: str = "test",
    *,
    system_prompt: str | None = None,
    skip_bad_rows: bool = False,
) -> Rows:
    """Return MATH-500 (HuggingFaceH4/MATH-500, test.jsonl) as rows of `prompt` and `answer`.

    The columns are problem and answer (LaTeX), as they are; solution, subject, level and unique_id
    stay in the rows. See the module for the arguments.
    """
    layout = _text("problem", "answer")
    return Loader("load_math500", (layout,), system_prompt, skip_bad_rows)(path, split)


def load_amc(
    path: str | Path,
    split: str = "test",
    *,
    system_prompt: str | None = None,
    skip_bad_rows: bool = False,
) -> Rows:
    """Return AMC 23 (math-ai/amc23) as rows of `prompt` and `answer` (a number).

    The columns are question or problem, and answer. See the module for the arguments.
    """
    layouts = _text("question", "answer"), _text("problem", "answer")
    return Loader("load_amc", layouts, system_prompt, skip_bad_rows)(path, split)


def load_aime(
    path: str | Path,
    split: str | None = None,
    *,
    system_prompt: str | None = None,
    skip_bad_rows: bool = False,
) -> Rows:
    r"""Return AIME 24 or 25 as rows of `prompt` and `answer` (a number).

    HuggingFaceH4/aime_2024 and math-ai/aime25 have the columns problem and answer, math-ai/aime24
    has problem and solution (`\boxed{204}`), opencompass/AIME2025 question and answer,
    Maxwell-Jia/AIME_2024 Problem and Answer. Their one split has several names: None takes all
    files. See the module for the arguments.
    """
    layouts = (
        *(_text("problem", "answer"), _text("problem", "solution")),
        *(_text("question", "answer"), _text("Problem", "Answer")),
    )
    return Loader("load_aime", layouts, system_prompt, skip_bad_rows)(path, split)


def load_mathvista(
    path: str | Path,
    split: str = "testmini",
    *,
    system_prompt: str | None = None,
    min_image_side: int = 28,
    skip_bad_rows: bool = False,
) -> Rows:
    """Return MathVista (AI4Math/MathVista) as rows of `prompt`, `images` and `answer`.

    The columns are question, decoded_image, choices, answer (the text of a choice, or a number or
    list), unit, precision and answer_type. The prompt says the unit and, as the set's own queries
    do, what is asked for: a letter, a whole number, a number with so many decimals, a list. The
    reward `mathvista` rounds to these decimals. The split "test" has no answers. See the module for
    the arguments.
    """
    layout = _pictures(
        ("question", "decoded_image", "answer", "choices"),
        images="decoded_image",
        reads=("choices", "answer", "unit", "precision", "answer_type"),
        ask=asked.mathvista,
    )
    return Loader("load_mathvista", (layout,), system_prompt, skip_bad_rows, min_image_side)(
        path, split
    )


def load_mathverse(
    path: str | Path,
    split: str = "testmini",
    *,
    system_prompt: str | None = None,
    min_image_side: int = 28,
    skip_bad_rows: bool = False,
) -> Rows:
    """Return MathVerse (AI4Math/MathVerse) as rows of `prompt`, `images` and `answer`.

    The columns are question (with its choices), image, answer, question_type and problem_version.
    A question of the version "Vision Only" stands in the image; one of "Text Only" has none. All
    versions are loaded: five rows per problem in testmini. See the module for the arguments.
    """
    layout = _pictures(
        ("question", "answer", "question_type", "problem_version"),
        images="image",
        reads=("answer", "question_type", "problem_version"),
        ask=asked.mathverse,
        image_folder=folder_of(path),
    )
    return Loader("load_mathverse", (layout,), system_prompt, skip_bad_rows, min_image_side)(
        path, split
    )


def load_mathvision(
    path: str | Path,
    split: str = "test",
    *,
    system_prompt: str | None = None,
    min_image_side: int = 28,
    skip_bad_rows: bool = False,
) -> Rows:
    """Return MATH-Vision (MathLLMs/MathVision) as rows of `prompt`, `images` and `answer`.

    The columns are question (with a marker <image1>), decoded_image, options and answer (a letter
    where there are options). Options that are only letters stand in the image. See the module for
    the arguments.
    """
    layout = _pictures(
        ("question", "decoded_image", "options", "answer"),
        images="decoded_image",
        reads=("options", "answer"),
        ask=asked.mathvision,
    )
    return Loader("load_mathvision", (layout,), system_prompt, skip_bad_rows, min_image_side)(
        path, split
    )


def load_logicvista(
    path: str | Path,
    split: str = "test",
    *,
    system_prompt: str | None = None,
    min_image_side: int = 28,
    skip_bad_rows: bool = False,
) -> Rows:
    """Return LogicVista (lscpku/LogicVista) as rows of `prompt`, `images` and `answer`.

    The columns are question (with its choices), image and answer: a letter, or several ("A, C").
    See the module for the arguments.
    """
    layout = _pictures(
        ("question", "image", "answer"),
        images="image",
        reads=("answer",),
        ask=asked.logicvista,
        image_folder=folder_of(path),
    )
    return Loader("load_logicvista", (layout,), system_prompt, skip_bad_rows, min_image_side)(
        path, split
    )


def load_wemath(
    path: str | Path,
    split: str = "testmini",
    *,
    system_prompt: str | None = None,
    min_image_side: int = 28,
    skip_bad_rows: bool = False,
) -> Rows:
    """Return We-Math (We-Math/We-Math) as rows of `prompt`, `images` and `answer`.

    The columns are question, option ("A. 45; B. 60; ..."), image_path (an image or its path) and
    answer (a letter). The reward is the accuracy on single questions, not the set's four-part
    metric over steps, for which the rows keep ID and key. See the module for the arguments.
    """
    layout = _pictures(
        ("question", "option", "image_path", "answer"),
        images="image_path",
        reads=("option", "answer"),
        ask=asked.wemath,
        image_folder=folder_of(path),
    )
    return Loader("load_wemath", (layout,), system_prompt, skip_bad_rows, min_image_side)(
        path, split
    )


def load_mmmu_pro(
    path: str | Path,
    split: str = "test",
    *,
    system_prompt: str | None = None,
    min_image_side: int = 28,
    skip_bad_rows: bool = False,
) -> Rows:
    """Return MMMU-Pro (MMMU/MMMU_Pro) as rows of `prompt`, `images` and `answer`.

    The path is the folder of one of its three parts: "standard (10 options)", "standard (4
    options)", with the columns question, options (a Python list as a text), answer (a letter) and
    image_1 to image_7, each image where the question or an option names it (<image 1>); or
    "vision", with image, options and answer, where question and options stand in the image. See
    the module for the arguments.
    """
    layouts = (
        _pictures(
            ("question", "options", "answer", "image_1"),
            images=tuple(f"image_{number}" for number in range(1, 8)),
            reads=("options", "answer"),
            ask=asked.mmmu_pro,
        ),
        _pictures(
            ("image", "options", "answer"),
            images="image",
            reads=("options", "answer"),
            ask=asked.mmmu_pro_vision,
        ),
    )
    return Loader("load_mmmu_pro", layouts, system_prompt, skip_bad_rows, min_image_side)(
        path, split
    )


def _text(question: str, answer: str) -> Layout:
    read = asked.boxed if answer == "solution" else asked.given
    return Layout((question, answer), {answer: read}, system=BOXED_INSTRUCTION)


def _pictures(columns: tuple[str, ...], **more: Any) -> Layout:
    return Layout(columns, instruction=BOXED_INSTRUCTION, **more)
