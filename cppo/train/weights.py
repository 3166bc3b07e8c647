"""The weights of a policy in a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging

from cppo.model.load import quiet, save_processor
from cppo.model.precision import whole, widest
from cppo.train.sealed import CheckpointError


def load_weights(model: Any, path: Path) -> None:
    """Loads a checkpoint's weights, or its adapters, into a prepared model.

    Raises: CheckpointError if the checkpoint lacks a weight, has one too many or of another shape.
    """
    try:
        wrong = _load_adapters(model, path) if _is_adapted(model) else _load_whole(model, path)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"cppo: the weights of {path} cannot be loaded ({reason})") from error
    if wrong:
        raise CheckpointError(
            f"cppo: the weights of {path} are not those of this {type(model).__name__}: "
            + "; ".join(wrong)
        )


def _is_adapted(model: Any) -> bool:
    return hasattr(model, "get_base_model")


def _load_whole(model: Any, path: Path) -> list[str]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # our own error says what is wrong
    try:
        with quiet():
            loaded, info = type(model).from_pretrained(
                path,
                config=copy.deepcopy(model.config),
                dtype=widest(model),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    finally:
        logging.set_verbosity(verbosity)
    wrong = [
        f"{words} {', '.join(sorted(map(str, info[kind]))[:3])}"
        for kind, words in (
            ("missing_keys", "lacks"),
            ("unexpected_keys", "has besides"),
            ("mismatched_keys", "has another shape of"),
        )
        if info[kind]
    ]
    if not wrong:
        model.load_state_dict(loaded.state_dict())
    return wrong


def _load_adapters(model: Any, path: Path) -> list[str]:
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(path), device="cpu")
    with quiet():
        own = get_peft_model_state_dict(model)
    lacks, besides = own.keys() - weights.keys(), weights.keys() - own.keys()
    shapes = {n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape}
    found = (("lacks", lacks), ("has besides", besides), ("has another shape of", shapes))
    wrong = [f"{words} {', '.join(sorted(names)[:3])}" for words, names in found if names]
    if not wrong:
        set_peft_model_state_dict(model, weights)
    return wrong


def saved_bytes(model: Any, optimizer: dict[str, Any]) -> int:
    """What a checkpoint of a model and its optimizer's state will take on disk, about."""
    weights = [p for p in model.parameters() if p.requires_grad or not _is_adapted(model)]
    state = [v for one in optimizer["state"].values() for v in one.values()]
    return sum(value.nbytes for value in (*weights, *state) if isinstance(value, Tensor))


def save_model(model: Any, processor: Any, directory: Path) -> None:
    """Writes a policy (its adapters, if it has any) and its processor for plain transformers."""
    with quiet(), whole(model):
        model.save_pretrained(directory)
        save_processor(processor, directory)
