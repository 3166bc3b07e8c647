"""`cppo bench` behind its arguments: the cases one by one, rows written as they are measured."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cppo.benchmarks import peers, report
from cppo.benchmarks.cases import Case, cases
from cppo.benchmarks.environment import (
    current,
    device_name,
    environment,
    file_stem,
    load_per_core,
    results_folder,
    version,
)
from cppo.benchmarks.harness import Budget, Measured, Selection, measure, measure_again
from cppo.benchmarks.timing import Ceilings, measure_ceilings

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

    Args:
        match: a part of the case's shape.
        output: the CSV file. None: a file named after the device in ./cppo-bench, or in
            benchmarks/results with `record`. "toy" writes only with `output`.
        seconds, passes: in place of the budget's.
        missing_only: leaves out cases that have a row in the file.
        deadline: time.monotonic() after which no case is begun.
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
    record: bool = False
    seconds: float | None = None
    passes: int | None = None
    missing_only: bool = False
    deadline: float = math.inf

    @property
    def path(self) -> Path:
        return self.output or results_folder(self.record) / f"{file_stem(self.device)}.csv"

    @property
    def writes(self) -> bool:
        return self.shapes != "toy" or self.output is not None

    @property
    def budget(self) -> Budget:
        budget = BUDGETS[self.shapes]
        if self.seconds is not None:
            budget = replace(budget, seconds=self.seconds)
        if self.passes is not None:
            budget = replace(budget, passes=self.passes)
        return budget

    @property
    def selection(self) -> Selection:
        return Selection(self.against, self.backends, self.modes)


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


def bench(options: Options, console: Console) -> tuple[list[report.Row], list[Measured]]:
    """Measures every selected case, and the quick ones in further passes.

    Returns: the new rows, and the wrong results, which have no time.
    """
    with current(options.device):
        return _bench(options, console)


def _bench(options: Options, console: Console) -> tuple[list[report.Row], list[Measured]]:
    session = _Session(options, console)
    _opening(console, options, session.tables.ceilings)
    todo = selected(options)
    if options.missing_only:
        done = {report.key(row)[:4] for row in report.read(options.path)}
        todo = [c for c in todo if (c.op, c.shape, c.dtype, c.modes[-1]) not in done]
    for number, case in enumerate(todo, 1):
        if time.monotonic() > options.deadline:
            console.print(f"[yellow]out of time before {case.name}[/]")
            break
        session.tables.heading(case, f"{number} of {len(todo)}")
        session.measure(case)
    for turn in range(2, options.budget.passes + 1):
        session.another_pass(todo, turn)
    for case in session.known:  # every row against the same, last known ceilings
        session.write(case)
    return list(session.rows.values()), [m for m in session.all_measured() if m.is_bad]


class _Session:
    """One run: what is known of each case so far, and the file that it is written to."""

    def __init__(self, options: Options, console: Console) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.tables = LiveTables(console, self._ceilings())
        versions = {name: version(name) for name in ("triton", "trl", "liger-kernel", "verl")}
        self.shared = {**environment(self.device), **versions, "shapes": options.shapes}
        self.known: dict[Case, list[Measured]] = {}
        self.loads: dict[Case, str] = {}
        self.rows: dict[tuple[str, ...], report.Row] = {}

    def _ceilings(self) -> Ceilings:
        seconds = min(1.0, self.options.budget.seconds)
        return measure_ceilings(self.device, seconds, toy=self.options.shapes == "toy")

    def all_measured(self) -> Iterator[Measured]:
        for measured in self.known.values():
            yield from (m for m in measured if m.backend)

    def measure(self, case: Case) -> None:
        options, known = self.options, self.known.setdefault(case, [])
        self.loads[case] = f"{load_per_core():.2f}"
        with _quiet_peers(), self.tables.case() as show:

            def heard(measured: Measured) -> None:
                known.append(measured)
                show(known)

            ceilings, selection = self.tables.ceilings, options.selection
            for m in measure(case, self.device, options.budget, ceilings, selection, heard):
                if m not in known:
                    known.append(m)
            show(known)
        self.tables.console.print()
        self.write(case)

    def another_pass(self, todo: Sequence[Case], turn: int) -> None:
        if time.monotonic() <= self.options.deadline:
            self.tables.ceilings = self.tables.ceilings.or_better(self._ceilings())
        for number, case in enumerate(todo, 1):
            if case not in self.known or time.monotonic() > self.options.deadline:
                continue
            load = f"{load_per_core():.2f}"
            with _quiet_peers():
                if not measure_again(self.known[case], self.device, self.options.budget):
                    continue
            self.tables.heading(case, f"{number} of {len(todo)}, pass {turn}")
            self.tables.show(self.known[case])
            self.loads[case] = load
            self.write(case)

    def write(self, case: Case) -> None:
        ceilings = self.tables.ceilings
        common = {**self.shared, **ceilings.columns(), "load": self.loads[case]}
        by_mode = [[m for m in self.known[case] if m.mode == mode] for mode in case.modes]
        found = [{**row, **common} for some in by_mode for row in report.make_rows(some, ceilings)]
        self.rows.update({report.key(row): row for row in found})
        if self.options.writes:
            report.merge(self.options.path, found)


class LiveTables:
    """The table of the case that is being measured, redrawn as its variants come in."""

    def __init__(self, console: Console, ceilings: Ceilings) -> None:
        self.console = console
        self.ceilings = ceilings

    def heading(self, case: Case, place: str) -> None:
        self.console.print(f"[bold]{case.name}[/]  [dim]{place}[/]", highlight=False)

    @contextmanager
    def case(self) -> Iterator[Callable[[Sequence[Measured]], None]]:
        """Shows what is known of one case; called again with more of it."""
        with Live(console=self.console, auto_refresh=False) as live:

            def show(measured: Sequence[Measured]) -> None:
                live.update(self._tables(measured), refresh=self.console.is_terminal)

            yield show

    def show(self, measured: Sequence[Measured]) -> None:
        """The same for a case that is already measured."""
        self.console.print(self._tables(measured), "", sep="\n")

    def _tables(self, measured: Sequence[Measured]) -> Group:
        modes = dict.fromkeys(m.mode for m in measured)
        tables = (self._table([m for m in measured if m.mode == mode]) for mode in modes)
        # Once, not for each mode: the column beside the numbers is narrow.
        reasons = {f"{m.variant}: {m.status}": m.is_bad for m in measured if _is_long(m.status)}
        said = (Text(reason, "bold red" if bad else "dim") for reason, bad in reasons.items())
        return Group(*tables, *said)

    def _table(self, measured: Sequence[Measured]) -> Table:
        """The variants of one mode; ours stands out where it is the fastest."""
        case, mode = measured[0].case, measured[0].mode
        timed = [m for m in measured if m.passes]
        eager = next((m.ms() for m in timed if m.peer == "eager"), math.nan)
        fastest = min((m.ms() for m in timed), default=math.nan)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        title = report.MODES[mode] if case.sizes else ""
        table.add_column(title, min_width=26, no_wrap=True)
        for title in ("ms", "p20 - p80", "vs eager", case.unit or " ", "ceiling", "MiB", "error"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("", style="dim", no_wrap=True, overflow="ellipsis")
        for m in measured:
            name = f"cppo {m.backend}" if m.backend else m.peer
            style = "bold" if m.backend else ""
            if m.passes:
                cells = [*self._numbers(m, eager), m.note]
                style = "bold green" if m.backend and m.ms() == fastest else style
            else:
                text = "..." if m.status == "ok" else m.status
                text = text.partition(":")[0] + " (below)" if _is_long(text) else text
                error = f"{m.error:.0e}" if m.error > 0 else ""
                cells = [*[""] * 6, error, f"[{'bold red' if m.is_bad else 'dim'}]{text}[/]"]
            table.add_row(name, *cells, style=style)
        return table

    def _numbers(self, m: Measured, eager_ms: float) -> list[str]:
        rate, share = report.rate_of(m, self.ceilings)
        return [
            f"{m.ms():.4g}",
            f"{m.ms('p20'):.3g} - {m.ms('p80'):.3g}",
            "" if math.isnan(eager_ms) else f"{eager_ms / m.ms():.2f}x",
            "" if math.isnan(rate) else report.three_digits(rate),
            "" if math.isnan(share) else f"{share:.0f} %",
            "" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:,.0f}",
            "" if math.isnan(m.error) else f"{m.error:.0e}",
        ]


def _is_long(status: str) -> bool:
    return len(status) > 16


@contextmanager
def _quiet_peers() -> Iterator[None]:
    """Without their warnings: deprecations, options that they lack."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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


def report_wrong(console: Console, wrong: Sequence[Measured]) -> None:
    for m in wrong:
        console.print(f"[bold red]{m.case.name} {m.mode} {m.backend}: {m.status}[/]")
