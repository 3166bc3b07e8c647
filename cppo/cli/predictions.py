"""The predictions of an evaluation: one JSON line per completion.

NAME.jsonl            the newest evaluation that has ended, whole
NAME.jsonl.partial    the batches of one that has not ended: it goes on from there when it is
                      started again with the same settings, weights and files
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cppo.cli.config_file import ConfigError, plain
from cppo.cli.run_config import LOADERS, DatasetConfig, RunConfig
from cppo.questions import Question
from cppo.questions.messages import IMAGE_MARKER, sequence
from cppo.rewards.reading import Reading
from cppo.train.progress import as_json

_OF_ROWS = ("mode", "sample", "answer", "completion", "generation_prompt", "tokens", "truncated")
_IMAGES = ("image", "images", "image_name")


def part_of(data: DatasetConfig) -> str:
    """Which part of a set is asked: its split, and from which row on; "" for all of it."""
    return (data.split or "") + (f"[{data.skip}:]" if data.skip else "")


def default_name(data: DatasetConfig) -> str:
    """The file of a data set: two sets, or two parts of one, have different files."""
    name = data.loader
    if data.path is not None and data.loader not in LOADERS or data.loader == "rows":
        name = Path(str(data.path)).stem
    parts = [name, part_of(data)]
    words = "_".join(re.sub(r"\W+", "-", part).strip("-") for part in parts if part)
    return f"predictions_{words}.jsonl"


def fingerprint(config: RunConfig, dataset: str, model: Path | None, code: Iterable[str]) -> str:
    """What an evaluation depends on: its settings, and size and time of the files it reads.

    Args:
        config: with everything that the command line set.
        dataset: "train" or "eval".
        model: the checkpoint; None: the configured weights.
        code: files of the user's functions.
    """
    data = getattr(config.data, dataset)
    given = [model, config.model.path, data.path, *code]  # adapters have the weights of both
    files = {str(path): _state(Path(path).expanduser()) for path in given if path is not None}
    settings = {"config": as_json(plain(config)), "dataset": dataset, "files": files}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _state(path: Path) -> list[Any]:
    """Size and time of a file, or of those in a folder and in the folders that it holds."""
    try:
        below = [file for form in ("*", "*/*") for file in path.glob(form)]
        found = [(file.relative_to(path), file) for file in sorted(below) or [path]]
        return [
            [name.as_posix(), file.stat().st_size, file.stat().st_mtime_ns]
            for name, file in found
            if file.is_file()
            and not any(part.startswith(".") for part in name.parts)
            and not file.name.startswith(("predictions_", "eval.csv"))
        ]
    except OSError:  # what cannot be read is refused by those that need it
        return []


class Predictions:
    """The finished batches of `cppo.train.evaluate.evaluate`, which become the file of predictions.

    Args:
        path: the file.
        model: its name, for each line.
        samples: completions per question, by mode.
        settings: the `fingerprint`: an unfinished file is gone on with where it has the same.
        reading: of the reward that says what is right; None: no line has `extracted`.
    Raises: ConfigError for a file that cannot be written.
    """

    def __init__(
        self,
        path: Path,
        model: str,
        samples: Mapping[str, int],
        settings: str,
        reading: Reading | None,
    ) -> None:
        self.path, self._model, self._samples, self._reading = path, model, samples, reading
        self._partial = path.parent / f"{path.name}.partial"
        self._lines: dict[tuple[str, int, int], dict[str, Any]] = {}
        self._begins = header = json.dumps({"evaluation": settings}).encode() + b"\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            before = self._partial.read_bytes() if self._partial.is_file() else b""
            whole = before[: before.rfind(b"\n") + 1]
            with self._partial.open("ab"):  # whether it can be written is said now
                pass
            if not before:
                self._partial.unlink()
            if whole.startswith(header) and self._read(whole[len(header) :]):
                self._begins = whole
        except OSError as error:
            raise self._refused(error) from None
        self.resumed = len(self._lines)

    def _read(self, text: bytes) -> bool:
        """Whether the lines of an unfinished file are those that were written."""
        try:
            lines = [json.loads(line) for line in text.split(b"\n") if line]
            self._lines = {_key(line): line for line in lines if _row(line)}
        except (ValueError, KeyError, TypeError, AttributeError):  # somebody else's, or damaged
            return False
        return True

    def _refused(self, error: OSError) -> ConfigError:
        return ConfigError(f"--predictions: {self.path} cannot be written ({error.strerror})")

    def rows_of(self, mode: str, ids: Sequence[int]) -> list[dict[str, Any]] | None:
        """The rows of a batch that an earlier start has finished; None without one of them."""
        keys = [(mode, row, sample) for row in ids for sample in range(self._samples[mode])]
        if any(key not in self._lines for key in keys):
            return None
        return [_row(self._lines[key]) for key in keys]

    def add(self, rows: list[dict[str, Any]], questions: Sequence[Question]) -> None:
        """Write the rows of a batch; when this returns, killing the process does not lose them."""
        per_question = len(rows) // len(questions)
        lines = [self._line(row, questions[i // per_question]) for i, row in enumerate(rows)]
        try:
            if self._begins:  # without the line that was torn, or another evaluation's
                self._partial.write_bytes(self._begins)
            with self._partial.open("ab") as file:
                file.write(b"".join(map(_bytes, lines)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._refused(error) from error
        self._begins = b""
        self._lines |= {_key(line): line for line in lines}

    def finish(self) -> None:
        """Put the whole file in the place of an earlier evaluation's."""
        order = {mode: place for place, mode in enumerate(self._samples)}
        lines = sorted(self._lines.items(), key=lambda item: (order[item[0][0]], *item[0][1:]))
        whole = self.path.parent / f"{self.path.name}.new"
        try:
            whole.write_bytes(b"".join(_bytes(self._with_answer(line)) for _, line in lines))
            os.replace(whole, self.path)
            self._partial.unlink(missing_ok=True)
        except OSError as error:  # the batches are still there
            whole.unlink(missing_ok=True)
            raise self._refused(error) from error

    def _line(self, row: dict[str, Any], question: Question) -> dict[str, Any]:
        line: dict[str, Any] = {
            "model": self._model,
            "row": row["question"],
            "question": _text(question),
            "images": _image_names(question),
            **{name: row[name] for name in _OF_ROWS},
            "finish_reason": "length" if row["truncated"] else "stop",
            "rewards": {name: _known(value) for name, value in row["rewards"].items()},
            "columns": _plain_columns(question.columns),
        }
        plain_line: dict[str, Any] = as_json(line)
        return plain_line

    def _with_answer(self, line: dict[str, Any]) -> dict[str, Any]:
        """A line with what was judged: an earlier start may have asked another reward."""
        if self._reading is None:
            return line
        judged = self._reading.extract(line["completion"], line["generation_prompt"])
        return {**line, "extracted": judged}


def _key(line: Mapping[str, Any]) -> tuple[str, int, int]:
    return line["mode"], line["row"], line["sample"]


def _bytes(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _known(reward: float) -> float | None:
    return None if math.isnan(reward) else reward


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    """The row of `evaluate` that a line was made of."""
    rewards = {name: math.nan if r is None else r for name, r in line["rewards"].items()}
    row = {name: line[name] for name in _OF_ROWS}
    return {**row, "question": line["row"], "rewards": rewards}


def _text(question: Question) -> str:
    """What the user's messages say, an image marked where it stands."""
    texts = []
    for message in question.messages:
        parts = message["content"]
        if message["role"] == "user":
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            texts += [part.get("text", IMAGE_MARKER) for part in parts]
    return "".join(texts)


def _image_names(question: Question) -> list[str | None]:
    """The file of each image, None where the row does not say it."""
    names: list[str | None] = []
    for column in _IMAGES:
        stored = question.columns.get(column)
        several = sequence(stored)
        for source in [stored] if several is None else several:
            source = source.get("path") if isinstance(source, Mapping) else source
            names += [source] if isinstance(source, str) and len(source) < 1000 else []
    count = len(question.images)
    return [*names, *[None] * count][:count]


def _plain_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that JSON can hold as they are, without answer and images."""
    kept = {}
    for name, value in columns.items():
        if name == "answer" or name in _IMAGES:
            continue
        try:
            text = json.dumps(as_json(value) if hasattr(value, "tolist") else value)
            kept[str(name)] = json.loads(text)
        except (TypeError, ValueError, RecursionError):  # bytes, pictures
            continue
    return kept
