"""Measures a page in headless Chromium: what sticks out of the window, and what is hard to read.

The page is shown in a frame of the wanted width, because a window has a smallest width. A script in
a copy of the page writes what it measures into the outer page, which `--dump-dom` prints.
"""

from __future__ import annotations

import functools
import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MEASURED = "measured:"
# An element may stick out of a box that scrolls or hides what is outside, not of the window.
SCRIPT = """
<script>
window.addEventListener("load", () => {
  const clips = e => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX);
  const inside = e => e && e !== document.body && (clips(e) || inside(e.parentElement));
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor);
      if (color.length === 3) return color;
    }
    return [255, 255, 255];
  };
  const name = e => e.tagName.toLowerCase() + "." + (e.getAttribute("class") || "") + ": " +
    e.textContent.trim().slice(0, 40);
  const out = [], faint = [];
  for (const e of document.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    if (!box.width || !box.height || style.visibility === "hidden") continue;
    const fits = box.right <= innerWidth + .5 && box.left >= -.5;
    if (!fits && !inside(e.parentElement)) out.push(name(e));
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (own && !e.closest("svg") && !e.closest(".token")) {
      const pair = [light(rgb(style.color)), light(behind(e))].sort((a, b) => b - a);
      if ((pair[0] + .05) / (pair[1] + .05) < 4.5) faint.push(name(e));
    }
  }
  const root = document.documentElement;
  const heights = [...document.querySelectorAll("svg text")]
    .map(t => t.getBoundingClientRect().height).filter(h => h > 0);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  parent.postMessage(JSON.stringify({
    width: innerWidth, scroll: root.scrollWidth, out, faint, dark,
    elements: document.body.querySelectorAll("*").length,
    smallest: Math.min(...heights),
  }), "*");
});
</script>
"""
FRAME = """<!doctype html><body>
<iframe width="{width}" height="900" style="border:0" srcdoc="{page}"></iframe><pre></pre><script>
addEventListener("message", e => document.querySelector("pre").textContent = "{mark}" + e.data);
</script>"""


@functools.cache
def why_not() -> str:
    """Why no page can be measured here; '' if it can."""
    return "" if BROWSER else "no Chromium is installed"


def measure(page: str, folder: Path, width: int, *, dark: bool = False) -> dict[str, Any]:
    """What a page looks like at a width.

    Returns: `width` of the frame and `scroll`, the width of what it shows; `out`, elements that
        stick out; `faint`, texts of too little contrast; `dark`; the number of `elements`.
    """
    source = FRAME.format(width=width, page=html.escape(page + SCRIPT), mark=MEASURED)
    file = folder / "framed.html"
    file.write_text(source, encoding="utf-8", errors="replace")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'browser'}", "--window-size=1300,1000"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command += ["--virtual-time-budget=5000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    said = done.stdout.rpartition(f"<pre>{MEASURED}")[2].partition("</pre>")[0]
    assert said, done.stderr[-2000:]
    return json.loads(html.unescape(said))
