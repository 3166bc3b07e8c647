"""What it saves to run a question's prompt once for all its kept completions.

    python benchmarks/experiments/shared_prompts.py            this machine
    python benchmarks/experiments/shared_prompts.py --smoke    toy size, writes nothing
    python benchmarks/experiments/shared_prompts.py --device cuda --model smollm2

Forward and backward of four questions' kept completions, with every completion's prompt to itself
(packed) and with one prompt per question (shared); hidden states and gradients are compared first.
Variants are interleaved; a row holds the medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cppo.benchmarks import report
from cppo.benchmarks.environment import environment, experiment_parser, results_folder
from cppo.benchmarks.experiments.small_models import (
    Setting,
    load,
    random_prompts,
    rollouts_of,
    seconds,
)
from cppo.options.trainer import CPPOConfig
from cppo.train.batch import Batch
from cppo.train.views import anchor_hidden

QUESTIONS = 4


def batch_of(prompt: int, completion: int, kept: int, options: argparse.Namespace) -> Batch:
    """`kept` completions of half to one and a half times `completion` tokens per question."""
    generator = torch.Generator().manual_seed(0)
    low, high = max(1, completion // 2), completion + completion // 2
    lengths = torch.randint(low, high + 1, (QUESTIONS * kept,), generator=generator)
    prompt_lengths = torch.full((QUESTIONS,), prompt)
    prompts = random_prompts(prompt_lengths, options.vocabulary, generator, options.device)
    rollouts = rollouts_of(prompts, lengths, options.vocabulary, generator)
    return Batch(rollouts, torch.ones(len(lengths)), torch.arange(len(lengths)))


def gradients(setting: Setting, batch: Batch) -> Tensor:
    """Forward and backward of a fixed sum; the gradient of the embedding."""
    setting.model.zero_grad(set_to_none=True)
    with setting.autocast():
        hidden = anchor_hidden(setting.model, batch, batch.pack(batch.kept))
    hidden.float().square().mean().backward()
    gradient: Tensor = next(setting.model.parameters()).grad
    return gradient


def measure(
    setting: Setting, shape: tuple[int, int, int], options: argparse.Namespace
) -> dict[str, Any]:
    """One row: prompt, completion, kept per question."""
    packed = batch_of(*shape, options)
    shared = dataclasses.replace(packed, share_prompts=True)
    variants = {"packed": packed, "shared": shared}
    found = {name: gradients(setting, batch) for name, batch in variants.items()}
    error = float((found["shared"] - found["packed"]).norm() / found["packed"].norm())
    assert error < (0.05 if setting.half else 1e-4), f"{shape}: gradients differ by {error:.2g}"
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.repetitions):
        for name, batch in variants.items():
            spent, _ = seconds(setting.device, gradients, setting, batch, tries=1)
            times[name].append(spent)
    medians = {name: statistics.median(values) for name, values in times.items()}
    prompt, completion, kept = shape
    tokens = sum(packed.lengths(packed.kept))
    once = tokens - QUESTIONS * (kept - 1) * prompt
    return {
        "model": options.model,
        "prompt": prompt,
        "completion": completion,
        "kept_per_question": kept,
        "tokens_packed": tokens,
        "tokens_shared": once,
        "packed_s": f"{medians['packed']:.4f}",
        "shared_s": f"{medians['shared']:.4f}",
        "speedup": f"{medians['packed'] / medians['shared']:.2f}",
        "token_ratio": f"{tokens / once:.2f}",
        "gradient_error": f"{error:.1e}",
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, measured or read, as a Markdown table."""
    names = (
        *("prompt", "completion", "kept_per_question", "tokens_packed", "tokens_shared"),
        *("packed_s", "shared_s", "speedup", "token_ratio", "gradient_error"),
    )
    return report.markdown(names, [[str(row[name]) for name in names] for row in rows])


def main() -> None:
    parser = experiment_parser(__doc__, "toy size, writes nothing")
    parser.add_argument("--model", default="small", help="small, smollm2 or a folder")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--vocabulary", type=int, default=4096, help="token ids that are drawn")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, help="CSV file, overwritten")
    options = parser.parse_args()
    shapes = [(p, 128, kept) for p in (64, 256, 1024) for kept in (2, 4, 8)]
    if options.smoke:
        shapes, options.repetitions = [(16, 8, 2), (32, 8, 3)], 1
    model = load(options.model, options.vocabulary, options.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    setting = Setting(model, CPPOConfig(), optimizer, options.device)
    rows = []
    for shape in shapes:
        rows.append(measure(setting, shape, options))
        print(rows[-1], file=sys.stderr)
    print(summary(rows))
    if not options.smoke:
        path = options.output or results_folder(options.record) / "shared_prompts.csv"
        report.write(path, [row | environment(options.device) for row in rows])


if __name__ == "__main__":
    main()
