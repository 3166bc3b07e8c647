"""Loading processors, with and without torchvision.

Many stock processors build a video processor, which needs torchvision. The trainer uses images
only, so `load_processor` leaves the video part out where it cannot be built; its settings stay with
the processor and are saved with it, so that the saved folder opens anywhere.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import cached_file, is_torchvision_available

__all__ = ["first_line", "image_only", "load_config", "load_processor"]

_VIDEO = "video_processor"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

_Processor = TypeVar("_Processor", bound=type)


class _LeftOut:
    """In a video processor's place: a stock class may ask for a setting, which is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ValueError("cppo: the processor was loaded without its video part; it takes images")


def image_only(processor_class: _Processor) -> _Processor:
    """Return a subclass of a stock processor class that has no video processor.

    Specification: the stock `__init__` runs as it is and sets what the stock class sets: tokens,
    their ids, numbers of image tokens. Only its last step differs, where it hands its parts to
    `ProcessorMixin.__init__`: a class in between drops the video processor. The subclass keeps the
    stock class's name, so that what it saves is an ordinary checkpoint folder. The settings of the
    video processor are those of the folder it was loaded from, or else those of the image
    processor; they are saved.
    Args:
        processor_class: the stock class, e.g. `transformers.Qwen2_5_VLProcessor`.
    Returns: the class; call it as the stock class (with `video_processor=None` where that has no
        default), or use `from_pretrained`.
    """
    stock_parts = processor_class.get_attributes()  # type: ignore[attr-defined]

    class WithoutVideo(ProcessorMixin):
        video_processor = _LeftOut()

        def __init__(self, *parts: Any, **named: Any) -> None:
            named |= dict(zip(stock_parts, parts, strict=False))
            named.pop(_VIDEO, None)
            super().__init__(**named)

    class ImageOnly(processor_class, WithoutVideo):  # type: ignore[misc, valid-type]
        _video_settings: dict[str, Any] | None = None

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in stock_parts if part != _VIDEO]

        @classmethod
        def from_args_and_dict(
            cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any
        ) -> Any:
            # The stock __init__ takes its parts by position.
            loaded = dict(zip(cls.get_attributes(), args, strict=True))
            settings = {key: value for key, value in processor_dict.items() if key != _VIDEO}
            return super().from_args_and_dict(
                [loaded.get(part) for part in stock_parts], settings, **kwargs
            )

        @classmethod
        def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            processor = super().from_pretrained(path, *args, **kwargs)
            processor._video_settings = _video_settings(path, kwargs.get("revision"))
            return processor

        def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            settings = dict(self._video_settings or self.image_processor.to_dict())
            of_images = settings.pop("image_processor_type", None) or ""
            kind = _video_class(processor_class.__name__, of_images)
            if kind is not None:
                settings.setdefault("video_processor_type", kind)
            return {**super().to_dict(*args, **kwargs), _VIDEO: settings}

    ImageOnly.__name__ = ImageOnly.__qualname__ = processor_class.__name__
    return ImageOnly  # type: ignore[return-value]


def _video_class(processor: str, image_processor: str) -> str | None:
    """The video processor class that goes with a processor class, by transformers' naming.

    None: there is none of that name; transformers then asks the model's config.
    """
    families = processor.removesuffix("Processor"), image_processor.split("ImageProcessor")[0]
    names = [f"{family}VideoProcessor" for family in families]
    return next((name for name in names if hasattr(transformers, name)), None)


def _video_settings(path: Any, revision: str | None) -> dict[str, Any] | None:
    """The settings of a checkpoint's video processor, where transformers looks for them."""
    for name in ("processor_config.json", "video_preprocessor_config.json"):
        found = _read(path, name, revision)
        settings = found.get(_VIDEO) if name == "processor_config.json" else found
        if settings:
            return settings
    return _read(path, "preprocessor_config.json", revision) or None


def _read(path: Any, name: str, revision: str | None) -> dict[str, Any]:
    """A JSON file of a checkpoint; empty if there is none."""
    try:
        file = cached_file(path, name, **({"revision": revision} if revision else {}))
    except OSError:
        return {}
    return json.loads(Path(str(file)).read_text("utf-8"))


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
        not known to transformers, or its processor needs a package that is not installed.
    """
    config = load_config(path, "load_processor")
    # transformers would make up an empty tokenizer.
    folder = Path(path).expanduser()
    if folder.is_dir() and not any(any(folder.glob(p)) for p in _TOKENIZER_FILES):
        raise ValueError(f"cppo.load_processor: path {str(path)!r} has no tokenizer files")
    try:
        processor = _loader(path, config, kwargs.get("revision")).from_pretrained(path, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        advice = ""
        if not is_torchvision_available() and "torchvision" in str(error).lower():
            advice = f"; pip install torchvision, the build for torch {torch.__version__}"
        raise ValueError(
            f"cppo.load_processor: path {str(path)!r} (model_type {config.model_type!r}) has no "
            f"processor or tokenizer that loads: {first_line(error)}{advice}"
        ) from error
    # Prompts of unequal length are sampled together: their last tokens must line up.
    getattr(processor, "tokenizer", processor).padding_side = "left"
    return processor


def _loader(path: str | Path, config: PretrainedConfig, revision: str | None) -> Any:
    """The class whose `from_pretrained` loads a checkpoint's processor or tokenizer."""
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoTokenizer
    if is_torchvision_available() and _has_video_config(path):
        return AutoProcessor
    stock = _stock_class(path, config, revision)
    # The placeholder of a class that needs torchvision raises ImportError here.
    if stock is None or _VIDEO not in stock.get_attributes():
        return AutoProcessor
    return image_only(stock)


def _stock_class(path: str | Path, config: PretrainedConfig, revision: str | None) -> Any:
    """The processor class that a checkpoint names, or else the one of its family."""
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        named = _read(path, name, revision).get("processor_class")
        if named is not None:
            return getattr(transformers, named, None)
    return PROCESSOR_MAPPING[type(config)] if type(config) in PROCESSOR_MAPPING else None


def load_config(path: str | Path, op: str) -> PretrainedConfig:
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
    except Exception as error:  # a family checks its options with errors of many kinds
        raise ValueError(
            f"cppo.{op}: path {str(path)!r} gives no model configuration: {first_line(error)}"
        ) from error


def _has_video_config(path: str | Path) -> bool:
    """Whether a checkpoint configures a video processor; a hub name is taken to."""
    folder = Path(path)
    if not folder.is_dir() or (folder / "video_preprocessor_config.json").is_file():
        return True
    return _VIDEO in _read(folder, "processor_config.json", None)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
