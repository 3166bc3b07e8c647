"""What a chat template puts behind the last message, and what it is given besides the messages."""

from pathlib import Path

import pytest
import torch
from prompt_cases import (
    CHATML,
    DIALOGUE,
    GEMMA,
    LLAMA,
    MISTRAL,
    PHI,
    THINKING,
    chat_tokenizer,
    encode_rows,
    own_ids,
    vision_processor,
)
from trainer_cases import image

from cppo.model.prompts import PromptEncoder, Prompts, render
from cppo.questions import QuestionError, as_question


@pytest.mark.parametrize(
    ("template", "arguments", "expected"),
    [
        (LLAMA, {}, "<|start|>assistant<|end|>"),
        (GEMMA, {}, "<|start|>model\n"),
        (PHI, {}, "<|assistant|>\n"),  # without it the template ends in <|endoftext|>
        (MISTRAL, {}, " [/INST]"),  # the template does not ask: all behind the message
        (THINKING, {}, "<|start|>assistant\n<think>\n"),
        (THINKING, {"enable_thinking": False}, "<|start|>assistant\n<think>\n\n</think>\n\n"),
        # Another beginning with a generation prompt, and the tag differs in its middle.
        (
            "{{ 'on' if add_generation_prompt else 'off' }} {{ messages[-1].content }}"
            "{% if add_generation_prompt %}<think>{% else %}<thanks>{% endif %}",
            {},
            "<think>",
        ),
        # In any case, as some reasoning models do.
        ("{{ messages[-1].content }}<|eot|>{{ '<think>\n' }}", {}, "<|eot|><think>\n"),
        ("{{ messages[-1].content }}", {}, ""),
    ],
)
@pytest.mark.parametrize("text", ["a", "think", "<think>", "1+1?"])
def test_generation_prompts(template, arguments, expected, text):
    tokenizer = chat_tokenizer(template)
    assert encode_rows(tokenizer, text, **arguments).generation_prompts == [expected]
    row = {"prompt": [*DIALOGUE, {"role": "assistant", "content": text}]}
    if template in (LLAMA, GEMMA, THINKING):
        assert encode_rows(tokenizer, row, **arguments).generation_prompts == [expected]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2_5", "<|im_start|>assistant\n"),
        ("qwen2_5_vl", "<|im_start|>assistant\n"),
        ("qwen3", "<|im_start|>assistant\n"),
        ("qwen3_vl", "<|im_start|>assistant\n"),
        ("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("gemma", "<start_of_turn>model\n"),
        ("deepseekv3", "<｜Assistant｜><think>\n"),
        ("phi3", "<|assistant|>\n"),
        ("glm4moe", "<|assistant|>"),
    ],
)
def test_templates_as_they_ship(name, expected):
    trl = pytest.importorskip("trl", reason="its chat templates are the families'")
    file = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not file.exists():
        pytest.skip(f"this TRL has no {file.name}")
    tokenizer = chat_tokenizer(file.read_text())
    prompts = encode_rows(tokenizer, "2 + 2?", {"prompt": DIALOGUE})
    assert prompts.generation_prompts == [expected] * 2
    assert all(render(tokenizer, own).endswith(expected) for own in prompts.questions)


def test_generation_prompts_with_images_and_of_prompts_made_by_hand():
    for content in ([{"type": "image"}], "<image>?", "?<image>"):
        row = {"prompt": [{"role": "user", "content": content}], "image": image(24, 24)}
        found = PromptEncoder(vision_processor(CHATML))(as_question(row))
        assert found.generation_prompt == "<|im_start|>assistant\n"
    ids = torch.zeros(2, 3, dtype=torch.int64)
    by_hand = Prompts([as_question({"prompt": "?"})] * 2, ids, ids == 0, None, None)
    assert by_hand.generation_prompts == ["", ""]


def test_chat_template_kwargs_reach_the_ids():
    tokenizer = chat_tokenizer(THINKING)
    text = tokenizer.decode(own_ids(encode_rows(tokenizer, "?", enable_thinking=False), 0))
    assert text.endswith("assistant\n<think>\n\n</think>\n\n")
    text = tokenizer.decode(own_ids(encode_rows(tokenizer, "?"), 0))
    assert text.endswith("assistant\n<think>\n")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"enable_thinkin": True}, ValueError, "'enable_thinkin', which the chat template does"),
        ({"add_generation_prompt": False}, ValueError, "'add_generation_prompt', which cppo sets"),
        ({"tokenize": False}, ValueError, "'tokenize', which cppo sets"),
        (["enable_thinking"], TypeError, "chat_template_kwargs must be a mapping, got"),
    ],
)
def test_chat_template_kwargs_that_cannot_work(arguments, error, message):
    with pytest.raises(error, match=f"^cppo: .*{message}") as caught:
        PromptEncoder(chat_tokenizer(THINKING), arguments)
    assert not isinstance(caught.value, QuestionError)  # no question is to blame


def test_a_chat_template_of_ones_own_and_none():
    found = encode_rows(chat_tokenizer(LLAMA), "?", chat_template="{{ messages[0].content }}!")
    assert found.attention_mask.sum() == 2
    with pytest.raises(ValueError, match="processor .* has no chat template"):
        PromptEncoder(chat_tokenizer(None))
