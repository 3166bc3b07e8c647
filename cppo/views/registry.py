"""Perturbations by name, and the two sets of the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cppo.options.registry import build, name_and_parameters, require_entries
from cppo.options.values import unknown
from cppo.views import perturbations

Perturbation = Callable[[Tensor, torch.Generator], Tensor]

PRESERVING: tuple[Perturbation, ...] = (
    perturbations.ColorJitter(),
    perturbations.RandomPerspective(),
    perturbations.RandomRotation(),
    perturbations.GaussianBlur(),
)
REMOVING: tuple[Perturbation, ...] = (perturbations.NoisePatches(), perturbations.ZoomCrop())

PERTURBATIONS: dict[str, type[perturbations.BasePerturbation]] = {
    "color_jitter": perturbations.ColorJitter,
    "rotation": perturbations.RandomRotation,
    "perspective": perturbations.RandomPerspective,
    "gaussian_blur": perturbations.GaussianBlur,
    "noise_patches": perturbations.NoisePatches,
    "zoom_crop": perturbations.ZoomCrop,
    "black_squares": perturbations.BlackSquares,
    "masked_patches": perturbations.MaskedPatches,
}


def views_from_names(entries: Sequence[Any]) -> tuple[Perturbation, ...]:
    """Return the perturbations that configuration entries name.

    Args:
        entries: each a name of `PERTURBATIONS` ("color_jitter"), a one-key mapping of a name to its
            parameters ({"rotation": {"degrees": 5}}), or a perturbation itself.
    Returns: one perturbation per entry, in order.
    Raises: TypeError or ValueError naming the entry, for an empty list, an unknown name or
        parameter (with a suggestion) and a value out of range.
    """
    require_entries("cppo.views_from_names", "perturbation", entries)
    return tuple(_from_entry(entry) for entry in entries)


def _from_entry(entry: Any) -> Perturbation:
    if callable(entry):
        return entry
    name, parameters = name_and_parameters("cppo.views_from_names", entry)
    if name not in PERTURBATIONS:
        message = unknown("perturbation", name, PERTURBATIONS)
        raise ValueError(f"cppo.views_from_names: {message}")
    return build("cppo.views_from_names", PERTURBATIONS[name], name, parameters)
