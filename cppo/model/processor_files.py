"""What a checkpoint's folder holds besides the model's weights and config.

`save_pretrained` of a processor writes what the installed transformers reads back. Others read a
checkpoint too: an older transformers, vLLM, converters to other formats. So every such file that
the base has, the checkpoint has: written again where it says what the processor may have been
changed in, copied where it cannot have changed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Vocabularies: tokens that were added since are in tokenizer.json.
_COPIED = ("vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_CODE = "*.py"


def save_processor(processor: Any, directory: str | Path) -> None:
    """Writes a processor or tokenizer, and beside it the files that its base has and readers need.

    The base is the folder or the cached hub snapshot that the tokenizer was loaded from; nothing is
    downloaded, and a base that is not there any more adds nothing.

    Args:
        processor: a processor or a tokenizer.
        directory: the checkpoint's folder; files that are there already stay, unless the processor
            writes them.
    """
    directory = Path(directory)
    processor.save_pretrained(directory)
    base = _base_of(getattr(processor, "tokenizer", processor))
    if base is None or base.resolve() == directory.resolve():
        return
    for name, write in _REWRITTEN.items():
        content = write(processor) if (base / name).is_file() else None
        if content is not None:
            (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    patterns = [*_COPIED, *_LICENCES, *([_CODE] if _has_code(base) else [])]
    for file in {file for pattern in patterns for file in base.glob(pattern)}:
        if file.is_file() and not (directory / file.name).exists():
            shutil.copyfile(file, directory / file.name)


def _base_of(tokenizer: Any) -> Path | None:
    """The local folder that a tokenizer was loaded from."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = getattr(tokenizer, "name_or_path", None) or ""
    if name and Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    try:
        cached = try_to_load_from_cache(name, "tokenizer_config.json")
    except HFValidationError:  # a path that is gone
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _has_code(base: Path) -> bool:
    """Whether a config of the base names classes of its own."""
    return any('"auto_map"' in file.read_text("utf-8") for file in base.glob("*config.json"))


def _settings_of(part: str) -> Callable[[Any], dict[str, Any] | None]:
    def settings(processor: Any) -> dict[str, Any] | None:
        # An image-only processor keeps the settings of the part that it lacks.
        return processor.to_dict().get(part) if hasattr(processor, "to_dict") else None

    return settings


def _template(processor: Any) -> dict[str, Any] | None:
    template = getattr(processor, "chat_template", None)
    return None if template is None else {"chat_template": template}


def _special_tokens(processor: Any) -> dict[str, Any]:
    return dict(getattr(processor, "tokenizer", processor).special_tokens_map)


def _added_tokens(processor: Any) -> dict[str, int]:
    return getattr(processor, "tokenizer", processor).get_added_vocab()


# Files of earlier formats, which say again what the processor's own files say.
_REWRITTEN: dict[str, Callable[[Any], dict[str, Any] | None]] = {
    "preprocessor_config.json": _settings_of("image_processor"),
    "video_preprocessor_config.json": _settings_of("video_processor"),
    "chat_template.json": _template,
    "special_tokens_map.json": _special_tokens,
    "added_tokens.json": _added_tokens,
}
