"""The ops that prepare a training batch, on the CPU: compiled against plain PyTorch / Python.

    python benchmarks/bench_host_ops.py            full sizes, writes results/host_ops.csv
    python benchmarks/bench_host_ops.py --smoke    toy sizes, writes nothing
    python benchmarks/bench_host_ops.py --op pack_completions --output /tmp/pack.csv

A case is timed only after every backend has given the reference's result. Backends are interleaved
repetition by repetition, so that a slow moment of the machine hits all of them; a row holds the
20th, 50th and 80th percentile. On a machine that is busy with something else nothing is written.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import environment

from cppo import _ext, backends, reference

RESULTS = Path(__file__).with_name("results") / "host_ops.csv"
BUSY_SHARE = 0.25  # load average per core above which timings are not to be trusted


@dataclass(frozen=True)
class Case:
    """One op on one input: the positional arguments of `cppo.reference.<op>`."""

    op: str
    shape: str
    arguments: tuple[Any, ...]


def cases(smoke: bool) -> Iterator[Case]:
    """Inputs as a trainer has them: G = 16 completions, left-padded prompts, 3/4 pruned."""
    generator = torch.Generator().manual_seed(0)
    for num_completions in (32,) if smoke else (512, 8192):
        # Rewards of a verifiable task: few values, many ties.
        rewards = torch.randint(0, 3, (num_completions,), generator=generator).float() / 2
        for scope in ("group", "batch"):
            shape = f"B={num_completions} G=16 scope={scope}"
            arguments = (rewards, 16, 0.75, "group", 1e-4, scope)
            yield Case("advantages_and_prune", shape, arguments)
    for num_completions, length in ((8, 32),) if smoke else ((64, 1024), (512, 2048)):
        first = torch.randint(0, length // 4, (num_completions, 1), generator=generator)
        last = torch.randint(length // 2, length, (num_completions, 1), generator=generator)
        column = torch.arange(length)
        ids = torch.randint(0, 150_000, (num_completions, length), generator=generator)
        attention = (column >= first) & (column < last)
        kept = torch.arange(0, num_completions, 4)
        arguments = (ids, attention, attention & (column >= length // 4), kept)
        yield Case("pack_completions", f"B={num_completions} L={length} K={len(kept)}", arguments)
    draw = random.Random(0)
    for count in (64,) if smoke else (512, 8192):
        lengths = [draw.randint(50, 2000) for _ in range(count)]
        yield Case("plan_microbatches", f"n={count} max_tokens=8192", (lengths, 8192))
        yield Case("balance_ranks", f"n={count} world_size=8", (lengths, 8))


def check_equal(case: Case, ours: Any, expected: Any) -> None:
    """Indices bit for bit; advantages to the last bit of fp32."""
    if isinstance(expected, list):
        assert ours == expected, f"{case.op} {case.shape}: results differ"
        return
    for one, other in zip(ours, expected, strict=True):
        if not isinstance(other, torch.Tensor):
            assert one == other, f"{case.op} {case.shape}: results differ"
            continue
        exact = not other.is_floating_point()
        torch.testing.assert_close(one, other, rtol=0 if exact else 2e-7, atol=0)


def time_interleaved(
    variants: dict[str, Callable[[], Any]], seconds: float
) -> dict[str, list[float]]:
    """[p20, p50, p80] in milliseconds of each variant, after a warm-up."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(min(samples.values(), key=len)) < 10:
        for name, call in variants.items():
            start = time.perf_counter_ns()
            call()
            samples[name].append((time.perf_counter_ns() - start) / 1e6)
    return {name: _percentiles(values) for name, values in samples.items()}


def _percentiles(values: list[float]) -> list[float]:
    deciles = statistics.quantiles(values, n=10)
    return [deciles[1], deciles[4], deciles[7]]


def measure(case: Case, seconds: float) -> list[dict[str, str]]:
    """The rows of one case: correctness first, then the times of every backend that runs here."""
    implementations = {
        name: getattr(reference if name == "reference" else _ext, case.op)
        for name in backends.available(case.op)
    }
    expected = implementations["reference"](*case.arguments)
    variants = {}
    for name, function in implementations.items():
        check_equal(case, function(*case.arguments), expected)
        variants[name] = lambda function=function: function(*case.arguments)
    times = time_interleaved(variants, seconds)
    rows = []
    for name, (p20, p50, p80) in times.items():
        row = {"op": case.op, "backend": name, "shape": case.shape}
        row |= {"ms_p20": f"{p20:.4f}", "ms_p50": f"{p50:.4f}", "ms_p80": f"{p80:.4f}"}
        rows.append(row | {"speedup": f"{times['reference'][1] / p50:.2f}"})
    return rows


def summary(rows: list[dict[str, str]]) -> str:
    """The compiled rows as a Markdown table."""
    lines = ["| op | input | reference ms | C++ ms | ratio |", "|---|---|---|---|---|"]
    reference_ms = {
        (row["op"], row["shape"]): row["ms_p50"] for row in rows if row["backend"] == "reference"
    }
    for row in rows:
        if row["backend"] == "cpp":
            ms = float(reference_ms[row["op"], row["shape"]])
            lines.append(
                f"| `{row['op']}` | {row['shape']} | {ms:.3g} | {float(row['ms_p50']):.3g} "
                f"| {float(row['speedup']):.1f}x |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="toy sizes, nothing is written")
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each case")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file, overwritten")
    arguments = parser.parse_args()
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    shared = {**environment(), "compiler": _ext.build_info.get("compiler", "")}
    rows = []
    for case in cases(arguments.smoke):
        if arguments.op in (None, case.op):
            rows += measure(case, 0.01 if arguments.smoke else arguments.seconds)
    for row in rows:
        print(f"{row['op']:22}{row['backend']:11}{row['shape']:28}", end="")
        print(f"{row['ms_p50']:>10} ms  ({row['ms_p20']} .. {row['ms_p80']})  x{row['speedup']}")
    if arguments.smoke:
        return 0
    if busy > BUSY_SHARE:
        print(f"not written: the machine is busy (load {busy:.2f} per core)", file=sys.stderr)
        return 1
    arguments.output.parent.mkdir(exist_ok=True)
    with arguments.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *shared])
        writer.writeheader()
        writer.writerows(row | shared for row in rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
