"""Tiny models of real families, randomly initialised, with a tokenizer made here: no download.

`size="demo"` is what the demos train (1.3 M parameters with vision, 0.8 M without); `size="test"`
is for tests (under 0.11 M, built and run in well under a second). One tokenizer serves every task.
"""

from __future__ import annotations

import re
import string
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cppo.model.processors import image_only

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|unknown|>",
)
# Pieces of text that are one token each: they keep prompts and completions short.
PHRASES = (
    "system\n",
    "user\n",
    "assistant\n",
    "\\boxed{",
    "What is the sum of the digits?",
    "A friend says they are ",
    "I see ",
    ", ",
    ". ",
    *(f"{name} " for name in ("Tom", "Ann", "Ben", "Eva", "Sam", "Mia")),
    *(f" {thing}" for thing in ("apples", "pens", "books", "coins", "cards", "shells")),
    "has ",
    "finds ",
    "gives away ",
    "loses ",
    "buys ",
    "packs ",
    " boxes of ",
    " and then ",
    "How many are left?",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_FAMILIES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor),
}
# Width 128 learns slowly from the usual 0.02.
_INITIALIZER_RANGE = 0.05
_PATCH = 12
_TEXT_SIZES: dict[str, dict[str, int]] = {
    "demo": dict(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4
    ),
    "test": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
}
_VISION_SIZES: dict[str, dict[str, int]] = {
    "demo": dict(depth=2, hidden_size=96, intermediate_size=288, num_heads=4),
    "test": dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the demo tokenizer: Qwen's special tokens, printable ASCII and a few phrases.

    Decoding an encoded ASCII text gives the text back exactly; any other character becomes
    "<|unknown|>".
    """
    characters = [c for c in string.printable if c.isprintable() or c == "\n"]
    tokens = list(dict.fromkeys([*SPECIAL_TOKENS, *characters, *PHRASES]))
    vocab = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|unknown|>"))
    phrases = "|".join(re.escape(p) for p in sorted(PHRASES, key=len, reverse=True))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(phrases + r"|[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|unknown|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_tiny_vlm(
    family: str = "qwen2_5_vl", seed: int = 0, *, size: str = "demo"
) -> tuple[PreTrainedModel, Any]:
    """Build a randomly initialised vision-language model and its processor.

    Args:
        family: "qwen2_vl", "qwen2_5_vl" or "qwen3_vl".
        seed: of the weights; the global random state is left as it was.
        size: "demo" or "test".
    Returns: (model in eval mode, fp32, on CPU; processor). Images may have 24 to 256 pixels a side;
        one image token covers 24 x 24 pixels.
    Raises: ValueError for an unknown family or size.
    """
    if family not in _FAMILIES:
        raise ValueError(
            f"build_tiny_vlm: family must be one of {sorted(_FAMILIES)}, got {family!r}"
        )
    config_class, model_class, processor_class = _FAMILIES[family]
    tokenizer = build_tokenizer()
    vocab = tokenizer.get_vocab()
    text = _text_config(tokenizer, size, "build_tiny_vlm")
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    section = [head_dim // 2 - 2 * (head_dim // 2 * 3 // 8), *[head_dim // 2 * 3 // 8] * 2]
    text["rope_parameters"] = dict(rope_type="default", rope_theta=1e4, mrope_section=section)
    if family == "qwen3_vl":
        text["head_dim"] = head_dim
    config = config_class(
        text_config=text,
        vision_config=_vision_config(family, size, text["hidden_size"]),
        image_token_id=vocab["<|image_pad|>"],
        video_token_id=vocab["<|video_pad|>"],
        vision_start_token_id=vocab["<|vision_start|>"],
        vision_end_token_id=vocab["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=_PATCH,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=24 * 24,
        max_pixels=256 * 256,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = image_only(processor_class)(
        image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template
    )
    return _seeded(model_class, config, seed), processor


def _vision_config(family: str, size: str, text_width: int) -> dict[str, Any]:
    """Options of a family's vision tower, under the family's names."""
    sizes = _VISION_SIZES[size]
    config: dict[str, Any] = dict(
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        patch_size=_PATCH,
        spatial_merge_size=2,
        temporal_patch_size=2,
        initializer_range=_INITIALIZER_RANGE,
    )
    if family == "qwen2_vl":
        # Qwen2-VL calls the tower's width embed_dim and the language model's hidden_size.
        return config | dict(embed_dim=sizes["hidden_size"], hidden_size=text_width, mlp_ratio=3)
    config |= dict(
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        out_hidden_size=text_width,
    )
    if family == "qwen2_5_vl":
        return config | dict(window_size=64, fullatt_block_indexes=list(range(sizes["depth"])))
    return config | dict(num_position_embeddings=64, deepstack_visual_indexes=[0])


def build_tiny_text_model(
    seed: int = 0, *, size: str = "demo"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Build a randomly initialised Qwen3 text model and its tokenizer.

    Qwen3, because AutoTokenizer gives a folder with `model_type` "qwen2" Qwen2's own pre-tokenizer
    whatever tokenizer was saved in it.

    Args and Raises: as `build_tiny_vlm`. Returns: (model in eval mode, fp32, on CPU; tokenizer).
    """
    tokenizer = build_tokenizer()
    text = _text_config(tokenizer, size, "build_tiny_text_model")
    text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    config = Qwen3Config(**text, tie_word_embeddings=True)
    return _seeded(Qwen3ForCausalLM, config, seed), tokenizer


def _text_config(tokenizer: PreTrainedTokenizerFast, size: str, op: str) -> dict[str, Any]:
    if size not in _TEXT_SIZES:
        raise ValueError(f"{op}: size must be one of {sorted(_TEXT_SIZES)}, got {size!r}")
    return dict(
        **_TEXT_SIZES[size],
        vocab_size=len(tokenizer),
        num_key_value_heads=_TEXT_SIZES[size]["num_attention_heads"] // 2,
        max_position_embeddings=1024,
        initializer_range=_INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _seeded(model_class: Any, config: Any, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
    model.generation_config.eos_token_id = config.get_text_config().eos_token_id
    model.generation_config.pad_token_id = config.get_text_config().pad_token_id
    return model
