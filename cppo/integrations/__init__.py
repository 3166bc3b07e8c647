"""Adapters for other people's trainers; each imports its trainer only when it is first used.

cppo.integrations.trl    completion pruning and contrastive perception in TRL's GRPOTrainer
cppo.integrations.verl   the same in verl, loaded by verl itself
"""

from __future__ import annotations

import importlib
from types import ModuleType

_ADAPTERS = ("trl", "verl")


def __getattr__(name: str) -> ModuleType:
    if name not in _ADAPTERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
