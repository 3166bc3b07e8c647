"""The tiny models of TRL's tests, with random weights and tokenizers made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import vision_operators  # noqa: F401  (before transformers imports torchvision)
import torch
import transformers as hf
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# A model's text part; what its config has not is ignored.
TEXT: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
# Tokens of Qwen that TRL's tests write as numbers, and what they stand for. Tokens below 256 are
# single bytes in every tokenizer of this kind.
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
QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
QWEN_WORDS = ("<tool_call>", "</tool_call>")  # tokens of their own that decoding leaves in


def tokenizer(
    special: tuple[str, ...],
    template: str,
    *,
    first: int = 480,
    pieces: dict[int, str] | None = None,
    words: tuple[str, ...] = (),
    end: str,
    pad: str,
    **names: str,
) -> hf.PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: it reads bytes, and writes longer tokens.

    Args:
        first: the id of the first special token; the ids below are bytes, `pieces` and, so that
            random completions differ, made-up words.
        words: tokens that follow the special ones and are no special tokens.
    """
    to_characters = bytes_to_unicode()

    def characters(text: str) -> str:
        return "".join(to_characters[byte] for byte in text.encode())

    tokens = dict(enumerate(to_characters.values()))
    tokens |= {i: f"{characters(' ')}w{i}" for i in range(len(tokens), first)}
    tokens |= {i: characters(text) for i, text in (pieces or {}).items()}
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


def qwen(template: str, whole: bool) -> hf.PreTrainedTokenizerFast:
    """Qwen's special tokens; those that tests write as numbers too, under these, if `whole`."""
    return tokenizer(
        QWEN_SPECIAL,
        template,
        words=QWEN_WORDS,
        end="<|im_end|>",
        pad="<|endoftext|>",
        **(dict(first=151643, pieces=QWEN) if whole else {}),
    )


def qwen_3_5(template: str, whole: bool) -> hf.PreTrainedTokenizerFast:
    """As `qwen`, for Qwen3.5 and 3.6, whose tokens have other numbers."""
    return tokenizer(
        QWEN_SPECIAL,
        template,
        words=QWEN_WORDS,
        end="<|im_end|>",
        pad="<|endoftext|>",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
        **(dict(first=248044, pieces=QWEN_3_5) if whole else {}),
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


def qwens(whole: bool) -> dict[str, tuple[Any, Any]]:
    """Qwen's text models with a tokenizer, by name."""
    qwen2, qwen3 = qwen("qwen2_5", whole), qwen("qwen3", whole)
    small = dict(hidden_size=8)
    score: dict[str, Any] = dict(head="ForSequenceClassification", num_labels=1)
    moe = small | EXPERTS | dict(head_dim=8)
    return {
        "Qwen2ForCausalLM-2.5": (text_model("Qwen2", qwen2, **small), qwen2),
        "Qwen2ForSequenceClassification-2.5": (text_model("Qwen2", qwen2, **score), qwen2),
        "Qwen3ForCausalLM": (text_model("Qwen3", qwen3, head_dim=8, **small), qwen3),
        "Qwen3ForSequenceClassification": (text_model("Qwen3", qwen3, head_dim=8, **score), qwen3),
        "Qwen3MoeForCausalLM": (text_model("Qwen3Moe", qwen3, **moe), qwen3),
        "Qwen3_5ForConditionalGeneration-NoThink": qwen_3_5_vl("qwen3_5_nothink", whole),
    }


def others() -> dict[str, tuple[Any, Any]]:
    """The other families' text models with a tokenizer, by name."""
    made = llama("llama3_2")
    small: dict[str, Any] = dict(hidden_size=8)
    nemotron = EXPERTS | dict(
        layers_block_type=["mamba", "attention", "moe"],
        num_hidden_layers=3,
        mamba_num_heads=8,
        mamba_head_dim=4,
        mamba_n_groups=1,
        ssm_state_size=16,
        n_routed_experts=4,
        moe_shared_expert_intermediate_size=32,
    )
    glm = EXPERTS | dict(head_dim=4, n_routed_experts=4, first_k_dense_replace=1)
    oss = dict(num_local_experts=4, num_experts_per_tok=2)
    score: dict[str, Any] = dict(head="ForSequenceClassification", num_labels=1)
    built = {
        "Cohere2ForCausalLM": text_model("Cohere2", made, **small, logit_scale=1.0),
        "Gemma2ForCausalLM": text_model("Gemma2", made, **small),
        "Glm4MoeForCausalLM": text_model("Glm4Moe", made, **glm),
        "GptOssForCausalLM": text_model("GptOss", made, **oss),
        "LlamaForCausalLM-3.2": text_model("Llama", made, **small),
        "LlamaForSequenceClassification-3.2": text_model("Llama", made, **score),
        "MistralForCausalLM-0.2": text_model("Mistral", made, **small),
        "NemotronHForCausalLM-nano": text_model("NemotronH", made, **nemotron),
    }
    return {name: (model, made) for name, model in built.items()}


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


def qwen_3_5_vl(
    template: str, whole: bool = False, kind: str = "Qwen3_5", **more: Any
) -> tuple[Any, Any]:
    """As `qwen_vl`, for the families that mix linear attention with full attention."""
    linear = dict(
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        head_dim=8,
    )
    rope = dict(
        rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1], partial_rotary_factor=1.0
    )
    return qwen_vl(kind, qwen_3_5(template, whole), **linear, rope_parameters=rope, **more)


def llava(kind: str) -> tuple[Any, Any]:
    """LLaVA, or LLaVA-NeXT, which cuts an image into tiles."""
    made = llama("llava_next", "<image>", image_token="<image>")
    size = dict(height=28, width=28)
    vision = dict(model_type="clip_vision_model", image_size=28, patch_size=14, projection_dim=16)
    vision |= {name: TEXT[name] for name in ("hidden_size", "intermediate_size")}
    vision |= dict(num_hidden_layers=2, num_attention_heads=4)
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
    vision = dict(image_size=56, patch_size=14, hidden_size=16, intermediate_size=32)
    config = hf.Gemma3Config(
        text_config=dict(**TEXT, **ids(made), head_dim=8),
        vision_config=dict(**vision, num_hidden_layers=2, num_attention_heads=4),
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
        head_dim=8,
        global_head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=len(made),
    )
    vision = dict(
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=32,
        position_embedding_size=630,
        default_output_length=70,
    )
    config = hf.Gemma4Config(
        text_config=TEXT | ids(made) | text,
        vision_config=vision,
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


def vision_models() -> dict[str, tuple[Any, Any]]:
    """Models with a processor, by name."""
    qwen2 = qwen("qwen2_5_vl", False)
    experts = EXPERTS | dict(shared_expert_intermediate_size=32)
    return {
        "Gemma3ForConditionalGeneration": gemma3(),
        "Gemma4ForConditionalGeneration": gemma4(),
        "LlavaForConditionalGeneration": llava("Llava"),
        "LlavaNextForConditionalGeneration": llava("LlavaNext"),
        "Qwen2VLForConditionalGeneration": qwen_vl("Qwen2VL", qwen2),
        "Qwen2_5_VLForConditionalGeneration": qwen_vl("Qwen2_5_VL", qwen2),
        "Qwen3_5MoeForConditionalGeneration-3.6": qwen_3_5_vl(
            "qwen3_6", kind="Qwen3_5Moe", **experts
        ),
    }


REMOTE = {
    "configuration_remote.py": """
from transformers import LlamaConfig

class RemoteConfig(LlamaConfig):
    model_type = "remote"
""",
    "modeling_remote.py": """
from transformers import LlamaForCausalLM
from .configuration_remote import RemoteConfig

class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
""",
}


def write_remote(folder: Path) -> None:
    """A model whose code lies beside its weights."""
    made = llama("llama3_2")
    write(folder, text_model("Llama", made), made)
    for name, code in REMOTE.items():
        (folder / name).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= dict(model_type="remote", architectures=["RemoteForCausalLM"])
    config["auto_map"] = {
        "AutoConfig": "configuration_remote.RemoteConfig",
        "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))


def write(folder: Path, model: Any, processor: Any) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def write_all(folder: Path) -> None:
    torch.manual_seed(0)
    for name, pair in (qwens(False) | others() | vision_models()).items():
        write(folder / f"tiny-{name}", *pair)
    write_remote(folder / "tiny-RemoteForCausalLM")


def write_whole(folder: Path) -> None:
    """Qwen's models with as many tokens as the real ones: slow, for tests that write numbers."""
    torch.manual_seed(0)
    for name, pair in qwens(True).items():
        write(folder / f"tiny-{name}", *pair)
