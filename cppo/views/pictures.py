"""Perturbed pictures for any image processor: perturbed at the size at which the model sees them.

A perturbation of 14 pixels must be one of 14 pixels of what the model gets, not of a photograph
that is scaled down afterwards. So a picture is scaled to that size first, perturbed there, and then
prepared by the model's own processor, which finds nothing left to scale.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cppo.questions.pixels import over_white
from cppo.views.draws import perturb
from cppo.views.patches import PatchLayout, images_from_patches
from cppo.views.registry import Perturbation

_T = TypeVar("_T")
# By a processor, its settings, which its owner may change, and the size of a picture.
_SIZES: WeakKeyDictionary[Any, dict[tuple[str, int, int], tuple[int, int]]] = WeakKeyDictionary()
_CUTS_PATCHES: WeakKeyDictionary[Any, dict[str, bool]] = WeakKeyDictionary()


def seen_size(image_processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height to which a processor scales a picture of this width and height.

    Where it is scaled several times, for tiles and for a small copy of the whole, the largest.
    """
    known, key = _SIZES.setdefault(image_processor, {}), (_settings(image_processor), *size)
    if key not in known:
        found: list[tuple[int, int]] = []
        # Every processor of transformers scales by this method of its own.
        probe = copy.copy(image_processor)
        probe.resize = _Noted(image_processor.resize, size, found)
        probe(images=[Image.new("RGB", size)], return_tensors="np")
        known[key] = max(found, key=lambda own: own[0] * own[1], default=size)
    return known[key]


def _settings(image_processor: Any) -> str:
    return repr(vars(image_processor))


class _Noted:
    """A processor's `resize`, of which is noted to what it scales whole pictures."""

    def __init__(self, plain: Any, size: tuple[int, int], found: list[tuple[int, int]]) -> None:
        self._plain, self._size, self._found = plain, size, found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # By position, or under one of two names: processors do all of it.
        image = args[0] if args else kwargs.get("image", kwargs.get("images"))
        resized = self._plain(*args, **kwargs)
        if _size(image) == self._size:
            self._found.append(_size(resized))
        return resized


def _size(image: Any) -> tuple[int, int]:
    """Width and height of an array or tensor (..., channels, height, width)."""
    height, width = np.shape(image)[-2:]
    return int(width), int(height)


def as_seen(image: Image.Image, image_processor: Any) -> Image.Image:
    """The picture as the model gets it: its colours, its size, and no more upright than it is."""
    if getattr(image_processor, "do_convert_rgb", None) is not False:
        # As transformers does it, whose processors do not look at EXIF. A note there that is left
        # would have `perturb` turn the picture.
        image = over_white(image.convert("RGBA" if image.has_transparency_data else "RGB"))
        image = Image.fromarray(np.asarray(image))
    size = seen_size(image_processor, image.size)
    if size == image.size:
        return image
    resample = getattr(image_processor, "resample", None)
    return image.resize(size, Image.Resampling.BICUBIC if resample is None else resample)


def prepared_views(
    images: Sequence[Image.Image],
    perturbations: Sequence[Perturbation],
    *,
    seeds: Sequence[int],
    image_processor: Any,
    prepare: Callable[[list[Image.Image]], _T | None],
) -> _T:
    """Return what the processor makes of one prompt's pictures, each under one perturbation.

    Args:
        images: of one prompt, in their order.
        seeds: one per image, as in `cppo.perturb`.
        prepare: runs the model's processor on the prompt with other pictures. None: they have not
            the image tokens of the prompt's own.
    Raises: ValueError if the views have other image tokens, even at the size of the originals.
    """
    seen = [as_seen(image, image_processor) for image in images]
    views = perturb(seen, perturbations, seed=seeds)
    result = prepare(views)
    if result is None:
        # A processor may look at the shape before it scales.
        views = [
            view.resize(image.size, Image.Resampling.BICUBIC)
            for view, image in zip(views, images, strict=True)
        ]
        result = prepare(views)
    if result is None:
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        raise ValueError(
            "cppo.perturb: an image processor must cut a perturbed image into as many tokens as "
            f"the original, {type(image_processor).__name__} does not ({sizes})"
        )
    return result


def differ_in_pixels_alone(view: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether a view has the tokens, sizes, masks and tiles of its question's own images.

    Args: view, own: what a processor returned, by name; what is no tensor is not compared.
    """
    # Some processors have pixels twice: of the whole and of its tiles.
    return all(
        view[name].shape == x.shape and ("pixel_values" in name or torch.equal(view[name], x.cpu()))
        for name, x in own.items()
        if isinstance(x, Tensor)
    )


def cuts_patches(image_processor: Any) -> bool:
    """Whether a processor's output is patches that `cppo.perturb_pixel_values` reads back exactly.

    It is found out with a small picture, once for a processor and its settings.
    """
    known, key = _CUTS_PATCHES.setdefault(image_processor, {}), _settings(image_processor)
    if key not in known:
        try:
            known[key] = _reads_back(image_processor)
        except Exception:  # another layout may fail in any way
            known[key] = False
    return known[key]


def _reads_back(image_processor: Any) -> bool:
    layout = PatchLayout.of(image_processor)
    side = layout.patch_size * layout.merge_size
    noise = np.random.default_rng(0).integers(0, 256, (2 * side, 3 * side, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    found = image_processor(images=[picture], return_tensors="pt")
    if set(found) != {"pixel_values", "image_grid_thw"}:
        return False
    (image,) = images_from_patches(found["pixel_values"], found["image_grid_thw"], layout)
    seen = np.asarray(as_seen(picture, image_processor), dtype=np.float32) / 255
    # Two libraries scale a picture up to a rounding; another layout is another picture.
    return float(np.abs(image.permute(1, 2, 0).numpy() - seen).mean()) < 0.02
