"""The text on which a completion is judged, and where in it the thought ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def completion_text(completion: Any, generation_prompt: str = "") -> str:
    """Return what a model was given and wrote in its last turn.

    Args:
        completion: a string; or TRL's messages, of which the assistant's last counts. A message
            without a role is the assistant's. Its content is a string or a list of parts, and a
            thought in a field of its own (`reasoning_content`, `reasoning`, `thinking`, or parts of
            such a type) is put before it in `<think>` tags, unclosed where no content follows.
        generation_prompt: what the chat template wrote behind the last message. It counts from its
            first `<think>` or `<answer>` on, and not where the message has a thought of its own.
    Returns: the text; "" for a conversation in which the assistant says nothing.
    Raises: TypeError for anything else.
    """
    if isinstance(completion, str):
        return _opening(generation_prompt) + completion
    is_list = isinstance(completion, Sequence) and len(completion) > 0
    if not is_list or not all(isinstance(message, Mapping) for message in completion):
        raise _not_a_completion(completion)
    own = [message for message in completion if message.get("role", "assistant") == "assistant"]
    if not own:
        return ""
    message = own[-1]
    content, thought = _content(message.get("content"), completion)
    fields = [message.get(name) for name in ("reasoning_content", "reasoning", "thinking")]
    thought += next((field for field in fields if field and isinstance(field, str)), "")
    if not thought or "</think>" in content:
        return _opening(generation_prompt) + content
    return f"<think>{thought}</think>\n{content}" if content.strip() else f"<think>{thought}"


def _content(content: Any, completion: Any) -> tuple[str, str]:
    """The text of a message's content, and the thought that it holds as parts."""
    if content is None or isinstance(content, str):
        return content or "", ""
    if not isinstance(content, Sequence):
        raise _not_a_completion(completion)
    text = thought = ""
    for part in content:
        part = part if isinstance(part, Mapping) else {"text": part}
        if part.get("type") in ("thinking", "reasoning"):
            thought += str(part.get("thinking") or part.get("text") or "")
        else:
            text += str(part.get("text") or "")
    return text, thought


def _not_a_completion(completion: Any) -> TypeError:
    return TypeError(
        "cppo.rewards: a completion must be a string or a list of messages "
        f"({{'role', 'content'}}), got {completion!r:.200}"
    )


def _opening(generation_prompt: str) -> str:
    places = [generation_prompt.find(tag) for tag in ("<think>", "<answer>")]
    found = [place for place in places if place >= 0]
    return generation_prompt[min(found) :] if found else ""


def judged_texts(name: str, completions: Iterable[Any], generation_prompts: Any) -> list[str]:
    """Return `completion_text` of each completion of a reward.

    Args:
        name: the reward, for errors.
        completions: strings or messages.
        generation_prompts: one string for all, one per completion, or None for none.
    Raises: TypeError for completions or generation prompts that are none, ValueError for another
        number of generation prompts.
    """
    completions = list(completions)
    if generation_prompts is None or isinstance(generation_prompts, str):
        generation_prompts = [generation_prompts or ""] * len(completions)
    if len(generation_prompts) != len(completions):
        raise ValueError(
            f"cppo.rewards.{name}: generation_prompts must have one entry per completion = "
            f"{len(completions)}, got {len(generation_prompts)}"
        )
    for prompt in generation_prompts:
        if not isinstance(prompt, (str, type(None))):
            raise TypeError(
                f"cppo.rewards.{name}: generation_prompts must be strings, got {prompt!r}"
            )
    return [
        completion_text(completion, prompt or "")
        for completion, prompt in zip(completions, generation_prompts, strict=True)
    ]


def after_thought(text: str) -> str | None:
    """Return what follows the last `</think>`, all of a text without thought; None if the last
    `<think>` is not closed.
    """
    if text.rfind("<think>") > text.rfind("</think>"):
        return None
    return text.rpartition("</think>")[2]
