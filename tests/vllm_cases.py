"""An engine on a `fake_vllm` server, and what it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import CLOSING, IMAGE, PATCHES, VOCAB, FakeVLLM
from PIL import Image
from torch import Tensor

from cppo.model.prompts import Prompts
from cppo.options.vllm import VLLMConfig
from cppo.questions import as_question
from cppo.rollouts import vllm_http
from cppo.rollouts.sampler import Draws, Sampled, Sampling
from cppo.rollouts.vllm_server import ServerEngine

SAMPLING = Sampling(2, 4, 0.7, suppressed=[3], closing=[CLOSING])


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVLLM]:
    """A server, for an engine that does not wait long before it tries again."""
    monkeypatch.setattr(vllm_http, "_PAUSE", 0.01)
    monkeypatch.setattr(vllm_http, "_LOOK_EVERY", 0.02)
    server = FakeVLLM()
    server.start()
    yield server
    server.stop()


def engine(
    vllm: FakeVLLM, folder: Path | None = None, *, on_gpu: bool = False, **options: Any
) -> ServerEngine:
    said: list[str] = []
    defaults: dict[str, Any] = {"start_timeout": 5.0, "request_timeout": 5.0, "retries": 2}
    place = None if folder is None else str(folder)
    config = VLLMConfig(address=vllm.address, folder=place, **{**defaults, **options})
    found = ServerEngine(config, image_token=IMAGE, vocab=VOCAB, say=said.append, on_gpu=on_gpu)
    found.said = said  # type: ignore[attr-defined]
    return found


def synced(vllm: FakeVLLM, folder: Path, **options: Any) -> ServerEngine:
    found = engine(vllm, folder, **options)
    found.sync(weights())
    vllm.requests.clear()
    return found


def weights(value: float = 1.0) -> Iterator[tuple[str, Tensor]]:
    """One-shot, with a tied head and a part of a larger tensor."""
    embeddings = torch.full((4, 2), value)
    yield "model.embed_tokens.weight", embeddings
    yield "lm_head.weight", embeddings
    yield "model.norm.weight", torch.arange(6.0)[::2]


def prompts(questions: int = 3, images: int = 0) -> Prompts:
    """Of different lengths, and padded on the left."""
    pictures = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(images)]

    def row(number: int, patches: int) -> list[int]:
        # As in some chat templates, no text stands between the images.
        return [4] * (number + 1) + [IMAGE] * images * patches + [5] * bool(images)

    rows = [row(number, PATCHES) for number in range(questions)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]).bool()
    asked = as_question({"prompt": "Hi"})._replace(images=pictures)
    short = [row(number, 1) for number in range(questions)]
    return Prompts([asked] * questions, ids, mask, None, None, unexpanded=short)


def sample(found: ServerEngine, sampling: Sampling = SAMPLING, **options: Any) -> Sampled:
    asked = prompts(**options)
    count = len(asked.questions) * sampling.group_size
    return found.generate(asked, sampling, Draws(1, count, slice(0, count)))
