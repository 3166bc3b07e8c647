"""Pictures, colours and tokens of a page, and the templates that use them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image

_FOLDER = Path(__file__).parent
_IMAGE_HEIGHT = 96  # CSS pixels of a small image; larger ones keep their size


def template(folder: Path, name: str, **filters: Callable[..., str]) -> Any:
    """A template that knows the filters png, tint, visible and those given, and has the style."""
    environment = Environment(
        loader=FileSystemLoader([folder, _FOLDER]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"png": png, "tint": tint, "visible": visible, **filters}
    environment.globals["style"] = Markup((_FOLDER / "page.css").read_text(encoding="utf-8"))
    return environment.get_template(name)


def png(image: Image.Image) -> dict[str, Any]:
    """An image's source, and its size: small ones are enlarged by a whole factor."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    factor = max(1, _IMAGE_HEIGHT // image.height)
    size = {"width": image.width * factor, "height": image.height * factor}
    return size | {"source": f"data:image/png;base64,{data}"}


def tint(shift: float) -> str:
    """The colour of a shift in [-1, 1]: orange where the entropy rises, blue where it falls."""
    strength = 0.0 if not math.isfinite(shift) else min(1.0, abs(shift)) ** 0.7
    name = "rise" if shift > 0 else "fall"
    return f"color-mix(in srgb, var(--{name}) {100 * strength:.0f}%, transparent)"


def visible(token: str) -> str:
    """A token's text; blanks at its ends and line breaks stay visible."""
    text = token.replace("\n", "\u21b5")
    return text.replace(" ", "\u00a0") if text.strip() != text else text
