"""Packing as `torch.library` ops: what they tell torch.compile, and their gradients.

The schemas stand in csrc/cppo.cpp; csrc/cpu and csrc/cuda implement them:

    pack_sizes        masks, kept -> cu_seqlens, row_cu_seqlens, [S, T, longest, first promptless]
    pack_completions  the streams, and every per-token tensor at the targets, in one launch
    unpack            (T,) values to their places in (B, L), zero elsewhere
    gather_tokens     (B, L) values at the targets: (T,)

The places of the targets are distinct, so `unpack` and `gather_tokens` are each other's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cppo.fused.autograd import refuse_transforms

Lengths = tuple[Sequence[int], Sequence[int]]


def pack_completions(
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    kept: Tensor,
    per_token: Sequence[Tensor] = (),
    lengths: Lengths | None = None,
) -> tuple[Any, ...]:
    """As `cppo.reference.pack_completions`; waits for the device once, and not with `lengths`."""
    refuse_transforms("cppo.pack_completions", per_token)

    def as_mask(mask: Tensor) -> Tensor:
        return mask.bool() if mask.is_floating_point() else mask

    masks = as_mask(attention_mask), as_mask(completion_mask)
    if lengths is None:
        cu_seqlens, row_cu_seqlens, sizes = torch.ops.cppo.pack_sizes(*masks, kept)
        num_tokens, num_rows, longest, orphan = sizes.tolist()
    else:
        orphan = -1
        cu_seqlens, row_cu_seqlens = (_cumulative(own, kept.device) for own in lengths)
        num_tokens, num_rows, longest = sum(lengths[0]), sum(lengths[1]), max(lengths[0], default=0)
    ids, positions, rows, targets, tokens, at_targets, gathered = torch.ops.cppo.pack_completions(
        input_ids, *masks, kept, cu_seqlens, row_cu_seqlens, list(per_token), num_tokens, num_rows
    )
    streams = (ids, positions, cu_seqlens, rows, targets, row_cu_seqlens, tokens, at_targets)
    return *streams, gathered, longest, orphan


def unpack(
    values: Sequence[Tensor], target_index: Tensor, num_completions: int, length: int
) -> list[Tensor]:
    """As `cppo.reference.unpack`."""
    refuse_transforms("cppo.unpack", values)
    return torch.ops.cppo.unpack(list(values), target_index, num_completions, length)


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    sums = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    # A copy that is only queued: the host goes on.
    return sums.to(device, non_blocking=True)


def register() -> None:
    """Fakes and gradients of the ops of the loaded extension."""
    fakes: dict[str, Any] = {
        "pack_sizes": _sizes_fake,
        "pack_completions": _pack_fake,
        "unpack": _unpack_fake,
        "gather_tokens": _gather_fake,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"cppo::{name}", fake)
    autograd = torch.library.register_autograd
    autograd("cppo::pack_completions", _pack_backward, setup_context=_pack_context)
    autograd("cppo::unpack", _unpack_backward, setup_context=_unpack_context)
    autograd("cppo::gather_tokens", _gather_backward, setup_context=_gather_context)


def _sizes_fake(attention_mask, completion_mask, kept):
    def new(size, dtype):
        return attention_mask.new_empty(size, dtype=dtype)

    bounds = kept.shape[0] + 1
    return new(bounds, torch.int32), new(bounds, torch.int32), new(4, torch.int64)


def _pack_fake(
    input_ids,
    attention_mask,
    completion_mask,
    kept,
    cu_seqlens,
    row_cu_seqlens,
    per_token,
    num_tokens,
    num_rows,
):
    def new(size, dtype=torch.int64):
        return input_ids.new_empty(size, dtype=dtype)

    return (
        new(num_tokens, input_ids.dtype),
        new(num_tokens),
        new(num_rows),
        new(num_rows, input_ids.dtype),
        new(num_tokens),
        new(num_rows),
        [value.new_empty(num_rows) for value in per_token],
    )


def _unpack_fake(values, target_index, num_completions, length):
    return [value.new_empty(num_completions, length) for value in values]


def _gather_fake(values, target_index):
    return [value.new_empty(target_index.shape) for value in values]


def _spread(grads: Sequence[Tensor | None], index: Tensor, shape: Sequence[int]) -> list[Any]:
    """Gradients of what was gathered: `unpack` of those that are there."""
    present = [grad for grad in grads if grad is not None]
    placed = iter(torch.ops.cppo.unpack(present, index, *shape) if present else ())
    return [None if grad is None else next(placed) for grad in grads]


def _collect(grads: Sequence[Tensor | None], index: Tensor) -> list[Any]:
    """Gradients of what was unpacked."""
    present = [grad for grad in grads if grad is not None]
    taken = iter(torch.ops.cppo.gather_tokens(present, index) if present else ())
    return [None if grad is None else next(taken) for grad in grads]


def _pack_context(ctx, inputs, output):
    ctx.save_for_backward(output[5])
    ctx.shape, ctx.count = tuple(inputs[0].shape), len(inputs[6])


def _pack_backward(ctx, *grads):
    (index,) = ctx.saved_tensors
    along = _spread(grads[6], index, ctx.shape) if ctx.count else []
    return None, None, None, None, None, None, along, None, None


def _unpack_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _unpack_backward(ctx, grads):
    (index,) = ctx.saved_tensors
    return _collect(grads, index), None, None, None


def _gather_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.shape = tuple(inputs[0][0].shape) if inputs[0] else (0, 0)


def _gather_backward(ctx, grads):
    (index,) = ctx.saved_tensors
    return _spread(grads, index, ctx.shape), None
