"""The thin trainer: CPPO as a plain loop that reads top to bottom.

One step: draw questions (dynamic allocation) -> sample G completions of each -> rewards -> the
update, which is `cppo.train.algorithm.cppo_update`.

It is limited on purpose: it is data-parallel only (every process holds the whole model; for larger
models, use the fused ops inside verl or TRL), and synchronous except for the one step that
`CPPOConfig.ahead` allows. An engine samples (`cppo.train.engine`).
Gradients are summed over the processes once per optimizer step, after the last micro-batch, so
processes may have different numbers of micro-batches, or none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import Tensor
from transformers import TrainerState

from cppo.model.load import special_token_ids_to_suppress
from cppo.model.prompts import EncodedQuestion
from cppo.options.trainer import CPPOConfig
from cppo.questions.rows import Dataset
from cppo.questions.stream import all_questions
from cppo.rollouts.rollout import Rollouts
from cppo.seeds import seed_from
from cppo.train.algorithm import cppo_update, select
from cppo.train.arguments import (
    check_evaluation,
    check_images,
    check_model_and_processor,
    check_optimizer_steps,
    check_signatures,
    check_trackers,
    first_question,
    planned_steps,
    reward_list,
    reward_weights,
    warnings,
)
from cppo.train.batch import Batch
from cppo.train.collect import Collector
from cppo.train.draws import QuestionDraws, longest_sequence
from cppo.train.engine import PolicyEngine, new_engine
from cppo.train.evaluate import Share, evaluate
from cppo.train.metrics import (
    Total,
    completion_rows,
    held_out_rows,
    over_processes,
    rollout_metrics,
)
from cppo.train.policy import Policy
from cppo.train.processes import Processes, accelerator_for
from cppo.train.progress import PhaseTimer, RunLog
from cppo.train.run import Run
from cppo.train.run_options import trained_on
from cppo.train.scoring import RewardFunction, metric_name
from cppo.train.stopping import Stopped
from cppo.train.update import Update
from cppo.views import views_from_names


class CPPOTrainer:
    """Finetunes a (vision-)language model with completion pruning and contrastive perception.

    Papers: arXiv 2503.22342 (pruning), arXiv 2601.00501 (perception). A text model has no views and
    trains by pruned GRPO.

    Args:
        model: a transformers causal model, or a vision-language one (AutoModelForImageTextToText),
            of any family that passes the comparison of `cppo.model.check` (docs/models.md).
        reward_functions: one or more callables `f(completions, *, prompts, **columns)` that return
            one number per completion (TRL's call shape); `columns` are the dataset's other columns.
        train_dataset: rows in TRL's or verl's format, see `cppo.questions.as_question`.
        config: every option, see `CPPOConfig`.
        processor: the processor of a vision-language model, the tokenizer of a text model.
        eval_dataset: held-out rows, evaluated before, after and every `config.eval_every` steps.

    Raises: ValueError or TypeError naming the argument, before anything is trained.

    Example:
        trainer = CPPOTrainer(model, accuracy, rows, config=CPPOConfig(), processor=processor)
        trainer.train()
    """

    def __init__(
        self,
        model: Any,
        reward_functions: RewardFunction | Sequence[RewardFunction],
        train_dataset: Dataset,
        *,
        config: CPPOConfig,
        processor: Any,
        eval_dataset: Dataset | None = None,
    ) -> None:
        if not isinstance(config, CPPOConfig):
            raise TypeError(f"cppo.CPPOTrainer: config must be a CPPOConfig, got {config!r}")
        self.processor = processor
        self.reward_functions = reward_list(reward_functions)
        weights = reward_weights(self.reward_functions, config)
        check_trackers(config.trackers)
        self.accelerator = accelerator_for(config)
        self.processes = Processes(self.accelerator, config.process_timeout)
        check_optimizer_steps(config, self.processes.size)
        steps = planned_steps(config, train_dataset, self.processes.size)
        self.log = RunLog(config.output_dir, steps, is_main=self.processes.is_main)
        if config.num_epochs is not None:
            each = config.questions_per_step(self.processes.size)
            self.log.say(f"num_epochs = {config.num_epochs:g}: {steps} steps of {each} questions")
        # From here on the length of the run is a number of steps, whichever option said it.
        self.config = config = dataclasses.replace(
            config, reward_weights=weights, max_steps=steps, num_epochs=None
        )
        check_model_and_processor(model, processor)
        self.questions = QuestionDraws(
            train_dataset,
            processor,
            config,
            self.processes,
            self.log.say,
            longest_sequence(model, config),
        )
        check_evaluation(config, eval_dataset, self.reward_functions)
        self.eval_questions = all_questions(eval_dataset)
        questions = [*first_question(train_dataset, config), *self.eval_questions]
        check_images(model, questions)
        self.questions.check_held_out(self.eval_questions)
        check_signatures(self.reward_functions, questions)
        for view in config.loss.perturbed_views:
            views_from_names(getattr(config, f"{view}_views"))
        self.suppressed = tuple(special_token_ids_to_suppress(model, processor))
        device = self.accelerator.device
        self.policy = Policy(model, processor, config, device, self.suppressed)
        self._run = Run(
            self.policy,
            self.questions,
            self.processes,
            self.log,
            trained_on=lambda: trained_on(
                train_dataset, eval_dataset, self.reward_functions, processor
            ),
            metric=self._metric,
        )
        engine = new_engine(self.policy.model, processor, config, self.log.say)
        self.engine = PolicyEngine(engine, self.policy, self.processes, self.log.say)
        self._collector = Collector(
            self.policy,
            self.engine,
            self.questions,
            self.reward_functions,
            self.processes,
            self.log.say,
        )
        for warning in [*warnings(model, processor, config), *self.policy.warnings()]:
            self.log.say(warning)
        # What a caller may want to look at or to change.
        self.model, self.reference = self.policy.model, self.policy.reference
        self.optimizer, self.scheduler = self.policy.optimizer, self.policy.scheduler
        self.parameters = self.policy.parameters
        self.files = self._run.files

    @property
    def step(self) -> int:
        """Steps that are finished."""
        return self._run.step

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of metrics so far."""
        return self._run.history

    # The loop

    def train(
        self, resume_from: str | Path | None = None, *, overwrite: bool = False
    ) -> dict[str, Any]:
        """Runs to `config.max_steps`; returns the last row of metrics.

        Args:
            resume_from: a checkpoint folder, or "auto" for the newest one in `config.output_dir`
                (a fresh start if there is none). The run goes on bit for bit as if it had not been
                interrupted: on a CPU; on a GPU with deterministic algorithms (docs/reliability.md);
                with vLLM but for its own rounding (docs/rollouts.md).
            overwrite: whether an earlier run in `config.output_dir` may be removed; of one that is
                resumed, the checkpoints later than `resume_from`.
        Raises: ValueError if the folder holds another run; RewardError for a reward function that
            fails.
        """
        run = self._run
        try:
            run.start(resume_from, overwrite)
            if self.config.trackers:
                self.accelerator.init_trackers("cppo", config=run.options())
            with self.log.running(), run.stopping.listening():
                while self.step < self.config.steps():
                    try:
                        with self.processes.stoppable(run.stopping):
                            if self.step == 0 and not self.history:
                                self._record(self._evaluation())
                            metrics = self._evaluated_step()
                    except Stopped:
                        run.end_early()
                    self._record(metrics)
                    run.finish_step(metrics, is_last=self.step == self.config.steps())
        finally:
            # Not end_training: it takes the processes' group away, and with it evaluate().
            for tracker in self.accelerator.trackers:
                tracker.finish()
            run.end()
        return self.history[-1] if self.history else {}

    def _evaluated_step(self) -> dict[str, Any]:
        metrics: dict[str, Any] = self.train_step()
        self._run.step += 1
        if self.step == self.config.steps() or _is_due(self.step, self.config.eval_every):
            metrics |= self._evaluation()
        return metrics

    def train_step(self) -> dict[str, float]:
        """One rollout and the update on it; returns its metrics, summed over the processes."""
        journal = self._run.begin_step()
        # Every random number of a step follows from (seed, step, process): nothing to checkpoint.
        set_seed(seed_from(self.config.seed, self.step, self.processes.rank) % 2**32)
        timer = PhaseTimer(journal.seconds, self.accelerator.device)
        try:
            skipped = self.questions.skipped
            rollouts, scores = self._collector.collect(self.step, journal, timer)
            metrics: dict[str, Any] = {}

            def report(batch: Batch) -> None:
                metrics.update(rollout_metrics(batch, scores))
                if self.config.skip_bad_questions:
                    metrics["questions/skipped"] = Total(self.questions.skipped - skipped)
                if _is_due(self.step + 1, self.config.log_every):
                    count = self.config.log_completions
                    self.log.completions(completion_rows(batch, scores, self.step + 1, count))

            update = self.new_update(timer, report)
            cppo_update(update, rollouts, scores.total)
            metrics = over_processes(metrics, self.processes)
            return metrics | update.metrics() | timer.metrics()
        finally:
            journal.seconds = timer.so_far

    # The pieces of a step

    def draw_questions(self, count: int | None = None) -> list[EncodedQuestion]:
        """This process's questions of the next step; a group never straddles processes."""
        return self._collector.draw(count)

    def sample(self, questions: Sequence[EncodedQuestion]) -> Rollouts:
        """`group_size` completions of each question, of the current policy. Collective."""
        self.engine.prepare()
        return self._collector.sample(questions)

    def make_batch(self, rollouts: Rollouts, rewards: Tensor) -> Batch:
        """Advantages and pruning: what of the rollouts an update would run on. Collective.

        Args:
            rewards: (B,) of this process's completions, NaN where there is none.
        """
        return select(self.policy, rollouts, rewards, self.step, self.processes)

    def new_update(self, timer: PhaseTimer, report: Callable[[Batch], None]) -> Update:
        """What surrounds the next `cppo_update`; `report` is called with the batch it selects."""
        run = self._run
        surroundings = self.policy, self.step, self.processes, run.journal, timer
        return Update(*surroundings, report=report, say=self.log.say)

    # Evaluation and records

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics of the current policy, {"eval/sampled/<reward>": mean, ...}.

        Within a run some of the completions go to held_out.jsonl. Collective.
        """
        self.engine.wait()
        with self._run.stopping.pausing():
            self.engine.prepare()
        with self.policy.autocast():
            result = evaluate(
                self.model,
                self.processor,
                self.reward_functions,
                self.eval_questions,
                config=self.config,
                suppressed=self.suppressed,
                share=Share(self.processes.rank, self.processes.size, self._run.gather_whole),
                state=TrainerState(global_step=self.step, max_steps=self.config.steps()),
                engine=self.engine,
            )
        with self._run.stopping.pausing():
            self.engine.sleep()
            if self._run.is_running:
                count = self.config.log_completions
                rows = held_out_rows(result.completions, self.eval_questions, self.step, count)
                self.log.held_out(rows)
        return {f"eval/{name}": value for name, value in result.metrics.items()}

    def _evaluation(self) -> dict[str, float]:
        if not self.eval_questions:
            return {}
        with self._run.stopping.breaking():
            return self.evaluate()

    def _record(self, metrics: dict[str, Any]) -> None:
        if not metrics:
            return
        row = {"step": self.step, **metrics}
        is_due = _is_due(self.step, self.config.log_every) or "loss" not in row
        show = is_due or any(name.startswith("eval/") for name in row)
        self._run.record(row, show=show)
        if self.config.trackers and show:
            self.accelerator.log(metrics, step=self.step)

    def _metric(self, metrics: dict[str, Any]) -> float | None:
        """The evaluation metric that "best" means, if this row has it."""
        first = f"sampled/{metric_name(self.reward_functions[0])}"
        return metrics.get(f"eval/{self.config.best_metric or first}")

    def save_checkpoint(self) -> Path | None:
        """Writes everything that resuming needs, atomically; returns the folder. Collective.

        Raises: CheckpointError, on every process, if it could not be written.
        """
        return self._run.save()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
