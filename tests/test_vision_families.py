"""Each family that takes images: its processor without torchvision, its files, its tiny model."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available
from vision_families import FAMILIES, tiny_vision
from vision_pictures import picture, prepared

from cppo.model.load import load_model, load_processor, save_processor


def assert_same_pixels(found, expected):
    """Torchvision's resizing rounds otherwise; in noise a few pixels are far off for that."""
    assert found.shape == expected.shape
    bound = 0.02 if is_torchvision_available() else 0
    assert (found - expected).abs().mean() <= bound


WIDE, TALL, OTHER = picture(60, 40, 0), picture(30, 80, 1), picture(60, 40, 2)


def encode(processor, *images):
    return prepared(processor, "What is it?", images)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param, *tiny_vision(request.param)


@pytest.mark.parametrize("images", [(), (WIDE,), (WIDE, TALL)], ids=["none", "one", "two"])
def test_a_model_reads_its_processors_pictures(family, images):
    name, model, processor = family
    if name == "paligemma" and not images:
        with pytest.raises(ValueError, match="`images` are expected"):
            encode(processor)
        return
    inputs = encode(processor, *images)
    found = logits(model, inputs)
    assert found.shape[:2] == inputs["input_ids"].shape and found.isfinite().all()
    assert ("pixel_values" in inputs) == bool(images)
    if images:
        changed = logits(model, encode(processor, OTHER, *images[1:]))
        assert (changed - found)[:, -1].abs().max() > 1e-3
    generated = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape[1] == found.shape[1] + 3


def saved(name, model, processor, folder):
    """The processor as loaded from a folder that was saved."""
    model.save_pretrained(folder)
    save_processor(processor, folder)
    if name != "mistral3" or is_torchvision_available():
        return load_processor(folder)
    with pytest.raises(ValueError, match="PixtralProcessor requires the Torchvision.*pip install"):
        load_processor(folder)
    return processor


def test_files(family, tmp_path):
    name, model, processor = family
    loaded = saved(name, model, processor, tmp_path)
    inputs, again = encode(processor, WIDE, TALL), encode(loaded, WIDE, TALL)
    assert inputs.keys() == again.keys()
    pixels = inputs["pixel_values"], again.pop("pixel_values")
    assert_same_pixels(*pixels)
    assert all(torch.equal(inputs[key], again[key]) for key in again)
    assert torch.equal(
        logits(model, inputs), logits(load_model(tmp_path), {**again, "pixel_values": pixels[0]})
    )


@pytest.mark.parametrize("name", ["internvl", "llava_onevision", "smolvlm", "glm4v", "gemma4"])
def test_video_settings_are_saved(name, tmp_path):
    """Those of the folder it was loaded from, or else those of images under the video class."""
    model, processor = tiny_vision(name)
    folder = tmp_path / "first"
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    video = settings["video_processor"]
    kind = type(processor).__name__.replace("Processor", "VideoProcessor")
    assert video["video_processor_type"] == kind and "image_processor_type" not in video
    settings["video_processor"] = {"video_processor_type": kind, "num_frames": 7}
    file.write_text(json.dumps(settings))
    load_processor(folder).save_pretrained(tmp_path / "second")
    written = json.loads((tmp_path / "second" / "processor_config.json").read_text())
    if is_torchvision_available():
        assert written["video_processor"]["num_frames"] == 7
    else:
        assert written["video_processor"] == settings["video_processor"]
        del written["video_processor"], settings["video_processor"]
        assert written == settings


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_of_earlier_files_that_names_torchvisions_class(name, tmp_path):
    """As hubs have them: the settings of images in a file of their own, under the fast class."""
    if name == "mistral3" and not is_torchvision_available():
        pytest.skip("its processor needs torchvision")
    model, processor = tiny_vision(name)
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    settings = json.loads(file.read_text())
    images = settings.pop("image_processor")
    settings.pop("video_processor", None)
    if sounds := settings.pop("feature_extractor", None):
        settings["feature_extractor"] = sounds
    for ending in ("", "Fast"):
        kind = images["image_processor_type"].removesuffix("Fast").removesuffix("Pil") + ending
        images["image_processor_type"] = kind
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
        file.write_text(json.dumps(settings))
        loaded = load_processor(tmp_path)
        inputs, again = encode(processor, WIDE, TALL), encode(loaded, WIDE, TALL)
        assert torch.equal(inputs["input_ids"], again["input_ids"])
        assert_same_pixels(inputs["pixel_values"], again["pixel_values"])


def test_the_class_that_a_folder_names_comes_first(tmp_path):
    """Pixtral 12B, for one, is a LLaVA with another family's processor."""
    model, processor = tiny_vision("llava")
    model.config.save_pretrained(tmp_path)
    tiny_vision("internvl")[1].save_pretrained(tmp_path)
    assert type(load_processor(tmp_path)).__name__ == "InternVLProcessor"


def test_videos_are_refused_without_a_video_part():
    _, processor = tiny_vision("internvl")
    assert processor.video_processor.num_frames is None
    with pytest.raises(ValueError, match="without its video part"):
        processor(text="<video>", videos=[np.zeros((2, 28, 28, 3), dtype=np.uint8)])


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
@pytest.mark.parametrize("name", FAMILIES)
def test_plain_transformers_opens_what_was_saved(name, tmp_path):
    model, processor = tiny_vision(name)
    model.config.save_pretrained(tmp_path)
    save_processor(processor, tmp_path)
    plain = AutoProcessor.from_pretrained(tmp_path)
    if "video_processor" in type(plain).get_attributes():
        assert type(plain.video_processor).__name__.endswith("VideoProcessor")
    inputs, again = encode(processor, WIDE, TALL), encode(plain, WIDE, TALL)
    assert torch.equal(inputs["input_ids"], again["input_ids"])
    assert_same_pixels(inputs["pixel_values"], again["pixel_values"])
