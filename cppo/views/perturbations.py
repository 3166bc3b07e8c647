"""The image perturbations: each maps an image (C, H, W) in [0, 1] to one of the same size.

Information-preserving: ColorJitter, RandomRotation, RandomPerspective, GaussianBlur.
Information-removing: NoisePatches, ZoomCrop, BlackSquares.
Random numbers are drawn on the CPU, so that a seed means the same view on every device.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cppo.options.values import is_finite_number

_GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in PIL's convert("L")


def _check_range(op: str, name: str, value: Any, low: float, high: float) -> None:
    """Require a (min, max) pair of finite numbers inside [low, high]."""
    pair = value if isinstance(value, (tuple, list)) else (value,)
    is_pair = len(pair) == 2 and all(is_finite_number(bound) for bound in pair)
    if not is_pair or not low <= pair[0] <= pair[1] <= high:
        raise ValueError(
            f"cppo.{op}: {name} must be (min, max) with {low} <= min <= max <= {high}, "
            f"got {value!r}"
        )


def _check_number(op: str, name: str, value: Any, low: float, high: float) -> None:
    if not is_finite_number(value) or not low <= value <= high:
        raise ValueError(f"cppo.{op}: {name} must be a number in [{low}, {high}], got {value!r}")


def _check_count(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"cppo.{op}: {name} must be a whole number >= 1, got {value!r}")


def _check_fill(op: str, value: Any) -> None:
    if value not in ("edge", "black"):
        raise ValueError(f"cppo.{op}: fill must be 'edge' or 'black', got {value!r}")


def _check_image(op: str, image: Tensor) -> None:
    """Shape and dtype always; values only where looking costs no device synchronisation."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"cppo.{op}: image must be a floating point tensor (C, H, W), got {kind}")
    if image.dim() != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise ValueError(
            f"cppo.{op}: image must be (C, H, W) with C = 1 or 3 and H, W >= 1, "
            f"got {tuple(image.shape)}"
        )
    if image.device.type == "cpu":
        check_values(op, "image", image)


def check_values(op: str, name: str, values: Tensor, slack: float = 1e-3) -> None:
    low, high = (float(bound) for bound in torch.stack(torch.aminmax(values)).tolist())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"cppo.{op}: {name} has non-finite pixels")
    if low < -slack or high > 1 + slack:
        raise ValueError(
            f"cppo.{op}: {name} must have pixels in [0, 1], got [{low:.4g}, {high:.4g}]"
        )


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def draw_integer(generator: torch.Generator, low: int, high: int) -> int:
    """A whole number in [low, high], both ends included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


class BasePerturbation:
    """Checks, compute dtype and clamping that all perturbations share."""

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Return the perturbed image, of the input's shape, dtype and device.

        Args:
            image: (C, H, W) floating point in [0, 1], C = 1 or 3; no gradients flow.
            generator: CPU generator; the same state gives the same view on every device.
        Returns: (C, H, W) in [0, 1]; the input is not changed.
        Raises: TypeError or ValueError for another dtype, channel count or value range, and for a
            generator that is not on the CPU.
        """
        op = type(self).__name__
        _check_image(op, image)
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            raise TypeError(f"cppo.{op}: generator must be a torch.Generator on the CPU")
        with torch.no_grad():
            pixels = image.to(torch.promote_types(image.dtype, torch.float32)).clamp(0, 1)
            return self._apply(pixels, generator).clamp(0, 1).to(image.dtype)

    def _apply(self, image: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ColorJitter(BasePerturbation):
    """Scales brightness, contrast and saturation by uniform factors, in a random order.

    Specification: factor f blends towards black (brightness), the mean grey level (contrast) or
    the pixel's own grey (saturation): `f x + (1 - f) x_0`, clamped. Defaults: arXiv 2601.00501.
    """

    brightness: tuple[float, float] = (0.2, 1.3)
    contrast: tuple[float, float] = (0.2, 1.8)
    saturation: tuple[float, float] = (0.2, 1.8)

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            _check_range("ColorJitter", name, getattr(self, name), 0.0, 100.0)

    def _apply(self, image: Tensor, generator: torch.Generator) -> Tensor:
        factors = [
            _uniform(generator, *r) for r in (self.brightness, self.contrast, self.saturation)
        ]
        for which in torch.randperm(3, generator=generator).tolist():
            if which == 0:
                base = torch.zeros_like(image)
            else:
                base = _grey(image) if which == 2 else _grey(image).mean().expand_as(image)
            image = (factors[which] * image + (1 - factors[which]) * base).clamp(0, 1)
        return image


def _grey(image: Tensor) -> Tensor:
    if image.shape[0] == 1:
        return image
    red, green, blue = (w * channel for w, channel in zip(_GREY_WEIGHTS, image, strict=True))
    return (red + green + blue).expand_as(image)


@dataclasses.dataclass(frozen=True)
class RandomRotation(BasePerturbation):
    """Rotates about the centre by an angle uniform in [-degrees, degrees] (bilinear).

    What turns into the frame from outside repeats the nearest edge pixel (`fill="edge"`: no black
    corners that the model could notice), or is black (`fill="black"`: torchvision's default).
    """

    degrees: float = 10.0
    fill: str = "edge"

    def __post_init__(self) -> None:
        _check_number("RandomRotation", "degrees", self.degrees, 0.0, 180.0)
        _check_fill("RandomRotation", self.fill)

    def _apply(self, image: Tensor, generator: torch.Generator) -> Tensor:
        angle = math.radians(_uniform(generator, -self.degrees, self.degrees))
        height, width = image.shape[1:]
        x, y = (width - 1) / 2, (height - 1) / 2
        cos, sin = math.cos(angle), math.sin(angle)
        matrix = [
            [cos, -sin, x - cos * x + sin * y],
            [sin, cos, y - sin * x - cos * y],
            [0.0, 0.0, 1.0],
        ]
        return _warp(image, matrix, self.fill)


@dataclasses.dataclass(frozen=True)
class RandomPerspective(BasePerturbation):
    """With probability p, moves each corner inwards by up to distortion_scale / 2 of the side.

    Specification: torchvision's RandomPerspective (bilinear), `fill` as in RandomRotation.
    """

    distortion_scale: float = 0.2
    p: float = 0.5
    fill: str = "edge"

    def __post_init__(self) -> None:
        # At 1 all four corners can meet in the centre, where no homography exists.
        _check_number("RandomPerspective", "distortion_scale", self.distortion_scale, 0.0, 0.9)
        _check_number("RandomPerspective", "p", self.p, 0.0, 1.0)
        _check_fill("RandomPerspective", self.fill)

    def _apply(self, image: Tensor, generator: torch.Generator) -> Tensor:
        height, width = image.shape[1:]
        moves = torch.rand(4, 2, generator=generator, dtype=torch.float64) * self.distortion_scale
        if _uniform(generator, 0.0, 1.0) >= self.p or min(height, width) < 2:
            return image
        signs = torch.tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]], dtype=torch.float64)
        side = torch.tensor([width - 1, height - 1], dtype=torch.float64)
        corners = (signs < 0) * side
        return _warp(image, _homography(corners + signs * moves * side / 2, corners), self.fill)


def _homography(source: Tensor, target: Tensor) -> list[list[float]]:
    """The 3x3 projective map that takes four (x, y) points onto four others."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source.tolist(), target.tolist(), strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    system = torch.tensor(rows, dtype=torch.float64)
    found = torch.linalg.solve(system, torch.tensor(values, dtype=torch.float64)).tolist()
    return [found[0:3], found[3:6], [*found[6:8], 1.0]]


def _warp(image: Tensor, matrix: list[list[float]], fill: str) -> Tensor:
    """Sample the image at `matrix @ (x, y, 1)` for every output pixel centre (x, y)."""
    height, width = image.shape[1:]
    y = torch.arange(height, device=image.device, dtype=image.dtype)[:, None]
    x = torch.arange(width, device=image.device, dtype=image.dtype)[None, :]
    u, v, w = (a * x + b * y + c for a, b, c in matrix)
    grid = torch.stack([(2 * u / w + 1) / width - 1, (2 * v / w + 1) / height - 1], dim=-1)
    padding = "border" if fill == "edge" else "zeros"
    return F.grid_sample(image[None], grid[None], padding_mode=padding, align_corners=False)[0]


@dataclasses.dataclass(frozen=True)
class GaussianBlur(BasePerturbation):
    """Separable Gaussian blur, edge pixels repeated; kernel_size is odd, sigma in pixels."""

    kernel_size: int = 3
    sigma: float = 1.0

    def __post_init__(self) -> None:
        _check_count("GaussianBlur", "kernel_size", self.kernel_size)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"cppo.GaussianBlur: kernel_size must be odd, got {self.kernel_size}")
        _check_number("GaussianBlur", "sigma", self.sigma, 1e-3, 1e3)

    def _apply(self, image: Tensor, generator: torch.Generator) -> Tensor:
        half = self.kernel_size // 2
        weights = [math.exp(-(d**2) / (2 * self.sigma**2)) for d in range(-half, half + 1)]
        height, width = image.shape[1:]
        padded = F.pad(image[None], (half, half, half, half), mode="replicate")[0]
        # Shifted sums instead of a convolution: no TF32, the same result on every device.
        total = sum(weights)
        rows = [w / total * padded[:, k : k + height] for k, w in enumerate(weights)]
        blurred = torch.stack(rows).sum(0)
        columns = [w / total * blurred[:, :, k : k + width] for k, w in enumerate(weights)]
        return torch.stack(columns).sum(0)


@dataclasses.dataclass(frozen=True)
class NoisePatches(BasePerturbation):
    """Covers `count` random rectangles with uniform noise; sides are `scale` of the image's.

    Specification: RandomOcclusion of the authors' code (50 patches, sides 5-15 %), except that
    a patch is at least one pixel. One noise field under the union of the rectangles has the same
    distribution as noise drawn rectangle by rectangle.
    """

    count: int = 50
    scale: tuple[float, float] = (0.05, 0.15)

    def __post_init__(self) -> None:
        _check_count("NoisePatches", "count", self.count)
        _check_range("NoisePatches", "scale", self.scale, 0.0, 1.0)

    def _apply(self, image: Tensor, generator: torch.Generator) -> Tensor:
        _, height, width = image.shape
        covered = np.zeros((height, width), dtype=bool)
        low, high = self.scale
        draws = torch.rand(self.count, 4, generator=generator, dtype=torch.float64).tolist()
        for across, down, x, y in draws:
            patch_width = max(1, int((low + (high - low) * across) * width))
            patch_height = max(1, int((low + (high - low) * down) * height))
            left, top = int(x * (width - patch_width + 1)), int(y * (height - patch_height + 1))
            covered[top : top + patch_height, left : left + patch_width] = True
        noise = torch.rand(image.shape, generator=generator).to(image)
        return torch.where(torch.from_numpy(covered).to(image.device), noise, image)


@dataclasses.dataclass(frozen=True)
class MaskedPatches(BasePerturbation):
    """Blackens each patch of a grid of `side` pixels with probability `share`.

    Specification: random_patch_blackening of the code of PAPO (14 pixels, 0.6) and VPPO (0.5).
    """

    side: int = 14
    share: float = 0.6

    def __post_init__(self) -> None:
        _check_count("MaskedPatches", "side", self.side)
        _check_number("MaskedPatches", "share", self.share, 0.0, 1.0)

    def _apply(self, image: Tensor, generator: torch.Generator) -> Tensor:
        _, height, width = image.shape
        rows, columns = -(-height // self.side), -(-width // self.side)
        draws = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
        shown = (draws >= self.share).repeat_interleave(self.side, 0)[:height]
        return image * shown.repeat_interleave(self.side, 1)[:, :width].to(image.device)


@dataclasses.dataclass(frozen=True)
class ZoomCrop(BasePerturbation):
    """Crops a random window whose sides are `scale` of the image's and resizes it back."""

    scale: tuple[float, float] = (0.6, 0.7)

    def __post_init__(self) -> None:
        _check_range("ZoomCrop", "scale", self.scale, 0.0, 1.0)

    def _apply(self, image: Tensor, generator: torch.Generator) -> Tensor:
        _, height, width = image.shape
        scale = _uniform(generator, *self.scale)
        crop_height, crop_width = max(1, int(height * scale)), max(1, int(width * scale))
        left = draw_integer(generator, 0, width - crop_width)
        top = draw_integer(generator, 0, height - crop_height)
        crop = image[:, top : top + crop_height, left : left + crop_width]
        return F.interpolate(
            crop[None], size=(height, width), mode="bilinear", align_corners=False
        )[0]


@dataclasses.dataclass(frozen=True)
class BlackSquares(BasePerturbation):
    """Places black squares of `side` pixels until `coverage` of the image is black.

    Specification: BlackSquareCover of the authors' code (14 px, 80 %), except that squares may hang
    over every border, so that each pixel is equally likely to be covered.
    """

    side: int = 14
    coverage: float = 0.8

    def __post_init__(self) -> None:
        _check_count("BlackSquares", "side", self.side)
        _check_number("BlackSquares", "coverage", self.coverage, 0.0, 1.0)

    def _apply(self, image: Tensor, generator: torch.Generator) -> Tensor:
        _, height, width = image.shape
        shown = np.ones((height, width), dtype=bool)
        missing = math.ceil(round(self.coverage * height * width, 6))
        while missing > 0:
            lefts = torch.randint(1 - self.side, width, (256,), generator=generator).tolist()
            tops = torch.randint(1 - self.side, height, (256,), generator=generator).tolist()
            for left, top in zip(lefts, tops, strict=True):
                if missing <= 0:
                    break
                square = shown[max(0, top) : top + self.side, max(0, left) : left + self.side]
                missing -= int(square.sum())
                square[:] = False
        return image * torch.from_numpy(shown).to(image.device)
