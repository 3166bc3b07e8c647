"""Every outcome of pruning by chance, for tests that enumerate them."""

from __future__ import annotations

import itertools

from torch import Tensor


def outcomes(p: Tensor) -> list[tuple[float, float]]:
    """(u, probability) of every outcome of systematic sampling: between two neighbouring ends.

    Args: p: (n,) probabilities of one unit.
    """
    ends = sorted({0.0, 1.0, *(float(end) % 1 for end in p.cumsum(0))})
    return [((a + b) / 2, b - a) for a, b in itertools.pairwise(ends) if b - a > 1e-9]
