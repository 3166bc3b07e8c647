"""Image views for contrastive perception: information-preserving and information-removing.

Data flow: image in [0, 1] -> one perturbation drawn per image -> image of the same size, so that
the token ids and positions of the original are reused. PIL images and processor-ready patches go
through the same tensor code. Every random number comes from a CPU generator of the image's own
seed: a view depends neither on its neighbours nor on the device.
"""

from __future__ import annotations

from cppo.views.draws import image_seed, perturb, perturb_pixel_values
from cppo.views.perturbations import (
    BlackSquares,
    ColorJitter,
    GaussianBlur,
    MaskedPatches,
    NoisePatches,
    RandomPerspective,
    RandomRotation,
    ZoomCrop,
)
from cppo.views.pictures import cuts_patches, differ_in_pixels_alone, prepared_views
from cppo.views.registry import (
    PERTURBATIONS,
    PRESERVING,
    REMOVING,
    Perturbation,
    views_from_names,
)

__all__ = [
    "PERTURBATIONS",
    "PRESERVING",
    "REMOVING",
    "BlackSquares",
    "ColorJitter",
    "GaussianBlur",
    "MaskedPatches",
    "NoisePatches",
    "Perturbation",
    "RandomPerspective",
    "RandomRotation",
    "ZoomCrop",
    "cuts_patches",
    "differ_in_pixels_alone",
    "image_seed",
    "perturb",
    "perturb_pixel_values",
    "prepared_views",
    "views_from_names",
]
