"""`cppo bench` behind its arguments: the cases one by one, rows written as they are measured."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cppo.benchmarks import peers, rows, timing
from cppo.benchmarks.cases import Case, cases
from cppo.benchmarks.ceilings import Ceilings, measure_ceilings
from cppo.benchmarks.environment import (
    device_name,
    environment,
    file_stem,
    load_per_core,
    results_folder,
    version,
)
from cppo.benchmarks.harness import Budget, Measured, measure, measure_again
from cppo.benchmarks.show import LiveTables
from cppo.records import Views

BUSY = 0.25  # load per core above which the machine is doing something else
BUDGETS = {
    "toy": Budget(seconds=0.0, rounds=2),
    "small": Budget(seconds=0.4, quick=0.4, rounds=3, patience=3.0, limit=6.0),
    "paper": Budget(seconds=0.4, rounds=2, passes=12),
    "full": Budget(seconds=3.0, quick=3.0, rounds=5),
}


@dataclass(frozen=True)
class Options:
    """What `cppo bench` was asked for; empty tuples mean everything.

    match: a part of the case's shape. output: the CSV file. None: a file named after the device, in
    a clone's benchmarks/results, else in ./cppo-bench; "toy" writes only when asked. seconds,
    passes: in place of the budget's. missing_only: cases that have a row there are left out.
    deadline: time.monotonic() after which no case is begun. allocator: "keep" reuses freed memory
    on a CPU, "system" leaves the C library as it is.
    """

    shapes: str = "small"
    ops: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    match: str = ""
    against: tuple[str, ...] = peers.NAMES
    device: str = "cpu"
    output: Path | None = None
    seconds: float | None = None
    passes: int | None = None
    missing_only: bool = False
    deadline: float = math.inf
    allocator: str = "keep"

    @property
    def path(self) -> Path:
        # Times under the two allocators are not comparable: no file holds both.
        suffix = "_system" if self.allocator == "system" else ""
        return self.output or results_folder() / f"{file_stem(self.device)}{suffix}.csv"

    @property
    def budget(self) -> Budget:
        budget = BUDGETS[self.shapes]
        if self.seconds is not None:
            budget = replace(budget, seconds=self.seconds)
        if self.passes is not None:
            budget = replace(budget, passes=self.passes)
        return budget


def selected(options: Options) -> list[Case]:
    """The cases that the options leave."""
    found = cases(options.shapes, torch.device(options.device))
    return [
        case
        for case in found
        if (not options.ops or case.op in options.ops)
        and (not options.dtypes or case.dtype in ("", *options.dtypes))
        and options.match in case.shape
    ]


def bench(options: Options, console: Console) -> tuple[list[rows.Row], list[Measured]]:
    """Measures every selected case, and the quick ones in further passes; a wrong result of ours is
    shown and has no time.

    Returns: the new rows, and the wrong results.
    """
    device = torch.device(options.device)
    budget = options.budget
    allocator = "torch" if device.type == "cuda" else "system"
    if device.type == "cpu" and options.allocator == "keep" and timing.keep_freed_memory():
        allocator = "keep"

    def ceilings_now() -> Ceilings:
        return measure_ceilings(device, min(1.0, budget.seconds), toy=options.shapes == "toy")

    tables = LiveTables(console, ceilings_now())
    shared = {**environment(device), **_peer_versions()}
    shared |= {"shapes": options.shapes, "allocator": allocator}
    _opening(console, options, tables.ceilings)
    todo = selected(options)
    done = {rows.key(row)[:4] for row in rows.read(options.path)} if options.missing_only else set()
    new: dict[tuple[str, ...], rows.Row] = {}
    known: dict[str, list[Measured]] = {}
    loads: dict[str, str] = {}

    def write(case: Case) -> None:
        common = {**shared, **tables.ceilings.columns(), "load": loads[case.name]}
        by_mode = [[m for m in known[case.name] if m.mode == mode] for mode in case.modes]
        found = [
            {**row, **common} for some in by_mode for row in rows.make_rows(some, tables.ceilings)
        ]
        new.update({rows.key(row): row for row in found})
        if options.shapes != "toy" or options.output is not None:
            rows.merge(options.path, found)

    for number, case in enumerate(todo, 1):
        if (case.op, case.shape, case.dtype, case.modes[-1]) in done:
            continue
        if time.monotonic() > options.deadline:
            console.print(f"[yellow]out of time before {case.name}[/]")
            break
        tables.heading(case, number, len(todo))
        loads[case.name] = f"{load_per_core():.2f}"
        known[case.name] = _measure(case, device, options, tables)
        write(case)
    for turn in range(2, budget.passes + 1):
        if time.monotonic() <= options.deadline:
            tables.ceilings = tables.ceilings.or_better(ceilings_now())
        for number, case in enumerate(todo, 1):
            if case.name not in known or time.monotonic() > options.deadline:
                continue
            load = f"{load_per_core():.2f}"
            with _quiet_peers():
                if not measure_again(known[case.name], device, budget):
                    continue
            tables.heading(case, number, len(todo), f", pass {turn}")
            tables.show(known[case.name])
            loads[case.name] = load
            write(case)
        timing.return_freed_memory()  # a heap that is kept grows a little with every case
    if budget.passes > 1:  # all rows against the same, last known ceilings
        for case in todo:
            if case.name in known:
                write(case)
    wrong = [
        m
        for measured in known.values()
        for m in measured
        if m.backend and m.status.startswith(("wrong", "failed"))
    ]
    return list(new.values()), wrong


def _measure(
    case: Case, device: torch.device, options: Options, tables: LiveTables
) -> list[Measured]:
    known: list[Measured] = []
    with _quiet_peers(), tables.case() as show:

        def heard(measured: Measured) -> None:
            known.append(measured)
            show(known)

        variants = (options.against, options.backends, options.modes)
        results = measure(case, device, options.budget, tables.ceilings, *variants, heard)
        for measured in results:
            if measured not in known:
                known.append(measured)
        show(known)
    tables.console.print()
    return known


@contextmanager
def _quiet_peers() -> Iterator[None]:
    """Without their warnings: deprecations, options that they lack."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _peer_versions() -> dict[str, str]:
    return {name: version(name) for name in ("triton", "trl", "liger-kernel", "verl")}


def _opening(console: Console, options: Options, ceilings: Ceilings) -> None:
    console.print(
        f"[bold]cppo bench[/] --shapes {options.shapes}  on {device_name(options.device)}"
    )
    console.print(
        f"this machine: copy {ceilings.copy_gb_s:.1f} GB/s, read {ceilings.read_gb_s:.1f} GB/s, "
        f"GEMM fp32 {ceilings.gemm_fp32_tflop_s:.3g}, bf16 {ceilings.gemm_bf16_tflop_s:.3g} TFLOP/s"
    )
    listed = [
        f"{name} {number or '[dim]not installed[/]'}" for name, number in peers.installed().items()
    ]
    console.print(f"peers: eager and compiled PyTorch, {', '.join(listed)}")
    if options.device == "cpu" and load_per_core() > BUSY:
        console.print(
            f"[yellow]the machine is busy (load {load_per_core():.2f} per core): times will be "
            "too long, ratios less so[/]"
        )
    console.print(
        "[dim]bytes and operations are those of the best plan, so that a slower plan shows as a "
        "smaller share of the ceiling; error: against fp64, relative to the largest value[/]\n"
    )


def on_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The same inputs with every tensor on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, Views):
            return Views(*map(move, value))
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return {name: move(value) for name, value in inputs.items()}


def report_wrong(console: Console, wrong: Sequence[Measured]) -> None:
    for m in wrong:
        console.print(f"[bold red]{m.case.name} {m.mode} {m.backend}: {m.status}[/]")
