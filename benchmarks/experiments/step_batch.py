"""Rollouts of the step benchmark: prompts, completions of spread lengths, three views."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

import cppo
from cppo.model.forward import ImageBatch, has_vision, image_arguments, rotary_positions, unwrap
from cppo.model.prompts import Prompts
from cppo.packed_batch import PackedBatch
from cppo.questions import Question
from cppo.rollouts.sampler import Sampling, decode

_PATCHES = 16  # a side of an image, in patches: 64 image tokens
_NOISE = {"anchor": 0.0, "positive": 0.1, "negative": 1.0}
_REPLACED = {"anchor": 0.0, "positive": 0.1, "negative": 1.0}  # share of a text prompt's tokens


@dataclasses.dataclass
class StepBatch:
    """B = Q x G completions behind their prompts, padded on the right.

    Args:
        input_ids, attention_mask, completion_mask: (B, L). rewards: (B,).
        view_ids: {view: (B, L)} input ids; the same for every view where there are images.
        images: {view: ImageBatch of the Q questions}, or empty.
        positions: (3, B, L) rotary positions with images.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    rewards: Tensor
    group_size: int
    prompt: int
    view_ids: dict[str, Tensor]
    images: dict[str, ImageBatch]
    positions: Tensor | None

    @property
    def num_tokens(self) -> int:
        return int(self.attention_mask.sum())

    @property
    def response_ids(self) -> Tensor:
        return self.input_ids[:, self.prompt :]

    @property
    def response_mask(self) -> Tensor:
        return self.completion_mask[:, self.prompt :].bool()

    def questions_of(self, part: Tensor) -> list[int]:
        return sorted({int(i) // self.group_size for i in part})

    def images_of(self, part: Tensor, view: str) -> tuple[ImageBatch | None, list[int]]:
        """The images of a part's questions, and which of them each completion sees."""
        shown = self.questions_of(part)
        order = [shown.index(int(i) // self.group_size) for i in part]
        return (self.images[view].of(shown) if self.images else None), order

    def padded_logits(self, model: nn.Module, part: Tensor, view: str) -> Tensor:
        """(b, L - prompt, V) logits of the response tokens, from a padded forward."""
        base = unwrap(model)
        arguments: dict[str, Any] = {"attention_mask": self.attention_mask[part]}
        if self.positions is not None:
            arguments["position_ids"] = self.positions[:, part]
        images, order = self.images_of(part, view)
        hidden = base.model(
            input_ids=self.view_ids[view][part],
            use_cache=False,
            **arguments,
            **image_arguments(base, images, order),
        ).last_hidden_state
        logits: Tensor = base.get_output_embeddings()(hidden[:, self.prompt - 1 : -1])
        return logits

    def pack(self, part: Tensor) -> PackedBatch:
        return cppo.pack_completions(
            self.input_ids, self.attention_mask, self.completion_mask, part
        )

    def positions_of(self, packed: PackedBatch) -> Tensor | None:
        if self.positions is None:
            return None
        return self.positions.flatten(1)[:, packed.token_index]

    def with_view(self, packed: PackedBatch, part: Tensor, view: str) -> PackedBatch:
        """A packed stream with the input ids of a view."""
        return dataclasses.replace(
            packed, input_ids=self.view_ids[view].flatten()[packed.token_index]
        )

    @torch.no_grad()
    def sample(self, model: nn.Module) -> None:
        """Decodes as many tokens as the longest completion has; random weights rarely stop, so
        what the update runs on are the batch's own completions with their spread lengths."""
        firsts = slice(None, None, self.group_size)
        positions = self.positions
        input_ids, mask = self.input_ids[firsts, : self.prompt], self.attention_mask[firsts]
        prompts = Prompts(
            [Question([], [], {}) for _ in input_ids],
            input_ids,
            mask[:, : self.prompt].bool(),
            None if positions is None else positions[:, firsts, : self.prompt],
            self.images.get("anchor"),
        )
        tokens = self.input_ids.shape[1] - self.prompt
        decode(model.eval(), prompts, Sampling(self.group_size, tokens, temperature=1.0))
        model.train()


def make_batch(
    model: nn.Module, questions: int, group_size: int, prompt: int, completion: int, seed: int = 0
) -> StepBatch:
    """Random prompts and completions; lengths log-normal, half of the longest in the median."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    vocabulary = min(unwrap(model).config.get_text_config().vocab_size, 100_000)
    count = questions * group_size
    spread = torch.randn(count, generator=generator).mul(0.6).exp() * completion / 2
    length = spread.round().long().clamp(1, completion)
    length[0] = completion
    prompts = torch.randint(10, vocabulary, (questions, prompt), generator=generator)
    images = _images(model, questions, generator) if has_vision(model) else {}
    if images:
        prompts = _with_image_tokens(model, prompts)
        prompt = prompts.shape[1]
    responses = torch.randint(10, vocabulary, (count, completion), generator=generator)
    input_ids = torch.cat([prompts.repeat_interleave(group_size, 0), responses], 1)
    attention_mask = (torch.arange(prompt + completion) < (prompt + length)[:, None]).long()
    completion_mask = attention_mask.clone()
    completion_mask[:, :prompt] = 0
    view_ids = {}
    for view, share in _REPLACED.items():
        swapped = torch.rand(questions, prompt, generator=generator) < (0 if images else share)
        other = torch.randint(10, vocabulary, (questions, prompt), generator=generator)
        own = torch.where(swapped, other, prompts).repeat_interleave(group_size, 0)
        view_ids[view] = torch.cat([own, responses], 1).to(device)
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
    positions = None
    if images:
        grid = images["anchor"].image_grid_thw.repeat_interleave(group_size, 0)
        positions = rotary_positions(model, input_ids, attention_mask.bool(), grid)
    return StepBatch(
        input_ids,
        attention_mask,
        completion_mask.to(device),
        (torch.randint(0, 3, (count,), generator=generator).float() / 2).to(device),
        group_size,
        prompt,
        view_ids,
        images,
        positions,
    )


def _images(model: nn.Module, questions: int, generator: torch.Generator) -> dict[str, ImageBatch]:
    vision = unwrap(model).config.vision_config
    channels = 3 * vision.temporal_patch_size * vision.patch_size**2
    parameter = next(model.parameters())
    anchor = torch.randn(questions * _PATCHES**2, channels, generator=generator)
    grid = torch.tensor([[1, _PATCHES, _PATCHES]] * questions, device=parameter.device)
    return {
        view: ImageBatch(
            (anchor + noise * torch.randn(anchor.shape, generator=generator)).to(parameter),
            grid,
            (1,) * questions,
        )
        for view, noise in _NOISE.items()
    }


def _with_image_tokens(model: nn.Module, prompts: Tensor) -> Tensor:
    """An image before the words of every prompt."""
    config = unwrap(model).config
    merged = math.prod((_PATCHES // config.vision_config.spatial_merge_size,) * 2)
    special = {config.image_token_id, config.vision_start_token_id, config.vision_end_token_id}
    special |= {getattr(config, "video_token_id", config.image_token_id)}
    prompts = prompts.clone()
    for token in special:
        prompts[prompts == token] = min(set(range(10, 60)) - special)
    image = [config.vision_start_token_id, *[config.image_token_id] * merged]
    image.append(config.vision_end_token_id)
    return torch.cat([torch.tensor([image] * len(prompts)), prompts], 1)
