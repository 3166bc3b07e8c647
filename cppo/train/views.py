"""The forward of a batch's completions: under their own images and under perturbed ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cppo.model.forward import Stream, lm_head
from cppo.model.image_views import views_of
from cppo.model.images import ImageBatch
from cppo.model.shared_prompts import share_prompts
from cppo.model.ways import hidden_states
from cppo.ops.packed_batch import PackedBatch
from cppo.ops.token_stats import linear_token_stats
from cppo.options.trainer import CPPOConfig
from cppo.records import Views
from cppo.seeds import seed_from
from cppo.train.batch import Batch
from cppo.train.journal import Once, now
from cppo.views import views_from_names


def forward_views(
    model: nn.Module, batch: Batch, completions: Tensor, config: CPPOConfig, processor: Any
) -> tuple[Views, PackedBatch]:
    """Hidden states of the completions, and of the gated ones under both perturbed views.

    Returns: the views, and the stream of the anchor.
    """
    packed = batch.pack(completions)
    anchor = anchor_hidden(model, batch, packed)
    gated = batch.gated(completions, config.loss)
    if len(gated) == 0:
        return Views(anchor), packed
    _, questions = _images_of(batch, gated)
    perturbed = perturbed_images(batch, questions, config, processor)
    stream = batch.pack(gated)
    positive, negative = (_hidden(model, batch, stream, view, questions) for view in perturbed)
    return Views(anchor, positive, negative), packed


def anchor_hidden(model: nn.Module, batch: Batch, packed: PackedBatch) -> Tensor:
    """Hidden states of a stream of the batch's completions, under their own images."""
    return _hidden(model, batch, packed, *_images_of(batch, packed.kept))


def removed_hidden(
    model: nn.Module, batch: Batch, packed: PackedBatch, config: CPPOConfig, processor: Any
) -> Tensor:
    """Hidden states of a stream of completions with images, under the removing view of these."""
    _, questions = _images_of(batch, packed.kept)
    view = _perturbed(batch, questions, config, processor, "negative")
    return _hidden(model, batch, packed, view, questions)


def token_logps(model: nn.Module, batch: Batch, config: CPPOConfig, once: Once = now) -> Tensor:
    """Log-probabilities of the kept completions' response tokens: (B, L) fp32, zero elsewhere.

    Args:
        once: runs a micro-batch, or returns what it gave before (`cppo.train.journal`).
    """
    return logps_of(model, batch, batch.kept, config, once, partial(anchor_hidden, model, batch))


@torch.no_grad()
def logps_of(
    model: nn.Module,
    batch: Batch,
    chosen: Tensor,
    config: CPPOConfig,
    once: Once,
    hidden_of: Callable[[PackedBatch], Tensor],
) -> Tensor:
    """As `token_logps`, of the completions `chosen`, from the hidden states of a stream."""
    logps = torch.zeros(batch.rollouts.input_ids.shape, device=batch.rollouts.input_ids.device)
    for completions in batch.microbatches(chosen, config.max_tokens_per_microbatch):
        packed = batch.pack(completions)

        def compute(packed: PackedBatch = packed) -> Tensor:
            hidden = hidden_of(packed)
            return linear_token_stats(
                hidden,
                targets=packed.targets,
                **lm_head(model, batch.suppressed, hidden.dtype)._asdict(),
                temperature=config.loss.temperature,
            ).logps.float()

        logps += packed.unpack(once(compute).to(logps.device))
    return logps


def perturbed_images(
    batch: Batch, questions: Sequence[int], config: CPPOConfig, processor: Any
) -> tuple[ImageBatch, ImageBatch]:
    """The positive and the negative view of the images of some questions."""
    given = batch, questions, config, processor
    return _perturbed(*given, "positive"), _perturbed(*given, "negative")


def _perturbed(
    batch: Batch, questions: Sequence[int], config: CPPOConfig, processor: Any, name: str
) -> ImageBatch:
    """A view of the images of some questions: what is drawn depends on the batch's seed and on the
    question, not on the micro-batch."""
    chosen = config.positive_views if name == "positive" else config.negative_views
    return views_of(
        batch.rollouts.prompts,
        questions,
        views_from_names(list(chosen)),
        seed_of=partial(seed_from, batch.seed, name),
        processor=processor,
        chat_template_kwargs=config.chat_template_kwargs or {},
        made=batch.views,
    )


def _images_of(batch: Batch, completions: Tensor) -> tuple[ImageBatch | None, list[int]]:
    """The images of some completions, and the questions that these images belong to."""
    questions = sorted(set(batch.questions(completions)))
    images = batch.rollouts.prompts.images
    return (None if images is None else images.of(questions)), questions


def _hidden(
    model: nn.Module,
    batch: Batch,
    packed: PackedBatch,
    images: ImageBatch | None,
    image_questions: list[int],
) -> Tensor:
    """Hidden states of a stream, under the images of the questions `image_questions`."""
    positions = batch.rollouts.positions
    if positions is not None:
        positions = positions.flatten(1)[:, packed.token_index]
    questions = batch.questions(packed.kept)
    image_of = [image_questions.index(question) for question in questions]
    shared = None
    if batch.share_prompts:
        lengths = batch.lengths(packed.kept), batch.response_lengths(packed.kept)
        shared = share_prompts(packed, questions, lengths)
    return hidden_states(model, Stream(packed, positions, images, image_of, shared))
