"""`cppo demo`: a tiny model, a real task, accuracy before and after, and a report to look at."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from cppo.cli.config_file import ConfigError
from cppo.cli.info import ops_line
from cppo.cli.run_config import DataConfig, DatasetConfig, ModelConfig, RunConfig, dump
from cppo.config import DIVERGENCES, CPPOConfig, LossConfig, kept_per_unit
from cppo.demo.arithmetic import ArithmeticProblems, arithmetic_accuracy
from cppo.demo.digits import DigitSums, digit_sum_accuracy, handwriting
from cppo.demo.report import write_report
from cppo.demo.shortcut import HintedSums, warm_up_shortcut
from cppo.demo.warmup import CHECKPOINTS, warm_up
from cppo.model.load import load_model, load_processor
from cppo.model.prompts import tokenizer_of
from cppo.ops.perception_mask import perception_mask
from cppo.ops.token_stats import linear_token_stats
from cppo.seeds import seed_from
from cppo.train.output_dir import claim_output_dir
from cppo.train.scoring import metric_name
from cppo.train.trainer import CPPOTrainer
from cppo.train.views import forward_views
from cppo.views import perturb, views_from_names


@dataclass(frozen=True)
class Task:
    """A demo: its questions, its reward, the length of a completion, and how its model is made."""

    title: str
    rows: Callable[..., Any]
    reward: Callable[..., list[float]]
    max_completion_tokens: int
    has_images: bool
    warm_up: Callable[..., tuple[Any, Any]]


TASKS = {
    "digits": Task(
        title="Sums of handwritten digits",
        rows=DigitSums,
        reward=digit_sum_accuracy,
        max_completion_tokens=32,
        has_images=True,
        warm_up=partial(warm_up, "digits"),
    ),
    "shortcut": Task(
        title="Sums of handwritten digits, with a hint that misleads half of the time",
        rows=HintedSums,
        reward=digit_sum_accuracy,
        max_completion_tokens=32,
        has_images=True,
        warm_up=warm_up_shortcut,
    ),
    "arithmetic": Task(
        title="Word problems in arithmetic",
        rows=ArithmeticProblems,
        reward=arithmetic_accuracy,
        max_completion_tokens=48,
        has_images=False,
        warm_up=partial(warm_up, "arithmetic"),
    ),
}


SHIPPED = ("digits", "arithmetic")


def demo_config(
    task: str = "digits",
    *,
    prune_rate: float = 0.75,
    cpl_coef: float = 0.01,
    divergence: str = "k3",
    steps: int = 60,
    seed: int = 0,
    output_dir: str = "runs/demo",
    eval_every: int = 20,
    questions: int = 16,
    group_size: int = 16,
) -> CPPOConfig:
    """The demo's options. Every prune rate sees the same number of questions in a step."""
    return CPPOConfig(
        output_dir=output_dir,
        seed=seed,
        max_steps=steps,
        batch_size=questions * kept_per_unit(group_size, prune_rate),
        group_size=group_size,
        prune_rate=prune_rate,
        max_completion_tokens=TASKS[task].max_completion_tokens,
        learning_rate=1e-4,
        betas=(0.9, 0.95),
        warmup_steps=min(5, steps - 1),  # the first step of a warm-up has a rate of 0
        eval_every=eval_every,
        log_every=5,
        # The papers' color jitter and rotation make 24-pixel digits hard to read: milder ones.
        positive_views=(
            {"color_jitter": {"brightness": [0.6, 1.3], "contrast": [0.6, 1.4]}},
            {"perspective": {"distortion_scale": 0.08}},
            {"rotation": {"degrees": 5}},
        ),
        loss=LossConfig(cpl_coef=cpl_coef, divergence=divergence),
    )


def build_trainer(
    task: str,
    config: CPPOConfig,
    *,
    start: Path | None = None,
    from_scratch: bool = False,
    held_out: int = 300,
) -> CPPOTrainer:
    """The demo's trainer.

    Args:
        start: checkpoint folder of the model to start from. None: the shipped one; where none is
            shipped, the task's warm-up makes it.
        from_scratch: make the warm-up anew all the same.
        held_out: questions of an evaluation.
    """
    if TASKS[task].has_images:
        handwriting("train")  # says at once if scikit-learn is missing
    if from_scratch or (start is None and task not in SHIPPED):
        print("warming up: supervised steps to a model that RL can start from", flush=True)
        model, processor = TASKS[task].warm_up(config.seed, report=print)
    else:
        folder = start or CHECKPOINTS / task
        model, processor = load_model(folder), load_processor(folder)
    rows = TASKS[task].rows
    return CPPOTrainer(
        model,
        TASKS[task].reward,
        rows("train", 100_000, seed=config.seed),
        config=config,
        processor=processor,
        eval_dataset=rows("heldout", held_out),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and writes its report; returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    resume = "auto" if arguments.resume else None
    try:
        claim_output_dir(
            arguments.output,
            resume,
            overwrite=arguments.overwrite,
            needed=[arguments.start] if arguments.start else [],
            writes_config=True,
            ways="go on with --resume and the same options, start anew with --overwrite, or choose "
            "another --output",
        )
        trainer = _trainer_of(arguments)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    config, task = trainer.config, TASKS[arguments.task]
    if arguments.task in SHIPPED:
        trainer.files["config.yaml"] = dump(_run_config(arguments, config))
    if trainer.processes.is_main:
        _introduce(trainer, task)
        print(ops_line(trainer.accelerator.device))
    started = time.perf_counter()
    try:
        trainer.train(resume_from=resume, overwrite=arguments.overwrite)
    except KeyboardInterrupt as stopped:
        words = f"{stopped}; go on with --resume".removeprefix("; ")
        raise KeyboardInterrupt(words) from None
    except ValueError as error:
        if not str(error).startswith("cppo"):
            raise  # not one of our checks: a defect, whose traceback is wanted
        raise ConfigError(str(error)) from error
    seconds = time.perf_counter() - started
    summary = summarize(trainer, seconds)
    output = Path(config.output_dir)
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    report = write_report(
        output / "report.html",
        title=task.title,
        history=trainer.history,
        summary=summary,
        views=example_views(trainer) if task.has_images else [],
        completions=example_completions(trainer) if task.has_images else [],
        config=dataclasses.asdict(config),
    )
    for name, value in summary.items():
        if isinstance(value, dict):
            gain = 100 * (value["after"] - value["before"])
            print(f"{name:<28}{value['before']:.3f} -> {value['after']:.3f}  ({gain:+.1f} points)")
    print(f"report: {report}")
    return 0


def _trainer_of(arguments: argparse.Namespace) -> CPPOTrainer:
    config = demo_config(
        arguments.task,
        prune_rate=arguments.prune_rate,
        cpl_coef=0.0 if arguments.no_cpl else arguments.cpl_coef,
        divergence=arguments.divergence,
        steps=arguments.steps,
        eval_every=arguments.eval_every,
        seed=arguments.seed,
        output_dir=arguments.output,
    )
    return build_trainer(
        arguments.task,
        config,
        start=arguments.start,
        from_scratch=arguments.from_scratch,
        held_out=arguments.held_out,
    )


def _run_config(arguments: argparse.Namespace, config: CPPOConfig) -> RunConfig:
    """What `cppo eval` and `cppo train --resume` need to know of the run."""
    loader = {"loader": arguments.task}
    reward: Any = TASKS[arguments.task].reward
    return RunConfig(
        model=ModelConfig(builder=f"tiny_{arguments.task}"),
        data=DataConfig(
            train=DatasetConfig(**loader, split="train"),
            eval=DatasetConfig(**loader, split="heldout", limit=arguments.held_out),
        ),
        rewards=(f"{reward.__module__}:{reward.__name__}",),
        trainer=config,
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cppo demo", description=main.__doc__)
    parser.add_argument("--task", choices=sorted(TASKS), default="digits")
    parser.add_argument("--prune-rate", type=float, default=0.75, help="0 keeps all (plain GRPO)")
    parser.add_argument("--no-cpl", action="store_true", help="no contrastive perception")
    parser.add_argument("--cpl-coef", type=float, default=0.01, help="its weight in the loss")
    parser.add_argument("--divergence", choices=DIVERGENCES, default="k3")
    parser.add_argument("--steps", type=_count, default=60)
    parser.add_argument("--held-out", type=_count, default=300, help="questions of an evaluation")
    parser.add_argument("--eval-every", type=_count, default=20, help="steps between evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--from-scratch", action="store_true", help="make the warm-up checkpoint anew (minutes)"
    )
    parser.add_argument("--start", type=Path, help="checkpoint folder to start from")
    parser.add_argument("--output", default="runs/demo", help="folder of the run and its report")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint that it holds"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="remove the run that the folder holds"
    )
    return parser


def _introduce(trainer: CPPOTrainer, task: Task) -> None:
    config = trainer.config
    size = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    per_question = kept_per_unit(config.group_size, config.prune_rate)
    print(
        f"{task.title}: a model of {size:.2f} M parameters, {config.max_steps} steps, "
        f"{config.batch_size // per_question} questions x {config.group_size} completions a step, "
        f"{per_question} kept per question, contrastive perception "
        f"{'on' if config.loss.cpl_coef and task.has_images else 'off'}"
    )


def summarize(trainer: CPPOTrainer, seconds: float) -> dict[str, Any]:
    """Held-out accuracy before and after, and where the time went."""
    first, last = trainer.history[0], trainer.history[-1]
    name = metric_name(trainer.reward_functions[0])
    steps = [row for row in trainer.history if "time/step" in row]
    return {
        "sampled accuracy": {
            "before": first[f"eval/sampled/{name}"],
            "after": last[f"eval/sampled/{name}"],
        },
        "greedy accuracy": {
            "before": first[f"eval/greedy/{name}"],
            "after": last[f"eval/greedy/{name}"],
        },
        "held-out questions": len(trainer.eval_questions),
        "training seconds": sum(row["time/step"] for row in steps),
        "seconds with evaluations": seconds,
        "completions kept": steps[-1]["kept_share"] if steps else None,
    }


def example_views(trainer: CPPOTrainer, count: int = 4) -> list[dict[str, Any]]:
    """Held-out images in their three views."""
    config = trainer.config
    examples = []
    for number, question in enumerate(trainer.eval_questions[:count]):
        image = question.images[0]
        seed = seed_from(config.seed, "examples", number)
        examples.append(
            {
                "anchor": image,
                "positive": perturb(image, views_from_names(config.positive_views), seed=seed),
                "negative": perturb(image, views_from_names(config.negative_views), seed=seed),
                "question": _question_text(question),
                "answer": question.columns["answer"],
            }
        )
    return examples


@torch.no_grad()
def example_completions(trainer: CPPOTrainer, count: int = 6) -> list[dict[str, Any]]:
    """Completions of held-out questions with the entropy shift of every token."""
    config = dataclasses.replace(
        trainer.config,
        # The coefficient only has to be positive for the views to be run.
        loss=dataclasses.replace(trainer.config.loss, gating=False, cpl_coef=1.0),
    )
    torch.manual_seed(seed_from(config.seed, "examples") % 2**32)
    asked = trainer.eval_questions[: 4 * count]
    rollouts = trainer.sample([trainer.questions.encode(question) for question in asked])
    rewards = torch.tensor(
        trainer.reward_functions[0](
            rollouts.texts,
            answer=[
                rollouts.question_of(row).columns["answer"] for row in range(len(rollouts.texts))
            ],
        )
    )
    batch = trainer.make_batch(rollouts, rewards)
    # The best completion of the questions in which it stands out most.
    best, place = batch.advantages.view(-1, config.group_size).max(1)
    questions = best.topk(min(count, len(best))).indices.sort().values
    chosen = questions * config.group_size + place[questions]
    entropy = {
        name: values for name, values in _entropies(trainer.model, batch, chosen, config, trainer)
    }
    packed = batch.pack(chosen)
    shift = entropy["negative"] - entropy["anchor"]
    selected = perception_mask(
        entropy["anchor"],
        entropy["negative"],
        fraction=config.loss.fraction,
        cu_seqlens=packed.row_cu_seqlens,
    )
    bounds = packed.row_cu_seqlens.tolist()
    tokenizer = tokenizer_of(trainer.processor)
    return [
        {
            "question": _question_text(rollouts.question_of(row)),
            "answer": rollouts.question_of(row).columns["answer"],
            "image": rollouts.question_of(row).images[0],
            "tokens": [tokenizer.decode([token]) for token in packed.targets[start:stop].tolist()],
            "entropy_shift": shift[start:stop].tolist(),
            "selected": selected[start:stop].tolist(),
            "reward": rewards[row].item(),
            "advantage": batch.advantages[row].item(),
        }
        for row, start, stop in zip(chosen.tolist(), bounds[:-1], bounds[1:], strict=True)
    ]


def _entropies(
    model: nn.Module, batch: Any, rows: torch.Tensor, config: CPPOConfig, trainer: CPPOTrainer
) -> list[tuple[str, torch.Tensor]]:
    from cppo.model.forward import lm_head

    views, packed = forward_views(model, batch, rows, config, trainer.processor)
    head = lm_head(model, batch.suppressed)._asdict()
    return [
        (name, linear_token_stats(hidden, targets=packed.targets, **head).entropy)
        for name, hidden in zip(views._fields, views, strict=True)
        if hidden is not None
    ]


def _question_text(question: Any) -> str:
    content = question.messages[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")
