"""The LM head's tiles on a CPU: how rows are divided, where logits land, what memory they take."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cppo
from cppo.fused import extension
from cppo.ops.head import Head, even

needs_cpp = pytest.mark.skipif(bool(extension.missing["cpp"]), reason=extension.missing["cpp"])


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


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_cpp)])
def test_logits_are_the_product_for_any_number_of_rows(compiled, dtype, rows, monkeypatch):
    if not compiled:
        monkeypatch.setitem(extension.missing, "cpp", "not built")
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = (
        torch.randn(n, 24, generator=generator, dtype=torch.float64).to(dtype) for n in (rows, 1037)
    )
    monkeypatch.setattr("cppo.ops.head.SLICE_BYTES", 4 * 24 * 100)  # eleven slices, the last short
    head = Head(weight, None)
    exact = hidden.double() @ weight.double().t()
    for _ in range(2):  # the second in memory that the first left behind
        logits = head.logits(hidden)
        off = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(logits.double(), exact, rtol=off, atol=off)
        logits.fill_(torch.nan)
        del logits


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 16, 39])
@pytest.mark.parametrize("columns", [1, 16, 50])
def test_a_product_is_turned_around_in_its_place(columns, rows, dtype):
    tile = torch.zeros(rows, 70, dtype=dtype)
    product = torch.randn(columns, rows + 3, dtype=dtype)
    torch.ops.cppo.place_transposed_(tile, product, 7)
    expected = torch.zeros_like(tile)
    expected[:, 7 : 7 + columns] = product[:, :rows].t()
    assert torch.equal(tile, expected)


@needs_cpp
@pytest.mark.parametrize(
    ("tile", "product", "first", "message"),
    [
        (torch.zeros(4, 8), torch.zeros(3, 4, dtype=torch.float64), 0, "both be fp32 or both fp64"),
        (torch.zeros(4, 8).half(), torch.zeros(3, 4).half(), 0, "both be fp32 or both fp64"),
        (torch.zeros(4, 8), torch.zeros(3, 4), 6, r"product \(3, 4\).*tile \(4, 8\).*column 6"),
        (torch.zeros(4, 8), torch.zeros(3, 4), -1, "column -1"),
        (torch.zeros(4, 8), torch.zeros(3, 3), 0, r"product \(3, 3\).*must fit"),
        (torch.zeros(8, 4).t(), torch.zeros(3, 4), 0, "dense in their last dimension"),
        (torch.zeros(8), torch.zeros(3, 4), 0, r"tile must have 2 dimension\(s\)"),
    ],
)
def test_what_does_not_fit_is_refused(tile, product, first, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cppo.place_transposed_(tile, product, first)


@needs_cpp
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is kept on Linux")
def test_a_tile_is_made_in_the_memory_of_the_last():
    torch.ops.cppo.empty_cache()
    head = Head(torch.randn(40_000, 8), None)
    hidden = torch.randn(32, 8)
    first = head.logits(hidden)  # 4.9 MiB
    address = first.data_ptr()
    assert first.shape == (32, 40_000) and address % 2**21 == 0
    del first
    assert head.logits(hidden).data_ptr() == address
    torch.ops.cppo.empty_cache()


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
