"""LM heads that are sharded over processes: the whole weight is there only while it is used.

    DTensor   FSDP2 and tensor parallelism
    ZeRO-3    a DeepSpeed parameter, whose own shape is (0,) outside its module's forward

The weight is gathered for the forward and again for the backward: between them a process holds its
shard. The gradient of a DTensor is the mean over its mesh. That is FSDP's convention, where every
process has its own part of the batch; where all have the same batch, the mean of equal gradients is
the gradient. DeepSpeed's engine reduces the gradients of its parameters itself.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from cppo.ops.checks import cast


def _is_dtensor(tensor: Any) -> bool:
    # Whoever holds one has imported it; importing it here would cost every user.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(tensor: Any) -> bool:
    """Whether this process holds only a part of the tensor."""
    return _is_dtensor(tensor) or hasattr(tensor, "ds_id")


def _whole(shard: Any) -> Tensor:
    """The gathered values, detached."""
    with torch.no_grad():
        if _is_dtensor(shard):
            return shard.full_tensor()
        if shard.ds_status.name == "AVAILABLE":  # inside a module that reads it
            return shard.data
        import deepspeed

        with deepspeed.zero.GatheredParameters([shard]):
            # Outside, DeepSpeed gives the parameter other, empty data; these stay.
            return shard.data


def _version(shard: Any) -> int:
    return (shard if _is_dtensor(shard) else shard.ds_tensor)._version


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Any) -> Tensor:
        ctx.spec = (shard.device_mesh, shard.placements) if _is_dtensor(shard) else None
        return _whole(shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.spec is None:
            return grad
        from torch.distributed.tensor import DTensor, Partial

        mesh, placements = ctx.spec
        own = DTensor.from_local(grad / mesh.size(), mesh, [Partial()] * mesh.ndim)
        return own.redistribute(mesh, placements)


def gathered(
    *tensors: Tensor | None, dtype: torch.dtype | None = None
) -> AbstractContextManager[tuple[Any, ...]]:
    """The whole of each tensor, for the ops called inside; differentiable.

    Args:
        tensors: weight and bias of a head, sharded or not.
        dtype: of `autocast_dtype`, which they are cast to.
    """

    if not any(is_sharded(tensor) for tensor in tensors):
        return contextlib.nullcontext(cast(dtype, *tensors))
    whole = cast(dtype, *(_Gather.apply(t) if is_sharded(t) else t for t in tensors))
    shards = {
        id(full): (shard, _version(shard))
        for full, shard in zip(whole, tensors, strict=True)
        if is_sharded(shard)
    }

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        if id(saved) not in shards:
            return saved
        shard, version = shards[id(saved)]

        def again() -> Tensor:
            if _version(shard) != version:
                raise RuntimeError(
                    "cppo: a sharded weight was modified in place between forward and backward"
                )
            return cast(dtype, _whole(shard))[0]

        return again

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    @contextlib.contextmanager
    def inside() -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield whole

    return inside()
