"""`cppo demo`: a tiny model, a real task, accuracy before and after, and a report to look at."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from cppo.cli.config_file import ConfigError
from cppo.cli.info import ops_line
from cppo.cli.run_config import CONFIG_NAME, DataConfig, DatasetConfig, ModelConfig, RunConfig, dump
from cppo.cli.train import claim_folder, run_trainer
from cppo.demo.run import build_trainer, demo_config, write_results
from cppo.demo.tasks import TASKS, Task
from cppo.options.loss import DIVERGENCES
from cppo.options.trainer import CPPOConfig, kept_per_unit
from cppo.train.trainer import CPPOTrainer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and write its report; return the exit status."""
    arguments = _parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    resume, task = "auto" if arguments.resume else None, TASKS[arguments.task]
    claim_folder(
        arguments.output,
        resume,
        overwrite=arguments.overwrite,
        needed=arguments.start,
        ways="go on with --resume and the same options, start anew with --overwrite, or choose "
        "another --output",
    )
    try:
        trainer = _trainer_of(arguments)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    if task.is_shipped:
        trainer.files[CONFIG_NAME] = dump(_run_config(arguments, trainer.config))
    if trainer.processes.is_main:
        _introduce(trainer, task)
        print(ops_line(trainer.accelerator.device))
    started = time.perf_counter()
    run_trainer(trainer, resume, overwrite=arguments.overwrite)
    summary = write_results(trainer, task, time.perf_counter() - started)
    for name, value in summary.items():
        if isinstance(value, dict):
            gain = 100 * (value["after"] - value["before"])
            print(f"{name:<28}{value['before']:.3f} -> {value['after']:.3f}  ({gain:+.1f} points)")
    print(f"report: {Path(trainer.config.output_dir) / 'report.html'}")
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
    reward: Any = TASKS[arguments.task].reward
    return RunConfig(
        model=ModelConfig(builder=f"tiny_{arguments.task}"),
        data=DataConfig(
            train=DatasetConfig(arguments.task, split="train"),
            eval=DatasetConfig(arguments.task, split="heldout", limit=arguments.held_out),
        ),
        rewards=(f"{reward.__module__}:{reward.__name__}",),
        trainer=config,
    )


def _introduce(trainer: CPPOTrainer, task: Task) -> None:
    config = trainer.config
    size = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    per_question = kept_per_unit(config.group_size, config.prune_rate)
    print(
        f"{task.title}: a model of {size:.2f} M parameters, {config.max_steps} steps, "
        f"{config.batch_size // per_question} questions x {config.group_size} completions a step, "
        f"{per_question} kept per question"
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cppo demo", description=main.__doc__)
    add = parser.add_argument
    add("--task", choices=sorted(TASKS), default="digits")
    add("--prune-rate", type=float, default=0.75, help="0 keeps all (plain GRPO)")
    add("--no-cpl", action="store_true", help="no contrastive perception")
    add("--cpl-coef", type=float, default=0.01, help="its weight in the loss")
    add("--divergence", choices=DIVERGENCES, default="k3")
    add("--steps", type=_count, default=60)
    add("--held-out", type=_count, default=300, help="questions of an evaluation")
    add("--eval-every", type=_count, default=20, help="steps between evaluations")
    add("--seed", type=int, default=0)
    add("--from-scratch", action="store_true", help="make the warm-up checkpoint anew (minutes)")
    add("--start", type=Path, help="checkpoint folder to start from")
    add("--output", default="runs/demo", help="folder of the run and its report")
    add("--resume", action="store_true", help="go on from the newest checkpoint that it holds")
    add("--overwrite", action="store_true", help="remove the run that the folder holds")
    return parser
