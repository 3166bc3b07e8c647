"""Kept completions, shared evenly over the processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from cppo.ops.pack import balance_ranks
from cppo.records import map_tensors
from cppo.rollouts.rollout import merge, merge_per_token, take_questions
from cppo.train.batch import Batch
from cppo.train.processes import Processes

# Below this ratio of the busiest process's tokens to the mean, completions stay where they are.
_BALANCED = 1.05


def balanced(batch: Batch, processes: Processes, *, pictures: bool = False) -> Batch:
    """The batch with kept completions exchanged so that every process has about as many tokens.

    Whole questions move, after advantages and pruning: no group is ever split. Collective. With
    one process, or where tokens are even already, the batch is returned as it is.

    Args:
        pictures: whether the update looks at the questions' pictures, which are large.
    """
    if processes.size == 1:
        return batch
    plan = _plan(processes.gather(_kept_tokens(batch)))
    if plan is None:
        return batch
    leaving = [
        (owner, question, to)
        for to, members in enumerate(plan)
        for owner, question in members
        if owner == processes.rank and to != owner
    ]
    sent = {}
    for owner, q, to in leaving:
        piece = _light(_piece(batch, [q]), pictures)
        sent[owner, q] = to, _on(piece, torch.device("cpu"))
    arrived = {
        key: piece
        for own in processes.gather(sent)
        for key, (to, piece) in own.items()
        if to == processes.rank
    }
    staying = [q for owner, q in plan[processes.rank] if owner == processes.rank]
    device = batch.rollouts.input_ids.device
    pieces = [_piece(batch, staying)]
    for key in plan[processes.rank]:
        if key in arrived:
            pieces.append(_on(arrived[key], device))
    pieces = [own for own in pieces if len(own.advantages)] or pieces[:1]
    return _joined(batch, pieces)


def _kept_tokens(batch: Batch) -> dict[int, int]:
    """Tokens of the kept completions of each question that has any."""
    tokens: dict[int, int] = {}
    lengths = batch.lengths(batch.kept)
    for completion, length in zip(batch.kept.tolist(), lengths, strict=True):
        question = completion // batch.rollouts.group_size
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
    completions = [q * group + i for q in questions for i in range(group)]
    order = {completion: i for i, completion in enumerate(batch.kept.tolist())}
    kept = [i for i, completion in enumerate(completions) if completion in order]
    chosen = torch.tensor([order[completions[i]] for i in kept], dtype=torch.int64)
    return dataclasses.replace(
        batch,
        rollouts=take_questions(batch.rollouts, questions),
        advantages=batch.advantages[completions],
        kept=torch.tensor(kept, dtype=torch.int64),
        places=None if batch.places is None else batch.places[chosen],
        per_token={name: value[completions] for name, value in batch.per_token.items()},
    )


def _on(piece: Batch, device: torch.device) -> Batch:
    """A batch with its rollouts on a device; what cuts it stays on the CPU."""
    return dataclasses.replace(
        piece,
        rollouts=map_tensors(piece.rollouts, lambda tensor: tensor.to(device)),
        per_token={name: value.to(device) for name, value in piece.per_token.items()},
    )


def _joined(batch: Batch, pieces: Sequence[Batch]) -> Batch:
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece.advantages))
    kept = [piece.kept + start for piece, start in zip(pieces, starts, strict=False)]
    places = [piece.places for piece in pieces if piece.places is not None]
    rollouts = [piece.rollouts for piece in pieces]
    per_token = {
        name: merge_per_token(rollouts, [piece.per_token[name] for piece in pieces])
        for name in batch.per_token
    }
    return dataclasses.replace(
        batch,
        rollouts=merge(rollouts),
        advantages=torch.cat([piece.advantages for piece in pieces]),
        kept=torch.cat(kept),
        places=torch.cat(places) if places else None,
        per_token=per_token,
    )


def _light(piece: Batch, pictures: bool) -> Batch:
    """A batch as it travels: the update does not read the questions' columns.

    Nor does it their pictures, unless a processor prepares views of them.
    """
    prompts = piece.rollouts.prompts
    light = [
        question._replace(images=question.images if pictures else [], columns={})
        for question in prompts.questions
    ]
    prompts = dataclasses.replace(prompts, questions=light)
    return dataclasses.replace(
        piece, rollouts=dataclasses.replace(piece.rollouts, prompts=prompts), views={}
    )
