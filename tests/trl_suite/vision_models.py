"""The tiny models of TRL's tests that take images, each with its processor."""

from __future__ import annotations

from typing import Any

import transformers as hf
from text_models import EXPERTS, LAYERS, TEXT, WIDTH, ids, llama, qwen, qwen_3_5


def qwen_vl(kind: str, made: Any, head_dim: int = 4, **text: Any) -> tuple[Any, Any]:
    """A model of the Qwen-VL families, e.g. kind = "Qwen2_5_VL", and its processor."""
    vocab, is_first = made.get_vocab(), kind == "Qwen2VL"
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[0, 1, 1])
    vision: dict[str, Any] = dict(depth=2, num_heads=2, patch_size=14, spatial_merge_size=2)
    if is_first:
        vision |= dict(embed_dim=16, hidden_size=16, mlp_ratio=2)
    else:
        vision |= dict(hidden_size=16, intermediate_size=32, out_hidden_size=16)
    if kind == "Qwen2_5_VL":
        vision |= dict(window_size=56, fullatt_block_indexes=[1])
    text = TEXT | ids(made) | dict(rope_parameters=rope) | text
    config = getattr(hf, f"{kind}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=vocab["<|image_pad|>"],
        video_token_id=vocab["<|video_pad|>"],
        vision_start_token_id=vocab["<|vision_start|>"],
        vision_end_token_id=vocab["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    sizes = dict(patch_size=14, merge_size=2, size=dict(shortest_edge=28**2, longest_edge=84**2))
    is_new = kind.startswith("Qwen3")
    videos = hf.Qwen3VLVideoProcessor if is_new else hf.Qwen2VLVideoProcessor
    processors = {"Qwen2VL": hf.Qwen2VLProcessor, "Qwen2_5_VL": hf.Qwen2_5_VLProcessor}
    processor = processors.get(kind, hf.Qwen3VLProcessor)(
        image_processor=hf.Qwen2VLImageProcessor(**sizes),
        tokenizer=made,
        video_processor=videos(**sizes),
        chat_template=made.chat_template,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config), processor


def qwen_3_5_vl(template: str, kind: str = "Qwen3_5", **more: Any) -> tuple[Any, Any]:
    """As `qwen_vl`, for the families that mix linear attention with full attention."""
    linear = dict(
        layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, head_dim=8,
    )  # fmt: skip
    rope = dict(
        rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1], partial_rotary_factor=1.0
    )
    return qwen_vl(kind, qwen_3_5(template), **linear, rope_parameters=rope, **more)


def llava(kind: str) -> tuple[Any, Any]:
    """LLaVA, or LLaVA-NeXT, which cuts an image into tiles."""
    made = llama("llava_next", "<image>", image_token="<image>")
    size = dict(height=28, width=28)
    vision = dict(model_type="clip_vision_model", image_size=28, patch_size=14, projection_dim=16)
    vision |= WIDTH | LAYERS
    more, tiles = {}, {}
    if kind == "LlavaNext":
        more = dict(image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]])
        tiles = dict(crop_size=size, size=dict(shortest_edge=28), **more)
    config = getattr(hf, f"{kind}Config")(
        text_config=dict(model_type="mistral", **TEXT, **ids(made)),
        vision_config=vision,
        image_token_index=made.convert_tokens_to_ids("<image>"),
        **more,
    )
    images = getattr(hf, f"{kind}ImageProcessor")(**(tiles or dict(crop_size=size, size=size)))
    processor = getattr(hf, f"{kind}Processor")(
        image_processor=images,
        tokenizer=made,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=made.chat_template,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config), processor


def gemma(template: str, **names: str) -> hf.PreTrainedTokenizerFast:
    return llama(template, *dict.fromkeys(names.values()), "<|video|>", **names)


def gemma3() -> tuple[Any, Any]:
    made = gemma(
        "gemma3",
        boi_token="<start_of_image>",
        image_token="<image_soft_token>",
        eoi_token="<end_of_image>",
    )
    vision: dict[str, Any] = dict(image_size=56, patch_size=14, vision_use_head=False)
    config = hf.Gemma3Config(
        text_config=dict(**TEXT, **ids(made), head_dim=8),
        vision_config=vision | WIDTH | LAYERS,
        mm_tokens_per_image=4,
        boi_token_index=made.boi_token_id,
        eoi_token_index=made.eoi_token_id,
        image_token_index=made.image_token_id,
    )
    processor = hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessor(size=dict(height=56, width=56)),
        tokenizer=made,
        chat_template=made.chat_template,
        image_seq_length=4,
    )
    return hf.Gemma3ForConditionalGeneration(config), processor


def gemma4() -> tuple[Any, Any]:
    images = dict(boi_token="<|image>", image_token="<|image|>", eoi_token="<image|>")
    sounds = dict(boa_token="<|audio>", audio_token="<|audio|>", eoa_token="<audio|>")
    made = gemma("gemma4", **images, **sounds)
    text = dict(
        head_dim=8, global_head_dim=8, layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0, hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=len(made),
    )  # fmt: skip
    vision = dict(num_key_value_heads=2, head_dim=4)
    vision |= dict(position_embedding_size=630, default_output_length=70)
    config = hf.Gemma4Config(
        text_config=TEXT | ids(made) | text,
        vision_config=vision | WIDTH | LAYERS,
        audio_config=None,
        boi_token_id=made.boi_token_id,
        eoi_token_id=made.eoi_token_id,
        image_token_id=made.image_token_id,
        video_token_id=made.convert_tokens_to_ids("<|video|>"),
    )
    processor = hf.Gemma4Processor(
        feature_extractor=hf.Gemma4AudioFeatureExtractor(),
        image_processor=hf.Gemma4ImageProcessor(max_soft_tokens=70, image_seq_length=70),
        tokenizer=made,
        video_processor=hf.Gemma4VideoProcessor(),
        chat_template=made.chat_template,
        image_seq_length=70,
    )
    return hf.Gemma4ForConditionalGeneration(config), processor


def built() -> dict[str, tuple[Any, Any]]:
    """Models with a processor, by name."""
    qwen2 = qwen("qwen2_5_vl")
    experts = EXPERTS | dict(shared_expert_intermediate_size=32)
    return {
        "Gemma3ForConditionalGeneration": gemma3(),
        "Gemma4ForConditionalGeneration": gemma4(),
        "LlavaForConditionalGeneration": llava("Llava"),
        "LlavaNextForConditionalGeneration": llava("LlavaNext"),
        "Qwen2VLForConditionalGeneration": qwen_vl("Qwen2VL", qwen2),
        "Qwen2_5_VLForConditionalGeneration": qwen_vl("Qwen2_5_VL", qwen2),
        "Qwen3_5ForConditionalGeneration-NoThink": qwen_3_5_vl("qwen3_5_nothink"),
        "Qwen3_5MoeForConditionalGeneration-3.6": qwen_3_5_vl(
            "qwen3_6", kind="Qwen3_5Moe", **experts
        ),
    }
