"""Rows, images and files that the tests of data sets share."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

DATA = Path(os.environ.get("CPPO_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))
ROWS = [{"prompt": f"{i}?", "answer": str(i)} for i in range(4)]
IMAGE = {"type": "image"}


def needs(name: str):
    return pytest.mark.skipif(
        not (DATA / name).exists(),
        reason=f"no {name} in the data folder (CPPO_DATA_DIR, default ../shared/data)",
    )


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def picture(width: int = 30, height: int = 20, value: int = 200, mode: str = "RGB"):
    return Image.new(mode, (width, height), value if mode == "L" else (value, 10, 20))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_parquet(rows, path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'data'")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_jsonl(rows, name: str = "my.jsonl") -> str:
    """Writes rows below the working directory; returns the name."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return name
