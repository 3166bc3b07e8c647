"""The sizes of a model without its weights: what the estimates of a dry run need."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from cppo.cli.run_config import ModelConfig
from cppo.cli.run_parts import model_path
from cppo.options.places import is_place
from cppo.options.trainer import CPPOConfig, LoraConfig


class ModelSizes(NamedTuple):
    """Sizes that the estimates need; parameters are counted once where weights are tied."""

    family: str
    parameters: int
    vision_parameters: int
    lora_parameters: int
    hidden: int
    intermediate: int
    layers: int
    kv_width: int
    vocab: int


def model_sizes(model: ModelConfig, options: CPPOConfig) -> tuple[ModelSizes, str]:
    """Measure a model without its weights, on torch's meta device.

    Args:
        model: a folder, a hub name in the local cache, or one with an `architecture`.
        options: the trainer's, whose `lora` and `freeze_vision_tower` say where adapters are.
    Returns: (sizes, where they are from). A model without a width of its MLPs in its config is
        taken to have 4 x hidden, and one without a number of key heads to have as many as heads.
    Raises: ValueError if nothing here tells its sizes.
    """
    from cppo.model.wrappers import IN_TOWER

    config, source = _model_config(model)
    built = _built(config)
    text = config.get_text_config()
    try:
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        widths = (getattr(text, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
        sizes = ModelSizes(
            family=config.model_type,
            parameters=sum(p.numel() for p in built.parameters()),
            vision_parameters=sum(
                p.numel() for n, p in built.named_parameters() if re.fullmatch(IN_TOWER, n)
            ),
            lora_parameters=_adapter_parameters(built, options),
            hidden=text.hidden_size,
            intermediate=next(filter(None, widths), 4 * text.hidden_size),
            layers=text.num_hidden_layers,
            kv_width=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
            vocab=text.vocab_size,
        )
    except AttributeError as error:  # of a model without attention, for example
        raise ValueError(f"model_type {config.model_type!r}: {error}") from error
    return sizes, source


def _built(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    has_vision = getattr(config, "vision_config", None) is not None
    auto: Any = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except Exception as error:  # whatever a family makes of numbers that do not go together
        raise ValueError(f"model_type {config.model_type!r}: {_words(error)}") from error


def _adapter_parameters(model: Any, options: CPPOConfig) -> int:
    """Parameters of low-rank adapters on the linear layers that `trainer.lora` names."""
    from torch import nn

    from cppo.model.wrappers import IN_TOWER

    lora, found = options.lora, 0
    if lora is None:
        return 0
    for name, layer in model.named_modules():
        is_left_out = options.freeze_vision_tower and re.fullmatch(IN_TOWER, name)
        if isinstance(layer, nn.Linear) and not is_left_out and _is_target(name, lora):
            found += lora.r * (layer.in_features + layer.out_features)
    return found


def _is_target(name: str, lora: LoraConfig) -> bool:
    """Whether the layer of a name gets an adapter, by peft's rules."""
    targets = lora.target_modules
    if targets == "all-linear":
        return not name.endswith("lm_head")
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _model_config(model: ModelConfig) -> tuple[Any, str]:
    """A model's configuration, and where it is from."""
    from transformers import AutoConfig

    path = model_path(model)
    if is_place(model.builder) and model.architecture is None:
        raise ValueError(f"a dry run does not call {path}, and model.architecture is not given")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        return config, f"config.json of {path}"
    except Exception as error:  # transformers raises errors of many kinds
        if (Path(path) / "config.json").is_file():
            raise ValueError(f"config.json of {path}: {_words(error)}") from error
        if model.architecture is None:
            raise ValueError(
                f"{path} is not on this machine and model.architecture is not given"
            ) from None
        rest = {key: value for key, value in model.architecture.items() if key != "model_type"}
        try:
            config = AutoConfig.for_model(model.architecture["model_type"], **rest)
        except Exception as wrong:
            raise ValueError(f"model.architecture: {_words(wrong)}") from error
        return config, f"model.architecture; {path} is not on this machine"


def _words(error: Exception) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"
