"""What decides the course of a run, and what of it may change when the run is resumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cppo.options.trainer import CPPOConfig, VLLMConfig
from cppo.questions.rows import Dataset
from cppo.train import fingerprint
from cppo.train.reward_functions import reward_name
from cppo.train.sealed import CheckpointError, read_summary

# What may change when a run is resumed: how long it goes on and what is written.
_MAY_CHANGE = {
    "max_steps",
    "num_epochs",
    "output_dir",
    "eval_every",
    "eval_samples",
    "eval_greedy",
    "save_every",
    "save_minutes",
    "keep_checkpoints",
    "best_metric",
    "log_every",
    "log_completions",
    "report_every",
    "trackers",
    "process_timeout",
    "reward_retries",
    "reward_timeout",
    "skip_bad_questions",
    "resume_with_changes",
    "importance_correction",  # that of the loss, which follows from it, may not
    # Where vLLM is, how much memory it has, how long it is waited for.
    *(f"vllm.{name.name}" for name in dataclasses.fields(VLLMConfig) if name.name != "dtype"),
}


def run_options(config: CPPOConfig, num_processes: int) -> dict[str, Any]:
    """What decides the course of a run, under dotted names, as JSON gives it back."""
    options = {"processes": num_processes, **_flat(_fields(config))}
    return json.loads(json.dumps(options, default=_name))


def _fields(value: Any) -> Any:
    """As `dataclasses.asdict`, but copies nothing: a tracker may hold what cannot be copied."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: _fields(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_fields(entry) for entry in value]
    return value


def _name(value: Any) -> str:
    """Of a perturbation that is a function, or of a tracker: a repr has its address in memory."""
    return getattr(value, "__qualname__", None) or reward_name(value)


def trained_on(
    dataset: Dataset, held_out: Dataset | None, rewards: Iterable[Any], processor: Any
) -> dict[str, Any]:
    """Data, rewards and chat template, in words that a resumed run compares."""
    words: dict[str, Any] = {
        "train_dataset": fingerprint.of_dataset(dataset),
        "rewards": [fingerprint.of_function(function) for function in rewards],
        "chat_template": fingerprint.of_text(processor.chat_template),
    }
    if held_out:
        words["eval_dataset"] = fingerprint.of_dataset(held_out)
    return words


def check_options(path: str | Path, now: dict[str, Any], data: dict[str, Any]) -> list[str]:
    """Resuming with other options would be another run under the name of the old one.

    Args:
        now: the options of this run, as of `run_options`.
        data: what it is trained on, in words; `resume_with_changes` allows differences here.
    Returns: the differences of `data` that are allowed, in words.
    Raises: ValueError naming everything that changed, its old and its new value.
    """
    options = read_summary(path).get("options")
    if not isinstance(options, dict):
        raise CheckpointError(f"cppo: {Path(path) / 'trainer.json'} is damaged: it has no options")
    # An option that an older version did not have had its default's effect.
    was = {**run_options(CPPOConfig(), 1), **options}

    def changes(names: Iterable[str], now: dict[str, Any]) -> list[str]:
        return [
            f"{name} (was {was.get(name)!r}, is {now.get(name)!r})"
            for name in sorted(names)
            if was.get(name) != now.get(name)
        ]

    options_alone = (was.keys() | now.keys()) - data.keys()
    changed = changes((name for name in options_alone if not _may_change(name)), now)
    others = changes(was.keys() & data.keys(), data)
    if changed or (others and not now["resume_with_changes"]):
        hint = "" if changed else "; resume_with_changes=True goes on all the same"
        raise ValueError(
            f"cppo.CPPOTrainer: the run of {path} must be resumed with the options it was "
            f"started with, data and rewards included, changed: {', '.join(changed + others)}{hint}"
        )
    return others


def _may_change(name: str) -> bool:
    # A dict has the names of its entries, whatever they are.
    return name in _MAY_CHANGE or name.startswith("vllm.arguments.")


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
