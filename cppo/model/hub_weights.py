"""The weights of a policy as its checkpoint on the hub has them, for an engine that loads those."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cppo.model.forward import unwrap

# What peft puts into the name of a layer that has adapters, or that is trained beside them.
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save\.[^.]+)(?=\.)")
_LEFT_OUT = re.compile(r"\.(lora_[^.]+|original_module)\.")


@torch.no_grad()
def hub_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all weights, adapters merged; the model stays bit for bit what it is.

    Tied weights come under each of their names: an engine may hold a copy of its own for each.

    Args:
        model: a transformers model, or a peft model around one.
    Returns: pairs; values share the model's memory where nothing had to be computed.
    """
    from transformers.core_model_loading import revert_weight_conversion

    base = unwrap(model)
    merged = _merged(base)
    weights = {}
    for name, value in base.state_dict().items():
        if not _LEFT_OUT.search(f".{name}"):
            plain = _WRAPPED.sub("", name)
            weights[plain] = merged.get(plain, value)
    yield from revert_weight_conversion(base, weights).items()


def _merged(base: nn.Module) -> dict[str, Tensor]:
    """The weights of layers with adapters that are in use, by their names without them.

    A copy of the layer is merged: merging and unmerging the layer itself would round its weight.
    """
    peft = sys.modules.get("peft")
    if peft is None:
        return {}
    tuners: Any = peft.tuners.tuners_utils
    found = {}
    for name, layer in base.named_modules():
        is_tuner = isinstance(layer, tuners.BaseTunerLayer) and hasattr(layer, "base_layer")
        if not is_tuner or layer.disable_adapters or layer.merged:
            continue
        own = copy.deepcopy(layer)
        own.merge()
        for part, value in own.get_base_layer().named_parameters():
            found[f"{name}.{part}"] = value.detach()
    return found
