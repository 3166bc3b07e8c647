"""Completion pruning and contrastive perception for RL finetuning of (vision-)language models.

Importing this package imports torch and the compiled ops, if they are built; Triton, transformers
and the trainer load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cppo.model.forward import set_attention
from cppo.model.packed import packed_hidden
from cppo.ops.advantages import (
    advantages_and_prune,
    group_advantages,
    prune_completions,
    prune_weights,
    questions_needed,
    select_groups,
)
from cppo.ops.importance_weights import importance_weights
from cppo.ops.loss import cppo_loss, linear_cppo_loss
from cppo.ops.pack import balance_ranks, pack_completions, plan_microbatches
from cppo.ops.packed_batch import PackedBatch
from cppo.ops.perception_mask import perception_mask
from cppo.ops.token_stats import linear_token_stats, token_stats
from cppo.ops.visual_dependency import visual_dependency
from cppo.options.trainer import CPPOConfig, LoraConfig, LossConfig, VLLMConfig
from cppo.records import Dependency, LossOutput, NumItems, TokenStats, Views

if TYPE_CHECKING:
    from cppo.inspection import Inspection, inspect
    from cppo.train.trainer import CPPOTrainer

__version__ = "0.1.0"

__all__ = [
    "CPPOConfig",
    "CPPOTrainer",
    "Dependency",
    "Inspection",
    "LoraConfig",
    "LossConfig",
    "LossOutput",
    "NumItems",
    "PackedBatch",
    "TokenStats",
    "VLLMConfig",
    "Views",
    "advantages_and_prune",
    "balance_ranks",
    "cppo_loss",
    "group_advantages",
    "importance_weights",
    "inspect",
    "linear_cppo_loss",
    "linear_token_stats",
    "pack_completions",
    "packed_hidden",
    "perception_mask",
    "plan_microbatches",
    "prune_completions",
    "prune_weights",
    "questions_needed",
    "select_groups",
    "set_attention",
    "token_stats",
    "visual_dependency",
]

# Public names whose module imports transformers and accelerate.
_LAZY = {
    "CPPOTrainer": "cppo.train.trainer",
    "Inspection": "cppo.inspection",
    "inspect": "cppo.inspection",
}


def __getattr__(name: str) -> Any:
    if name == "integrations":
        return importlib.import_module("cppo.integrations")
    if name not in _LAZY:
        raise AttributeError(f"module 'cppo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
