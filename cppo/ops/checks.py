"""The checks that several ops share, and their wording: op, argument, expected, actual.

A check that reads values costs a device synchronisation, so on a GPU such checks run only with
`CPPO_DEBUG=1`; on the CPU they always run. Nothing reads values while torch.compile traces.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cppo.options.loss import LossConfig
from cppo.options.values import is_number

# What PyTorch computes in; it has no sums of fp8.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of the ops on hidden states: in which dtype the logits of half-precision inputs are.
LOGITS_DTYPES = ("fp32", "input")


def may_read(*tensors: Tensor | None) -> bool:
    """Whether looking at the values of these tensors is free (or asked for)."""
    if torch.compiler.is_compiling():
        return False
    if all(tensor is None or tensor.is_cpu for tensor in tensors):
        return True
    return os.environ.get("CPPO_DEBUG") == "1"


def _of(shape: Sequence[int]) -> str:
    return str(tuple(shape))


def under_transform() -> bool:
    """Whether a transform of torch.func is at work (vmap, grad, jvp and what is made of them)."""
    return torch._C._are_functorch_transforms_active()


def _is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


_KINDS: dict[str, Callable[[torch.dtype], bool]] = {
    "any": lambda dtype: True,
    "real": lambda dtype: dtype in FLOATS or dtype == torch.bool or _is_integer(dtype),
    "floating": lambda dtype: dtype in FLOATS,
    "integer": _is_integer,
}


def check_tensor(op: str, name: str, value: Any, kind: str = "any") -> None:
    """TypeError unless `value` is a tensor of the kind "any", "real", "floating" or "integer"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"cppo.{op}: {name} must be a Tensor, got {type(value).__name__}")
    if not _KINDS[kind](value.dtype):
        which = " of at least 16 bits" if value.is_floating_point() and kind != "integer" else ""
        raise TypeError(f"cppo.{op}: {name} must be of {kind} dtype{which}, got {value.dtype}")


def check_ndim(op: str, name: str, tensor: Tensor, *symbols: str) -> None:
    """ValueError unless the tensor has as many dimensions as one of `symbols`, like "(B, L)"."""
    if tensor.ndim not in [sum(map(str.isalpha, form)) for form in symbols]:
        raise ValueError(
            f"cppo.{op}: {name} must be {' or '.join(symbols)}, got shape {_of(tensor.shape)}"
        )


def check_vector(op: str, name: str, tensor: Tensor) -> None:
    """ValueError unless the tensor is one-dimensional."""
    if tensor.ndim != 1:
        raise ValueError(f"cppo.{op}: {name} must be (B,), got shape {_of(tensor.shape)}")


def check_shape(
    op: str, name: str, tensor: Tensor, symbols: str, shape: Sequence[int], like: str
) -> None:
    """ValueError unless the tensor has the shape that `like` asks for."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"cppo.{op}: {name} must be {symbols} = {_of(shape)} like {like}, "
            f"got {_of(tensor.shape)}"
        )


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """ValueError unless all of the tensors are where the first one is (TypeError: no tensor)."""
    first, device = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensor(op, name, tensor)
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(
                f"cppo.{op}: {name} must be on {device} like {first}, got {tensor.device}"
            )


def check_choice(op: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """ValueError unless `value` is one of `choices`."""
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"cppo.{op}: {name} must be one of {allowed}, got {value!r}")


def check_config(op: str, config: Any, name: str = "config") -> None:
    """TypeError unless `config` is a LossConfig."""
    if not isinstance(config, LossConfig):
        raise TypeError(f"cppo.{op}: {name} must be a cppo.LossConfig, got {type(config).__name__}")


def check_positive(op: str, name: str, value: Any) -> None:
    """ValueError unless `value` is a finite number > 0 (TypeError: not a number)."""
    if not is_number(value):
        raise TypeError(f"cppo.{op}: {name} must be a number > 0, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"cppo.{op}: {name} must be finite and > 0, got {value!r}")


def check_interval(
    op: str, name: str, value: Any, low: float, high: float, closed: bool = True
) -> None:
    """ValueError unless low <= value <= high (value < high if not `closed`)."""
    words = f"a number in [{low:g}, {high:g}" + ("]" if closed else ")")
    if not is_number(value):
        raise TypeError(f"cppo.{op}: {name} must be {words}, got {type(value).__name__}")
    if not (low <= value <= high and (closed or value < high)):
        raise ValueError(f"cppo.{op}: {name} must be {words}, got {value!r}")


def check_integer(op: str, name: str, value: Any, at_least: int) -> None:
    """ValueError unless `value` is an integer >= at_least (TypeError: not an integer)."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"cppo.{op}: {name} must be an integer, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"cppo.{op}: {name} must be >= {at_least}, got {value}")


def check_finite(op: str, name: str, tensor: Tensor) -> None:
    """ValueError with the index and value of the first entry that is NaN or infinite."""
    if not may_read(tensor) or not tensor.dtype.is_floating_point:
        return
    if math.isfinite(tensor.detach().sum()):  # torch warns of a number that has a gradient
        return  # as most are; a sum of large numbers may not be
    bad = (~torch.isfinite(tensor)).nonzero()
    if bad.numel():
        index = int(bad[0, 0])
        raise ValueError(
            f"cppo.{op}: {name} must be finite, got {tensor[index].item()} at index {index}"
        )


def check_weights(op: str, name: str, weights: Tensor, mask: Tensor | None) -> None:
    """ValueError with position and value of the first weight that is not finite or below 0, where
    not masked."""
    if not may_read(weights, mask):
        return
    outside = ~((weights >= 0) & (weights < math.inf))
    _check_none(op, f"{name} must be finite and >= 0", weights, outside, mask)


def _check_none(op: str, rule: str, values: Tensor, bad: Tensor, mask: Tensor | None) -> None:
    """ValueError with position and value of the first entry that breaks a rule where not masked."""
    places = (bad if mask is None else bad & mask).nonzero()
    if places.numel():
        place = tuple(places[0].tolist())
        where = place if len(place) > 1 else place[0]
        raise ValueError(
            f"cppo.{op}: {rule} where not masked, got {values[place].item()} at {where}"
        )


def check_groups(op: str, name: str, values: Tensor, group_size: int) -> None:
    """Errors unless `values` is (B,) real and finite and B is a multiple of group_size."""
    check_tensor(op, name, values, "real")
    check_vector(op, name, values)
    check_integer(op, "group_size", group_size, at_least=1)
    if values.numel() % group_size:
        raise ValueError(
            f"cppo.{op}: {name} must hold a multiple of group_size = {group_size} values, "
            f"got {values.numel()}"
        )
    check_finite(op, name, values)


def check_indices(op: str, name: str, indices: Tensor, size: int) -> None:
    """ValueError unless all are in [0, size); reads them."""
    bad = ((indices < 0) | (indices >= size)).nonzero()
    if len(bad):
        value = indices[bad[0, 0]].item()
        raise ValueError(f"cppo.{op}: {name} must be in [0, {size}), got {value}")


def check_cu_seqlens(
    op: str, cu_seqlens: Tensor, num_rows: int, num_completions: int | None = None
) -> None:
    """Errors unless cu_seqlens starts at 0, never decreases and ends at the number of rows."""
    check_tensor(op, "cu_seqlens", cu_seqlens, "integer")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0:
        raise ValueError(
            f"cppo.{op}: cu_seqlens must be (completions + 1,), got {_of(cu_seqlens.shape)}"
        )
    if num_completions is not None and cu_seqlens.numel() != num_completions + 1:
        raise ValueError(
            f"cppo.{op}: cu_seqlens must be (B + 1,) = ({num_completions + 1},) for "
            f"advantages of {num_completions} completions, got {_of(cu_seqlens.shape)}"
        )
    if not may_read(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cppo.{op}: cu_seqlens must start at 0, got {bounds[0]}")
    for at, (start, end) in enumerate(pairwise(bounds), 1):
        if end < start:
            raise ValueError(
                f"cppo.{op}: cu_seqlens must not decrease, got {start} then {end} at index {at}"
            )
    if bounds[-1] != num_rows:
        raise ValueError(f"cppo.{op}: cu_seqlens must end at T = {num_rows}, got {bounds[-1]}")


def check_layout(op: str, name: str, tensor: Tensor, cu_seqlens: Tensor | None) -> None:
    """ValueError unless cu_seqlens comes with the packed layout and only with it."""
    if tensor.ndim == 1 and cu_seqlens is None:
        raise ValueError(
            f"cppo.{op}: cu_seqlens must be given for packed {name} of shape "
            f"{tuple(tensor.shape)}; padded {name} are (B, L)"
        )
    if tensor.ndim == 2 and cu_seqlens is not None:
        raise ValueError(
            f"cppo.{op}: cu_seqlens must be None for padded {name} of shape {tuple(tensor.shape)}"
        )


def check_targets(op: str, targets: Tensor, mask: Tensor | None, vocabulary: int) -> None:
    """ValueError with position and value of the first unmasked target outside [0, V)."""
    if not may_read(targets, mask):
        return
    if targets.numel():
        lowest, highest = targets.aminmax()
        if lowest.item() >= 0 and highest.item() < vocabulary:
            return
    outside = (targets < 0) | (targets >= vocabulary)
    rule = f"targets must be in [0, V) = [0, {vocabulary})"
    _check_none(op, rule, targets, outside, mask)


def checked_mask(op: str, mask: Tensor | None, targets: Tensor, like: str) -> Tensor | None:
    """The mask as bool, after checking that it covers what it masks."""
    if mask is None:
        return None
    check_tensor(op, "mask", mask, "real")
    symbols = "(T,)" if targets.ndim == 1 else "(B, L)"
    check_shape(op, "mask", mask, symbols, targets.shape, like)
    return mask.bool()


def check_rows(op: str, name: str, rows: Tensor, targets: Tensor, last: str) -> None:
    """Errors unless `rows` is targets' shape plus one last dimension of at least one entry."""
    check_tensor(op, name, rows, "floating")
    check_tensor(op, "targets", targets, "integer")
    check_ndim(op, "targets", targets, "(B, L)", "(T,)")
    layout = "(T" if targets.ndim == 1 else "(B, L"
    if rows.ndim != targets.ndim + 1 or rows.shape[:-1] != targets.shape or rows.shape[-1] == 0:
        expected = ", ".join([*map(str, targets.shape), f"{last} >= 1"])
        raise ValueError(
            f"cppo.{op}: {name} must be {layout}, {last}) = ({expected}) like targets, "
            f"got {_of(rows.shape)}"
        )


def check_suppressed(op: str, suppressed: Tensor, vocabulary: int) -> None:
    """Errors unless suppressed is (K,) int64 in [0, V)."""
    check_tensor(op, "suppressed", suppressed, "integer")
    if suppressed.dtype != torch.int64:
        raise TypeError(f"cppo.{op}: suppressed must be torch.int64, got {suppressed.dtype}")
    if suppressed.ndim != 1:
        raise ValueError(f"cppo.{op}: suppressed must be (K,), got shape {_of(suppressed.shape)}")
    if not may_read(suppressed):
        return
    for at, token in enumerate(suppressed.tolist()):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"cppo.{op}: suppressed must be in [0, V) = [0, {vocabulary}), got {token} at {at}"
            )


def check_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    suppressed: Tensor | None = None,
) -> None:
    """Errors unless weight (V, D) and bias (V,) fit the last dimension of hidden, and suppressed
    (K,) the first of weight."""
    check_tensor(op, "weight", weight, "floating")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"cppo.{op}: weight must be (V, D) = (V >= 1, {hidden.shape[-1]}) like hidden, "
            f"got {_of(weight.shape)}"
        )
    check_same_device(op, weight=weight, bias=bias, suppressed=suppressed)
    if weight.is_meta and not hidden.is_meta:
        raise ValueError(f"cppo.{op}: weight must hold values, got one on meta (offloaded?)")
    heads: list[tuple[str, Tensor]] = [("weight", weight)]
    if bias is not None:
        check_tensor(op, "bias", bias, "floating")
        check_shape(op, "bias", bias, "(V,)", weight.shape[:1], "weight")
        heads.append(("bias", bias))
    for name, tensor in heads:
        if tensor.dtype != hidden.dtype:
            raise TypeError(
                f"cppo.{op}: {name} must be {hidden.dtype} like hidden, got {tensor.dtype}"
            )
    if suppressed is not None:
        check_suppressed(op, suppressed, len(weight))


def checked_scale(op: str, logit_scale: Any, softcap: Any) -> tuple[float, float | None]:
    """The scale of the logits, and the softcap of logits without that scale.

    scale * z and c * tanh(scale * z / c) are scale times z and c/scale * tanh(z / (c/scale)): the
    scale goes into the temperature, and only the cap is left for the ops.
    """
    check_positive(op, "logit_scale", logit_scale)
    if softcap is None:
        return float(logit_scale), None
    check_positive(op, "softcap", softcap)
    return float(logit_scale), softcap / logit_scale


def to(device: torch.device, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors on a device."""
    return tuple(tensor if tensor is None else tensor.to(device) for tensor in tensors)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What torch.autocast casts the inputs of F.linear to; None where it is off."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def cast(dtype: torch.dtype | None, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in an autocast dtype; as they are for None, and those of fp64."""
    if dtype is None:
        return tensors
    return tuple(
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in tensors
    )
