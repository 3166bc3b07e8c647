"""The thin trainer: CPPO as a plain loop that reads top to bottom.

One step: draw questions (dynamic allocation) -> sample G completions each -> rewards -> advantages
and pruning -> old and reference log-probabilities only where needed -> packed forward, the
perturbed views only where A > 0 -> loss -> optimizer.

What it leaves out on purpose: it is data-parallel only (every process holds the whole model; past
one machine, use the fused ops inside verl or TRL), synchronous, and decodes with a plain loop.
Gradients are summed over the processes once per optimizer step, after the last micro-batch, so
processes may have different numbers of micro-batches, or none.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import Tensor
from transformers import TrainerState

from cppo.config import CPPOConfig
from cppo.model import forward
from cppo.model.check import position_limit
from cppo.model.load import check_saveable, closing_token_ids, special_token_ids_to_suppress
from cppo.model.prompts import EncodedQuestion, collate
from cppo.ops.advantages import questions_needed
from cppo.questions.rows import Dataset
from cppo.questions.stream import all_questions
from cppo.records import NumItems
from cppo.rollouts.rollout import Rollouts, sample_completions
from cppo.seeds import seed_from
from cppo.train import fingerprint, policy
from cppo.train.arguments import (
    check_evaluation,
    check_images,
    check_optimizer_steps,
    check_processor,
    check_trackers,
    first_question,
    reward_list,
    reward_weights,
)
from cppo.train.checkpoint import (
    PARTIAL,
    CheckpointError,
    check_files,
    incomplete,
    last_checkpoint,
    read_state,
    read_tensors,
    write_checkpoint,
    write_tensors,
)
from cppo.train.draws import QuestionDraws
from cppo.train.evaluate import evaluate
from cppo.train.journal import Journal, Once, now
from cppo.train.metrics import Total, over_processes, rollout_metrics, update_metrics
from cppo.train.output_dir import Claim, claim_output_dir, has_lock, writing_to
from cppo.train.processes import Processes
from cppo.train.progress import PhaseTimer, RunLog
from cppo.train.regroup import balanced, merge, merge_scores
from cppo.train.run_options import check_options, run_options
from cppo.train.scoring import RewardFunction, Scores, check_signature, metric_name, score
from cppo.train.selection import cut_surplus, select_completions
from cppo.train.step import Batch, microbatch_loss, token_logps
from cppo.train.stopping import Stopped, Stopping
from cppo.views import views_from_names

_T = TypeVar("_T")


class CPPOTrainer:
    """Finetunes a (vision-)language model with completion pruning and contrastive perception.

    Papers: arXiv 2503.22342 (pruning), arXiv 2601.00501 (perception). A text model has no views and
    trains by pruned GRPO.

    Args:
        model: a transformers causal model, or one of the Qwen2-VL, Qwen2.5-VL, Qwen3-VL families.
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
        self.config = config = dataclasses.replace(config, reward_weights=weights)
        self.accelerator = Accelerator(
            # Left to itself, accelerate takes every process of a machine without a GPU for one.
            cpu=not torch.accelerator.is_available(),
            log_with=list(config.trackers) or None,
            project_dir=config.output_dir,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=config.process_timeout))
            ],
        )
        self.processes = Processes(self.accelerator, config.process_timeout)
        check_optimizer_steps(config, self.processes.size)
        self.log = RunLog(config.output_dir, config.max_steps, is_main=self.processes.is_main)
        forward.check_supported(model)
        check_processor(model, processor)
        check_saveable(model, processor)
        self.questions = QuestionDraws(
            train_dataset, processor, config, self.processes, self.log.say, position_limit(model)
        )
        check_evaluation(config, eval_dataset, self.reward_functions)
        self.eval_questions, self._eval_dataset = all_questions(eval_dataset), eval_dataset
        questions = [*first_question(train_dataset, config), *self.eval_questions]
        check_images(model, questions)
        self.questions.check_held_out(self.eval_questions)
        for question, function in itertools.product(questions[:1], self.reward_functions):
            check_signature(function, question)
        if config.loss.cpl_coef > 0:
            views_from_names(config.positive_views), views_from_names(config.negative_views)
        self.suppressed = tuple(special_token_ids_to_suppress(model, processor))
        self.reference = (
            policy.frozen_copy(model, config, self.accelerator.device)
            if (config.loss.kl_coef > 0 and config.lora is None)
            else None
        )
        self.model: Any = policy.prepare(model, config, self.accelerator.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self.scheduler = policy.schedule(self.optimizer, config)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        if two_ends := closing_token_ids(model, processor)[1]:
            self.log.say(two_ends)
        if config.warmup_steps >= (steps := policy.optimizer_steps(config)):
            self.log.say(
                f"warmup_steps = {config.warmup_steps} is no less than the {steps} optimizer steps "
                "of the run: the learning rate does not reach its peak"
            )
        needed = questions_needed(config.batch_size, config.group_size, config.prune_rate)
        # What is drawn too much is cut off again: every process draws as many.
        self._num_questions = (
            math.ceil(needed / self.processes.size)
            if config.dynamic_allocation
            else self.processes.share("questions", config.batch_size // config.group_size)
        )
        self.files: dict[str, str] = {}
        """Texts that a run writes into its folder when it begins."""
        self._folder, self._is_running, self._held = Path(config.output_dir), False, ExitStack()
        self.stopping = Stopping(is_main=self.processes.is_main)
        self._journal = Journal()
        self._interrupted: Journal | None = None
        self._best: float | None = None
        self._saved: int | None = None  # the step of the last checkpoint
        self._saved_at, self._save_failed = time.monotonic(), False

    # The loop

    def train(
        self, resume_from: str | Path | None = None, *, overwrite: bool = False
    ) -> dict[str, Any]:
        """Runs to `config.max_steps`; returns the last row of metrics.

        Args:
            resume_from: a checkpoint folder, or "auto" for the newest one in `config.output_dir`
                (a fresh start if there is none). The run goes on bit for bit as if it had not been
                interrupted.
            overwrite: whether an earlier run in `config.output_dir` may be removed; of one that is
                resumed, the checkpoints later than `resume_from`.
        Raises: ValueError if the folder holds another run; RewardError for a reward function that
            fails.
        """
        held = ExitStack()
        try:
            self._start(resume_from, overwrite, held)
            with self.log.running(), self.stopping.listening():
                self._run()
        finally:
            # Not end_training: it takes the processes' group away, and with it evaluate().
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.log.flush()
            self._is_running = False
            held.close()
        return self.history[-1] if self.history else {}

    def _run(self) -> None:
        while self.step < self.config.max_steps:
            try:
                with self.processes.stoppable(self.stopping):
                    if self.step == 0 and not self.history:
                        self._record(self._evaluation())
                    metrics = self._evaluated_step()
            except Stopped:
                self._end_early()
            self._journal = Journal(self.step, self.questions.position)
            self._record(metrics)
            is_last = self.step == self.config.max_steps
            age, signals = zip(
                *self.processes.gather((time.monotonic() - self._saved_at, self.stopping.signal)),
                strict=True,
            )
            is_old = 0 < 60 * self.config.save_minutes <= age[0]
            is_due = _is_due(self.step, self.config.save_every)
            if self._improved(metrics) or is_last or is_due or is_old or self._save_failed:
                self._save(is_last)
            if any(signals) and not is_last:
                self._end_early()

    def _evaluated_step(self) -> dict[str, Any]:
        metrics: dict[str, Any] = self.train_step()
        self.step += 1
        if self.step == self.config.max_steps or _is_due(self.step, self.config.eval_every):
            metrics |= self._evaluation()
        return metrics

    def train_step(self) -> dict[str, float]:
        """One rollout and the update on it; returns its metrics, summed over the processes."""
        begun = Journal(self.step, self.questions.position, self.stopping.check)
        self._journal, self._interrupted = self._interrupted or begun, None
        # Every random number of a step follows from (seed, step, process): nothing to checkpoint.
        set_seed(seed_from(self.config.seed, self.step, self.processes.rank) % 2**32)
        timer = PhaseTimer(self._journal.seconds)
        try:
            return self._timed_step(timer)
        finally:
            self._journal.seconds = timer.so_far

    def _timed_step(self, timer: PhaseTimer) -> dict[str, float]:
        skipped = self.questions.skipped
        rollouts, scores = self._scored_rollouts(timer)
        batch = self.make_batch(rollouts, scores.total)
        metrics = rollout_metrics(batch, scores)
        if self.config.skip_bad_questions:
            metrics["questions/skipped"] = Total(self.questions.skipped - skipped)
        if _is_due(self.step + 1, self.config.log_every):
            self._write_completions(batch, scores)
        updates = self.update(batch, timer)
        return over_processes(metrics, self.processes) | updates | timer.metrics()

    def _scored_rollouts(self, timer: PhaseTimer) -> tuple[Rollouts, Scores]:
        """Rollouts with their rewards; more questions for the groups that `_missing` counts."""
        rollouts: list[Rollouts] = []
        scores: list[Scores] = []
        count = self._num_questions
        while count:
            with timer("rollout"):
                rollouts.append(self.sample(self.draw_questions(count), self._breakable))
            with timer("reward"):
                call = functools.partial(self._scored, rollouts[-1])
                scores.append(Scores(**self._breakable(call)))
            count = self._missing(torch.cat([own.total for own in scores]), len(scores) - 1)
        return merge(rollouts), merge_scores(scores)

    def _scored(self, rollouts: Rollouts) -> dict[str, Any]:
        """The fields of `Scores` as a dict, because a checkpoint holds no class of ours."""
        return score(
            self.reward_functions,
            reward_weights(self.reward_functions, self.config),
            rollouts,
            state=self._state,
            timeout=self.config.reward_timeout,
            retries=self.config.reward_retries,
            say=self.log.say,
        )._asdict()

    def _breakable(self, call: Callable[[], _T]) -> _T:
        """Runs a piece of the step, which a signal may break off at any moment."""

        def piece() -> _T:
            with self.stopping.breaking():
                return call()

        return self._journal.once(piece)

    @property
    def _state(self) -> TrainerState:
        """What reward functions may know of the run."""
        return TrainerState(global_step=self.step, max_steps=self.config.max_steps)

    def _missing(self, rewards: Tensor, refills: int) -> int:
        """Questions that every process should draw in place of those with equal rewards."""
        config = self.config
        if not (config.drop_zero_variance and config.dynamic_allocation and config.max_refills):
            return 0
        everywhere = torch.cat(self.processes.gather(rewards))
        kept = len(select_completions(everywhere, config, self.step)[1])
        missing = questions_needed(
            max(0, config.batch_size - kept), config.group_size, config.prune_rate
        )
        if missing and refills == config.max_refills:
            self.log.say(
                f"step {self.step + 1}: {kept} of {config.batch_size} completions after "
                f"{refills} refills ({len(everywhere) // config.group_size} questions): most "
                "groups have equal rewards; use easier or harder questions, or raise max_refills"
            )
            return 0
        return math.ceil(missing / self.processes.size)

    def draw_questions(self, count: int | None = None) -> list[EncodedQuestion]:
        """This process's questions of the next step; a group never straddles processes."""
        return self.questions.draw(self._num_questions if count is None else count)

    def sample(self, questions: Sequence[EncodedQuestion], once: Once = now) -> Rollouts:
        """`group_size` completions of each question, sampled from the current policy."""
        with self._autocast():
            return sample_completions(
                self.model,
                self.processor,
                collate(self.model, questions),
                group_size=self.config.group_size,
                max_new_tokens=self.config.max_completion_tokens,
                temperature=self.config.loss.temperature,
                suppressed=self.suppressed,
                batch_size=self.config.generation_batch_size,
                once=once,
            )

    def make_batch(self, rollouts: Rollouts, rewards: Tensor) -> Batch:
        """Advantages and pruning: what of the rollouts the update will run on. Collective.

        Args:
            rewards: (B,) of this process's completions, NaN where there is none.
        """
        config = self.config
        everywhere = self.processes.gather((rewards.cpu(), rollouts.truncated.cpu()))
        all_rewards, truncated = (torch.cat(parts) for parts in zip(*everywhere, strict=True))
        advantages, kept = select_completions(all_rewards, config, self.step)
        if config.dynamic_allocation:
            kept = cut_surplus(kept, advantages, config.group_size, config.batch_size)
        if config.mask_overlong:
            kept = kept[~truncated[kept]]
        start = sum(len(own) for own, _ in everywhere[: self.processes.rank])
        places = ((start <= kept) & (kept < start + len(rewards))).nonzero()[:, 0]
        device = rollouts.input_ids.device
        return Batch(
            rollouts,
            advantages[start : start + len(rewards)].to(device),
            (kept[places] - start).to(device),
            suppressed=self.suppressed,
            seed=seed_from(config.seed, "views", self.step, self.processes.rank),
            share_prompts=config.share_prompts,
            places=places,
        )

    def update(self, batch: Batch, timer: PhaseTimer) -> dict[str, float]:
        """`num_iterations` passes over the kept completions; returns the loss's metrics."""
        config = self.config
        if config.balance_processes and self.processes.size > 1:
            with timer("balance"):
                batch = balanced(batch, self.processes)
        batch = self._with_old_and_reference(batch, timer)
        self.model.train()
        total: dict[str, float] = {}
        grad_norms: list[float] = []
        learning_rate, once = 0.0, self._journal.once
        for _ in range(config.num_iterations):
            for rows in batch.dealt(config.optimizer_steps):
                num_items = NumItems(*map(int, self.processes.sum(batch.counts(rows))))
                learning_rate = once(lambda: self.optimizer.param_groups[0]["lr"])
                if num_items.completions == 0:
                    self.log.say(f"step {self.step + 1}: no completion is left, nothing to learn")
                    once(self.scheduler.step)
                    continue
                for part in batch.microbatches(rows, config.max_tokens_per_microbatch):
                    run = functools.partial(self._run_microbatch, batch, part, num_items, timer)
                    for name, value in once(run).items():
                        total[name] = total.get(name, 0.0) + value
                with timer("optimizer"):
                    grad_norms.append(once(self._optimizer_step))
        metrics = update_metrics(total, len(grad_norms), config, self.processes)
        metrics["grad_norm"] = sum(grad_norms) / max(len(grad_norms), 1)
        return metrics | {"learning_rate": learning_rate}

    def _run_microbatch(
        self, batch: Batch, part: Tensor, num_items: NumItems, timer: PhaseTimer
    ) -> dict[str, float]:
        """Adds a micro-batch's gradient; returns its part of the metrics."""
        config = self.config
        with timer("forward"), self._autocast():
            output = microbatch_loss(self.model, batch, part, num_items, config, self.processor)
        with timer("backward"):
            output.loss.backward()
        values = {name: value.item() for name, value in output.metrics.items()}
        return values | {
            "loss": output.loss.item(),
            "microbatches": 1.0,
            "computed_tokens": batch.computed_tokens(part),
            "looking_tokens": batch.counts(batch.looking(part, config.loss))[1],
        }

    def _with_old_and_reference(self, batch: Batch, timer: PhaseTimer) -> Batch:
        """Old log-probabilities if the policy will move within the step, reference ones for KL."""
        config = self.config
        per_token: dict[str, Tensor] = {}
        self.model.eval()
        if config.num_iterations * config.optimizer_steps > 1:
            with timer("old_logps"), self._autocast():
                per_token["old_logps"] = token_logps(self.model, batch, config, self._breakable)
        if config.loss.kl_coef > 0:
            with timer("ref_logps"), self._autocast(), self._without_adapters():
                model = self.model if self.reference is None else self.reference
                per_token["ref_logps"] = token_logps(model, batch, config, self._breakable)
        return dataclasses.replace(batch, per_token=per_token)

    def _autocast(self) -> AbstractContextManager[Any]:
        device = self.accelerator.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _without_adapters(self) -> AbstractContextManager[Any]:
        return self.model.disable_adapter() if self.config.lora else nullcontext()

    def _optimizer_step(self) -> float:
        """Sums the gradients over the processes, clips, steps; returns the norm before clipping."""
        self.processes.sum_gradients(self.parameters)
        limit = self.config.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit).item()
        if not norm < float("inf"):
            raise FloatingPointError(
                f"cppo.CPPOTrainer: the gradient of step {self.step} is not finite (norm {norm}); "
                f"the last checkpoint is {last_checkpoint(self.config.output_dir)}"
            )
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    # Evaluation, records, checkpoints

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics of the current policy, {"eval/sampled/<reward>": mean, ...}."""
        with self._autocast():
            result = evaluate(
                self.model,
                self.processor,
                self.reward_functions,
                self.eval_questions,
                config=self.config,
                suppressed=self.suppressed,
                rank=self.processes.rank,
                world_size=self.processes.size,
                gather=self._gather_whole,
                state=self._state,
            )
        return {f"eval/{name}": value for name, value in result.metrics.items()}

    def _gather_whole(self, rows: list[Any]) -> list[list[Any]]:
        """An exchange between processes, which a signal must not break off on one of them."""
        with self.stopping.pausing():
            return self.processes.gather(rows)

    def _evaluation(self) -> dict[str, float]:
        if not self.eval_questions:
            return {}
        with self.stopping.breaking():
            return self.evaluate()

    def _record(self, metrics: dict[str, Any]) -> None:
        if not metrics:
            return
        row = {"step": self.step, **metrics}
        if self.processes.is_main:
            with suppress(ValueError):  # the next checkpoint says what is wrong
                self._keep_folder()
        self.history.append(row)
        is_due = _is_due(self.step, self.config.log_every) or "loss" not in row
        has_eval = any(name.startswith("eval/") for name in row)
        self.log.metrics(row, show=is_due or has_eval)
        if self.config.trackers and (is_due or has_eval):
            self.accelerator.log(metrics, step=self.step)

    def _write_completions(self, batch: Batch, scores: Scores) -> None:
        rollouts, kept = batch.rollouts, set(batch.kept.tolist())
        count = min(self.config.log_completions, len(rollouts.texts))
        rows = range(0, len(rollouts.texts), max(1, len(rollouts.texts) // max(count, 1)))
        self.log.completions(
            [
                {
                    "step": self.step + 1,
                    "question": rollouts.question_of(row).messages,
                    "answer": rollouts.question_of(row).columns.get("answer"),
                    "completion": rollouts.texts[row],
                    "reward": _number(scores.total[row]),
                    "advantage": batch.advantages[row].item(),
                    "kept": row in kept,
                    **{column: values[row] for column, values in scores.extra.items()},
                }
                for row in list(rows)[:count]
            ]
        )

    def _improved(self, metrics: dict[str, Any]) -> bool:
        value = self._metric(metrics)
        if value is None or (self._best is not None and value <= self._best):
            return False
        self._best = value
        return True

    def _metric(self, metrics: dict[str, Any]) -> float | None:
        """The evaluation metric that "best" means, if this row has it."""
        first = f"sampled/{metric_name(self.reward_functions[0])}"
        return metrics.get(f"eval/{self.config.best_metric or first}")

    def _end_early(self) -> NoReturn:
        """Saves what there is, the step that is running included, and ends the run.

        Raises: KeyboardInterrupt for SIGINT, SystemExit(143) for SIGTERM.
        """
        journal = self._journal
        self.step, self.questions.position = journal.step, journal.position
        heard = [one for one in self.processes.gather(self.stopping.signal) if one is not None]
        failure = ""
        try:
            if any(self.processes.gather(not journal.is_empty)):
                self._save_journal(journal)
            elif self.step > 0 and self._saved != self.step:
                self.save_checkpoint()
        except ValueError as error:  # a full disk, for example
            failure = f"{error}; "
        path = self.processes.of_first(lambda: last_checkpoint(self.config.output_dir))
        words = f"{failure}the newest checkpoint is {path or 'none: nothing was done yet'}"
        self.log.say(f"stopped by {heard[0].name}; {words}")
        if signal.SIGTERM in heard:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(words)

    def _save_journal(self, journal: Journal) -> None:
        """Writes a checkpoint in the middle of a step, with the journal of every process."""
        rank, folder = self.processes.rank, self._folder
        own = folder / f".journal-{rank}{PARTIAL}"
        gradients = [p.grad for p in self.parameters]
        try:
            self.processes.of_first(self._keep_folder)
            self.processes.together(lambda: write_tensors(journal.state(gradients), own))
            names = range(self.processes.size)
            files = {f"journal-{i}.pt": folder / f".journal-{i}{PARTIAL}" for i in names}
            self.processes.of_first(lambda: self._write_checkpoint(files))
        finally:
            own.unlink(missing_ok=True)

    def _save(self, is_last: bool) -> None:
        """Writes a checkpoint; where that fails, of a full disk for example, the run goes on."""
        try:
            self.save_checkpoint()
            self._save_failed = False
        except CheckpointError as error:
            if is_last:
                raise
            self.log.say(f"{error}; tried again after the next step", style="bold red")
            self._save_failed = True

    def save_checkpoint(self) -> Path | None:
        """Writes everything that resuming needs, atomically; returns the folder. Collective.

        Raises: CheckpointError, on every process, if it could not be written.
        """
        path = self.processes.of_first(self._write_checkpoint)
        self._saved, self._saved_at = self.step, time.monotonic()
        return path

    def _keep_folder(self) -> None:
        """Makes the run's folder again, if somebody has removed it."""
        if self._is_running and not has_lock(self._folder):
            self.log.say(f"{self._folder} was removed during the run: it is made again")
            self._held.close()
            claim = Claim(self._folder)
            self._held.callback(claim.lock())
            self._begin(claim)

    def _write_checkpoint(self, journals: Mapping[str, Path] | None = None) -> Path:
        self._keep_folder()
        self.log.flush()
        optimizer = self.optimizer.state_dict()
        state = {
            "step": self.step,
            "position": self.questions.position,
            "best": self._best,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
        }
        measured = self.history and journals is None
        summary = {
            "metric": self._metric(self.history[-1]) if measured else None,
            "options": {**self._options, **self._trained_on},
            "unfinished": journals is not None,
        }
        return write_checkpoint(
            self.config.output_dir,
            self.step + (journals is not None),
            lambda folder: policy.save_model(self.model, self.processor, folder),
            state,
            summary,
            self.config.keep_checkpoints,
            expected_bytes=policy.saved_bytes(self.model, optimizer),
            files=journals or {},
        )

    @functools.cached_property
    def _options(self) -> dict[str, Any]:
        return run_options(self.config, self.processes.size)

    @functools.cached_property
    def _trained_on(self) -> dict[str, Any]:
        """Data, rewards and chat template, in words that a resumed run compares."""
        rewards = [fingerprint.of_function(function) for function in self.reward_functions]
        held_out = self._eval_dataset
        return {
            "train_dataset": fingerprint.of_dataset(self.questions.dataset),
            "rewards": rewards,
            "chat_template": fingerprint.of_text(self.processor.chat_template),
            **({"eval_dataset": fingerprint.of_dataset(held_out)} if held_out else {}),
        }

    def _start(self, resume_from: str | Path | None, overwrite: bool, held: ExitStack) -> None:
        self._trained_on  # noqa: B018  (before anybody edits a reward's file)
        claim = self.processes.of_first(lambda: self._claim(resume_from, overwrite, held))
        start = claim.start
        seal = self.processes.together(lambda: self._resume(start)) if start else None
        # The first process alone writes, so that only its folder counts; a reward may well know
        # on which process it is.
        shared = {**self._options, **self._trained_on}
        for name in ("output_dir", "rewards"):
            shared.pop(name)
        weights = [(n, tuple(p.shape), p.requires_grad) for n, p in self.model.named_parameters()]
        shared["model's parameters"] = fingerprint.of_text(weights)
        shared.setdefault("eval_dataset", None)
        self.processes.must_agree({"checkpoint's checksum": seal, **shared})
        self._folder, self._is_running = claim.folder, True
        self.processes.of_first(lambda: self._begin(claim))
        if self.config.trackers:
            plain = {
                name: value if isinstance(value, (int, float)) else str(value)
                for name, value in {**self._options, **self._trained_on}.items()
            }
            self.accelerator.init_trackers("cppo", config=plain)
        self.processes.same_weights(self.model)
        self._journal = self._interrupted or Journal(self.step, self.questions.position)
        self._saved_at = time.monotonic()

    def _claim(self, resume_from: str | Path | None, overwrite: bool, held: ExitStack) -> Claim:
        claim = claim_output_dir(
            self.config.output_dir,
            resume_from,
            overwrite=overwrite,
            writes_config="config.yaml" in self.files,
            ways="train(resume_from='auto') goes on with it, train(overwrite=True) removes "
            "it, another output_dir keeps both",
        )
        held.callback(claim.lock())
        self._held = held
        for path in incomplete(claim.folder):
            self.log.say(f"{path} is left alone: it is half copied (it has no trainer.json)")
        return claim

    def _begin(self, claim: Claim) -> None:
        """Writes the first files of the run, after everything was checked."""
        claim.clear()
        with writing_to(claim.folder):
            self.log.restart(self.history, self.step)
            for name, text in self.files.items():
                (claim.folder / name).write_text(text, encoding="utf-8")

    def _resume(self, path: Path) -> str | None:
        """Takes over the state of a checkpoint; returns the checksum of all that it holds."""
        # One process of a machine reads all files, the others compare what is quick to compare.
        summary = check_files(path, contents=self.accelerator.is_local_main_process)
        state = read_state(path)
        changes = check_options(path, self._options, self._trained_on)
        if changes and summary.get("unfinished"):
            raise ValueError(
                f"cppo.CPPOTrainer: the run was stopped within a step, so that {path} must be "
                f"resumed with its data and rewards, changed: {', '.join(changes)}; an earlier "
                "checkpoint can be resumed with changes"
            )
        for change in changes:
            self.log.say(f"resumed although it changed: {change}")
        policy.load_weights(self.model, path)
        self.optimizer.zero_grad(set_to_none=True)  # of a step that was broken off
        self._interrupted = None
        self.optimizer.load_state_dict(state["optimizer"])
        policy.restore_schedule(self.scheduler, state["scheduler"])
        self.step, self.history = state["step"], state["history"]
        self.questions.position, self._best = state["position"], state["best"]
        self._saved = self.step
        within = ""
        if summary.get("unfinished"):
            self._take_up(read_tensors(path / f"journal-{self.processes.rank}.pt"))
            within = f", within step {self.step + 1}"
        self.log.say(f"resumed from {path} at step {self.step}{within}")
        return summary.get("checksum")

    def _take_up(self, state: dict[str, Any]) -> None:
        """Goes on with the step in which a run was stopped."""
        self._interrupted = Journal.restored(state, self.stopping.check)
        for p, gradient in zip(self.parameters, state["gradients"], strict=True):
            p.grad = None if gradient is None else gradient.to(p.device)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _number(value: Tensor) -> float | None:
    """A number that JSON can write; None for NaN."""
    number = value.item()
    return None if math.isnan(number) else number
