"""Images of dataset rows: whatever a row stores, read into a PIL image of mode L or RGB."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps


def load_image(source: Any, where: str = "cppo.load_image: ") -> Image.Image:
    """Return an image as L or RGB, upright (EXIF), transparency over white.

    Args:
        source: a PIL image, a path, encoded bytes, or a {"bytes", "path"} mapping.
        where: the beginning of error messages.
    Returns: a loaded PIL image of mode L or RGB; a PIL image of such a mode is returned as it is.
    Raises: TypeError or ValueError for anything that is not a readable image.
    """
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
        if source is None:
            raise ValueError(f"{where}has neither 'bytes' nor 'path'")
    if isinstance(source, Image.Image):
        return _plain(source, where)
    if isinstance(source, str) and re.match(r"[a-z]+://", source):
        raise ValueError(f"{where}nothing is downloaded, got the address {source!r}")
    if not isinstance(source, (str, os.PathLike, bytes, bytearray)):
        raise TypeError(
            f"{where}must be a PIL image, a path, bytes or {{'bytes', 'path'}}, "
            f"got {type(source).__name__}"
        )
    name = f"{len(source)} bytes" if isinstance(source, (bytes, bytearray)) else str(source)
    try:
        opened = Image.open(
            io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else source
        )
        with opened:
            opened.load()
            return _plain(ImageOps.exif_transpose(opened) or opened, where)
    except FileNotFoundError as error:
        raise ValueError(f"{where}there is no file {name}") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}cannot read the image ({name}): {error}") from error


def _plain(image: Image.Image, where: str) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"{where}has size {image.size}, expected at least 1 x 1")
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colour).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """Return an image whose shorter side is at least `side` pixels, in proportion (Lanczos)."""
    short = min(image.size)
    if short >= side:
        return image
    width, height = (max(side, round(length * side / short)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
