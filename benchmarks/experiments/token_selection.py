"""What the rules that select tokens cost: the head at 40 % of the tokens, and whole updates.

    python benchmarks/experiments/token_selection.py            this machine
    python benchmarks/experiments/token_selection.py --smoke    toy sizes, writes nothing

Rows "head": `linear_cppo_loss` of one view with `token_weights` of all tokens, and of the 40 % that
VPPO keeps. The backward is what a call with gradients takes beyond one without.
Rows "update": an update of the demo's model on the same 256 completions for each
`LossConfig.perception`; relative to GRPO, `cpl_coef` = 0. One thread; seconds of the process's own
time, the variants in turn, and of each the median.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import cppo
from cppo import LossConfig
from cppo.benchmarks import report
from cppo.benchmarks.environment import environment, experiment_parser, results_folder
from cppo.demo.run import build_trainer, demo_config
from cppo.train.algorithm import cppo_update
from cppo.train.progress import PhaseTimer

_HEADS = ((2048, 32_000, 512), (512, 151_936, 256))  # T, V, D
_METHODS = {
    "GRPO": LossConfig(cpl_coef=0.0),
    "cpl": LossConfig(),
    "cpl_all": LossConfig(perception="cpl_all"),
    "vppo": LossConfig(perception="vppo"),
    "papo": LossConfig(perception="papo"),
    "papo, entropies": LossConfig(
        perception="papo", papo_entropy_coef=0.03, entropy_coef=-0.03
    ),
}  # fmt: skip


def _in_turn(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median of each, in seconds; the first round is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            spent[name].append(time.process_time() - started)
    return {name: statistics.median(times[1:]) for name, times in spent.items()}


def head(sizes: tuple[int, int, int], rounds: int) -> Iterator[report.Row]:
    """One row per share of the tokens."""
    tokens, vocabulary, width = sizes
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * width**-0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    bounds = torch.arange(0, tokens + 1, tokens // 8)
    old, drop = torch.randn(2, tokens, generator=generator)
    vppo = cppo.visual_dependency(old, old + 0.5 * drop, cu_seqlens=bounds).token_weights
    weights = {"1": torch.ones(tokens), "0.4": vppo}
    found: dict[str, Any] = {}

    def loss(share: str, hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        rows = (targets, torch.tensor([1.0, -1.0] * 4))
        given: dict[str, Any] = {"cu_seqlens": bounds, "token_weights": weights[share]}
        found[share] = cppo.linear_cppo_loss(hidden, weight, *rows, **given)
        return found[share].loss

    def both(share: str) -> None:
        loss(share, *(x.detach().requires_grad_() for x in (hidden, weight))).backward()

    def forward(share: str) -> None:
        with torch.no_grad():
            loss(share, hidden, weight)

    calls = {f"{share} both": partial(both, share) for share in weights}
    calls |= {f"{share} forward": partial(forward, share) for share in weights}
    seconds = _in_turn(calls, rounds)
    backward = {share: seconds[f"{share} both"] - seconds[f"{share} forward"] for share in weights}
    for share in weights:
        both(share)
        metrics = found[share].metrics
        yield {
            "part": "head",
            "variant": f"{float(share):.0%} of the tokens".replace("%", " %"),
            "shape": f"T={tokens} V={vocabulary} D={width}",
            "seconds": f"{backward[share]:.4g}",
            "relative": f"{backward[share] / backward['1']:.3f}",
            "head_gemm_rows": str(int(metrics.get("head_gemm_rows", 0))),
        }


def updates(questions: int, group_size: int, rounds: int) -> Iterator[report.Row]:
    """One row per method, of an update of the demo's model."""
    with tempfile.TemporaryDirectory() as folder:
        options = demo_config(prune_rate=0.0, output_dir=folder)
        options = replace(
            options,
            batch_size=questions * group_size,
            group_size=group_size,
            negative_views=("masked_patches",),
        )
        trainers = {
            name: build_trainer(
                "digits",
                replace(options, loss=loss, output_dir=str(Path(folder) / name)),
                held_out=16,
            )
            for name, loss in _METHODS.items()
        }
        first = trainers["GRPO"]
        torch.manual_seed(0)
        rollouts = first.sample(first.questions.draw(questions))
        rows = range(len(rollouts.texts))
        answers = [rollouts.question_of(row).columns["answer"] for row in rows]
        rewards = torch.tensor(
            first.reward_functions[0](rollouts.texts, answer=answers), dtype=torch.float64
        )
        told: dict[str, dict[str, float]] = {}

        def update(name: str) -> None:
            run = trainers[name].new_update(PhaseTimer(), lambda batch: None)
            cppo_update(run, rollouts, rewards)
            told[name] = run.metrics()

        calls = {name: partial(update, name) for name in trainers}
        seconds = _in_turn(calls, rounds)
    for name in trainers:
        yield {
            "part": "update",
            "variant": name,
            "shape": f"digits, {len(rewards)} completions",
            "seconds": f"{seconds[name]:.4g}",
            "relative": f"{seconds[name] / seconds['GRPO']:.2f}",
            "head_gemm_rows": f"{told[name].get('head_gemm_rows', 0):.0f}",
            "perturbed_views": f"{told[name]['perturbed_views']:.2f}",
        }


def measure(smoke: bool) -> Iterator[report.Row]:
    here = environment()
    for sizes in ((48, 193, 16),) if smoke else _HEADS:
        for row in head(sizes, 1 if smoke else 5):
            yield {**row, **here}
    for row in updates(*((2, 2) if smoke else (16, 16)), 1 if smoke else 7):
        yield {**row, **here}


def summary(rows: Sequence[report.Row]) -> str:
    """The table of docs/methods.md: time and work of an update, by method."""
    columns = ("`perception`", "update, relative to GRPO", "perturbed views", "rows of the head")
    names = ("variant", "relative", "perturbed_views", "head_gemm_rows")
    lines = [[row[name] for name in names] for row in rows if row["part"] == "update"]
    return report.markdown(columns, lines)


def main() -> None:
    options = experiment_parser(__doc__, "toy sizes, writes nothing").parse_args()
    torch.set_num_threads(1)
    words = "{part:<7} {variant:<20} {seconds:>8} s {relative:>6}"
    rows = report.told(measure(options.smoke), words)
    if not options.smoke:
        report.write(results_folder(options.record) / "token_selection.csv", rows)


if __name__ == "__main__":
    main()
