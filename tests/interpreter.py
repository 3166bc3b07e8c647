"""Makes Triton's interpreter several times faster; results stay the same bits.

It spends its time not in NumPy but in scanning its whole language at every call of a helper, in
checking every 32-bit sum and product for overflow, in rebuilding a table of dtypes, and in
describing the shape of every intermediate result anew. Tests that want the overflow checks turn
them on again with `overflow_checks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_scan_language = interpreter._patch_lang
_slow_np_dtype = interpreter._get_np_dtype
_scanned: set[int] = set()
_np_dtypes: dict[str, np.dtype[Any]] = {}
_new_block_type = tl.block_type.__init__
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}
_shapes: dict[tuple[int, ...], Any] = {}
_broadcast = TritonSemantic.broadcast_impl_value
_new_tensor = tl.tensor.__init__
_tensors: dict[Any, dict[str, Any]] = {}


def _scan_once(function: Any) -> Any:
    """Once per module and launch, instead of once per call."""
    module = id(function.__globals__)
    if module in _scanned:
        return None
    is_launch = not _scanned
    _scanned.add(module)
    scope = _scan_language(function)
    if is_launch:
        restore = scope.restore

        def end_of_launch() -> None:
            _scanned.clear()
            restore()

        scope.restore = end_of_launch
    return scope


def _np_dtype(dtype: Any) -> np.dtype[Any]:
    scalar = dtype.scalar
    if isinstance(scalar, tl.pointer_type):
        return np.dtype(np.uint64)
    if scalar.name not in _np_dtypes:
        _np_dtypes[scalar.name] = _slow_np_dtype(scalar)
    return _np_dtypes[scalar.name]


def _block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """The attributes of the first type of this name and shape."""
    sizes = tuple(getattr(size, "value", size) for size in getattr(shape, "values", shape))
    key = (element_ty.name, *sizes)
    if key not in _block_types:
        _new_block_type(self, element_ty, shape)
        self.shape = _shapes.setdefault(sizes, self.shape)
        _block_types[key] = dict(vars(self))
    vars(self).update(_block_types[key], element_ty=element_ty)


def _tensor(self: Any, handle: Any, type: Any) -> None:
    """The attributes of the first tensor of a shape."""
    key = tuple(type.shape.values) if type.is_block() else ()
    if key not in _tensors:
        _new_tensor(self, handle, type)
        _tensors[key] = {"shape": self.shape, "numel": self.numel}
    vars(self).update(_tensors[key], handle=handle, type=type, dtype=type.scalar)


def _broadcast_value(self: Any, lhs: Any, rhs: Any) -> Any:
    one, other = lhs.type, rhs.type
    if one.is_block() and other.is_block() and one.shape is other.shape:
        return lhs, rhs
    return _broadcast(self, lhs, rhs)


def speed_up() -> None:
    tl.block_type.__init__ = _block_type  # type: ignore[method-assign]
    tl.tensor.__init__ = _tensor  # type: ignore[method-assign]
    TritonSemantic.broadcast_impl_value = _broadcast_value  # type: ignore[method-assign]
    interpreter._patch_lang = _scan_once
    interpreter._get_np_dtype = _np_dtype
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )


@contextlib.contextmanager
def overflow_checks() -> Iterator[None]:
    builder = interpreter.interpreter_builder
    before = builder.options
    builder.options = interpreter.InterpreterOptions(sanitize_overflow=True)
    yield
    builder.options = before
