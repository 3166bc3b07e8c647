"""One HTML page of a file of rows: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from cppo.benchmarks.rows import Row, row_kind, three_digits

_CSS = """
:root { --ink:#0f172a; --soft:#64748b; --line:#e2e8f0; --page:#f8fafc; --card:#fff;
  --ours:#0f766e; --peer:#cbd5e1; --bad:#b91c1c }
@media (prefers-color-scheme: dark) { :root { --ink:#e2e8f0; --soft:#94a3b8; --line:#1e293b;
  --page:#0b1120; --card:#0f172a; --ours:#2dd4bf; --peer:#334155; --bad:#f87171 } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink);
  font:15px/1.5 system-ui, sans-serif; font-variant-numeric:tabular-nums }
main { max-width:1080px; margin:0 auto; padding:40px 20px 80px }
h1 { font-size:30px; margin:0; letter-spacing:-.02em }
h2 { font-size:20px; margin:44px 0 6px }
p, .soft { color:var(--soft); margin:4px 0 }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(190px,1fr)); gap:12px;
  margin:24px 0 }
.tile, .card { background:var(--card); border:1px solid var(--line); border-radius:10px }
.tile { padding:14px 16px } .tile b { display:block; font-size:24px; color:var(--ours) }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(500px,1fr)); gap:14px }
.card { padding:14px 16px; min-width:0 }
.card h3 { font-size:15px; margin:0 } .card h3 span { color:var(--soft); font-weight:400 }
table { width:100%; border-collapse:collapse; font-size:13px; margin-top:8px }
td, th { padding:3px 6px; text-align:right; white-space:nowrap; font-weight:400 }
th { color:var(--soft); font-size:11.5px }
td:first-child, th:first-child { text-align:left }
td.bar { width:26%; text-align:left }
td.bar i { display:block; height:10px; border-radius:3px; background:var(--peer); min-width:2px }
tr.ours td { font-weight:600 } tr.ours i { background:var(--ours) }
.bad { color:var(--bad) }
img { width:100%; max-width:820px; background:#fff; border-radius:10px;
  border:1px solid var(--line) }
@media (max-width:600px) { .cards { grid-template-columns:1fr } .card { overflow-x:auto } }
"""

_TITLES = {"logits": "Ops on logits", "linear": "Ops on hidden states", "host": "Other ops"}
_MODES = {"forward": "forward", "both": "forward + backward"}


def render(rows: Sequence[Row], roofline: str = "") -> str:
    """The page as text.

    Args:
        rows: of one file. roofline: a PNG in base64, or "".
    """
    first = rows[0] if rows else {}
    parts = [
        f"<h1>cppo on {escape(first.get('device', ''))}</h1>",
        f"<p>{escape(_versions(first))}</p>",
        "<p>Every variant got the same inputs; nothing was timed before its result was compared "
        "with fp64. Bars are median times, shorter is better. Share of the ceiling: bytes or "
        "operations of the best plan over the time, against the copy or GEMM rate measured in the "
        "same run. Error: against fp64, relative to the largest value.</p>",
        _tiles(rows, first),
    ]
    for kind, title in _TITLES.items():
        cards = _cards([row for row in rows if row_kind(row) == kind])
        if cards:
            parts.append(f"<h2>{title}</h2><div class=cards>{''.join(cards)}</div>")
    if roofline:
        parts.append("<h2>Roofline</h2><p>How far each is from what this machine can do.</p>")
        parts.append(f'<img alt="Roofline" src="data:image/png;base64,{roofline}">')
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>cppo benchmarks</title><style>{_CSS}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _versions(row: Row) -> str:
    names = ("torch", "triton", "trl", "liger-kernel", "verl", "cppo", "commit", "date")
    return ", ".join(f"{name} {row[name]}" for name in names if row.get(name))


def _tiles(rows: Sequence[Row], first: Row) -> str:
    tiles = []
    for op in dict.fromkeys(row["op"] for row in rows):
        own = [r for r in rows if r["op"] == op and r["backend"] and r["speedup_over_eager"]]
        if own:
            ratios = sorted(float(row["speedup_over_eager"]) for row in own)
            low, high = f"{ratios[0]:.3g}", f"{ratios[-1]:.3g}"
            value = f"{low}x" if low == high else f"{low} - {high}x"
            cases = len({(row["shape"], row["dtype"], row["mode"]) for row in own})
            tiles.append((value, f"{op} against eager", f"all of {cases} measured cases"))
    for name, unit in (("copy_gb_s", "GB/s copy"), ("gemm_bf16_tflop_s", "TFLOP/s bf16 GEMM")):
        if first.get(name):
            tiles.append((three_digits(float(first[name])), unit, "this machine, measured"))
    cells = [
        f"<div class=tile><b>{escape(value)}</b>{escape(title)}"
        f'<div class="soft">{escape(words)}</div></div>'
        for value, title, words in tiles
    ]
    return f"<div class=tiles>{''.join(cells)}</div>"


def _cards(rows: Sequence[Row]) -> list[str]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row["op"], row["shape"], row["dtype"], row["mode"]), []).append(row)
    return [_card(key, members) for key, members in found.items()]


def _card(key: tuple[str, ...], members: Sequence[Row]) -> str:
    op, shape, dtype, mode = key
    members = sorted(members, key=lambda row: float(row["ms_p50"]))
    longest = max(float(row["ms_p50"]) for row in members)
    words = f"{dtype} {_MODES[mode]}" if dtype else ""
    lines = [
        "<tr><th></th><th></th><th>ms</th><th>vs eager</th><th>ceiling</th>"
        "<th>MiB</th><th>error</th></tr>"
    ]
    for row in members:
        name = f"cppo {row['backend']}" if row["backend"] else row["peer"]
        width = 100 * float(row["ms_p50"]) / longest
        cells = [
            f"{float(row['ms_p50']):.4g}",
            f"{float(row['speedup_over_eager']):.3g}x" if row["speedup_over_eager"] else "",
            f"{float(row['percent_of_ceiling']):.0f} %" if row["percent_of_ceiling"] else "",
            f"{float(row['peak_mib']):,.0f}" if row["peak_mib"] else "",
            row["max_error"],
        ]
        hint = f"p20 {row['ms_p20']}, p80 {row['ms_p80']}, {row['samples']} samples"
        lines.append(
            f'<tr{" class=ours" if row["backend"] else ""} title="{escape(hint)}">'
            f'<td>{escape(name)}</td><td class=bar><i style="width:{width:.1f}%"></i></td>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    return (
        f"<section class=card><h3>{escape(op)} <span>{escape(words)}</span></h3>"
        f'<div class="soft">{escape(shape)}</div><table>{"".join(lines)}</table></section>'
    )
