r"""Loaders of GSM8K, MATH, geometry3k and ViRL39K, in their own layout or as verl prepares them.

Each returns `Rows`: a sequence of dictionaries with a `prompt` of messages and an `answer`, which
`cppo.questions.as_question` reads. Every row is checked when the files are loaded, for what can be
seen without decoding an image: the question, the answer, and that the images are there. So a row
that is drawn in training has what it needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cppo.questions.files import load_rows
from cppo.questions.layouts import Layout, Loader
from cppo.questions.rows import Rows
from cppo.rewards.answers import behind_hashes, last_boxed
from cppo.rewards.quantities import read_quantity

__all__ = ["Rows", "load_geometry3k", "load_gsm8k", "load_math", "load_rows", "load_virl39k"]

_TAGS_SYSTEM = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think>\n"
    "<answer> answer here </answer>."
)
BOXED_INSTRUCTION = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the "
    "final answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final "
    "answer MUST BE put in \\boxed{}."
)


def load_gsm8k(
    path: str | Path,
    split: str = "train",
    *,
    system_prompt: str | None = None,
    skip_bad_rows: bool = False,
) -> Rows:
    """Return GSM8K as rows of `prompt`, `answer` (a number as a string) and the file's columns.

    Args:
        path: the folder of train.parquet and test.parquet, or one file; with the columns of verl's
            preparation (prompt, reward_model) or the original's (question, answer). Of an answer
            "... #### 1,042" the number is kept, without its commas.
        split: "train" or "test", if `path` is a folder.
        system_prompt: in place of the papers' (think and answer tags).
        skip_bad_rows: leave out rows that cannot be used, with a warning, instead of raising.
    Raises: ValueError as `load_rows` does, for other columns, and for rows without a question or an
        answer: how many there are, and the first ten.
    """
    layouts = (
        Layout(("prompt", "reward_model"), {"reward_model": _final_number}),
        Layout(("question", "answer"), {"answer": _final_number}, system=_TAGS_SYSTEM),
    )
    return Loader("load_gsm8k", layouts, system_prompt, skip_bad_rows)(path, split)


def load_math(
    path: str | Path,
    split: str = "train",
    *,
    system_prompt: str | None = None,
    skip_bad_rows: bool = False,
) -> Rows:
    r"""Return MATH (or MATH-500) as rows of `prompt`, `answer` (LaTeX) and the file's columns.

    Args:
        path: a folder or file; with the columns of verl's preparation (prompt, reward_model) or the
            original's (problem, solution). A column `answer` is taken as it is. Of a ground truth
            or a solution the answer is the last `\boxed{}`; a ground truth without a box is the
            answer itself.
        split: "train" or "test", if `path` is a folder.
        system_prompt: in place of the file's own, or of the default (think tags and a box).
        skip_bad_rows: leave out rows that cannot be used, with a warning, instead of raising.
    Raises: ValueError as `load_rows` does, for other columns, and for rows without a question or an
        answer: how many there are, and the first ten.
    """
    given = {"answer": _as_it_is}
    layouts = (
        Layout(("prompt", "reward_model"), {**given, "reward_model": _boxed_or_all}),
        Layout(("problem", "solution"), {**given, "solution": _boxed}, system=BOXED_INSTRUCTION),
    )
    return Loader("load_math", layouts, system_prompt, skip_bad_rows)(path, split)


def load_geometry3k(
    path: str | Path,
    split: str = "train",
    *,
    system_prompt: str | None = None,
    min_image_side: int = 28,
    skip_bad_rows: bool = False,
) -> Rows:
    """Return geometry3k as rows of `prompt` (with <image> markers), `images` and `answer`.

    Args:
        path: the folder (of data/train-*.parquet) or a file; with the columns of the original
            (images, problem, answer) or of verl's preparation (prompt, images, reward_model).
        split: "train", "validation" or "test", if `path` is a folder.
        system_prompt: in place of the papers' instruction behind each question.
        min_image_side: images with a shorter side are enlarged to it (pixels; 0: never).
        skip_bad_rows: leave out rows that cannot be used, with a warning, instead of raising.
    Raises: ValueError as `load_rows` does, for other columns, and for rows without a question, an
        answer or an image whose first bytes are one: how many there are, and the first ten. A row
        whose image turns out to be damaged raises QuestionError when it is taken.
    """
    layouts = (
        Layout(("prompt", "images", "reward_model"), {"reward_model": _as_it_is}, images="images"),
        Layout(
            ("problem", "images", "answer"),
            {"answer": _as_it_is},
            images="images",
            instruction=BOXED_INSTRUCTION,
        ),
    )
    loader = Loader("load_geometry3k", layouts, system_prompt, skip_bad_rows, min_image_side)
    return loader(path, split)


def load_virl39k(
    path: str | Path,
    split: str = "train",
    *,
    system_prompt: str | None = None,
    image_folder: str | Path | None = None,
    single_image: bool = True,
    min_image_side: int = 28,
    skip_bad_rows: bool = False,
) -> Rows:
    r"""Return ViRL39K as rows of `prompt` (with <image> markers), `images` and `answer`.

    Args:
        path: 39Krelease.parquet or its folder; with the columns question, answer (`\boxed{}`)
            and image (a list of paths).
        split: "train", the only one there is.
        system_prompt: in place of the papers' instruction behind each question.
        image_folder: what the paths are relative to; the file's folder if left out.
        single_image: keep only rows of one image, as in arXiv 2601.00501.
        min_image_side: images with a shorter side are enlarged to it (pixels; 0: never).
        skip_bad_rows: leave out rows that cannot be used, with a warning, instead of raising.
    Raises: ValueError as `load_rows` does, for other columns, and for rows without a question, an
        answer or an image file: how many there are, and the first ten. A row whose image turns out
        to be damaged raises QuestionError when it is taken.
    """
    if split != "train":
        raise ValueError(f"cppo.load_virl39k: split must be 'train', got {split!r}")
    folder = Path(image_folder).expanduser() if image_folder else folder_of(path)
    layout = Layout(
        ("question", "answer", "image"),
        {"answer": _boxed_or_all},
        images="image",
        image_folder=folder,
        single_image=single_image,
        instruction=BOXED_INSTRUCTION,
    )
    loader = Loader("load_virl39k", (layout,), system_prompt, skip_bad_rows, min_image_side)
    return loader(path, None)


def folder_of(path: str | Path) -> Path:
    """What the paths of images in a set's files are relative to."""
    path = Path(path).expanduser()
    return path if path.is_dir() else path.parent


def _as_it_is(answer: Any) -> Any:
    return answer


def _final_number(answer: Any) -> str:
    marked = behind_hashes(str(answer))
    number = (str(answer).strip() if marked is None else marked).replace(",", "")
    if not number:
        raise ValueError(f"nothing follows the '####' of the answer {answer!r:.200}")
    if read_quantity(number) is None:
        raise ValueError(f"has no number behind '####', and is none itself: {answer!r:.200}")
    return number


def _boxed(text: Any) -> str:
    found = last_boxed(text) if isinstance(text, str) else None
    if not found:
        raise ValueError(f"has no \\boxed{{}} in {text!r:.200}")
    return found


def _boxed_or_all(text: Any) -> Any:
    found = last_boxed(text) if isinstance(text, str) else None
    if not found and "\\boxed" in str(text):
        raise ValueError(f"has a \\boxed without an answer in {text!r:.200}")
    return found or text
