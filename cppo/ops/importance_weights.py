"""Weights that correct each token for the log-probabilities of the engine that sampled it."""

from __future__ import annotations

from torch import Tensor

from cppo import reference
from cppo.ops.checks import (
    check_config,
    check_cu_seqlens,
    check_layout,
    check_ndim,
    check_same_device,
    check_shape,
    check_tensor,
    checked_mask,
)
from cppo.options.loss import LossConfig


def importance_weights(
    old_logps: Tensor,
    sampling_logps: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: LossConfig,
) -> Tensor:
    """The weights by which the losses correct for another engine, for metrics of them.

    Specification: `cppo.reference.importance_weights`; the formulas: `LossConfig`'s
    importance_correction. In plain PyTorch, on any device, without a wait for it.

    Args:
        old_logps: (B, L), or packed (T,) with cu_seqlens; floating. Of the model before its update,
            or its own where there is one update per rollout. No gradients flow.
        sampling_logps: like old_logps, of the engine that sampled; NaN where it gave none: there
            the two count as equal.
        mask: like old_logps, 1 or True at response tokens. None: all.
        cu_seqlens: (completions + 1,) int32 or int64, where the packed completions start and
            end; from 0 to T, not decreasing.
        config: its importance_correction and the bounds of it.
    Returns: like old_logps, fp32 (fp64 if one of both is). Zero where masked; with "none" and
        "bypass" 1 elsewhere.
    Raises:
        ValueError: shapes or devices that disagree, cu_seqlens with (B, L) or missing with (T,), or
            not from 0 to T without a decrease (on a GPU its values are checked only with
            CPPO_DEBUG=1).
        TypeError: logps that are not floating, a config that is none.
    """
    op = "importance_weights"
    check_config(op, config)
    check_tensor(op, "old_logps", old_logps, "floating")
    check_tensor(op, "sampling_logps", sampling_logps, "floating")
    check_ndim(op, "old_logps", old_logps, "(B, L)", "(T,)")
    symbols = "(T,)" if old_logps.ndim == 1 else "(B, L)"
    check_shape(op, "sampling_logps", sampling_logps, symbols, old_logps.shape, "old_logps")
    mask = checked_mask(op, mask, old_logps, "old_logps")
    check_layout(op, "old_logps", old_logps, cu_seqlens)
    tensors = {"old_logps": old_logps, "sampling_logps": sampling_logps}
    check_same_device(op, **tensors, mask=mask, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, old_logps.numel())
    return reference.importance_weights(old_logps, sampling_logps, mask, cu_seqlens, config)
