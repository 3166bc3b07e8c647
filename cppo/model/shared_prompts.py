"""A question's kept completions repeat its prompt; here it stands in the stream once.

    packed   [prompt a1] [prompt a2] [prompt a3]
    shared   [prompt] [a1] [a2] [a3]

Every token keeps its position, and the tokens of a completion attend to the prompt and to their
own completion, so hidden states and gradients are the packed ones to rounding; the prompt's
projections, MLPs and images are computed once. Only attention still reads the prompt's keys once
per completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from cppo.fused.pack import Lengths
from cppo.ops.packed_batch import PackedBatch


@dataclass(frozen=True)
class SharedStream:
    """A `PackedBatch` whose neighbours of the same question share one prompt.

    Args:
        token_index: (S',) int64, the token of the packed stream that stands at each place.
        cu_seqlens: (N+1,) int32, where each piece (a prompt, a completion) starts and ends.
        key_index: (S'_k,) int64, the places that the pieces look at, piece after piece.
        cu_key_seqlens: (N+1,) int32, where each piece's keys start and end in `key_index`.
        max_seqlen: tokens of the longest piece.
        max_key_seqlen: keys of the piece that sees most.
        rows: (T,) int64, places whose next token is a response token, one per target.
        first: completions of the packed stream that brought the prompts, in order.
    """

    token_index: Tensor
    cu_seqlens: Tensor
    key_index: Tensor
    cu_key_seqlens: Tensor
    max_seqlen: int
    max_key_seqlen: int
    rows: Tensor
    first: list[int]


def share_prompts(
    packed: PackedBatch, questions: Sequence[int], lengths: Lengths | None = None
) -> SharedStream:
    """The stream in which neighbours of the same question have their prompt in common.

    Args:
        packed: K completions.
        questions: the question of each of them, K numbers.
        lengths: (tokens, response tokens) of each of them, where the host knows them and every
            response is one run behind its prompt: then nothing waits for the device. None: read
            off the stream.
    Raises: ValueError if two prompts of a question differ (looked at on the CPU only).
    """
    bounds, prompts = _bounds(packed) if lengths is None else _known_bounds(lengths)
    place = torch.empty(bounds[-1], dtype=torch.int64)
    tokens: list[Tensor] = []
    keys: list[Tensor] = []
    first: list[int] = []
    count = 0
    for _, members in groupby(range(len(questions)), key=lambda k: questions[k]):
        own = list(members)
        lead, length = own[0], min(prompts[k] for k in own)
        if len(own) == 1:
            length = bounds[lead + 1] - bounds[lead]  # nobody to share with: one piece
        start = count
        pieces = [(bounds[lead], bounds[lead] + length)]
        pieces += [(bounds[k] + length, bounds[k + 1]) for k in own]
        for number, (begin, end) in enumerate(pieces):
            if begin == end:
                continue
            here = torch.arange(count, count + end - begin)
            prompt = torch.arange(start, start + length if number else start)
            tokens.append(torch.arange(begin, end))
            keys.append(torch.cat([prompt, here]))
            place[begin:end] = here
            count += end - begin
        for k in own:
            _check_same_prompt(packed, bounds[lead], bounds[k], length)
            place[bounds[k] : bounds[k] + length] = torch.arange(start, start + length)
        first.append(lead)

    def sent(values: Tensor) -> Tensor:
        return values.to(packed.input_ids.device, non_blocking=True)  # the host goes on

    return SharedStream(
        token_index=sent(_joined(tokens)),
        cu_seqlens=sent(_cumulative(tokens)),
        key_index=sent(_joined(keys)),
        cu_key_seqlens=sent(_cumulative(keys)),
        max_seqlen=max(map(len, tokens), default=0),
        max_key_seqlen=max(map(len, keys), default=0),
        rows=sent(place)[packed.rows],
        first=first,
    )


def _known_bounds(lengths: Lengths) -> tuple[list[int], list[int]]:
    """Where each completion starts and ends in the stream, and the tokens of its prompt."""
    tokens, responses = lengths
    prompts = [length - own for length, own in zip(tokens, responses, strict=True)]
    return [0, *accumulate(tokens)], prompts


def _bounds(packed: PackedBatch) -> tuple[list[int], list[int]]:
    """As `_known_bounds`; a prompt is what stands before the first response token."""
    bounds, row_bounds = packed.cu_seqlens.tolist(), packed.row_cu_seqlens.tolist()
    rows = packed.rows.tolist()
    ends = [
        rows[row] + 1 if row < next_row else end
        for row, next_row, end in zip(row_bounds, row_bounds[1:], bounds[1:], strict=False)
    ]
    return bounds, [end - begin for begin, end in zip(bounds, ends, strict=False)]


def _check_same_prompt(packed: PackedBatch, lead: int, other: int, length: int) -> None:
    ids = packed.input_ids
    if ids.device.type == "cpu" and other != lead:
        if not torch.equal(ids[lead : lead + length], ids[other : other + length]):
            raise ValueError(
                "cppo.share_prompts: completions of one question must begin with the same prompt, "
                f"their first {length} tokens differ"
            )


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _cumulative(parts: list[Tensor]) -> Tensor:
    lengths = torch.tensor([0, *map(len, parts)], dtype=torch.int64)
    return lengths.cumsum(0).int()
