"""How much of TRL's own update phase pruning saves.

    python benchmarks/experiments/trl_update.py            # this machine
    python benchmarks/experiments/trl_update.py --smoke    # one small round, writes nothing
    python benchmarks/experiments/trl_update.py --table    # the committed rows

The update phase is an optimizer step of TRL without the sampling and the rewards: reference
log-probabilities, forward, backward, optimizer. Prompts are GSM8K's questions and completions its
answers, so lengths are real; the model is tiny (4 layers of width 128, a vocabulary of 4,096
learned from the same text). Seconds are processor seconds on one thread, which other work on the
machine changes little. Every variant samples the same number of completions and trains on
micro-batches of the same size, of which pruning leaves fewer. Variants take turns; a row is the
median over the rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from cppo.benchmarks import report
from cppo.benchmarks.environment import environment, experiment_parser, results_folder, version
from cppo.benchmarks.experiments.small_models import learned_tokenizer, read_texts, small_qwen3
from cppo.benchmarks.experiments.step_models import noise
from cppo.integrations.trl import CPPO, CPPOMixin
from cppo.model.prompts import tokenizer_of

GROUP = 16
MICRO_BATCH = 8  # rows
# TRL alone, the adapter's trimming alone, and trimming with pruning.
VARIANTS: dict[str, CPPO | None] = {
    "trl": None,
    "trim": CPPO(),
    **{f"prune {rate}": CPPO(prune_rate=rate) for rate in (0.5, 0.75, 0.875)},
}


class Stopwatch(TrainerCallback):
    """Seconds of each optimizer step, without those that were paused."""

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self.clock = clock
        self.steps: list[float] = []
        self.paused = self.start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start, self.paused = self.clock(), 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(self.clock() - self.start - self.paused)


class Replayed(GRPOTrainer):
    """TRL's trainer whose completions are there already: `completions(prompts)` gives their ids."""

    watch: Stopwatch
    completions: Callable[[list[list[int]]], list[list[int]]]

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._paused(super()._generate, *args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        return self._paused(super()._calculate_rewards, *args, **kwargs)

    def _generate_single_turn(self, prompt_ids: list[Any], *args: Any, **kwargs: Any) -> Any:
        return self.completions(prompt_ids), None

    def _paused(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        start = self.watch.clock()
        result = function(*args, **kwargs)
        self.watch.paused += self.watch.clock() - start
        return result


class Pruned(CPPOMixin, Replayed):
    pass


class Setting(NamedTuple):
    """What a trainer is given: its model is made anew for each run.

    completions: ids without the closing token; each prompt gets one of them.
    """

    model: Callable[[], Any]
    processor: Any
    rows: list[dict[str, Any]]
    completions: list[list[int]]


def gsm8k(folder: Path) -> Setting:
    """Questions and answers of GSM8K, and a small Qwen3 in a folder."""
    questions, answers = read_texts(2000)
    tokenizer = learned_tokenizer([*questions, *answers])
    small_qwen3(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id).save_pretrained(
        folder
    )
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in questions[:64]]
    ids = tokenizer(answers[:512], add_special_tokens=False)["input_ids"]
    return Setting(lambda: Qwen3ForCausalLM.from_pretrained(folder), tokenizer, rows, ids)


def update_seconds(options: CPPO | None, setting: Setting, questions: int, beta: float) -> float:
    """One optimizer step; the seconds of its update."""
    watch = Stopwatch()
    sampled = GROUP * questions
    steps = round(sampled * (1 - (options.prune_rate if options else 0))) // MICRO_BATCH
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            num_generations=GROUP,
            per_device_train_batch_size=sampled // steps,
            gradient_accumulation_steps=steps,
            max_completion_length=1024,
            max_steps=1,
            beta=beta,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
        )
        trainer_class: Any = Replayed if options is None else Pruned
        trainer = trainer_class(
            model=setting.model(),
            reward_funcs=noise,
            args=config,
            train_dataset=Dataset.from_list(setting.rows),
            processing_class=setting.processor,
            callbacks=[watch],
            **({} if options is None else {"cppo": options}),
        )
        trainer.watch = watch
        rng = random.Random(0)
        end = tokenizer_of(setting.processor).eos_token_id
        trainer.completions = lambda prompts: [
            [*rng.choice(setting.completions), end] for _ in prompts
        ]
        trainer.train()
    return watch.steps[0]


def medians(
    setting: Setting, variants: dict[str, CPPO | None], options: argparse.Namespace, beta: float
) -> dict[str, dict[str, Any]]:
    """Seconds of every variant, which take turns, and how much faster than the first that is."""
    update_seconds(list(variants.values())[-1], setting, options.questions, beta)  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, variant in variants.items():
            took = update_seconds(variant, setting, options.questions, beta)
            seconds[name].append(took)
            print(f"beta {beta}, {name}: {took:.2f} s", flush=True)
    base = statistics.median(next(iter(seconds.values())))
    return {
        name: {
            "sampled": GROUP * options.questions,
            "update_seconds": round(statistics.median(all_of_it), 3),
            "fastest": round(min(all_of_it), 3),
            "slowest": round(max(all_of_it), 3),
            "rounds": options.rounds,
            "times_faster": round(base / statistics.median(all_of_it), 2),
        }
        for name, all_of_it in seconds.items()
    }


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        setting = gsm8k(Path(name))
        return [
            {"variant": variant, "beta": beta, **row, "trl": version("trl"), **environment()}
            for beta in (0.0, 0.04)
            for variant, row in medians(setting, VARIANTS, arguments, beta).items()
        ]


def summary(rows: list[dict[str, str]]) -> str:
    """The rows as a table: seconds of an update, and how many times TRL's that is."""
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = [variant if variant != "trl" else "TRL alone"]
        for row in rows:
            if row["variant"] == variant:
                cells += [
                    f"{float(row['update_seconds']):.2f}",
                    f"{float(row['times_faster']):.1f}x",
                ]
        lines.append(cells)
    columns = ["", "update s", "times faster", "update s with a reference model", "times faster"]
    return report.markdown(columns, lines)


def shown(
    text: str,
    name: str,
    measure: Callable[[argparse.Namespace], list[dict[str, Any]]],
    summary: Callable[[list[dict[str, str]]], str],
) -> tuple[argparse.Namespace, list[dict[str, Any]]]:
    """Prints the table of the rows `name`. Returns the options, and what is to be written."""
    parser = experiment_parser(text, "one round, writes nothing")
    parser.add_argument("--rounds", type=int, default=3)
    words = "per optimizer step, 16 completions each"
    parser.add_argument("--questions", type=int, default=4, help=words)
    parser.add_argument("--table", action="store_true", help="print the committed rows")
    options = parser.parse_args()
    if options.table:
        print(summary(report.read(report.committed(name))))
        return options, []
    if options.smoke:
        options.rounds = 1
    torch.set_num_threads(1)
    rows = measure(options)
    print(summary([{k: str(v) for k, v in row.items()} for row in rows]))
    return options, [] if options.smoke else rows


def main() -> None:
    options, rows = shown(__doc__, "trl_update", measure, summary)
    if rows:
        report.write(results_folder(options.record) / "trl_update.csv", rows)


if __name__ == "__main__":
    main()
