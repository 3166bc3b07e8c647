"""What the folder of a run says about it, whoever started the run and however it ended."""

from __future__ import annotations

import csv
import functools
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cppo.options.trainer import MODES, WRITTEN_BY_A_RUN, CPPOConfig
from cppo.report.words import finite, flat
from cppo.train.checkpoint import checkpoints, step_of
from cppo.train.estimators import without_spreads
from cppo.train.output_dir import is_in_use
from cppo.train.progress import read_lines, read_metrics
from cppo.train.run_options import run_options
from cppo.train.sealed import read_summary

_LAST_STEP = 2**53  # a larger one is no step
# What `reward/...` says besides the mean of each function.
_OF_ALL_REWARDS = ("mean", "std", "zero_variance_share", "scored_share")


class ReportError(ValueError):
    """A folder of which there is nothing to report; the message names it."""


@dataclass(frozen=True)
class RunRecord:
    """A run, as its folder shows it. What the folder lacks is empty.

    Args:
        folder: where it is now.
        history: the rows of metrics, one per step, in order.
        starts: a row for each time that the run was started or resumed (run.jsonl).
        options: of the trainer, and of model and data if there is a config.yaml; dotted names.
        completions, held_out: rows of completions.jsonl and held_out.jsonl.
        evaluations: rows of eval.csv.
        is_running: whether a process writes there now.
    """

    folder: Path
    history: list[dict[str, Any]]
    starts: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    completions: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, str]] = field(default_factory=list)
    is_running: bool = False

    @property
    def step(self) -> int:
        """Steps that are finished."""
        return self.history[-1]["step"] if self.history else 0

    @property
    def max_steps(self) -> int | None:
        """Steps that were asked for."""
        steps = self.options.get("max_steps")
        return steps if isinstance(steps, int) else None

    @property
    def status(self) -> str:
        """ "finished", "running" or "stopped", with the steps."""
        wanted = self.max_steps
        of = f"step {self.step:,}" + (f" of {wanted:,}" if wanted is not None else "")
        if wanted is not None and self.step >= wanted:
            return f"finished, {of}"
        return f"running, {of}" if self.is_running else f"stopped at {of}"

    @property
    def model(self) -> str | None:
        """The model's name: that of the configuration, else what it was loaded from."""
        of_config = self.options.get("model.path") or self.options.get("model.builder")
        name = of_config or self.said("model")
        return None if name is None else str(name)

    def said(self, name: str) -> Any:
        """What the newest start says of itself, None if it does not."""
        return self.starts[-1].get(name) if self.starts else None

    @functools.cached_property
    def seconds(self) -> list[float]:
        """Of the training steps up to each row, evaluations and checkpoints left out."""
        total, found = 0.0, []
        for row in self.history:
            total += max(0.0, finite(row.get("time/step")) or 0.0)
            found.append(total)
        return found

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever the history has a number under the key."""
        pairs = ((row["step"], finite(row.get(key))) for row in self.history)
        return [(float(step), value) for step, value in pairs if value is not None]

    @functools.cached_property
    def keys(self) -> set[str]:
        """The names of all metrics."""
        return {name for row in self.history for name in row}

    @functools.cached_property
    def reward_names(self) -> list[str]:
        """The reward functions, in the order of the rows."""
        names = dict.fromkeys(
            name.removeprefix("reward/")
            for row in self.history[:50]
            for name in row
            if name.startswith("reward/")
        )
        return [name for name in names if name not in _OF_ALL_REWARDS]

    @functools.cached_property
    def evaluated(self) -> list[str]:
        """The rewards of the evaluations, the weighted sum only where there are several."""
        found: dict[str, None] = {}
        for row in self.history:
            for name in row:
                parts = name.split("/", 2)
                if len(parts) == 3 and parts[0] == "eval" and parts[1] in MODES:
                    found[parts[2]] = None
        names = [name for name in without_spreads(found) if name != "tokens"]
        single = [name for name in names if name != "reward"]
        return [*single, "reward"] if len(single) > 1 and "reward" in names else single or names

    def is_share(self, reward: str) -> bool:
        """Whether the mean of a reward is the share of the completions that were right.

        That is so if it is called an accuracy, or if every completion that was kept got 0 or 1.
        """
        series = [f"eval/{mode}/{reward}" for mode in MODES] + [f"reward/{reward}"]
        means = [y for key in series for _, y in self.points(key)]
        if not means or min(means) < 0 or max(means) > 1:
            return False
        if "accuracy" in reward.lower():
            return True
        given = [row["rewards"].get(reward) for row in self.held_out]
        if not given and self.reward_names in ([], [reward]):
            given = [row.get("reward") for row in self.completions]
        known = [value for value in given if value is not None]
        return bool(known) and all(value in (0, 1) for value in known)


def read_run(folder: str | Path, *, is_running: bool | None = None) -> RunRecord:
    """What a folder says of its run; lines and files that cannot be read are left out.

    Args:
        folder: the run's, wherever it was moved.
        is_running: None asks the folder's lock.
    Raises: ReportError if there is no such folder, no run in it, or no row of metrics.
    """
    folder = Path(folder)
    _check(folder)
    history = {row["step"]: row for row in read_metrics(folder) if 0 <= row["step"] < _LAST_STEP}
    if not history:
        raise ReportError(f"{folder}: this run has no rows in metrics.jsonl yet")
    starts = read_lines(folder / "run.jsonl")
    return RunRecord(
        folder=folder,
        history=[history[step] for step in sorted(history)],
        starts=starts,
        options=_options(folder, starts),
        completions=[row for row in read_lines(folder / "completions.jsonl") if _is_text(row)],
        held_out=[row for row in read_lines(folder / "held_out.jsonl") if _is_rewarded(row)],
        evaluations=_evaluations(folder / "eval.csv"),
        is_running=is_in_use(folder) if is_running is None else is_running,
    )


def _check(folder: Path) -> None:
    if not folder.exists():
        raise ReportError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise ReportError(f"{folder}: must be the folder of a run, got a file")
    if (
        step_of(folder.resolve()) is not None
        and (folder.resolve().parent / "metrics.jsonl").exists()
    ):
        raise ReportError(f"{folder} is a checkpoint: give its run, {folder.resolve().parent}")
    if not (folder / "metrics.jsonl").is_file():
        raise ReportError(f"{folder}: not a run of cppo (it has no metrics.jsonl)")


def _options(folder: Path, starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Those that the run was started with; of a version that did not say so, of a checkpoint."""
    config = _config(folder / "config.yaml")
    found = starts[-1].get("options") if starts else None
    if not isinstance(found, dict):
        found = _of_checkpoint(folder)
    if not found and isinstance(config.get("trainer"), dict):
        found = flat(config["trainer"])
    named = flat({name: config[name] for name in ("model", "data", "rewards") if name in config})
    # An option that an older version did not have had its default's effect.
    defaults = run_options(CPPOConfig(), 1) if found else {}
    return {**named, **defaults, **(found or {})}


def _of_checkpoint(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        for path in reversed(checkpoints(folder)):
            options = read_summary(path).get("options")
            return options if isinstance(options, dict) else {}
    return {}


def _config(path: Path) -> dict[str, Any]:
    """The configuration that a run has written; nothing for a file of somebody else."""
    with suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text) if text.startswith(WRITTEN_BY_A_RUN) else None
        return tree if isinstance(tree, dict) else {}
    return {}


def _evaluations(path: Path) -> list[dict[str, str]]:
    with suppress(OSError, csv.Error):
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = [{str(k): v or "" for k, v in row.items()} for row in csv.DictReader(file)]
        return [row for row in rows if row.get("metric") and row.get("mean")]
    return []


def _is_text(row: dict[str, Any]) -> bool:
    return isinstance(row.get("completion"), str)


def _is_rewarded(row: dict[str, Any]) -> bool:
    return _is_text(row) and isinstance(row.get("rewards"), dict) and row.get("mode") in MODES
