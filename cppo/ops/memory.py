"""Whether tensors share memory, which would make `inplace=True` wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cppo.ops.checks import under_transform

# Steps of the search for a shared byte. Rows of every usual layout take a few dozen.
_SEARCH_STEPS = 10_000
# Of a dimension: its stride in bytes, and the lowest and highest multiple of it.
_Dims = list[tuple[int, int, int]]


def _reaches(start: int, dims: _Dims, low: int, high: int) -> bool:
    """Whether some start + sum of stride * x is in [low, high], with one x of every dimension.

    The largest stride comes first: few of its multiples leave the others within reach. What the
    search cannot decide counts as reached.
    """
    merged: dict[int, tuple[int, int]] = {}
    for stride, least, most in dims:
        before = merged.get(stride, (0, 0))
        merged[stride] = (before[0] + least, before[1] + most)
    order = sorted(merged.items(), reverse=True)
    steps = _SEARCH_STEPS

    def search(start: int, level: int) -> bool:
        nonlocal steps
        steps -= 1
        if steps < 0 or level == len(order):
            return steps < 0 or low <= start <= high
        stride, (least, most) = order[level]
        rest_least = sum(s * least for s, (least, _) in order[level + 1 :])
        rest_most = sum(s * most for s, (_, most) in order[level + 1 :])
        first = max(least, -((start + rest_most - low) // stride))
        last = min(most, (high - start - rest_least) // stride)
        return any(search(start + stride * x, level + 1) for x in range(first, last + 1))

    return search(start, 0)


def _dims(tensor: Tensor, sign: int) -> _Dims:
    """The dimensions along which the address moves; with sign -1 it moves down."""
    item = tensor.element_size()
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    ends = [(stride * item, sign * (size - 1)) for size, stride in pairs if size > 1 and stride]
    return [(stride, min(0, end), max(0, end)) for stride, end in ends]


def _span(tensor: Tensor) -> int:
    """Bytes from the first of a tensor to the end of its last."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    return sum(stride * most for stride, _, most in _dims(tensor, 1)) + tensor.element_size()


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have a byte in common. An empty one has none; neither have interleaved
    slices of one tensor."""
    if one.numel() == 0 or other.numel() == 0 or one.is_meta or other.is_meta:
        return False
    apart = one.data_ptr() - other.data_ptr()
    if apart >= _span(other) or -apart >= _span(one):
        return False  # as most are
    low, high = 1 - one.element_size(), other.element_size() - 1
    return _reaches(apart, [*_dims(one, 1), *_dims(other, -1)], low, high)


def shares_own_memory(tensor: Tensor) -> bool:
    """Whether two entries of a tensor are one place in memory, as those of an expanded one are."""
    if tensor.numel() == 0 or tensor.is_contiguous():
        return False
    if any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
        return True
    dims = sorted(_dims(tensor, 1), reverse=True)
    # Of two such entries, the indices differ first in one dimension, and then in any way.
    return any(
        _reaches(0, [(stride, 1, most), *((s, -m, m) for s, _, m in dims[k + 1 :])], 0, 0)
        for k, (stride, _, most) in enumerate(dims)
    )


def checked_inplace(
    op: str, inplace: Any, logits: Mapping[str, Tensor | None], **read: Tensor | None
) -> bool:
    """Whether gradients may be written into these logits.

    Args:
        op: of the message.
        inplace: what the caller asked for.
        logits: what is written, by its name.
        read: what the backward reads besides, by its name.
    Raises:
        TypeError: `inplace` is no bool.
        ValueError: a gradient would be written over another, or over what is still read.
    """
    if not isinstance(inplace, bool):
        raise TypeError(f"cppo.{op}: inplace must be True or False, got {inplace!r}")
    # torch.compile plans memory itself, and the tensors of torch.func have none of their own.
    if not inplace or torch.compiler.is_compiling() or under_transform():
        return False
    written = [(name, tensor) for name, tensor in logits.items() if tensor is not None]
    others = [(name, tensor) for name, tensor in read.items() if tensor is not None]
    for index, (name, tensor) in enumerate(written):
        if shares_own_memory(tensor):
            raise ValueError(
                f"cppo.{op}: {name} must have its own memory for every entry with inplace=True, "
                f"got strides {tensor.stride()} for shape {tuple(tensor.shape)}"
            )
        for other_name, other in [*written[:index], *others]:
            if share_memory(tensor, other):
                raise ValueError(
                    f"cppo.{op}: {name} and {other_name} must not share memory with inplace=True, "
                    f"got shapes {tuple(tensor.shape)} and {tuple(other.shape)} that overlap"
                )
    return True
