"""A tiny random model and its processor for each family that takes images. No download.

A picture is a few tokens (Gemma 4: up to 70). The tokenizer reads bytes; a family's own special
tokens are given to its `__init__` under the names that its processor asks for, so that they survive
saving.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils import is_torchvision_available

from cppo.demo.tiny import build_tiny_vlm
from cppo.model.processors import image_only

_QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_WIDTH: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, initializer_range=0.05)
_LAYERS: dict[str, Any] = dict(num_hidden_layers=2, num_attention_heads=4)
_TEXT = dict(**_WIDTH, **_LAYERS, num_key_value_heads=2, head_dim=8, max_position_embeddings=2048)
_VISION = dict(**_WIDTH, **_LAYERS, image_size=28, patch_size=14)
_SQUARE = dict(height=28, width=28)
_TILES = [[28, 28], [28, 56], [56, 28], [56, 56]]  # an image of 28 x 28 pixels each
_ROWS = tuple(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))
# CLIP's class token is dropped.
_CLIP = dict(patch_size=14, num_additional_image_tokens=1, vision_feature_select_strategy="default")
_CHATML = ("<|im_start|>{role}\n", "<|im_end|>\n", "<|im_start|>assistant\n")
_IM = ("<|im_start|>", "<|im_end|>")
_CLIP_MODEL = dict(model_type="clip_vision_model", projection_dim=16)
_SIGLIP_MODEL = dict(model_type="siglip_vision_model", vision_use_head=False)
_MROPE: dict[str, Any] = dict(rope_type="default", rope_theta=1e4)
_MROPE |= dict(mrope_section=[2, 1, 1], partial_rotary_factor=1.0)

# By family: the config's own numbers (a string that is a token stands for its id), the tokens by
# the names of the tokenizer, the image processor, the processor, and the chat template: how an
# image is written, what stands before and behind a message, and what asks for an answer.
_LLAVA: dict[str, Any] = dict(
    config=dict(image_token_index="<image>"),
    text=dict(model_type="llama"),
    vision=_CLIP_MODEL,
    named=dict(image_token="<image>"),
    images=("Llava", dict(crop_size=_SQUARE, size=dict(shortest_edge=28))),
    processor=("Llava", _CLIP),
    template=("<image>\n", "{role}: ", "\n", "assistant: "),
)
_IDEFICS: dict[str, Any] = dict(
    config=dict(image_token_id="<image>", scale_factor=2),
    text=dict(model_type="llama"),
    vision=dict(patch_size=7),
    named=dict(image_token="<image>"),
    special=(
        *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|im_start|>"),
        *_ROWS,
    ),
    images=("Idefics3", dict(size=dict(longest_edge=56), max_image_size=dict(longest_edge=28))),
    processor=("Idefics3", dict(image_seq_len=4)),
    template=("<image>", "<|im_start|>{role}:", "<end_of_utterance>\n", "Assistant:"),
)
_FAMILIES: dict[str, dict[str, Any]] = {
    "llava": _LLAVA,
    "gemma3": dict(
        config=dict(
            boi_token_index="<start_of_image>", eoi_token_index="<end_of_image>",
            image_token_index="<image_soft_token>", mm_tokens_per_image=4,
        ),
        text=dict(
            layer_types=["sliding_attention", "full_attention"], sliding_window=64,
            query_pre_attn_scalar=8,
        ),
        vision=dict(image_size=56, vision_use_head=False),
        named=dict(
            boi_token="<start_of_image>", eoi_token="<end_of_image>",
            image_token="<image_soft_token>",
        ),
        special=("<start_of_turn>", "<end_of_turn>"),
        words=("\n", "\n\n", "\n\n\n", "\n\n\n\n"),
        images=("Gemma3", dict(size=dict(height=56, width=56))),
        processor=("Gemma3", dict(image_seq_length=4)),
        template=(
            "<start_of_image>", "<start_of_turn>{role}\n", "<end_of_turn>\n",
            "<start_of_turn>model\n",
        ),
    ),
    "llava_next": _LLAVA | dict(
        config=dict(image_token_index="<image>", image_grid_pinpoints=_TILES),
        text=dict(model_type="mistral"),
        images=("LlavaNext", _LLAVA["images"][1] | dict(image_grid_pinpoints=_TILES)),
        processor=("LlavaNext", _CLIP),
    ),
    "llava_onevision": dict(
        config=dict(
            image_token_index="<image>", video_token_index="<video>", image_grid_pinpoints=_TILES,
        ),
        text=dict(model_type="qwen2"),
        vision=_SIGLIP_MODEL,
        named=dict(image_token="<image>", video_token="<video>"),
        special=_IM,
        images=("LlavaOnevision", dict(size=_SQUARE, image_grid_pinpoints=_TILES)),
        processor=(
            "LlavaOnevision", dict(num_image_tokens=4, vision_feature_select_strategy="full"),
        ),
        template=("<image>\n", *_CHATML),
    ),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS | dict(
        named=dict(
            image_token="<image>", fake_image_token="<fake_token_around_image>",
            global_image_token="<global-img>", end_of_utterance_token="<end_of_utterance>",
        ),
        special=("<|im_start|>", *_ROWS),
        images=("SmolVLM", _IDEFICS["images"][1]),
        processor=("SmolVLM", dict(image_seq_len=4)),
    ),
    "internvl": dict(
        config=dict(image_token_id="<IMG_CONTEXT>", image_seq_length=4),
        text=dict(model_type="qwen2"),
        vision=dict(patch_size=7),
        named=dict(
            start_image_token="<img>", end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>", video_token="<video>",
        ),
        special=_IM,
        images=("GotOcr2", dict(size=_SQUARE, crop_to_patches=True, max_patches=4)),
        processor=("InternVL", dict(image_seq_length=4)),
        template=("<IMG_CONTEXT>\n", *_CHATML),
    ),
    "paligemma": dict(
        config=dict(image_token_index="<image>", projection_dim=32, hidden_size=32),
        text=dict(model_type="gemma"),
        vision=_SIGLIP_MODEL,
        named=dict(image_token="<image>"),
        words=("\n",),
        images=("Siglip", dict(size=_SQUARE, image_seq_length=4)),
        processor=("PaliGemma", {}),
        template=("<image>", "", "", ""),
    ),
    "mistral3": dict(
        config=dict(image_token_index="[IMG]", spatial_merge_size=2),
        text=dict(model_type="mistral"),
        vision=dict(model_type="pixtral", image_size=56, patch_size=7, head_dim=8),
        named=dict(image_token="[IMG]"),
        special=("[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
        images=("Pixtral", dict(size=dict(longest_edge=56), patch_size=dict(height=7, width=7))),
        processor=("Pixtral", dict(patch_size=7, spatial_merge_size=2)),
        template=("[IMG]", "[INST]", "[/INST]", ""),
    ),
    "glm4v": dict(
        config=dict(
            image_token_id="<|image|>", video_token_id="<|video|>",
            image_start_token_id="<|begin_of_image|>", image_end_token_id="<|end_of_image|>",
            video_start_token_id="<|begin_of_video|>", video_end_token_id="<|end_of_video|>",
        ),
        text=dict(rope_parameters=_MROPE),
        vision=dict(depth=2, num_heads=4, out_hidden_size=32, image_size=56),
        named=dict(image_token="<|image|>", video_token="<|video|>"),
        special=(
            *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
            *("<|user|>", "<|assistant|>", "<|system|>"),
        ),
        images=("Glm4v", dict(size=dict(shortest_edge=28**2, longest_edge=2 * 84**2))),
        processor=("Glm4v", {}),
        template=(
            "<|begin_of_image|><|image|><|end_of_image|>", "<|{role}|>\n", "", "<|assistant|>\n",
        ),
    ),
    "qwen3_5": dict(
        config=dict(
            image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
            vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>",
        ),
        text=dict(
            layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
            linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
            rope_parameters=_MROPE,
        ),
        vision=dict(depth=1, num_heads=4, out_hidden_size=32, num_position_embeddings=64),
        named=dict(
            image_token="<|image_pad|>", video_token="<|video_pad|>",
            vision_bos_token="<|vision_start|>", vision_eos_token="<|vision_end|>",
        ),
        special=_IM,
        images=("Qwen2VL", dict(patch_size=14, min_pixels=28**2, max_pixels=84**2)),
        processor=("Qwen3VL", {}),
        template=("<|vision_start|><|image_pad|><|vision_end|>", *_CHATML),
    ),
    "gemma4": dict(
        config=dict(
            audio_config=None, boi_token_id="<|image>", eoi_token_id="<image|>",
            image_token_id="<|image|>", video_token_id="<|video|>",
        ),
        text=dict(
            layer_types=["sliding_attention", "full_attention"], sliding_window=64,
            global_head_dim=8, num_kv_shared_layers=0, hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=400,
        ),
        vision=dict(num_key_value_heads=2, head_dim=8, patch_size=4, position_embedding_size=630),
        named=dict(
            boi_token="<|image>", image_token="<|image|>", eoi_token="<image|>",
            boa_token="<|audio>", audio_token="<|audio|>", eoa_token="<audio|>",
        ),
        special=("<|video|>", "<|turn>", "<turn|>"),
        images=("Gemma4", dict(patch_size=4, max_soft_tokens=70, image_seq_length=70)),
        processor=("Gemma4", dict(image_seq_length=70)),
        feature_extractor="Gemma4AudioFeatureExtractor",
        template=("<|image|>", "<|turn>{role}\n", "<turn|>\n", "<|turn>model\n"),
    ),
}  # fmt: skip
FAMILIES = (*_QWEN, *_FAMILIES)


def tiny_vision(family: str, *, seed: int = 0, **changes: dict[str, Any]) -> tuple[Any, Any]:
    """A tiny random model of a family (in eval mode, fp32) and its processor.

    Images may have 24 to 256 pixels a side; families that cut images into tiles cut all but the
    smallest. SmolVLM and Mistral 3 come with stand-ins for what their stock processors ask for and
    do not use for images (`_stock_processor`); `load_processor` has no such stand-ins.

    Args:
        changes: `config`, `text` or `vision`, to the numbers of the family's configs.
    """
    if family in _QWEN:
        return build_tiny_vlm(family, seed, size="test")
    parts = dict(_FAMILIES[family])
    for name, own in changes.items():
        parts[name] = parts.get(name, {}) | own
    tokenizer = _tokenizer(parts)
    kind, options = parts["images"]
    options = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3) | options
    images = getattr(hf, f"{kind}ImageProcessorPil")(**options)
    kind, options = parts["processor"]
    made = dict(image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template)
    if "feature_extractor" in parts:
        made["feature_extractor"] = getattr(hf, parts["feature_extractor"])()
    stock = _stock_processor(kind)
    if "video_processor" in stock.get_attributes():
        stock, made = image_only(stock), made | dict(video_processor=None)
    processor = stock(**made, **options)
    config = _config(family, parts, processor.tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForImageTextToText.from_config(config).eval()
        for weight in model.parameters():
            # Gemma 3 projects every image to zero at first.
            if weight.dim() > 1 and not weight.any():
                torch.nn.init.normal_(weight, std=0.05)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor


def _stock_processor(kind: str) -> Any:
    if kind == "SmolVLM":
        module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
        module.num2words = module.num2words or str  # spells how many frames a video has
    if kind != "Pixtral" or is_torchvision_available():
        return getattr(hf, f"{kind}Processor")
    # Its file imports one function from the file that needs torchvision; the plain file has it too.
    folder = "transformers.models.pixtral"
    asked = f"{folder}.image_processing_pixtral"
    sys.modules[asked] = importlib.import_module(f"{folder}.image_processing_pil_pixtral")
    try:
        return importlib.import_module(f"{folder}.processing_pixtral").PixtralProcessor
    finally:
        del sys.modules[asked]


def _config(family: str, parts: dict[str, Any], tokenizer: Any) -> Any:
    vocab = tokenizer.get_vocab()
    ends = dict(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    own = {
        name: vocab.get(value, value) if isinstance(value, str) else value
        for name, value in parts["config"].items()
    }
    return hf.CONFIG_MAPPING[family](
        text_config=dict(vocab_size=len(tokenizer), **ends) | _TEXT | parts.get("text", {}),
        vision_config=_VISION | parts.get("vision", {}),
        **own,
    )


def _tokenizer(parts: dict[str, Any]) -> hf.PreTrainedTokenizerFast:
    """A tokenizer of bytes with a family's special tokens and chat template."""
    special = ("<pad>", "<s>", "</s>", *parts.get("special", ()), *parts["named"].values())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*special, *alphabet]))}
    core = Tokenizer(models.BPE(vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    core.add_tokens(list(parts.get("words", ())))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=parts["named"],
        padding_side="left",
        chat_template=_template(*parts["template"]),
    )


def _template(image: str, before: str, behind: str, asks: str) -> str:
    """How an image is written, what stands around a message, and what asks for an answer."""
    image, before, behind, asks = (x.replace("\n", "\\n") for x in (image, before, behind, asks))
    return (
        f"{{% for message in messages %}}{{{{ '{before}'.replace('{{role}}', message.role) }}}}"
        "{% if message.content is string %}{{ message.content }}"
        "{% else %}{% for part in message.content %}"
        f"{{% if part.type == 'image' %}}{{{{ '{image}' }}}}"
        "{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
        f"{{% endfor %}}{{% endif %}}{{{{ '{behind}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{asks}' }}}}{{% endif %}}"
    )
