"""The pixels of images: every PIL mode and numpy dtype as the same picture in 8 bits.

The rules:

* 8 bits stay as they are; a bit or a bool is black or white.
* 16 bits (I;16, uint16) are divided by 257, so that white stays white.
* Other integers (mode I, int64) are 8-bit values where all lie in [0, 255], 16-bit values where
  all lie in [0, 65535]. Mode I from a PNG or PPM file holds 16-bit values.
* Floats (mode F, float32) are shares of white where all lie in [0, 1], 8-bit values where all lie
  in [0, 255] and one is 16 or more, or all are whole. Less is as likely an overexposed share.
* Everything outside these ranges is refused: only its owner knows what is black and what is white.
* Colour spaces become RGB. The orientation that EXIF states is applied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import ExifTags, Image

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DARKEST = 16  # of 8-bit values in floats
_SLACK = 1e-3  # resizing and colour conversion leave floats a little outside [0, 1]


def eight_bit(image: Image.Image, where: str) -> Image.Image:
    """Return an image as L, LA, RGB or RGBA of the same picture, upright.

    Args:
        image: a PIL image of any mode.
        where: the beginning of error messages.
    Returns: an LA or RGBA image where pixels are transparent; the image itself if nothing changes.
    Raises: ValueError for an image without pixels and for values outside the ranges above.
    """
    if 0 in image.size:
        raise ValueError(f"{where}has size {image.size}, expected at least 1 x 1")
    image.load()
    return _upright(_coloured(image, where), _orientation(image))


def over_white(image: Image.Image) -> Image.Image:
    """Return an L, LA, RGB or RGBA image as L or RGB, transparent pixels over white."""
    if image.mode in ("L", "RGB"):
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def image_from_array(array: np.ndarray, where: str) -> Image.Image:
    """Return an array as an L, LA, RGB or RGBA image.

    Args:
        array: (H, W), or (H, W, C) of C = 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels;
            bool, integers or floats by the rules above, one range for all channels.
        where: the beginning of error messages.
    Raises: TypeError or ValueError for another dtype, shape or range.
    """
    is_image = array.ndim == 2 or (array.ndim == 3 and 1 <= array.shape[2] <= 4)
    if not is_image or 0 in array.shape:
        is_first = array.ndim == 3 and 1 <= array.shape[0] <= 4
        hint = "; channels go last" if is_first and 0 not in array.shape else ""
        raise ValueError(
            f"{where}an array must have the shape (H, W) or (H, W, 1 to 4), got {array.shape}{hint}"
        )
    values = _bytes(array, where)
    return Image.fromarray(values[:, :, 0] if values.shape[2:] == (1,) else values)


def _coloured(image: Image.Image, where: str) -> Image.Image:
    mode = image.mode
    if mode.startswith(("I", "F")):
        return _deep(image, where)
    if mode in ("La", "RGBa"):  # alpha is multiplied into the colours
        return image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    if mode in ("1", "L", "LA"):
        target = "LA" if image.has_transparency_data else "L"
    else:
        target = "RGBA" if image.has_transparency_data else "RGB"
    return image if mode == target else image.convert(target)


def _deep(image: Image.Image, where: str) -> Image.Image:
    """A grey image of more than 8 bits, whose pixels of one value may be transparent."""
    values = np.asarray(image)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        values = values.astype(np.uint16)
    grey = Image.fromarray(_bytes(values, where))
    clear = image.info.get("transparency")
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _bytes(values: np.ndarray, where: str) -> np.ndarray:
    """Values of any dtype as uint8, by the rules above."""
    kind = values.dtype.kind
    if kind == "b":
        return values.astype(np.uint8) * 255
    if kind not in "uif":
        raise TypeError(
            f"{where}pixels must be bool, integers or floats, got the dtype {values.dtype}"
        )
    if values.dtype == np.uint8:
        return values
    low, high = float(values.min()), float(values.max())
    if kind == "f" and -_SLACK <= low and high <= 1 + _SLACK:
        return np.rint(values.clip(0, 1).astype(np.float64) * 255).astype(np.uint8)
    is_deep = values.dtype.itemsize == 2 and kind == "u"
    is_8_bit = kind != "f" or high >= _DARKEST or bool((values == np.rint(values)).all())
    if 0 <= low and high <= 255 and is_8_bit and not is_deep:
        return np.rint(values).astype(np.uint8)
    if kind != "f" and 0 <= low and high <= 65535:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    ranges = "[0, 1] or [0, 255]" if kind == "f" else "[0, 255] or [0, 65535]"
    raise ValueError(
        f"{where}pixels of the dtype {values.dtype} must lie in {ranges}, "
        f"got {low:g} to {high:g}; scale them to one of these"
    )


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises anything on a damaged block; viewers show such images
        return "damaged"


def _upright(image: Image.Image, orientation: Any) -> Image.Image:
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    elif orientation == "damaged":
        image = image.copy()
    else:
        return image
    # What is left of the EXIF block would turn the image again, or fail, in the next program.
    image.info = {}
    return image
