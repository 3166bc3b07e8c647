"""Inputs of the timed calls, drawn fresh on the device.

The logits are as those of a trained model: one token of each row stands out. The negative view is
flatter, so that its entropy rises at every row, and by far the most at the share of rows that is
to be selected: rounding in bf16 changes no selection, and results can be compared.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cppo
from cppo.options.trainer import LossConfig
from cppo.records import Views

Inputs = dict[str, Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STANDS_OUT = 10.0  # logit of the target over the others, whose standard deviation is 2


@dataclass(frozen=True)
class Sizes:
    """The shape of a row op's input.

    Args:
        completions, length: T = completions * length rows, without padding.
        vocabulary: V. hidden: D, 0 for ops on logits.
        views: 1 (plain GRPO) or 3.
        positive_share: f, the share of completions with A > 0.
        selected_share: r, the share of their tokens that is selected.
        gating, divergence: as in LossConfig.
        inplace: as in `cppo_loss`: gradients take the place of the logits.
        logits_dtype: as in `linear_cppo_loss`; "input" rounds logits in bf16, as the others do.
    """

    completions: int
    length: int
    vocabulary: int
    hidden: int = 0
    views: int = 3
    positive_share: float = 0.5
    selected_share: float = 0.2
    gating: bool = True
    divergence: str = "k3"
    inplace: bool = False
    logits_dtype: str = "input"

    @property
    def rows(self) -> int:
        return self.completions * self.length

    @property
    def selected_rows(self) -> int:
        """Of each completion that looks."""
        return max(1, math.floor(self.selected_share * self.length))

    @property
    def looking(self) -> float:
        """f: the share of rows whose perturbed views matter."""
        return self.positive_share if self.gating else 1.0

    @property
    def selected(self) -> float:
        """f r: the share of rows whose contrastive term matters."""
        return self.looking * self.selected_rows / self.length

    def config(self) -> LossConfig:
        # Weights that make an error in the contrastive part as visible as one in the policy part.
        return LossConfig(
            cpl_coef=1.0,
            tau=1.0,
            fraction=self.selected_share,
            gating=self.gating,
            divergence=self.divergence,
        )


def row_inputs(op: str, sizes: Sizes, dtype: str, device: torch.device, seed: int = 0) -> Inputs:
    """Keyword arguments of `cppo.<op>` for the ops on rows; padded layout, no padding."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (sizes.completions, sizes.length)
    if op == "perception_mask":
        entropies = 3 * torch.rand(2, *shape, generator=generator, device=device)
        return {"anchor_entropy": entropies[0], "negative_entropy": entropies[1], "fraction": 0.5}
    targets = torch.randint(0, sizes.vocabulary, shape, generator=generator, device=device)
    inputs: Inputs = {"targets": targets}
    if sizes.hidden:
        anchor, inputs["weight"] = _hidden(sizes, targets, DTYPES[dtype], generator)
    else:
        anchor = torch.randn(
            *shape, sizes.vocabulary, generator=generator, device=device, dtype=torch.float32
        ).mul_(2)
        anchor.scatter_(-1, targets[..., None], _STANDS_OUT)
    name = "hidden" if sizes.hidden else "logits"
    if op.endswith("token_stats"):
        return {name: anchor.to(DTYPES[dtype]), **inputs}
    views = Views(anchor.to(DTYPES[dtype]))
    if sizes.views == 3:
        noise = torch.randn(anchor.shape, generator=generator, device=device)
        positive = noise.mul_(0.1).add_(anchor).to(DTYPES[dtype])
        negative = anchor.mul(_flatness(sizes, generator)).to(DTYPES[dtype])
        views = Views(views.anchor, positive, negative)
    size = 0.5 + torch.rand(sizes.completions, generator=generator, device=device)
    every = max(1, round(1 / sizes.positive_share))
    is_positive = torch.arange(sizes.completions, device=device) % every == 0
    inputs["advantages"] = torch.where(is_positive, size, -size)
    inputs |= {"config": sizes.config()} | ({"inplace": True} if sizes.inplace else {})
    return {name: views, **inputs}


def _hidden(
    sizes: Sizes, targets: Tensor, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    device = targets.device
    weight = torch.randn(sizes.vocabulary, sizes.hidden, generator=generator, device=device)
    weight = weight.mul_(sizes.hidden**-0.5).to(dtype)
    shape = (*targets.shape, sizes.hidden)
    anchor = torch.randn(shape, generator=generator, device=device).mul_(2)
    return anchor.add_(weight[targets].float(), alpha=_STANDS_OUT), weight


def _flatness(sizes: Sizes, generator: torch.Generator) -> Tensor:
    """(B, L, 1) factors: about 0.6 at the rows to be selected, about 0.9 at the others."""
    shape = (sizes.completions, sizes.length)
    draw = torch.rand(shape, generator=generator, device=generator.device)
    factors = 0.9 + 0.01 * draw
    chosen = draw.argsort(1)[:, : sizes.selected_rows]
    return factors.scatter_add_(1, chosen, torch.full_like(chosen, -0.3, dtype=draw.dtype))[
        ..., None
    ]


def restorer(inputs: Inputs) -> Callable[[], None]:
    """What brings back the logits that a call in place has overwritten; else does nothing."""
    if not inputs.get("inplace"):
        return lambda: None
    views = [view for view in inputs["logits"] if view is not None]
    kept = [view.clone() for view in views]

    def restore() -> None:
        for view, values in zip(views, kept, strict=True):
            view.copy_(values)

    return restore


def part_of(inputs: Inputs, completions: int) -> Inputs:
    """The first so many completions of a row op's inputs."""

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, Views):
            views: list[Any] = [None if view is None else view[:completions] for view in value]
            return Views(*views)
        return value[:completions] if isinstance(value, Tensor) and name != "weight" else value

    return {name: cut(name, value) for name, value in inputs.items()}


def rewards(completions: int, device: torch.device, seed: int = 0) -> Tensor:
    """Rewards of a verifiable task: few values, many ties."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 3, (completions,), generator=generator).float() / 2).to(device)


def rollout(
    completions: int, length: int, device: torch.device, per_token: int = 6, seed: int = 0
) -> Inputs:
    """Keyword arguments of `cppo.pack_completions`: left-padded prompts, 3/4 pruned."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, length // 4, (completions, 1), generator=generator)
    last = torch.randint(length // 2, length, (completions, 1), generator=generator)
    column = torch.arange(length)
    attention_mask = (column >= first) & (column < last)
    ids = torch.randint(0, 150_000, (completions, length), generator=generator)
    drawn = torch.rand(per_token, completions, length, generator=generator)
    return {
        "input_ids": ids.to(device),
        "attention_mask": attention_mask.to(device),
        "completion_mask": (attention_mask & (column >= length // 4)).to(device),
        "kept": torch.arange(0, completions, 4, device=device),
        "per_token": {f"x{i}": values.to(device) for i, values in enumerate(drawn)},
    }


def packed_values(completions: int, length: int, device: torch.device) -> Inputs:
    """Arguments of `unpack`: six per-target tensors, their places twice, the padded shape."""
    packed = cppo.pack_completions(**rollout(completions, length, device))
    mask = torch.zeros(packed.shape, dtype=torch.bool, device=device)
    mask.view(-1)[packed.target_index] = True
    return {
        "values": packed.per_token,
        "target_index": packed.target_index,
        "shape": packed.shape,
        "mask": mask,
    }


def lengths(count: int, seed: int = 0) -> list[int]:
    """Tokens of so many completions."""
    draw = random.Random(seed)
    return [draw.randint(50, 2000) for _ in range(count)]
