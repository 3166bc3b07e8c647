"""How much each token depends on the image, as weights of the policy loss (VPPO)."""

from __future__ import annotations

from torch import Tensor

from cppo import reference
from cppo.ops.checks import (
    check_cu_seqlens,
    check_interval,
    check_layout,
    check_ndim,
    check_positive,
    check_same_device,
    check_shape,
    check_tensor,
    check_vector,
    checked_mask,
)
from cppo.records import Dependency


def visual_dependency(
    old_logps: Tensor,
    removed_logps: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    fraction: float = 0.4,
    floor: float = 0.9,
    of_all: Tensor | None = None,
) -> Dependency:
    """The `token_weights` of VPPO: where, and how much, completions depend on their image.

    Specification: `cppo.reference.visual_dependency` (arXiv 2510.09285 and its code). With
    d = removed_logp - old_logp a token has S = min(e^d - d - 1, 10). Of a completion of n tokens
    the ceil(fraction n) with the largest S are trained on, of equal ones the first; its advantage
    is multiplied by b + (1 - b) s / mean(s), where b = floor and s is its mean S, moved to [0, 1]
    by the least and the largest mean of the optimizer step. Plain PyTorch, without a host wait.

    Args:
        old_logps: (B, L), or packed (T,) with cu_seqlens; floating. Of the policy before its
            update, under the images. No gradients flow.
        removed_logps: like old_logps, of the same policy under a view without the information;
            NaN in a completion that has none.
        mask: like old_logps, 1 or True at response tokens. None: all.
        cu_seqlens: (B + 1,) int32 or int64, where the packed completions start and end; from 0 to
            T, not decreasing.
        fraction: share of a completion's tokens that are trained on, in (0, 1].
        floor: factor of the completion with the least mean S, in [0, 1].
        of_all: (N,) `per_completion` of every completion of the optimizer step where these are a
            part of it, of all processes for example. None: these are all.
    Returns: a `Dependency`: token_weights and per_token (S), like old_logps, fp32 (fp64 if one of
        both is), zero where masked; per_completion (B,) fp64. A completion with a NaN in its
        removed_logps has weights of 1, and like one without tokens NaN in per_completion, which
        leaves it out of least, largest and mean. Where these differ by at most 1e-6, and with one
        completion, its factor is 1.
    Raises:
        ValueError: shapes or devices that disagree, a fraction or floor out of range, cu_seqlens
            with (B, L) or missing with (T,), or not from 0 to T without a decrease (on a GPU its
            values are checked only with CPPO_DEBUG=1).
        TypeError: logps that are not floating.
    """
    op = "visual_dependency"
    check_tensor(op, "old_logps", old_logps, "floating")
    check_tensor(op, "removed_logps", removed_logps, "floating")
    check_ndim(op, "old_logps", old_logps, "(B, L)", "(T,)")
    check_interval(op, "floor", floor, 0, 1)
    check_positive(op, "fraction", fraction)
    check_interval(op, "fraction", fraction, 0, 1)
    symbols = "(T,)" if old_logps.ndim == 1 else "(B, L)"
    check_shape(op, "removed_logps", removed_logps, symbols, old_logps.shape, "old_logps")
    mask = checked_mask(op, mask, old_logps, "old_logps")
    check_layout(op, "old_logps", old_logps, cu_seqlens)
    tensors = {"old_logps": old_logps, "removed_logps": removed_logps, "of_all": of_all}
    check_same_device(op, **tensors, mask=mask, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, old_logps.numel())
    if of_all is not None:
        check_tensor(op, "of_all", of_all, "floating")
        check_vector(op, "of_all", of_all)
    options = (float(fraction), float(floor), of_all)
    return reference.visual_dependency(old_logps, removed_logps, mask, cu_seqlens, *options)
