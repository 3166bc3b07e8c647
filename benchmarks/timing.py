"""Clocks, memory and the limits of the machine: how a call is measured on a device."""

from __future__ import annotations

import gc
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cppo.benchmarks.inputs import DTYPES

Call = Callable[[], Any]
_FLUSH_BYTES = 2**28  # larger than any L2
_QUEUED = 100  # calls that a GPU is given at most before it is waited for
_flush_buffers: dict[torch.device, torch.Tensor] = {}


def percentile(samples: list[float], share: float) -> float:
    """The value below which `share` of the samples lie, interpolated."""
    return float(torch.quantile(torch.tensor(samples, dtype=torch.float64), share))


def time_calls(call: Call, count: int, device: torch.device, restore: Call) -> list[float]:
    """Milliseconds of `count` calls in a row.

    On a GPU they are timed by events, with the L2 cache flushed before each. All are queued before
    any is waited for, as in training: a call takes as long as the slower of host and GPU.
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
    A shared machine has good and bad minutes, and this way all calls are measured in the same ones.

    Args:
        calls: what is compared; each ran at least once before.
        seconds: a call leaves the rounds once it has used up this much time.
        min_rounds: {call: the least number of rounds that it takes part in}.
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


def peak_growth(call: Call, device: torch.device) -> int:
    """Bytes that PyTorch's allocator hands out at the peak of one call, beyond what was in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes two lines for each call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event["args"] for event in events if event["name"] == "[memory]"]
    if not changes:
        return 0
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]
    return max(0, *(change["Total Allocated"] - before for change in changes))


# The limits of the machine


@dataclass(frozen=True)
class Ceilings:
    """Rates of the machine: bytes in GB/s, matrix products in TFLOP/s."""

    copy_gb_s: float
    read_gb_s: float
    gemm_fp32_tflop_s: float
    gemm_bf16_tflop_s: float

    def of(self, unit: str, dtype: str) -> float:
        """The ceiling that a rate in `unit` is a share of."""
        if unit == "GB/s":
            return self.copy_gb_s
        # A CPU without bf16 instructions multiplies bf16 faster by widening it.
        return max(self.gemm(dtype), self.gemm_fp32_tflop_s)

    def gemm(self, dtype: str) -> float:
        """What torch's own matrix product reaches in a dtype, in TFLOP/s."""
        return self.gemm_bf16_tflop_s if dtype == "bf16" else self.gemm_fp32_tflop_s

    def or_better(self, other: Ceilings) -> Ceilings:
        """The larger of each rate: whatever disturbed a probe only lowered it."""
        return Ceilings(*map(max, astuple(self), astuple(other)))

    def columns(self) -> dict[str, float]:
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


def measure_ceilings(device: torch.device, seconds: float, toy: bool = False) -> Ceilings:
    """The best of several calls of each probe, interleaved for `seconds` each.

    Copy: bytes read plus bytes written by `Tensor.copy_` of arrays far larger than the caches.
    Read: bytes read by a sum. GEMM: 2 n^3 operations of a square `torch.mm`.
    """
    on_gpu = device.type == "cuda"
    floats = 2**18 if toy else 2**30 if on_gpu else 2**26
    # Without bf16 instructions a larger product would take minutes.
    sizes = {"fp32": 8192, "bf16": 8192} if on_gpu else {"fp32": 2048, "bf16": 512}
    if toy:
        sizes = {"fp32": 128, "bf16": 128}
    source = torch.ones(floats, device=device)
    target = torch.empty_like(source)

    def gemm(dtype: str) -> Call:
        shape = (2, sizes[dtype], sizes[dtype])
        left, right = torch.randn(shape, device=device).to(DTYPES[dtype])
        out = torch.empty_like(left)
        # As a linear layer has it: the second factor transposed.
        return lambda: torch.mm(left, right.t(), out=out)

    probes: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "read": lambda: source.sum(),
        "fp32": gemm("fp32"),
        "bf16": gemm("bf16"),
    }
    for probe in probes.values():
        probe()
    times = time_interleaved(probes, seconds, dict.fromkeys(probes, 5), device)
    best = {name: min(samples) / 1e3 for name, samples in times.items()}
    return Ceilings(
        copy_gb_s=2 * 4 * floats / best["copy"] / 1e9,
        read_gb_s=4 * floats / best["read"] / 1e9,
        gemm_fp32_tflop_s=2 * sizes["fp32"] ** 3 / best["fp32"] / 1e12,
        gemm_bf16_tflop_s=2 * sizes["bf16"] ** 3 / best["bf16"] / 1e12,
    )
