"""How the trainer runs a model: packed where that is right, else as padded batches.

It is found out once, when training is set up, by the comparison of `cppo.model.check`: for text,
and for questions with images, whose tokens some families let attend both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cppo.model.check import Shown, check_model
from cppo.model.forward import Attention, Stream, set_attention
from cppo.model.packed import packed_hidden, shown_in
from cppo.model.padded import run_padded
from cppo.model.prompts import encode_questions
from cppo.model.wrappers import has_vision, unwrap
from cppo.questions import QuestionError, as_question


@dataclass(frozen=True)
class Ways:
    """How a model is run.

    Args:
        text, images: whether sequences without images, and those with them, are packed.
        reason: why one of them is not; "" if both are.
    """

    text: bool = True
    images: bool = True
    reason: str = ""

    @property
    def packed(self) -> bool:
        """Whether everything is."""
        return self.text and self.images

    def __str__(self) -> str:
        if self.packed:
            return "packed"
        what = "with images" if self.text else "all"
        return f"padded ({what}), because packed sequences would be wrong: {self.reason}"


_CHOSEN: WeakKeyDictionary[nn.Module, Ways] = WeakKeyDictionary()


def choose_ways(
    model: nn.Module,
    attention: str,
    *,
    device: torch.device | None = None,
    shares: bool = False,
    shown: Callable[[], Shown] | None = None,
) -> Ways:
    """Gives a model the attention of packed sequences, and finds out how it is run.

    Where they are wrong its batches are padded, by that attention, which runs fast kernels for
    them, too; where that computes something else (attention sinks), by the model's own.
    Args:
        attention, device: as in `cppo.set_attention`.
        shares, shown: as in `cppo.model.check.check_model`.
    Raises: ValueError for a model that is right neither way.
    """
    base = unwrap(model)
    before = Attention.of(base)
    try:
        set_attention(model, attention, device)
        check_model(model, shares=shares)
    except ValueError as error:
        ways = Ways(False, False, _reason(error))
        try:
            check_model(model, packed=False, shown=shown)
        except ValueError:
            before.restore()
            check_model(model, packed=False, shown=shown)
    else:
        ways = _of_images(model, shares, shown)
    _CHOSEN[base] = ways
    return ways


def _of_images(model: nn.Module, shares: bool, shown: Callable[[], Shown] | None) -> Ways:
    if shown is None:
        return Ways()
    try:
        check_model(model, shares=shares, shown=shown)
    except ValueError as error:
        check_model(model, packed=False, shown=shown)
        return Ways(True, False, _reason(error))
    return Ways()


def _reason(error: ValueError) -> str:
    first = str(error).removeprefix("cppo: ").split("; ")[0]
    return first.replace(" cannot be trained here: ", ": ")


def shown_picture(
    model: nn.Module, processor: Any, chat_template_kwargs: Mapping[str, Any] = {}
) -> Callable[[], Shown] | None:
    """A question with a small picture, as the processor prepares it.

    None where the model or the processor takes none, or its chat template is one of text alone.
    """
    if not has_vision(model) or not hasattr(processor, "image_processor"):
        return None
    size = _trial_size(processor.image_processor)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    question = as_question({"prompt": "What is this?", "image": Image.fromarray(noise)})
    try:
        prompts = encode_questions(model, processor, [question], chat_template_kwargs)
    except QuestionError:
        return None
    assert prompts.images is not None
    shown = Shown(prompts.input_ids[0], prompts.images)
    return lambda: shown


def _trial_size(image_processor: Any) -> tuple[int, int]:
    """Height and width: small, or the only ones that a processor takes which does not scale."""
    size = getattr(image_processor, "size", None)
    height, width = (getattr(size, name, None) for name in ("height", "width"))
    if getattr(image_processor, "do_resize", True) is False and height and width:
        return height, width
    return 48, 64


def ways_of(model: nn.Module) -> Ways:
    """What was chosen for a model; packed if nothing was."""
    return _CHOSEN.get(unwrap(model), Ways())


def hidden_states(model: nn.Module, stream: Stream) -> Tensor:
    """`cppo.packed_hidden`, or the same by a padded batch where that was chosen."""
    ways = ways_of(model)
    if ways.images if stream.has_images else ways.text:
        return packed_hidden(model, *stream)
    longest = stream.batch.max_seqlen
    check_model(model, packed=False, longest=longest, shown=shown_in(stream))
    return run_padded(model, stream)
