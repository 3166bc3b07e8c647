"""The rows of a batch: which of them count, and where a perturbed view holds them.

Both layouts become one: rows lie one after the other, (T,), and `cu_seqlens` says where a
completion starts. A completion is gated where it has perturbed views: those with A > 0, or all of
them without `gating`.

    completion          A = 0.8        A = -1.2       A = 0.3
    row                 0  1  2  3     4  5  6        7  8
    mask                1  1  1  0     1  1  1        1  1
    gated               1  1  1  0     0  0  0        1  1      rows that the negative is read at
    place, compact      0  1  2  3     -  -  -        4  5      a view of gated completions alone
    place, whole        0  1  2  3     4  5  6        7  8      a view of all of them
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cppo.records import Views

ANCHOR, POSITIVE, NEGATIVE = range(3)

# What the losses take besides, one entry per row.
OF_ROWS = ("old_logps", "ref_logps", "sampling_logps", "token_weights", "removed_logps")


@dataclass(frozen=True)
class Batch:
    """The rows of some completions.

    Args:
        targets: (T,).
        advantages: (B,).
        cu_seqlens: (B + 1,), where each completion starts and the last one ends.
        old_logps, ref_logps, sampling_logps, token_weights, removed_logps: (T,), or None.
        mask: (T,) bool, the rows that count; None: all of them.
        in_view: (T,) bool, the rows of gated completions, masked or not; None: there is no
            perturbed view.
        gated: (T,) bool, those of them that count.
    """

    targets: Tensor
    advantages: Tensor
    cu_seqlens: Tensor
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    sampling_logps: Tensor | None = None
    token_weights: Tensor | None = None
    removed_logps: Tensor | None = None
    mask: Tensor | None = None
    in_view: Tensor | None = None
    gated: Tensor | None = None

    def places(self, views: Views) -> list[Tensor | None]:
        """(T,) where the rows lie in each view, -1 for one that it does not have; None: as here."""
        found: list[Tensor | None] = [None, None, None]
        if is_compact(views) and self.in_view is not None:
            place = torch.where(self.in_view, self.in_view.cumsum(0) - 1, -1)
            for view in (POSITIVE, NEGATIVE):
                found[view] = place if _is_compact(views[view], views.anchor) else None
        return found

    def of(self, completions: slice, rows: slice) -> Batch:
        """The batch of a range of completions, whose rows are `rows`."""

        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        bounds = self.cu_seqlens[completions.start : completions.stop + 1]
        names = (*OF_ROWS, "mask", "in_view", "gated")
        return Batch(
            self.targets[rows],
            self.advantages[completions],
            bounds - rows.start,
            **{name: part(getattr(self, name)) for name in names},
        )


def _is_compact(view: Tensor | None, anchor: Tensor) -> bool:
    return view is not None and view.shape[0] != anchor.shape[0]


def is_compact(views: Views) -> bool:
    """Whether a view holds the rows of gated completions alone."""
    return any(_is_compact(view, views.anchor) for view in views[1:])


def flat(values: Tensor | None) -> Tensor | None:
    """(T,) of (B, L) or (T,)."""
    return values if values is None or values.ndim == 1 else values.reshape(-1)


def make_batch(
    targets: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    gating: bool | None,
    of_rows: Mapping[str, Tensor | None],
) -> Batch:
    """The batch of a call in either layout.

    Args:
        gating: of the `LossConfig`; None: the call has no perturbed views.
        of_rows: those of `OF_ROWS` that are needed.
    """
    counts, in_view, gated = flat(mask), None, None
    if gating is not None:
        in_view = _in_view(targets, advantages, cu_seqlens, gating)
        gated = in_view if counts is None else in_view & counts
    if cu_seqlens is None:
        cu_seqlens = targets.shape[1] * torch.arange(len(targets) + 1, device=targets.device)
    return Batch(
        targets.reshape(-1),
        advantages,
        cu_seqlens,
        **{name: flat(values) for name, values in of_rows.items()},
        mask=counts,
        in_view=in_view,
        gated=gated,
    )


def _in_view(
    targets: Tensor, advantages: Tensor, cu_seqlens: Tensor | None, gating: bool
) -> Tensor:
    gated = advantages > 0 if gating else torch.ones_like(advantages, dtype=torch.bool)
    if cu_seqlens is None:
        return gated[:, None].expand(targets.shape).reshape(-1)
    # The number of rows is known: nothing waits for the device.
    return gated.repeat_interleave(cu_seqlens.diff(), output_size=targets.numel())
