"""What a run shows and writes while it goes: the console table, and its files of JSON lines."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cppo.train.estimators import without_spreads

_COLUMNS = (
    ("step", "step", "{:.0f}"),
    ("reward", "reward/mean", "{:.3f}"),
    ("kept", "kept_share", "{:.2f}"),
    ("loss", "loss", "{:+.4f}"),
    ("cpl", "cpl_loss", "{:.4f}"),
    ("percept", "perception_share", "{:.2f}"),
    ("kl", "kl", "{:.4f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("grad", "grad_norm", "{:.2f}"),
    ("tokens", "completion/tokens", "{:.1f}"),
    ("sec", "time/step", "{:.2f}"),
)
_WIDTH = 8


class PhaseTimer:
    """Seconds spent in each phase of a step: `with timer("rollout"): ...`.

    A GPU works behind the host, so there a phase begins and ends with an event in the stream of its
    work, and nobody waits for them before the seconds are asked for.

    Args:
        before: what the phases had taken when the step was interrupted.
        device: that the phases run on.
    """

    def __init__(
        self, before: Mapping[str, float] | None = None, device: torch.device | None = None
    ) -> None:
        self._before = dict(before or {})
        self._started = time.perf_counter() - self._before.pop("step", 0.0)
        self._device = None if device is None or device.type == "cpu" else device
        self._spans: list[tuple[str, Any, Any]] = []  # phase, start, end

    @property
    def seconds(self) -> dict[str, float]:
        """Of each phase so far; waits for the device."""
        total = dict(self._before)
        for phase, start, end in self._spans:
            total[phase] = total.get(phase, 0.0) + self._between(start, end)
        return total

    @property
    def so_far(self) -> dict[str, float]:
        """What another timer needs to go on from here."""
        return {**self.seconds, "step": time.perf_counter() - self._started}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = self._mark()
        try:
            yield
        finally:
            self._spans.append((phase, started, self._mark()))

    def _mark(self) -> Any:
        if self._device is None:
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        # Left to itself it takes the stream of the current device, which may be another one.
        event.record(torch.accelerator.current_stream(self._device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self._device is None:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def metrics(self) -> dict[str, float]:
        """{"time/<phase>": seconds, ..., "time/step": seconds since the timer was made}."""
        return {f"time/{phase}": seconds for phase, seconds in self.so_far.items()}


class _Console(Console):
    """A console that does not end the run when nobody reads it any more."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class RunLog:
    """The files and the console of one run; silent on every process but the first."""

    def __init__(self, output_dir: str | Path, max_steps: int, *, is_main: bool) -> None:
        self._is_main = is_main
        self._dir = Path(output_dir)
        self._console = _Console(quiet=not is_main, highlight=False)
        self._rows_shown = 0
        self._unwritten: dict[str, bytes] = {}
        self._history: list[dict[str, Any]] = []
        self._columns: list[tuple[str, str, str]] = []
        self._progress = Progress(
            TextColumn("[bold]cppo[/bold]"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not is_main or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("steps", total=max_steps)

    def restart(
        self, history: list[dict[str, Any]], step: int, start: dict[str, Any], *, goes_on: bool
    ) -> None:
        """Makes the files agree with the step that a run starts from.

        Args:
            history: the rows so far; the caller appends to this list before `metrics`.
            start: what starts the run, the next row of run.jsonl.
            goes_on: whether it has begun before; one that begins keeps no row, not even of step 0.
        """
        if not self._is_main:
            return
        self._history = history
        _write_lines(self._dir / "metrics.jsonl", history)
        for name in ("completions.jsonl", "held_out.jsonl", "run.jsonl"):
            rows = [r for r in read_lines(self._dir / name) if goes_on and r["step"] <= step]
            _write_lines(self._dir / name, rows + [start] * (name == "run.jsonl"))
        self._progress.update(self._task, completed=step)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Shows the progress bar."""
        with self._progress:
            yield

    def metrics(self, row: dict[str, Any], *, show: bool) -> None:
        """Appends a row to metrics.jsonl and shows it in the console table."""
        if not self._is_main:
            return
        self._append("metrics.jsonl", [row])
        self._progress.update(self._task, completed=row["step"])
        if not show:
            return
        if "loss" in row:
            self._show_row(row)
        names = without_spreads(name for name in row if name.startswith("eval/"))
        evaluated = {
            name.removeprefix("eval/"): row[name] for name in names if not name.endswith("/tokens")
        }
        weighted = [name for name in evaluated if name.endswith("/reward")]
        if len(evaluated) == 2 * len(weighted):
            # One reward function: its weighted sum says nothing new.
            evaluated = {n: value for n, value in evaluated.items() if n not in weighted}
        if evaluated:
            values = "  ".join(f"{name} {value:.3f}" for name, value in evaluated.items())
            head = (f"held-out after {row['step']} steps", "bold")
            self._print(Text.assemble(head, f"  {values}"))

    def _show_row(self, row: dict[str, Any]) -> None:
        known = [c for c in _COLUMNS if c in self._columns or c[1] in row]
        if self._rows_shown % 20 == 0 or known != self._columns:
            self._columns, self._rows_shown = known, 0
            self.say("".join(f"{c[0]:>{_WIDTH}}" for c in self._columns), style="dim")
        self._rows_shown += 1
        cells = (form.format(row[key]) if key in row else "-" for _, key, form in self._columns)
        self.say("".join(f"{cell:>{_WIDTH}}" for cell in cells))

    def completions(self, rows: list[dict[str, Any]]) -> None:
        """Appends sample completions to completions.jsonl."""
        if self._is_main:
            self._append("completions.jsonl", rows)

    def held_out(self, rows: list[dict[str, Any]]) -> None:
        """Appends completions of an evaluation to held_out.jsonl."""
        if self._is_main:
            self._append("held_out.jsonl", rows)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Appends rows to a file; those that a full disk refuses are kept for the next time."""
        lines = self._unwritten.pop(name, b"") + b"".join(map(_line, rows))
        try:
            path = self._dir / name
            if name == "metrics.jsonl" and not path.exists() and self._history:
                _write_lines(path, self._history)  # somebody has removed it
            else:
                append_bytes(path, lines)
        except OSError as error:
            self._unwritten[name] = lines
            self.say(
                f"{self._dir / name} cannot be written ({error.strerror}): its rows are kept, and "
                "written with the next ones",
                style="bold red",
            )

    def say(self, text: str, style: str = "") -> None:
        """One line on the console, as it is."""
        self._print(Text(text, style))

    def _print(self, text: Text) -> None:
        try:
            self._console.print(text, soft_wrap=True)
        except OSError:  # the log is on a full disk
            pass

    def flush(self) -> None:
        """Writes the rows that a full disk has refused, if it takes them now."""
        for name in list(self._unwritten):
            self._append(name, [])


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, without lines that a kill or a copy has torn."""
    return read_lines(Path(output_dir) / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines that have a step; none if there is no such file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join(map(_line, rows)))
    partial.replace(path)


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(as_json(row)).encode() + b"\n"


def as_json(value: Any) -> Any:
    """A value as JSON can hold it: an array as lists, and what JSON has no word for as a text."""
    if isinstance(value, int) and value.bit_length() > 64:
        return hex(value)  # as a decimal, Python writes 4,300 digits and no more
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_json(entry) for entry in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return as_json(value.tolist())
    return str(value)


def append_bytes(path: Path, data: bytes) -> None:
    """Appends all of it or nothing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END) if file.seekable() else None
        if file.write(data) != len(data):
            if size is not None:  # not a pipe
                file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
