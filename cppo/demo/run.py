"""The demo's run: its options, its trainer, and the numbers of its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cppo.demo.digits import NUM_QUESTIONS, handwriting
from cppo.demo.examples import example_completions, example_views
from cppo.demo.tasks import CHECKPOINTS, TASKS, Task
from cppo.demo.warmup import warm_up
from cppo.model.load import load_model, load_processor
from cppo.options.trainer import MODES, CPPOConfig, LossConfig, kept_per_unit
from cppo.report import write_report
from cppo.train.scoring import metric_name
from cppo.train.trainer import CPPOTrainer

_QUESTIONS, _GROUP_SIZE = 16, 16  # of a step, whatever is pruned


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
) -> CPPOConfig:
    """Return the demo's options; every prune rate sees the same number of questions in a step."""
    return CPPOConfig(
        output_dir=output_dir,
        seed=seed,
        max_steps=steps,
        batch_size=_QUESTIONS * kept_per_unit(_GROUP_SIZE, prune_rate),
        group_size=_GROUP_SIZE,
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
    """Return the demo's trainer.

    Args:
        start: checkpoint folder of the model to start from. None: the shipped one; where none is
            shipped, the task's warm-up makes it.
        from_scratch: make the warm-up anew all the same.
        held_out: questions of an evaluation.
    """
    if TASKS[task].has_images:
        handwriting("train")  # says at once if scikit-learn is missing
    if from_scratch or (start is None and not TASKS[task].is_shipped):
        print("warming up: supervised steps to a model that RL can start from", flush=True)
        model, processor = warm_up(task, config.seed, report=print)
    else:
        folder = start or CHECKPOINTS / task
        model, processor = load_model(folder), load_processor(folder)
    rows = TASKS[task].rows
    return CPPOTrainer(
        model,
        TASKS[task].reward,
        rows("train", NUM_QUESTIONS, seed=config.seed),
        config=config,
        processor=processor,
        eval_dataset=rows("heldout", held_out),
    )


def write_results(trainer: CPPOTrainer, task: Task, seconds: float) -> dict[str, Any]:
    """Write summary.json and report.html into the run's folder and return the summary."""
    summary, output = summarize(trainer, seconds), Path(trainer.config.output_dir)
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    write_report(
        output,
        title=task.title,
        is_running=False,
        views=example_views(trainer) if task.has_images else [],
        completions=example_completions(trainer) if task.has_images else [],
    )
    return summary


def summarize(trainer: CPPOTrainer, seconds: float) -> dict[str, Any]:
    """Return held-out accuracy before and after, and where the time went."""
    first, last = trainer.history[0], trainer.history[-1]
    name = metric_name(trainer.reward_functions[0])
    steps = [row for row in trainer.history if "time/step" in row]
    return {
        **{
            f"{mode} accuracy": {"before": first[key], "after": last[key]}
            for mode in MODES
            for key in [f"eval/{mode}/{name}"]
        },
        "held-out questions": len(trainer.eval_questions),
        "training seconds": sum(row["time/step"] for row in steps),
        "seconds with evaluations": seconds,
        "completions kept": steps[-1]["kept_share"] if steps else None,
    }
