"""Rows: how they are made, kept in CSV files, compared, and turned into the numbers of a text.

    python benchmarks/report.py README.md docs/*.md     writes every measured number anew

    <!-- table: NAME KIND --> ... <!-- /table -->       a table: all, brief or steps. The script of
                                                        another KIND makes it; without a KIND that
                                                        of the file's name
    <!-- ratio: NAME; OP; SHAPE; DTYPE; MODE; PEER -->  the peer's time over ours
    <!-- spread: NAME; MODE; PEER -->                   least and largest ratio in the brief table
    <!-- value: NAME; COLUMN; COLUMN=TEXT; ... -->      a number of the only row that fits
    <!-- paired: NAME; METHOD; time -->                 points over GRPO, task by task; or steps
    <!-- set: NAME -->                                  device, versions, date and file of the rows
    <!-- ops: all -->                                   every op with a kernel, and its backends

NAME is a file of benchmarks/results without `.csv`; "cpu" and "cuda" are the one set of rows of
such a device.
"""

from __future__ import annotations

import csv
import importlib
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cppo
from cppo import backends
from cppo.benchmarks.harness import Measured
from cppo.benchmarks.timing import Ceilings

Row = dict[str, str]

KEY = ("op", "shape", "dtype", "mode", "backend", "peer", "device")
CASE = KEY[:4]
RESULTS = Path(__file__).resolve().parent / "results"


# Rows


def make_rows(measured: Sequence[Measured], ceilings: Ceilings) -> list[Row]:
    """The rows of one case and mode; a variant without a time gives none.

    ms_p20, ms_p50, ms_p80: percentiles of a pass, their interquartile means over the passes.
    gbytes, gflop: of the best plan (cases.py). rate: one of the two, named by `unit`, over the
    median time. max_error: relative to the largest value of the output in error_of. peak_mib:
    memory beyond the inputs at the peak of the call, gradient_mib of it are gradients.
    """
    timed = [m for m in measured if m.passes]
    eager = next((m.ms() for m in timed if m.peer == "eager"), math.nan)
    return [_row(m, eager, ceilings) for m in timed]


def rate_of(m: Measured, ceilings: Ceilings) -> tuple[float, float]:
    """What a variant reaches of its case's work, per second and in percent of the ceiling."""
    if not m.case.unit:
        return math.nan, math.nan
    is_flops = m.case.unit == "TFLOP/s"
    work = m.case.flops(m.mode) / 1e12 if is_flops else m.case.bytes(m.mode) / 1e9
    rate = work / m.ms() * 1e3
    return rate, 100 * rate / ceilings.of(m.case.unit, m.case.dtype)


def _row(m: Measured, eager_ms: float, ceilings: Ceilings) -> Row:
    case = m.case
    rate, share = rate_of(m, ceilings)
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


def three_digits(value: float) -> str:
    """0.0123, 12.3, 4,250: never 4.25e+03."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def key(row: Row) -> tuple[str, ...]:
    """What a row is about; a newer row of the same key replaces an older one."""
    return tuple(row.get(name, "") for name in KEY)


def by_case(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """{(op, shape, dtype, mode): its rows}: what is compared with each other."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in CASE), []).append(row)
    return found


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def told(rows: Iterable[Row], words: str) -> list[Row]:
    """All rows, each printed as it comes in `words` that name its columns."""
    found = []
    for row in rows:
        found.append(row)
        print(words.format_map(row))
    return found


def check(path: Path) -> None:
    """Raises ValueError for a file of another kind, whose rows `merge` would drop."""
    if path.exists():
        with path.open(newline="", errors="replace") as file:
            columns = next(csv.reader(file), list(KEY))
        if missing := [name for name in KEY if name not in columns]:
            raise ValueError(f"{path} is no file of `cppo bench`: no column {', '.join(missing)}")


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a whole file; a cut never leaves half of one behind."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", newline="", dir=path.parent, suffix=".part", delete=False
    ) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def merge(path: Path, new: Iterable[Row]) -> list[Row]:
    """Writes rows over those of the same key, and keeps the others of the file."""
    rows = {key(row): row for row in read(path)}
    for row in new:
        rows[key(row)] = {name: str(value) for name, value in row.items()}
    write(path, list(rows.values()))
    return list(rows.values())


def slower(old: Iterable[Row], new: Iterable[Row], tolerance: float = 0.15) -> list[str]:
    """One line for each backend of ours whose ratio to eager fell by more than `tolerance`.

    Eager is measured in the same run: unlike a time, a ratio holds on another or a busier machine.
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


# Markdown

_PEERS = {"eager": "eager", "compile": "torch.compile", "trl": "TRL", "liger": "Liger"}
_PEERS |= {"verl": "verl", "flash-attn": "flash-attn"}
MODES = {"forward": "forward", "both": "forward + backward"}
_STEP_TIMES = ("rollout", "forward", "loss", "backward", "update", "step")


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows])


def summary(rows: Sequence[Row], kind: str = "all") -> str:
    """A Markdown table of committed rows.

    Args:
        kind: "all", one line for every case and mode; "brief", the loss of three views on logits;
            "steps", training steps phase by phase.
    """
    if kind == "steps":
        return _steps(rows)
    shown = [row for row in rows if kind == "all" or in_brief(row)]
    peers = [name for name in _PEERS if any(_library(row) == name for row in shown)]
    columns = ["input", "", "cppo ms", "of ceiling", *(_PEERS[name] for name in peers)]
    if kind == "all":
        columns = ["op", *columns[:4], "extra MiB", *columns[4:]]
    return markdown(columns, _lines(shown, peers, kind == "all"))


def _lines(rows: Sequence[Row], peers: Sequence[str], is_whole: bool) -> Iterator[list[str]]:
    for (op, shape, dtype, mode), members in by_case(rows).items():
        own = [row for row in members if row["backend"]]
        if not own:
            continue
        ours = min(own, key=lambda row: float(row["ms_p50"]))
        share = ours["percent_of_ceiling"] and f"{float(ours['percent_of_ceiling']):.0f} %"
        words = f"{dtype} {MODES[mode]}" if dtype else ""
        start = [words, three_digits(float(ours["ms_p50"])), share]
        ratios = [_ratios(members, ours, name) for name in peers]
        if is_whole:
            yield [f"`{op}`", shape, *start, _extra(ours), *ratios]
        else:
            yield [shape.partition("three views, ")[2], *start, *ratios]


def _ratios(members: Sequence[Row], ours: Row, library: str) -> str:
    """How many times our time a library takes: as published and, in parentheses, gated."""
    times = {row["peer"]: float(row["ms_p50"]) / float(ours["ms_p50"]) for row in members}
    found = [f"{times[library]:.1f}x"] if library in times else []
    gated = f"{library}, gated"
    return " ".join(found + ([f"({times[gated]:.1f}x)"] if gated in times else []))


def _extra(row: Row) -> str:
    """Memory at the peak beyond inputs and gradients; in place, gradients take no memory."""
    peak, gradients = (float(row[name] or 0) for name in ("peak_mib", "gradient_mib"))
    return f"{peak if peak < gradients else peak - gradients:,.0f}"


def _library(row: Row) -> str:
    return row["peer"].removesuffix(", gated")


def in_brief(row: Row) -> bool:
    """Whether the brief table shows this row."""
    shape = row["shape"]
    return row["op"] == "cppo_loss" and "three views, " in shape and "full" not in shape


def _steps(rows: Sequence[Row]) -> str:
    """One line for each scheme and prune rate; what does not prune is the same at every rate."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        scheme = row["backend"] or row["peer"]
        if scheme in ("cppo", "grpo, pruned"):
            scheme += f", rate {row['shape'].partition('P=')[2]}"
        times = [f"{float(row[f'{name}_s']):.3g}" for name in _STEP_TIMES]
        lines[scheme] = [scheme, *times, f"{float(row['peak_mib']):,.0f}"]
    return markdown(["scheme", *(f"{name} s" for name in _STEP_TIMES), "peak MiB"], lines.values())


# Numbers in texts


def committed(name: str) -> Path:
    """The file of a name in benchmarks/results: see the top of this file."""
    path = RESULTS / f"{name}.csv"
    if path.exists():
        return path
    others = ("_steps", "_correctness")
    found = [p for p in RESULTS.glob(f"{name}_*.csv") if not p.stem.endswith(others)]
    if len(found) != 1:
        raise ValueError(f"benchmarks/results has {len(found)} sets of {name!r}: keep one")
    return found[0]


def ratio(rows: Sequence[Row], *case_and_peer: str) -> float:
    """Time of a peer over that of our fastest backend: op, shape, dtype, mode and the peer."""
    *case, peer = case_and_peer
    members = by_case(rows).get(tuple(case), [])
    theirs = [float(row["ms_p50"]) for row in members if row["peer"] == peer]
    ours = [float(row["ms_p50"]) for row in members if row["backend"]]
    if not theirs or not ours:
        raise ValueError(f"no committed rows of both sides for {'; '.join(case_and_peer)}")
    return theirs[0] / min(ours)


def _ratio(rows: Sequence[Row], *words: str) -> str:
    return f"{ratio(rows, *words):.1f}x"


def _spread(rows: Sequence[Row], mode: str, library: str) -> str:
    shown = [r for r in rows if in_brief(r) and r["mode"] == mode and _library(r) == library]
    found = [ratio(rows, *(row[name] for name in CASE), row["peer"]) for row in shown]
    return f"{min(found):.1f}x to {max(found):.1f}x"


def _value(rows: Sequence[Row], column: str, *conditions: str) -> str:
    wanted = dict(condition.split("=", 1) for condition in conditions)
    fitting = [row for row in rows if wanted.items() <= row.items()]
    if len(fitting) != 1:
        raise ValueError(f"{len(fitting)} committed rows have {wanted}, not one")
    return f"{float(fitting[0][column]):.1f}"


def _paired(rows: Sequence[Row], method: str, at: str) -> str:
    study = importlib.import_module("cppo.benchmarks.experiments.study_report")
    words: str = study.in_words(rows, method, at)
    return words


def _set(rows: Sequence[Row], file: str) -> str:
    def all_of(column: str) -> str:
        return " and ".join(sorted({row.get(column, "") for row in rows} - {""}))

    words = [all_of("device"), f"torch {all_of('torch')}", f"allocator {all_of('allocator')}"]
    return "; ".join([*words, all_of("date"), f"`{file}`"])


def _table(name: str, kind: str) -> str:
    rows = read(committed(name))
    if kind in ("all", "brief", "steps"):
        return summary(rows, kind)
    script = kind or ("demo_runs" if name.endswith("_runs") else name)
    made: str = importlib.import_module(f"cppo.benchmarks.experiments.{script}").summary(rows)
    return made


def _ops() -> str:
    """The ops on tensors that have a kernel, and a column for each kind of backend."""
    columns = {"C++": "cpp", "CUDA C++": "cuda", "Triton": "triton"}
    lines = []
    for op, names in backends.BACKENDS.items():
        if op in backends.HOST_OPS:
            continue
        function = cppo.PackedBatch.unpack if op == "unpack" else getattr(cppo, op)
        what = str(function.__doc__).splitlines()[0].replace("|", "\\|")
        lines.append([f"`{op}`", what, *("yes" if c in names else "" for c in columns.values())])
    return markdown(["op", "what it is", *columns], lines)


def _number(kind: str, words: Sequence[str]) -> str:
    path = committed(words[0])
    if kind == "set":
        return _set(read(path), path.name)
    makers: dict[str, Callable[..., str]] = {"ratio": _ratio, "spread": _spread, "value": _value}
    makers["paired"] = _paired
    return makers[kind](read(path), *words[1:])


_PLACE = re.compile(
    r"<!-- (table|ratio|spread|value|paired|set|ops): ([^>]*?) -->(.*?)<!-- /\1 -->", re.DOTALL
)


def rendered(text: str) -> str:
    """The text with its tables and numbers as the committed rows give them."""

    def made(found: re.Match[str]) -> str:
        kind, words = found[1], found[2]
        if kind == "table":
            name, _, table = words.partition(" ")
            inner = f"\n{_table(name, table)}\n"
        elif kind == "ops":
            inner = f"\n{_ops()}\n"
        else:
            inner = _number(kind, [word.strip() for word in words.split(";")])
        return f"<!-- {kind}: {words} -->{inner}<!-- /{kind} -->"

    return _PLACE.sub(made, text)


def main(paths: Sequence[str]) -> int:
    for path in map(Path, paths):
        text = path.read_text()
        path.write_text(rendered(text))
        print(f"{path}: {'changed' if rendered(text) != text else 'as committed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
