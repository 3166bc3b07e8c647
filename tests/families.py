"""Tiny models of the text families of transformers, built from their configs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# What a family is given of these depends on what its config has.
_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Mixtures of experts
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # Latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
    # Others
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LATENT = {"num_key_value_heads": 4}
_OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "longcat_flash": {**_LATENT, "num_layers": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "granitemoehybrid": {
        "layer_types": ["attention", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
    },
}

# Families whose class says that it supports other attentions (`_supports_attention_backend`).
FAMILIES = (
    *("afmoe", "apertus", "arcee", "aria_text", "beam", "bitnet", "cohere", "cohere2", "cwm"),
    *("cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "diffllama"),
    *("doge", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "flint"),
    *("gemma", "gemma2", "gemma3_text", "gemma3n_text", "glm", "glm4", "glm4_moe", "helium"),
    *("glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granite", "granite_swa", "granitemoe", "hy_v3"),
    *("granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hrm_text", "hunyuan_v1_dense"),
    *("hunyuan_v1_moe", "hy_v4", "hyperclovax", "jais2", "jetmoe", "kolibri1", "laguna", "lfm2"),
    *("lfm2_moe", "lfm3", "llama", "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash"),
    *("minicpm3", "minimax", "minimax_m2", "minimax_m3_vl_text", "ministral", "ministral3"),
    *("mistral", "mixtral", "modernbert-decoder", "nanochat", "nemotron", "olmo", "olmo2"),
    *("olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe"),
    *("qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "starcoder2", "vaultgemma"),
    *("youtu", "zaya"),
)


def is_known(family: str) -> bool:
    """Whether the transformers that is installed has the family."""
    return family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def tiny_family(family: str, *, window: int | None = None, seed: int = 0) -> Any:
    """A model with random weights, in eval mode with eager attention.

    Args:
        window: tokens of its sliding windows or chunks, if it has any; None: the family's own.
    """
    config_class = CONFIG_MAPPING[family]
    default = config_class()
    own = _OWN.get(family, {})
    options = {name: size for name, size in _SIZES.items() if hasattr(default, name)} | own
    kinds = getattr(default, "layer_types", None)
    if kinds and "layer_types" not in own:  # one layer of every kind
        options["layer_types"] = (list(dict.fromkeys(kinds)) * 2)[: max(2, len(set(kinds)))]
        options["num_hidden_layers"] = len(options["layer_types"])
    for name in ("sliding_window", "attention_chunk_size"):
        if window is not None and getattr(default, name, None):
            options[name] = window
    torch.manual_seed(seed)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    model_class = getattr(transformers, name if isinstance(name, str) else name[0])
    config = config_class(**options)
    config._attn_implementation = "eager"
    return model_class(config).eval()
