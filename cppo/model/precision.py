"""In which dtype a policy's parameters are held.

What is trained is fp32: a step of 1e-6 is lost in a bf16 weight of 0.1, and AdamW's averages have
the dtype of their parameter. What is frozen, autocast would cast to bf16 in every call; it is cast
once, where that gives the same bits: weights and biases that nothing reads but the forward of a
linear or a convolution layer. Norms, embeddings and the LM head stay fp32.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from cppo.model.wrappers import unwrap

_HALF = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float32, *_HALF)
# Families that cast their images to `model.dtype`, which is that of the first layer.
_CASTS_TO_FIRST = {"idefics2", "idefics3", "smolvlm"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def autocast(precision: str, device: torch.device | str) -> AbstractContextManager[Any]:
    """The arithmetic of `CPPOConfig.precision`, in training, rollouts and evaluations."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")


def hold_weights(model: nn.Module, precision: str, *, may_round: bool) -> None:
    """Casts a model's parameters and buffers to what they are held in, in place.

    Args:
        model: a policy or a reference model; what it trains is marked by `requires_grad`.
        precision: "fp32": everything in fp32. "bf16": frozen layers in bf16, all else in fp32.
        may_round: whether frozen weights that are no bf16 numbers are rounded. Under autocast that
            changes no number, but it changes what is saved: False where they are saved.
    """
    if getattr(unwrap(model), "hf_quantizer", None) is not None:
        trained = [p for p in model.parameters() if p.requires_grad]
        wide, narrow = [p for p in trained if p.dtype in _HALF], []
    else:
        cast = _cast_by_autocast(model) if precision == "bf16" else {}
        narrow = [p for p in cast.values() if may_round or _is_bf16(p)]
        kept = {id(p) for p in narrow}
        wide = [p for p in model.parameters() if p.dtype in _HALF and id(p) not in kept]
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.dtype in _HALF:
                    module._buffers[name] = buffer.float()
    for parameters, dtype in ((narrow, torch.bfloat16), (wide, torch.float32)):
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None


def _is_bf16(parameter: nn.Parameter) -> bool:
    wide = parameter.data.float()
    return torch.equal(wide.bfloat16().float(), wide)


def _cast_by_autocast(model: Any) -> dict[int, nn.Parameter]:
    """The frozen parameters that are read only to be cast to bf16, by their id."""
    base = unwrap(model)
    keep = {
        *(getattr(base, "_keep_in_fp32_modules", None) or ()),
        *(getattr(base, "_keep_in_fp32_modules_strict", None) or ()),
    }
    wide = {id(part) for part in base.get_output_embeddings().modules()}
    if base.config.model_type in _CASTS_TO_FIRST:
        wide.add(next(id(part) for part in base.modules() if part._parameters))
    for module in base.modules():
        if _reads_weight_of_layer(module):
            wide.update(id(part) for part in module.modules())
    found: dict[int, nn.Parameter] = {}
    owners: Counter[int] = Counter()
    for name, module in base.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        owners.update(id(p) for p in own.values())
        is_linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if not (is_linear or type(module) in _CONVOLUTIONS) or id(module) in wide:
            continue
        if not keep.intersection(name.split(".")):
            found |= {id(p): p for p in own.values() if not p.requires_grad}
    # A weight that two layers share may be read by one of them as it is.
    return {key: p for key, p in found.items() if owners[key] == 1 and p.dtype in _FLOATS}


def _reads_weight_of_layer(module: nn.Module) -> bool:
    """Whether it is an adapter that computes with the weight of the layer it wraps (DoRA)."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
        return False
    if type(module) is not peft.tuners.lora.Linear:
        return True
    return bool(getattr(module, "lora_variant", {})) or any(module.use_dora.values())


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """For a while, what is saved of a model is fp32, its frozen weights too.

    Of a model with adapters the frozen weights are not saved, and stay as they are.
    """
    held = [p for p in model.parameters() if p.dtype == torch.bfloat16 and not p.requires_grad]
    held = [] if hasattr(model, "peft_config") else held
    for parameter in held:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter in held:
            parameter.data = parameter.data.bfloat16()


def widest(model: nn.Module) -> torch.dtype:
    """The dtype that holds every floating parameter of a model."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return functools.reduce(torch.promote_types, dtypes, torch.float32)
