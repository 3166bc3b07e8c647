"""Tokens that decoding makes per second of one CPU thread, or of a GPU.

    python benchmarks/experiments/decoding.py MODEL            a folder or a name on the hub
    python benchmarks/experiments/decoding.py digits           the checkpoint of a demo
    python benchmarks/experiments/decoding.py MODEL --engine vllm
    python benchmarks/experiments/decoding.py --smoke          toy size, writes nothing

Completions of the same prompts by `sample_completions`. "bf16": weights in bf16. "autocast": fp32
weights under autocast, as `precision: bf16` trains them. On a CPU the clock is the process's own
CPU time, which a busy machine disturbs less than wall time. Rows are added to the CSV file, so that
two commits can be measured in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cppo.benchmarks import report
from cppo.benchmarks.environment import add_record_option, environment, results_folder
from cppo.demo.digits import DigitSums
from cppo.demo.warmup import CHECKPOINTS
from cppo.model.forward import check_supported, set_attention
from cppo.model.load import load_model, load_processor
from cppo.model.prompts import Prompts, encode_questions
from cppo.questions import as_question
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
    prompts = prompts_of(model, processor, options.model, options.prompts)
    if options.engine == "vllm":
        generate = _by_vllm(str(path), prompts, options, precision)
    else:
        generate = _by_cppo(model, processor, prompts, options, precision)
    rates = []
    for seed in range(options.repetitions):
        torch.manual_seed(seed)
        start = _clock(options.device)
        tokens = sum(map(len, generate()))
        spent = _clock(options.device) - start
        rates.append((tokens / spent, tokens, spent))
    rate, tokens, spent = max(rates)
    name = options.name or options.model
    values = (name, options.engine, precision, options.prompts, options.group, tokens)
    return dict(zip(COLUMNS, (*values, f"{spent:.2f}", f"{rate:.1f}"), strict=True))


Generate = Callable[[], Sequence[Sequence[int]]]


def _by_cppo(
    model: Any, processor: Any, prompts: Prompts, options: argparse.Namespace, precision: str
) -> Generate:
    model.to(options.device, torch.bfloat16 if precision == "bf16" else torch.float32)
    check_supported(model)
    set_attention(model, "auto")
    is_cast = precision == "autocast"
    kind = torch.autocast(options.device, torch.bfloat16) if is_cast else contextlib.nullcontext()

    def generate() -> Sequence[Sequence[int]]:
        with kind:
            found = sample_completions(
                model, processor, prompts, group_size=options.group,
                max_new_tokens=options.tokens, temperature=1.0,
                batch_size=options.prompts * options.group,
            )  # fmt: skip
        return found.completion_ids

    return generate


def _by_vllm(path: str, prompts: Prompts, options: argparse.Namespace, precision: str) -> Generate:
    """In this process, which has the clock; without images."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM, SamplingParams

    rows = zip(prompts.input_ids, prompts.attention_mask, strict=True)
    ids = [{"prompt_token_ids": own[mask.bool()].tolist()} for own, mask in rows]
    longest = prompts.input_ids.shape[1] + options.tokens
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[precision]
    engine = LLM(path, dtype=dtype, max_model_len=longest, generation_config="vllm")
    params = SamplingParams(n=options.group, temperature=1.0, max_tokens=options.tokens)
    engine.generate(ids[:1], SamplingParams(max_tokens=2), use_tqdm=False)  # it compiles here

    def generate() -> Sequence[Sequence[int]]:
        found = engine.generate(ids, params, use_tqdm=False)
        return [one.token_ids for request in found for one in request.outputs]

    return generate


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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
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
    parser.add_argument("--smoke", action="store_true", help="toy size, nothing is written")
    add_record_option(parser)
    options = parser.parse_args()
    if options.smoke:
        options.prompts, options.group, options.tokens = 2, 2, 4
    if options.device == "cpu":
        torch.set_num_threads(1)
    rows = [measure(options, precision) for precision in options.precisions]
    print(summary(rows))
    if not options.smoke:
        path = options.output or results_folder(options.record) / "decoding.csv"
        new = [row | environment(options.device) for row in rows]
        report.write(path, [*report.read(path), *new])


if __name__ == "__main__":
    main()
