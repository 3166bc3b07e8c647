"""What NCCL does in TRL's server mode, between CPUs: a broadcast over vLLM's own TCP group.

TRL sends the weights through vLLM's NCCL engine, which asks for CUDA in four places; these, and no
more, are replaced on both sides. The rendezvous, the requests, the packing of the tensors, and how
the server loads them are vLLM's and TRL's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import nccl_common, packed_tensor


class Communicator:
    """In place of a PyNcclCommunicator, which without NCCL broadcasts nothing and says nothing."""

    def __init__(self, group: StatelessProcessGroup) -> None:
        self.group: Any = group

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        """Send the tensor if this is rank `src`, else overwrite it with what `src` sent."""
        received = self.group.broadcast(tensor, src)
        if received is not tensor:
            tensor.copy_(received)

    def destroy(self) -> None:
        self.group = None


class Stream:
    """A CUDA stream on which everything has already run."""

    def synchronize(self) -> None:
        pass


def install(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Args: put: puts a value in place of an attribute, such as `monkeypatch.setattr`."""

    def communicator(
        master_address: str, master_port: int, rank: int, world_size: int, device: Any
    ) -> Communicator:
        return Communicator(
            StatelessProcessGroup.create(master_address, master_port, rank, world_size)
        )

    put(nccl_common, "stateless_init_process_group", communicator)
    put(packed_tensor, "_get_streams", lambda device, count: (Stream(),) * count)
    put(torch.cuda, "stream", lambda stream: nullcontext())
    put(torch.accelerator, "current_device_index", lambda: 0)
