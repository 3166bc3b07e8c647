"""The perturbations: hand-computed pixels, determinism, names, worded errors."""

import dataclasses

import numpy as np
import pytest
import torch
from view_cases import every, generator, scene

from cppo.views import (
    PERTURBATIONS,
    PRESERVING,
    REMOVING,
    BlackSquares,
    ColorJitter,
    GaussianBlur,
    MaskedPatches,
    NoisePatches,
    RandomPerspective,
    RandomRotation,
    ZoomCrop,
    views_from_names,
)

# ---- every perturbation


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_keeps_shape_dtype_range_and_input(perturbation, dtype, channels):
    image = scene(channels).to(dtype)
    before = image.clone()
    view = perturbation(image, generator())
    assert view.shape == image.shape and view.dtype == dtype
    assert float(view.min()) >= 0 and float(view.max()) <= 1
    assert torch.equal(image, before)


@every
def test_same_seed_same_view_other_seed_other_view(perturbation):
    image = scene()
    view = perturbation(image, generator(5))
    assert torch.equal(view, perturbation(image, generator(5)))
    others = [perturbation(image, generator(seed)) for seed in range(8)]
    if isinstance(perturbation, GaussianBlur):  # the one without random numbers
        assert all(torch.equal(view, other) for other in others)
    else:
        assert any(not torch.equal(view, other) for other in others)


@every
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2), (3, 50)])
def test_tiny_images(perturbation, size):
    for seed in range(10):
        view = perturbation(scene(3, *size), generator(seed))
        assert view.shape == (3, *size) and bool(torch.isfinite(view).all())


@every
def test_non_contiguous_input(perturbation):
    image = scene().permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not image.is_contiguous()
    expected = perturbation(image.contiguous(), generator())
    torch.testing.assert_close(perturbation(image, generator()), expected)


# ---- hand-computed


RED = torch.tensor([1.0, 0.0, 0.0])[:, None, None]


@pytest.mark.parametrize(
    ("factors", "image", "expected"),
    [
        ((0.5, 1, 1), scene(), scene() * 0.5),
        # Contrast blends with the mean grey, here 0.4.
        ((1, 0.5, 1), torch.tensor([[[0.2, 0.6]]]), torch.tensor([[[0.3, 0.5]]])),
        # Without saturation red is its grey, and grey stays as it is.
        ((1, 1, 0), RED, torch.full((3, 1, 1), 0.299)),
        ((1, 1, 0), scene(1), scene(1)),
    ],
)
def test_jitter(factors, image, expected):
    jitter = ColorJitter(*((factor, factor) for factor in factors))
    torch.testing.assert_close(jitter(image, generator()), expected)


def test_jitter_factors_lie_in_their_ranges():
    jitter = ColorJitter(brightness=(0.2, 1.3), contrast=(1, 1), saturation=(1, 1))
    image = torch.full((3, 2, 2), 0.5)
    factors = torch.tensor([float(jitter(image, generator(s))[0, 0, 0]) / 0.5 for s in range(300)])
    assert 0.2 <= float(factors.min()) < 0.25 and 1.25 < float(factors.max()) <= 1.3001


def test_blur_of_a_point_is_the_gaussian_kernel():
    point = torch.zeros(1, 5, 5)
    point[0, 2, 2] = 1
    weights = torch.tensor([np.exp(-0.5), 1.0, np.exp(-0.5)], dtype=torch.float32)
    weights = weights / weights.sum()
    view = GaussianBlur(3, 1.0)(point, generator())
    torch.testing.assert_close(view[0, 1:4, 1:4], weights[:, None] * weights[None, :])
    assert float(view[0, 0].abs().sum()) == 0


@pytest.mark.parametrize("perturbation", [GaussianBlur(5, 2.0), RandomRotation(180), ZoomCrop()])
def test_constant_image_stays_constant(perturbation):
    image = torch.full((3, 17, 23), 0.7)
    torch.testing.assert_close(perturbation(image, generator(3)), image)


def test_rotation_by_a_right_angle_is_rot90(monkeypatch):
    monkeypatch.setattr("cppo.views.perturbations._uniform", lambda *_: 90.0)
    image = torch.rand(3, 9, 9, generator=generator())
    view = RandomRotation(90)(image, generator())
    candidates = [torch.rot90(image, k, (1, 2)) for k in (1, 3)]
    assert min(float((view - c).abs().max()) for c in candidates) < 1e-5


def test_rotation_by_zero_is_the_image():
    image = scene()
    torch.testing.assert_close(RandomRotation(0)(image, generator()), image, atol=2e-5, rtol=0)


def test_rotation_fill():
    image = torch.ones(1, 33, 33)
    edge = RandomRotation(45, fill="edge")(image, generator(1))
    black = RandomRotation(45, fill="black")(image, generator(1))
    assert float(edge.min()) > 0.999
    assert float(black[0, 0, 0]) == 0 and float(black[0, 16, 16]) > 0.999


def test_rotation_angles_reach_both_signs_and_stay_small():
    # A horizontal ramp tilts by the angle: the slope along y tells its sine.
    ramp = torch.linspace(0, 1, 101)[None, None, :].expand(1, 101, 101)
    slopes = []
    for seed in range(100):
        view = RandomRotation(10)(ramp, generator(seed))
        slopes.append(float(view[0, 60, 50] - view[0, 40, 50]) * 100 / 20)
    limit = np.sin(np.radians(10)) + 1e-3
    assert -limit <= min(slopes) < -0.12 and 0.12 < max(slopes) <= limit


def test_perspective_probability_and_strength():
    image = scene()
    assert torch.equal(RandomPerspective(0.2, p=0.0)(image, generator()), image)
    unchanged = sum(
        torch.equal(RandomPerspective()(image, generator(seed)), image) for seed in range(200)
    )
    assert 70 <= unchanged <= 130
    same = RandomPerspective(0.0, p=1.0)(image, generator())
    torch.testing.assert_close(same, image, atol=2e-5, rtol=0)


def test_perspective_moves_corners_inwards(monkeypatch):
    monkeypatch.setattr("torch.rand", lambda *s, **k: torch.ones(*s, dtype=torch.float64))
    monkeypatch.setattr("cppo.views.perturbations._uniform", lambda *_: 0.0)
    # All corners move by the full 0.5 / 2 of the side: the image shrinks to the central half.
    image = scene(1, 41, 41)
    view = RandomPerspective(0.5, p=1.0, fill="black")(image, generator())
    torch.testing.assert_close(view[0, 10, 10], image[0, 0, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(view[0, 30, 30], image[0, 40, 40], atol=1e-4, rtol=0)
    torch.testing.assert_close(view[0, 20, 20], image[0, 20, 20], atol=1e-4, rtol=0)
    torch.testing.assert_close(view[0, 20, 15], image[0, 20, 10], atol=1e-4, rtol=0)
    assert float(view[0, :9].abs().max()) == 0


def test_zoom_crop_of_a_ramp_stays_a_ramp_with_a_smaller_slope():
    ramp = torch.linspace(0, 1, 100)[None, None, :].expand(1, 60, 100)
    view = ZoomCrop((0.6, 0.7))(ramp, generator(4))
    slope = float(view[0, 30, 80] - view[0, 30, 20]) / 60 * 99
    assert 0.59 <= slope <= 0.71
    whole = ZoomCrop((1.0, 1.0))(ramp, generator())
    torch.testing.assert_close(whole, ramp)


def test_noise_patches_cover_what_they_should():
    image = torch.full((3, 200, 200), 2.0 / 3)
    view = NoisePatches()(image, generator(1))
    share = float((view != image).any(0).float().mean())
    # 50 patches of mean area 0.01: 1 - exp(-0.5) = 0.39 if they could wrap around.
    assert 0.25 < share < 0.5
    covered = (view != image).any(0)
    assert abs(float(view[:, covered].mean()) - 0.5) < 0.02
    one = NoisePatches(count=1, scale=(0.1, 0.1))(image, generator(1))
    assert int((one != image).any(0).sum()) == 20 * 20


@pytest.mark.parametrize("coverage", [0.0, 0.3, 0.8, 0.99, 1.0])
def test_black_squares_reach_their_coverage(coverage):
    image = torch.ones(3, 70, 90)
    view = BlackSquares(14, coverage)(image, generator())
    black = float((view[0] == 0).float().mean())
    assert coverage <= black <= min(1.0, coverage + 14 * 14 / (70 * 90))
    assert torch.equal(view[0], view[1]) and torch.equal(view[0], view[2])


def test_black_squares_reach_the_borders_as_often_as_the_middle():
    image = torch.ones(1, 30, 30)
    mean = torch.stack([BlackSquares(8, 0.5)(image, generator(s)) for s in range(150)]).mean(0)[0]
    assert abs(float(mean[0, 0]) - 0.5) < 0.16 and abs(float(mean[15, 15]) - 0.5) < 0.16


def test_masked_patches_are_a_grid_of_squares():
    image = torch.full((3, 60, 45), 0.5)
    view = MaskedPatches(14, 0.6)(image, generator(2))
    for top in range(0, 60, 14):
        for left in range(0, 45, 14):
            assert len(view[:, top : top + 14, left : left + 14].unique()) == 1
    black = [(MaskedPatches(7, 0.6)(image, generator(s)) == 0).float().mean() for s in range(50)]
    assert abs(float(torch.stack(black).mean()) - 0.6) < 0.02
    assert torch.equal(MaskedPatches(share=0.0)(image, generator()), image)
    assert not MaskedPatches(share=1.0)(image, generator()).any()


def test_paper_parameters_are_the_defaults():
    assert ColorJitter() == ColorJitter((0.2, 1.3), (0.2, 1.8), (0.2, 1.8))
    assert RandomPerspective() == RandomPerspective(0.2, 0.5)
    assert RandomRotation().degrees == 10 and GaussianBlur() == GaussianBlur(3, 1.0)
    assert NoisePatches() == NoisePatches(50, (0.05, 0.15)) and ZoomCrop() == ZoomCrop((0.6, 0.7))
    assert BlackSquares() == BlackSquares(14, 0.8)
    assert MaskedPatches() == MaskedPatches(14, 0.6)
    kinds = [type(p).__name__ for p in PRESERVING + REMOVING]
    assert (
        kinds
        == "ColorJitter RandomPerspective RandomRotation GaussianBlur NoisePatches ZoomCrop".split()
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESERVING[0].brightness = (1, 1)


# ---- names


def test_views_from_names():
    entries = [{"rotation": {"degrees": 5}}, {"zoom_crop": {"scale": [0.5, 0.9]}}, ZoomCrop()]
    found = views_from_names(["color_jitter", *entries])
    assert found == (ColorJitter(), RandomRotation(5), ZoomCrop((0.5, 0.9)), ZoomCrop())
    assert views_from_names(list(PERTURBATIONS)) == tuple(p() for p in PERTURBATIONS.values())


# ---- errors


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["colour_jitter"], "unknown perturbation 'colour_jitter'; did you mean 'color_jitter'"),
        (["xyz"], "unknown perturbation 'xyz' .allowed: color_jitter"),
        ([{"rotation": {"degree": 5}}], "parameter of 'rotation' 'degree'; did you mean 'degrees'"),
        ([{"rotation": 5}], "parameters of 'rotation' must be a mapping, got 5"),
        ([{"rotation": {}, "zoom_crop": {}}], "an entry is a name or"),
        ([3], "an entry is a name or"),
        ([], "at least one"),
        ("rotation", "must be a list"),
        ([{"rotation": {"degrees": 500}}], r"degrees must be a number in \[0.0, 180.0\], got 500"),
    ],
)
def test_bad_names(entries, message):
    with pytest.raises((ValueError, TypeError), match=message):
        views_from_names(entries)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ColorJitter(brightness=(1.3, 0.2)), "ColorJitter: brightness must be .min, max."),
        (lambda: ColorJitter(contrast=(-0.1, 1)), "contrast"),
        (lambda: ColorJitter(saturation=1.0), "saturation must be .min, max.*got 1.0"),
        (lambda: ColorJitter(saturation=(0, float("nan"))), "saturation"),
        (lambda: RandomRotation(degrees=-1), "degrees must be a number"),
        (lambda: RandomRotation(degrees="10"), "degrees must be a number.*got '10'"),
        (lambda: RandomRotation(fill="white"), "fill must be 'edge' or 'black', got 'white'"),
        (lambda: RandomPerspective(distortion_scale=1.0), "distortion_scale"),
        (lambda: RandomPerspective(p=1.5), r"p must be a number in \[0.0, 1.0\], got 1.5"),
        (lambda: GaussianBlur(kernel_size=4), "kernel_size must be odd, got 4"),
        (lambda: GaussianBlur(kernel_size=0), "kernel_size must be a whole number"),
        (lambda: GaussianBlur(sigma=0), "sigma"),
        (lambda: NoisePatches(count=2.5), "count must be a whole number >= 1, got 2.5"),
        (lambda: NoisePatches(scale=(0.1, 1.2)), "scale"),
        (lambda: ZoomCrop(scale=(0.9, 0.8)), "scale"),
        (lambda: BlackSquares(side=0), "side"),
        (lambda: MaskedPatches(side=0), "side"),
        (lambda: MaskedPatches(share=1.1), r"share must be a number in \[0.0, 1.0\], got 1.1"),
        (lambda: BlackSquares(coverage=80), r"coverage must be a number in \[0.0, 1.0\], got 80"),
    ],
)
def test_bad_parameters(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(4, 5, 5), ValueError, r"C = 1 or 3 .*got \(4, 5, 5\)"),
        (torch.zeros(5, 5), ValueError, r"got \(5, 5\)"),
        (torch.zeros(3, 0, 5), ValueError, "H, W >= 1"),
        (torch.zeros(3, 5, 5, dtype=torch.uint8), TypeError, "floating point.*uint8"),
        (np.zeros((3, 5, 5)), TypeError, "floating point.*ndarray"),
        (torch.full((3, 5, 5), float("nan")), ValueError, "non-finite"),
        (torch.full((3, 5, 5), float("inf")), ValueError, "non-finite"),
        (torch.full((3, 5, 5), 255.0), ValueError, r"pixels in \[0, 1\], got \[255, 255\]"),
    ],
)
def test_bad_images(image, error, message):
    with pytest.raises(error, match=f"cppo.ZoomCrop: .*{message}"):
        ZoomCrop()(image, generator())


def test_bad_generator():
    with pytest.raises(TypeError, match="generator must be a torch.Generator on the CPU"):
        ZoomCrop()(scene(), 3)
