"""The rows of a TRL rollout: which stay, how they are taken out, filled up and trimmed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import cppo
from cppo.integrations.trl_options import averages_rows
from cppo.integrations.trl_postponed import Postponed
from cppo.seeds import seed_from

Batch = dict[str, Any]  # a rollout, a micro-batch of it, or the arguments of a forward

# Entries of a TRL batch with a column per token of the completion, or of prompt and completion.
PER_TOKEN = (
    "completion_ids completion_mask tool_mask advantages importance_sampling_ratio "
    "old_per_token_logps ref_per_token_logps sampling_per_token_logps"
).split()
WHOLE = ("token_type_ids", "mm_token_type_ids")

EQUAL = 1e-4  # advantages of rewards that differ by rounding alone are as far from 0
ROUNDED = 1e-2  # where all rewards are equal and at most about 10, advantages are closer to 0


class Kept(NamedTuple):
    """This process's rows after pruning, and what they stand for among all processes' rows."""

    rows: Tensor
    """(K,) rows of the rollout; K is the same on every process and a multiple of the steps."""
    real: int
    """The first of them stay; the others fill up and weigh nothing."""
    scale: float
    """Rows that all processes run, divided by those that stay."""
    share: float
    """Completions of all processes that stay, of those sampled."""
    weights: Tensor | None
    """(K,) what the advantages are multiplied by; None: nothing."""


def keep(
    trainer: Any, advantages: Tensor, lengths: Tensor, tokens: Tensor, draw: tuple[int, ...]
) -> Kept:
    """Choose the rows that stay, over all processes: a question may lie on several.

    Args:
        advantages: (B,) of this process's rows.
        lengths: (B,) tokens of each.
        tokens: (B,) those that are trained on.
        draw: names the rollout; what chance decides follows from it.
    """
    options, accelerator = trainer.cppo, trainer.accelerator
    size, processes = len(advantages), accelerator.num_processes
    first = size * accelerator.process_index
    everyones, of_all = accelerator.gather(advantages), accelerator.gather(tokens)
    if options.drop_zero_variance:
        everyones = everyones.masked_fill(everyones.abs() <= EQUAL, 0)
    stay, weights = _stay(trainer, everyones, of_all, size, draw)
    most = int(torch.bincount(stay // size, minlength=processes).max())
    steps = trainer.args.steps_per_generation
    width = -(-max(most, 1) // steps) * steps
    here = (stay >= first) & (stay < first + size)
    mine = stay[here] - first
    # The shortest completion costs least.
    rows = torch.cat([mine, lengths.argmin().expand(width - len(mine))])
    if weights is not None:
        weights = torch.cat([weights[here], weights.new_ones(width - len(mine))])
    scale, share = width * processes / max(len(stay), 1), len(stay) / len(everyones)
    return Kept(rows, len(mine), scale, share, weights)


def _stay(
    trainer: Any, everyones: Tensor, tokens: Tensor, size: int, draw: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """The rows of all processes that stay, and what their advantages are multiplied by: (K,) each.

    Only "unbiased" has weights. TRL divides by the rows, or tokens, that are left, and has no
    weights of its own: so A / p is also multiplied by these over those sampled, and the gradient is
    that of all rows in the mean.
    """
    options = trainer.cppo
    # "batch" is over one process's completions, "group" over each question's, wherever they lie.
    by_process = options.prune_scope == "batch"
    units = everyones.split(size) if by_process else [everyones]
    group = 1 if by_process else trainer.num_generations
    generator = torch.Generator().manual_seed(seed_from("prune", *draw))
    rule: dict[str, Any] = {"scope": options.prune_scope, "prune": options.prune}
    kept, weights, start = [], [], 0
    for unit in units:
        rows = cppo.prune_completions(
            unit,
            group,
            options.prune_rate,
            **rule,
            drop_zero=options.drop_zero_variance,
            # Within a question, advantages are rewards up to a shift and a factor.
            rewards=unit,
            lengths=tokens[start : start + len(unit)],
            generator=generator,
        )
        kept.append(start + rows)
        weights.append(cppo.prune_weights(unit, rows, group, options.prune_rate, **rule))
        start += len(unit)
    stay = torch.cat(kept)
    if options.prune != "unbiased":
        return stay, None
    count = torch.ones_like(tokens) if averages_rows(trainer) else tokens
    counted = count[everyones != 0] if options.drop_zero_variance else count
    return stay, torch.cat(weights) * (count[stay].sum() / counted.sum().clamp(min=1))


def settled(trainer: Any, advantages: Tensor, below: float = math.inf) -> Tensor:
    """Advantages of a rollout, 0 where all rewards of a question are equal.

    There TRL has the rounding error of their mean, divided by 1e-4: the same for all completions
    but those without a reward, which have 0. A trainer that does not centre rewards also has 0 for
    a reward of 0; its other advantages are larger than a rounding error.
    Args: below: equal advantages of at least this size stay.
    """
    accelerator, size = trainer.accelerator, len(advantages)
    everyones = accelerator.gather(per_completion(advantages)).view(-1, trainer.num_generations)
    error = everyones.gather(1, everyones.abs().argmax(1, keepdim=True))
    unscored = (everyones == 0) & (error.abs() < ROUNDED)
    equal = ((everyones == error) | unscored).all(1) & (error[:, 0].abs() < below)
    equal = equal.repeat_interleave(trainer.num_generations)
    mine = equal[size * accelerator.process_index :][:size]
    return advantages.masked_fill(mine.view(-1, *[1] * (advantages.dim() - 1)), 0)


def filled(batch: Batch, order: Tensor, kept: Kept) -> Batch:
    """The rows that stay and those that fill up, which get no advantage and no token.

    Args: order: (K,) the place among `kept.rows` of each row of the batch.
    """
    if kept.weights is not None:
        batch = batch | {"advantages": _each(batch["advantages"], kept.weights[order])}
    if kept.scale == 1:
        return batch
    real = order < kept.real
    # Not completion_mask, which is also what attention sees: the log-probabilities of the rollout
    # and those of the loss must be of the same thing, or their ratio overflows.
    mask = batch.get("tool_mask", torch.ones_like(batch["completion_mask"]))
    return batch | {
        "tool_mask": mask * real[:, None].to(mask),
        "advantages": _each(batch["advantages"], real),
        "cppo_weight": real * kept.scale,
    }


def _each(advantages: Tensor, factor: Tensor) -> Tensor:
    """(B,) or (B, T) advantages, times a factor of each row."""
    return advantages * factor.to(advantages).view(-1, *[1] * (advantages.dim() - 1))


def per_completion(advantages: Tensor) -> Tensor:
    """(B,) advantages; where a subclass has (B, T), each completion's largest in size."""
    if advantages.dim() == 1:
        return advantages
    return advantages.gather(1, advantages.abs().argmax(1, keepdim=True))[:, 0]


def loss_mask(batch: Batch) -> Tensor:
    """(B, T) tokens that are trained on: of the completion, not written by a tool."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


def take_rows(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a TRL batch, or of a forward's arguments, with their images."""
    from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

    def take(value: Any) -> Any:
        if isinstance(value, Postponed):
            return value.take(rows)
        if isinstance(value, Tensor) and value.dim():
            return value[rows]
        return [value[row] for row in rows.tolist()] if isinstance(value, list) else value

    split = split_pixel_values_by_grid({k: v for k, v in batch.items() if v is not None})
    taken = unsplit_pixel_values_by_grid({k: take(v) for k, v in split.items()})
    return {k: taken.get(k) for k in {**batch, **taken}}


def joined(parts: list[Batch], pad: int) -> Batch:
    """Batches of different widths as one: prompts padded on the left, completions on the right."""
    prompt = max(part["prompt_ids"].shape[1] for part in parts)
    length = max(part["completion_ids"].shape[1] for part in parts)
    names = {name: None for part in parts for name in part}
    batches = [_widened(part, prompt, length, pad) for part in parts]
    joined: Batch = {}
    for name in names:
        values = [batch.get(name, _absent(name, batch)) for batch in batches]
        values = [value for value in values if value is not None]
        if not values:
            joined[name] = None
        elif isinstance(values[0], list):
            joined[name] = sum(values, [])
        else:
            joined[name] = torch.cat(_as_large(values)) if values[0].dim() else values[0]
    return joined


def _as_large(values: list[Tensor]) -> list[Tensor]:
    """Tensors with zeros behind them, so that they differ in their first dimension alone.

    Images are padded to the largest of their batch, and to the most that one was cut into.
    """
    largest = torch.tensor([value.shape[1:] for value in values]).amax(0).tolist()
    gaps = [[n - own for n, own in zip(largest, value.shape[1:], strict=True)] for value in values]
    return [
        F.pad(value, [n for more in reversed(gap) for n in (0, more)]) if any(gap) else value
        for value, gap in zip(values, gaps, strict=True)
    ]


def _widened(batch: Batch, prompt: int, length: int, pad: int) -> Batch:
    left = prompt - batch["prompt_ids"].shape[1]
    right = length - batch["completion_ids"].shape[1]
    wide = dict(batch)
    values = {"prompt_ids": pad, "completion_ids": pad, "importance_sampling_ratio": 1}
    for name, value in batch.items():
        filling = values.get(name, 0)
        if value is None:
            continue
        if name in ("prompt_ids", "prompt_mask"):
            wide[name] = F.pad(value, (left, 0), value=filling)
        elif name in WHOLE:
            wide[name] = F.pad(value, (left, right))
        elif name in PER_TOKEN and value.dim() == 2:
            if name == "importance_sampling_ratio" and value.shape[1] == 1:
                continue  # one per completion
            wide[name] = F.pad(value, (0, right), value=filling)
    return wide


def _absent(name: str, batch: Batch) -> Any:
    """What stands for an entry that this part has not and another has; None: nothing."""
    ids, count = batch["completion_ids"], len(batch["prompt_ids"])
    if name == "num_images":
        return [0] * count
    if name == "num_tiles":  # TRL has it where images are cut
        return batch.get("num_images") or [0] * count
    if name == "cppo_pictures":
        return [None] * count
    if name in WHOLE:
        return ids.new_zeros(count, batch["prompt_ids"].shape[1] + ids.shape[1])
    if name == "tool_mask":
        return torch.ones_like(ids)
    return ids.new_zeros(count) if name == "cppo_seed" else None


def trimmed(inputs: Batch, multiple: int) -> tuple[Batch, float]:
    """A micro-batch without the columns that are padding in every row, and the share that stays.

    Args: multiple: widths are multiples of it, as far as there are columns.
    """
    prompt, length = inputs["prompt_mask"].shape[1], inputs["completion_mask"].shape[1]

    def width(mask: Tensor) -> int:
        used = max(1, int(mask.any(0).sum()))
        return min(mask.shape[1], -(-used // multiple) * multiple)

    start, end = prompt - width(inputs["prompt_mask"]), width(inputs["completion_mask"])
    batch = dict(inputs)
    for name, value in inputs.items():
        if name in ("prompt_ids", "prompt_mask"):
            batch[name] = value[:, start:]
        elif name in WHOLE:
            batch[name] = value[:, start : prompt + end]
        elif name in PER_TOKEN and value.dim() == 2:
            batch[name] = value[:, :end]
    return batch, (prompt - start + end) / (prompt + length)
