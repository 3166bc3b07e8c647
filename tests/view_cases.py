"""What the tests of views share."""

from __future__ import annotations

import pytest
import torch

from cppo.views import PERTURBATIONS

every = pytest.mark.parametrize(
    "perturbation", [kind() for kind in PERTURBATIONS.values()], ids=PERTURBATIONS
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene(channels: int = 3, height: int = 40, width: int = 56, seed: int = 0) -> torch.Tensor:
    """A smooth image, so that geometric perturbations move it without destroying it."""
    y = torch.linspace(0, 3, height)[None, :, None]
    x = torch.linspace(0, 5, width)[None, None, :]
    phase = torch.arange(channels)[:, None, None] + seed
    return (0.5 + 0.25 * torch.sin(x + phase) + 0.25 * torch.cos(2 * y - phase)).clamp(0, 1)
