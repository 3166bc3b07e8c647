"""The options of low-rank adapters, once: `LoraConfig`.

Each field has its documentation below it. An invalid value raises ValueError naming the field, the
value and what is allowed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cppo.options.values import CheckedFields


@dataclass(frozen=True)
class LoraConfig(CheckedFields):
    """Low-rank adapters through peft. The reference policy is then the model without them."""

    r: int = 16
    """Rank."""
    alpha: int = 32
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """In [0, 1). Above 0 the update is no longer exactly on-policy. The model's own dropout is off
    in training whatever its config says, because completions are sampled without it."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the layers that get adapters; the end of a name is enough ("q_proj"). A single
    string is a regular expression for the whole name. "all-linear": all but the LM head."""

    def __post_init__(self) -> None:
        self._take_plain()
        self._integer("r", "alpha", at_least=1)
        self._number("dropout", at_least=0, below=1)
        targets = self.target_modules
        names = (targets,) if isinstance(targets, str) else targets
        is_named = isinstance(names, tuple) and len(names) > 0
        if not is_named or not all(isinstance(name, str) and name for name in names):
            self._fail("target_modules", "'all-linear', a regular expression or names of layers")
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                self._fail("target_modules", f"a regular expression that can be read ({error})")
