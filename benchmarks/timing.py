"""Clocks and memory: the only file that knows how a call is timed on a device."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cppo.fused import extension

Call = Callable[[], Any]
_FLUSH_BYTES = 2**28  # larger than any L2
_QUEUED = 100  # calls that a GPU is given at most before it is waited for
_flush_buffers: dict[torch.device, torch.Tensor] = {}
_keeps_freed_memory = False


# The C library keeps small freed blocks aside: among them what is left before and after a large one
# of 64-byte alignment. They keep large neighbours apart, and a heap that is kept grows for it.
_TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"


def restart_with_joined_blocks() -> None:
    """Starts the process anew, on Linux, with a C library that joins freed blocks at once; it only
    hears of that when it starts. Comes back where nothing is to be changed."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = _TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_freed_memory() -> bool:
    """Makes the C library reuse large freed blocks instead of returning them to the kernel.

    Otherwise each call's gradients and temporaries are fresh pages, and on many machines the kernel
    needs several times longer to zero them than the ops to fill them. On a GPU PyTorch's own
    allocator does the same. It holds for every variant alike. Returns: whether it could be set.
    """
    global _keeps_freed_memory
    try:
        library = ctypes.CDLL("libc.so.6")
        # No block is a mapping of its own, and the heap is never trimmed.
        _keeps_freed_memory = bool(library.mallopt(-4, 0) and library.mallopt(-1, -1))
    except (OSError, AttributeError):
        _keeps_freed_memory = False
    return _keeps_freed_memory


def reserve_memory(size: int) -> None:
    """Where freed memory is kept: room for `size` bytes on the heap, and a page behind all of it.

    A block that was freed seldom fits the next one of its size (both are moved to a multiple of 64
    bytes), so for many calls more the heap would still grow by new pages. And what
    `return_freed_memory` took from between two blocks would come back page by page, in the first
    calls that are timed.
    """
    if not _keeps_freed_memory or size <= 0:
        return
    room = torch.empty(size if _free_on_heap() < size else 0, dtype=torch.int8)
    if not _populate_heap():
        room.fill_(0)


class _MallInfo(ctypes.Structure):
    """What mallinfo2 of the GNU C library returns (2.33 and later)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _free_on_heap() -> int:
    """Bytes of the heap that no block takes; 0 where the C library does not say."""
    try:
        ask = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        return 0
    ask.restype = _MallInfo
    return int(ask().fordblks)


def _populate_heap() -> bool:
    """Has the kernel put a page behind every address of the heap. Returns: whether it did; from
    Linux 5.14 on it can."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split()
        if name != "[heap]":
            continue
        first, end = (int(place, 16) for place in span.split("-"))
        if end - first > free_memory() // 2:
            return False
        populate = 23  # MADV_POPULATE_WRITE
        size = ctypes.c_size_t(end - first)
        return ctypes.CDLL("libc.so.6").madvise(ctypes.c_void_p(first), size, populate) == 0
    return False


def return_freed_memory() -> bool:
    """Gives freed memory back to the kernel. Returns: whether the C library can.

    Otherwise a heap that is kept grows from case to case, each finding the others' gaps too small,
    and gradients find the memory that cppo's own ops keep for them already there.
    """
    gc.collect()
    if not extension.missing["cpp"]:
        torch.ops.cppo.empty_cache()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


def percentile(samples: list[float], share: float) -> float:
    """The value below which `share` of the samples lie, interpolated."""
    values = torch.tensor(samples, dtype=torch.float64)
    return float(torch.quantile(values, share))


def time_calls(call: Call, count: int, device: torch.device, restore: Call) -> list[float]:
    """Milliseconds of so many calls in a row.

    On a GPU by events, its L2 cache flushed before each; all are queued before any is waited for,
    as in training: a call takes as long as the slower of host and GPU.
    """
    if device.type != "cuda":
        samples = []
        for _ in range(count):
            start = time.perf_counter_ns()
            call()
            samples.append((time.perf_counter_ns() - start) / 1e6)
            restore()
        return samples
    if device not in _flush_buffers:
        _flush_buffers[device] = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    spans = []
    for _ in range(count):
        _flush_buffers[device].zero_()
        span = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        span[0].record()
        call()
        span[1].record()
        restore()
        spans.append(span)
    torch.cuda.synchronize(device)
    return [float(start.elapsed_time(end)) for start, end in spans]


def time_interleaved(
    calls: Mapping[str, Call],
    seconds: float,
    min_rounds: Mapping[str, int],
    device: torch.device,
    restore: Call = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds of each call, in rounds, so that a slow moment hits all of them.

    A round gives every call the same time: a fast one is repeated for as long as the slowest takes.
    So all are measured in the same minutes, of which a shared machine has good and bad ones.

    Args:
        calls: what is compared; each ran at least once before.
        seconds: a call leaves the rounds once it has used up this much time.
        min_rounds: {call: rounds that it takes part in at least}.
        restore: brings back what a call overwrites; not timed.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rounds, used = dict.fromkeys(calls, 0), dict.fromkeys(calls, 0.0)
    longest_turn = 1e3 * seconds / max(min_rounds.values(), default=1)
    turn = 0.0
    while True:
        waiting = [n for n in calls if rounds[n] < min_rounds[n] or used[n] < 1e3 * seconds]
        if not waiting:
            return samples
        if rounds[waiting[0]] % 2:
            waiting.reverse()
        for name in waiting:
            end = used[name] + turn
            while True:
                count = 1
                if device.type == "cuda" and samples[name]:
                    left = (end - used[name]) / max(samples[name][-1], 1e-3)
                    count = min(max(1, math.ceil(left)), _QUEUED)
                taken = time_calls(calls[name], count, device, restore)
                samples[name] += taken
                used[name] += sum(taken)
                if used[name] >= end:
                    break
            rounds[name] += 1
        turn = min(longest_turn, max(samples[name][-1] for name in waiting))


def peak_growth(call: Call, device: torch.device) -> int | None:
    """Bytes that one call holds at its peak beyond what was there before; None if not known.

    On a GPU what the allocator handed out; on Linux the growth of the resident set, from the
    kernel's own high-water mark.
    """
    returned = return_freed_memory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return int(torch.cuda.max_memory_allocated(device)) - before
    if not returned:
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = _status_kib("VmRSS")
    result = call()
    peak = _status_kib("VmHWM")
    del result
    return max(0, peak - before) * 1024


def free_memory() -> int:
    """Bytes of memory that a process could still have, caches of files included; all of the
    machine's where the system does not say."""
    if Path("/proc/meminfo").exists():
        return _kib("/proc/meminfo", "MemAvailable") * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _status_kib(field: str) -> int:
    return _kib("/proc/self/status", field)


def _kib(file: str, field: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"{file} has no {field}")
