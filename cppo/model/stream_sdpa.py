"""Attention within each sequence of a stream by `scaled_dot_product_attention`, on any device."""

from __future__ import annotations

import functools
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Run(NamedTuple):
    """Neighbours in a stream that have as much before them.

    Fields:
        queries, keys: their places in the stream; `queries` is empty for those without tokens.
        lengths: tokens of each.
        before: keys ahead of each one's own.
        padding: for one call that computes all of them, else None.
    """

    queries: slice
    keys: slice
    lengths: list[int]
    before: int
    padding: Padding | None


class Padding(NamedTuple):
    """n sequences of a run side by side: places in the run.

    Fields:
        queries: (n, longest) int64. keys: (n, longest + before) int64.
        back: (tokens,) int64, each token in the flat (n x longest).
    """

    queries: Tensor
    keys: Tensor
    back: Tensor


class Runs:
    """How sdpa goes through a stream; found out once, by the first layer that asks.

    Args:
        cu_query, cu_key: (N+1,) int32, as in `Bounds`. They are read on the host.
    """

    def __init__(self, cu_query: Tensor, cu_key: Tensor) -> None:
        self._cu = cu_query, cu_key

    @functools.cached_property
    def runs(self) -> list[Run]:
        cu_query, cu_key = self._cu
        bounds = torch.stack([cu_query, cu_key])
        lengths, key_lengths = bounds.diff().tolist()
        pairs = [pair for pair in zip(lengths, key_lengths, strict=True) if any(pair)]
        runs, at, key_at = [], 0, 0
        for (before, is_empty), run in groupby(
            pairs, key=lambda pair: (pair[1] - pair[0], not pair[0])
        ):
            sizes = list(run)
            own = [own for own, _ in sizes]
            stop, key_stop = at + sum(own), key_at + sum(seen for _, seen in sizes)
            padding = None if is_empty else _padding(own, before, bounds.device)
            runs.append(Run(slice(at, stop), slice(key_at, key_stop), own, before, padding))
            at, key_at = stop, key_stop
        return runs


def _padding(lengths: list[int], before: int, device: torch.device) -> Padding | None:
    """None for one sequence, and where padding would cost more than a call for each."""
    longest, mean = max(lengths), sum(lengths) / len(lengths)
    # Padding costs time, and so does a call. Measured on a CPU they are even at about 12 tokens; on
    # a GPU calls cost more, but more than twice the work is too much there as well.
    if len(lengths) == 1 or longest - mean > (mean if device.type == "cuda" else 12):
        return None
    sizes = torch.tensor(lengths)

    def places(extra: int) -> Tensor:
        # Right padding is harmless: a causal row never looks to its right.
        ends = (sizes + extra).cumsum(0)[:, None]
        starts = ends - (sizes + extra)[:, None]
        return torch.minimum(starts + torch.arange(longest + extra), ends - 1)

    back = (torch.arange(longest) < sizes[:, None]).flatten().nonzero()[:, 0]
    return Padding(*(x.to(device) for x in (places(0), places(before), back)))


def stream_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Runs,
    scale: float | None,
    window: int | None = None,
) -> Tensor:
    """Attention within each sequence of a stream: (1, heads, S, d) each."""
    outputs = []
    for run in runs.runs:
        if run.queries.start == run.queries.stop:
            continue
        attend = functools.partial(_one, before=run.before, scale=scale, window=window)
        q, k, v = query[:, :, run.queries], key[:, :, run.keys], value[:, :, run.keys]
        if run.padding is not None:
            queries, keys, back = run.padding
            padded = (x[0][:, at].transpose(0, 1) for x, at in ((q, queries), (k, keys), (v, keys)))
            out = attend(*padded).transpose(1, 2).flatten(0, 1)
            outputs.append(out.index_select(0, back).transpose(0, 1)[None])
        else:
            key_lengths = [run.before + own for own in run.lengths]
            split = q.split(run.lengths, 2), k.split(key_lengths, 2), v.split(key_lengths, 2)
            outputs += [attend(*part) for part in zip(*split, strict=True)]
    return torch.cat(outputs, dim=2) if outputs else query


def _one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    before: int,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Causal attention of one sequence, or of several of one length, `before` keys ahead."""
    mask = None
    if before or window is not None:
        mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(before)
        if window is not None:
            mask = mask.triu(before - window + 1)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
