"""The LM head's tiles on a CPU: how rows are divided, and where logits land."""

from __future__ import annotations

from itertools import accumulate, combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cppo
from cppo.fused.head import Head, even
from cppo.fused.linear import _ranges


@given(st.integers(0, 5000), st.integers(1, 600))
def test_rows_are_in_the_fewest_pieces_about_equally_large(count, room):
    size = even(count, room)
    pieces = [len(piece) for piece in torch.arange(count).split(size)] if count else []
    assert all(0 < piece <= room for piece in pieces)
    assert len(pieces) == -(-count // room)
    # Whole vectors of 16 rows, but for the last piece, wherever a piece has room for them.
    assert size % 16 == 0 or size == room
    if room % 16 == 0 and pieces:
        assert max(pieces) - -(-count // len(pieces)) < 16


@given(st.lists(st.integers(0, 30), max_size=9), st.integers(1, 60))
def test_completions_are_in_the_fewest_groups_and_the_largest_is_as_small_as_can_be(lengths, room):
    sums = [0, *accumulate(lengths)]
    groups = _ranges(sums, room)
    assert [start for start, _ in groups] == [0, *(end for _, end in groups[:-1])]
    assert groups[-1][1] == len(lengths)

    def largest(cuts):
        ends = [0, *cuts, len(lengths)]
        sizes = [sums[b] - sums[a] for a, b in pairwise(ends)]
        fits = all(b - a <= 1 or sums[b] - sums[a] <= room for a, b in pairwise(ends))
        return max(sizes) if fits else None

    inside = range(1, len(lengths))
    for count in range(len(groups)):
        found = [largest(cuts) for cuts in combinations(inside, count)]
        possible = [size for size in found if size is not None]
        if possible:
            assert count == len(groups) - 1
            assert min(possible) == largest([start for start, _ in groups[1:]])
            return
    raise AssertionError("more groups than cuts allow")


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_are_the_product_for_any_number_of_rows(dtype, rows, monkeypatch):
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = (
        torch.randn(n, 24, generator=generator, dtype=torch.float64).to(dtype) for n in (rows, 1037)
    )
    monkeypatch.setattr(
        "cppo.fused.head.SLICE_BYTES", 4 * 24 * 100
    )  # eleven slices, the last short
    head = Head(weight, None)
    exact = hidden.double() @ weight.double().t()
    off = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(head.logits(hidden).double(), exact, rtol=off, atol=off)


def test_nothing_of_the_last_call_is_in_the_gradient_of_the_weight():
    """Its memory is not zeroed: the first product writes it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40_000, 32, generator=generator).requires_grad_()
    hidden = torch.randn(24, 32, generator=generator)
    targets = torch.arange(24)
    for _ in range(2):
        stats = cppo.linear_token_stats(hidden, weight, targets)
        (gradient,) = torch.autograd.grad(stats.logps.sum(), weight)
        exact = torch.autograd.grad(
            (hidden @ weight.t()).log_softmax(-1)[range(24), targets].sum(), weight
        )[0]
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5)
        gradient.fill_(torch.nan)
        del gradient
