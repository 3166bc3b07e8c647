"""Sums over the processes of a data-parallel run; the identity with one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from cppo.options.trainer import CPPOConfig
from cppo.train.stopping import Stopped, Stopping

_T = TypeVar("_T")


# Gradients are exchanged in buckets of so many bytes, which is the memory that an exchange takes.
BUCKET_BYTES = 128 * 2**20


class ProcessError(RuntimeError):
    """Another process of the run has ended, or did not come within the time limit."""


def accelerator_for(config: CPPOConfig) -> Accelerator:
    """accelerate's view of the processes, devices and trackers of a run."""
    timeout = timedelta(seconds=config.process_timeout)
    return Accelerator(
        # Left to itself, accelerate takes every process of a machine without a GPU for one.
        cpu=not torch.accelerator.is_available(),
        log_with=list(config.trackers) or None,
        project_dir=config.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
    )


class Processes:
    """The processes that share a run: `rank` of `size`.

    Every method but `share` is collective: all processes must call it.

    Args:
        timeout: seconds after which a process that waits for the others gives up; for messages,
            the process group has the limit.
    Raises: ProcessError from every collective method, when the others do not come.
    """

    def __init__(self, accelerator: Accelerator, timeout: float) -> None:
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self.is_local_main = accelerator.is_local_main_process
        self._device = accelerator.device
        self._timeout = timeout
        self._stopping: Stopping | None = None

    @contextmanager
    def stoppable(self, stopping: Stopping) -> Iterator[None]:
        """In here, a process that was asked to stop stops all of them, at one point of the run.

        Before every exchange the processes tell each other whether to stop. One that stops between
        two exchanges tells it in place of the next one, to which the others come.

        Raises: Stopped, on every process.
        """
        self._stopping = stopping if self.size > 1 else None
        try:
            yield
            self._ask_all()  # the exchanges that follow do not ask any more
        except Stopped:
            if self._stopping is not None:
                self._tell(True)
            raise
        finally:
            self._stopping = None

    def _ask_all(self) -> None:
        """Raises Stopped on every process if one was asked to stop."""
        if self._stopping is not None and self._tell(self._stopping.signal is not None):
            self._stopping = None  # every process knows now
            raise Stopped

    def _tell(self, stop: bool) -> bool:
        told = torch.tensor([float(stop)], device=self._device)
        with self._waiting():
            dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told.item())

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except RuntimeError as error:  # the base of all errors of torch.distributed
            seconds = time.monotonic() - started
            raise ProcessError(
                f"cppo: process {self.rank} of {self.size} waited {seconds:.0f} s for the others: "
                f"one has ended, is stuck, or is slower than process_timeout = {self._timeout:g} s "
                f"allows ({str(error).splitlines()[0]})"
            ) from error

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
        self._ask_all()
        with self._waiting():
            dist.all_reduce(totals)
        return totals.tolist()

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in their order; anything that can be pickled."""
        if self.size == 1:
            return [value]
        self._ask_all()
        values: list[Any] = [None] * self.size
        with self._waiting():
            dist.all_gather_object(values, value)
        return values

    def joined(self, *tensors: Tensor) -> tuple[list[Tensor], slice]:
        """Each tensor of all processes as one on the CPU, and where the entries of this one are."""
        parts = self.gather([tensor.cpu() for tensor in tensors])
        start = sum(len(part[0]) for part in parts[: self.rank])
        own = slice(start, start + len(tensors[0]))
        return [torch.cat(same) for same in zip(*parts, strict=True)], own

    def together(self, call: Callable[[], _T]) -> _T:
        """What `call` returns here. If it raises on one process, it raises on every one.

        So none goes on, or waits for another that has gone.
        """
        result, error = None, None
        try:
            result = call()
        except Exception as caught:
            error = caught
        words = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(words):
            if text is not None:
                raise ValueError(f"{text} (on process {rank})")
        return result  # type: ignore[return-value]

    def of_first(self, call: Callable[[], _T]) -> _T:
        """What `call` returns on the first process; no other one calls it. It must pickle."""
        own = self.together(call if self.is_main else lambda: None)
        return self.gather(own)[0]

    def must_agree(self, what: dict[str, Any]) -> None:
        """Raises ValueError on every process if one has something else than the first."""
        first, *others = self.gather(what)
        for rank, other in enumerate(others, start=1):
            for name in {**first, **other}:
                one, another = first.get(name), other.get(name)
                if one != another:
                    raise ValueError(
                        f"cppo.CPPOTrainer: {name} must be the same on every process, is {one!r} "
                        f"on process 0 and {another!r} on process {rank}"
                    )

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces every gradient by its sum over the processes; none counts as zero.

        A parameter that has one on no process (of a vision tower, in a step of text) is left
        without: AdamW passes it over, as with one process.
        """
        if self.size == 1:
            return
        counts = self.sum([float(p.grad is not None) for p in parameters])
        for p, count in zip(parameters, counts, strict=True):
            if count and p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in parameters if p.grad is not None]
        for bucket in _buckets(gradients):
            parts = [gradient.flatten() for gradient in bucket]
            flat = torch.cat(parts) if len(parts) > 1 else parts[0]
            with self._waiting():
                dist.all_reduce(flat)
            totals = flat.split([gradient.numel() for gradient in bucket])
            for gradient, total in zip(bucket, totals, strict=True):
                gradient.copy_(total.view_as(gradient))

    def same_weights(self, model: nn.Module) -> None:
        """Gives every process the weights of the first."""
        if self.size > 1:
            with self._waiting():
                for p in model.parameters():
                    dist.broadcast(p.data, 0)


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of BUCKET_BYTES together at most; a larger one is by itself."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and size + gradient.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket
