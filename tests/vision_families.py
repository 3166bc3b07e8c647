"""A tiny random model and its processor for each family that takes images. No download.

A picture is a few tokens. The tokenizer reads characters; a family's own special tokens are given
to its `__init__` under the names that its processor asks for, so that they survive saving.
"""

from __future__ import annotations

import string
from typing import Any

import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

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
_CHATML = ("<|im_start|>{role}\n", "<|im_end|>\n", "<|im_start|>assistant\n")

# By family: the config's own numbers (a string that is a token stands for its id), the tokens by
# the names of the tokenizer, the image processor, the processor, and the chat template: how an image
# is written, what stands before and behind a message, and what asks for an answer.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llava": dict(
        config=dict(image_token_index="<image>"),
        text=dict(model_type="llama"),
        vision=dict(model_type="clip_vision_model", projection_dim=16),
        named=dict(image_token="<image>"),
        images=("Llava", dict(crop_size=_SQUARE, size=dict(shortest_edge=28))),
        processor=(
            "Llava",
            dict(
                patch_size=14,
                num_additional_image_tokens=1,
                vision_feature_select_strategy="default",
            ),
        ),
        template=("<image>\n", "{role}: ", "\n", "assistant: "),
    ),
    "gemma3": dict(
        config=dict(
            boi_token_index="<start_of_image>",
            eoi_token_index="<end_of_image>",
            image_token_index="<image_soft_token>",
            mm_tokens_per_image=4,
        ),
        text=dict(
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=64,
            query_pre_attn_scalar=8,
        ),
        vision=dict(image_size=56, vision_use_head=False),
        named=dict(
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
            image_token="<image_soft_token>",
        ),
        special=("<start_of_turn>", "<end_of_turn>"),
        images=("Gemma3", dict(size=dict(height=56, width=56))),
        processor=("Gemma3", dict(image_seq_length=4)),
        template=(
            "<start_of_image>",
            "<start_of_turn>{role}\n",
            "<end_of_turn>\n",
            "<start_of_turn>model\n",
        ),
    ),
    "idefics3": dict(
        config=dict(image_token_id="<image>", scale_factor=2),
        text=dict(model_type="llama"),
        vision=dict(patch_size=7),
        named=dict(image_token="<image>"),
        special=(
            "<fake_token_around_image>",
            "<global-img>",
            "<end_of_utterance>",
            "<|im_start|>",
            *_ROWS,
        ),
        images=(
            "Idefics3",
            dict(size=dict(longest_edge=56), max_image_size=dict(longest_edge=28)),
        ),
        processor=("Idefics3", dict(image_seq_len=4)),
        template=("<image>", "<|im_start|>{role}:", "<end_of_utterance>\n", "Assistant:"),
    ),
}
FAMILIES = (*_QWEN, *_FAMILIES)


def tiny_vision(family: str, *, seed: int = 0) -> tuple[Any, Any]:
    """A tiny random model of a family (in eval mode, fp32) and its processor.

    Images may have 24 to 256 pixels a side; a family that cuts images into tiles does so from 28 on.
    """
    if family in _QWEN:
        return build_tiny_vlm(family, seed, size="test")
    parts = _FAMILIES[family]
    tokenizer = _tokenizer(parts)
    kind, options = parts["images"]
    options = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3) | options
    images = getattr(hf, f"{kind}ImageProcessorPil")(**options)
    kind, options = parts["processor"]
    made = dict(image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template)
    stock: Any = getattr(hf, f"{kind}Processor")
    if "video_processor" in stock.get_attributes():
        stock, made = image_only(stock), made | dict(video_processor=None)
    processor = stock(**made, **options)
    config = _config(family, parts, processor.tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForImageTextToText.from_config(config).eval()
        for weight in model.parameters():
            if (
                weight.dim() > 1 and not weight.any()
            ):  # Gemma 3 projects every image to zero at first
                torch.nn.init.normal_(weight, std=0.05)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor


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
    """A tokenizer of characters with a family's special tokens and chat template."""
    special = ("<pad>", "<s>", "</s>", *parts.get("special", ()), *parts["named"].values())
    letters = [c for c in string.printable if c.isprintable() or c == "\n"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*special, "<unk>", *letters]))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(list(special))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=parts["named"],
        padding_side="left",
        chat_template=_template(*parts["template"]),
    )


def _template(image: str, before: str, behind: str, asks: str) -> str:
    """How an image is written, what stands around a message, and what asks for an answer."""
    image, before, behind, asks = (
        text.replace("\n", "\\n") for text in (image, before, behind, asks)
    )
    return (
        f"{{% for message in messages %}}{{{{ '{before}'.replace('{{role}}', message.role) }}}}"
        "{% if message.content is string %}{{ message.content }}"
        "{% else %}{% for part in message.content %}"
        f"{{% if part.type == 'image' %}}{{{{ '{image}' }}}}"
        "{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
        f"{{% endfor %}}{{% endif %}}{{{{ '{behind}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{asks}' }}}}{{% endif %}}"
    )
