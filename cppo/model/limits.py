"""How long a sequence may be before its positions depend on its neighbours."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

from cppo.model.wrappers import has_vision, unwrap, vision_tower


class PositionLimit(NamedTuple):
    """How many tokens a sequence may have, and why no more."""

    tokens: int
    reason: str

    def check(self, longest: int) -> None:
        """Raises ValueError for a sequence of too many tokens."""
        if longest > self.tokens:
            raise ValueError(
                f"cppo: a sequence of {longest} tokens is longer than {self.tokens}: {self.reason}"
            )


def position_limit(model: nn.Module) -> PositionLimit | None:
    """The sequences for which a model has positions that do not depend on their neighbours.

    That ends where a table of learned positions ends, and where rotary positions begin to follow
    the longest sequence of the batch. None: it never ends.
    """
    base = unwrap(model)
    config = base.config.get_text_config()
    family = f"model_type {base.config.model_type!r}"
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else parameters.values()
    ends = []
    for kind in kinds:
        if isinstance(kind, dict) and kind.get("rope_type") == "longrope":
            ends.append(kind["original_max_position_embeddings"])
        elif isinstance(kind, dict) and "dynamic" in str(kind.get("rope_type")):
            ends.append(config.max_position_embeddings)
    follows = (
        f"beyond that the rotary positions of {family} depend on the longest sequence of a batch, "
        "so that packed sequences would change each other"
    )
    limits = [PositionLimit(end, follows) for end in ends]
    for table in learned_positions(model):
        size = table.num_embeddings - getattr(table, "offset", 0)
        limits.append(PositionLimit(size, f"{family} has learned positions for no more"))
    return min(limits, default=None)


def learned_positions(model: nn.Module) -> list[nn.Embedding]:
    """The tables of learned positions of a model's text."""
    base = unwrap(model)
    tower = set(vision_tower(model).modules()) if has_vision(base) else set()
    # Tables of relative positions hold distances, which are cut at their end.
    named = re.compile(r"(?!.*rel).*(pos(ition|$|_)|wpe$)")
    return [
        part
        for name, part in base.named_modules()
        if isinstance(part, nn.Embedding) and part not in tower
        if named.match(name.rpartition(".")[2])
    ]
