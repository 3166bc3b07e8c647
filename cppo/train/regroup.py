"""Rollouts put together, taken apart by question, and shared evenly over the processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cppo.model.forward import ImageBatch
from cppo.model.prompts import Prompts
from cppo.ops.pack import balance_ranks
from cppo.rollouts.rollout import Rollouts
from cppo.train.processes import Processes
from cppo.train.scoring import Scores
from cppo.train.step import Batch

# Below this ratio of the busiest process's tokens to the mean, completions stay where they are.
_BALANCED = 1.05


def merge(parts: Sequence[Rollouts]) -> Rollouts:
    """The questions of several rollouts as one, padded to the longest prompt and completion."""
    if len(parts) == 1:
        return parts[0]
    widths = [part.prompts.input_ids.shape[1] for part in parts]
    prompt = max(widths)
    completion = max(
        part.input_ids.shape[1] - width for part, width in zip(parts, widths, strict=True)
    )

    def joined(tensors: Sequence[Tensor], right: int) -> Tensor:
        fitted = []
        for x, width in zip(tensors, widths, strict=True):
            end = right and right - (x.shape[-1] - width)
            fitted.append(F.pad(x, (prompt - width, end)))
        return torch.cat(fitted, dim=-2)

    def all_positions(tensors: Sequence[Tensor | None], right: int) -> Tensor | None:
        known = [x for x in tensors if x is not None]
        return joined(known, right) if known else None

    prompts = Prompts(
        [question for part in parts for question in part.prompts.questions],
        joined([part.prompts.input_ids for part in parts], 0),
        joined([part.prompts.attention_mask for part in parts], 0),
        all_positions([part.prompts.positions for part in parts], 0),
        _merged_images([part.prompts for part in parts]),
        [text for part in parts for text in part.prompts.generation_prompts],
    )
    return Rollouts(
        prompts,
        parts[0].group_size,
        joined([part.input_ids for part in parts], completion),
        joined([part.attention_mask for part in parts], completion),
        joined([part.completion_mask for part in parts], completion),
        all_positions([part.positions for part in parts], completion),
        [ids for part in parts for ids in part.completion_ids],
        [text for part in parts for text in part.texts],
        torch.cat([part.truncated for part in parts]),
    )


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of several rollouts as one, in the order of `merge`."""
    columns = dict.fromkeys(column for part in parts for column in part.extra)
    names = dict.fromkeys(name for part in parts for name in part.logged)
    return Scores(
        torch.cat([part.total for part in parts]),
        {name: torch.cat([part.by_name[name] for part in parts]) for name in parts[0].by_name},
        {name: [x for part in parts for x in part.logged.get(name, [])] for name in names},
        {
            column: [
                value
                for part in parts
                for value in part.extra.get(column, [None] * len(part.total))
            ]
            for column in columns
        },
    )


def _merged_images(prompts: Sequence[Prompts]) -> ImageBatch | None:
    images = [own.images for own in prompts if own.images is not None]
    if not images:
        return None
    counts = [
        own.images.per_question if own.images is not None else (0,) * len(own.questions)
        for own in prompts
    ]
    return ImageBatch(
        torch.cat([own.pixel_values for own in images]),
        torch.cat([own.image_grid_thw for own in images]),
        tuple(count for own in counts for count in own),
    )


def take_questions(rollouts: Rollouts, questions: Sequence[int]) -> Rollouts:
    """The rollouts of some questions, all their completions, in the order given."""
    group, prompts = rollouts.group_size, rollouts.prompts
    own = torch.tensor(list(questions), dtype=torch.int64, device=rollouts.input_ids.device)
    rows = (own[:, None] * group + torch.arange(group, device=own.device)).flatten()
    numbers = rows.tolist()
    return Rollouts(
        Prompts(
            [prompts.questions[q] for q in questions],
            prompts.input_ids[own],
            prompts.attention_mask[own],
            None if prompts.positions is None else prompts.positions[:, own],
            None if prompts.images is None else prompts.images.of(list(questions)),
            [prompts.generation_prompts[q] for q in questions],
        ),
        group,
        rollouts.input_ids[rows],
        rollouts.attention_mask[rows],
        rollouts.completion_mask[rows],
        None if rollouts.positions is None else rollouts.positions[:, rows],
        [rollouts.completion_ids[row] for row in numbers],
        [rollouts.texts[row] for row in numbers],
        rollouts.truncated[rows.to(rollouts.truncated.device)],
    )


def balanced(batch: Batch, processes: Processes) -> Batch:
    """The batch with kept completions exchanged so that every process has about as many tokens.

    Whole questions move, after advantages and pruning: no group is ever split. Collective. With
    one process, or where tokens are even already, the batch is returned as it is.
    """
    if processes.size == 1:
        return batch
    tokens = _kept_tokens(batch)
    everywhere: list[dict[int, int]] = processes.gather(tokens)
    plan = _plan(everywhere)
    if plan is None:
        return batch
    leaving = [
        (owner, question, to)
        for to, members in enumerate(plan)
        for owner, question in members
        if owner == processes.rank and to != owner
    ]
    sent = {(owner, q): (to, _to_cpu(_piece(batch, [q]))) for owner, q, to in leaving}
    arrived = {
        key: piece
        for own in processes.gather(sent)
        for key, (to, piece) in own.items()
        if to == processes.rank
    }
    staying = [q for owner, q in plan[processes.rank] if owner == processes.rank]
    device = batch.rollouts.input_ids.device
    pieces = [_piece(batch, staying)]
    pieces += [_moved(arrived[key], device) for key in plan[processes.rank] if key in arrived]
    pieces = [own for own in pieces if len(own.advantages)] or pieces[:1]
    return _joined(batch, pieces)


def _kept_tokens(batch: Batch) -> dict[int, int]:
    """Tokens of the kept completions of each question that has any."""
    tokens: dict[int, int] = {}
    lengths = batch.lengths(batch.kept)
    for row, length in zip(batch.kept.tolist(), lengths, strict=True):
        question = row // batch.rollouts.group_size
        tokens[question] = tokens.get(question, 0) + length
    return tokens


def _plan(everywhere: Sequence[dict[int, int]]) -> list[list[tuple[int, int]]] | None:
    """(owner, question) of every process; None where there is nothing to gain."""
    now = [sum(own.values()) for own in everywhere]
    if max(now) * len(now) <= _BALANCED * sum(now):
        return None
    keys = [(owner, q) for owner, own in enumerate(everywhere) for q in own]
    lengths = [everywhere[owner][q] for owner, q in keys]
    bins = [[keys[i] for i in members] for members in balance_ranks(lengths, len(everywhere))]
    if max(sum(everywhere[o][q] for o, q in members) for members in bins) >= max(now):
        return None
    # Each share goes to the process that has most of it already, the clearest cases first.
    size = len(everywhere)
    overlap = {
        (share, rank): sum(owner == rank for owner, _ in members)
        for share, members in enumerate(bins)
        for rank in range(size)
    }
    plan: list[list[tuple[int, int]] | None] = [None] * size
    placed: set[int] = set()
    for share, rank in sorted(overlap, key=lambda pair: (-overlap[pair], pair)):
        if share not in placed and plan[rank] is None:
            plan[rank] = bins[share]
            placed.add(share)
    return [members or [] for members in plan]


def _piece(batch: Batch, questions: Sequence[int]) -> Batch:
    """Some questions of a batch as a batch of their own."""
    group = batch.rollouts.group_size
    rows = [q * group + i for q in questions for i in range(group)]
    order = {row: i for i, row in enumerate(batch.kept.tolist())}
    kept = [i for i, row in enumerate(rows) if row in order]
    chosen = torch.tensor([order[rows[i]] for i in kept], dtype=torch.int64)
    return dataclasses.replace(
        batch,
        rollouts=take_questions(batch.rollouts, questions),
        advantages=batch.advantages[rows],
        kept=torch.tensor(kept, dtype=torch.int64, device=batch.kept.device),
        places=None if batch.places is None else batch.places[chosen],
        per_token={name: value[rows] for name, value in batch.per_token.items()},
    )


def _joined(batch: Batch, pieces: Sequence[Batch]) -> Batch:
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece.advantages))
    kept = [piece.kept + start for piece, start in zip(pieces, starts, strict=False)]
    places = [piece.places for piece in pieces if piece.places is not None]
    return dataclasses.replace(
        batch,
        rollouts=merge([piece.rollouts for piece in pieces]),
        advantages=torch.cat([piece.advantages for piece in pieces]),
        kept=torch.cat(kept),
        places=torch.cat(places) if places else None,
    )


def _moved(batch: Batch, device: torch.device | str) -> Batch:
    rollouts, prompts = batch.rollouts, batch.rollouts.prompts

    def to(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device)

    images = prompts.images
    if images is not None:
        pixel_values, grid = images.pixel_values.to(device), images.image_grid_thw.to(device)
        images = ImageBatch(pixel_values, grid, images.per_question)
    return dataclasses.replace(
        batch,
        advantages=batch.advantages.to(device),
        kept=batch.kept.to(device),
        rollouts=dataclasses.replace(
            rollouts,
            input_ids=rollouts.input_ids.to(device),
            attention_mask=rollouts.attention_mask.to(device),
            completion_mask=rollouts.completion_mask.to(device),
            positions=to(rollouts.positions),
            prompts=dataclasses.replace(
                prompts,
                input_ids=prompts.input_ids.to(device),
                attention_mask=prompts.attention_mask.to(device),
                positions=to(prompts.positions),
                images=images,
            ),
        ),
    )


def _to_cpu(piece: Batch) -> Batch:
    """What travels: no pictures, which the update does not look at again."""
    moved = _moved(piece, "cpu")
    prompts = moved.rollouts.prompts
    light = [question._replace(images=[], columns={}) for question in prompts.questions]
    prompts = dataclasses.replace(prompts, questions=light)
    return dataclasses.replace(moved, rollouts=dataclasses.replace(moved.rollouts, prompts=prompts))
