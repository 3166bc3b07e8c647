"""`cppo info MODEL`: how the trainer would run a model, found out with the model itself."""

from __future__ import annotations

from typing import Any


def model_facts(place: str, model: Any, processor: Any) -> dict[str, str]:
    """What the set-up of a run finds out about a model, by what it is about.

    Runs the model on a few short sequences (`cppo.model.check`).
    Args:
        place: where it was loaded from.
    Raises: ValueError for a model that the trainer refuses.
    """
    from cppo.model.attention import NAMES
    from cppo.model.limits import position_limit
    from cppo.model.load import closing_token_ids, special_token_ids_to_suppress
    from cppo.model.prompts import tokenizer_of
    from cppo.model.ways import choose_ways, shown_picture
    from cppo.model.wrappers import has_vision

    has_template = getattr(processor, "chat_template", None) is not None
    shown = shown_picture(model, processor) if has_template else None
    ways = choose_ways(model, "auto", shown=shown)
    attention = model.config.get_text_config()._attn_implementation
    facts = {
        "model": f"{place} (model_type {model.config.model_type!r})",
        "forward": str(ways),
        "attention": {own: name for name, own in NAMES.items()}.get(attention, attention),
    }
    if has_vision(model):
        facts["images"] = _images(processor, shown)
    limit = position_limit(model)
    facts["longest sequence"] = f"{limit.tokens}: {limit.reason}" if limit else _trained(model)
    tokens = tokenizer_of(processor).convert_ids_to_tokens
    closing, note = closing_token_ids(model, processor)
    facts["ends of a completion"] = " ".join(tokens(closing)) + (f" ({note})" if note else "")
    never = special_token_ids_to_suppress(model, processor)
    facts["never sampled"] = " ".join(tokens(never)) or "no token"
    if not has_template:
        facts["chat template"] = "none: the trainer needs that of an instruction-tuned model"
    return facts


def _trained(model: Any) -> str:
    """What is said of a model that computes positions of any size."""
    tokens = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if tokens is None:
        return "no limit known"
    return f"not limited; the model's config says that it was made for {tokens} tokens"


def _images(processor: Any, shown: Any) -> str:
    from cppo.views import cuts_patches

    if shown is None:
        return "none: the chat template or the processor takes no image"
    views = "the processor's patches" if cuts_patches(processor.image_processor) else "pictures"
    return (
        f"{sum(shown().images.tokens)} tokens for one of 64 x 48 pixels; views are made of {views}"
    )
