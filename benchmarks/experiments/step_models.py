"""Models of the step benchmark: the shapes of released ones from their configurations, random
weights; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# From the published config.json of Qwen/Qwen2.5-0.5B-Instruct and Qwen/Qwen2.5-VL-3B-Instruct.
_TEXT: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": dict(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151_936,
        tie_word_embeddings=True,
    ),
    "qwen2.5-vl-3b": dict(
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151_936,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
    ),
}
_VISION = dict(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    out_hidden_size=2048,
    num_heads=16,
    patch_size=14,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
)
NAMES = ("toy", "toy-vl", *_TEXT)


def build(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """One of NAMES, in training mode."""
    if name.startswith("toy"):
        from cppo.demo.tiny import build_tiny_text_model, build_tiny_vlm

        make: Any = build_tiny_vlm if name == "toy-vl" else build_tiny_text_model
        tiny: nn.Module = make(seed=seed, size="test")[0]
        return tiny.to(device, dtype).train()
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    torch.manual_seed(seed)
    config: Any
    if name == "qwen2.5-vl-3b":
        config = Qwen2_5_VLConfig(
            text_config=_TEXT[name],
            vision_config=_VISION,
            image_token_id=151_655,
            video_token_id=151_656,
            vision_start_token_id=151_652,
            vision_end_token_id=151_653,
            tie_word_embeddings=True,
        )
        kind: Any = Qwen2_5_VLForConditionalGeneration
    else:
        config, kind = Qwen2Config(**_TEXT[name]), Qwen2ForCausalLM
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    return model.train()
