"""Images in every form, mode and dtype: the picture stays, worked out pixel by pixel."""

import base64
import io
import pathlib

import numpy as np
import pytest
from PIL import Image
from question_cases import encoded, picture

from cppo.questions import as_question, load_image
from cppo.views import ColorJitter, perturb


def pixels(image):
    return np.asarray(image).tolist()


def grey(values, dtype="uint8"):
    return Image.fromarray(np.array([values], dtype=dtype))


# ---- Forms


@pytest.mark.parametrize(
    "form",
    "pil path str bytes bytearray memoryview dict-bytes dict-path array file data data-plain "
    "base64".split(),
)
def test_image_forms(form, tmp_path):
    image = picture(13, 11)
    file = tmp_path / "a b.png"
    image.save(file)
    data = encoded(image)
    text = base64.b64encode(data).decode()
    source = {
        "pil": image,
        "path": file,
        "str": str(file),
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "dict-bytes": {"bytes": data, "path": "elsewhere.png"},
        "dict-path": {"bytes": None, "path": str(file)},
        "array": np.asarray(image),
        "file": file.as_uri(),
        "data": f"data:image/png;base64,{text}",
        "data-plain": "data:image/png," + "".join(f"%{byte:02x}" for byte in data),
        "base64": text,
    }[form]
    (found,) = as_question({"prompt": "?", "image": source}).images
    assert found.mode == "RGB" and found.tobytes() == image.tobytes()
    assert len(as_question({"prompt": "?", "images": [source, source]}).images) == 2


def test_base64_as_people_write_it():
    data = encoded(picture(3, 3))
    plain = base64.b64encode(data).decode()
    lines = base64.encodebytes(data).decode()
    address = base64.urlsafe_b64encode(data).decode().rstrip("=")
    for text in (plain, lines, address):
        assert load_image(f"data:;base64,{text}").size == (3, 3)


def test_an_array_of_images_is_several_and_an_image_array_one():
    stack = np.zeros((2, 5, 4, 3), dtype=np.uint8)
    sizes = [image.size for image in as_question({"prompt": "?", "images": stack}).images]
    assert sizes == [(4, 5), (4, 5)]
    for one in (stack[0], stack[0, :, :, 0]):
        assert [i.size for i in as_question({"prompt": "?", "image": one}).images] == [(4, 5)]
    paths = np.array(["none.png"])
    with pytest.raises(ValueError, match="image 0: there is no file none.png"):
        as_question({"prompt": "?", "images": paths})


def test_plain_images_are_not_copied():
    for mode in ("L", "RGB"):
        image = Image.new(mode, (3, 3))
        assert load_image(image) is image


@pytest.mark.parametrize(
    ("size", "expected"),
    [((14, 20), (28, 40)), ((20, 14), (40, 28)), ((28, 28), (28, 28)), ((1, 100), (28, 2800))],
)
def test_min_image_side(size, expected):
    question = as_question({"prompt": "?", "image": picture(*size)}, min_image_side=28)
    assert question.images[0].size == expected
    assert as_question({"prompt": "?", "image": picture(*size)}).images[0].size == size


# ---- Modes

# 16 bits: 0, 10 * 257, 65535 and 1000, which is 3.89 * 257.
DEEP, SHALLOW = [0, 2570, 65535, 1000], [0, 10, 255, 4]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_sixteen_bits(mode):
    image = Image.new(mode, (4, 1))
    for x, value in enumerate(DEEP):
        image.putpixel((x, 0), value)
    assert pixels(load_image(image)) == [SHALLOW]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_files(kind):
    assert pixels(load_image(encoded(grey(DEEP, "uint16"), kind))) == [SHALLOW]
    dark = grey([0, 200, 255], "uint16")  # 200 / 257 = 0.78: no 8-bit values
    assert pixels(load_image(encoded(dark, kind))) == [[0, 1, 1]]


def test_a_sixteen_bit_png_of_older_pillows():
    image = Image.open(io.BytesIO(encoded(grey([0, 200, 255], "uint16"))))
    image = image.convert("I")
    image.format = "PNG"
    assert pixels(load_image(image)) == [[0, 1, 1]]


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        (DEEP, "int32", SHALLOW),
        ([0, 7, 255], "int32", [0, 7, 255]),
        ([0.0, 0.5, 1.0], "float32", [0, 128, 255]),
        ([0.0, 0.2, 1.0005], "float32", [0, 51, 255]),
        ([0.0, 99.6, 255.0], "float32", [0, 100, 255]),
        ([0.0, 2.0, 3.0], "float32", [0, 2, 3]),
    ],
)
def test_integers_and_floats(values, dtype, expected):
    for source in (grey(values, dtype), np.array([values], dtype=dtype)):
        assert pixels(load_image(source)) == [expected]
    assert pixels(load_image(encoded(grey(values, dtype), "TIFF"))) == [expected]


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("uint8", [0, 1, 255], [0, 1, 255]),
        ("bool", [False, True], [0, 255]),
        ("uint16", DEEP, SHALLOW),
        (">u2", DEEP, SHALLOW),
        ("int16", [0, 257 * 100], [0, 100]),
        ("int8", [0, 127], [0, 127]),
        ("uint32", DEEP, SHALLOW),
        ("int64", [0, 200], [0, 200]),
        ("uint64", DEEP, SHALLOW),
        ("float16", [0, 1], [0, 255]),
        ("float64", [0.0, 0.6], [0, 153]),
        ("float64", [0.0, 24.4], [0, 24]),
    ],
)
@pytest.mark.parametrize("channels", [0, 1, 3])
def test_dtypes_and_channels(dtype, values, expected, channels):
    array = np.array([values], dtype=dtype)
    if channels:
        array = array[:, :, None].repeat(channels, 2)
    found = load_image(array)
    assert found.mode == ("RGB" if channels == 3 else "L")
    assert pixels(found.convert("L")) == [expected]


@pytest.mark.parametrize(
    ("pixel", "dtype", "expected"),
    [
        ([100, 51], "uint8", [224] * 3),
        ([100, 110, 120, 51], "uint8", [224, 226, 228]),
        ([0.4, 0.2], "float32", [224.4] * 3),  # 0.4 * 0.2 + 0.8 = 0.88 of white
        ([25700, 13107], "uint16", [224] * 3),
        ([True, True, False, True], "bool", [255, 255, 0]),
    ],
)
def test_the_last_of_two_or_four_channels_is_alpha(pixel, dtype, expected):
    found = load_image(np.array([[pixel]], dtype=dtype))
    assert np.abs(np.subtract(found.getpixel((0, 0)), expected)).max() <= 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (grey([-1, 5], "int32"), r"int32 must lie in \[0, 255\] or \[0, 65535\], got -1 to 5"),
        (grey([0, 70000], "int32"), "got 0 to 70000; scale them"),
        (grey([0, 300], "float32"), r"float32 must lie in \[0, 1\] or \[0, 255\], got 0 to 300"),
        (np.linspace(0, 1.01, 64).reshape(8, 8), "got 0 to 1.01; scale them"),
        (np.array([[0, 1.05]]), "got 0 to 1.05; scale them"),
        (np.array([[0, 1.5]], np.float32), "got 0 to 1.5; scale them"),
        (grey([0.5, 9.5], "float32"), "got 0.5 to 9.5; scale them"),
        (np.array([[-0.5, 0.5]]), "got -0.5 to 0.5"),
        (np.array([[np.nan, 0.5]]), "got nan to nan"),
        (np.array([[np.inf, 0.5]]), "got 0.5 to inf"),
        (np.zeros((3, 8, 9), np.uint8), r"\(H, W, 1 to 4\), got \(3, 8, 9\); channels go last"),
        (np.zeros((8, 9, 5), np.uint8), r"got \(8, 9, 5\)"),
        (np.zeros((0, 9), np.uint8), r"got \(0, 9\)"),
        (np.zeros(9, np.uint8), r"got \(9,\)"),
        (np.zeros((2, 2), complex), "must be bool, integers or floats, got the dtype complex128"),
        ([[1, 2], [3, 4]], "must be a PIL image, an array, .* got list"),
        ("data:image/png;base64,!!", "cannot read the data address 'data:image/png;base64,!!'"),
        ("data:image/png;base64", "cannot read the data address"),
        ("s3://bucket/a.png", "nothing is downloaded, got the address 's3://bucket/a.png'"),
        ("file://server/a.png", "nothing is downloaded"),
        ("/9j/none.jpg", "there is no file /9j/none.jpg"),
        ("x" * 5000, "cannot read the image|there is no file"),
        ("", "there is no file"),
        (b"", "cannot read the image"),
        (b"no image", r"cannot read the image \(.*\): its bytes are no image of a known format$"),
        (pathlib.Path("/"), "cannot read the image"),
    ],
)
def test_what_is_no_picture(source, message):
    with pytest.raises((TypeError, ValueError), match=f"^cppo.load_image: .*({message})") as caught:
        load_image(source)
    assert len(str(caught.value)) < 600


def test_colour_spaces():
    colour = (200, 100, 50)
    image = Image.new("RGB", (2, 1), colour)
    for mode in ("RGBX", "CMYK", "HSV"):
        assert load_image(image.convert(mode)).getpixel((0, 0)) == colour
    # BT.601 in full range, each of Y, Cb and Cr rounded: Y = 124, Cb = 86, Cr = 182.
    assert image.convert("YCbCr").getpixel((0, 0)) == (124, 86, 182)
    found = load_image(image.convert("YCbCr")).getpixel((0, 0))
    assert np.abs(np.subtract(found, colour)).max() <= 1
    lab = load_image(image.convert("LAB"))
    assert lab.mode == "RGB" and np.abs(np.subtract(lab.getpixel((0, 0)), colour)).max() <= 2


def test_palettes():
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 4, 5, 6])
    image.putpixel((1, 0), 1)
    assert pixels(load_image(image)) == [[[1, 2, 3], [4, 5, 6]]]
    white = [255, 255, 255]
    assert pixels(load_image(encoded(image, transparency=0))) == [[white, [4, 5, 6]]]
    # Alpha 255 and 51, a fifth: 4, 5, 6 over white are 204 + 0.8, 204 + 1, 204 + 1.2.
    partly = load_image(encoded(image, transparency=bytes([255, 51])))
    assert pixels(partly)[0][0] == [1, 2, 3]
    assert np.abs(np.subtract(pixels(partly)[0][1], [204.8, 205, 205.2])).max() < 1


def test_one_bit():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    for source in (image, encoded(image), encoded(image, "TIFF")):
        found = load_image(source)
        assert found.mode == "L" and pixels(found) == [[0, 255]]


# ---- Transparency


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_transparency_is_over_white(mode):
    # A fifth of the colour and four fifths of white: 0.2 * 100 + 0.8 * 255 = 224.
    image = Image.new("RGBA", (1, 1), (100, 100, 100, 51))
    if mode == "PA":
        image = Image.new("P", (1, 1))
        image.putpalette([100, 100, 100] * 256)
        image = image.convert("PA")
        image.putalpha(51)
    elif mode == "RGBa":
        image = image.convert("RGBa")
    elif mode in ("LA", "La"):
        image = Image.new("LA", (1, 1), (100, 51)).convert(mode)
    assert image.mode == mode
    found = load_image(image)
    assert found.mode == "RGB"
    assert np.abs(np.subtract(found.getpixel((0, 0)), 224)).max() <= 1


def test_clear_pixels_are_white():
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)
    half = load_image(Image.new("RGBA", (2, 2), (0, 0, 0, 128))).getpixel((0, 0))
    assert half == (127, 127, 127)


@pytest.mark.parametrize(
    ("image", "clear", "expected"),
    [
        (grey([9, 99]), 9, [255, 99]),
        (grey([2570, 25700], "uint16"), 2570, [255, 100]),
        (Image.new("RGB", (1, 1), (1, 2, 3)), (1, 2, 3), [255]),
    ],
)
def test_one_transparent_value(image, clear, expected):
    found = load_image(encoded(image, transparency=clear))
    assert pixels(found) == [[[value] * 3 for value in expected]]


# ---- Orientation

# The upright picture is 2 wide and 3 high; for each EXIF orientation, how a camera stored it.
UPRIGHT = np.array([[1, 2], [3, 4], [5, 6]], dtype=np.uint8) * 40
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),  # shown after a quarter turn clockwise
    7: UPRIGHT[::-1, ::-1].T,
    8: np.rot90(UPRIGHT, -1),
}


def oriented(orientation, kind="PNG"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(np.ascontiguousarray(STORED[orientation])), kind, exif=exif)


@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_upright(orientation):
    data = oriented(orientation)
    opened = Image.open(io.BytesIO(data))
    for source in (data, opened):
        found = load_image(source)
        assert pixels(found) == UPRIGHT.tolist()
        # Nothing is left that would turn it once more.
        assert found.getexif().get(0x0112, 1) == 1
        assert load_image(found) is found


def test_photos_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(encoded(picture(30, 20), "JPEG", exif=exif)).size == (20, 30)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK"])
def test_every_mode_is_turned(mode):
    image = Image.new("RGB", (30, 20)).convert(mode)
    image.getexif()[0x0112] = 6
    assert load_image(image).size == (20, 30)


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0junk"])
def test_a_damaged_exif_block_is_no_reason_to_lose_a_picture(block):
    assert load_image(encoded(picture(), "JPEG", exif=block)).size == (30, 20)


# ---- Views take the same images


def same(image, generator):
    return image


@pytest.mark.parametrize(
    ("source", "mode", "expected"),
    [
        (grey(DEEP, "uint16"), "L", SHALLOW),
        (grey(DEEP, "int32"), "L", SHALLOW),
        (grey([0.0, 0.2, 1.0], "float32"), "L", [0, 51, 255]),
        (Image.new("1", (1, 1), 1), "L", [255]),
        (Image.new("HSV", (1, 1), (0, 0, 77)), "RGB", [[77, 77, 77]]),
        (Image.new("LA", (1, 1), (100, 255)).convert("La"), "LA", [[100, 255]]),
        (Image.new("RGBA", (1, 1), (9, 8, 7, 255)).convert("RGBa"), "RGBA", [[9, 8, 7, 255]]),
    ],
)
def test_views_keep_the_picture(source, mode, expected):
    view = perturb(source, same, seed=0)
    assert view.mode == mode and pixels(view) == [expected]
    assert perturb(source, ColorJitter(), seed=0).size == source.size


def test_views_are_upright_and_keep_alpha():
    for orientation in STORED:
        image = Image.open(io.BytesIO(oriented(orientation)))
        assert pixels(perturb(image, same, seed=0)) == UPRIGHT.tolist()
    image = Image.open(io.BytesIO(encoded(grey([9, 99]), transparency=9)))
    assert pixels(perturb(image, same, seed=0)) == [[[9, 0], [99, 255]]]


def test_views_refuse_what_load_image_refuses():
    with pytest.raises(ValueError, match="cppo.perturb: image 1: pixels .* got -1 to 5; scale"):
        perturb([picture(), grey([-1, 5], "int32")], same, seed=0)
