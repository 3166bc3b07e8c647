"""The live table of `cppo bench`, and the Markdown tables of the README."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cppo.benchmarks.cases import Case
from cppo.benchmarks.ceilings import Ceilings
from cppo.benchmarks.harness import Measured
from cppo.benchmarks.rows import Row, row_kind, three_digits


def _is_bad(measured: Measured) -> bool:
    return measured.status.startswith(("wrong", "failed"))


def _is_long(status: str) -> bool:
    return len(status) > 16


class LiveTables:
    """The table of the case that is being measured, redrawn as its variants come in."""

    def __init__(self, console: Console, ceilings: Ceilings) -> None:
        self.console = console
        self.ceilings = ceilings

    def heading(self, case: Case, number: int, count: int, turn: str = "") -> None:
        of = f"{number} of {count}{turn}"
        self.console.print(f"[bold]{case.name}[/]  [dim]{of}[/]", highlight=False)

    @contextmanager
    def case(self) -> Iterator[Callable[[Sequence[Measured]], None]]:
        """Shows what is known of one case; called again with more of it."""
        with Live(console=self.console, auto_refresh=False) as live:

            def show(measured: Sequence[Measured]) -> None:
                live.update(self._tables(measured), refresh=self.console.is_terminal)

            yield show

    def show(self, measured: Sequence[Measured]) -> None:
        """The same of a case that is measured, for good."""
        self.console.print(self._tables(measured), "", sep="\n")

    def _tables(self, measured: Sequence[Measured]) -> Group:
        modes = dict.fromkeys(m.mode for m in measured)
        tables = (self._table([m for m in measured if m.mode == mode]) for mode in modes)
        # Once, not for each mode: the column beside the numbers is narrow.
        reasons = {f"{m.variant}: {m.status}": _is_bad(m) for m in measured if _is_long(m.status)}
        said = (Text(reason, "bold red" if bad else "dim") for reason, bad in reasons.items())
        return Group(*tables, *said)

    def _table(self, measured: Sequence[Measured]) -> Table:
        """The variants of one mode; ours stands out where it is the fastest."""
        case, mode = measured[0].case, measured[0].mode
        timed = [m for m in measured if m.passes]
        eager = next((m.ms() for m in timed if m.peer == "eager"), math.nan)
        fastest = min((m.ms() for m in timed), default=math.nan)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(_MODE[mode] if case.sizes else "", min_width=26, no_wrap=True)
        for title in ("ms", "p20 - p80", "vs eager", case.unit or " ", "ceiling", "MiB", "error"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("", style="dim", no_wrap=True, overflow="ellipsis")
        for m in measured:
            name = f"cppo {m.backend}" if m.backend else m.peer
            style = "bold" if m.backend else ""
            if not m.passes:
                text = "..." if m.status == "ok" else m.status
                text = text.partition(":")[0] + " (below)" if _is_long(text) else text
                error = f"{m.error:.0e}" if m.error > 0 else ""
                row = [name, *[""] * 6, error, f"[{'bold red' if _is_bad(m) else 'dim'}]{text}[/]"]
            else:
                row = [name, *self._numbers(m, eager), m.note]
                style = "bold green" if m.backend and m.ms() == fastest else style
            table.add_row(*row, style=style)
        return table

    def _numbers(self, m: Measured, eager_ms: float) -> list[str]:
        rate = share = ""
        if m.case.unit:
            work = m.case.bytes(m.mode) / 1e9
            if m.case.unit == "TFLOP/s":
                work = m.case.flops(m.mode) / 1e12
            value = work / m.ms() * 1e3
            rate = three_digits(value)
            share = f"{100 * value / self.ceilings.of(m.case.unit, m.case.dtype):.0f} %"
        return [
            f"{m.ms():.4g}",
            f"{m.ms('p20'):.3g} - {m.ms('p80'):.3g}",
            "" if math.isnan(eager_ms) else f"{eager_ms / m.ms():.2f}x",
            rate,
            share,
            "" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:,.0f}",
            "" if math.isnan(m.error) else f"{m.error:.0e}",
        ]


_MODE = {"forward": "forward", "both": "forward + backward"}


def summary(rows: Sequence[Row], kind: str = "logits") -> str:
    """A Markdown table of committed rows.

    Args:
        kind: "host" (integer ops), the ops on rows: "logits", "linear", or "steps"; "brief": the
            ratios of the loss on logits.
    """
    if kind == "steps":
        return _step_summary(rows)
    if kind == "brief":
        return _brief_summary(rows)
    if kind == "host":
        return _host_summary([row for row in rows if row_kind(row) == "host"])
    lines = [
        "| op | input | | cppo ms | of ceiling | peak MiB, of it gradients | against |",
        "|---|---|---|---|---|---|---|",
    ]
    for (op, shape, dtype, mode), ours, ratios in _compared(rows, kind):
        lines.append(
            f"| `{op}` | {shape} | {dtype} {_MODE[mode]} | {float(ours['ms_p50']):.3g} "
            f"| {float(ours['percent_of_ceiling']):.0f} % | {_peak(ours)} "
            f"| {ratios} |"
        )
    return "\n".join(lines)


def _peak(row: Row) -> str:
    peak, gradients = (float(row.get(name) or 0) for name in ("peak_mib", "gradient_mib"))
    return f"{peak:.0f}, {gradients:.0f}" if gradients else f"{peak:.0f}"


def _compared(rows: Sequence[Row], kind: str) -> Iterator[tuple[tuple[str, ...], Row, str]]:
    """Every case and mode: what it is, our fastest row, how many times faster than each peer."""
    cells: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row_kind(row) == kind:
            case = (row["op"], row["shape"], row["dtype"], row["mode"])
            cells.setdefault(case, []).append(row)
    for at, members in cells.items():
        own = [row for row in members if row["backend"]]
        if own:
            ours = min(own, key=lambda row: float(row["ms_p50"]))
            yield (
                at,
                ours,
                ", ".join(
                    f"{row['peer']} {float(row['ms_p50']) / float(ours['ms_p50']):.1f}x"
                    for row in members
                    if row["peer"]
                ),
            )


def _brief_summary(rows: Sequence[Row]) -> str:
    """Ratios alone, of the op and the input that the package is for."""
    lines = ["| three views | | times faster than |", "|---|---|---|"]
    brief = [row for row in rows if in_brief(row)]
    for (_, shape, dtype, mode), _, ratios in _compared(brief, "logits"):
        input_ = shape.partition("three views, ")[2]
        lines.append(f"| {input_} | {dtype} {_MODE[mode]} | {ratios} |")
    return "\n".join(lines)


def in_brief(row: Row) -> bool:
    """Whether the brief table shows this row."""
    shape = row["shape"]
    return row["op"] == "cppo_loss" and "three views, " in shape and "full" not in shape


def _host_summary(rows: Sequence[Row]) -> str:
    lines = ["| op | input | eager ms | C++ ms | ratio |", "|---|---|---|---|---|"]
    eager = {(row["op"], row["shape"]): row for row in rows if row["peer"] == "eager"}
    for row in rows:
        if row["backend"] == "cpp" and (row["op"], row["shape"]) in eager:
            slow = float(eager[row["op"], row["shape"]]["ms_p50"])
            ours = float(row["ms_p50"])
            lines.append(
                f"| `{row['op']}` | {row['shape']} | {slow:.3g} | {ours:.3g} | {slow / ours:.1f}x |"
            )
    return "\n".join(lines)


def _step_summary(rows: Sequence[Row]) -> str:
    names = ("rollout", "forward", "loss", "backward", "optimizer", "update", "step")
    lines = [
        f"| model | scheme | {' | '.join(f'{name} s' for name in names)} | tokens/s | peak MiB |",
        "|---" * (len(names) + 4) + "|",
    ]
    for row in rows:
        cells = " | ".join(f"{float(row[f'{name}_s']):.3g}" for name in names)
        lines.append(
            f"| {row['shape']} {row['dtype']} | {row['backend'] or row['peer']} | {cells} "
            f"| {float(row['tokens_per_s']):.0f} | {row['peak_mib']} |"
        )
    return "\n".join(lines)
