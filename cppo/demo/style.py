"""The report's style sheet."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #16191f; --soft: #626b7a; --line: #e3e6eb;
  --up: #12805c; --down: #c2382e; --rise: #f0883a; --fall: #4c8df0; --select: #16191f;
  --c0: #3b6fe0; --c1: #e0793b; --c2: #1f9a78; --c3: #a855c7;
  --c4: #c9a227; --c5: #d6457a; --c6: #4aa7c9; --c7: #7d8797;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #101318; --card: #191d24; --ink: #e9ecf1; --soft: #98a2b3; --line: #2b313b;
    --up: #45c499; --down: #f0736a; --rise: #d9701f; --fall: #3272d6; --select: #ffffff;
    --c0: #6f9bff; --c1: #f29a63; --c2: #4cc9a4; --c3: #c98ae3;
    --c4: #e0c04f; --c5: #f07ba6; --c6: #78c9e6; --c7: #9aa4b5;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 20px; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 48px 0 8px; }
h3 { font-size: 15px; margin: 0; }
section > p { color: var(--soft); max-width: 74ch; margin: 0 0 16px; }
section > p b { color: var(--ink); }
.cards, .grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.card, .chart, .views, .completion, .panel, .config { background: var(--card);
  border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; }
.card h3 { color: var(--soft); font-weight: 500; }
.figures { margin: 4px 0 8px; font-size: 24px; font-variant-numeric: tabular-nums; }
.figures .after { font-size: 36px; font-weight: 650; letter-spacing: -.02em; }
.figures .before, .figures .arrow { color: var(--soft); }
.figures .arrow { margin: 0 10px; }
.bar { display: flex; height: 8px; border-radius: 4px; background: var(--line); overflow: hidden; }
.bar .base { background: var(--c7); } .bar .up { background: var(--up); } .bar .down { background: var(--down); }
.change { margin: 8px 0 0; font-weight: 600; } p.up { color: var(--up); } p.down { color: var(--down); }
.facts { display: flex; flex-wrap: wrap; gap: 8px 32px; margin: 20px 0 0; }
.facts dt { color: var(--soft); font-size: 13px; } .facts dd { margin: 0; font-weight: 600; }
figure { margin: 0; }
.chart > p { margin: 0 0 8px; color: var(--soft); font-size: 13px; }
.keys { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft); margin-bottom: 4px; }
.keys b { color: var(--ink); font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; background: var(--c); }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .axis { stroke: var(--soft); stroke-width: 1; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.dot { fill: var(--c); stroke: var(--card); stroke-width: 1.5; } .area { fill: var(--c); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.split { display: grid; gap: 16px; grid-template-columns: minmax(0, 5fr) minmax(230px, 2fr); align-items: start; }
@media (max-width: 760px) { .split { grid-template-columns: 1fr; } }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
td { padding: 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; font-weight: 600; }
.split td + td { text-align: right; }
.config { display: block; } .config tbody { display: block; columns: 2 400px; column-gap: 40px; }
.config tr { display: grid; grid-template-columns: 1fr 1fr; break-inside: avoid; border-bottom: 1px solid var(--line); }
.config td, .config tr:last-child td { border: 0; font-weight: 400; overflow-wrap: anywhere; } .config td:first-child { color: var(--soft); }
code, .tokens { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: 13px; }
.views > p { margin: 0 0 12px; font-size: 14px; color: var(--soft); } .views b { color: var(--ink); }
.views > div { display: flex; flex-wrap: wrap; gap: 12px; }
.view { flex: 1 1 0; min-width: 100px; max-width: 216px; } .view img { width: 100%; height: auto; }
img { display: block; image-rendering: pixelated; border-radius: 6px; max-width: 100%; }
figcaption { font-size: 12px; color: var(--soft); margin-top: 6px; }
figcaption::before { content: ""; display: inline-block; width: 8px; height: 8px; border-radius: 50%; margin-right: 6px; background: var(--c7); }
figcaption.positive::before { background: var(--c2); } figcaption.negative::before { background: var(--down); }
.stack { display: grid; gap: 12px; }
.completion { display: flex; flex-wrap: wrap; gap: 12px 20px; align-items: center; }
.completion > div:last-child { flex: 1 1 420px; }
.completion p { margin: 0; } .question { color: var(--soft); font-size: 14px; }
.badge { display: inline-block; border-radius: 999px; padding: 1px 10px; margin-left: 6px; font-size: 12px; font-weight: 600;
  border: 1px solid currentColor; } .badge.right { color: var(--up); } .badge.wrong { color: var(--down); }
.completion .tokens { margin-top: 8px; font-size: 16px; line-height: 2; }
.token { padding: 3px 1px; margin: 0 1px; border-radius: 4px; white-space: pre; }
.token.selected { outline: 2px solid var(--select); outline-offset: -1px; font-weight: 650; padding: 3px 4px; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: 10px; font-size: 13px; }
.ramp { display: inline-flex; border-radius: 4px; overflow: hidden; border: 1px solid var(--line); } .ramp i { width: 18px; height: 14px; }
.legend .token { color: var(--ink); margin-left: 14px; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
