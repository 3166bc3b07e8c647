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

_fused = Backend("cppo_triton", PRIMITIVES)
token_stats = _fused.token_stats
linear_token_stats = _fused.linear_token_stats
perception_mask = _fused.perception_mask
cppo_loss = _fused.cppo_loss
linear_cppo_loss = _fused.linear_cppo_loss
