"""Loading and saving models and processors, and the ids that end a text or never stand in one.

The stock processors of the Qwen-VL families build a video processor, which needs torchvision. The
trainer uses images only, so `load_processor` leaves the video part out where it cannot be built;
its settings stay with the processor and are saved with it.
"""

from __future__ import annotations

import json
import operator
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import cached_file, is_torchvision_available, logging

from cppo.model.processor_files import save_processor
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
    "eoi_token_id",
)
# Not here: grounding and tool-call markers (<|box_start|>, <tool_call>), which a policy may answer.
_INPUT_ONLY_TOKEN = re.compile(
    r"image|video|vision|audio|\bpad\b|im_start|endoftext|unknown", re.IGNORECASE
)
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

_Processor = TypeVar("_Processor", bound=type)


def image_only(processor_class: _Processor) -> _Processor:
    """Return a subclass of a Qwen-VL processor class that has no video processor.

    Specification: transformers reads a processor's parts off the signature of `__init__`; the
    subclass names only the image processor and the tokenizer, and keeps the stock class's name, so
    that what it saves is an ordinary checkpoint folder. The settings of the video processor are
    those of the folder it was loaded from, or those of the image processor; they are saved.
    Args:
        processor_class: the stock class, e.g. `transformers.Qwen2_5_VLProcessor`.
    Returns: the class; call it or use `from_pretrained` as on the stock class.
    """

    class ImageOnly(processor_class):  # type: ignore[misc, valid-type]
        def __init__(
            self,
            image_processor: Any = None,
            tokenizer: Any = None,
            chat_template: Any = None,
            **_: Any,
        ) -> None:
            for name in ("image", "video", "vision_start", "vision_end"):
                stock = f"<|{name}_pad|>" if name in ("image", "video") else f"<|{name}|>"
                token = getattr(tokenizer, f"{name}_token", None) or stock
                setattr(self, f"{name}_token", token)
                setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
            self._video_settings: dict[str, Any] | None = None
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

        @classmethod
        def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
            processor = super().from_pretrained(path, *args, **kwargs)
            processor._video_settings = _video_settings(path, kwargs.get("revision"))
            return processor

        def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            settings = self._video_settings
            if settings is None:
                settings = dict(self.image_processor.to_dict())
                settings.pop("image_processor_type", None)
                kind = "Qwen3VL" if processor_class.__name__.startswith("Qwen3") else "Qwen2VL"
                settings["video_processor_type"] = f"{kind}VideoProcessor"
            return {**super().to_dict(*args, **kwargs), "video_processor": settings}

    ImageOnly.__name__ = ImageOnly.__qualname__ = processor_class.__name__
    return ImageOnly  # type: ignore[return-value]


def _video_settings(path: Any, revision: str | None) -> dict[str, Any] | None:
    """The settings of a checkpoint's video processor, where transformers looks for them."""
    options = {"revision": revision} if revision else {}
    for name in ("processor_config.json", "video_preprocessor_config.json"):
        try:
            file = cached_file(path, name, **options)
        except OSError:
            continue  # not there
        settings = json.loads(Path(str(file)).read_text("utf-8"))
        if name == "processor_config.json":
            settings = settings.get("video_processor")
        if settings is not None:
            return settings
    return None


def load_processor(path: str | Path, **kwargs: Any) -> Any:
    """Load the processor of a vision-language checkpoint or the tokenizer of a text checkpoint.

    Specification: `AutoProcessor.from_pretrained`, except that a processor whose video part needs
    torchvision, or whose folder has no video configuration, is loaded without its video part.
    Args:
        path: a folder written by `save_pretrained`, or a Hugging Face hub name.
        kwargs: passed on to `from_pretrained`.
    Returns: a processor (has `.tokenizer` and `.image_processor`) or a tokenizer; both pad on
        the left.
    Raises: ValueError if the folder, its config.json or its tokenizer is missing, or the family is
        not known to transformers.
    """
    config = _load_config(path, "load_processor")
    # transformers would make up an empty tokenizer.
    folder = Path(path).expanduser()
    if folder.is_dir() and not any(any(folder.glob(p)) for p in _TOKENIZER_FILES):
        raise ValueError(f"cppo.load_processor: path {str(path)!r} has no tokenizer files")
    stock: Any = PROCESSOR_MAPPING[type(config)] if type(config) in PROCESSOR_MAPPING else None
    loader: Any = (
        AutoProcessor if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoTokenizer
    )
    if stock is not None and "video_processor" in stock.get_attributes():
        if not is_torchvision_available() or not _has_video_config(path):
            loader = image_only(stock)
    try:
        processor = loader.from_pretrained(path, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"cppo.load_processor: path {str(path)!r} (model_type {config.model_type!r}) has no "
            f"processor or tokenizer that loads: {_first_line(error)}"
        ) from error
    # Prompts of unequal length are sampled together: their last tokens must line up.
    getattr(processor, "tokenizer", processor).padding_side = "left"
    return processor


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
    config = _load_config(path, "load_model")
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
            f"{_first_line(error)}"
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


def _load_config(path: str | Path, op: str) -> PretrainedConfig:
    """The checkpoint's config, with our words for a path that leads nowhere."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"cppo.{op}: path {str(path)!r} is a folder without a config.json")
    elif folder.exists() or not _HUB_NAME.fullmatch(str(path)):
        kind = "a file" if folder.exists() else "missing"
        raise ValueError(
            f"cppo.{op}: path must be a model folder or a hub name, {str(path)!r} is {kind}"
        )
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"cppo.{op}: path {str(path)!r} gives no model configuration: {_first_line(error)}"
        ) from error


def _has_video_config(path: str | Path) -> bool:
    """Whether a checkpoint configures a video processor; a hub name is taken to."""
    folder = Path(path)
    if not folder.is_dir() or (folder / "video_preprocessor_config.json").is_file():
        return True
    file = folder / "processor_config.json"
    return file.is_file() and "video_processor" in json.loads(file.read_text())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
