"""Views of PIL images and of processor-ready patches: the same picture, seeds, round trips."""

import numpy as np
import pytest
import torch
from PIL import Image
from view_cases import every, scene

from cppo.views import PRESERVING, REMOVING, GaussianBlur, image_seed, perturb, perturb_pixel_values
from cppo.views.patches import PatchLayout, images_from_patches, patches_from_images
from cppo.views.pictures import seen_size


def pil_scene(mode="RGB", size=(56, 40), seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


# ---- PIL images


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("perturbations", [PRESERVING, REMOVING], ids=["preserving", "removing"])
def test_pil_keeps_size_mode_and_alpha(mode, perturbations):
    image = pil_scene(mode, (33, 21))
    for seed in range(6):
        view = perturb(image, perturbations, seed=seed)
        assert view.size == (33, 21) and view.mode == mode
        if mode.endswith("A"):
            assert view.getchannel("A").tobytes() == image.getchannel("A").tobytes()


@pytest.mark.parametrize(
    ("mode", "result"), [("P", "RGB"), ("CMYK", "RGB"), ("YCbCr", "RGB"), ("1", "L")]
)
def test_pil_other_modes_are_converted(mode, result):
    view = perturb(pil_scene("RGB").convert(mode), PRESERVING, seed=0)
    assert view.mode == result and view.size == (56, 40)


def test_pil_views_do_not_depend_on_order_or_number():
    images = [pil_scene(size=(20 + 5 * i, 30), seed=i) for i in range(4)]
    seeds = [11, 7, 99, 3]
    views_ = perturb(images, PRESERVING + REMOVING, seed=seeds)
    order = [2, 0, 3, 1]
    again = perturb(
        [images[i] for i in order], PRESERVING + REMOVING, seed=[seeds[i] for i in order]
    )
    for position, i in enumerate(order):
        assert again[position].tobytes() == views_[i].tobytes()
        alone = perturb(images[i], PRESERVING + REMOVING, seed=seeds[i])
        assert alone.tobytes() == views_[i].tobytes()
    first = perturb(images[:2], PRESERVING, seed=5)
    assert [v.tobytes() for v in perturb(images, PRESERVING, seed=5)[:2]] == [
        v.tobytes() for v in first
    ]
    assert perturb(images[0], PRESERVING, seed=5).tobytes() == first[0].tobytes()


def test_one_is_drawn_per_image_with_equal_probability():
    counts = dict.fromkeys(range(4), 0)

    def counting(which):
        def identity(pixels, generator):
            counts[which] += 1
            return pixels

        return identity

    choices = [counting(i) for i in range(4)]
    for seed in range(400):
        perturb(Image.new("L", (2, 2)), choices, seed=seed)
    assert sum(counts.values()) == 400 and min(counts.values()) > 65


def test_image_seeds_differ_across_images_and_base_seeds():
    assert image_seed(7, 0) == 7
    seeds = {image_seed(base, index) for base in range(50) for index in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**63 for seed in seeds)


def test_negative_seeds_are_accepted():
    assert perturb(pil_scene(), REMOVING, seed=-3).size == (56, 40)


# ---- processor-ready patches


class FakeProcessor:
    """The attributes of a Qwen2-VL image processor that the views read."""

    patch_size, merge_size, temporal_patch_size = 4, 2, 2
    image_mean, image_std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    do_normalize = do_rescale = True
    rescale_factor = 1 / 255


def qwen_patches(images, **options):
    """Patches of PIL images, by transformers' own processor, without a resize."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = module.Qwen2VLImageProcessorPil(do_resize=False, **options)
    inputs = processor(images=images, return_tensors="pt")
    return processor, inputs["pixel_values"], inputs["image_grid_thw"]


PROCESSORS = [
    {},  # Qwen2-VL, Qwen2.5-VL
    {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},  # Qwen3-VL
    {"patch_size": 12, "merge_size": 3, "temporal_patch_size": 1},
    {"patch_size": 4, "do_normalize": False},
    {"patch_size": 4, "do_rescale": False},
    {"patch_size": 4, "rescale_factor": 2 / 255},
]


@pytest.mark.parametrize("options", PROCESSORS, ids=range(len(PROCESSORS)))
def test_patches_round_trip_and_images_are_the_originals(options):
    side = options.get("patch_size", 14) * options.get("merge_size", 2)
    images = [pil_scene(size=(2 * side, 3 * side)), pil_scene(size=(side, 2 * side), seed=1)]
    processor, patches, grid = qwen_patches(images, **options)
    layout = PatchLayout.of(processor)
    found = images_from_patches(patches, grid, layout)
    for image, pixels in zip(images, found, strict=True):
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        torch.testing.assert_close(pixels, expected, atol=3e-7, rtol=0)
    back = patches_from_images(found, layout)
    torch.testing.assert_close(back, patches, atol=3e-7, rtol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_perturbation_gives_the_patches_back(dtype):
    processor, patches, grid = qwen_patches([pil_scene(size=(56, 84)), pil_scene(size=(84, 28))])
    patches = patches.to(dtype)
    view = perturb_pixel_values(patches, grid, lambda x, g: x, seeds=0, image_processor=processor)
    assert view.dtype == dtype
    slack = {torch.float64: 1e-6, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps * 2)
    torch.testing.assert_close(view, patches, atol=slack, rtol=slack)


@every
def test_patches_and_pil_images_give_the_same_view(perturbation):
    images = [pil_scene(size=(56, 84)), pil_scene(size=(112, 56), seed=1)]
    processor, patches, grid = qwen_patches(images)
    view = perturb_pixel_values(
        patches, grid, perturbation, seeds=[3, 4], image_processor=processor
    )
    _, expected, _ = qwen_patches(perturb(images, perturbation, seed=[3, 4]))
    # PIL views are rounded to bytes: half a step, over the smallest std.
    assert float((view - expected).abs().max()) <= 0.5 / 255 / 0.26 + 1e-3


def test_patch_views_are_deterministic_and_independent_of_the_batch():
    images = [pil_scene(size=(56, 84)), pil_scene(size=(28, 56), seed=1), pil_scene(size=(84, 28))]
    processor, patches, grid = qwen_patches(images)
    before = patches.clone()
    counts = grid.prod(1).tolist()
    choices = PRESERVING + REMOVING
    whole = perturb_pixel_values(patches, grid, choices, seeds=[1, 2, 3], image_processor=processor)
    assert torch.equal(patches, before) and whole.shape == patches.shape
    parts, blocks = whole.split(counts), patches.split(counts)
    for i, seed in ((2, 3), (0, 1), (1, 2)):
        alone = perturb_pixel_values(
            blocks[i], grid[i : i + 1], choices, seeds=[seed], image_processor=processor
        )
        assert torch.equal(alone, parts[i])


def test_a_processor_with_an_image_processor_is_accepted():
    class Outer:
        image_processor = FakeProcessor()

    patches = torch.zeros(4, 3 * 2 * 16)
    grid = torch.tensor([[1, 2, 2]])
    view = perturb_pixel_values(patches, grid, GaussianBlur(), seeds=0, image_processor=Outer())
    torch.testing.assert_close(view, patches, atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every
def test_device_views_equal_cpu_views(perturbation):
    patches = patches_from_images(
        [scene(3, 40, 56), scene(3, 64, 24)], PatchLayout.of(FakeProcessor())
    )
    grid = torch.tensor([[1, 10, 14], [1, 16, 6]])
    options = {"seeds": [1, 2], "image_processor": FakeProcessor()}
    cpu = perturb_pixel_values(patches, grid, perturbation, **options)
    gpu = perturb_pixel_values(patches.cuda(), grid.cuda(), perturbation, **options)
    assert gpu.device.type == "cuda"
    torch.testing.assert_close(gpu.cpu(), cpu, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: perturb("cat.png", PRESERVING, seed=0), "image 0 must be a PIL image, got str"),
        (lambda: perturb([pil_scene(), None], PRESERVING, seed=0), "image 1 must be a PIL image"),
        (lambda: perturb(Image.new("I", (4, 4), -1), PRESERVING, seed=0), "must lie in"),
        (lambda: perturb(Image.new("RGB", (0, 4)), PRESERVING, seed=0), r"size \(0, 4\)"),
        (lambda: perturb(pil_scene(), [], seed=0), "at least one perturbation"),
        (lambda: perturb(pil_scene(), ["rotation"], seed=0), "views_from_names"),
        (lambda: perturb([pil_scene()] * 2, REMOVING, seed=[1]), "one seed per image, 2, got 1"),
        (lambda: perturb(pil_scene(), lambda x, g: x[:, 1:], seed=0), "must keep the shape"),
        (lambda: perturb(pil_scene(), lambda x, g: pil_scene(), seed=0), "returned Image"),
        (lambda: perturb(pil_scene(), lambda x, g: 255 * x, seed=0), r"pixels in \[0, 1\], got"),
        (lambda: perturb(pil_scene(), lambda x, g: x / 0 * 0, seed=0), "has non-finite pixels"),
    ],
)
def test_bad_pil_calls(call, message):
    with pytest.raises((TypeError, ValueError), match=f"cppo.perturb: .*{message}"):
        call()


GOOD_GRID = torch.tensor([[1, 2, 4]])


@pytest.mark.parametrize(
    ("patches", "grid", "options", "message"),
    [
        (torch.zeros(8, 95), GOOD_GRID, {}, r"3 \* 2 \* 4\^2 = 96.*got \(8, 95\)"),
        (torch.zeros(8, 96, 1), GOOD_GRID, {}, r"got \(8, 96, 1\)"),
        (torch.zeros(7, 96), GOOD_GRID, {}, "has 7 patches, image_grid_thw .* adds up to 8"),
        (torch.zeros(8, 96), torch.tensor([1, 2, 4]), {}, r"\(images, 3\).*got \(3,\)"),
        (torch.zeros(8, 96), torch.tensor([[1.0, 2, 4]]), {}, "whole numbers"),
        (torch.zeros(0, 96), torch.zeros(0, 3, dtype=torch.long), {}, "at least one image"),
        (torch.zeros(16, 96), torch.tensor([[2, 2, 4]]), {}, r"no video.*got \(2, 2, 4\)"),
        (torch.zeros(9, 96), torch.tensor([[1, 3, 3]]), {}, r"multiples of merge_size 2"),
        (torch.zeros(8, 96, dtype=torch.int32), GOOD_GRID, {}, "floating point"),
        (torch.full((8, 96), float("nan")), GOOD_GRID, {}, "non-finite pixels"),
        (torch.full((8, 96), 9.0), GOOD_GRID, {}, r"de-normalised.*\[0, 1\]"),
        (torch.zeros(8, 96), GOOD_GRID, {"seeds": [1, 2]}, "one seed per image, 1, got 2"),
        (torch.zeros(8, 96), GOOD_GRID, {"image_processor": object()}, "got object"),
        (torch.zeros(8, 96), GOOD_GRID, {"image_processor": None}, "got NoneType"),
    ],
)
def test_bad_patches(patches, grid, options, message):
    call = {"seeds": [0], "image_processor": FakeProcessor(), **options}
    with pytest.raises((TypeError, ValueError), match=f"cppo.perturb_pixel_values: .*{message}"):
        perturb_pixel_values(patches, grid, REMOVING, **call)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image"),
        ([torch.zeros(3, 8, 12)], r"image 0 must be .3, H, W. in multiples of 8, got .3, 8, 12."),
        ([torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)], "image 1 must be"),
    ],
)
def test_bad_images_to_patches(images, message):
    with pytest.raises(ValueError, match=f"cppo.patches_from_images: .*{message}"):
        patches_from_images(images, PatchLayout.of(FakeProcessor()))


# ---- The size at which a model sees a picture


@pytest.mark.parametrize("name", [None, "image", "images"])
def test_the_size_is_seen_however_a_processor_calls_its_resize(name):
    class Halves:
        def resize(self, images, size):
            return images[..., : size[1], : size[0]]

        def __call__(self, images, return_tensors):
            pixels = np.asarray(images[0]).transpose(2, 0, 1)
            half = (pixels.shape[2] // 2, pixels.shape[1] // 2)
            if name is None:
                self.resize(pixels, half)
            else:
                self.resize(size=half, **{name: pixels})

    class HalvesOne(Halves):
        def resize(self, image, size):
            return super().resize(image, size)

    assert seen_size((HalvesOne if name == "image" else Halves)(), (48, 24)) == (24, 12)
