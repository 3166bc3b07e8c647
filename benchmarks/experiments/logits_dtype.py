"""What it costs to keep the logits of a bf16 head in fp32, and what rounding them costs.

    python benchmarks/experiments/logits_dtype.py --model FOLDER     a model with a chat template
    python benchmarks/experiments/logits_dtype.py --smoke            random numbers, writes nothing

A model in bf16 samples completions, and is run on them once more. `linear_cppo_loss` then takes the
log-probabilities in fp64 of these very hidden states for those of the policy that sampled: every
importance ratio is 1, and what a ratio differs by is the rounding of the head. Times are medians of
interleaved calls, in seconds of the processor.
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cppo
from cppo.benchmarks import report
from cppo.benchmarks.environment import environment, experiment_parser, results_folder
from cppo.benchmarks.timing import peak_growth
from cppo.ops.checks import LOGITS_DTYPES

QUESTIONS = (
    "A farmer has {} apples and sells {} of them each day. How many are left after a week?",
    "{} children share {} sweets each with their two parents. How many sweets are there?",
)


@torch.no_grad()
def sampled(folder: str, completions: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (T, D), weight, tokens (T,) and bounds of completions at temperature 1."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    asked = [QUESTIONS[n % 2].format(9 * n + 70, n % 7 + 2) for n in range(completions)]
    chats = [[{"role": "user", "content": question}] for question in asked]
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    prompts = tokenizer.apply_chat_template(chats, padding=True, **options)
    torch.manual_seed(0)
    ids = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=length)
    start, end = prompts["input_ids"].shape[1], tokenizer.eos_token_id
    response = (ids[:, start:] == end).int().cumsum(1).roll(1, 1)
    response[:, 0] = 0
    mask = torch.cat([prompts["attention_mask"], (response == 0).long()], 1)
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, start - 1 : -1]
    counts = mask[:, start:].sum(1).cumsum(0)
    bounds = torch.cat([counts.new_zeros(1), counts])
    chosen = mask[:, start:].bool()
    return hidden[chosen], model.lm_head.weight.detach(), ids[:, start:][chosen], bounds


def drawn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, without a model."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator).bfloat16() for n in (60, 500))
    targets = torch.randint(500, (60,), generator=generator)
    return hidden, weight, targets, torch.tensor([0, 20, 40, 60])


def exact_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(T,) fp64, some rows at a time."""
    of_head = weight.double()
    rows = zip(hidden.split(64), targets.split(64), strict=True)
    return torch.cat([cppo.linear_token_stats(h.double(), of_head, t).logps for h, t in rows])


def measure(
    hidden: Tensor, weight: Tensor, targets: Tensor, bounds: Tensor, repeats: int
) -> list[dict[str, Any]]:
    """A row for each dtype of the logits."""
    old_logps = exact_logps(hidden, weight, targets)
    advantages = torch.ones(len(bounds) - 1)

    def call(logits_dtype: str, backward: bool) -> Any:
        states, head = (x.detach().requires_grad_(backward) for x in (hidden, weight))
        output = cppo.linear_cppo_loss(
            states,
            head,
            targets,
            advantages,
            old_logps=old_logps,
            cu_seqlens=bounds,
            logits_dtype=logits_dtype,
        )
        if backward:
            output.loss.backward()
        return output

    def seconds(way: tuple[str, bool]) -> float:
        start = time.process_time()
        call(*way)
        return time.process_time() - start

    ways = [(kind, backward) for kind in LOGITS_DTYPES for backward in (False, True)]
    times: dict[Any, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            times[way].append(seconds(way))
    return [
        _row(kind, call(kind, False), old_logps)
        | {
            "forward_s": round(statistics.median(times[kind, False]), 4),
            "both_s": round(statistics.median(times[kind, True]), 4),
            "peak_mb": round(peak_growth(partial(call, kind, True), hidden.device) / 1e6, 1),
        }
        for kind in LOGITS_DTYPES
    ]


def _row(kind: str, output: Any, old_logps: Tensor) -> dict[str, Any]:
    error = (output.logps - old_logps).abs()
    off = (error.exp() - 1).double()
    return {
        "logits_dtype": kind,
        "tokens": len(error),
        "logp_error_mean": f"{error.mean():.2g}",
        "logp_error_p99": f"{error.quantile(0.99):.2g}",
        "logp_error_max": f"{error.max():.2g}",
        "ratios_off_by_1_percent": round(float((off > 0.01).double().mean()), 4),
        "clip_fraction": round(float(output.metrics["clip_fraction"]), 5),
    }


def main() -> None:
    parser = experiment_parser(__doc__, "toy size, writes nothing")
    parser.add_argument("--model", help="a folder; SmolLM2-135M's wheel can be saved to one")
    parser.add_argument("--completions", type=int, default=16)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not (options.smoke or options.model):
        parser.error("--model or --smoke is needed")
    inputs = (
        drawn() if options.smoke else sampled(options.model, options.completions, options.length)
    )
    weight = inputs[1]
    sizes: dict[str, Any] = {"model": Path(options.model or "drawn").name}
    sizes |= {"vocabulary": len(weight), "hidden": weight.shape[1]}
    rows = [sizes | row for row in measure(*inputs, 1 if options.smoke else options.repeats)]
    for row in rows:
        print(row, file=sys.stderr)
    if not options.smoke:
        path = options.output or results_folder(options.record) / "logits_dtype.csv"
        report.write(path, [row | environment("cpu") for row in rows])


if __name__ == "__main__":
    main()
