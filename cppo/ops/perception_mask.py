"""Which tokens of a response depend on what the image shows."""

from __future__ import annotations

from torch import Tensor

from cppo import backends
from cppo.ops.checks import (
    check_cu_seqlens,
    check_interval,
    check_layout,
    check_ndim,
    check_same_device,
    check_shape,
    check_tensor,
    checked_mask,
)


def perception_mask(
    anchor_entropy: Tensor,
    negative_entropy: Tensor,
    *,
    fraction: float = 0.5,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The tokens of each completion whose entropy rises most when information is removed.

    Specification: `cppo.reference.perception_mask` (arXiv 2601.00501 and its code): with
    dH = H_negative - H_anchor and score = relu(dH) / (H_negative + 1e-6), of the c tokens with
    dH > 0 the max(1, floor(fraction * c)) with the highest score, and those equal to the lowest
    of them; none where c = 0. A dH of at most 2^-17 (1 + H_negative) is within the rounding
    error of an entropy in fp32 and counts as 0. Any such rule has inputs within rounding of a
    threshold, this one or the lowest score that stays: there dtypes and backends may differ.

    Args:
        anchor_entropy: (B, L), or packed (T,) with cu_seqlens; floating, in nats. No gradients
            flow.
        negative_entropy: like anchor_entropy, of the view without the information.
        fraction: share of the tokens with rising entropy, in [0, 1].
        mask: like anchor_entropy, 1 or True at response tokens. None: all.
        cu_seqlens: (completions + 1,) int32 or int64, where the packed completions start and
            end; from 0 to T, not decreasing.
        backend: "auto", "reference", "cpp" or "triton".
    Returns: bool, like anchor_entropy. A token whose entropy is NaN is not selected.
    Raises:
        ValueError: shapes or devices that disagree, a fraction outside [0, 1], cu_seqlens with
            (B, L) or missing with (T,), or not from 0 to T without a decrease (on a GPU its
            values are checked only with CPPO_DEBUG=1).
        TypeError: entropies that are not floating.
        RuntimeError: `backend` cannot run here.
    """
    op = "perception_mask"
    check_tensor(op, "anchor_entropy", anchor_entropy, "floating")
    check_tensor(op, "negative_entropy", negative_entropy, "floating")
    check_ndim(op, "anchor_entropy", anchor_entropy, "(B, L)", "(T,)")
    check_interval(op, "fraction", fraction, 0, 1)
    packed = anchor_entropy.ndim == 1
    symbols = "(T,)" if packed else "(B, L)"
    check_shape(
        op, "negative_entropy", negative_entropy, symbols, anchor_entropy.shape, "anchor_entropy"
    )
    mask = checked_mask(op, mask, anchor_entropy, "anchor_entropy")
    check_layout(op, "anchor_entropy", anchor_entropy, cu_seqlens)
    check_same_device(
        op,
        anchor_entropy=anchor_entropy,
        negative_entropy=negative_entropy,
        mask=mask,
        cu_seqlens=cu_seqlens,
    )
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, anchor_entropy.numel())
    implementation = backends.pick(op, anchor_entropy, backend)
    return implementation.perception_mask(
        anchor_entropy.detach(), negative_entropy.detach(), fraction, mask, cu_seqlens
    )
