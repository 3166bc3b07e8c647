"""How kernels are launched: views of logits, tiles, parts of rows, and what was compiled before.

A kernel on rows of logits has one program per row. Where the rows alone would leave the GPU idle,
and where gradients are written, several programs share a row: each has a part of its columns.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)


# Tensors as kernels take them


class Rows(NamedTuple):
    """A view of logits: row r starts at (r // length, r % length) strides."""

    tensor: Tensor
    length: int
    stride_b: int
    stride_l: int

    @property
    def alignment(self) -> int:
        """1: every row starts at a multiple of 16 bytes; 2: and is one long. 0: neither."""
        size = self.tensor.element_size()
        if self.tensor.data_ptr() % 16 or self.stride_b * size % 16 or self.stride_l * size % 16:
            return 0
        return 1 if self.tensor.shape[-1] * size % 16 else 2


def as_rows(logits: Tensor) -> Rows:
    """(B, L, V) or (T, V) without a copy, unless the vocabulary is strided."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.ndim == 2:
        return Rows(logits, max(1, logits.shape[0]), 0, logits.stride(0))
    return Rows(logits, max(1, logits.shape[1]), logits.stride(0), logits.stride(1))


def accumulator(*tensors: Tensor) -> torch.dtype:
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def tl_accumulator(*tensors: Tensor) -> tl.dtype:
    return tl.float64 if accumulator(*tensors) == torch.float64 else tl.float32


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Upstream gradients may be expanded; they are one number per row."""
    return None if tensor is None else tensor.contiguous()


def bytes_of(mask: Tensor | None) -> Tensor | None:
    """A bool tensor as contiguous uint8, which kernels load without conversions."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def new_gradient(logits: Tensor, places: Tensor | None = None) -> Tensor:
    """Memory for a gradient whose every row is written; zeros where places may leave some out."""
    new = torch.empty if places is None else torch.zeros
    return new(logits.shape, dtype=logits.dtype, device=logits.device)


@contextlib.contextmanager
def written_over(logits: Tensor) -> Iterator[Tensor]:
    """Where a gradient that replaces `logits` is written: they themselves, if kernels can."""
    if logits.stride(-1) == 1 or logits.shape[-1] == 1:
        yield logits
        return
    gradient = logits.contiguous()
    yield gradient
    logits.copy_(gradient)


# How much of a row a program has


class Shape(NamedTuple):
    """The tile of a program: LANES x WIDTH logits by num_warps warps."""

    lanes: int
    width: int
    num_warps: int

    @property
    def size(self) -> int:
        return self.lanes * self.width


class Split(NamedTuple):
    """Rows are cut into `splits` parts of `chunk` columns, a multiple of the tile."""

    splits: int
    chunk: int


# The one table of launch shapes: loads of 16 bytes in flight per thread and tensor, and warps.
# The fastest of five to ten on an H200; the next ones are within 3 %.
_SHAPES = {
    "token_stats": (4, 8),
    "token_stats_backward": (1, 8),
    "contrast": (2, 4),
    "contrast_backward": (1, 8),
}
# Programs per multiprocessor that keep enough loads in flight; with fewer rows, rows are split.
_PROGRAMS_PER_MULTIPROCESSOR = 8
MAX_SPLITS = 64
# Programs that write read as much: one after the other in memory, in pieces of 16 KiB, they reach
# 97 % of a copy's rate on an H200, and 92 % with a row each.
_TILES_PER_WRITER = 4


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Of a GPU. In the interpreter programs run one after the other: 1."""
    if device.type != "cuda":
        return 1
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


def launch_shape(op: str, tensor: Tensor) -> Shape:
    loads, num_warps = _SHAPES[op]
    return Shape(loads * 32 * num_warps, 16 // tensor.element_size(), num_warps)


def _cdiv(a: int, b: int) -> int:
    # Triton's own takes ten times as long.
    return -(-a // b)


def split_rows(num_rows: int, vocabulary: int, shape: Shape, device: torch.device) -> Split:
    """One program per row, or several where the rows alone would leave the GPU idle."""
    wanted = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device)
    tiles = _cdiv(vocabulary, shape.size)
    splits = max(1, min(MAX_SPLITS, _cdiv(wanted, max(1, num_rows)), tiles))
    tiles_per_split = _cdiv(tiles, splits)
    return Split(_cdiv(tiles, tiles_per_split), tiles_per_split * shape.size)


def split_for_writing(vocabulary: int, shape: Shape) -> Split:
    """Several programs per row, each of a few tiles."""
    chunk = _TILES_PER_WRITER * shape.size
    return Split(_cdiv(vocabulary, chunk), chunk)


# Kernels and launches


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit` for what `launch` launches: constants, in capitals, are all it is compiled for.

    Nothing that changes from step to step is compiled in. What rows of logits have to do with 16
    bytes is one constant, ALIGNMENT.
    """
    names = inspect.signature(function).parameters
    return triton.jit(do_not_specialize=[name for name in names if not name.isupper()])(function)


class _Parameters(NamedTuple):
    """The names of a kernel's parameters: all in order, tensors (`x_ptr`), constants (`X`)."""

    every: tuple[str, ...]
    tensors: tuple[str, ...]
    constants: tuple[str, ...]


@functools.cache
def _parameters(names: tuple[str, ...]) -> _Parameters:
    pointers = tuple(name for name in names if name.endswith("_ptr"))
    return _Parameters(names, pointers, tuple(name for name in names if name.isupper()))


def on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Launches where the tensors are: Triton itself launches on the current GPU."""

    @functools.wraps(launcher)
    def launch_there(*arguments: Any) -> Any:
        tensor = next(a for a in arguments if isinstance(a, torch.Tensor))
        if not tensor.is_cuda:
            return launcher(*arguments)
        with torch.cuda.device(tensor.device):
            return launcher(*arguments)

    return launch_there


# {what a launch depends on: the compiled kernel}
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, programs: int, num_warps: int, **arguments: Any) -> None:
    """Launches so many programs of a `kernel`.

    Triton looks up what it compiled by every argument: a launch of 22 takes 12 to 15 us on the
    host, and a loss has ten. Here the compiled kernel is found by constants, by which tensors are
    given and by their dtypes alone, and called as Triton calls it: 7 us.
    """
    names = _parameters(tuple(kernel.arg_names))
    tensors = [arguments[name] for name in names.tensors]
    key = (
        id(kernel),
        num_warps,
        next(tensor for tensor in tensors if tensor is not None).get_device(),
        *[arguments[name] for name in names.constants],
        *[None if tensor is None else tensor.dtype for tensor in tensors],
    )
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*[arguments[name] for name in names.every])
        return
    compiled = kernel[programs, 1, 1](**arguments, num_warps=num_warps)
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled


def _launch_on_rows(
    kernel: Any,
    programs: int,
    views: dict[str, Rows],
    shape: Shape,
    split: Split,
    temperature: float,
    **arguments: Any,
) -> None:
    first = next(iter(views.values()))
    for name, view in views.items():
        arguments[f"{name}_ptr"] = view.tensor
        arguments[f"{name}_stride_b"] = view.stride_b
        arguments[f"{name}_stride_l"] = view.stride_l
    launch(
        kernel,
        programs,
        shape.num_warps,
        **arguments,
        length=first.length,
        vocabulary=first.tensor.shape[-1],
        chunk=split.chunk,
        splits=split.splits,
        scale=LOG2E / temperature,
        inverse_temperature=1.0 / temperature,
        ALIGNMENT=min([view.alignment for view in views.values()]),
        ACC=tl_accumulator(first.tensor),
        LANES=shape.lanes,
        WIDTH=shape.width,
    )


def launch_statistics(
    kernel: Any,
    op: str,
    views: dict[str, Rows],
    num_rows: int,
    num_sums: int,
    temperature: float,
    **arguments: Any,
) -> None:
    """Launches a kernel that finds `num_sums` sums over every row, and what follows from them.

    Where several programs share a row, a second launch merges what they found, always in the same
    order. The kernel knows by STEP: it has "whole" rows, a "part" of a row, or to "merge" parts.

    Args:
        op: its name in the table of shapes. views: {name: logits}, as rows of one length.
        arguments: the others that the kernel has, by name.
    """
    logits = next(iter(views.values())).tensor
    shape = launch_shape(op, logits)
    split = split_rows(num_rows, logits.shape[-1], shape, logits.device)
    programs = num_rows * split.splits
    arguments["num_rows"] = num_rows
    common = (views, shape, split, temperature)
    if split.splits == 1:
        _launch_on_rows(kernel, programs, *common, **arguments, partial_ptr=None, STEP="whole")
        return
    size, dtype = programs * num_sums, accumulator(logits)
    arguments["partial_ptr"] = torch.empty(size, dtype=dtype, device=logits.device)
    _launch_on_rows(kernel, programs, *common, **arguments, STEP="part")
    one_lane_per_part = Shape(MAX_SPLITS, 1, num_warps=1)
    common = (views, one_lane_per_part, split, temperature)
    _launch_on_rows(kernel, num_rows, *common, **arguments, STEP="merge")


def launch_gradient(
    kernel: Any,
    op: str,
    views: dict[str, Rows],
    num_rows: int,
    temperature: float,
    **arguments: Any,
) -> None:
    """Launches a kernel that writes gradients, `num_rows` rows of a few programs each.

    Args: as of `launch_statistics`; `views` also holds the gradients.
    """
    logits = next(iter(views.values())).tensor
    shape = launch_shape(op, logits)
    split = split_for_writing(logits.shape[-1], shape)
    programs = num_rows * split.splits
    arguments["num_rows"] = num_rows
    _launch_on_rows(kernel, programs, views, shape, split, temperature, **arguments)
