"""What a call of the losses costs the host, at sizes where computing costs nothing.

    python benchmarks/experiments/host_time.py            this machine
    python benchmarks/experiments/host_time.py --smoke    a few calls, writes nothing

T = 8 tokens of two completions, V = 64, D = 16, one thread. A row holds the fastest and the median
of several runs of 200 calls, in microseconds of the process's own time per call: other work on the
machine does not count. On a GPU this is the time below which small calls cannot go.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

import cppo
from cppo import LossConfig, Views
from cppo.benchmarks import report
from cppo.benchmarks.environment import environment, experiment_parser, results_folder

_OPS = ("cppo_loss", "linear_cppo_loss")
_TOKENS, _VOCABULARY, _WIDTH = 8, 64, 16


def _call(op: str, views: int, mode: str) -> Callable[[], None]:
    """A loss of one view or of three, with its gradients ("both") or without ("forward")."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    width = _VOCABULARY if op == "cppo_loss" else _WIDTH
    leaves = [randn(_TOKENS, width) for _ in range(views)]
    head = [] if op == "cppo_loss" else [randn(_VOCABULARY, _WIDTH)]
    targets = torch.randint(_VOCABULARY, (_TOKENS,), generator=generator)
    options = {
        "old_logps": randn(_TOKENS),
        "cu_seqlens": torch.tensor([0, _TOKENS // 2, _TOKENS], dtype=torch.int32),
        "config": LossConfig(cpl_reduction="sequence"),
    }
    rows = (targets, torch.tensor([1.0, -1.0]))
    inputs = Views(*leaves) if views > 1 else leaves[0]

    def forward() -> Tensor:
        loss: Tensor = getattr(cppo, op)(inputs, *head, *rows, **options).loss
        return loss

    def both() -> None:
        forward().backward()
        for leaf in (*leaves, *head):
            leaf.grad = None

    if mode == "forward":
        return forward  # type: ignore[return-value]
    for leaf in (*leaves, *head):
        leaf.requires_grad_()
    return both


def _microseconds(call: Callable[[], None], runs: int, calls: int) -> list[float]:
    """Per call, of each run; the first run is not counted."""
    spent = []
    for _ in range(runs + 1):
        started = time.process_time()
        for _ in range(calls):
            call()
        spent.append(1e6 * (time.process_time() - started) / calls)
    return spent[1:]


def measure(runs: int, calls: int) -> Iterator[report.Row]:
    """One row per op, views and mode."""
    here = environment()
    for op, views, mode in product(_OPS, (1, 3), ("forward", "both")):
        spent = _microseconds(_call(op, views, mode), runs, calls)
        times = {"us_min": f"{min(spent):.0f}", "us_p50": f"{statistics.median(spent):.0f}"}
        yield {"op": op, "views": str(views), "mode": mode, **times, **here}


def summary(rows: Sequence[report.Row]) -> str:
    """The table of the docs."""
    columns = ("microseconds", "anchor, forward", "both", "three views, forward", "both")
    lines = [[f"`{op}`", *(row["us_min"] for row in rows if row["op"] == op)] for op in _OPS]
    return report.markdown(columns, lines)


def main() -> None:
    options = experiment_parser(__doc__, "a few calls, writes nothing").parse_args()
    torch.set_num_threads(1)
    words = "{op:<17} {views} views, {mode:<8} {us_min:>6} us"
    rows = report.told(measure(*((1, 2) if options.smoke else (15, 200))), words)
    if not options.smoke:
        report.write(results_folder(options.record) / "host_time.csv", rows)


if __name__ == "__main__":
    main()
