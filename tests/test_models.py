"""Loading models and processors, the ids never to sample, and the errors."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLProcessor, ViTConfig

from cppo.demo.tiny import build_tiny_text_model, build_tiny_vlm, build_tokenizer
from cppo.model.load import (
    check_saveable,
    closing_token_ids,
    image_only,
    is_vision_language,
    load_model,
    load_processor,
    special_token_ids_to_suppress,
)

MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What is the sum of the digits?"}],
    }
]


def _inputs(processor, image):
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=[image], return_tensors="pt")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_vision_checkpoint_round_trip(family, tmp_path):
    model, processor = build_tiny_vlm(family, seed=1, size="test")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = load_model(tmp_path), load_processor(tmp_path)
    image = Image.effect_noise((48, 24), 80).convert("RGB")
    first, second = _inputs(processor, image), _inputs(loaded_processor, image)
    assert first.keys() == second.keys()
    # With torchvision the loaded one resizes by it, which rounds a pixel otherwise.
    pixels = [inputs.pop("pixel_values") for inputs in (first, second)]
    torch.testing.assert_close(*pixels, rtol=0, atol=0.05)
    assert all(torch.equal(first[k], second[k]) for k in first)
    first["pixel_values"] = second["pixel_values"] = pixels[0]
    assert (first["input_ids"] == model.config.image_token_id).sum() == 2
    assert torch.equal(model(**first).logits, loaded(**second).logits)
    assert is_vision_language(loaded) and not loaded.training


def test_text_checkpoint_round_trip(tmp_path):
    model, tokenizer = build_tiny_text_model(seed=1, size="test")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = load_model(tmp_path), load_processor(tmp_path)
    text = 'Tom has 12 apples, "buys" 7\n and then loses 5. How many are left? \\boxed{14}'
    ids = loaded_tokenizer(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    assert loaded_tokenizer.decode(ids) == text
    inputs = torch.tensor([ids])
    assert torch.equal(model(inputs).logits, loaded(inputs).logits)
    assert not is_vision_language(loaded)


def test_half_precision_file_is_loaded_in_the_dtype_asked_for(tmp_path):
    model, _ = build_tiny_text_model(size="test")
    model.half().save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.float32
    assert load_model(tmp_path, dtype=torch.float16).dtype == torch.float16


def test_processors_pad_on_the_left(tmp_path):
    model, tokenizer = build_tiny_text_model(size="test")
    model.config.save_pretrained(tmp_path)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path)
    ids = load_processor(tmp_path)(["12", "1"], padding=True)["input_ids"]
    assert ids[1][0] == tokenizer.pad_token_id and ids[1][1] == ids[0][0]


def test_tokenizer_gives_unknown_characters_one_token_and_text_back():
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer("I see 3, 5. ")["input_ids"]) == "I see 3, 5. "
    assert len(tokenizer("What is the sum of the digits?")["input_ids"]) == 1
    assert tokenizer.convert_ids_to_tokens(tokenizer("\u00e9")["input_ids"]) == ["<|unknown|>"]


def test_image_only_keeps_the_stock_name_and_has_no_video_processor():
    subclass = image_only(Qwen2_5_VLProcessor)
    assert subclass.__name__ == "Qwen2_5_VLProcessor"
    assert subclass.get_attributes() == ["image_processor", "tokenizer"]


@pytest.mark.parametrize("build", [build_tiny_vlm, build_tiny_text_model])
def test_input_tokens_are_suppressed_and_the_end_is_not(build):
    model, processor = build(size="test")
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = special_token_ids_to_suppress(model, processor)
    suppressed = set(tokenizer.convert_ids_to_tokens(ids))
    assert ids == sorted(set(ids))
    assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"} <= suppressed
    assert {"<|im_start|>", "<|endoftext|>"} <= suppressed
    assert tokenizer.eos_token_id not in ids
    assert all(token.startswith("<|") for token in suppressed)


def test_every_end_of_sequence_id_of_the_generation_config_may_be_sampled():
    model, processor = build_tiny_text_model(size="test")
    model.generation_config.eos_token_id = [processor.eos_token_id, processor.pad_token_id]
    assert processor.pad_token_id not in special_token_ids_to_suppress(model, processor)


@pytest.mark.parametrize("load", [load_model, load_processor])
def test_missing_and_broken_folders_are_named(load, tmp_path):
    with pytest.raises(ValueError, match=r"cppo\.load_.*nowhere.*is missing"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="without a config.json"):
        load(tmp_path)
    file = tmp_path / "weights.bin"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        load(file)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_family"}))
    with pytest.raises(ValueError, match="no model configuration.*no_such_family"):
        load(tmp_path)


def test_a_folder_without_weights_or_tokenizer_is_named(tmp_path):
    model, _ = build_tiny_text_model(size="test")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no weights that load"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer files"):
        load_processor(tmp_path)


def test_unsupported_family_and_dtype(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'vit'.*neither"):
        load_model(tmp_path)
    with pytest.raises(TypeError, match="dtype must be a floating torch.dtype, got 'fp32'"):
        load_model(tmp_path, dtype="fp32")


def test_a_folder_without_video_configuration_loads_with_torchvision_too(tmp_path, monkeypatch):
    model, processor = build_tiny_vlm(size="test")
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    del settings["video_processor"]
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("cppo.model.processors.is_torchvision_available", lambda: True)
    loaded = load_processor(tmp_path)
    assert type(loaded).get_attributes() == ["image_processor", "tokenizer"]


@pytest.mark.parametrize(
    ("of_model", "of_tokenizer", "ids", "says"),
    [
        (2, "<|im_end|>", [2], ""),
        ([2, 0], "<|im_end|>", [0, 2], ""),
        (None, "<|im_end|>", [2], ""),
        (-1, "<|im_end|>", [2], ""),
        ([-1], "<|im_end|>", [2], ""),
        ([], "<|im_end|>", [2], ""),
        (10_000, "<|im_end|>", [2], ""),
        ([10_000, 5], "<|im_end|>", [2, 5], "at token 5 .* tokenizer at 2 .*: either ends"),
        (0, "<|im_end|>", [0, 2], "at token 0 .'<.endoftext.>'., the tokenizer at 2 .* either"),
        (torch.tensor([0, 2]), "<|im_end|>", [0, 2], ""),
        ((2, 2), "<|im_end|>", [2], ""),
        (2, None, [2], ""),
        ([4, 2], None, [2, 4], ""),
    ],
)
def test_either_end_of_text_ends_a_completion(of_model, of_tokenizer, ids, says):
    model, tokenizer = build_tiny_text_model(size="test")
    model.generation_config.eos_token_id = of_model
    tokenizer.eos_token = of_tokenizer
    found, words = closing_token_ids(model, tokenizer)
    assert found == ids
    assert re.search(says, words) if says else words == ""
    assert not set(ids) & set(special_token_ids_to_suppress(model, tokenizer))


def test_the_end_of_text_through_wrappers_and_without_a_generation_config():
    from peft import LoraConfig, get_peft_model

    model, processor = build_tiny_vlm(size="test")
    expected = closing_token_ids(model, processor)
    suppressed = special_token_ids_to_suppress(model, processor)
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    assert closing_token_ids(adapted, processor) == expected == ([2], "")
    assert special_token_ids_to_suppress(adapted, processor) == suppressed
    model.generation_config = None
    assert closing_token_ids(model, processor) == expected


@pytest.mark.parametrize("of_model", [None, -1, 500_000, []])
def test_no_end_of_text_is_refused(of_model):
    model, tokenizer = build_tiny_text_model(size="test")
    model.generation_config.eos_token_id = of_model
    tokenizer.eos_token = model.config.eos_token_id = None
    words = (
        "must name the token that ends a text .* got .* in the generation config, None in the "
        "config, None in the tokenizer"
    )
    with pytest.raises(ValueError, match=words):
        closing_token_ids(model, tokenizer)
    # The config is asked where the generation config names none.
    model.config.eos_token_id = [5, 7]
    assert closing_token_ids(model, tokenizer) == ([5, 7], "")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(2)
    ids, words = closing_token_ids(model, tokenizer)
    assert ids == [2, 5, 7] and "the model's config ends a text at token 5 (" in words


def test_the_generation_config_comes_before_the_config():
    model, tokenizer = build_tiny_text_model(size="test")
    model.generation_config.eos_token_id, model.config.eos_token_id = 5, 6
    tokenizer.eos_token = None
    assert closing_token_ids(model, tokenizer) == ([5], "")
    model.config.__dict__["eos_token_id"] = "unread"
    assert closing_token_ids(model, tokenizer) == ([5], "")


@pytest.mark.parametrize("wrong", ["</s>", [2, "</s>"], 2.5, True, {"id": 2}, [[2]]])
@pytest.mark.parametrize("place", ["generation config", "config", "tokenizer"])
def test_an_end_of_text_that_is_no_token_id_is_refused(place, wrong):
    model, tokenizer = build_tiny_text_model(size="test")
    holder = {"generation config": model.generation_config, "config": model.config}.get(place)
    if holder is None:
        tokenizer = SimpleNamespace(eos_token_id=wrong)
    else:
        model.generation_config.eos_token_id = None
        holder.__dict__["eos_token_id"] = wrong
    words = f"cppo: eos_token_id of the {place} must be a token id or a list of them, got "
    with pytest.raises(ValueError, match=words + re.escape(repr(wrong))):
        closing_token_ids(model, tokenizer)


@pytest.mark.parametrize("wrong", [None, {}, "greedy"])
def test_a_generation_config_that_is_none_is_refused_in_words(wrong, tmp_path):
    from trainer_cases import trainer_for

    model, tokenizer = build_tiny_text_model(size="test")
    model.generation_config = wrong
    words = "model.generation_config must be a GenerationConfig, or .* got " + repr(wrong)
    with pytest.raises(ValueError, match=words):
        check_saveable(model, tokenizer)
    with pytest.raises(ValueError, match=words):
        trainer_for(tmp_path, model=model, processor=tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.3},
        {"top_p": 0.9},
        {"top_k": 7},
        {"num_beams": 1, "length_penalty": 0.5},
        {"max_new_tokens": -3},
        {"do_sample": False, "num_return_sequences": 4},
        {"cache_implementation": "none such"},
    ],
)
def test_a_generation_config_that_cannot_be_saved_is_found_out_at_the_start(change, tmp_path):
    model, tokenizer = build_tiny_text_model(size="test")
    check_saveable(model, tokenizer)
    for name, value in change.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError):
        model.save_pretrained(tmp_path)  # as it would after training
    words = (
        "cppo: model and processor must be such that they can be saved, but save_pretrained says"
    )
    with pytest.raises(ValueError, match=words):
        check_saveable(model, tokenizer)
    from trainer_cases import trainer_for

    with pytest.raises(ValueError, match=words):
        trainer_for(tmp_path, model=model, processor=tokenizer)


def test_an_odd_generation_config_that_came_with_the_model_can_be_saved(tmp_path):
    model, tokenizer = build_tiny_text_model(size="test")
    model.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 0.6}))
    loaded = load_model(tmp_path)
    assert loaded.generation_config.temperature == 0.6
    check_saveable(loaded, tokenizer)
    loaded.save_pretrained(tmp_path / "again")


def test_weights_that_are_shared_without_a_word_cannot_be_saved():
    model, tokenizer = build_tiny_text_model(size="test")
    first, second = model.model.layers[:2]
    first.mlp.up_proj.weight = second.mlp.up_proj.weight
    with pytest.raises(ValueError, match="can be saved, .* shared tensors .*up_proj"):
        check_saveable(model, tokenizer)


def test_a_tokenizer_that_cannot_be_saved_is_found_out_at_the_start():
    from tokenizers.pre_tokenizers import PreTokenizer

    class Own:
        def pre_tokenize(self, text):
            return text

    model, tokenizer = build_tiny_text_model(size="test")
    tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizer.custom(Own())
    with pytest.raises(ValueError, match="can be saved, but save_pretrained says: "):
        check_saveable(model, tokenizer)


def test_adapters_can_be_saved():
    from peft import LoraConfig, get_peft_model

    model, tokenizer = build_tiny_text_model(size="test")
    check_saveable(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), tokenizer)
