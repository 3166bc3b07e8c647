"""What is inside a wrapper of compile or of peft, and what of a model is its vision encoder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

# What the families of transformers name it.
_TOWERS = ("visual", "vision_tower", "vision_model", "vision_encoder", "image_tower")
IN_TOWER = rf"(.*\.)?({'|'.join(_TOWERS)})\..*"
"""Matches the names of the modules in a vision encoder."""


def unwrap(model: Any) -> Any:
    """The transformers model inside a compiled or a peft wrapper, or the model itself."""
    model = getattr(model, "_orig_mod", model)
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftMixedModel):
        return model.base_model.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_adapters(model: nn.Module) -> bool:
    """Whether the model has adapters of peft, however they were added."""
    peft = sys.modules.get("peft")
    if peft is None:
        return False
    kind = peft.tuners.tuners_utils.BaseTunerLayer
    return bool(getattr(model, "peft_config", None)) or any(
        isinstance(module, kind) for module in model.modules()
    )


def own_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model without those that adapters brought."""
    if isinstance(getattr(model, "base_layer", None), nn.Module):
        yield from own_modules(model.base_layer)  # type: ignore[arg-type]
        return
    yield model
    for child in model.children():
        yield from own_modules(child)


def has_vision(model: nn.Module) -> bool:
    """Whether the model takes images."""
    return getattr(unwrap(model).config, "vision_config", None) is not None


def vision_tower(model: nn.Module) -> nn.Module:
    """The vision encoder of a model that takes images.

    Raises: ValueError for a family that has another name for it.
    """
    base = unwrap(model)
    for name in _TOWERS:
        if isinstance(tower := getattr(base.model, name, None), nn.Module):
            return tower
    raise ValueError(
        f"cppo: the vision encoder of model_type {base.config.model_type!r} must be one of "
        f"{', '.join(_TOWERS)} of its body"
    )
