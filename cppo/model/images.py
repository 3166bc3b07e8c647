"""Images of questions, from a processor's output to what a model is called with.

A processor says what an image is by any number of tensors: patches and their grid, tiles and a mask
of their pixels, sizes. They are arguments of the model's `get_image_features`, whose names say
which of them it takes. What that returns, whatever its shape, has one row for each placeholder
token of the prompts, in their order. So a question's images are encoded once, and their rows are
given to each of its completions (`mm_encoder_outputs`).
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cppo.model.wrappers import has_vision, unwrap

# Of a processor's output, what is said per token.
PER_TOKEN = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}
# Token types tell a prompt, which sees itself both ways, from its answer; elsewhere they tell
# images from text.
_SEES_PROMPT_BOTH_WAYS = {"paligemma"}

Prepared = Mapping[str, Tensor]
"""The arguments of `get_image_features` for one question; empty without images."""


@dataclass(frozen=True)
class ImageBatch:
    """Images of a list of questions, in their order.

    Args:
        prepared: of each question. The first dimension of each tensor counts images, or what they
            were cut into.
        per_question: number of images of each question.
        tokens: number of placeholder tokens of each question.
    """

    prepared: tuple[Prepared, ...]
    per_question: tuple[int, ...]
    tokens: tuple[int, ...]

    def of(self, questions: Sequence[int]) -> ImageBatch:
        """The images of some questions, in the order given."""
        return ImageBatch(
            tuple(self.prepared[q] for q in questions),
            tuple(self.per_question[q] for q in questions),
            tuple(self.tokens[q] for q in questions),
        )

    def joined(self, name: str) -> Tensor | None:
        """A tensor of all questions; None if no image has it."""
        parts = [own[name] for own in self.prepared if name in own]
        return torch.cat(parts) if parts else None

    def alike(self) -> Iterator[list[int]]:
        """The questions with images, in parts whose tensors can be joined."""
        parts = defaultdict(list)
        for question, own in enumerate(self.prepared):
            if own:
                parts[tuple((name, x.shape[1:]) for name, x in own.items())].append(question)
        yield from parts.values()


def no_images(questions: int) -> ImageBatch:
    """The images of questions that have none."""
    return ImageBatch(({},) * questions, (0,) * questions, (0,) * questions)


def prepared_images(base: Any, processed: Mapping[str, Any], device: torch.device) -> Prepared:
    """What the model's image encoder takes of a processor's output for one question.

    Raises: ValueError for a model whose images cannot be encoded by themselves.
    """
    names = _encoder_names(base) if "pixel_values" in processed else {}
    return {
        name: torch.as_tensor(value).to(device)
        for name, value in processed.items()
        if name in names and name not in PER_TOKEN and value is not None
    }


def _encoder_names(base: Any) -> Mapping[str, Any]:
    encoder = getattr(_body(base), "get_image_features", None)
    if encoder is None or "mm_encoder_outputs" not in _arguments(base):
        raise ValueError(
            "cppo: vision-language model must encode images by themselves (get_image_features, and "
            "mm_encoder_outputs of its forward), which this transformers does not have for "
            f"model_type {base.config.model_type!r}"
        )
    return inspect.signature(encoder).parameters


def _body(base: Any) -> Any:
    return getattr(base, "model", None)


def _arguments(base: Any) -> Mapping[str, Any]:
    """What the body of a model is called with, by name."""
    return inspect.signature(_body(base).forward).parameters


def image_token_mask(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Where the placeholders of images stand: bool like `input_ids`.

    Raises: ValueError for a model that has none.
    """
    config = unwrap(model).config
    token = getattr(config, "image_token_id", None)
    if token is None:
        raise ValueError(
            "cppo: vision-language model must have a token that stands for its images "
            f"(config.image_token_id), model_type {config.model_type!r} has none"
        )
    return input_ids == token


def check_token_types(base: Any, processed: Mapping[str, Any], input_ids: Tensor) -> None:
    """Raises ValueError if a processor says of the tokens what the model is not told here.

    Args:
        processed: of one question. input_ids: (P,) of its prompt.
    """
    ids, names = input_ids[None], _arguments(base)
    told = token_types(base, ids)
    if has_three_rows(base):  # positions are made of it
        told = {"mm_token_type_ids": image_token_mask(base, ids).long()}
    for name, value in processed.items():
        if not name.endswith("token_type_ids") or name not in names:
            continue
        if name not in told or not torch.equal(torch.as_tensor(value).long(), told[name]):
            raise ValueError(
                f"cppo: model_type {base.config.model_type!r} cannot be trained here on images: "
                f"its processor tells its tokens apart by {name}, in a way that cppo does not know"
            )


def rotary_positions(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, image_grid_thw: Tensor | None
) -> Tensor | None:
    """(3, B, L) rotary positions of padded prompts; None for a model that has one row of them."""
    base = unwrap(model)
    if not has_vision(base) or not has_three_rows(base):
        return None
    positions, _ = base.model.get_rope_index(
        input_ids,
        mm_token_type_ids=image_token_mask(model, input_ids).int(),
        image_grid_thw=image_grid_thw,
        attention_mask=attention_mask,
    )
    return positions


def has_three_rows(base: Any) -> bool:
    """Whether a token has three rotary positions (time, height, width)."""
    return hasattr(_body(base), "get_rope_index")


def sees_prompt_both_ways(base: Any) -> bool:
    """Whether the tokens of a prompt attend to those behind them, and those of an answer do not."""
    return base.config.model_type in _SEES_PROMPT_BOTH_WAYS


def token_types(
    base: Any, input_ids: Tensor, is_response: Tensor | None = None
) -> dict[str, Tensor]:
    """What the model is told of each token because its mask depends on it.

    Args:
        input_ids: (B, L).
        is_response: (B, L) bool; None: all tokens are of prompts.
    """
    # Families with three rows read their positions off it, which they are given.
    if not has_vision(base) or has_three_rows(base):
        return {}
    types = image_token_mask(base, input_ids)
    if sees_prompt_both_ways(base):
        types = torch.zeros_like(types) if is_response is None else is_response
    names = _arguments(base)
    return {n: types.long() for n in ("token_type_ids", "mm_token_type_ids") if n in names}


def image_arguments(base: Any, images: ImageBatch | None, shown: Sequence[int]) -> dict[str, Any]:
    """What the model is called with for its images; sequence k gets those of question `shown[k]`.

    Each image is encoded once, however many sequences look at it.
    Raises: ValueError if the encoder returns another number of rows than there are placeholders.
    """
    shown = [] if images is None else [q for q in shown if images.per_question[q]]
    if images is None or not shown:
        return {}
    rows: dict[str, list[dict[int, Tensor]]] = {}
    output: Any = None
    for questions in images.alike():
        part = images.of(questions)
        arguments = {name: part.joined(name) for name in part.prepared[0]}
        output = base.model.get_image_features(**arguments, return_dict=True)
        for name, layers in _layers(output).items():
            found = rows.setdefault(name, [{} for _ in layers])
            for own, layer in zip(found, layers, strict=True):
                own |= zip(questions, _per_question(base, layer, part.tokens), strict=True)
    fields: dict[str, Any] = {}
    for name, layers in _layers(output).items():
        whole = [torch.cat([own[question] for question in shown]) for own in rows[name]]
        # A list has one entry where the model joins the images by itself.
        listed = [
            x if isinstance(layer, Tensor) else [x] for x, layer in zip(whole, layers, strict=True)
        ]
        fields[name] = listed[0] if name == "pooler_output" else listed
    return {"mm_encoder_outputs": {"image": type(output)(**fields)}}


def _layers(output: Any) -> dict[str, list[Any]]:
    """What of an encoder's output the model reads: its last layer, and earlier ones if it does."""
    deepstack = getattr(output, "deepstack_features", None)
    layers = {"pooler_output": [output.pooler_output]}
    return layers if deepstack is None else {**layers, "deepstack_features": list(deepstack)}


def _per_question(base: Any, layer: Any, tokens: Sequence[int]) -> Sequence[Tensor]:
    """The rows (tokens, D) of each question, of images one by one or all in one tensor."""
    parts = [layer] if isinstance(layer, Tensor) else list(layer)
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    if len(rows) != sum(tokens):
        raise ValueError(
            f"cppo: model_type {base.config.model_type!r} must have a placeholder for each row of "
            f"its images, the prompts have {sum(tokens)} for {len(rows)}"
        )
    return rows.split(list(tokens))
