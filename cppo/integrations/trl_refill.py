"""Dynamic sampling in TRL: further questions in place of those with equal rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cppo.integrations.trl_rows import (
    EQUAL,
    Batch,
    joined,
    loss_mask,
    per_completion,
    take_rows,
)
from cppo.seeds import seed_from


class Sampled(NamedTuple):
    """A rollout in parts: each of its rows lies in one of them."""

    parts: list[Batch]
    part: Tensor
    """(B,) the part that a row lies in."""
    row: Tensor
    """(B,) its place there."""
    pad: int
    """The token that fills up prompts and completions."""

    def advantages(self) -> Tensor:
        """(B,) advantages."""
        return self._picked([per_completion(part["advantages"]) for part in self.parts])

    def lengths(self) -> Tensor:
        """(B,) tokens of prompt and completion."""
        masks = [(part["prompt_mask"], part["completion_mask"]) for part in self.parts]
        return self._picked([prompt.sum(1) + completion.sum(1) for prompt, completion in masks])

    def tokens(self) -> Tensor:
        """(B,) tokens of the completion that are trained on."""
        return self._picked([loss_mask(part).sum(1) for part in self.parts])

    def _picked(self, values: list[Tensor]) -> Tensor:
        first = torch.tensor([0, *map(len, values)], device=self.part.device).cumsum(0)
        return torch.cat(values)[first[self.part] + self.row]

    def take(self, rows: Tensor, gather: Callable[[Tensor], Tensor]) -> tuple[Batch, Tensor]:
        """Some rows as one batch, and the order in which they stand there.

        Args: gather: concatenates what all processes have.
        """
        if len(self.parts) == 1:
            return take_rows(self.parts[0], rows), torch.arange(len(rows), device=rows.device)
        places = [(self.part[rows] == number).nonzero()[:, 0] for number in range(len(self.parts))]
        counts = torch.tensor([[len(place) for place in places]], device=rows.device)
        taken = []
        for part, place, most in zip(self.parts, places, gather(counts).amax(0), strict=True):
            chosen = self.row[rows[place]]
            # Every process runs the postponed forwards of as many rows of each part.
            more = take_rows(part, F.pad(chosen, (0, int(most) - len(chosen)))) if most else {}
            if len(place):
                taken.append(take_rows(more, torch.arange(len(place), device=rows.device)))
        return joined(taken, self.pad), torch.cat(places)


def sample(
    trainer: Any, inputs: Any, draw: tuple[int, ...], generate: Callable[..., Batch]
) -> Sampled:
    """A rollout; with `drop_zero_variance` its questions of equal rewards are drawn anew.

    All processes draw as often, and as many questions, as the one that lacks most.
    Args: generate: called with the questions and with the number of the draw.
    """
    options, size = trainer.cppo, len(inputs)
    parts = [generate(inputs, 0)]
    device = parts[0]["advantages"].device
    row = torch.arange(size, device=device)
    part = torch.zeros_like(row)
    sampled = Sampled(parts, part, row, trainer._tokenizer.pad_token_id or 0)
    if not options.drop_zero_variance:
        return sampled
    group, log = trainer.num_generations, trainer._metrics["train"]
    refills = 0
    while refills < options.max_refills:
        dead = _equal(sampled.advantages(), group)
        most = int(trainer.accelerator.gather(dead.sum()[None]).max())
        if not most:
            break
        refills += 1
        parts.append(generate(_questions(trainer, most, (*draw, refills)), refills))
        fresh = (~_equal(per_completion(parts[-1]["advantages"]), group)).nonzero()[:, 0]
        for old, new in zip(dead.nonzero()[:, 0].tolist(), fresh.tolist(), strict=False):
            rows = slice(old * group, (old + 1) * group)
            part[rows] = refills
            row[rows] = torch.arange(new * group, (new + 1) * group, device=device)
    log["cppo/refills"].append(float(refills))
    # Without refills a question's completions may lie on several processes.
    everyones = trainer.accelerator.gather(sampled.advantages())
    log["cppo/equal_share"].append(_equal(everyones, group).float().mean().item())
    return sampled


def _equal(advantages: Tensor, group_size: int) -> Tensor:
    """(Q,) whether all completions of a question have the same reward."""
    return (advantages.view(-1, group_size).abs() <= EQUAL).all(1)


def _questions(trainer: Any, count: int, draw: tuple[int, ...]) -> list[dict[str, Any]]:
    """This process's `count` further questions, each as often as it is sampled."""
    dataset, accelerator = trainer.train_dataset, trainer.accelerator
    generator = torch.Generator().manual_seed(seed_from("refill", *draw))
    needed = count * accelerator.num_processes
    order = torch.randperm(len(dataset), generator=generator).tolist()
    chosen = [order[number % len(order)] for number in range(needed)]
    mine = chosen[accelerator.process_index * count :][:count]
    return [dict(dataset[index]) for index in mine for _ in range(trainer.num_generations)]
