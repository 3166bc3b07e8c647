"""A first look at somebody's rows: which columns hold what, and which rows can be held out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cppo.cli.config_file import ConfigError
from cppo.cli.strict_yaml import scalar
from cppo.questions.columns import (
    KEYS,
    check_keys,
    columns_of,
    likely_column,
    named,
    value_at,
)
from cppo.questions.files import read_source, splits_of
from cppo.questions.messages import parts_of, read_messages, sequence

_LOOKED_AT = 50  # rows
_MOST_HELD_OUT = 300
_LONG = 100  # characters of an answer that no model repeats
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_HELD_OUT_SPLITS = ("test", "validation", "valid", "val", "dev", "eval", "heldout")


class Findings(NamedTuple):
    """What a recipe says of the data. Keys are None where the rows have the usual names."""

    path: str
    columns: tuple[str, ...] = ()
    rows: int = 0
    prompt_key: str | None = None
    answer_key: str | None = None
    images_key: str | None = None
    train_split: str | None = None
    eval_path: str | None = None
    eval_split: str | None = None
    skip: int = 0
    limit: int = 0
    has_images: bool = False
    is_long: bool = False

    @property
    def has_eval(self) -> bool:
        """Whether there are held-out questions."""
        return self.eval_path is not None

    def key_lines(self) -> str:
        """The lines of the keys in a recipe."""
        lines = []
        for key, column in KEYS.items():
            name, what = getattr(self, key), _WHAT[key]
            if name is not None:
                lines.append(f"    {key}: {scalar(name)} # {what}")
            elif key != "images_key" or self.has_images or not self.columns:
                lines.append(f"    # {key}: {what}, where that is not `{column}`")
        return "\n".join(lines)

    def said(self) -> list[str]:
        """What was found, in words; nothing without a look at the rows."""
        if not self.columns:
            return []
        words = [f"{self.rows} rows with the columns {', '.join(self.columns)}"]
        for key, column in KEYS.items():
            if (name := getattr(self, key)) is not None:
                words.append(f"{column}: the column {name!r} ({key})")
        if self.skip:
            words.append(f"held out: the first {self.skip} rows")
        return words


_WHAT = {
    "prompt_key": "the column of the questions, text or messages",
    "answer_key": "the column of the right answers",
    "images_key": "the column of images, or of paths relative to the file",
}


def look_at(
    data: str, eval_data: str | None, keys: Mapping[str, str | None], *, needs_answer: bool
) -> Findings:
    """Read rows and return what a recipe should say of them.

    Args:
        data: a file or folder of rows.
        eval_data: another one, of held-out questions.
        keys: columns that the user names.
        needs_answer: whether a reward compares with answers.
    Raises: ValueError, OSError or ImportError for what `cppo.questions.load_rows` cannot read, and
        for a column that is not there; ConfigError where none looks like the questions or answers.
    """
    path = Path(data).expanduser()
    train_split, eval_split = _splits(path) if path.is_dir() else (None, None)
    source = read_source(path, train_split)
    rows = [source[i] for i in range(min(_LOOKED_AT, len(source)))]
    given = named(**keys)
    check_keys(given, source, "")
    columns = list(dict.fromkeys(name for row in rows for name in columns_of(row)))
    prompt = _column("prompt_key", "questions", columns, given)
    others = [name for name in columns if name != (prompt or "prompt")]
    pictures = [name for name in others if any(_is_image(value_at(row, name)) for row in rows)]
    images = given.get("images_key") or _images_key(pictures)
    texts = [name for name in others if name not in (images, *pictures)]
    answer = _column("answer_key", "right answers", texts, given, needed=needs_answer)
    found = Findings(
        data,
        tuple(columns),
        len(source),
        prompt,
        answer,
        images,
        train_split,
        has_images=bool(pictures or images) or _has_inline(value_at(rows[0], prompt or "prompt")),
        is_long=any(len(str(value_at(row, answer or "answer"))) > _LONG for row in rows),
    )
    return _held_out(found, eval_data, eval_split)


def _column(
    key: str, what: str, columns: list[str], given: Mapping[str, str], *, needed: bool = True
) -> str | None:
    """The column for a key; None for that of the usual name."""
    if key in given:
        return given[key]
    if KEYS[key] in columns:
        return None
    likely = likely_column(key, columns)
    if likely is None and needed:
        option = f"--{key.replace('_', '-')} COLUMN"
        more = ", or take a reward that needs none: --reward" if key == "answer_key" else ""
        raise ConfigError(
            f"none of the columns {', '.join(columns) or '(none)'} looks like the {what}: name it "
            f"by {option}{more}"
        )
    return likely


def _images_key(pictures: list[str]) -> str | None:
    if not pictures or {"image", "images"} & set(pictures):
        return None
    return likely_column("images_key", pictures) or pictures[0]


def _held_out(found: Findings, eval_data: str | None, eval_split: str | None) -> Findings:
    if eval_data is not None:
        read_source(Path(eval_data).expanduser(), None)
        return found._replace(eval_path=eval_data, limit=_MOST_HELD_OUT)
    if eval_split is not None:
        return found._replace(eval_path=found.path, eval_split=eval_split, limit=_MOST_HELD_OUT)
    count = min(_MOST_HELD_OUT, found.rows // 10)
    if not count:
        return found
    own = found._replace(skip=count, limit=count)
    return own._replace(eval_path=found.path, eval_split=found.train_split)


def _splits(folder: Path) -> tuple[str | None, str | None]:
    """The training and a held-out split of a folder, as its files or `datasets` name them."""
    named = splits_of(folder, ("train", *_HELD_OUT_SPLITS))
    held_out = [name for word, name in named.items() if word != "train"]
    if "train" not in named:
        return None, None
    return named["train"], held_out[0] if held_out else None


def _is_image(value: Any) -> bool:
    several = sequence(value)
    if several is not None:
        return any(map(_is_image, several))
    if isinstance(value, Mapping):
        return value.get("bytes") is not None or _is_image(value.get("path"))
    if isinstance(value, str):
        return value.lower().endswith(_SUFFIXES) and "\n" not in value
    return isinstance(value, bytes) or hasattr(value, "getbands")  # of Pillow's images


def _has_inline(prompt: Any) -> bool:
    """Whether messages hold images."""
    try:
        messages, _ = read_messages(prompt, "")
    except ValueError:
        return False
    return any(part["type"] == "image" for part in parts_of(messages))
