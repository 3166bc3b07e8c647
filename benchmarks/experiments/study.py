"""The paired study: every method on the same starts, questions and held-out set, seed by seed.

    python benchmarks/experiments/study.py --tune      # CPL's coefficient, on seeds of its own
    python benchmarks/experiments/study.py --jobs 2    # every method of every task
    python benchmarks/experiments/study.py --report    # the table of what has run; --plot FILE

Of a task and a seed, all methods have the same warm-up, order of questions, sampling seeds and
held-out questions; they run one after the other in one process with one thread. A row is appended
after each run, and a run that has a row is not repeated: the study may be stopped at any moment,
and goes on where it was. On another kind of processor a warm-up ends in other weights, so there a
task and seed that were begun elsewhere are run as a whole. Seconds are the CPU time of the process
in training steps, so that other work on the machine hardly counts. `study_report.py` has the
statistics.
"""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed

from cppo.benchmarks import report
from cppo.benchmarks.environment import device_name, environment, experiment_parser, results_folder
from cppo.benchmarks.experiments.study_report import GRPO, best_coefficient, plot, summary
from cppo.demo.run import demo_config
from cppo.demo.tasks import TASKS
from cppo.demo.warmup import save_checkpoint, warm_up
from cppo.model.load import load_model, load_processor
from cppo.model.prompts import Prompts, encode_questions
from cppo.options.trainer import CPPOConfig
from cppo.questions import as_question
from cppo.rollouts.rollout import sample_completions
from cppo.seeds import seed_from
from cppo.train.trainer import CPPOTrainer

SEEDS = range(16)
TUNING_SEEDS = range(100, 104)

# What each method changes of GRPO: options of `demo_config`, of CPPOConfig and of its loss.
_REMOVED = {"negative_views": ("masked_patches",)}
METHODS: dict[str, dict[str, Any]] = {
    GRPO: {},
    "pruning": {"prune_rate": 0.75},
    "CPL 0.01": {"cpl_coef": 0.01},
    "CPL 0.05": {"cpl_coef": 0.05},
    "CPL 0.2": {"cpl_coef": 0.2},
    "VPPO": {"loss": {"perception": "vppo"}, **_REMOVED},
    "PAPO": {"loss": {"perception": "papo"}, **_REMOVED},
    "PODS": {"prune_rate": 0.75, "prune": "variance", "advantages_of": "kept"},
    "unbiased pruning": {"prune_rate": 0.75, "prune": "unbiased"},
}
CPL = tuple(name for name in METHODS if name.startswith("CPL"))
_PERCEPTION = (GRPO, "pruning", "CPL 0.01", "VPPO", "PAPO")
PLAN = {"digits": (*_PERCEPTION, "PODS", "unbiased pruning")} | dict.fromkeys(
    ("shortcut", "print"), _PERCEPTION
)


def config_of(task: str, method: str, seed: int, steps: int, folder: str = "study") -> CPPOConfig:
    """The demo's options, changed as the method says."""
    changes = dict(METHODS[method])
    loss = changes.pop("loss", {})
    of_demo = {name: changes.pop(name, 0.0) for name in ("prune_rate", "cpl_coef")}
    config = demo_config(task, **of_demo, steps=steps, seed=seed, output_dir=folder)
    return replace(config, loss=replace(config.loss, **loss), **changes, save_minutes=0)


class Cell(NamedTuple):
    """The runs of a task and a seed, which share everything but the method."""

    task: str
    seed: int
    methods: tuple[str, ...]


def plan(
    tasks: Sequence[str], seeds: Sequence[int], methods: Sequence[str], rows: Sequence[report.Row]
) -> list[Cell]:
    """What is left to run, seed by seed, so that an unfinished study is paired.

    Args:
        methods: those to run of every task. None given: those of PLAN, with the coefficient of CPL
            that was best on the task's tuning seeds.
        rows: the runs that are done.
    """
    cells = []
    for seed in seeds:
        for task in tasks:
            wanted = methods or dict.fromkeys((*PLAN[task], *best_coefficient(rows, task, CPL)))
            own = [row for row in rows if (row["task"], row["seed"]) == (task, str(seed))]
            done = {row["method"] for row in own}
            left = tuple(name for name in wanted if name not in done)
            if any(_processor(row["device"]) != _processor(device_name()) for row in own) and left:
                left = tuple(wanted)
            cells += [Cell(task, seed, left)] if left else []
    return cells


def _processor(device: str) -> str:
    """The name of a device without its threads."""
    return device.partition(",")[0]


# Runs


class Options(NamedTuple):
    """What the runs of a study have in common.

    rows: the file that they are appended to; starts: the folder of the warm-ups.
    """

    rows: Path
    starts: Path
    steps: int = 20
    eval_every: int = 10
    held_out: int = 4000


class Common(NamedTuple):
    """What the runs of a cell share.

    start: the folder of the warm-up; before: what an evaluation of it has given, empty until then.
    """

    start: Path
    held_out: Prompts
    before: dict[str, float]


class StudyTrainer(CPPOTrainer):
    """Counts the CPU seconds of its steps, and evaluates on questions that are encoded already."""

    cpu_seconds = 0.0
    common: Common

    def train_step(self) -> dict[str, float]:
        started = time.process_time()
        metrics = super().train_step()
        self.cpu_seconds += time.process_time() - started
        return metrics

    def evaluate(self) -> dict[str, float]:
        if self.step == 0 and self.common.before:
            return self.common.before
        # The same draws at every step and for every method: differences have less noise.
        set_seed(seed_from(self.config.seed, "study") % 2**32)
        rollouts = sample_completions(
            self.model,
            self.processor,
            self.common.held_out,
            group_size=1,
            max_new_tokens=self.config.max_completion_tokens,
            temperature=1.0,
            suppressed=self.suppressed,
        )
        asked = [question.columns for question in self.common.held_out.questions]
        right = self.reward_functions[0](rollouts.texts, answer=[own["answer"] for own in asked])
        # A completion that shows its work begins with what it sees: "I see 3, 5. 3+5=8. ..."
        seen = [text.partition(".")[0] for text in rollouts.texts]
        misread = [
            see.startswith("I see ") and see != own["worked"].partition(".")[0]
            for see, own, reward in zip(seen, asked, right, strict=True)
            if not reward
        ]
        found = {
            "accuracy": fmean(right),
            "misread": sum(misread) / max(1, len(misread)),
            "cpu_seconds": self.cpu_seconds,
        }
        if self.step == 0:
            self.common.before.update(found)
        return found


def start_of(task: str, seed: int, folder: Path) -> Path:
    """The folder of a seed's warm-up, which is made where there is none of these settings."""
    settings = TASKS[task].rows, TASKS[task].phases, TASKS[task].peak_lr
    path = folder / f"{task}-{seed}-{sha256(repr(settings).encode()).hexdigest()[:8]}"
    if not path.exists():
        model, processor = warm_up(task, seed)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            save_checkpoint(model, processor, Path(made) / "start")
            os.replace(Path(made) / "start", path)
    return path


def run_all(cells: Sequence[Cell], options: Options, jobs: int) -> None:
    """Runs cells in their order, `jobs` of them side by side."""
    if jobs == 1:
        for cell in cells:
            run_cell(cell, options)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(run_cell, options=options), cells))


def run_cell(cell: Cell, options: Options) -> None:
    """Runs the methods of a cell, and appends a row after each."""
    torch.set_num_threads(1)
    start = start_of(cell.task, cell.seed, options.starts)
    questions = [as_question(row) for row in TASKS[cell.task].rows("heldout", options.held_out)]
    held_out = encode_questions(load_model(start), load_processor(start), questions)
    common = Common(start, held_out, {})
    for method in cell.methods:
        started = time.process_time()
        row = run(cell, method, common, options)
        append(options.rows, row)
        print(
            f"{cell.task}, seed {cell.seed}, {method}: {row['accuracy_0']:.3f} -> "
            f"{row[f'accuracy_{options.steps}']:.3f}, "
            f"{time.process_time() - started:.0f} s, {row['seconds']} of them training",
            flush=True,
        )


def run(cell: Cell, method: str, common: Common, options: Options) -> dict[str, Any]:
    """One run: a row.

    accuracy_N, seconds_N: of the held-out questions, and CPU seconds of training, after N steps;
    misread: share of the wrong answers at the end that list other digits than those in the image.
    """
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        config = config_of(cell.task, method, cell.seed, options.steps, f"{folder}/run")
        trainer = StudyTrainer(
            load_model(common.start),
            TASKS[cell.task].reward,
            TASKS[cell.task].rows("train", 100_000, seed=cell.seed),
            config=replace(config, eval_every=options.eval_every),
            processor=load_processor(common.start),
            eval_dataset=[TASKS[cell.task].rows("heldout", 1)[0]],  # `evaluate` has them all
        )
        trainer.common = common
        trainer.train()
    evaluated = [row for row in trainer.history if "accuracy" in row]
    return {
        "task": cell.task,
        "method": method,
        "seed": cell.seed,
        "steps": options.steps,
        "held_out": len(common.held_out.questions),
        **{f"accuracy_{row['step']}": round(row["accuracy"], 5) for row in evaluated},
        **{f"seconds_{row['step']}": round(row["cpu_seconds"], 2) for row in evaluated},
        "seconds": round(trainer.cpu_seconds, 1),
        "misread": round(evaluated[-1]["misread"], 4),
        **environment(),
    }


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row, with the header before the first: in one write, as another process may add too.

    Raises: ValueError if the file has rows of other steps or another number of questions.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row), lineterminator="\n")
    rows = report.read(path)
    if not rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.writeheader()
    elif list(rows[0]) != list(row) or rows[0]["held_out"] != str(row["held_out"]):
        raise ValueError(
            f"{path} has runs of {rows[0]['steps']} steps and {rows[0]['held_out']} questions; "
            f"this one has {row['steps']} and {row['held_out']}: one file cannot have both"
        )
    writer.writerow(row)
    with path.open("a") as file:
        file.write(text.getvalue())


def main() -> None:
    parser = experiment_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(PLAN), default=list(PLAN))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--tune", action="store_true", help="CPL's coefficients on other seeds")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument("--held-out", type=int, default=4000)
    parser.add_argument("--starts", type=Path, default=Path("cppo-bench/study_starts"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only print the table of the rows")
    parser.add_argument("--plot", type=Path, help="draw the differences into this file")
    options = parser.parse_args()
    path = results_folder(options.record) / "study.csv"
    if not options.report:
        seeds, methods = options.seeds, options.methods
        if options.tune:
            seeds, methods = list(TUNING_SEEDS), list(CPL)
        cells = plan(options.tasks, seeds, methods, report.read(path))
        sizes = options.steps, options.eval_every, options.held_out
        run_all(cells, Options(path, options.starts, *sizes), options.jobs)
    print(summary(report.read(path)))
    if options.plot:
        plot(report.read(path), options.plot)


if __name__ == "__main__":
    main()
