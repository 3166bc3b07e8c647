"""How much of TRL's update padding and repeated prompts cost.

    python benchmarks/experiments/trl_packed.py            # this machine
    python benchmarks/experiments/trl_packed.py --smoke    # one round, writes nothing
    python benchmarks/experiments/trl_packed.py --table    # the committed rows

The update of `trl_update.py`, without a reference model, with the options that leave padding out:
"trim" cuts each micro-batch to its longest row (the adapter's default), "pack" runs one stream
without padding, "share prompts" also runs a question's prompt once for its completions. At two
prompt lengths: GSM8K's questions, and pictures of 361 image tokens under a small Qwen2.5-VL, whose
completions are as long as GSM8K's answers.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from cppo.benchmarks import report
from cppo.benchmarks.environment import environment, results_folder, version
from cppo.benchmarks.experiments.step_models import Pictures
from cppo.benchmarks.experiments.trl_update import Setting, gsm8k, medians, shown
from cppo.demo.tiny import build_tiny_vlm
from cppo.integrations.trl import CPPO
from cppo.options.trainer import LossConfig

LOSS = LossConfig(cpl_coef=0.0)
VARIANTS: dict[str, CPPO | None] = {
    "TRL alone": None,
    "trim": CPPO(loss=LOSS),
    "pack": CPPO(loss=LOSS, pack=True),
    "share prompts": CPPO(loss=LOSS, share_prompts=True),
    "prune 0.75, trim": CPPO(loss=LOSS, prune_rate=0.75),
    "prune 0.75, pack": CPPO(loss=LOSS, prune_rate=0.75, pack=True),
    "prune 0.75, share prompts": CPPO(loss=LOSS, prune_rate=0.75, share_prompts=True),
}


def pictures(text: Setting) -> Setting:
    """Questions about pictures, with completions as long as those of a text setting."""
    processor = build_tiny_vlm()[1]
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 1 << 20}
    names = ("prompt", "images")
    rows = [{name: row[name] for name in names} for row in map(Pictures().__getitem__, range(16))]
    letters = processor.tokenizer("0123456789", add_special_tokens=False)["input_ids"]
    lengths = map(len, text.completions)
    completions = [[letters[i % len(letters)] for i in range(length)] for length in lengths]
    return Setting(lambda: build_tiny_vlm()[0], processor, rows, completions)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        text = gsm8k(Path(name))
        return [
            {"prompts": prompts, "variant": variant, **row, "trl": version("trl"), **environment()}
            for prompts, setting in {"GSM8K": text, "pictures": pictures(text)}.items()
            for variant, row in medians(setting, VARIANTS, options, beta=0.0).items()
        ]


def summary(rows: list[dict[str, str]]) -> str:
    """The rows as a table: seconds of an update, and how many times TRL's that is."""
    kinds = dict.fromkeys(row["prompts"] for row in rows)
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = {row["prompts"]: row for row in rows if row["variant"] == variant}
        cells = [
            [f"{float(own[kind]['update_seconds']):.2f}", f"{own[kind]['times_faster']}x"]
            for kind in kinds
        ]
        lines.append([variant, *sum(cells, [])])
    columns = [[f"{kind}: update s", "times faster"] for kind in kinds]
    return report.markdown(["", *sum(columns, [])], lines)


def main() -> None:
    options, rows = shown(__doc__, "trl_packed", measure, summary)
    if rows:
        report.write(results_folder(options.record) / "trl_packed.csv", rows)


if __name__ == "__main__":
    main()
