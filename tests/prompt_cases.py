"""Tokenizers and chat templates as model families ship them, small enough to read.

Every character is a token, as is every special token: ids can be worked out by hand.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from cppo.demo.tiny import CHAT_TEMPLATE as CHATML
from cppo.model.prompts import Prompts, encode_questions
from cppo.questions import as_question

# Behaves as Llama 3's: the template writes bos, and the tokenizer would write it once more.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>{{ m.content | trim }}"
    "<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
)
# Gemma's: no system role, and another name for the assistant.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|eot|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
# Mistral's: nothing asks for a generation prompt.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
# Phi 3's: the end of the text in place of the generation prompt, and no system messages.
PHI = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|eot|>\n"
    "{% elif m.role == 'assistant' %}<|assistant|>\n{{ m.content }}<|eot|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
# DeepSeek's and Qwen's: the generation prompt opens the thought, or closes it at once.
THINKING = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)
CHATML_WITH_BOS = "{{ bos_token }}" + CHATML
TEMPLATES = dict(llama=LLAMA, gemma=GEMMA, mistral=MISTRAL, phi=PHI, thinking=THINKING)
SPECIAL = ("<s>", "</s>", "<|start|>", "<|end|>", "<|eot|>", "<|user|>", "<|assistant|>")
PLACEHOLDERS = ("<|endoftext|>", "<|image_pad|>", "<|video_pad|>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")


def chat_tokenizer(
    template: str, *, pad_token: str | None = None, bos: bool = True, eos: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer of characters whose post-processor writes bos and, if asked, eos.

    `<think>` and `</think>` are tokens of their own, but not special ones, as Qwen3 has them.
    """
    characters = [c for c in string.printable if c.isprintable() or c == "\n"]
    special = [*SPECIAL, *PLACEHOLDERS, *VISION]
    vocab = {token: i for i, token in enumerate([*special, "<unk>", *characters])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(special)
    core.add_tokens(["<think>", "</think>"])
    core.post_processor = processors.TemplateProcessing(
        single=("<s> " if bos else "") + "$A" + (" </s>" if eos else ""),
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=pad_token,
        chat_template=template,
    )


def vision_processor(template: str, *, bos: bool = True) -> Any:
    """A Qwen2.5-VL processor around `chat_tokenizer`; an image token covers 24 x 24 pixels."""
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from cppo.model.processors import image_only

    images = Qwen2VLImageProcessorPil(
        patch_size=12, merge_size=2, min_pixels=24 * 24, max_pixels=256 * 256
    )
    tokenizer = chat_tokenizer(template, bos=bos)
    return image_only(Qwen2_5_VLProcessor)(
        image_processor=images, tokenizer=tokenizer, chat_template=template
    )


class NoModel(nn.Module):
    """What `encode_questions` asks a text model for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {})()


def encode_rows(tokenizer: Any, *rows: Any, **arguments: Any) -> Prompts:
    questions = [as_question(row if isinstance(row, dict) else {"prompt": row}) for row in rows]
    return encode_questions(NoModel(), tokenizer, questions, arguments)


def own_ids(prompts: Prompts, row: int) -> list[int]:
    return prompts.input_ids[row][prompts.attention_mask[row]].tolist()


DIALOGUE = [
    {"role": "user", "content": "1?"},
    {"role": "assistant", "content": "1."},
    {"role": "user", "content": " 2? "},
]
