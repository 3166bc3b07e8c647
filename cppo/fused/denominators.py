"""What the terms of the loss are divided by; `cppo.reference` is the specification.

Counts may be numbers or tensors on the device: nothing here waits for one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cppo.options.trainer import LossConfig
from cppo.records import NumItems

Count = Any  # int, float or a 0-dim tensor


class Denominators(NamedTuple):
    """
    values: (2,) fp64, of the policy terms and of the contrastive term.
    per_selected: whether the second is still to be multiplied by the number of selected tokens.
    metric_scale: turns the sums of metrics into means; None stands for 1.
    """

    values: Tensor
    per_selected: bool
    metric_scale: Count | None


class _Counts:
    """The batch's own counts; one that costs a launch is counted when it is asked for."""

    def __init__(self, targets: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        self._targets, self._mask, self._cu_seqlens = targets, mask, cu_seqlens
        self.completions = len(targets) if cu_seqlens is None else cu_seqlens.numel() - 1

    @property
    def tokens(self) -> Count:
        return self._targets.numel() if self._mask is None else self._mask.sum()

    @property
    def longest(self) -> Count:
        """L if padded, the longest completion if packed."""
        if self._cu_seqlens is None:
            return self._targets.shape[1]
        return self._cu_seqlens.diff().max() if self.completions else 0


def _at_least_one(count: Count) -> Count:
    """A denominator that an empty batch cannot make zero."""
    return count.double().clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _on(device: torch.device, count: Count) -> Count:
    return count.detach().to(device, torch.float64) if isinstance(count, Tensor) else count


def denominators(
    targets: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_items: float | Tensor | NumItems | None,
    config: LossConfig,
) -> Denominators:
    """The denominators of a batch, or of a part of one whose counts are `num_items`."""
    counts, device = _Counts(targets, mask, cu_seqlens), targets.device
    if isinstance(num_items, NumItems):
        completions, tokens, selected = num_items
        selected = None if selected is None else _on(device, selected)
        num_items = NumItems(_on(device, completions), _on(device, tokens), selected)
    elif num_items is not None:
        num_items = _on(device, num_items)

    def policy(of: _Counts | NumItems) -> Count:
        if config.reduction == "grpo":
            return _at_least_one(of.completions)
        if config.reduction == "dapo":
            return _at_least_one(of.tokens)
        return _at_least_one(of.completions * (config.max_length or counts.longest))

    per_sequence = config.cpl_reduction == "sequence"
    contrast: Count = _at_least_one(counts.completions) if per_sequence else 1.0
    per_selected = not per_sequence
    whole: Count
    if num_items is None:
        whole = policy(counts)
    elif not isinstance(num_items, NumItems):
        whole = num_items
        # Only the share of the whole is known: the part's contrastive mean is weighted by it.
        contrast = contrast * (whole / policy(counts))
    else:
        whole = policy(num_items)
        if per_sequence:
            contrast = _at_least_one(num_items.completions)
        elif num_items.selected is not None:
            contrast, per_selected = _at_least_one(num_items.selected), False
        else:
            contrast = whole / policy(counts)
    scale = None
    if config.reduction == "dr_grpo":
        # It divides by completions x max_length, which is more than there are tokens.
        of = num_items if isinstance(num_items, NumItems) else counts
        scale = policy(of) / _at_least_one(of.tokens)
    return Denominators(_stacked(whole, contrast, device), per_selected, scale)


def _stacked(policy: Count, contrast: Count, device: torch.device) -> Tensor:
    if isinstance(policy, Tensor) or isinstance(contrast, Tensor):

        def as_tensor(count: Count) -> Tensor:
            if isinstance(count, Tensor):
                return count
            return torch.full((), count, dtype=torch.float64, device=device)

        return torch.stack([as_tensor(policy), as_tensor(contrast)])
    # Filled, not copied: a copy from the host waits for it.
    values = torch.full((2,), policy, dtype=torch.float64, device=device)
    if contrast != policy:
        values[1] = contrast
    return values
