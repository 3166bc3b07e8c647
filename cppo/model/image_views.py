"""The images of questions under perturbations, for any model's processor.

Patches that a processor has cut are perturbed as they are where that is exact: on the device, all
at once. For every other processor the pictures are perturbed and prepared anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from cppo.model.images import ImageBatch, Prepared
from cppo.model.prompts import PromptEncoder, Prompts
from cppo.questions import Question
from cppo.views import (
    Perturbation,
    cuts_patches,
    differ_in_pixels_alone,
    perturb_pixel_values,
    prepared_views,
)

MadeViews = dict[tuple[int, ...], tuple[Question, Prepared]]
"""By its images' seeds, a question and a view of its images, on the CPU."""


def views_need_pictures(processor: Any) -> bool:
    """Whether views are made of a question's pictures, rather than of what was prepared of them."""
    return hasattr(processor, "image_processor") and not cuts_patches(processor.image_processor)


def views_of(
    prompts: Prompts,
    questions: Sequence[int],
    perturbations: Sequence[Perturbation],
    *,
    seed_of: Callable[[int, int], int],
    processor: Any,
    chat_template_kwargs: Mapping[str, Any] = {},
    made: MadeViews | None = None,
) -> ImageBatch:
    """The images of some questions, each under one perturbation drawn for it.

    Args:
        seed_of: of a question and the number of its image.
        made: views that were made before; those made here are added. Only pictures need it.
    Returns: what has the tokens and shapes of `prompts.images`, on their device.
    Raises: ValueError for a view that has other image tokens than its question.
    """
    assert prompts.images is not None
    images = prompts.images.of(questions)
    seeds = [
        [seed_of(question, number) for number in range(count)]
        for question, count in zip(questions, images.per_question, strict=True)
    ]
    image_processor = processor.image_processor
    if views_need_pictures(processor):
        encoder = PromptEncoder(processor, chat_template_kwargs)
        made = {} if made is None else made
        prepared = [
            _of_pictures(encoder, prompts, question, perturbations, own, made, image_processor)
            if own
            else {}
            for question, own in zip(questions, seeds, strict=True)
        ]
    else:
        prepared = _of_patches(images, perturbations, seeds, image_processor)
    return ImageBatch(tuple(prepared), images.per_question, images.tokens)


def _of_patches(
    images: ImageBatch,
    perturbations: Sequence[Perturbation],
    seeds: Sequence[Sequence[int]],
    image_processor: Any,
) -> list[Prepared]:
    pixels, grid = images.joined("pixel_values"), images.joined("image_grid_thw")
    assert pixels is not None and grid is not None
    each = [seed for own in seeds for seed in own]
    views = perturb_pixel_values(
        pixels, grid, perturbations, seeds=each, image_processor=image_processor
    )
    sizes = [len(own["pixel_values"]) if own else 0 for own in images.prepared]
    return [
        {**own, "pixel_values": view} if own else {}
        for own, view in zip(images.prepared, views.split(sizes), strict=True)
    ]


def _of_pictures(
    encoder: PromptEncoder,
    prompts: Prompts,
    number: int,
    perturbations: Sequence[Perturbation],
    seeds: Sequence[int],
    made: MadeViews,
    image_processor: Any,
) -> Prepared:
    assert prompts.images is not None
    question, own = prompts.questions[number], prompts.images.prepared[number]
    known = made.get(tuple(seeds))
    if known is None or known[0] is not question:
        ids = prompts.input_ids[number][prompts.attention_mask[number]].tolist()

        def prepare(pictures: list[Image.Image]) -> Prepared | None:
            processed = encoder.processed(question._replace(images=pictures))
            view = {name: torch.as_tensor(processed[name]) for name in own}
            has_tokens = processed["input_ids"][0].tolist() == ids
            return view if has_tokens and differ_in_pixels_alone(view, own) else None

        view = prepared_views(
            question.images,
            perturbations,
            seeds=seeds,
            image_processor=image_processor,
            prepare=prepare,
        )
        known = made[tuple(seeds)] = question, view
    return {name: value.to(own[name].device) for name, value in known[1].items()}
