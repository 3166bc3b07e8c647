"""The tiny text models of TRL's tests, with random weights and tokenizers made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as hf
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# A model's text part; what its config has not is ignored.
LAYERS: dict[str, Any] = dict(num_hidden_layers=2, num_attention_heads=4)
WIDTH: dict[str, Any] = dict(hidden_size=16, intermediate_size=32)
TEXT = dict(**WIDTH, **LAYERS, num_key_value_heads=2, max_position_embeddings=4096)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
# Tokens that TRL's tests write as numbers of Qwen's tokenizers, and what they stand for. Those
# below 256 are single bytes, here too.
QWEN = {
    330: ' "', 293: " b", 314: " {", 397: ">\n", 411: "out", 450: "de", 497: '",', 522: "</",
    606: "name", 788: '":', 894: " any", 927: "sh", 944: "'t", 1318: "text", 1414: " know",
    1513: " don", 2765: " won", 4913: '{"', 5212: ' {"', 5392: " tool", 6023: "hi",
    6659: "call", 7692: "async", 9520: "step", 11248: "}}\n", 13477: "crement", 14172: "tool",
    16252: " increment", 16370: "arguments", 17453: "Done", 22785: "_tool", 35744: "increment",
    64648: "multiply", 93054: "_multiply", 95642: '"}}\n',
}  # fmt: skip
QWEN_3_5 = {
    510: "</", 866: " any", 914: "'t", 1366: " know", 1459: " don", 1628: "function",
    5224: " tool", 13744: "=s", 16936: "Done", 22076: "_tool", 30091: "creenshot",
}  # fmt: skip
PIECES = tuple(dict.fromkeys((QWEN | QWEN_3_5).values()))
QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
# Tokens that decoding leaves in. The long ones keep what tools answer as short as the tests want.
QWEN_WORDS = (
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    *("user\n", "assistant\n", " got an unexpected keyword argument "),
)
FIRST = 480  # special token of a small vocabulary; Qwen's, which has 151,643 tokens before it:
QWEN_FIRST, QWEN_3_5_FIRST = 151643, 248044


def numbers() -> dict[int, int]:
    """The number that a token of Qwen's has here, by the number it has there."""
    found = {real: 256 + PIECES.index(text) for real, text in (QWEN | QWEN_3_5).items()}
    for first in (QWEN_FIRST, QWEN_3_5_FIRST):
        found |= {first + i: FIRST + i for i in range(len(QWEN_SPECIAL) + 2)}
    return found


def tokenizer(
    special: tuple[str, ...],
    template: str,
    *,
    first: int = FIRST,
    pieces: tuple[str, ...] = (),
    words: tuple[str, ...] = (),
    end: str,
    pad: str,
    **names: str,
) -> hf.PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: it reads bytes, and writes longer tokens.

    Args:
        first: the id of the first special token. The ids below are bytes, then `pieces` and, so
            that random completions differ, made-up words.
        words: tokens that follow the special ones and are no special tokens.
    """
    to_characters = bytes_to_unicode()

    def characters(text: str) -> str:
        return "".join(to_characters[byte] for byte in text.encode())

    tokens = dict(enumerate(to_characters.values()))
    tokens |= {i: f"{characters(' ')}w{i}" for i in range(len(tokens), first)}
    tokens |= {256 + i: characters(text) for i, text in enumerate(pieces)}
    tokens |= dict(enumerate((*special, *words), first))
    core = Tokenizer(models.BPE({token: i for i, token in sorted(tokens.items())}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    core.add_tokens(list(words))
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=end, pad_token=pad, padding_side="left", **names
    )
    if template:
        made.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return made


def qwen(template: str, first: int = FIRST, **names: str) -> hf.PreTrainedTokenizerFast:
    ends = dict(end="<|im_end|>", pad="<|endoftext|>")
    more: dict[str, Any] = dict(first=first, pieces=PIECES, words=QWEN_WORDS)
    return tokenizer(QWEN_SPECIAL, template, **more, **ends, **names)


def qwen_3_5(template: str) -> hf.PreTrainedTokenizerFast:
    """As `qwen`, for Qwen3.5 and 3.6, whose tokenizers name the tokens around images."""
    return qwen(
        template,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
    )


def llama(template: str, *more: str, **names: str) -> hf.PreTrainedTokenizerFast:
    special = ("<pad>", "<s>", "</s>", *more)
    return tokenizer(special, template, end="</s>", pad="<pad>", bos_token="<s>", **names)


def ids(made: Any) -> dict[str, Any]:
    """What a config takes from its tokenizer."""
    return dict(
        vocab_size=len(made),
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
    )


def text_model(kind: str, made: Any, head: str = "ForCausalLM", **options: Any) -> Any:
    """A model of a text family, e.g. kind = "Qwen3"."""
    config = getattr(hf, f"{kind}Config")(**{**TEXT, **ids(made), **options})
    return getattr(hf, f"{kind}{head}")(config)


SMALL: dict[str, Any] = dict(hidden_size=8)
SCORE: dict[str, Any] = dict(head="ForSequenceClassification", num_labels=1)


def qwens() -> dict[str, tuple[Any, Any]]:
    """Qwen's text models with a tokenizer, by name."""
    made = qwen("qwen3")
    moe = SMALL | EXPERTS | dict(head_dim=8)
    return qwen2(FIRST) | {
        "Qwen3ForCausalLM": (text_model("Qwen3", made, head_dim=8, **SMALL), made),
        "Qwen3ForSequenceClassification": (text_model("Qwen3", made, head_dim=8, **SCORE), made),
        "Qwen3MoeForCausalLM": (text_model("Qwen3Moe", made, **moe), made),
    }


def qwen2(first: int) -> dict[str, tuple[Any, Any]]:
    made = qwen("qwen2_5", first)
    return {
        "Qwen2ForCausalLM-2.5": (text_model("Qwen2", made, **SMALL), made),
        "Qwen2ForSequenceClassification-2.5": (text_model("Qwen2", made, **SCORE), made),
    }


def others() -> dict[str, tuple[Any, Any]]:
    """The other families' text models with a tokenizer, by name."""
    made = llama("llama3_2")
    nemotron = EXPERTS | dict(
        layers_block_type=["mamba", "attention", "moe"], num_hidden_layers=3, mamba_num_heads=8,
        mamba_head_dim=4, mamba_n_groups=1, ssm_state_size=16, n_routed_experts=4,
        moe_shared_expert_intermediate_size=32,
    )  # fmt: skip
    glm = EXPERTS | dict(head_dim=4, n_routed_experts=4, first_k_dense_replace=1)
    oss = dict(num_local_experts=4, num_experts_per_tok=2)
    built = {
        "Cohere2ForCausalLM": text_model("Cohere2", made, **SMALL, logit_scale=1.0),
        "Gemma2ForCausalLM": text_model("Gemma2", made, **SMALL),
        "Glm4MoeForCausalLM": text_model("Glm4Moe", made, **glm),
        "GptOssForCausalLM": text_model("GptOss", made, **oss),
        "LlamaForCausalLM-3.2": text_model("Llama", made, **SMALL),
        "LlamaForSequenceClassification-3.2": text_model("Llama", made, **SCORE),
        "MistralForCausalLM-0.2": text_model("Mistral", made, **SMALL),
        "NemotronHForCausalLM-nano": text_model("NemotronH", made, **nemotron),
    }
    return {name: (model, made) for name, model in built.items()}
