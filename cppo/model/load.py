"""Loading and saving models, and the ids that end a text or never stand in one."""

from __future__ import annotations

import operator
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.utils import logging

from cppo.model.processor_files import save_processor
from cppo.model.processors import first_line, image_only, load_config, load_processor
from cppo.model.wrappers import unwrap

__all__ = [
    "check_saveable",
    "closing_token_ids",
    "image_only",
    "is_vision_language",
    "load_model",
    "load_processor",
    "quiet",
    "save_processor",
    "special_token_ids_to_suppress",
]

_VISION_ID_FIELDS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
    "boi_token_id",
    "boi_token_index",
    "eoi_token_id",
    "eoi_token_index",
    "image_start_token_id",
    "image_end_token_id",
)
# Not here: grounding and tool-call markers (<|box_start|>, <tool_call>), which a policy may answer.
_INPUT_ONLY_TOKEN = re.compile(
    r"image|\bimg|row_\d+_col_|video|vision|audio|\bpad\b|im_start|endoftext|unknown", re.IGNORECASE
)


def load_model(
    path: str | Path, *, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> PreTrainedModel:
    """Load a vision-language or a causal text model, whichever the checkpoint's config describes.

    Args:
        path: a folder written by `save_pretrained`, or a Hugging Face hub name.
        dtype: of the weights. transformers' own default is the dtype of the file, which
            would run an fp16 checkpoint in fp16 on CPU; here it is fp32.
        kwargs: passed on to `from_pretrained`, e.g. `attn_implementation`.
    Returns: the model in eval mode, on CPU unless `device_map` says otherwise.
    Raises: ValueError if the folder, its config.json or its weights are missing, or the family is
        neither an image-text-to-text nor a causal language model; TypeError if dtype is no floating
        torch.dtype.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"cppo.load_model: dtype must be a floating torch.dtype, got {dtype!r}")
    config = load_config(path, "load_model")
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        loader: Any = AutoModelForImageTextToText
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        loader = AutoModelForCausalLM
    else:
        raise ValueError(
            f"cppo.load_model: path {str(path)!r} holds model_type {config.model_type!r}, which is "
            "neither an image-text-to-text model (qwen2_vl, qwen2_5_vl, qwen3_vl, ...) nor a "
            "causal language model (qwen2, qwen3, llama, ...)"
        )
    try:
        return loader.from_pretrained(path, dtype=dtype, **kwargs)
    except OSError as error:
        raise ValueError(
            f"cppo.load_model: path {str(path)!r} has a config.json but no weights that load: "
            f"{first_line(error)}"
        ) from error


def is_vision_language(model: PreTrainedModel) -> bool:
    """Return whether a model takes images, that is, whether its config has a vision tower."""
    return getattr(model.config, "vision_config", None) is not None


def closing_token_ids(model: Any, processor: Any) -> tuple[list[int], str]:
    """Return the ids that end a completion, and what there is to say about them.

    Specification: those of the model's generation config (where it names none, of its config) and
    the tokenizer's own; either ends a completion. An id that the vocabulary does not have is none
    (-1 stands for none, too).
    Args:
        model: a transformers causal model, or a peft model around one.
        processor: a processor or a tokenizer.
    Returns: ascending ids, and a sentence where the two disagree, else "".
    Raises: ValueError if none names an end, or one names something else than token ids.
    """
    base = unwrap(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    text_config = base.config.get_text_config()
    vocab_size = text_config.vocab_size

    def named_by(source: Any, place: str) -> list[int]:
        ids = _token_ids(getattr(source, "eos_token_id", None), place)
        return [i for i in ids if 0 <= i < vocab_size]

    of_tokenizer = named_by(tokenizer, "tokenizer")
    sources = {
        "generation config": [getattr(base, "generation_config", None)],
        "config": [text_config, base.config],
    }
    for place, listed in sources.items():
        of_model = [token for source in listed for token in named_by(source, place)]
        if of_model:
            break
    ids = sorted({*of_model, *of_tokenizer})
    if not ids:
        seen = {**sources, "tokenizer": [tokenizer]}
        got = [
            f"{getattr(listed[0], 'eos_token_id', None)!r} in the {place}"
            for place, listed in seen.items()
        ]
        raise ValueError(
            "cppo: model or tokenizer must name the token that ends a text (eos_token_id) among "
            f"the {vocab_size} of the vocabulary, got {', '.join(got)}"
        )
    if not of_model or set(of_tokenizer) <= set(of_model):
        return ids, ""

    of_model = sorted({*of_model})

    def named(ids: list[int]) -> str:
        return ", ".join(f"{i} ({tokenizer.convert_ids_to_tokens(i)!r})" for i in ids)

    return ids, (
        f"the model's {place} ends a text at token {named(of_model)}, the tokenizer at "
        f"{named(of_tokenizer)}: either ends a completion"
    )


def _token_ids(value: Any, place: str) -> list[int]:
    """Token ids as they stand in a config: one, several, or none."""
    value = value.tolist() if hasattr(value, "tolist") else value
    listed = value if isinstance(value, (list, tuple)) else [value]
    listed = [token for token in listed if token is not None]
    if not all(hasattr(token, "__index__") and not isinstance(token, bool) for token in listed):
        raise ValueError(
            f"cppo: eos_token_id of the {place} must be a token id or a list of them, got {value!r}"
        )
    return [operator.index(token) for token in listed]


def special_token_ids_to_suppress(model: PreTrainedModel, processor: Any) -> list[int]:
    """Return the ids that stand for inputs and that a policy must therefore never sample.

    A sampled image placeholder makes the next forward fail ("image features and image tokens do not
    match"); the others waste probability. Suppress them in the rollout and in the trained logits.
    Args:
        model: gives the vision ids of its config and the end-of-sequence ids.
        processor: a processor or a tokenizer.
    Returns: ascending ids: vision, image, video and audio markers, the chat's turn start, padding
        and bos; never an id that ends a text (`closing_token_ids`), never a grounding or tool
        marker.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    config = unwrap(model).config
    ids = {getattr(config, field, None) for field in _VISION_ID_FIELDS}
    ids |= {tokenizer.pad_token_id, tokenizer.bos_token_id}
    ids |= {
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and _INPUT_ONLY_TOKEN.search(token.content)
    }
    ids -= {*closing_token_ids(model, processor)[0]}
    vocab_size = config.get_text_config().vocab_size
    return sorted(i for i in ids if i is not None and 0 <= i < vocab_size)


def check_saveable(model: Any, processor: Any) -> None:
    """Raises ValueError for a model or processor that could not be saved after training.

    Saves all but the weights into a temporary folder, and looks for weights that are shared in a
    way that their file cannot say.
    """
    if not getattr(model, "peft_config", None):
        _check_generation_config(model)
    with tempfile.TemporaryDirectory() as folder, quiet():
        try:
            if adapters := getattr(model, "peft_config", None):
                for adapter in adapters.values():
                    adapter.save_pretrained(folder)
            else:
                model.save_pretrained(folder, state_dict={})
                _check_shared(model)
            processor.save_pretrained(folder)
        except Exception as error:
            raise ValueError(
                "cppo: model and processor must be such that they can be saved, but "
                f"save_pretrained says: {str(error).strip()}"
            ) from error


def _check_generation_config(model: PreTrainedModel) -> None:
    own = getattr(model, "generation_config", None)
    if model.can_generate() and not isinstance(own, GenerationConfig):
        raise ValueError(
            "cppo: model.generation_config must be a GenerationConfig, or the model cannot be "
            f"saved, got {own!r}"
        )


def _check_shared(model: PreTrainedModel) -> None:
    try:
        from transformers.modeling_utils import remove_tied_weights_from_state_dict
    except ImportError:  # an earlier transformers finds out when it saves
        return
    remove_tied_weights_from_state_dict(dict(model.state_dict()), model)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers over our own."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
