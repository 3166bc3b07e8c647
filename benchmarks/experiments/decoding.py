"""Tokens that decoding makes per second of one CPU thread, or of a GPU.

    python benchmarks/experiments/decoding.py MODEL            a folder or a name on the hub
    python benchmarks/experiments/decoding.py digits           the checkpoint of a demo
    python benchmarks/experiments/decoding.py MODEL --engine vllm
    python benchmarks/experiments/decoding.py MODEL --profile  the time of each operator, no row
    python benchmarks/experiments/decoding.py --smoke          toy size, writes nothing

Completions of the same prompts by `sample_completions`. "bf16": weights in bf16. "autocast": fp32
weights under autocast, as `precision: bf16` trains them. On a CPU the clock is the process's own
CPU time, which a busy machine disturbs less than wall time. Rows are added to the CSV file, so that
two commits can be measured in turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from cppo.benchmarks import report
from cppo.benchmarks.environment import environment, experiment_parser, results_folder
from cppo.demo.digits import DigitSums
from cppo.demo.warmup import CHECKPOINTS
from cppo.model.forward import check_supported, set_attention
from cppo.model.load import load_model, load_processor
from cppo.model.prompts import Prompts, encode_questions
from cppo.options.vllm import VLLMConfig
from cppo.questions import as_question
from cppo.rollouts.engine import Engine
from cppo.rollouts.rollout import sample_completions

DEMOS = ("arithmetic", "digits")
PRECISIONS = ("bf16", "autocast", "fp32")
COLUMNS = ("model", "engine", "precision", "prompts", "group", "tokens", "seconds", "tokens_per_s")


def prompts_of(model: Any, processor: Any, name: str, count: int) -> Prompts:
    """Word problems that differ in their numbers; the demo's images for its model."""
    rows: Sequence[Any] = [
        {
            "prompt": f"A shop sells {2 * i + 3} boxes of {i + 4} pears each on Monday and {i + 7} "
            "boxes on Tuesday. How many pears does it sell? Show your reasoning."
        }
        for i in range(count)
    ]
    if name == "digits":
        rows = [DigitSums(size=count)[i] for i in range(count)]
    if name == "arithmetic":
        rows = [{"prompt": f"What is {i % 9 + 1}+{i % 7 + 1}?"} for i in range(count)]
    return encode_questions(model, processor, [as_question(row) for row in rows])


def measure(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """One row: the fastest of some repetitions."""
    path = CHECKPOINTS / options.model if options.model in DEMOS else options.model
    model, processor = load_model(path), load_processor(path)
    model.to(options.device, torch.bfloat16 if precision == "bf16" else torch.float32)
    prompts = prompts_of(model, processor, options.model, options.prompts)
    check_supported(model)
    set_attention(model, "auto")
    engine = None
    if options.engine == "vllm":
        dtype = "float32" if precision == "fp32" else "bfloat16"
        engine = _vllm(model, processor, prompts, options.tokens, dtype)
    rates = []
    for seed in range(options.repetitions):
        torch.manual_seed(seed)
        start = _clock(options.device)
        with torch.autocast(options.device, torch.bfloat16, enabled=precision == "autocast"):
            found = sample_completions(
                model, processor, prompts, group_size=options.group,
                max_new_tokens=options.tokens, temperature=1.0,
                batch_size=options.prompts * options.group, engine=engine,
            )  # fmt: skip
        tokens = sum(map(len, found.completion_ids))
        spent = _clock(options.device) - start
        rates.append((tokens / spent, tokens, spent))
    rate, tokens, spent = max(rates)
    name = options.name or options.model
    values = (name, options.engine, precision, options.prompts, options.group, tokens)
    return dict(zip(COLUMNS, (*values, f"{spent:.2f}", f"{rate:.1f}"), strict=True))


def _vllm(model: Any, processor: Any, prompts: Prompts, tokens: int, dtype: str) -> Engine:
    """vLLM in this process, which has the clock, after its first completions."""
    from cppo.rollouts.vllm_engine import VLLMEngine

    longest = VLLMConfig(max_model_len=prompts.input_ids.shape[1] + tokens)
    engine = VLLMEngine(model, processor, longest, dtype)
    few: dict[str, Any] = {"group_size": 1, "max_new_tokens": 2, "temperature": 1.0}
    # What is done once is done here.
    sample_completions(model, processor, prompts.of([0]), **few, engine=engine)
    return engine


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, measured or read, as a Markdown table."""
    names = [name for name in (*COLUMNS, "commit") if name in rows[0]]
    return report.markdown(names, [[str(row[name]) for name in names] for row in rows])


def main() -> None:
    parser = experiment_parser(__doc__, "toy size, writes nothing")
    parser.add_argument("model", nargs="?", default="arithmetic")
    parser.add_argument("--name", help="of the model, in the rows")
    parser.add_argument("--engine", default="cppo", choices=("cppo", "vllm"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of a completion at most")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--output", type=Path, help="CSV file; rows are added")
    parser.add_argument("--profile", action="store_true", help="operators, by torch.profiler")
    options = parser.parse_args()
    if options.smoke:
        options.prompts, options.group, options.tokens = 2, 2, 4
    if options.device == "cpu":
        torch.set_num_threads(1)
    with profile() if options.profile else nullcontext() as profiler:
        rows = [measure(options, precision) for precision in options.precisions]
    if profiler is not None:
        print(profiler.key_averages().table("self_cpu_time_total", row_limit=12))
        return
    print(summary(rows))
    if not options.smoke:
        path = options.output or results_folder(options.record) / "decoding.csv"
        new = [row | environment(options.device) for row in rows]
        report.write(path, [*report.read(path), *new])


if __name__ == "__main__":
    main()
