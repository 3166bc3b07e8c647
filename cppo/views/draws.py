"""Images and processor-ready patches under perturbations that are drawn for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cppo.questions.pixels import eight_bit
from cppo.views.patches import PatchLayout, images_from_patches, patches_from_images
from cppo.views.perturbations import check_values, draw_integer
from cppo.views.registry import Perturbation

_SEED_STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: neighbouring base seeds never meet


def image_seed(seed: int, index: int) -> int:
    """Return the seed of the index-th image under one base seed; index 0 gives the base seed.

    Args: seed: any whole number. index: position of the image, >= 0.
    Returns: a whole number in [0, 2^63), independent of how many images follow.
    """
    return (seed + index * _SEED_STEP) % 2**63


def perturb(
    images: Image.Image | Sequence[Image.Image],
    perturbations: Perturbation | Sequence[Perturbation],
    *,
    seed: int | Sequence[int],
) -> Any:
    """Return the PIL image(s), each under one perturbation drawn from `perturbations`.

    Args:
        images: one image or a sequence, of any mode that keeps its picture in 8 bits by the rules
            of `cppo.questions.pixels`, which also read a data set's images: L, RGB, LA and RGBA
            come back in their mode, 1, I and F as L, others as RGB, or RGBA if transparent. Alpha
            is kept unchanged. The orientation that EXIF states is applied.
        perturbations: one perturbation or a sequence to draw from with equal probability.
        seed: one per image, or a base seed from which image i takes `image_seed(seed, i)`.
    Returns: an upright image of the same size for an image, a list for a sequence; inputs stay
        unchanged.
    Raises: TypeError or ValueError for anything that is not such an image, an empty set of
        perturbations, a number of seeds that is not the number of images, or a perturbation that
        returns something else than as many pixels in [0, 1].
    """
    choices = _check_perturbations("perturb", perturbations)
    batch = [images] if isinstance(images, Image.Image) else list(images)
    seeds = _check_seeds("perturb", seed, len(batch))
    views = [
        _perturb_pil(im, choices, s, i) for i, (im, s) in enumerate(zip(batch, seeds, strict=True))
    ]
    return views[0] if isinstance(images, Image.Image) else views


def _check_perturbations(op: str, perturbations: Any) -> list[Perturbation]:
    choices = [perturbations] if callable(perturbations) else list(perturbations)
    if not choices or not all(callable(choice) for choice in choices):
        raise TypeError(
            f"cppo.{op}: perturbations must hold at least one perturbation (see "
            f"cppo.views.views_from_names for names), got {perturbations!r}"
        )
    return choices


def _check_seeds(op: str, seed: Any, count: int) -> list[int]:
    if isinstance(seed, (int, np.integer)):
        return [image_seed(int(seed), index) for index in range(count)]
    seeds = [int(value) % 2**63 for value in seed]
    if len(seeds) != count:
        raise ValueError(f"cppo.{op}: expected one seed per image, {count}, got {len(seeds)}")
    return seeds


def _draw(image: Tensor, choices: Sequence[Perturbation], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen = choices[draw_integer(generator, 0, len(choices) - 1)]
    view = chosen(image, generator)
    if not isinstance(view, Tensor) or view.shape != image.shape:
        got = tuple(view.shape) if isinstance(view, Tensor) else type(view).__name__
        raise ValueError(
            f"cppo.perturb: {chosen!r} must keep the shape {tuple(image.shape)}, returned {got}"
        )
    if view.device.type == "cpu":  # elsewhere looking would wait for the device
        check_values("perturb", f"what {chosen!r} returned", view)
    return view.to(image.dtype).clamp(0, 1)


def _perturb_pil(
    image: Image.Image, choices: Sequence[Perturbation], seed: int, index: int
) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"cppo.perturb: image {index} must be a PIL image, got {type(image).__name__}"
        )
    image = eight_bit(image, f"cppo.perturb: image {index}: ")
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colour = image if alpha is None else image.convert(image.mode[:-1])
    array = np.array(colour, dtype=np.float32) / 255
    pixels = torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)
    view = _draw(pixels, choices, seed).permute(1, 2, 0)
    bytes_ = (view * 255).round().to(torch.uint8).numpy()
    result = Image.fromarray(bytes_[:, :, 0] if bytes_.shape[2] == 1 else bytes_)
    if alpha is not None:
        result.putalpha(alpha)
    return result


def perturb_pixel_values(
    pixel_values: Tensor,
    image_grid_thw: Tensor,
    perturbations: Perturbation | Sequence[Perturbation],
    *,
    seeds: int | Sequence[int],
    image_processor: Any,
) -> Tensor:
    """Return processor-ready patches with each image under one perturbation drawn for it.

    Specification: un-patchify and de-normalise, perturb as `perturb` does, normalise and patchify.
    Args:
        pixel_values: (n_patches, 3 * temporal_patch_size * patch_size^2) floating point, any
            device; no gradients flow.
        image_grid_thw: (images, 3) whole numbers: 1, patch rows, patch columns of each image.
        perturbations: one perturbation or a sequence to draw from with equal probability.
        seeds: one per image, or a base seed from which image i takes `image_seed(seeds, i)`.
        image_processor: the Qwen2-VL / 2.5-VL / 3-VL image processor (or processor) that made the
            patches; its sizes, mean and std are read.
    Returns: a new tensor of the shape, dtype and device of `pixel_values`.
    Raises: TypeError or ValueError if patches, grid, seeds and processor disagree, or for pixels
        that are not finite or not in [0, 1] once de-normalised.
    """
    choices = _check_perturbations("perturb_pixel_values", perturbations)
    layout = PatchLayout.of(image_processor)
    images = images_from_patches(pixel_values, image_grid_thw, layout)
    seed_of = _check_seeds("perturb_pixel_values", seeds, len(images))
    # Half-precision patches round to a little outside [0, 1]; far outside, the processor is wrong.
    flat = torch.cat([image.flatten() for image in images])
    check_values("perturb_pixel_values", "pixel_values (de-normalised)", flat, slack=0.05)
    views = [_draw(image.clamp(0, 1), choices, s) for image, s in zip(images, seed_of, strict=True)]
    return patches_from_images(views, layout).to(pixel_values.dtype)
