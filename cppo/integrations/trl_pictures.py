"""Perturbed pictures in TRL, for every model whose processor does not cut images into patches.

A rollout holds what the processor made of its images, which says neither what they showed nor how
they were scaled. So the pictures of a question go along with its rows. Its views are made when they
are first looked at, once for all its completions and iterations: the pictures are perturbed, and
TRL's call of the processor is repeated for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cppo.integrations.trl_rows import Batch
from cppo.seeds import seed_from
from cppo.views import (
    cuts_patches,
    differ_in_pixels_alone,
    prepared_views,
    views_from_names,
)


class Pictures:
    """The pictures of a question in a rollout, and the views of them that were made.

    Args:
        text: the prompt, as the processor is given it.
        seed: of the question.
    """

    def __init__(self, text: str, images: Sequence[Image.Image], seed: int) -> None:
        self.text, self.images, self.seed = text, list(images), seed
        self._views: dict[str, Tensor] = {}

    def shows(self, text: str, images: Sequence[Image.Image], seed: int) -> bool:
        """Whether this is the same question."""
        return (self.text, self.seed) == (text, seed) and self.images == list(images)

    def view(self, trainer: Any, name: str) -> Tensor:
        """The pixel values of the pictures under the "positive" or the "negative" view.

        Raises: ValueError if anything else of them is not as the question's own.
        """
        if name not in self._views:
            processor = trainer.processing_class
            own = _prepared(processor, self.text, self.images)

            def prepare(images: list[Image.Image]) -> Tensor | None:
                view = _prepared(processor, self.text, images)
                pixels: Tensor = view["pixel_values"]
                return pixels if differ_in_pixels_alone(view, own) else None

            self._views[name] = prepared_views(
                self.images,
                views_from_names(getattr(trainer.cppo, f"{name}_views")),
                seeds=[seed_from(name, self.seed, number) for number in range(len(self.images))],
                image_processor=processor.image_processor,
                prepare=prepare,
            )
        return self._views[name]


def _prepared(processor: Any, text: str, images: list[Image.Image]) -> Mapping[str, Tensor]:
    """As TRL calls the processor, which may change a list that it is given."""
    found: Mapping[str, Tensor] = processor(images=[list(images)], text=[text], return_tensors="pt")
    return found


def pictures_of(
    trainer: Any, prompts: Sequence[Any] | None, rollout: Batch
) -> list[Pictures | None] | None:
    """The pictures of each row; rows of the same question share them.

    Args: prompts: those of the rollout, messages with their images; None if nobody saw them.
    Returns: None where they are not needed: without images, or with those cut into patches.
    Raises: ValueError if the rows have images that are not among those of the prompts.
    """
    counts = rollout.get("num_images")
    image_processor = trainer.processing_class.image_processor
    if rollout.get("pixel_values") is None or not counts or cuts_patches(image_processor):
        return None
    from trl.data_utils import apply_chat_template

    rows: list[Pictures | None] = []
    for row, (count, seed) in enumerate(zip(counts, rollout["cppo_seed"].tolist(), strict=True)):
        prompt = [] if prompts is None else prompts[row]
        images = _images_in(prompt)
        if count != len(images):
            raise ValueError(
                "cppo.integrations.trl: contrastive perception (and VPPO, PAPO) perturbs the "
                f"pictures of prompts and has {type(image_processor).__name__} prepare them anew; "
                f"a completion has {count} images, of which its prompt has {len(images)} (tools "
                "may bring images only to models of Qwen-VL's patches). "
                "Set loss=LossConfig(cpl_coef=0)"
            )
        if not images:
            rows.append(None)
            continue
        kwargs = getattr(trainer, "chat_template_kwargs", None) or {}
        tools = getattr(trainer, "tools", None)
        text = apply_chat_template(
            {"prompt": prompt}, trainer.processing_class, tools=tools, **kwargs
        )["prompt"]
        known = rows[-1] if rows else None
        if known is None or not known.shows(text, images, seed):
            known = Pictures(text, images, seed)
        rows.append(known)
    return rows


def _images_in(prompt: Any) -> list[Image.Image]:
    parts = [
        part
        for message in (prompt if isinstance(prompt, list) else [])
        if isinstance(message["content"], list)
        for part in message["content"]
    ]
    images = [part["image"] for part in parts if part["type"] == "image"]
    for image in images:
        if not isinstance(image, Image.Image):
            raise ValueError(
                "cppo.integrations.trl: contrastive perception (and VPPO, PAPO) perturbs PIL "
                f"images, got an image as {type(image).__name__}"
            )
    return images


def pixels_of(trainer: Any, rows: Batch, pictures: Sequence[Pictures | None], name: str) -> Tensor:
    """The pixel values of a forward's rows under a view, in the shape of their own.

    Args:
        rows: arguments of a forward, with images.
        pictures: of each row.
    """
    from trl.trainer.utils import split_pixel_values_by_grid

    own = split_pixel_values_by_grid({k: v for k, v in rows.items() if v is not None})[
        "pixel_values"
    ]
    # A list has a tensor of all images of a row, a tensor has one entry per row.
    listed = isinstance(own, list)
    views = []
    for pixels, shown in zip(own, pictures, strict=True):
        view = pixels if shown is None else shown.view(trainer, name).to(pixels)
        views.append(_padded(view if listed or shown is None else view[0], pixels))
    return torch.cat(views) if listed else torch.stack(views)


def _padded(view: Tensor, own: Tensor) -> Tensor:
    """A question's pixels, padded as those of its rows were to the largest of their batch."""
    missing = [wanted - size for wanted, size in zip(own.shape, view.shape, strict=True)]
    return F.pad(view, [side for more in reversed(missing) for side in (0, more)])
