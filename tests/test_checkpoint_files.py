"""A checkpoint has every file of its base, whatever is installed where it is written."""

import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from trainer_cases import tiny, trainer_for
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor

import cppo
from cppo.demo.warmup import CHECKPOINTS
from cppo.model.load import load_model, load_processor, save_processor
from cppo.train.checkpoint import last_checkpoint

VIDEO = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 12, "max_frames": 5}
# Not the checkpoint's: weights, and what says something about the base alone.
NOT_KEPT = {"model.safetensors", "README.md", ".gitattributes", "pytorch_model.bin", "eval.py"}


def rewrite(file, **changes):
    """Changes the entries of a JSON file; None takes one out."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def base_folder(folder, family, video="none"):
    """A base checkpoint as they are on the hub, with files of earlier formats beside the new."""
    model, processor = tiny(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer = getattr(processor, "tokenizer", processor)
    (folder / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "added_tokens.json").write_text(json.dumps(tokenizer.get_added_vocab()))
    (folder / "special_tokens_map.json").write_text(json.dumps(tokenizer.special_tokens_map))
    (folder / "LICENSE").write_text("All yours.\n")
    (folder / "README.md").write_text("# The base\n")
    (folder / "eval.py").write_text("print('a script that is none of the model')\n")
    if family != "text":
        processor.image_processor.save_pretrained(folder)
        (folder / "chat_template.json").write_text(
            json.dumps({"chat_template": processor.chat_template})
        )
        nested = VIDEO if video == "nested" else None
        rewrite(folder / "processor_config.json", video_processor=nested)
        if video == "file":
            (folder / "video_preprocessor_config.json").write_text(json.dumps(VIDEO))
    return folder


def trained(folder, output, family, **options):
    """A checkpoint after one step from a folder, by cppo's own loaders."""
    model, processor = load_model(folder), load_processor(folder)
    trainer = trainer_for(output, family, model=model, processor=processor, max_steps=1, **options)
    trainer.train()
    checkpoint = last_checkpoint(output)
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize("video", ["nested", "file", "none"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_checkpoint_of_a_vision_language_model(family, video, tmp_path):
    base = base_folder(tmp_path / "base", family, video)
    checkpoint = trained(base, tmp_path / "run", family)
    names = {file.name for file in checkpoint.iterdir()}
    assert {file.name for file in base.iterdir()} - NOT_KEPT <= names
    assert not {"README.md", "eval.py"} & names
    # What AutoProcessor asks for first, and where it said "Can't load video processor".
    settings, _ = BaseVideoProcessor.get_video_processor_dict(checkpoint)
    kind = "Qwen3VLVideoProcessor" if family == "qwen3_vl" else "Qwen2VLVideoProcessor"
    expected = {"video_processor_type": kind, "patch_size": 12} if video == "none" else VIDEO
    assert expected.items() <= settings.items()
    if video == "file":
        written = json.loads((checkpoint / "video_preprocessor_config.json").read_text())
        assert VIDEO.items() <= written.items()
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template
    assert AutoImageProcessor.from_pretrained(checkpoint).patch_size == 12
    assert AutoConfig.from_pretrained(checkpoint).model_type == family
    assert GenerationConfig.from_pretrained(checkpoint).eos_token_id == 2
    AutoModelForImageTextToText.from_pretrained(checkpoint)
    trained(checkpoint, tmp_path / "again", family)


def test_a_checkpoint_of_a_text_model(tmp_path):
    base = base_folder(tmp_path / "base", "text")
    (base / "configuration_mine.py").write_text("class Mine: pass\n")
    checkpoint = trained(base, tmp_path / "run", "text")
    names = {file.name for file in checkpoint.iterdir()}
    assert {file.name for file in base.iterdir()} - NOT_KEPT - {"configuration_mine.py"} <= names
    assert "configuration_mine.py" not in names  # no config names a class of it
    assert AutoTokenizer.from_pretrained(checkpoint)("12")["input_ids"]
    AutoModelForCausalLM.from_pretrained(checkpoint)
    trained(checkpoint, tmp_path / "again", "text")
    rewrite(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["configuration_mine.Mine"]})
    save_processor(load_processor(checkpoint), tmp_path / "other")
    tokenizer = load_processor(checkpoint)
    tokenizer.name_or_path = str(base)
    save_processor(tokenizer, tmp_path / "with_code")
    assert (tmp_path / "with_code" / "configuration_mine.py").is_file()


def test_a_checkpoint_of_adapters(tmp_path):
    from peft import PeftModel

    base = base_folder(tmp_path / "base", "qwen2_5_vl", "file")
    checkpoint = trained(base, tmp_path / "run", "qwen2_5_vl", lora=cppo.LoraConfig(r=2))
    names = {file.name for file in checkpoint.iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    of_model = {"config.json", "generation_config.json"}
    assert {file.name for file in base.iterdir()} - NOT_KEPT - of_model <= names
    PeftModel.from_pretrained(load_model(base), checkpoint)
    assert AutoTokenizer.from_pretrained(checkpoint)("12")["input_ids"]
    assert AutoImageProcessor.from_pretrained(checkpoint).patch_size == 12


def test_what_was_changed_in_memory_is_what_is_saved(tmp_path):
    base = base_folder(tmp_path / "base", "qwen2_5_vl", "file")
    processor = load_processor(base)
    processor.image_processor.size = {"shortest_edge": 144, "longest_edge": 14400}
    processor.chat_template = "{{ 'hello' }}"
    processor.tokenizer.add_tokens(["<new>"])
    save_processor(processor, tmp_path / "saved")
    written = {
        name: json.loads((tmp_path / "saved" / name).read_text())
        for name in ("preprocessor_config.json", "chat_template.json", "added_tokens.json")
    }
    assert written["preprocessor_config.json"]["size"]["shortest_edge"] == 144
    assert written["chat_template.json"] == {"chat_template": "{{ 'hello' }}"}
    assert "<new>" in written["added_tokens.json"]
    loaded = load_processor_of(tmp_path / "saved", base)
    assert loaded.image_processor.size["shortest_edge"] == 144
    assert loaded.chat_template == "{{ 'hello' }}"


def load_processor_of(folder, base):
    shutil.copyfile(base / "config.json", folder / "config.json")
    return load_processor(folder)


def test_a_base_that_is_gone_or_was_never_there(tmp_path):
    _, tokenizer = tiny("text")  # made in memory
    save_processor(tokenizer, tmp_path / "one")
    base = base_folder(tmp_path / "base", "text")
    tokenizer = load_processor(base)
    shutil.rmtree(base)
    for name in (str(base), "no/such-model-in-the-cache", "a//b", ""):
        tokenizer.name_or_path = name
        save_processor(tokenizer, tmp_path / "two")
        assert AutoTokenizer.from_pretrained(tmp_path / "two")("12")["input_ids"]
    save_processor(
        load_processor_of(tmp_path / "two", CHECKPOINTS / "arithmetic"), tmp_path / "two"
    )


def test_a_base_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    base = base_folder(tmp_path / "snapshot", "text")
    asked = []

    def cached(repository, name):
        asked.append(repository)
        return str(base / name)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    tokenizer = load_processor(base)
    tokenizer.name_or_path = "someone/a-model"
    save_processor(tokenizer, tmp_path / "saved")
    assert asked == ["someone/a-model"] and (tmp_path / "saved" / "LICENSE").is_file()


def test_the_shipped_checkpoints_have_all_that_their_processors_need():
    settings, _ = BaseVideoProcessor.get_video_processor_dict(CHECKPOINTS / "digits")
    assert settings["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert settings["patch_size"] == 12 and settings["merge_size"] == 2
    processor = load_processor(CHECKPOINTS / "digits")
    inputs = processor.image_processor(Image.new("RGB", (48, 24)), return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 4]]


_OPEN = """
import sys
from transformers import AutoProcessor
for folder in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.video_processor.patch_size == 12, folder
"""


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
def test_plain_auto_processor_with_torchvision(tmp_path):
    """A checkpoint that was written without torchvision, opened where there is one."""
    from transformers import Qwen2_5_VLProcessor

    from cppo.model.processors import image_only

    folders = [CHECKPOINTS / "digits"]
    for video in ("nested", "file", "none"):
        base = base_folder(tmp_path / video, "qwen2_5_vl", video)
        save_processor(
            image_only(Qwen2_5_VLProcessor).from_pretrained(base), tmp_path / f"{video}2"
        )
        folders.append(tmp_path / f"{video}2")
    command = [sys.executable, "-c", _OPEN, *map(str, folders)]
    subprocess.run(command, check=True)
