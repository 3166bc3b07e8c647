"""A model's arithmetic in fp64, whatever its weights are stored in, without a copy of it.

Two ways of computing the same thing differ by rounding, and how much rounding is too much depends
on the depth of a model, on its dtype, and on whether a router of a mixture of experts stands at a
tie. In fp64 the question does not come up.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Neither what quantised weights nor what sharded tensors are made of.
PLAIN = (Tensor, torch.nn.Parameter)
_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_LOOKUP = torch.ops.aten.embedding.default


class DoublePrecision(TorchDispatchMode):
    """While it is entered, every op on floating tensors runs and returns in fp64.

    Weights are cast where they are read and stay as they are; a dtype asked for by name (a norm in
    fp32, autocast) becomes fp64 too. What is written into a tensor that was there before is
    rounded to its dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self._convolutions = _Convolutions()

    def __enter__(self) -> Any:
        self._convolutions.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._convolutions.__exit__(*error)

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _NARROW:
            kwargs["dtype"] = torch.float64
        if op.is_view:  # one expert of many, a transposed weight: cast when it is read
            return op(*args, **kwargs)
        written = _written(op, args, kwargs)
        if op is not _LOOKUP:  # a few rows of a long table: cast those
            dtype = written[0].dtype if written else torch.float64
            args = _cast(args, dtype, written)
            kwargs = {name: _cast(value, dtype, written) for name, value in kwargs.items()}
        output = op(*args, **kwargs)
        return output if written else _cast(output, torch.float64, [])


class _Convolutions(TorchFunctionMode):
    """Casts what convolutions are called with: they compare dtypes before they dispatch."""

    def __torch_function__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if op in _CONVOLUTIONS:
            args = _cast(args, torch.float64, [])
        return op(*args, **(kwargs or {}))


def _written(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The floating tensors that an op writes into."""
    given = [args[index] if index < len(args) else kwargs.get(name) for index, name in _outputs(op)]
    return [x for x in given if isinstance(x, Tensor) and x.is_floating_point()]


@functools.cache
def _outputs(op: Any) -> list[tuple[int, str]]:
    """Place and name of the arguments that an op writes into."""
    arguments = enumerate(op._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info and a.alias_info.is_write]


def _cast(x: Any, dtype: torch.dtype, but: list[Tensor]) -> Any:
    """Every plain floating tensor in `x` in `dtype`; those in `but` as they are."""
    if isinstance(x, (list, tuple)):
        return type(x)(_cast(each, dtype, but) for each in x)
    is_plain = type(x) in PLAIN and x.dtype in (torch.float64, *_NARROW)
    if not is_plain or x.dtype == dtype or any(x is kept for kept in but):
        return x
    return x.to(dtype)
