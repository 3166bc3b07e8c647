"""PNG charts of a file of rows and one HTML page of them. Needs matplotlib."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from cppo.benchmarks import report
from cppo.benchmarks.report import MODES, Row
from cppo.extras import require_package

OURS = "#0f766e"
COLOURS = {"eager": "#94a3b8", "compile": "#64748b", "trl": "#b45309", "liger": "#2563eb"}
COLOURS |= {"verl": "#7c3aed", "flash-attn": "#be185d"}
KINDS = {"logits": "Ops on logits", "linear": "Ops on hidden states", "host": "Other ops"}
_CSS = """body { margin:2rem auto; max-width:1100px; font:15px/1.5 system-ui, sans-serif }
img { width:100% } table { border-collapse:collapse; font-size:13px }
td, th { padding:2px 8px; text-align:right; white-space:nowrap; border-bottom:1px solid #ddd }
td:first-child, th:first-child { text-align:left } tr.ours { font-weight:600 }"""
_SHOWN = (
    *("ms_p20", "ms_p50", "ms_p80", "speedup_over_eager"),
    *("percent_of_ceiling", "peak_mib", "gradient_mib", "max_error"),
)


def draw(path: Path) -> list[Path]:
    """Writes <stem>_<kind>.png, <stem>_roofline.png and <stem>.html beside a CSV file.

    Raises: ImportError without matplotlib.
    """
    require_package("--plot", "matplotlib", "bench")
    import matplotlib

    matplotlib.use("Agg")
    rows = report.read(path)
    pictures = []
    for kind, title in KINDS.items():
        chosen = [row for row in rows if kind_of(row) == kind]
        if chosen:
            pictures.append(_bars(chosen, title, path.with_name(f"{path.stem}_{kind}.png")))
    points = [row for row in rows if row["unit"] and float(row["gflop"]) > 0]
    if points:
        pictures.append(_roofline(points, path.with_name(f"{path.stem}_roofline.png")))
    html = path.with_suffix(".html")
    html.write_text(page(rows, pictures))
    return [*pictures, html]


def kind_of(row: Row) -> str:
    """The chart that a row belongs to: logits, linear or host."""
    if not row["dtype"] or not row["unit"]:
        return "host"
    return "linear" if row["op"].startswith("linear") else "logits"


def page(rows: Sequence[Row], pictures: Sequence[Path]) -> str:
    """The charts and every row in one file: no scripts, nothing loaded from elsewhere."""
    first = rows[0] if rows else {}
    names = ("torch", "triton", "trl", "liger-kernel", "verl", "cppo", "commit", "date")
    versions = ", ".join(f"{name} {first[name]}" for name in names if first.get(name))
    images = [base64.b64encode(picture.read_bytes()).decode() for picture in pictures]
    lines = ["".join(f"<th>{escape(name)}</th>" for name in ("", *_SHOWN))]
    for case, members in report.by_case(rows).items():
        lines.append(f'<th colspan="{1 + len(_SHOWN)}">{escape(" ".join(case))}</th>')
        for row in sorted(members, key=lambda row: float(row["ms_p50"])):
            cells = "".join(f"<td>{escape(row[name])}</td>" for name in _SHOWN)
            lines.append(f"<td>{escape(_name(row))}</td>{cells}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>cppo benchmarks</title><style>{_CSS}</style></head><body>"
        f"<h1>cppo on {escape(first.get('device', ''))}</h1><p>{escape(versions)}</p>"
        + "".join(f'<img alt="" src="data:image/png;base64,{image}">' for image in images)
        + f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></body></html>\n"
    )


def _name(row: Row) -> str:
    return f"cppo {row['backend']}" if row["backend"] else row["peer"]


def _colour(row: Row) -> str:
    return OURS if row["backend"] else COLOURS.get(row["peer"].split(",")[0], "#cbd5e1")


def _bars(chosen: Sequence[Row], title: str, path: Path) -> Path:
    """One small chart for each case and mode: a bar is a median time, a line p20 to p80."""
    import matplotlib.pyplot as plt

    found = report.by_case(chosen)
    height = -(-len(found) // 2)
    tallest = max(len(members) for members in found.values())
    size = (12, height * (0.55 + 0.27 * tallest))
    figure, grid = plt.subplots(height, 2, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    for axes, ((op, shape, dtype, mode), members) in zip(grid.flat, found.items(), strict=False):
        words = MODES[mode] if dtype else ""
        axes.set_title(f"{op}  {dtype}  {words}\n{shape}", fontsize=8.5, loc="left")
        _bars_of_case(axes, sorted(members, key=lambda row: float(row["ms_p50"])))
    figure.suptitle(f"{title}, {chosen[0]['device']} (ms, log scale, shorter is better)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _bars_of_case(axes: Any, members: Sequence[Row]) -> None:
    fast, times, slow = (
        [float(row[name]) for row in members] for name in ("ms_p20", "ms_p50", "ms_p80")
    )
    spread = [
        [t - f for t, f in zip(times, fast, strict=True)],
        [s - t for t, s in zip(times, slow, strict=True)],
    ]
    names = [_name(row) for row in members]
    bars = axes.barh(names, times, xerr=spread, color=[_colour(row) for row in members])
    ratios = [row["speedup_over_eager"] for row in members]
    labels = [
        f"{t:.3g} ms" + (f"  {float(ratio):.3g}x" if ratio else "")
        for t, ratio in zip(times, ratios, strict=True)
    ]
    axes.bar_label(bars, labels, padding=4, fontsize=7.5)
    axes.set_xscale("log")
    axes.set_xlim(min(times) / 3, max(times) * 6)
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)  # every bar says its time
    axes.tick_params(labelsize=7.5)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _roofline(points: Sequence[Row], path: Path) -> Path:
    """Rates against the work per byte of the best plan, below what the machine can do."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    bandwidth = max(float(row["copy_gb_s"]) for row in points) / 1e3  # TFLOP/s per FLOP/byte
    intensities = [float(row["gflop"]) / float(row["gbytes"]) for row in points]
    low, high = min(intensities) / 3, max(intensities) * 3
    for dtype, style in (("fp32", "-"), ("bf16", "--")):
        peak = max(float(row[f"gemm_{dtype}_tflop_s"]) for row in points)
        line = sorted({low, high, min(max(low, peak / bandwidth), high)})
        limits = [min(x * bandwidth, peak) for x in line]
        label = f"measured copy rate and {dtype} GEMM rate"
        axes.plot(line, limits, style, color="#334155", linewidth=1, label=label)
    seen: set[str] = set()
    for row, intensity in zip(points, intensities, strict=True):
        name = "cppo" if row["backend"] else row["peer"].split(",")[0]
        axes.scatter(
            intensity,
            float(row["gflop"]) / float(row["ms_p50"]),
            s=34 if row["backend"] else 16,
            marker="o" if row["dtype"] == "fp32" else "s",
            color=_colour(row),
            label=None if name in seen else name,
            zorder=3 if row["backend"] else 2,
        )
        seen.add(name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of the best plan", ylabel="TFLOP/s")
    axes.set_title(f"Roofline, {points[0]['device']} (circles fp32, squares bf16)", fontsize=10)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
