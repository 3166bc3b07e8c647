"""The patch layout of the Qwen-VL image processors: images out of `pixel_values` and back in.

    pixel_values (n_patches, 3 * T * P * P)  <->  images (3, H, W) in [0, 1]

Patches are ordered by token (merge_size x merge_size patches), tokens row by row; a patch holds
channel, T equal copies of the image along time, row, column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PatchLayout(NamedTuple):
    """How a Qwen-family image processor cuts and normalises an image.

    Fields: patch_size (pixels), merge_size (patches per token side), temporal_patch_size (copies of
    the image in a patch), mean and std (per channel, of values in [0, scale]), scale (the value of
    a white pixel after rescaling).
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float

    @classmethod
    def of(cls, image_processor: Any) -> PatchLayout:
        """Read the layout off an image processor, or off a processor that holds one.

        Raises: TypeError if it is not of the Qwen2-VL kind (patch, merge and temporal patch size).
        """
        source = getattr(image_processor, "image_processor", image_processor)
        sizes: list[Any] = [
            getattr(source, name, None)
            for name in ("patch_size", "merge_size", "temporal_patch_size")
        ]
        if not all(isinstance(size, int) for size in sizes):
            raise TypeError(
                "cppo.perturb_pixel_values: image_processor must cut patches as Qwen2-VL's does "
                f"(patch_size, merge_size, temporal_patch_size), got {type(source).__name__}"
            )
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if getattr(source, "do_normalize", True):
            mean, std = (_per_channel(source, name) for name in ("image_mean", "image_std"))
        rescaled = getattr(source, "do_rescale", True)
        scale = 255 * float(getattr(source, "rescale_factor", 1 / 255)) if rescaled else 255.0
        return cls(sizes[0], sizes[1], sizes[2], mean, std, scale)


def _per_channel(source: Any, name: str) -> tuple[float, float, float]:
    value = getattr(source, name)
    red, green, blue = [value] * 3 if isinstance(value, (int, float)) else value
    return float(red), float(green), float(blue)


def images_from_patches(
    pixel_values: Tensor, image_grid_thw: Tensor, layout: PatchLayout
) -> list[Tensor]:
    """Return the images (3, H, W) in [0, 1] whose normalised patches `pixel_values` holds.

    Specification: the inverse of Qwen2VLImageProcessor's patchify, normalise and rescale.
    Args:
        pixel_values: (n_patches, 3 * temporal_patch_size * patch_size^2) floating point.
        image_grid_thw: (images, 3) whole numbers: frames (1), patch rows, patch columns.
        layout: the processor's layout.
    Returns: a list of fp32 (or fp64) tensors on the device of `pixel_values`, not clamped.
    Raises: TypeError or ValueError if patches, grid and layout disagree.
    """
    grids = _check_patches(pixel_values, image_grid_thw, layout)
    merge, patch, copies = layout.merge_size, layout.patch_size, layout.temporal_patch_size
    pixels = pixel_values.detach()
    pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    mean, std = (pixels.new_tensor(value)[:, None, None] for value in (layout.mean, layout.std))
    images = []
    counts = [height * width for _, height, width in grids]
    for (_, height, width), block in zip(grids, pixels.split(counts), strict=True):
        blocks = block.reshape(
            height // merge, width // merge, merge, merge, 3, copies, patch, patch
        )[:, :, :, :, :, 0]  # the copies along time are equal
        image = blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height * patch, width * patch)
        images.append((image * std + mean) / layout.scale)
    return images


def patches_from_images(images: Sequence[Tensor], layout: PatchLayout) -> Tensor:
    """Return the normalised patches of images, as Qwen2VLImageProcessor lays them out.

    Args:
        images: (3, H, W) in [0, 1]; H and W multiples of patch_size * merge_size.
        layout: the processor's layout.
    Returns: (n_patches, 3 * temporal_patch_size * patch_size^2) in the dtype of the images.
    Raises: ValueError for no images and for a size that is not a multiple.
    """
    if not images:
        raise ValueError("cppo.patches_from_images: expected at least one image, got none")
    merge, patch, copies = layout.merge_size, layout.patch_size, layout.temporal_patch_size
    mean, std = (images[0].new_tensor(v)[:, None, None] for v in (layout.mean, layout.std))
    result = []
    for index, image in enumerate(images):
        if (
            image.dim() != 3
            or image.shape[0] != 3
            or any(n % (patch * merge) for n in image.shape[1:])
        ):
            raise ValueError(
                f"cppo.patches_from_images: image {index} must be (3, H, W) in multiples of "
                f"{patch * merge}, got {tuple(image.shape)}"
            )
        rows, columns = image.shape[1] // patch // merge, image.shape[2] // patch // merge
        blocks = (image * layout.scale - mean) / std
        blocks = blocks.reshape(3, rows, merge, patch, columns, merge, patch)
        blocks = blocks.permute(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
        blocks = blocks.expand(-1, -1, -1, -1, -1, copies, -1, -1)
        result.append(blocks.reshape(rows * columns * merge**2, -1))
    return torch.cat(result)


def _check_patches(
    pixel_values: Tensor, image_grid_thw: Tensor, layout: PatchLayout
) -> list[list[int]]:
    op = "cppo.perturb_pixel_values"
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        raise TypeError(f"{op}: pixel_values must be a floating point tensor")
    features = 3 * layout.temporal_patch_size * layout.patch_size**2
    if pixel_values.dim() != 2 or pixel_values.shape[1] != features:
        raise ValueError(
            f"{op}: pixel_values must be (n_patches, 3 * {layout.temporal_patch_size} * "
            f"{layout.patch_size}^2 = {features}), got {tuple(pixel_values.shape)}"
        )
    if not isinstance(image_grid_thw, Tensor) or image_grid_thw.is_floating_point():
        raise TypeError(f"{op}: image_grid_thw must be a tensor of whole numbers (images, 3)")
    if image_grid_thw.dim() != 2 or image_grid_thw.shape[1] != 3 or not len(image_grid_thw):
        raise ValueError(
            f"{op}: image_grid_thw must be (images, 3) with at least one image, "
            f"got {tuple(image_grid_thw.shape)}"
        )
    grids = image_grid_thw.tolist()
    for index, (frames, height, width) in enumerate(grids):
        if (
            frames != 1
            or min(height, width) < 1
            or (height % layout.merge_size, width % layout.merge_size) != (0, 0)
        ):
            raise ValueError(
                f"{op}: image_grid_thw[{index}] must be (1, height, width) in multiples of "
                f"merge_size {layout.merge_size} (images only, no video), "
                f"got {(frames, height, width)}"
            )
    expected = sum(height * width for _, height, width in grids)
    if expected != pixel_values.shape[0]:
        raise ValueError(
            f"{op}: pixel_values has {pixel_values.shape[0]} patches, "
            f"image_grid_thw {grids} adds up to {expected}"
        )
    return grids
