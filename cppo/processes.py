"""Sums over the processes of a data-parallel run; the identity with one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


class Processes:
    """The processes that share a run: `rank` of `size`.

    Every method but `share` is collective: all processes must call it.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self._device = accelerator.device

    def share(self, name: str, total: int) -> int:
        """The equal part of `total` that each process has.

        Raises: ValueError naming `name` if it does not divide evenly.
        """
        if total % self.size:
            raise ValueError(
                f"cppo.CPPOTrainer: {name} must divide evenly over the processes, "
                f"got {total} over {self.size}"
            )
        return total // self.size

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums of each number over the processes, in fp64."""
        if self.size == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(totals)
        return totals.tolist()

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in their order; anything that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces every gradient by its sum over the processes; none counts as zero."""
        if self.size == 1:
            return
        gradients = []
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            gradients.append(p.grad)
        flat = _flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        for own, total in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
            own.copy_(total)

    def same_weights(self, model: nn.Module) -> None:
        """Gives every process the weights of the first."""
        if self.size > 1:
            for p in model.parameters():
                dist.broadcast(p.data, 0)
