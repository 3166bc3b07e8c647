"""The Triton backend: one function per op with the positional signature of `cppo.reference`."""

from __future__ import annotations

from cppo.fused.backend import Backend
from cppo.triton_kernels import (
    PRIMITIVES,
    advantages_and_prune,
    group_advantages,
    prune_completions,
)

__all__ = ["advantages_and_prune", "group_advantages", "prune_completions"]

fused = Backend("cppo_triton", PRIMITIVES)
