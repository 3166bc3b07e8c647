"""PNG charts of a file of rows: times per case, and a roofline. Needs matplotlib."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cppo.benchmarks import page, rows
from cppo.benchmarks.rows import Row, row_kind
from cppo.extras import require_package

OURS = "#0f766e"
COLOURS = {"eager": "#94a3b8", "compile": "#64748b", "trl": "#b45309", "liger": "#2563eb"}
COLOURS |= {"verl": "#7c3aed", "flash-attn": "#be185d"}
OTHER = "#cbd5e1"
KINDS = {"logits": "Ops on logits", "linear": "Ops on hidden states", "host": "Other ops"}


def draw(path: Path) -> list[Path]:
    """Writes <stem>_<kind>.png, <stem>_roofline.png and <stem>.html beside a CSV file.

    Raises: ImportError without matplotlib.
    """
    require_package("--plot", "matplotlib", "bench")
    import matplotlib

    matplotlib.use("Agg")
    found = rows.read(path)
    pictures = []
    for kind, title in KINDS.items():
        chosen = [row for row in found if row_kind(row) == kind]
        if chosen:
            pictures.append(_bars(chosen, title, path.with_name(f"{path.stem}_{kind}.png")))
    if any(row["unit"] and float(row["gflop"]) > 0 for row in found):
        pictures.append(_roofline(found, path.with_name(f"{path.stem}_roofline.png")))
    images = {picture.stem: base64.b64encode(picture.read_bytes()).decode() for picture in pictures}
    html = path.with_suffix(".html")
    html.write_text(page.render(found, images.get(f"{path.stem}_roofline", "")))
    return [*pictures, html]


def panels(chosen: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """The rows by op, shape, dtype and mode: what is compared with each other."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in chosen:
        found.setdefault((row["op"], row["shape"], row["dtype"], row["mode"]), []).append(row)
    return found


def _colour(row: Row) -> str:
    return OURS if row["backend"] else COLOURS.get(row["peer"].split(",")[0], OTHER)


def _bars(chosen: Sequence[Row], title: str, path: Path) -> Path:
    import matplotlib.pyplot as plt

    found = panels(chosen)
    columns = 2
    lines = -(-len(found) // columns)
    tallest = max(len(members) for members in found.values())
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(12, lines * (0.55 + 0.27 * tallest)),
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    for axes, ((op, shape, dtype, mode), members) in zip(grid.flat, found.items(), strict=False):
        words = "forward + backward" if mode == "both" else mode if dtype else ""
        _panel(axes, f"{op}  {dtype}  {words}\n{shape}", members)
    figure.suptitle(f"{title}, {chosen[0]['device']} (ms, log scale, shorter is better)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _panel(axes: Any, title: str, members: Sequence[Row]) -> None:
    members = sorted(members, key=lambda row: float(row["ms_p50"]))
    times = [float(row["ms_p50"]) for row in members]
    names = [f"cppo {row['backend']}" if row["backend"] else row["peer"] for row in members]
    spread = [
        [t - float(row["ms_p20"]) for t, row in zip(times, members, strict=True)],
        [float(row["ms_p80"]) - t for t, row in zip(times, members, strict=True)],
    ]
    axes.barh(
        names,
        times,
        xerr=spread,
        color=[_colour(row) for row in members],
        error_kw={"elinewidth": 0.8, "ecolor": "#334155"},
    )
    axes.set_xscale("log")
    axes.set_xlim(min(times) / 3, max(times) * 6)
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)  # every bar says its time
    for place, (t, row) in enumerate(zip(times, members, strict=True)):
        ratio = f"  {float(row['speedup_over_eager']):.3g}x" if row["speedup_over_eager"] else ""
        axes.text(
            float(row["ms_p80"]) * 1.1, place, f"{t:.3g} ms{ratio}", va="center", fontsize=7.5
        )
    axes.set_title(title, fontsize=8.5, loc="left")
    axes.tick_params(labelsize=7.5)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _roofline(found: Sequence[Row], path: Path) -> Path:
    import matplotlib.pyplot as plt

    points = [row for row in found if row["unit"] and float(row["gflop"]) > 0]
    figure, axes = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    bandwidth = max(float(row["copy_gb_s"]) for row in points) / 1e3  # TFLOP/s per FLOP/byte
    intensities = [float(row["gflop"]) / float(row["gbytes"]) for row in points]
    low, high = min(intensities) / 3, max(intensities) * 3
    for dtype, style in (("fp32", "-"), ("bf16", "--")):
        peak = max(float(row[f"gemm_{dtype}_tflop_s"]) for row in points)
        line = sorted({low, high, min(max(low, peak / bandwidth), high)})
        axes.plot(
            line,
            [min(x * bandwidth, peak) for x in line],
            style,
            color="#334155",
            linewidth=1,
            label=f"measured copy rate and {dtype} GEMM rate",
        )
    seen: set[str] = set()
    for row, intensity in zip(points, intensities, strict=True):
        name = "cppo" if row["backend"] else row["peer"].split(",")[0]
        rate = float(row["gflop"]) / float(row["ms_p50"])
        axes.scatter(
            intensity,
            rate,
            s=34 if row["backend"] else 16,
            marker="o" if row["dtype"] == "fp32" else "s",
            color=_colour(row),
            label=None if name in seen else name,
            zorder=3 if row["backend"] else 2,
        )
        seen.add(name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of the best plan")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"Roofline, {points[0]['device']} (circles fp32, squares bf16)", fontsize=10)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
