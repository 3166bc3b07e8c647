"""Makes Triton's interpreter several times faster; results stay the same bits.

It spends its time not in NumPy but in scanning its whole language at every call of a helper, in
checking every 32-bit sum and product for overflow, and in rebuilding a table of dtypes. Tests that
want the overflow checks turn them on again with `overflow_checks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_scan_language = interpreter._patch_lang
_slow_np_dtype = interpreter._get_np_dtype
_scanned: set[int] = set()
_np_dtypes: dict[str, np.dtype[Any]] = {}


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


def speed_up() -> None:
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
