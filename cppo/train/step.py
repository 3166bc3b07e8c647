"""One update's arithmetic: from scored rollouts to a loss, in the order of the papers.

rewards -> advantages -> prune -> pack -> forward the views -> token statistics
-> perception mask -> loss
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cppo.config import CPPOConfig, LossConfig
from cppo.model.forward import ImageBatch, lm_head
from cppo.model.packed import packed_hidden
from cppo.model.shared_prompts import share_prompts
from cppo.ops.loss import linear_cppo_loss
from cppo.ops.pack import pack_completions, plan_microbatches
from cppo.ops.token_stats import linear_token_stats
from cppo.packed_batch import PackedBatch
from cppo.records import LossOutput, NumItems, Views
from cppo.rollouts.rollout import Rollouts
from cppo.seeds import seed_from
from cppo.train.journal import Once, now
from cppo.views import perturb_pixel_values, views_from_names


@dataclass(frozen=True)
class Batch:
    """Scored rollouts on which an update runs; every per-row tensor is (B, ...) of the rollouts.

    Args:
        rollouts: all completions, kept or not.
        advantages: (B,) fp32.
        kept: (K,) int64, the completions that the update runs on.
        places: (K,) int64, where they stand among the kept completions of all processes.
        suppressed: token ids that are never sampled.
        seed: of the perturbations of this batch.
        per_token: old and reference log-probabilities (B, L), where they are needed.
        share_prompts: run a question's prompt once for all its completions of a micro-batch.
    """

    rollouts: Rollouts
    advantages: Tensor
    kept: Tensor
    suppressed: tuple[int, ...] = ()
    seed: int = 0
    per_token: dict[str, Tensor] = field(default_factory=dict)
    share_prompts: bool = False
    places: Tensor | None = None

    def dealt(self, parts: int) -> list[Tensor]:
        """The kept completions dealt like cards, so that every part sees every question.

        By their places, so that a part is the same completions on any number of processes.
        """
        places = torch.arange(len(self.kept)) if self.places is None else self.places
        places = places.to(self.kept.device)
        return [self.kept[places % parts == part] for part in range(parts)]

    def pack(self, rows: Tensor) -> PackedBatch:
        """Some completions as one padding-free stream."""
        return pack_completions(
            self.rollouts.input_ids,
            self.rollouts.attention_mask,
            self.rollouts.completion_mask,
            rows,
            per_token=self.per_token,
        )

    def lengths(self, rows: Tensor) -> list[int]:
        """Prompt and response tokens of some completions."""
        return self.rollouts.attention_mask[rows].sum(1).tolist()

    def computed_tokens(self, rows: Tensor) -> int:
        """Tokens that the forward of a micro-batch runs: a shared prompt counts once."""
        return sum(sum(self._units(own, sys.maxsize)[1]) for own in self._by_sight(rows))

    def microbatches(self, rows: Tensor, max_tokens: int) -> list[Tensor]:
        """`rows` in parts of at most `max_tokens` tokens; images in all of a part or in none."""
        parts = []
        for own in self._by_sight(rows):
            units, lengths = self._units(own, max_tokens)
            # A completion longer than the budget runs rather than not at all.
            plan = plan_microbatches(lengths, max([max_tokens, *lengths]))
            parts += [torch.cat([units[i] for i in part]) for part in plan]
        return parts

    def _units(self, rows: Tensor, max_tokens: int) -> tuple[list[Tensor], list[int]]:
        """What stays together in a micro-batch, and its tokens.

        A completion by itself; but of a question with images, and where completions share their
        prompt, as many as fit, so that images and prompt are computed once.
        """
        lengths = self.lengths(rows)
        images = self.rollouts.prompts.images
        questions = (rows // self.rollouts.group_size).tolist()
        sees = images is not None and bool(questions) and images.per_question[questions[0]] > 0
        if not (self.share_prompts or sees):
            return list(rows.split(1)), lengths
        prompts = (self.rollouts.attention_mask & ~self.rollouts.completion_mask)[rows].sum(1)
        repeated = prompts.tolist() if self.share_prompts else [0] * len(lengths)
        starts: list[int] = []
        totals: list[int] = []
        for i, (length, prompt) in enumerate(zip(lengths, repeated, strict=True)):
            more = length - prompt
            if i and questions[i] == questions[i - 1] and totals[-1] + more <= max_tokens:
                totals[-1] += more
            else:
                starts.append(i)
                totals.append(length)
        return list(rows.tensor_split(starts[1:])), totals

    def _by_sight(self, rows: Tensor) -> list[Tensor]:
        """Completions with images and those without.

        Without an image the views are all the same, and the sign of their entropy shift, which
        selects perception tokens, would be that of a rounding error.
        """
        images = self.rollouts.prompts.images
        if images is None:
            return [rows]
        has_images = torch.tensor(images.per_question, device=rows.device) > 0
        sees = has_images[rows // self.rollouts.group_size]
        return [own for own in (rows[sees], rows[~sees]) if len(own)]

    def looking(self, rows: Tensor, loss: LossConfig) -> Tensor:
        """Those of the completions `rows` whose perturbed views the loss needs.

        Completions with A <= 0 select no perception token when gating is on, so their perturbed
        views are never run: the loss and its gradients are the same, the work is not.
        """
        images = self.rollouts.prompts.images
        if loss.cpl_coef == 0 or images is None:
            return rows[:0]
        has_images = torch.tensor(images.per_question, device=rows.device) > 0
        looks = has_images[rows // self.rollouts.group_size]
        return rows[looks & (self.advantages[rows] > 0)] if loss.gating else rows[looks]

    def counts(self, rows: Tensor) -> list[int]:
        """Completions and response tokens of `rows`, the denominators of the loss."""
        return [len(rows), int(self.rollouts.completion_mask[rows].sum())]


def _hidden(
    model: nn.Module, batch: Batch, packed: PackedBatch, images: ImageBatch | None, shown: list[int]
) -> Tensor:
    """Hidden states of a stream whose completions see `images` of the questions `shown`."""
    positions = batch.rollouts.positions
    if positions is not None:
        positions = positions.flatten(1)[:, packed.token_index]
    group_size = batch.rollouts.group_size
    questions = [row // group_size for row in packed.kept.tolist()]
    image_of = [shown.index(question) for question in questions]
    shared = share_prompts(packed, questions) if batch.share_prompts else None
    return packed_hidden(model, packed, positions, images, image_of, shared)


def _images_of(batch: Batch, rows: Tensor) -> tuple[ImageBatch | None, list[int]]:
    """The images that some completions look at, and the questions they belong to."""
    questions = sorted({row // batch.rollouts.group_size for row in rows.tolist()})
    images = batch.rollouts.prompts.images
    return (None if images is None else images.of(questions)), questions


def perturbed_images(
    batch: Batch, images: ImageBatch, questions: Sequence[int], config: CPPOConfig, processor: Any
) -> tuple[ImageBatch, ImageBatch]:
    """The positive and the negative view of the images of some questions.

    A question's perturbation depends on the batch's seed and on the question alone, not on the
    micro-batch it is in.
    """

    def view(name: str, perturbations: Sequence[Any]) -> ImageBatch:
        seeds = [
            seed_from(batch.seed, name, question, number)
            for question, count in zip(questions, images.per_question, strict=True)
            for number in range(count)
        ]
        pixel_values = perturb_pixel_values(
            images.pixel_values,
            images.image_grid_thw,
            views_from_names(list(perturbations)),
            seeds=seeds,
            image_processor=processor.image_processor,
        )
        return ImageBatch(pixel_values, images.image_grid_thw, images.per_question)

    return view("positive", config.positive_views), view("negative", config.negative_views)


def forward_views(
    model: nn.Module, batch: Batch, rows: Tensor, config: CPPOConfig, processor: Any
) -> tuple[Views, PackedBatch]:
    """Hidden states of the completions `rows`; the perturbed views of those that look alone."""
    packed = batch.pack(rows)
    images, questions = _images_of(batch, rows)
    anchor = _hidden(model, batch, packed, images, questions)
    looking = batch.looking(rows, config.loss)
    if len(looking) == 0:
        return Views(anchor), packed
    looking_packed = batch.pack(looking)
    images, questions = _images_of(batch, looking)
    assert images is not None
    positive, negative = perturbed_images(batch, images, questions, config, processor)
    return (
        Views(
            anchor,
            _hidden(model, batch, looking_packed, positive, questions),
            _hidden(model, batch, looking_packed, negative, questions),
        ),
        packed,
    )


def microbatch_loss(
    model: nn.Module,
    batch: Batch,
    rows: Tensor,
    num_items: NumItems,
    config: CPPOConfig,
    processor: Any,
) -> LossOutput:
    """The part of the loss that the completions `rows` contribute; parts sum to the whole.

    `rows` are a part of `batch.microbatches`.
    """
    hidden, packed = forward_views(model, batch, rows, config, processor)
    head = lm_head(model, batch.suppressed, hidden.anchor.dtype)
    # "dr_grpo" divides by one length in every part of a batch.
    max_length = config.loss.max_length or config.max_completion_tokens
    return linear_cppo_loss(
        hidden,
        targets=packed.targets,
        advantages=batch.advantages[rows],
        **head._asdict(),
        old_logps=packed.per_token.get("old_logps"),
        ref_logps=packed.per_token.get("ref_logps"),
        cu_seqlens=packed.row_cu_seqlens,
        num_items=num_items,
        config=dataclasses.replace(config.loss, max_length=max_length),
    )


@torch.no_grad()
def token_logps(model: nn.Module, batch: Batch, config: CPPOConfig, once: Once = now) -> Tensor:
    """Log-probabilities of the kept completions' response tokens: (B, L) fp32, zero elsewhere.

    Args:
        once: runs a micro-batch, or knows what it came to (`cppo.train.journal`).
    """
    logps = torch.zeros(batch.rollouts.input_ids.shape, device=batch.kept.device)
    for rows in batch.microbatches(batch.kept, config.max_tokens_per_microbatch):
        packed = batch.pack(rows)

        def compute(rows: Tensor = rows, packed: PackedBatch = packed) -> Tensor:
            images, questions = _images_of(batch, rows)
            hidden = _hidden(model, batch, packed, images, questions)
            return linear_token_stats(
                hidden,
                targets=packed.targets,
                **lm_head(model, batch.suppressed, hidden.dtype)._asdict(),
                temperature=config.loss.temperature,
            ).logps.float()

        logps += packed.unpack(once(compute).to(logps.device))
    return logps
