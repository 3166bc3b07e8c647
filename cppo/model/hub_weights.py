"""The weights of a policy as its checkpoint on the hub has them, for an engine that loads those."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cppo.model.wrappers import unwrap

# What peft puts into the name of a layer that has adapters, or copies that are trained.
_WRAPPED = re.compile(r"\.(base_layer|original_module)(?=\.)")
_LEFT_OUT = re.compile(r"\.(lora_[^.]+|modules_to_save)\.")


@torch.no_grad()
def hub_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all weights, adapters merged; the model stays bit for bit what it is.

    Tied weights come under each of their names: an engine may hold a copy of its own for each.

    Args:
        model: a transformers model, or a peft model around one.
    Returns: pairs; values share the model's memory where nothing had to be computed.
    Raises: ValueError for adapters on one of two tied weights: whoever loads them has one for both.
    """
    from transformers.core_model_loading import revert_weight_conversion

    base = unwrap(model)
    merged = _merged(base)
    weights: dict[str, Tensor] = {}
    tied: dict[int, str] = {}
    for name, value in base.state_dict().items():
        if _LEFT_OUT.search(f".{name}"):
            continue
        plain = _WRAPPED.sub("", name)
        weights[plain] = merged.get(plain, value)
        other = tied.setdefault(value.data_ptr(), plain) if value.numel() else plain
        if other != plain and {other, plain} & merged.keys():
            raise ValueError(
                f"cppo: {other} and {plain} are one weight (tie_word_embeddings), and one has "
                "adapters or a trained copy, which no engine but 'builtin' can load"
            )
    yield from revert_weight_conversion(base, weights).items()


def apart(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Weights on the CPU, none of which shares memory with another: so a file wants them."""
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, weight in weights:
        own = weight.detach().to("cpu").contiguous()
        if own.untyped_storage().data_ptr() in places:
            own = own.clone()
        places.add(own.untyped_storage().data_ptr())
        found[name] = own
    return found


def _merged(base: nn.Module) -> dict[str, Tensor]:
    """The weights of layers that have adapters or a trained copy in use, by their plain names.

    A copy of the layer is merged: merging and unmerging the layer itself would round its weight.
    Experts have a layer of adapters around another one, for two of their parameters.
    """
    peft = sys.modules.get("peft")
    if peft is None:
        return {}
    tuners: Any = peft.tuners.tuners_utils
    found: dict[str, Tensor] = {}
    for name, layer in base.named_modules():
        if isinstance(layer, peft.utils.ModulesToSaveWrapper) and not layer.disable_adapters:
            for active in layer.active_adapters:
                trained = layer.modules_to_save[active].state_dict()
                found |= {f"{name}.{part}": value for part, value in trained.items()}
        is_tuner = isinstance(layer, tuners.BaseTunerLayer) and hasattr(layer, "base_layer")
        if not is_tuner or layer.disable_adapters or layer.merged or name.endswith(".base_layer"):
            continue
        own = whole = copy.deepcopy(layer)
        while isinstance(own, tuners.BaseTunerLayer):
            own.merge()
            own = own.base_layer
        for part, value in whole.get_base_layer().named_parameters():
            found[f"{name}.{part}"] = value.detach()
    return found
