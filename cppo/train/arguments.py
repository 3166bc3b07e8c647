"""What `CPPOTrainer` is given, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from cppo.model import forward
from cppo.model.load import check_saveable, closing_token_ids
from cppo.model.prompts import tokenizer_of
from cppo.model.wrappers import has_vision, unwrap
from cppo.options.idle import without_effect
from cppo.options.trainer import CPPOConfig
from cppo.options.values import suggestion
from cppo.questions import Question, QuestionError
from cppo.questions.rows import Dataset, question_at, require_dataset
from cppo.train.scoring import RewardFunction, check_signature, metric_name, reward_name


def check_model_and_processor(model: nn.Module, processor: Any) -> None:
    """Raises for a model that cannot be trained or saved, and for another model's processor."""
    forward.check_supported(model)
    check_processor(model, processor)
    check_saveable(model, processor)


def warnings(model: nn.Module, processor: Any, config: CPPOConfig) -> list[str]:
    """What a user should know before the run begins."""
    two_ends = closing_token_ids(model, processor)[1]
    found = [two_ends] if two_ends else []
    if has_vision(model) and config.loss.contrasts:
        which = "completions with A > 0" if config.loss.gating else "all completions"
        found.append(
            f"contrastive perception is on (loss.cpl_coef = {config.loss.cpl_coef:g}): {which} "
            "also run under two perturbed views of their images; loss.cpl_coef = 0 turns it off"
        )
    idle = without_effect(config.loss, config.positive_views, config.negative_views)
    if has_vision(model) and idle:
        found.append(idle)
    steps = config.steps() * config.num_iterations * config.optimizer_steps
    if config.warmup_steps >= steps:
        found.append(
            f"warmup_steps = {config.warmup_steps} is no less than the {steps} optimizer "
            "steps of the run: the learning rate does not reach its peak"
        )
    return found


def planned_steps(config: CPPOConfig, dataset: Dataset, processes: int) -> int:
    """Steps of the run. Raises for `num_epochs` of what is no dataset."""
    if config.num_epochs is None:
        return config.steps()
    require_dataset("cppo.CPPOTrainer: train_dataset", dataset)
    return config.steps(len(dataset), processes)


def check_signatures(functions: Sequence[RewardFunction], questions: Sequence[Question]) -> None:
    """Raises for a reward function that cannot be called with the columns of the first question."""
    for question in questions[:1]:
        for function in functions:
            check_signature(function, question)


def check_processor(model: nn.Module, processor: Any) -> None:
    """Raises if the processor visibly does not belong to the model."""
    kind = type(processor).__name__
    tokenizer = tokenizer_of(processor)
    if not hasattr(processor, "apply_chat_template") or not hasattr(tokenizer, "decode"):
        raise TypeError(f"cppo.CPPOTrainer: processor must be a processor or tokenizer, got {kind}")
    if has_vision(model) and not hasattr(processor, "image_processor"):
        raise TypeError(
            "cppo.CPPOTrainer: processor must be the processor of a vision-language model (see "
            f"cppo.model.load.load_processor), got the tokenizer {kind}"
        )
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"cppo.CPPOTrainer: processor must have a chat template, {kind} has none")
    vocabulary = unwrap(model).get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"cppo.CPPOTrainer: processor must be the model's: its {len(tokenizer)} tokens are "
            f"more than the {vocabulary} that the model has"
        )


def check_evaluation(
    config: CPPOConfig, eval_dataset: Dataset | None, functions: Sequence[RewardFunction]
) -> None:
    """Raises for options of evaluations that will never be, and for a metric of none."""
    if eval_dataset is None:
        for name in ("eval_every", "best_metric"):
            if getattr(config, name):
                raise ValueError(
                    f"cppo.CPPOTrainer: eval_dataset must be given with CPPOConfig.{name} = "
                    f"{getattr(config, name)!r}, got None"
                )
        return
    names = ["reward", "tokens", *map(metric_name, functions)]
    known = [f"sampled/{name}" for name in names]
    known += [f"greedy/{name}" for name in names] if config.eval_greedy else []
    if config.best_metric is not None and config.best_metric not in known:
        raise ValueError(
            f"cppo.CPPOTrainer: CPPOConfig.best_metric must be one of {', '.join(known)}, got "
            f"{config.best_metric!r}"
        )


def check_optimizer_steps(config: CPPOConfig, processes: int) -> None:
    """Raises for more optimizer steps than a process has completions to deal to them."""
    most = -(-config.completions_kept() // processes)
    if config.optimizer_steps > max(1, most):
        raise ValueError(
            f"CPPOConfig.optimizer_steps must be <= {most}, the completions of one of {processes} "
            f"processes, got {config.optimizer_steps}"
        )


def first_question(dataset: Dataset, config: CPPOConfig) -> list[Question]:
    """The first row as a question; none if it is bad and will be left out."""
    try:
        return [question_at(dataset, 0)]
    except QuestionError:
        if config.skip_bad_questions:
            return []
        raise


def check_images(model: nn.Module, questions: Sequence[Question]) -> None:
    """Raises for questions with images that the model does not take."""
    for question in questions:
        if question.images and not has_vision(model):
            raise ValueError(
                "cppo.CPPOTrainer: model takes no images, but there are questions with images: "
                f"{question.messages!r}"
            )


def check_trackers(names: Sequence[Any], key: str = "CPPOConfig.trackers") -> None:
    """Checks that every tracker exists and that its package is installed.

    Args:
        names: of accelerate ("tensorboard", "wandb", ..., "all"), or registered there by
            `accelerate.tracking.register_tracker_class`; objects of its GeneralTracker pass.
        key: the option that holds them, for messages.
    Raises: ValueError for what accelerate does not know, with the nearest name; ImportError for a
        tracker whose package is not installed, with the pip line.
    """
    if not names:
        return
    from accelerate.tracking import (
        LOGGER_TYPE_TO_CLASS,
        GeneralTracker,
        LoggerType,
        get_available_trackers,
    )

    known = sorted({*map(str, LoggerType), *LOGGER_TYPE_TO_CLASS})
    installed = {str(kind) for kind in get_available_trackers()}
    # Those that somebody registered are here by definition.
    installed |= set(LOGGER_TYPE_TO_CLASS) - set(map(str, LoggerType))
    for name in names:
        if isinstance(name, GeneralTracker):
            continue
        if name not in known:
            hint = suggestion(str(name).lower(), known)
            raise ValueError(f"{key} must be of {', '.join(known)}, got {name!r}{hint}")
        if name == "all" and not installed:
            raise ImportError(f"{key}: 'all' finds no tracker: pip install 'cppo[tracking]'")
        if name not in {*installed, "all"}:
            package = "'cppo[tracking]'" if name == "tensorboard" else name.replace("_", "-")
            raise ImportError(f"{key}: {name!r} is not installed: pip install {package}")


def reward_list(functions: RewardFunction | Sequence[RewardFunction]) -> list[RewardFunction]:
    """The reward functions as a list. Raises TypeError or ValueError for anything else."""
    listed = [functions] if callable(functions) else functions
    is_list = isinstance(listed, (list, tuple)) and len(listed) > 0
    if not is_list or not all(callable(function) for function in listed):
        raise TypeError(
            f"cppo.CPPOTrainer: reward_functions must be one or more callables, got {functions!r}"
        )
    names = [metric_name(function) for function in listed]
    # `<name>_std` is a metric of its own in evaluations of several samples.
    if len({*names, *(f"{name}_std" for name in names)}) < 2 * len(names):
        raise ValueError(
            "cppo.CPPOTrainer: reward_functions must have different names (`__name__` or `name`) "
            f"that give different metrics, got {names}"
        )
    return list(listed)


def reward_weights(functions: list[RewardFunction], config: CPPOConfig) -> tuple[float, ...]:
    """One weight per reward function. Raises ValueError if the config has another number."""
    weights = config.reward_weights or (1.0,) * len(functions)
    if len(weights) != len(functions):
        names = [reward_name(function) for function in functions]
        raise ValueError(
            f"cppo.CPPOTrainer: reward_weights must have one weight per reward function "
            f"{names}, got {weights}"
        )
    return tuple(weights)
