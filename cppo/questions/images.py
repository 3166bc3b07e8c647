"""Images of dataset rows: whatever a row stores, read into a PIL image of mode L or RGB."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import Image, UnidentifiedImageError

from cppo.questions.errors import QuestionError
from cppo.questions.pixels import eight_bit, image_from_array, over_white

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
# How the base64 text of a PNG, JPEG, GIF, WebP or TIFF file begins.
_ENCODED = re.compile(r"iVBORw0K|/9j/|R0lGOD|UklGR|SUkqA|TU0AK")
_SMALL = 10_000  # pixels of an image


def load_image(source: Any, where: str = "cppo.load_image: ") -> Image.Image:
    """Return an image as L or RGB, upright (EXIF), transparency over white.

    Args:
        source: a PIL image of any mode; a numpy array (H, W), (H, W, 1) or (H, W, 2 to 4); a path;
            encoded bytes; a {"bytes", "path"} mapping; a `file://` or `data:` address; base64 text
            of an encoded image. `cppo.questions.pixels` has the rules for modes and dtypes. Of an
            animation the first frame is taken.
        where: the beginning of error messages.
    Returns: a loaded PIL image of mode L or RGB; a PIL image of such a mode is returned as it is.
    Raises: TypeError or ValueError for anything that is not a readable image. Nothing is
        downloaded.
    """
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
        if source is None:
            raise ValueError(f"{where}has neither 'bytes' nor 'path'")
    if isinstance(source, np.ndarray):
        return over_white(image_from_array(source, where))
    if isinstance(source, Image.Image):
        return _plain(source, "PIL image", where)
    name = f"{source}"[:200]
    if isinstance(source, str):
        source = _located(source, where)
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = f"{len(source)} bytes"
        source = io.BytesIO(source)
    elif not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"{where}must be a PIL image, an array, a path, bytes or {{'bytes', 'path'}}, "
            f"got {type(source).__name__}"
        )
    try:
        opened = Image.open(source)
    except FileNotFoundError as error:
        raise ValueError(f"{where}there is no file {name}") from error
    except Exception as error:  # Pillow's decoders raise anything on damaged data
        raise _unreadable(name, error, where) from error
    with opened:
        return _plain(opened, name, where)


def load_images(sources: Mapping[str, Any], where: str, min_side: int) -> list[Image.Image]:
    """Return the images of a row, given by name; the shorter sides have `min_side` pixels or more.

    Raises: QuestionError that begins with `where` and the image's name.
    """
    images = []
    for name, source in sources.items():
        try:
            images.append(enlarge(load_image(source, f"{where}{name}: "), min_side))
        except (TypeError, ValueError) as error:
            raise QuestionError(str(error)) from error
    return images


def numbered(sources: Iterable[Any]) -> dict[str, Any]:
    """Images of a column by name."""
    return {f"image {number}": source for number, source in enumerate(sources)}


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """Return an image whose shorter side is at least `side` pixels, in proportion (Lanczos)."""
    short = min(image.size)
    if short >= side:
        return image
    width, height = (max(side, round(length * side / short)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _plain(image: Image.Image, name: str, where: str) -> Image.Image:
    try:
        return over_white(eight_bit(image, where))
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise _unreadable(name, error, where) from error
    except Exception as error:
        raise _unreadable(name, error, where) from error


def _unreadable(name: str, error: Exception, where: str) -> ValueError:
    reason = getattr(error, "strerror", None) or error  # without the path, which is in the name
    if isinstance(error, UnidentifiedImageError):
        reason = "its bytes are no image of a known format"
    return ValueError(f"{where}cannot read the image ({name}): {reason!s:.300}")


def _located(source: str, where: str) -> str | bytes:
    """The path or the encoded bytes that a text stands for."""
    if source[:5].lower() == "data:":
        return _from_data_url(source, where)
    scheme = _SCHEME.match(source)
    if scheme is None:
        looks_encoded = _ENCODED.match(source) and not os.path.lexists(source)
        return (looks_encoded and decode_base64(source)) or source
    if scheme[1].lower() == "file":
        parts = urlsplit(source)
        if parts.netloc in ("", "localhost"):
            return url2pathname(parts.path)
    raise ValueError(f"{where}nothing is downloaded, got the address {source[:200]!r}")


def is_relative_path(source: str) -> bool:
    """Whether a text is a path that is relative: no address, no encoded image."""
    is_address = source[:5].lower() == "data:" or _SCHEME.match(source) is not None
    is_encoded = _ENCODED.match(source) is not None and decode_base64(source) is not None
    return not (is_address or is_encoded or os.path.isabs(source))


def _from_data_url(source: str, where: str) -> bytes:
    head, comma, body = source.partition(",")
    is_encoded = head.lower().endswith(";base64")
    data = unquote_to_bytes(body)
    decoded = decode_base64(data.decode("ascii", "replace")) if is_encoded else data
    if not comma or not decoded:
        raise ValueError(f"{where}cannot read the data address {source[:100]!r}")
    return decoded


def decode_base64(text: str) -> bytes | None:
    """Return what a base64 text (also the alphabet of addresses) encodes; None if it is none."""
    plain = re.sub(r"\s", "", text).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def thumbnails(images: Iterable[Image.Image], side: int = 160) -> list[str]:
    """Small copies of images as `data:` addresses, no side longer than `side` pixels."""
    found = []
    for image in images:
        copy = image.convert("RGB")
        copy.thumbnail((side, side))
        is_drawn = copy.width * copy.height < _SMALL  # a few pixels, of which JPEG would lose some
        kind, buffer = "PNG" if is_drawn else "JPEG", io.BytesIO()
        copy.save(buffer, kind)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        found.append(f"data:image/{kind.lower()};base64,{data}")
    return found
