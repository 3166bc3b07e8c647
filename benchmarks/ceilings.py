"""What this machine can do at most, measured in the same run as the rows that are judged by it.

Copy: bytes read plus bytes written by `Tensor.copy_` of arrays far larger than the caches. Read:
bytes read by a sum. GEMM: 2 n^3 operations of a square `torch.mm`. Each is the best of the run's
repetitions, of all its passes, on as many threads as everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass

import torch

from cppo.benchmarks.inputs import DTYPES
from cppo.benchmarks.timing import time_interleaved


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
        if dtype == "fp32":
            return self.gemm_fp32_tflop_s
        # A CPU without bf16 instructions multiplies bf16 faster by widening it.
        return max(self.gemm_bf16_tflop_s, self.gemm_fp32_tflop_s)

    def gemm(self, dtype: str) -> float:
        """What torch's own matrix product reaches in a dtype, in TFLOP/s."""
        return self.gemm_bf16_tflop_s if dtype == "bf16" else self.gemm_fp32_tflop_s

    def or_better(self, other: Ceilings) -> Ceilings:
        """The larger of each rate: what disturbed a probe took from it."""
        return Ceilings(*map(max, astuple(self), astuple(other)))

    def columns(self) -> dict[str, float]:
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


def measure_ceilings(device: torch.device, seconds: float, toy: bool = False) -> Ceilings:
    """Runs the four probes interleaved for `seconds` each."""
    on_gpu = device.type == "cuda"
    floats = 2**18 if toy else 2**30 if on_gpu else 2**26
    # Without bf16 instructions a larger product would take minutes.
    sizes = {"fp32": 8192, "bf16": 8192} if on_gpu else {"fp32": 2048, "bf16": 512}
    if toy:
        sizes = {"fp32": 128, "bf16": 128}
    source = torch.ones(floats, device=device)
    target = torch.empty_like(source)

    def gemm(dtype: str) -> Callable[[], object]:
        shape = (2, sizes[dtype], sizes[dtype])
        left, right = torch.randn(shape, device=device).to(DTYPES[dtype])
        out = torch.empty_like(left)
        # As a linear layer has it: the second factor transposed.
        return lambda: torch.mm(left, right.t(), out=out)

    probes = {
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
