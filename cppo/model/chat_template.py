"""What a chat template may be given, and what it alone may write."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# What apply_chat_template takes besides what the template reads.
_PASSED_ON = ("chat_template", "tools", "documents")
_OWN = (
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "return_tensors",
)
# Reasoning and answers stand between these, in prompts too, whatever the tokenizer calls them.
_FORMAT_TAGS = {"<think>", "</think>", "<answer>", "</answer>"}


def check_template_arguments(processor: Any, arguments: Mapping[str, Any]) -> None:
    """Raises: TypeError or ValueError, as `cppo.model.prompts.PromptEncoder`."""
    if not isinstance(arguments, Mapping):
        raise TypeError(f"cppo: chat_template_kwargs must be a mapping, got {arguments!r}")
    template = arguments.get("chat_template") or getattr(processor, "chat_template", None)
    if template is None:
        raise ValueError(
            f"cppo: processor {type(processor).__name__} has no chat template; take that of an "
            "instruction-tuned model, or set processor.chat_template"
        )
    for name in arguments:
        if name in _OWN:
            raise ValueError(f"cppo: chat_template_kwargs must not have {name!r}, which cppo sets")
        if name not in _PASSED_ON and not re.search(rf"\b{re.escape(name)}\b", str(template)):
            raise ValueError(
                f"cppo: chat_template_kwargs has {name!r}, which the chat template does not read"
            )


def control_tokens(processor: Any, tokenizer: Any) -> re.Pattern[str]:
    """Matches the tokens that only the template may write: special ones, and placeholders."""
    tokens = set(tokenizer.all_special_tokens)
    tokens |= {own.content for own in tokenizer.added_tokens_decoder.values() if own.special}
    tokens |= {
        value
        for name, value in vars(processor).items()
        if name.endswith("_token") and isinstance(value, str)
    }
    known = [token for token in tokens - _FORMAT_TAGS if token.strip()]
    longest_first = sorted(known, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
