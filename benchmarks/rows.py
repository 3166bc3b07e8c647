"""Rows: the columns of the CSV files, and how they are written, merged, read and compared."""

from __future__ import annotations

import csv
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from cppo.benchmarks.ceilings import Ceilings
from cppo.benchmarks.harness import Measured

Row = dict[str, str]

KEY = ("op", "shape", "dtype", "mode", "backend", "peer", "device")
MEASURED = (
    *KEY[:-1],
    "ms_p20",
    "ms_p50",
    "ms_p80",
    "samples",
    "passes",
    "gbytes",
    "gflop",
    "rate",
    "unit",
    "percent_of_ceiling",
    "speedup_over_eager",
    "peak_mib",
    "gradient_mib",
    "max_error",
    "error_of",
    "note",
)


def three_digits(value: float) -> str:
    """0.0123, 12.3, 4,250: never 4.25e+03."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def make_rows(measured: Sequence[Measured], ceilings: Ceilings) -> list[Row]:
    """The rows of one case and mode; a variant without a time gives none.

    ms_p20, ms_p50, ms_p80: percentiles of the samples of a pass, their interquartile means over
    the passes. gbytes, gflop: of the best plan (cases.py). rate: one of the two, which `unit`
    says, over the median time. max_error: relative to the largest value of the output named in
    error_of. peak_mib: memory beyond the inputs at the peak of the call; gradient_mib of it are
    gradients.
    """
    timed = [m for m in measured if m.passes]
    eager = next((m.ms() for m in timed if m.peer == "eager"), math.nan)
    return [_row(m, eager, ceilings) for m in timed]


def _row(m: Measured, eager_ms: float, ceilings: Ceilings) -> Row:
    case, seconds = m.case, m.ms() / 1e3
    work = case.bytes(m.mode) / 1e9 if case.unit == "GB/s" else case.flops(m.mode) / 1e12
    rate = work / seconds if case.unit else math.nan
    share = 100 * rate / ceilings.of(case.unit, case.dtype) if case.unit else math.nan
    mib = math.nan if m.peak_bytes is None else m.peak_bytes / 2**20
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "mode": m.mode,
        "backend": m.backend,
        "peer": m.peer,
        "ms_p20": _digits(m.ms("p20"), 4),
        "ms_p50": _digits(m.ms("p50"), 4),
        "ms_p80": _digits(m.ms("p80"), 4),
        "samples": str(m.count),
        "passes": str(len(m.passes)),
        "gbytes": _digits(case.bytes(m.mode) / 1e9, 4) if case.unit else "",
        "gflop": _digits(case.flops(m.mode) / 1e9, 4) if case.unit else "",
        "rate": _digits(rate, 4),
        "unit": case.unit,
        "percent_of_ceiling": _digits(share, 3),
        "speedup_over_eager": _digits(eager_ms / m.ms(), 3),
        "peak_mib": _digits(mib, 4),
        "gradient_mib": _digits(m.gradient_bytes / 2**20, 4),
        "max_error": _digits(m.error, 2),
        "error_of": m.error_of,
        "note": m.note,
    }


def _digits(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}g}"


def key(row: Row) -> tuple[str, ...]:
    """What a row is about; a newer row of the same key replaces an older one."""
    return tuple(row.get(name, "") for name in KEY)


def row_kind(row: Row) -> str:
    """The table and the chart that a row belongs to: logits, linear or host."""
    if not row["dtype"] or not row["unit"]:
        return "host"
    return "linear" if row["op"].startswith("linear") else "logits"


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check(path: Path) -> None:
    """Raises ValueError for a file of another kind, of whose rows `merge` would keep the last."""
    if path.exists():
        with path.open(newline="", errors="replace") as file:
            columns = next(csv.reader(file), list(KEY))
        if missing := [name for name in KEY if name not in columns]:
            raise ValueError(f"{path} is no file of `cppo bench`: no column {', '.join(missing)}")


def merge(path: Path, new: Iterable[Row]) -> list[Row]:
    """Writes rows over those of the same key; a cut never leaves half a file behind."""
    rows = {key(row): row for row in read(path)}
    for row in new:
        rows[key(row)] = {name: str(value) for name, value in row.items()}
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", newline="", dir=path.parent, suffix=".part", delete=False
    ) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows.values())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return list(rows.values())


def slower(old: Iterable[Row], new: Iterable[Row], tolerance: float = 0.15) -> list[str]:
    """Backends of ours whose ratio to eager, measured in the same run, fell by more than
    `tolerance`: one line each.

    A ratio and not a time: it also holds on another, or a busier, machine.
    """
    before = {key(row)[:-1]: row for row in old if row["backend"]}
    lines = []
    for row in new:
        earlier = before.get(key(row)[:-1])
        if earlier is None or not (row["speedup_over_eager"] and earlier["speedup_over_eager"]):
            continue
        was, now = float(earlier["speedup_over_eager"]), float(row["speedup_over_eager"])
        if now < (1 - tolerance) * was:
            name = " ".join(word for word in key(row)[:5] if word)
            lines.append(f"{name}: {now:.3g}x eager, was {was:.3g}x")
    return lines
