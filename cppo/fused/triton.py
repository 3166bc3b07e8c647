"""The Triton backend: one function per op with the positional signature of `cppo.reference`."""

from __future__ import annotations

from cppo.fused.backend import Backend
from cppo.fused.prune import PruneBackend
from cppo.triton_kernels import LONGEST_UNIT, PRIMITIVES, PRUNE

fused = Backend("cppo_triton", PRIMITIVES)
_prune = PruneBackend("cppo_triton", PRUNE, LONGEST_UNIT)
group_advantages = _prune.group_advantages
prune_completions = _prune.prune_completions
advantages_and_prune = _prune.advantages_and_prune
