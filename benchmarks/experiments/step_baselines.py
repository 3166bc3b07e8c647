"""What a step of the trainer is compared with: the same completions, without pruning.

    published    the authors' scheme in eager PyTorch: rows padded to the longest prompt and
                 completion, logits of every token; with images all rows of all three views
    TRL          the update of TRL's GRPOTrainer (text)

Both take the rollouts as the trainer sampled them. Their loss is the trainer's, on all of them.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cppo.benchmarks import eager
from cppo.benchmarks.experiments.step_models import noise
from cppo.model.images import image_arguments
from cppo.model.wrappers import unwrap
from cppo.records import Views
from cppo.train.batch import Batch
from cppo.train.progress import PhaseTimer
from cppo.train.trainer import CPPOTrainer
from cppo.train.views import perturbed_images

PADDED_TOKENS = 2048  # of a micro-batch, all of whose logits are there at once


def published(trainer: CPPOTrainer, batch: Batch) -> dict[str, float]:
    """Seconds of an update on all completions, by phase, and its loss."""
    policy, config = trainer.policy, trainer.config
    timer = PhaseTimer(device=batch.rollouts.input_ids.device)
    losses = []
    policy.model.train()
    for part in _parts(batch, min(config.max_tokens_per_microbatch, PADDED_TOKENS)):
        with timer("forward"), policy.autocast():
            outputs = eager.contrastive_loss(
                eager.view_stats,
                Views(*_logits(trainer, batch, part)),
                _responses(batch, batch.rollouts.input_ids)[part],
                batch.to_device(batch.advantages[part]),
                config.loss,
                mask=_responses(batch, batch.rollouts.completion_mask)[part],
            )
            loss = outputs["loss"] * (len(part) / len(batch.advantages))
        with timer("backward"):
            loss.backward()
        losses.append(loss.detach())
    with timer("optimizer"):
        policy.optimizer_step(0)
    seconds = timer.seconds
    loss_sum = float(torch.stack(losses).sum())
    return {**seconds, "update": sum(seconds.values()), "loss": loss_sum}


def _parts(batch: Batch, max_tokens: int) -> Iterator[Tensor]:
    """All completions, in micro-batches of as many tokens, padding included."""
    rows = max(1, max_tokens // batch.rollouts.input_ids.shape[1])
    yield from torch.arange(len(batch.advantages)).split(rows)


def _responses(batch: Batch, values: Tensor) -> Tensor:
    """The columns behind the prompts."""
    return values[:, batch.rollouts.prompts.input_ids.shape[1] :]


def _logits(trainer: CPPOTrainer, batch: Batch, part: Tensor) -> list[Tensor]:
    """(b, L, V) logits of the response tokens in every view that there is."""
    rollouts, base = batch.rollouts, unwrap(trainer.model)
    questions = batch.questions(part)
    shown = sorted(set(questions))
    views: list[Any] = [None]
    if rollouts.prompts.images is not None:
        own = rollouts.prompts.images.of(shown)
        views = [own, *perturbed_images(batch, shown, trainer.config, trainer.processor)]
    positions = rollouts.positions
    found = []
    for images in views:
        mask = rollouts.attention_mask[part].long()
        hidden = base.model(
            input_ids=rollouts.input_ids[part],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)
            if positions is None
            else positions[:, part],
            use_cache=False,
            **image_arguments(base, images, [shown.index(q) for q in questions]),
        ).last_hidden_state
        first = rollouts.prompts.input_ids.shape[1] - 1
        found.append(base.get_output_embeddings()(hidden[:, first:-1]))
    return found


def trl(trainer: CPPOTrainer, batch: Batch) -> dict[str, float]:
    """Seconds of TRL's update on all completions; leaves the model as it is (a rate of 1e-20)."""
    from datasets import Dataset
    from trl import GRPOConfig

    from cppo.benchmarks.experiments.trl_update import Replayed, Stopwatch

    rollouts, config = batch.rollouts, trainer.config
    total, device = len(rollouts.texts), rollouts.input_ids.device
    fitting = max(1, config.max_tokens_per_microbatch // rollouts.input_ids.shape[1])
    rows = max(n for n in range(1, fitting + 1) if total % n == 0)
    watch = Stopwatch(time.process_time if device.type == "cpu" else _synchronized)
    with tempfile.TemporaryDirectory() as folder:
        options = GRPOConfig(
            output_dir=folder,
            num_generations=rollouts.group_size,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=total // rows,
            max_completion_length=config.max_completion_tokens,
            max_steps=1,
            learning_rate=config.learning_rate,
            beta=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            bf16=config.precision == "bf16",
            gradient_checkpointing=config.gradient_checkpointing,
            use_cpu=device.type == "cpu",
        )
        replayed = Replayed(
            model=trainer.model,
            reward_funcs=noise,
            args=options,
            train_dataset=Dataset.from_list(
                [{"prompt": question.messages} for question in rollouts.prompts.questions]
            ),
            processing_class=trainer.processor,
            callbacks=[watch],
        )
        replayed.watch, replayed.completions = watch, _replay(batch)
        replayed.train()
    return {"update": watch.steps[0], "loss": math.nan}


def _synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _replay(batch: Batch) -> Any:
    """TRL's prompts, found again by their ids, and the completions of each in turn."""
    rollouts, prompts = batch.rollouts, batch.rollouts.prompts
    left: dict[tuple[int, ...], list[list[int]]] = {}
    for i, ids in enumerate(rollouts.completion_ids):
        question = i // rollouts.group_size
        prompt = prompts.input_ids[question][prompts.attention_mask[question]]
        left.setdefault(tuple(prompt.tolist()), []).append(ids)
    return lambda asked: [left[tuple(ids)].pop() for ids in asked]
