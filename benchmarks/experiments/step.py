"""One training step at the shape of a real model, phase by phase, for four ways to do it.

    python benchmarks/experiments/step.py --model qwen2.5-0.5b                    on a CPU
    python benchmarks/experiments/step.py --model qwen2.5-vl-3b --device cuda     on a GPU
    python benchmarks/experiments/step.py --model toy                             shows that it runs

All of them get the same rollouts (lengths as spread as a reasoning task's), rewards and weights:

    grpo            every completion, padded, logits of one view
    grpo, pruned    the same for the kept ones
    three views     the authors' scheme: every completion padded, all rows of three views, a mask
    cppo            pruned, packed, perturbed views only where A > 0, no logits
    cppo, rate 0    without the pruning: the same loss and gradients as "three views"

The perturbed views are noise on the image; for a text model, where nothing is seen, other prompt
tokens of the same number stand in for them. Rollouts are sampled once, at the end. Rows go to
<device>_steps.csv after every repeat.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cppo
from cppo.benchmarks import eager, report, timing
from cppo.benchmarks.environment import (
    add_record_option,
    environment,
    file_stem,
    load_per_core,
    results_folder,
)
from cppo.benchmarks.experiments import step_models
from cppo.benchmarks.experiments.step_batch import StepBatch, make_batch
from cppo.config import LossConfig
from cppo.model.check import check_model
from cppo.model.forward import choose_attention, lm_head, set_attention
from cppo.model.packed import packed_hidden
from cppo.records import NumItems, Views

PHASES = ("rollout", "reward", "pack", "forward", "loss", "backward", "optimizer")
SCHEMES = ("grpo", "grpo, pruned", "three views", "cppo", "cppo, rate 0")
PRUNED = ("grpo, pruned", "cppo")
Way = tuple[str, float]  # a scheme and its prune rate
CONFIG = LossConfig(cpl_coef=0.01, cpl_reduction="sequence")


class Clock:
    """Seconds of each phase; on a GPU waits for it, so that phases do not run into each other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] += time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Update:
    """What a scheme runs on: the model, the rollouts, and how many completions at once."""

    model: nn.Module
    batch: StepBatch
    at_once: int


def run_scheme(scheme: str, rate: float, update: Update, clock: Clock) -> float:
    """Gradients of one step accumulate in the model; returns the loss."""
    batch = update.batch
    with clock("reward"):
        advantages, kept = cppo.advantages_and_prune(batch.rewards, batch.group_size, rate)
    run = _packed_part if scheme.startswith("cppo") else _padded_part
    total = 0.0
    for part in kept.split(update.at_once):
        loss = run(scheme, update, advantages, part, len(kept), clock)
        with clock("backward"):
            loss.backward()
        total += float(loss.detach())
    return total


def _padded_part(
    scheme: str, update: Update, advantages: Tensor, part: Tensor, count: int, clock: Clock
) -> Tensor:
    """Eager PyTorch on padded rows, as the published trainers have it."""
    batch, model = update.batch, update.model
    names = ("anchor", "positive", "negative") if scheme == "three views" else ("anchor",)
    with clock("forward"):
        logits = [batch.padded_logits(model, part, name) for name in names]
    with clock("loss"):
        mask = batch.response_mask[part]
        outputs = eager.contrastive_loss(
            eager.view_stats,
            Views(*logits),
            batch.response_ids[part],
            advantages[part],
            CONFIG,
            mask=mask,
        )
        return outputs["loss"] * (len(part) / count)


def _packed_part(
    scheme: str, update: Update, advantages: Tensor, part: Tensor, count: int, clock: Clock
) -> Tensor:
    batch, model = update.batch, update.model
    with clock("pack"):
        packed = batch.pack(part)
        looking = part[advantages[part] > 0]
        looking_packed = batch.pack(looking)
        positions = batch.positions_of(packed), batch.positions_of(looking_packed)
    with clock("forward"):
        anchor = packed_hidden(model, packed, positions[0], *batch.images_of(part, "anchor"))
        # Where nobody looks, the compact views have no rows.
        perturbed = [
            packed_hidden(
                model,
                batch.with_view(looking_packed, looking, name),
                positions[1],
                *batch.images_of(looking, name),
            )
            if len(looking)
            else anchor[:0]
            for name in ("positive", "negative")
        ]
    with clock("loss"):
        head = lm_head(model)._asdict()
        return cppo.linear_cppo_loss(
            Views(anchor, *perturbed),
            targets=packed.targets,
            advantages=advantages[part],
            **head,
            cu_seqlens=packed.row_cu_seqlens,
            num_items=NumItems(count, count),
            config=CONFIG,
        ).loss


def measure(
    update: Update, ways: Sequence[Way], repeats: int, device: torch.device
) -> Iterator[dict[Way, dict[str, Any]]]:
    """{way: median seconds of each phase, peak memory, loss}, interleaved over repeats.

    Yields what is known after every repeat, with NaN for the rollouts, and at last with them: they
    are the same for every way, and so is the memory of the optimizer.
    """
    optimizer = torch.optim.AdamW(update.model.parameters(), lr=0.0, foreach=True)
    for parameter in update.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    set_attention(update.model, choose_attention("auto", device))
    check_model(update.model)  # here, not in the first call that is timed
    if device.type == "cuda":
        # Kernels are compiled and chosen outside of what is timed.
        run_scheme(*ways[-1], update, Clock(device))
        update.model.zero_grad()
    taken: dict[Way, list[dict[str, float]]] = {way: [] for way in ways}
    found: dict[Way, dict[str, Any]] = {way: {} for way in ways}
    for _ in range(repeats):
        for way in ways:
            clock = Clock(device)

            def once(way: Way = way, clock: Clock = clock) -> None:
                found[way]["loss_value"] = run_scheme(*way, update, clock)
                with clock("optimizer"):
                    # A learning rate of zero: every scheme starts from the same weights.
                    optimizer.step()
                    optimizer.zero_grad()

            peak = timing.peak_growth(once, device)
            found[way]["peak_mib"] = f"{peak / 2**20:.0f}"
            taken[way].append(clock.seconds)
        for way in ways:
            found[way]["repeats"] = len(taken[way])
            for phase in PHASES:
                found[way][phase] = statistics.median(s[phase] for s in taken[way])
            found[way]["rollout"] = math.nan
        yield found
    sampling = Clock(device)
    with sampling("rollout"):
        update.batch.sample(update.model)
    for way in ways:
        found[way]["rollout"] = sampling.seconds["rollout"]
    yield found


def make_rows(
    found: dict[str, dict[str, Any]], update: Update, shared: dict[str, Any]
) -> list[report.Row]:
    """One row per scheme; update_s leaves out rollout and reward."""
    made = []
    for scheme, values in found.items():
        seconds = {f"{phase}_s": f"{values[phase]:.4g}" for phase in PHASES}
        total = sum(values[phase] for phase in PHASES)
        update_s = sum(values[phase] for phase in PHASES[2:])
        made.append(
            {
                "op": "step",
                "shape": shared["shape"],
                "dtype": shared["dtype"],
                "mode": "both",
                "backend": scheme if scheme.startswith("cppo") else "",
                "peer": "" if scheme.startswith("cppo") else scheme,
                **seconds,
                "update_s": f"{update_s:.4g}",
                "step_s": f"{total:.4g}",
                "tokens_per_s": f"{update.batch.num_tokens / total:.4g}",
                "peak_mib": values["peak_mib"],
                "repeats": str(values["repeats"]),
                "loss": f"{values['loss_value']:.6g}",
                **{k: str(v) for k, v in shared.items() if k not in ("shape", "dtype")},
            }
        )
    return made


def main(argv: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    began = time.perf_counter()
    options = _parser().parse_args(argv)
    device = torch.device(options.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    path = options.output or results_folder(options.record) / f"{file_stem(device)}_steps.csv"
    model = step_models.build(options.model, device, dtype)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = make_batch(
        model, options.questions, options.group_size, options.prompt, options.completion
    )
    update = Update(model, batch, options.at_once)
    shape = f"{options.model} Q={options.questions} G={options.group_size} "
    shape += f"prompt={options.prompt} completion<={options.completion}"
    shared = {"dtype": options.dtype, **environment(device)}
    shared["load"] = f"{load_per_core():.2f}"
    ways = [
        (scheme, rate)
        for scheme in options.schemes
        for rate in (options.prune_rate if scheme in PRUNED else [0.0])
    ]
    print(f"{options.model}: ready after {time.perf_counter() - began:.0f} s", file=sys.stderr)
    for found in measure(update, ways, options.repeats, device):
        made = []
        for rate in options.prune_rate:
            # What does not prune is the same at every rate.
            own = {s: found[s, rate if s in PRUNED else 0.0] for s in options.schemes}
            made += make_rows(own, update, {"shape": f"{shape} P={rate:g}", **shared})
        if not options.model.startswith("toy") or options.output:
            report.merge(path, made)
        seconds = time.perf_counter() - began
        print(f"{options.model}: rows after {seconds:.0f} s", file=sys.stderr)
    say(report.summary(made, "steps"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", choices=step_models.NAMES, default="qwen2.5-0.5b")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("fp32", "bf16"), default="fp32")
    add("--questions", type=int, default=2)
    add("--group-size", type=int, default=8)
    add("--prompt", type=int, default=32, help="tokens")
    add("--completion", type=int, default=48, help="tokens of the longest")
    add("--prune-rate", type=float, nargs="+", default=[0.5])
    add("--at-once", type=int, default=8, help="completions in a forward and backward pass")
    add("--repeats", type=int, default=2)
    add("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    add("--gradient-checkpointing", action="store_true")
    add("--output", type=Path)
    add_record_option(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
