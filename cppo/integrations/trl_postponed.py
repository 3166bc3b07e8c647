"""Log-probabilities of a TRL rollout that are computed when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# What is known of log-probabilities before they are computed.
_TENSOR: Any = Tensor
_SHAPE = {_TENSOR.shape.__get__, _TENSOR.device.__get__, _TENSOR.ndim.__get__}
_KNOWN = {*_SHAPE, Tensor.size, Tensor.dim, Tensor.__len__}


class Postponed(Tensor):
    """(B, T) log-probabilities that nobody has read yet.

    Every use but a look at the shape computes them for all rows, so that a trainer that reads them
    gets what it would have got; `take` computes them for the rows that are left.
    """

    _compute: Callable[[Tensor | None], Tensor]
    _value: Tensor | None

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        device: torch.device,
        compute: Callable[[Tensor | None], Tensor],
    ) -> Postponed:
        """Return a stand-in of this shape.

        Args: compute: called with (K,) row indices by each `take`, with None by the first `read`.
        """
        made = torch.zeros((), device=device).expand(shape).as_subclass(cls)
        made._compute, made._value = compute, None
        return made

    def take(self, rows: Tensor) -> Tensor:
        """(K, T) log-probabilities of some rows."""
        return self._compute(rows) if self._value is None else self._value[rows]

    def read(self) -> Tensor:
        """(B, T) log-probabilities of all rows."""
        if self._value is None:
            self._value = self._compute(None)
        return self._value

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _KNOWN:
            return super().__torch_function__(func, types, args, kwargs or {})
        return func(*_read(args), **_read(kwargs or {}))


def _read(value: Any) -> Any:
    """The same with every postponed tensor read."""
    if isinstance(value, Postponed):
        return value.read()
    if isinstance(value, dict):
        return {key: _read(each) for key, each in value.items()}
    return type(value)(map(_read, value)) if type(value) in (list, tuple) else value
