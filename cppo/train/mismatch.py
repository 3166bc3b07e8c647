"""How far the engine that sampled is from the policy in training, as metrics of a step.

With d = logp_old - logp_engine of a token that was sampled (docs/rollouts.md):

    mismatch/mean, mismatch/max     of |d|
    mismatch/kl_engine_policy       mean of e^d - 1 - d, an estimate of KL(engine || policy)
    mismatch/kl_policy_engine       mean of d e^d - (e^d - 1), of KL(policy || engine)
    mismatch/corrected_share        share of the tokens whose importance weight is not e^d: it was
                                    truncated or masked

Both estimates are never negative, and exact in the mean (http://joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cppo.ops.importance_weights import importance_weights
from cppo.ops.packed_batch import PackedBatch
from cppo.options.loss import LossConfig
from cppo.options.trainer import CPPOConfig

_SUMS = ("mean", "kl_engine_policy", "kl_policy_engine", "corrected_share")
_TOKENS, _MAX = "mismatch/tokens", "mismatch/max"
# Metrics of micro-batches of which the largest counts, not the sum.
LARGEST = (_MAX,)


def engine_differs(config: CPPOConfig) -> bool:
    """Whether there is anything to report or to correct."""
    return config.engine != "builtin" or config.loss.importance_correction != "none"


def mismatch(logps: Tensor, packed: PackedBatch, config: LossConfig) -> dict[str, Tensor]:
    """Sums over the tokens of a micro-batch; nothing where the engine's numbers are not known.

    Args:
        logps: (T,) of the policy now; those before the update are taken where they are known.
    """
    engine = packed.per_token.get("sampling_logps")
    if engine is None:
        return {}
    old = packed.per_token.get("old_logps", logps)
    known = ~engine.isnan()
    d = torch.where(known, old - engine, 0).double()
    near = d.clamp(-20, 20)
    found = {
        "mean": d.abs(),
        "kl_engine_policy": torch.expm1(near) - near,
        "kl_policy_engine": near * near.exp() - torch.expm1(near),
    }
    if config.importance_correction not in ("none", "bypass"):
        weights = importance_weights(old, engine, cu_seqlens=packed.row_cu_seqlens, config=config)
        low, high = config.correction_min, config.correction_max
        is_mask = config.importance_correction.endswith("mask")
        bounded = weights == 0 if is_mask else (weights == low) | (weights == high)
        found["corrected_share"] = bounded
    sums = {f"mismatch/{name}": (value * known).sum() for name, value in found.items()}
    return sums | {_TOKENS: known.sum(), _MAX: d.abs().amax() if len(d) else d.sum()}


def mismatch_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics of what all micro-batches and processes add up to."""
    tokens = sums.get(_TOKENS)
    if not tokens:
        return {}
    names = [f"mismatch/{name}" for name in _SUMS]
    means = {name: sums[name] / tokens for name in names if name in sums}
    return means | {_MAX: sums[_MAX]}
