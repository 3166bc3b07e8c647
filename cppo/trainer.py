"""The thin trainer: CPPO as a plain loop that reads top to bottom.

One step: draw questions (dynamic allocation) -> sample G completions each -> rewards -> advantages
and pruning -> old and reference log-probabilities only where needed -> packed forward, the
perturbed views only where A > 0 -> loss -> optimizer.

What it leaves out on purpose: it is data-parallel only (every process holds the whole model; past
one machine, use the fused ops inside verl or TRL), generates with transformers, and is synchronous.
Gradients are summed over the processes once per optimizer step, after the last micro-batch, so
processes may have different numbers of micro-batches, or none.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from cppo import forward
from cppo.checkpoint import last_checkpoint, read_state, read_summary, write_checkpoint
from cppo.config import CPPOConfig
from cppo.evaluate import evaluate
from cppo.models import special_token_ids_to_suppress
from cppo.ops.advantages import advantages_and_prune, questions_needed
from cppo.progress import PhaseTimer, RunLog
from cppo.questions import Question, as_question
from cppo.records import NumItems
from cppo.rollout import (
    RewardFunction,
    Rollouts,
    encode_questions,
    reward_name,
    sample_completions,
    score,
    tokenizer_of,
)
from cppo.step import Batch, cut_surplus, microbatch_loss, seed_from, token_logps
from cppo.views import views_from_names

# What may change when a run is resumed: how long it goes on and what is written.
_MAY_CHANGE = {
    "max_steps",
    "output_dir",
    "eval_every",
    "eval_samples",
    "eval_greedy",
    "save_every",
    "keep_checkpoints",
    "best_metric",
    "log_every",
    "log_completions",
    "trackers",
}


class Dataset(Protocol):
    """Rows by number: a list of dicts, a `datasets.Dataset`, anything alike."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class QuestionStream:
    """A dataset's questions without end, shuffled anew in every epoch.

    The order is a function of the seed; `position` is all there is to remember.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        _check_dataset("train_dataset", dataset)
        if len(dataset) == 0:
            raise ValueError("cppo.CPPOTrainer: train_dataset must have rows, got none")
        self._dataset, self._seed = dataset, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        self.position = 0

    def __next__(self) -> Question:
        epoch, place = divmod(self.position, len(self._dataset))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_from(self._seed, "epoch", epoch))
            self._epoch = epoch
            self._order = torch.randperm(len(self._dataset), generator=generator)
        self.position += 1
        row = int(self._order[place])
        return as_question(self._dataset[row], index=row)


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
        self.config = config
        self.processor = processor
        self.reward_functions = _reward_list(reward_functions)
        self.reward_weights = _weights(self.reward_functions, config)
        self.accelerator = Accelerator(
            # Left to itself, accelerate takes every process of a machine without a GPU for one.
            cpu=not torch.accelerator.is_available(),
            log_with=list(config.trackers) or None,
            project_dir=config.output_dir,
        )
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        forward.check_supported(model)
        _check_processor(model, processor)
        self.questions = QuestionStream(train_dataset, config.seed)
        self.eval_questions = _all_questions(eval_dataset)
        for question in [as_question(train_dataset[0], index=0), *self.eval_questions]:
            if question.images and not forward.has_vision(model):
                raise ValueError(
                    "cppo.CPPOTrainer: model takes no images, but there are questions with images: "
                    f"{question.messages!r}"
                )
        if config.loss.cpl_coef > 0:
            views_from_names(config.positive_views), views_from_names(config.negative_views)
        self.suppressed = tuple(special_token_ids_to_suppress(model, processor))
        self.reference = (
            _frozen_copy(model, config).to(self.accelerator.device)
            if (config.loss.kl_coef > 0 and config.lora is None)
            else None
        )
        self.model: Any = _prepare(model, config, self.accelerator.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self.scheduler = _schedule(self.optimizer, config)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.log = RunLog(
            config.output_dir, config.max_steps, is_main=self.accelerator.is_main_process
        )
        self._batch_size = _share("batch_size", config.batch_size, self.world_size)
        self._num_questions = (
            questions_needed(self._batch_size, config.group_size, config.prune_rate)
            if config.dynamic_allocation
            else _share("questions", config.batch_size // config.group_size, self.world_size)
        )
        self._best: float | None = None

    # The loop

    def train(self, resume_from: str | Path | None = None) -> dict[str, Any]:
        """Runs to `config.max_steps`; returns the last row of metrics.

        Args:
            resume_from: a checkpoint folder, or "auto" for the newest one in `config.output_dir`
                (a fresh start if there is none). The run goes on bit for bit as if it had not been
                interrupted.
        """
        self._start(resume_from)
        with self.log.running():
            if self.step == 0:
                self._record(self._evaluation())
            while self.step < self.config.max_steps:
                metrics = self.train_step()
                self.step += 1
                is_last = self.step == self.config.max_steps
                if is_last or _is_due(self.step, self.config.eval_every):
                    metrics |= self._evaluation()
                self._record(metrics)
                if is_last or self._improved(metrics) or _is_due(self.step, self.config.save_every):
                    self.save_checkpoint()
        # Not end_training: it takes the processes' group away, and with it evaluate().
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return self.history[-1] if self.history else {}

    def train_step(self) -> dict[str, float]:
        """One rollout and the update on it; returns its metrics, summed over the processes."""
        # Every random number of a step follows from (seed, step, process): nothing to checkpoint.
        set_seed(seed_from(self.config.seed, self.step, self.rank) % 2**32)
        timer = PhaseTimer()
        with timer("rollout"):
            rollouts = self.sample(self.draw_questions())
        with timer("reward"):
            rewards, by_name = score(self.reward_functions, self.reward_weights, rollouts)
        batch = self.make_batch(rollouts, rewards.to(rollouts.input_ids.device))
        metrics = _rollout_metrics(batch, rewards, by_name)
        if _is_due(self.step + 1, self.config.log_every):
            self._write_completions(batch, rewards)
        updates = self.update(batch, timer)
        return self._over_processes(metrics) | updates | timer.metrics()

    def draw_questions(self) -> list[Question]:
        """This process's questions of the next step; a group never straddles processes."""
        own = self._num_questions
        drawn: list[Question] = []
        start = self.questions.position
        while len(drawn) < own * self.world_size:
            question = next(self.questions)
            if self._fits(question):
                drawn.append(question)
            elif not drawn and self.questions.position - start > len(self.questions._dataset):
                raise ValueError(
                    f"cppo.CPPOTrainer: no question of train_dataset has a prompt of at most "
                    f"max_prompt_tokens = {self.config.max_prompt_tokens} tokens"
                )
        return drawn[self.rank * own : (self.rank + 1) * own]

    def _fits(self, question: Question) -> bool:
        limit = self.config.max_prompt_tokens
        if limit is None:
            return True
        length = encode_questions(self.model, self.processor, [question]).input_ids.shape[1]
        if length > limit:
            self.log.say(
                f"skipped a question: its prompt has {length} tokens, the limit is {limit}"
            )
        return length <= limit

    def sample(self, questions: list[Question]) -> Rollouts:
        """`group_size` completions of each question, sampled from the current policy."""
        with self._autocast():
            return sample_completions(
                self.model,
                self.processor,
                encode_questions(self.model, self.processor, questions),
                group_size=self.config.group_size,
                max_new_tokens=self.config.max_completion_tokens,
                temperature=self.config.loss.temperature,
                suppressed=self.suppressed,
                batch_size=self.config.generation_batch_size,
            )

    def make_batch(self, rollouts: Rollouts, rewards: Tensor) -> Batch:
        """Advantages and pruning: what of the rollouts the update will run on."""
        config = self.config
        advantages, kept = advantages_and_prune(
            rewards,
            config.group_size,
            config.prune_rate,
            scale=config.scale_rewards,
            scope=config.prune_scope,
            prune=config.prune,
            drop_zero=config.drop_zero_variance,
        )
        if config.dynamic_allocation:
            kept = cut_surplus(kept, advantages, config.group_size, self._batch_size)
        if config.mask_overlong:
            kept = kept[~rollouts.truncated[kept]]
        return Batch(
            rollouts,
            advantages,
            kept,
            suppressed=self.suppressed,
            seed=seed_from(config.seed, "views", self.step, self.rank),
        )

    def update(self, batch: Batch, timer: PhaseTimer) -> dict[str, float]:
        """`num_iterations` passes over the kept completions; returns the loss's metrics."""
        config = self.config
        batch = self._with_old_and_reference(batch, timer)
        self.model.train()
        total: dict[str, float] = {}
        updates = 0
        for _ in range(config.num_iterations):
            for rows in _deal(batch.kept, config.optimizer_steps):
                num_items = self._whole(batch.num_items(rows))
                if num_items.completions == 0:
                    self.log.say(f"step {self.step + 1}: no completion is left, nothing to learn")
                    continue
                for part in batch.microbatches(rows, config.max_tokens_per_microbatch):
                    with timer("forward"), self._autocast():
                        output = microbatch_loss(
                            self.model, batch, part, num_items, config, self.processor
                        )
                    with timer("backward"):
                        output.loss.backward()
                    for name, value in {"loss": output.loss, **output.metrics}.items():
                        total[name] = total.get(name, 0.0) + value.item()
                with timer("optimizer"):
                    total["grad_norm"] = total.get("grad_norm", 0.0) + self._optimizer_step()
                updates += 1
        return self._update_metrics(total, updates, batch)

    def _with_old_and_reference(self, batch: Batch, timer: PhaseTimer) -> Batch:
        """Old log-probabilities if the policy will move within the step, reference ones for KL."""
        config = self.config
        per_token: dict[str, Tensor] = {}
        self.model.eval()
        if config.num_iterations * config.optimizer_steps > 1:
            with timer("old_logps"), self._autocast():
                per_token["old_logps"] = token_logps(self.model, batch, config)
        if config.loss.kl_coef > 0:
            with timer("ref_logps"), self._autocast(), self._without_adapters():
                model = self.model if self.reference is None else self.reference
                per_token["ref_logps"] = token_logps(model, batch, config)
        return dataclasses.replace(batch, per_token=per_token)

    def _autocast(self) -> AbstractContextManager[Any]:
        device = self.accelerator.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _without_adapters(self) -> AbstractContextManager[Any]:
        return self.model.disable_adapter() if self.config.lora else nullcontext()

    def _optimizer_step(self) -> float:
        """Sums the gradients over the processes, clips, steps; returns the norm before clipping."""
        if self.world_size > 1:
            gradients = []
            for p in self.parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                gradients.append(p.grad)
            flat = _flatten_dense_tensors(gradients)
            dist.all_reduce(flat)
            for own, summed in zip(
                gradients, _unflatten_dense_tensors(flat, gradients), strict=True
            ):
                own.copy_(summed)
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
                rank=self.rank,
                world_size=self.world_size,
            )
        return {f"eval/{name}": value for name, value in result.metrics.items()}

    def _evaluation(self) -> dict[str, float]:
        metrics = self.evaluate() if self.eval_questions else {}
        if metrics and self._metric(metrics) is None:
            names = sorted(name.removeprefix("eval/") for name in metrics)
            raise ValueError(
                f"CPPOConfig.best_metric must be one of {names}, got {self.config.best_metric!r}"
            )
        return metrics

    def _record(self, metrics: dict[str, Any]) -> None:
        if not metrics:
            return
        row = {"step": self.step, **metrics}
        self.history.append(row)
        is_due = _is_due(self.step, self.config.log_every) or "loss" not in row
        has_eval = any(name.startswith("eval/") for name in row)
        self.log.metrics(row, show=is_due or has_eval)
        if self.config.trackers and (is_due or has_eval):
            self.accelerator.log(metrics, step=self.step)

    def _write_completions(self, batch: Batch, rewards: Tensor) -> None:
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
                    "reward": rewards[row].item(),
                    "advantage": batch.advantages[row].item(),
                    "kept": row in kept,
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
        first = f"sampled/{reward_name(self.reward_functions[0])}"
        return metrics.get(f"eval/{self.config.best_metric or first}")

    def save_checkpoint(self) -> Path | None:
        """Writes everything that resuming needs, atomically; returns the folder (main process)."""
        path = None
        if self.accelerator.is_main_process:
            state = {
                "step": self.step,
                "position": self.questions.position,
                "best": self._best,
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "history": self.history,
            }
            summary = {
                "metric": self._metric(self.history[-1]) if self.history else None,
                **self._options(),
            }
            path = write_checkpoint(
                self.config.output_dir,
                self.step,
                self._save_model,
                state,
                summary,
                self.config.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()
        return path

    def _save_model(self, directory: Path) -> None:
        with _quiet():
            self.model.save_pretrained(directory)
            self.processor.save_pretrained(directory)

    def _start(self, resume_from: str | Path | None) -> None:
        if resume_from == "auto":
            resume_from = last_checkpoint(self.config.output_dir)
        if resume_from is not None:
            self._resume(Path(resume_from))
        self.log.restart(self.history, self.step)
        if self.config.trackers:
            self.accelerator.init_trackers("cppo", config=_flat(dataclasses.asdict(self.config)))
        if self.world_size > 1:
            for p in self.model.parameters():
                dist.broadcast(p.data, 0)

    def _options(self) -> dict[str, Any]:
        """What decides the course of the run, as JSON gives it back."""
        options = {"processes": self.world_size, "config": dataclasses.asdict(self.config)}
        # A perturbation may be a function: its name, repr has the address in memory.
        named = json.dumps(
            options, default=lambda value: getattr(value, "__qualname__", repr(value))
        )
        return json.loads(named)

    def _check_options(self, path: Path) -> None:
        """Resuming with other options would be another run under the name of the old one."""
        summary, own = read_summary(path), self._options()
        was = _flat({"processes": summary["processes"], **summary["config"]})
        now = _flat({"processes": own["processes"], **own["config"]})
        changed = [
            f"{name} (was {was.get(name)!r}, is {now.get(name)!r})"
            for name in sorted(was.keys() | now.keys())
            if was.get(name) != now.get(name) and name not in _MAY_CHANGE
        ]
        if changed:
            raise ValueError(
                f"cppo.CPPOTrainer: the run of {path} must be resumed with the options it was "
                f"started with, changed: {', '.join(changed)}"
            )

    def _resume(self, path: Path) -> None:
        state = read_state(path)
        self._check_options(path)
        _load_weights(self.model, path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.history = state["step"], state["history"]
        self.questions.position, self._best = state["position"], state["best"]
        self.log.say(f"resumed from {path} at step {self.step}")

    # Sums over the processes

    def _whole(self, own: NumItems) -> NumItems:
        if self.world_size == 1:
            return own
        counts = torch.tensor(own[:2], device=self.accelerator.device)
        dist.all_reduce(counts)
        completions, tokens = counts.tolist()
        return NumItems(completions, tokens)

    def _over_processes(self, own: dict[str, float]) -> dict[str, float]:
        """The mean of each process's metrics; token counts are summed."""
        if self.world_size == 1:
            return own
        values = torch.tensor(list(own.values()), dtype=torch.float64)
        dist.all_reduce(values := values.to(self.accelerator.device))
        return {
            name: value if name.startswith("tokens/") else value / self.world_size
            for name, value in zip(own, values.tolist(), strict=True)
        }

    def _update_metrics(
        self, total: dict[str, float], updates: int, batch: Batch
    ) -> dict[str, float]:
        """Means over the optimizer steps of what the micro-batches of all processes sum up to."""
        names = ["loss", "policy_loss", "entropy", "clip_fraction", "kl", "cpl_loss"]
        names += ["num_selected", "looking_tokens"]
        looking = batch.kept[batch.advantages[batch.kept] > 0]
        looking_tokens = batch.rollouts.completion_mask[looking].sum().item()
        total["looking_tokens"] = looking_tokens * self.config.num_iterations
        sums = torch.tensor([total.get(name, 0.0) for name in names], dtype=torch.float64)
        seen = torch.tensor([float(name in total) for name in names], dtype=torch.float64)
        if self.world_size > 1:
            both = torch.stack([sums, seen]).to(self.accelerator.device)
            dist.all_reduce(both)
            sums, seen = both.cpu()
        by_name = {
            n: s for n, s, has in zip(names, sums.tolist(), seen.tolist(), strict=True) if has
        }
        selected, tokens = by_name.pop("num_selected", None), by_name.pop("looking_tokens")
        metrics = {name: value / max(updates, 1) for name, value in by_name.items()}
        metrics.setdefault("loss", 0.0)
        if selected is not None:
            metrics["perception_share"] = selected / max(tokens, 1)
        metrics["grad_norm"] = total.get("grad_norm", 0.0) / max(updates, 1)
        metrics["learning_rate"] = self.scheduler.get_last_lr()[0]
        return metrics


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _deal(rows: Tensor, parts: int) -> Iterator[Tensor]:
    """Rows dealt like cards, so that every part sees every question."""
    for part in range(parts):
        yield rows[part::parts]


def _share(name: str, total: int, world_size: int) -> int:
    if total % world_size:
        raise ValueError(
            f"cppo.CPPOTrainer: {name} must divide evenly over the processes, "
            f"got {total} over {world_size}"
        )
    return total // world_size


def _check_dataset(name: str, dataset: Any) -> None:
    is_one = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not is_one or isinstance(dataset, (str, Mapping)):
        raise TypeError(
            f"cppo.CPPOTrainer: {name} must have __len__ and an integer __getitem__ (a list of "
            f"rows, a datasets.Dataset), got {type(dataset).__name__}"
        )


def _all_questions(dataset: Dataset | None) -> list[Question]:
    if dataset is None:
        return []
    _check_dataset("eval_dataset", dataset)
    return [as_question(dataset[i], index=i) for i in range(len(dataset))]


def _check_processor(model: nn.Module, processor: Any) -> None:
    """Raises for a processor that is not this model's, as far as one can see."""
    kind = type(processor).__name__
    tokenizer = tokenizer_of(processor)
    if not hasattr(processor, "apply_chat_template") or not hasattr(tokenizer, "decode"):
        raise TypeError(f"cppo.CPPOTrainer: processor must be a processor or tokenizer, got {kind}")
    if forward.has_vision(model) and not hasattr(processor, "image_processor"):
        raise TypeError(
            "cppo.CPPOTrainer: processor must be the processor of a vision-language model (see "
            f"cppo.models.load_processor), got the tokenizer {kind}"
        )
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"cppo.CPPOTrainer: processor must have a chat template, {kind} has none")
    vocabulary = forward.unwrap(model).get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"cppo.CPPOTrainer: processor must be the model's: its {len(tokenizer)} tokens are "
            f"more than the {vocabulary} that the model has"
        )


def _reward_list(functions: RewardFunction | Sequence[RewardFunction]) -> list[RewardFunction]:
    listed = [functions] if callable(functions) else functions
    is_list = isinstance(listed, (list, tuple)) and len(listed) > 0
    if not is_list or not all(callable(function) for function in listed):
        raise TypeError(
            f"cppo.CPPOTrainer: reward_functions must be one or more callables, got {functions!r}"
        )
    names = [reward_name(function) for function in listed]
    if len(set(names)) < len(names):
        raise ValueError(
            "cppo.CPPOTrainer: reward_functions must have different names (`__name__` or `name`), "
            f"got {names}"
        )
    return list(listed)


def _weights(functions: list[RewardFunction], config: CPPOConfig) -> tuple[float, ...]:
    weights = config.reward_weights or (1.0,) * len(functions)
    if len(weights) != len(functions):
        names = [reward_name(function) for function in functions]
        raise ValueError(
            f"cppo.CPPOTrainer: reward_weights must have one weight per reward function "
            f"{names}, got {weights}"
        )
    return tuple(weights)


def _frozen_copy(model: nn.Module, config: CPPOConfig) -> nn.Module:
    device = next(model.parameters()).device
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    forward.set_attention(reference, forward.choose_attention(config.attention, device))
    return reference


def _prepare(model: Any, config: CPPOConfig, device: torch.device) -> Any:
    """Attention, frozen parts, adapters and checkpointing, as the config asks."""
    model = model.to(device)
    forward.set_attention(model, forward.choose_attention(config.attention, device))
    sees = forward.has_vision(model)
    if config.freeze_vision_tower and sees:
        forward.vision_tower(model).requires_grad_(False)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.lora is not None:
        from peft import LoraConfig, get_peft_model

        lora = config.lora
        targets = lora.target_modules
        options = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            exclude_modules=r".*visual.*" if config.freeze_vision_tower and sees else None,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model = get_peft_model(model, options)
    return model


def _schedule(optimizer: torch.optim.Optimizer, config: CPPOConfig) -> Any:
    from transformers import get_scheduler

    steps = config.max_steps * config.num_iterations * config.optimizer_steps
    try:
        return get_scheduler(config.lr_scheduler, optimizer, config.warmup_steps, steps)
    except ValueError as error:
        raise ValueError(f"CPPOConfig.lr_scheduler: {error}") from error


def _load_weights(model: Any, path: Path) -> None:
    if hasattr(model, "get_base_model"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(path), device="cpu"))
        return
    dtype = next(model.parameters()).dtype
    with _quiet():
        loaded = type(model).from_pretrained(path, dtype=dtype)
    model.load_state_dict(loaded.state_dict())


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers over our own."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _rollout_metrics(batch: Batch, rewards: Tensor, by_name: dict[str, Tensor]) -> dict[str, float]:
    rollouts = batch.rollouts
    lengths = rollouts.completion_mask.sum(1).float()
    groups = rewards.view(-1, rollouts.group_size)
    metrics = {
        "reward/mean": rewards.mean().item(),
        "reward/std": groups.std(1, correction=0).mean().item(),
        "reward/zero_variance_share": (groups == groups[:, :1]).all(1).float().mean().item(),
        "kept_share": len(batch.kept) / len(rewards),
        "completion/tokens": lengths.mean().item(),
        "completion/max_tokens": lengths.max().item(),
        "completion/truncated_share": rollouts.truncated.float().mean().item(),
        "tokens/sampled": lengths.sum().item(),
        "tokens/trained": rollouts.completion_mask[batch.kept].sum().item(),
    }
    return metrics | {f"reward/{name}": values.mean().item() for name, values in by_name.items()}


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as the flat numbers and strings that trackers take."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            is_plain = isinstance(value, (int, float, str, bool))
            flat[prefix + name] = value if is_plain else str(value)
    return flat
