"""A whole training step, phase by phase: what pruning makes of it, and what others take.

    python benchmarks/experiments/step.py --model smollm2 --device cpu
    python benchmarks/experiments/step.py --model recipes/gsm8k_qwen2.5_1.5b.yaml
    python benchmarks/experiments/step.py --engine vllm                   rollouts by vLLM
    python benchmarks/experiments/step.py --model toy --device cpu        shows that it runs

`CPPOTrainer.train_step` itself, with everything that is in it, at five prune rates, without and
with dynamic allocation (1 / (1 - rate) times the questions, as many completions trained on); and on
the completions of the step at rate 0 the update as published and TRL's (step_baselines.py). Every
variant starts from the same weights and draws the same questions: its learning rate moves nothing.

Times are the trainer's own `time/*`: on a GPU by events, on a CPU processor seconds of one thread,
which other work on the machine changes little. A rollout by vLLM includes the sync of weights, and
not its start. Variants take turns, a row holds the medians, and
goes to <device>_train_steps.csv when it is measured: a run that was cut goes on.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from cppo.benchmarks import report, timing
from cppo.benchmarks.environment import (
    current,
    environment,
    experiment_parser,
    file_stem,
    load_per_core,
    results_folder,
)
from cppo.benchmarks.experiments.step_baselines import published, trl
from cppo.benchmarks.experiments.step_models import Task, sees, task
from cppo.model.wrappers import has_vision
from cppo.options.trainer import CPPOConfig, LossConfig, VLLMConfig
from cppo.rollouts.engine import BuiltinEngine, Engine
from cppo.train import trainer as trainer_module
from cppo.train.batch import Batch
from cppo.train.engine import new_engine
from cppo.train.trainer import CPPOTrainer

RATES = (0.0, 0.5, 0.75, 0.875, 0.9375)
PHASES = ("rollout", "reward", "forward", "backward", "optimizer", "update", "step")
# Lin et al. 2025 (arXiv 2503.22342), table of GSM8K with Qwen2.5-1.5B, G = 16, with allocation.
PAPER = {0.5: "1.81", 0.75: "3.27", 0.875: "4.89", 0.9375: "8.32"}


PEERS = {"published": published, "TRL": trl}


class Way(NamedTuple):
    """How a step is done: a peer's way, or the trainer's ("") at a rate."""

    peer: str
    rate: float = 0.0
    allocation: bool = False


class Observed(CPPOTrainer):
    """The trainer, which keeps the batch of its last step."""

    batch: Batch

    def new_update(self, timer: Any, report: Callable[[Batch], None]) -> Any:
        def kept(batch: Batch) -> None:
            self.batch = batch
            report(batch)

        return super().new_update(timer, kept)


class Steps:
    """Runs steps of one task; the completions of the one at rate 0 are there for the peers."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.sampled: tuple[Observed, dict[str, float]] | None = None

    @functools.cached_property
    def task(self) -> Task:
        """Made when the first step is run."""
        return task(self.options.model, self.device, self.options.completion / 2)

    @functools.cached_property
    def engine(self) -> Engine:
        """One for all steps: it starts once."""
        model, processor, *_ = self.task
        return new_engine(model, processor, self.config(Way(""), "unused"))

    def trainer(self, way: Way, folder: str) -> Observed:
        model, processor, rows, rewards, _ = self.task
        config = self.config(way, folder)
        with patch.object(trainer_module, "new_engine", self._engine):
            trainer = Observed(model, rewards, rows, config=config, processor=processor)
        # The first step of an optimizer makes its state, the others do not.
        for parameter in trainer.parameters:
            parameter.grad = torch.zeros_like(parameter)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return trainer

    def _engine(self, model: Any, *others: Any) -> Engine:
        return BuiltinEngine(model) if self.options.engine == "builtin" else self.engine

    def config(self, way: Way, folder: str) -> CPPOConfig:
        options = self.options
        return CPPOConfig(
            output_dir=folder,
            engine=options.engine,
            vllm=VLLMConfig(check_every=0),
            batch_size=options.questions * options.group_size,
            group_size=options.group_size,
            prune_rate=way.rate,
            dynamic_allocation=way.allocation,
            max_completion_tokens=options.completion,
            generation_batch_size=options.generation_batch_size,
            max_tokens_per_microbatch=options.max_tokens,
            precision=options.precision,
            gradient_checkpointing=options.gradient_checkpointing,
            reward_weights=self.task.weights,
            learning_rate=1e-20,
            max_steps=1,
            log_completions=0,
            loss=LossConfig(cpl_coef=0.01 if has_vision(self.task.model) else 0.0),
        )

    def measured(self, way: Way) -> dict[str, float]:
        """`run`, and on a GPU the bytes at its peak beyond what was in use."""
        if self.device.type != "cuda":
            return {**self.run(way), "peak": math.nan}
        found: dict[str, float] = {}
        peak = timing.peak_growth(lambda: found.update(self.run(way)), self.device)
        return {**found, "peak": peak}

    def run(self, way: Way) -> dict[str, float]:
        """Seconds of the phases, and what the step ran on."""
        if way.peer:
            if self.sampled is None:
                self.run(Way(""))
            assert self.sampled is not None
            trainer, own = self.sampled
            found = PEERS[way.peer](trainer, trainer.batch)
            same = ("rollout", "reward", "questions", "sampled", "trained", "tokens_sampled")
            found |= {name: own[name] for name in same}
            return {**found, "step": found["update"] + own["rollout"] + own["reward"]}
        self.sampled = None  # its optimizer's state
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(way, folder)
            metrics = trainer.train_step()
        found = {name: metrics.get(f"time/{name}", 0.0) for name in PHASES}
        found["rollout"] += metrics.get("time/sync", 0.0)
        # What is left of the step belongs to its update: cutting, packing, reading the metrics.
        found["update"] = found["step"] - found["rollout"] - found["reward"]
        sampled = len(trainer.batch.advantages)
        found |= {"questions": sampled / self.options.group_size, "sampled": sampled}
        found |= {"trained": len(trainer.batch.kept), "loss": metrics["loss"]}
        found |= {"tokens_sampled": metrics["tokens/sampled"]}
        if not way.rate:
            self.sampled = trainer, found
        return found


def measure(
    options: argparse.Namespace, path: Path | None, deadline: float
) -> tuple[list[report.Row], bool]:
    """The rows of all ways, with those that `path` has already; and whether none is missing."""
    shape = f"{Path(options.model).name.removesuffix('.yaml')} Q={options.questions} "
    shape += f"G={options.group_size} completion<={options.completion}"
    shape += "" if options.engine == "builtin" else f" {options.engine}"
    steps = Steps(options)
    shared = {"op": "train_step", "mode": "both", "dtype": options.precision}
    shared |= environment(steps.device)
    known = {report.key(r): r for r in report.read(path)} if path and not options.fresh else {}
    rows: dict[Way, report.Row] = {}
    for way in ways_of(options):
        own = {"backend": "" if way.peer else "cppo", "peer": way.peer}
        rows[way] = {**shared, **own, "shape": f"{shape} {_words(way)}"}
        rows[way] |= known.get(report.key(rows[way]), {})
    lacking = [way for way, row in rows.items() if int(row.get("repeats", 0)) < options.repeats]
    if lacking and time.monotonic() < deadline:
        # Kernels are compiled, and memory is met for the first time, outside of what is timed.
        steps.run(Way("", max(options.rates)))
    samples: dict[Way, list[dict[str, float]]] = {way: [] for way in lacking}
    for way in lacking * options.repeats:
        if time.monotonic() > deadline:
            break
        try:
            samples[way].append(steps.measured(way))
        except torch.cuda.OutOfMemoryError as error:
            print(f"{rows[way]['shape']} {way.peer}: {error}", file=sys.stderr)
            continue
        rows[way] |= shared | _numbers(samples[way])
        if path:
            report.merge(path, [rows[way]])
        print(f"{rows[way]['shape']} {way.peer}: {rows[way]['step_s']} s", file=sys.stderr)
    is_whole = all(len(own) == options.repeats for own in samples.values())
    return [row for row in rows.values() if "repeats" in row], is_whole


def ways_of(options: argparse.Namespace) -> list[Way]:
    """Rate 0 first, whose completions the peers get. TRL's batch is one of texts here."""
    pruned = [rate for rate in options.rates if rate]
    if options.engine != "builtin":  # the peers' updates are the same ones
        return [Way(""), *(Way("", r) for r in pruned), *(Way("", r, True) for r in pruned)]
    is_text = not (options.no_trl or sees(options.model))
    peers = [Way("published")] + ([Way("TRL")] if is_text else [])
    return [Way(""), *peers, *(Way("", r) for r in pruned), *(Way("", r, True) for r in pruned)]


def _words(way: Way) -> str:
    return f"P={way.rate:g}" + (" with allocation" if way.allocation else "")


def _numbers(samples: Sequence[dict[str, float]]) -> report.Row:
    middle = {name: statistics.median(own[name] for own in samples) for name in samples[0]}
    numbers = {f"{name}_s": f"{middle[name]:.4g}" if name in middle else "" for name in PHASES}
    for name in ("questions", "sampled", "trained", "tokens_sampled"):
        numbers[name] = f"{middle[name]:.0f}"
    numbers["peak_mib"] = "" if math.isnan(middle["peak"]) else f"{middle['peak'] / 2**20:.0f}"
    numbers |= {"loss": f"{middle['loss']:.6g}", "repeats": str(len(samples))}
    return numbers | {"load": f"{load_per_core():.2f}"}


def summary(rows: Sequence[report.Row]) -> str:
    """The rows as a table, speed-ups per question over the trainer's step at rate 0.

    "by the law": what 1 / (r + (1 - P)(1 - r)) gives for r, the share of the step at rate 0 that is
    no update; "paper": what was published, for rollouts on a GPU of their own.
    """
    lines = []
    base: Any = {}
    for row in rows:
        model, _, way = row["shape"].partition(" P=")
        rate = float(way.split()[0])
        per_question = {
            n: float(row[f"{n}_s"]) / float(row["questions"]) for n in ("step", "update")
        }
        if row["backend"] and not rate:
            base[model] = per_question | {"r": 1 - per_question["update"] / per_question["step"]}
        own = base[model]
        law = 1 / (own["r"] + (1 - rate) * (1 - own["r"]))
        times = [f"{float(row[f'{n}_s']):.3g}" for n in ("rollout", "update", "step")]
        share = 1 - per_question["update"] / per_question["step"]
        gains = [f"{own[n] / per_question[n]:.2f}x" for n in ("update", "step")]
        name = row["peer"] or f"{rate:g}{way.partition(' ')[2] and ' with allocation'}"
        paper = PAPER.get(rate, "") if "allocation" in way else ""
        tail = ["", ""] if row["peer"] else [f"{law:.2f}x", paper and f"{paper}x"]
        rate_of_decoding = f"{float(row['tokens_sampled']) / float(row['rollout_s']):,.0f}"
        counts = [row["questions"], row["trained"]]
        times.append(f"{100 * share:.0f} %")
        lines.append([model, name, *counts, *times, rate_of_decoding, *gains, *tail])
    columns = ["step of", "prune rate", "questions", "trained", "rollout s", "update s", "step s"]
    columns += ["rollout and reward", "tokens/s of decoding", "update", "step", "by the law"]
    columns += ["paper"]
    return report.markdown(columns, lines)


def main(
    argv: list[str] | None = None, say: Callable[[str], None] = print, deadline: float = math.inf
) -> bool:
    """Whether all rows are there."""
    options = _parser().parse_args(argv)
    device = torch.device(options.device)
    path = options.output or results_folder(options.record) / f"{file_stem(device)}_train_steps.csv"
    if options.model.startswith("toy") and not options.output:
        path = None
    clock = time
    if device.type == "cpu":
        torch.set_num_threads(1)
        clock = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]
    with current(device), patch("cppo.train.progress.time", clock):
        rows, is_whole = measure(options, path, deadline)
    if rows:
        say(summary(rows))
    return is_whole


def _parser() -> argparse.ArgumentParser:
    parser = experiment_parser(__doc__)
    add: Callable[..., Any] = parser.add_argument
    add(
        "--model", default="smollm2", help="smollm2, small, a folder, a recipe (.yaml), toy, toy-vl"
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--engine", choices=("builtin", "vllm"), default="builtin")
    add("--precision", choices=("fp32", "bf16"), default="bf16")
    add("--questions", type=int, default=4, help="of a step at rate 0")
    add("--group-size", type=int, default=16)
    add("--completion", type=int, default=256, help="tokens at most; random weights: half of it")
    add("--rates", type=float, nargs="+", default=list(RATES))
    add("--max-tokens", type=int, default=16384, help="of a micro-batch")
    add("--generation-batch-size", type=int, default=1024)
    add("--gradient-checkpointing", action="store_true")
    add("--no-trl", action="store_true")
    add("--repeats", type=int, default=2)
    add("--fresh", action="store_true", help="measure what has rows again")
    add("--output", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(not main())
