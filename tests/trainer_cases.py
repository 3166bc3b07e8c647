"""Small cases that several trainer tests share: questions with images, rollouts made by hand."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cppo.demo.digits import DigitSums
from cppo.demo.tiny import build_tiny_text_model, build_tiny_vlm
from cppo.model.forward import check_supported, set_attention
from cppo.model.prompts import encode_questions, tokenizer_of
from cppo.options.trainer import CPPOConfig, LossConfig
from cppo.questions import Question
from cppo.rewards import completion_text
from cppo.rollouts.rollout import Rollouts, _assemble
from cppo.train.batch import Batch
from cppo.train.trainer import CPPOTrainer

VISION_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES = ("text", *VISION_FAMILIES)


@functools.cache
def _built(family: str, seed: int) -> tuple[nn.Module, Any]:
    if family == "text":
        return build_tiny_text_model(seed, size="test")
    return build_tiny_vlm(family, seed, size="test")


def tiny(family: str, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A fresh tiny model, with transformers' own attention, and its processor or tokenizer."""
    model, processor = _built(family, seed)
    return copy.deepcopy(model).to(dtype), copy.deepcopy(processor)


def dimmed(pixels: Tensor, generator: torch.Generator) -> Tensor:
    return 0.9 * pixels + 0.05


def darkened(pixels: Tensor, generator: torch.Generator) -> Tensor:
    return 0.2 * pixels


# Views that do not depend on a seed.
VIEWS: dict[str, Any] = {"positive_views": (dimmed,), "negative_views": (darkened,)}


class Alone:
    """Stands for the processes of a run of one."""

    size, rank = 1, 0

    def gather(self, value: Any) -> list[Any]:
        return [value]


def packed(model: Any) -> Any:
    """The same model with the packed attention."""
    check_supported(model)
    set_attention(model, "sdpa")
    return model


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of coloured blocks with noise."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 12 + 1, width // 12 + 1, 3))
    blocks = blocks.repeat(12, 0).repeat(12, 1)
    noisy = blocks[:height, :width] + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def question(text: str, images: Sequence[Image.Image] = (), **columns: Any) -> Question:
    """A user's question, its images first."""
    parts: Any = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    content = parts if images else text
    return Question([{"role": "user", "content": content}], list(images), columns)


def questions_for(family: str, count: int = 4) -> list[Question]:
    """Questions of different length; for a vision model: 1, 2, 0 and 1 images of all sizes."""
    texts = ["How many?", "What is the sum of the digits?", "Hi", "Which is larger, and why?"]
    if family == "text":
        return [question(text, answer=str(i)) for i, text in enumerate(texts[:count])]
    pictures = [[image(48, 24, 1)], [image(24, 72, 2), image(96, 48, 3)], [], [image(72, 72, 4)]]
    pairs = zip(texts[:count], pictures[:count], strict=True)
    return [question(text, group, answer=str(i)) for i, (text, group) in enumerate(pairs)]


def fixed_rollouts(
    model: Any,
    processor: Any,
    questions: list[Question],
    *,
    group_size: int = 2,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
) -> Rollouts:
    """Rollouts of random letters instead of sampled ones: (questions x group_size) completions."""
    generator = torch.Generator().manual_seed(seed)
    total = len(questions) * group_size
    if lengths is None:
        lengths = torch.randint(1, 8, (total,), generator=generator).tolist()
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    tokenizer = tokenizer_of(processor)
    letters = tokenizer("abcdefghij0123456789", add_special_tokens=False)["input_ids"]
    picked = torch.randint(0, len(letters), (total, width), generator=generator)
    ids = torch.tensor(letters)[picked].masked_fill(~mask, tokenizer.pad_token_id)
    prompts = encode_questions(model, processor, questions)
    truncated = torch.zeros(total, dtype=torch.bool)
    return _assemble(prompts, group_size, ids, mask, tokenizer, truncated)


def fixed_batch(rollouts: Rollouts, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """A batch on `rollouts` with advantages of both signs in every group, all rows kept."""
    total = len(rollouts.texts)
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(total, generator=generator, dtype=dtype) + 0.1
    sign = torch.where(torch.arange(total) % 2 == 0, 1.0, -1.0)
    return Batch(rollouts, size * sign, torch.arange(total), seed=seed)


def fixed_case(
    family: str, *, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, Any, Batch]:
    """A packed tiny model, its processor, and a batch; `options` are those of the rollouts."""
    model, processor = tiny(family, dtype=dtype)
    rollouts = fixed_rollouts(packed(model), processor, questions_for(family), **options)
    return model, processor, fixed_batch(rollouts, dtype=dtype)


def config(**options: Any) -> CPPOConfig:
    """A CPPOConfig; options of the loss by their own names."""
    names = LossConfig.__dataclass_fields__
    loss = {name: options.pop(name) for name in list(options) if name in names}
    options["loss"] = LossConfig(**{"cpl_reduction": "sequence", **loss})
    return CPPOConfig(**options)


def gradients(model: nn.Module, loss: Tensor | Callable[[], Any]) -> dict[str, Tensor]:
    """Gradient of every parameter that has one: of `loss`, or of what calling it accumulates."""
    model.zero_grad(set_to_none=True)
    if isinstance(loss, Tensor):
        loss.backward()
    else:
        loss()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_difference(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any entry over the largest entry, over all tensors."""
    assert ours.keys() == expected.keys()
    scale = max(value.abs().max().item() for value in expected.values())
    assert scale > 0
    return max((ours[name] - expected[name]).abs().max().item() for name in ours) / scale


def padded_logps(model: Any, rollouts: Rollouts) -> Tensor:
    """(B, L) log-probabilities of every token by the stock padded forward, 0 at the first."""
    images = rollouts.prompts.images
    vision: dict[str, Any] = {}
    if images is not None:
        questions = [row // rollouts.group_size for row in range(len(rollouts.texts))]
        of_rows = images.of(questions)
        vision = {
            "pixel_values": of_rows.joined("pixel_values"),
            "image_grid_thw": of_rows.joined("image_grid_thw"),
            "mm_token_type_ids": (rollouts.input_ids == model.config.image_token_id).int(),
        }
    else:
        positions = (rollouts.attention_mask.long().cumsum(1) - 1).clamp(min=0)
        vision = {"position_ids": positions}
    logits = model(
        input_ids=rollouts.input_ids,
        attention_mask=rollouts.attention_mask.long(),
        use_cache=False,
        **vision,
    ).logits
    logps = logits.log_softmax(-1)[:, :-1].gather(-1, rollouts.input_ids[:, 1:, None])[..., 0]
    return F.pad(logps, (1, 0))


def text_rows(count: int = 6) -> list[dict[str, Any]]:
    """Rows of a text task."""
    return [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(count)]


def digit_share(completions: list[Any], **columns: Any) -> list[float]:
    """Share of digits among the characters: easily learned."""
    texts = map(completion_text, completions)
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in texts]


def noise(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that depends on the completion alone and differs within groups."""
    return [random.Random(completion_text(text)).random() for text in completions]


def small_run(output_dir: Any, **options: Any) -> CPPOConfig:
    """The options of a run of two steps of eight completions."""
    defaults = dict(batch_size=8, group_size=4, max_steps=2, max_completion_tokens=6)
    defaults |= dict(learning_rate=1e-3, log_completions=2)
    return config(**{**defaults, "output_dir": str(output_dir), **options})


def trainer_for(output_dir: Any, family: str = "text", **options: Any) -> CPPOTrainer:
    """A trainer of a fresh tiny model.

    `rewards`, `rows`, `eval_rows`, `model` and `processor` may be given.
    """
    model, processor = tiny(family)
    model, processor = options.pop("model", model), options.pop("processor", processor)
    rows = text_rows() if family == "text" else DigitSums("train", 6)
    rewards = options.pop("rewards", digit_share)
    rows, eval_rows = options.pop("rows", rows), options.pop("eval_rows", None)
    return CPPOTrainer(
        model,
        rewards,
        rows,
        config=small_run(output_dir, **options),
        processor=processor,
        eval_dataset=eval_rows,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_everywhere(weights: dict[str, Tensor]) -> None:
    """Of all processes: their weights must be those of the first, to the last bit."""
    for value in weights.values():
        other = value.clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, value), "the processes' weights differ"


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal to the last bit."""
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)
