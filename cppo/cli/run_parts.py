"""From a RunConfig to what it names: the model, the trainer, an evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cppo.cli.config_file import ConfigError, build, read
from cppo.cli.datasets import CHECKED_ROWS, check_rows, load_questions
from cppo.cli.run_config import BUILDERS, CONFIG_NAME, ModelConfig, RunConfig
from cppo.extras import require_package, without_peft_warning
from cppo.options.places import is_place, load_object
from cppo.questions import Question
from cppo.questions.rows import question_at

if TYPE_CHECKING:
    from cppo.options.trainer import CPPOConfig
    from cppo.rollouts.engine import Engine
    from cppo.train.evaluate import Evaluation, FinishedBatches
    from cppo.train.trainer import CPPOTrainer, Dataset


def model_path(model: ModelConfig) -> str:
    """Return the folder or hub name of a model; of a function that builds one its place."""
    if model.path is not None:
        return str(Path(model.path).expanduser())
    return str(BUILDERS.get(str(model.builder), model.builder))


def run_of(name: str) -> tuple[dict[str, Any], Path] | None:
    """Return the configuration in the file of a run, and a checkpoint; None for another name.

    Args:
        name: the folder of a run, whose best checkpoint it is, or of a checkpoint in it.
    Raises: ConfigError for a run without a checkpoint.
    """
    from cppo.train.checkpoint import checkpoints

    folder = Path(name)
    if (folder / CONFIG_NAME).is_file():
        return read(folder / CONFIG_NAME), checkpoint_of(folder)
    path = folder.resolve().parent / CONFIG_NAME
    is_one = path.is_file() and folder.resolve() in checkpoints(path.parent)
    return (read(path), folder) if is_one else None


def load_named(name: str, run: tuple[dict[str, Any], Path] | None) -> tuple[str, Any, Any]:
    """Return (place, model, processor) of what a command line names.

    Args:
        name: a folder, a hub name, a demo's model, or what `run_of` knows.
        run: what `run_of` says of the name.
    Raises: ValueError or ImportError as `load_policy`.
    """
    if run is not None:
        config, checkpoint = run
        model = build(ModelConfig, config.get("model", {"path": str(checkpoint)}))
        return str(checkpoint), *load_policy(model, checkpoint)
    place = str(BUILDERS.get(name, name))
    return place, *load_policy(ModelConfig(path=place))


def checkpoint_of(run: Path, which: str = "best") -> Path:
    """Return the "best" or the "last" checkpoint of a run; the last where none is the best.

    Raises: ConfigError for a run without a checkpoint.
    """
    from cppo.train.checkpoint import best_checkpoint, last_checkpoint

    found = (best_checkpoint(run) if which == "best" else None) or last_checkpoint(run)
    if found is None:
        raise ConfigError(f"{run}: this run has not written a checkpoint yet")
    return found


def load_policy(model: ModelConfig, checkpoint: str | Path | None = None) -> tuple[Any, Any]:
    """Load a model and its processor.

    Args:
        model: which.
        checkpoint: a folder that the trainer wrote, instead of the configured weights; if it holds
            adapters only, they go onto the configured model.
    Returns: (model, processor).
    Raises: ValueError if the weights or the processor are not there.
    """
    from transformers.utils import logging

    from cppo.model.load import load_model, load_processor
    from cppo.train.checkpoint import check_files

    logging.disable_progress_bar()  # a bar that flashes between our own lines
    if checkpoint is None:
        if is_place(model.builder):
            return _build(str(model.builder))
        path = model_path(model)
        return load_model(path), load_processor(path)
    check_files(checkpoint)
    if (Path(checkpoint) / "adapter_config.json").is_file():
        require_package(f"the adapters of {checkpoint}", "peft", "peft")
        from peft import PeftModel

        base, processor = load_policy(model)
        with without_peft_warning():
            return PeftModel.from_pretrained(base, str(checkpoint)), processor
    if not is_place(model.builder):
        return load_model(checkpoint), load_processor(checkpoint)
    from cppo.train.weights import load_weights

    built, processor = load_policy(model)
    load_weights(built, Path(checkpoint))
    return built, processor


def _build(place: str) -> tuple[Any, Any]:
    """The model and processor that a function of the user's returns."""
    from torch import nn

    built = load_object(place, "builder")()
    parts = built if isinstance(built, tuple) else (built,)
    if len(parts) != 2 or not isinstance(parts[0], nn.Module):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(f"model.builder: {place} must return (model, processor), got {kinds}")
    return parts


def check_packages(config: RunConfig, *, training: bool = True) -> None:
    """Check that the optional packages that a configuration names are installed.

    Args:
        config: the configuration.
        training: whether all of the trainer's options count; an evaluation needs the packages of
            its rewards and its engine.
    Raises: ImportError naming the key and what to install; ValueError for an unknown tracker.
    """
    from cppo.train.arguments import check_trackers

    entries = ([entry] if isinstance(entry, str) else entry for entry in config.rewards)
    names = {name for entry in entries for name in entry}
    for name in sorted(names & {"math_verify", "math_reward"}):
        require_package(f"rewards: {name}", "math-verify", "math")
    if config.trainer.engine == "vllm":
        require_package("trainer.engine: vllm", "vllm", "vllm")
    if training and config.trainer.lora is not None:
        require_package("trainer.lora", "peft", "peft")
    if training:
        check_trackers(config.trainer.trackers, key="trainer.trackers")


def trainer_options(config: RunConfig) -> tuple[list[Any], CPPOConfig]:
    """Return the reward functions, and the trainer's options with the rewards' weights."""
    from cppo.rewards import from_names
    from cppo.train.arguments import reward_list

    functions, weights = from_names(list(config.rewards))
    reward_list(functions)  # their names differ: they are those of the metrics
    if config.trainer.reward_weights is not None:
        return functions, config.trainer
    return functions, replace(config.trainer, reward_weights=tuple(weights))


def make_trainer(config: RunConfig) -> CPPOTrainer:
    """Build the trainer of a configuration, its data and weights loaded.

    Raises: ConfigError for anything that is missing or does not fit together.
    """
    from cppo.questions import check_dataset
    from cppo.rollouts.engine import EngineError
    from cppo.train.trainer import CPPOTrainer

    data, held_out = config.data, None
    try:
        check_packages(config)
        functions, options = trainer_options(config)
        train = load_questions(data.train, data.system_prompt, "data.train")
        if data.eval is not None:
            held_out = load_questions(data.eval, data.system_prompt, "data.eval")
        check_rows(train, data.train, functions, skip_bad=options.skip_bad_questions)
        if held_out is not None and data.eval is not None:
            check_rows(held_out, data.eval, functions)
        model, processor = load_policy(config.model)
        if not options.skip_bad_questions:
            kwargs = options.chat_template_kwargs or {}
            check_dataset(
                train,
                limit=CHECKED_ROWS,
                read_answer=False,
                processor=processor,
                chat_template_kwargs=kwargs,
            )
        return CPPOTrainer(
            model, functions, train, config=options, processor=processor, eval_dataset=held_out
        )
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError, EngineError) as error:
        raise ConfigError(in_keys(str(error))) from error


def in_keys(message: str) -> str:
    """A message with options named as in a configuration file."""
    for name, key in (("CPPO", ""), ("Lora", "lora."), ("Loss", "loss."), ("VLLM", "vllm.")):
        message = re.sub(rf"\b{name}Config\.(?=[a-z])", f"trainer.{key}", message)
    return message


class _Questions(Sequence[Question]):
    """Questions that are read when they are asked: images of thousands would fill the memory."""

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return question_at(self._rows, index)


def evaluate_policy(
    config: RunConfig,
    checkpoint: Path | None,
    dataset: str,
    device: str = "cpu",
    finished: FinishedBatches | None = None,
) -> Evaluation:
    """Measure a model's rewards without training it, by the engine of the configuration.

    Args:
        config: its trainer.eval_samples and trainer.eval_greedy say what is measured.
        checkpoint: a folder that the trainer wrote; None: the configured weights.
        dataset: "train" or "eval".
        device: where the model runs.
        finished: as `cppo.train.evaluate.evaluate` takes it.
    Returns: metrics and completions, as `cppo.train.evaluate.evaluate` returns them.
    Raises: ConfigError for anything that is missing, and for a model or an engine that cannot be
        sampled from.
    """
    from cppo.model.load import special_token_ids_to_suppress
    from cppo.model.precision import autocast
    from cppo.rollouts.engine import EngineError
    from cppo.train.evaluate import evaluate, state_of
    from cppo.train.scoring import RewardError

    checks = (ValueError, TypeError, ImportError, FloatingPointError, RewardError, EngineError)
    try:
        check_packages(config, training=False)
        functions, options = trainer_options(config)
        spec = getattr(config.data, dataset)
        rows = load_questions(spec, config.data.system_prompt, f"data.{dataset}")
        check_rows(rows, spec, functions)
        model, processor = load_policy(config.model, checkpoint)
        model = model.to(device)
        special = special_token_ids_to_suppress(model, processor)
        arithmetic = autocast(options.precision, device)
        with _engine_of(model, processor, options) as engine, arithmetic:
            return evaluate(
                model,
                processor,
                functions,
                _Questions(rows),
                config=options,
                suppressed=special,
                state=state_of(checkpoint, options),
                engine=engine,
                finished=finished,
            )
    except ConfigError:
        raise
    except checks as error:
        raise ConfigError(in_keys(str(error))) from error


@contextmanager
def _engine_of(model: Any, processor: Any, config: CPPOConfig) -> Iterator[Engine]:
    """The engine of a configuration with the weights of a model; it is closed afterwards."""
    from cppo.model.hub_weights import hub_weights
    from cppo.train.engine import new_engine

    engine = new_engine(model, processor, config)
    try:
        engine.wake()  # a server that a run with `vllm.sleep` has left sleeps
        engine.sync(hub_weights(model))
        yield engine
    finally:
        engine.close()
