"""The logits that `linear_token_stats` keeps for its backward, and when it makes them again."""

from __future__ import annotations

import pytest
import torch

import cppo
from cppo import backends
from cppo.fused import head
from cppo.testing import assert_op_as_accurate, make_inputs

FUSED = [name for name in backends.available("linear_token_stats") if name != "reference"]
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not FUSED, reason="the extension is not built"),
]
SIZES = {"vocabulary": 300, "hidden_size": 32, "lengths": (50, 20, 70, 0, 30, 40)}


@pytest.fixture
def made(monkeypatch):
    """How many rows of logits each product made."""
    rows = []
    logits = head.Head.logits

    def counted(self, hidden):
        rows.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(head.Head, "logits", counted)
    return rows


def packed(dtype=torch.float32, **changes):
    inputs = make_inputs("linear_token_stats", layout="packed", dtype=dtype, **SIZES) | changes
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    return inputs, leaves


def gradients(inputs, leaves, weights, **options):
    stats = cppo.linear_token_stats(**inputs, backend="cpp")
    total = ((stats.logps + 0.1 * stats.entropy) * weights).sum()
    return torch.autograd.grad(total, leaves, **options)


@pytest.mark.parametrize("share", [1.0, 0.95, 0.5, 0.0], ids=lambda share: f"{share:.0%} of rows")
@pytest.mark.parametrize("budget", [1 << 20, 0], ids=["kept", "made again"])
def test_gradients_are_the_same_and_logits_are_made_once(budget, share, made, monkeypatch):
    monkeypatch.setitem(head.KEPT_BYTES, "cpu", budget)
    monkeypatch.setitem(head.TILE_BYTES, "cpu", 64 * 300 * 4)
    inputs, leaves = packed()
    weights = torch.zeros(210)
    weights[: round(210 * share)] = torch.linspace(0.5, 1.5, round(210 * share))
    found = gradients(inputs, leaves, weights)
    assert sum(made) == 210 + (0 if budget else round(210 * share))
    exact = cppo.linear_token_stats(**inputs, backend="reference")
    total = ((exact.logps + 0.1 * exact.entropy) * weights).sum()
    for ours, expected in zip(found, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "a bias"])
@pytest.mark.parametrize("budget", [1 << 20, 0], ids=["kept", "made again"])
@pytest.mark.parametrize("tile", [64, 1000], ids=lambda rows: f"{rows} rows a tile")
@pytest.mark.parametrize("logits_dtype", ["fp32", "input"])
def test_accuracy(logits_dtype, tile, budget, with_bias, monkeypatch):
    monkeypatch.setitem(head.KEPT_BYTES, "cpu", budget)
    monkeypatch.setitem(head.TILE_BYTES, "cpu", tile * 300 * 2)
    for dtype in (torch.bfloat16, torch.float32):
        inputs = make_inputs("linear_token_stats", layout="packed", dtype=dtype, **SIZES)
        inputs |= {"logits_dtype": logits_dtype} | ({} if with_bias else {"bias": None})
        assert_op_as_accurate("linear_token_stats", "cpp", inputs)


@pytest.mark.parametrize("native", [False, True])
def test_a_graph_that_is_kept_makes_them_again(native, made, monkeypatch):
    monkeypatch.setattr(head, "multiplies_natively", lambda dtype, device: native)
    inputs, leaves = packed(torch.bfloat16, bias=torch.zeros(300, dtype=torch.bfloat16))
    stats = cppo.linear_token_stats(**inputs, logits_dtype="input", backend="cpp")
    results = [
        torch.autograd.grad(stats.logps.sum(), leaves, retain_graph=number < 2)
        for number in range(3)
    ]
    assert made == [210] * 3
    for again in results[1:]:
        for one, other in zip(results[0], again, strict=True):
            torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(stats.logps.sum(), leaves)


def test_nothing_is_kept_that_nobody_asks_for(monkeypatch):
    held = []
    op = torch.ops.cppo.linear_token_stats

    def seen(*arguments):
        held.append(arguments[-1])
        return op(*arguments)

    monkeypatch.setattr(backends.extension.fused._ops, "linear_token_stats", seen)
    inputs, _ = packed()
    cppo.linear_token_stats(**inputs, backend="cpp")
    with torch.no_grad():
        cppo.linear_token_stats(**inputs, backend="cpp")
    cppo.linear_token_stats(**inputs, mask=torch.ones(210), backend="cpp")
    cppo.linear_token_stats(**inputs, softcap=30.0, backend="cpp")
    frozen = {name: x.detach() if torch.is_tensor(x) else x for name, x in inputs.items()}
    cppo.linear_token_stats(**frozen, backend="cpp")
    assert held == [True, False, False, False, False]


@pytest.mark.parametrize(
    "dtype, logits_dtype, rows", [(torch.bfloat16, "input", 1024), (torch.bfloat16, "fp32", 512)]
)
def test_how_many_rows_are_kept(dtype, logits_dtype, rows, monkeypatch):
    monkeypatch.setattr(head, "multiplies_natively", lambda dtype, device: True)
    monkeypatch.setitem(head.KEPT_BYTES, "cpu", 1024 * 300 * 2)
    weight = torch.zeros(300, 8, dtype=dtype)
    assert head.keeps_logits(rows, weight, None, None, logits_dtype)
    assert not head.keeps_logits(rows + 1, weight, None, None, logits_dtype)


def test_the_gradient_of_the_weight_is_one_product_in_its_dtype(monkeypatch):
    """Where all rows are in one tile: no sum in fp32 that is rounded afterwards."""
    monkeypatch.setattr(head, "multiplies_natively", lambda dtype, device: True)
    dtypes = []
    add = head.Head._add_weight_gradient

    def seen(self, *arguments):
        add(self, *arguments)
        dtypes.append(self.grad_weight.dtype)

    monkeypatch.setattr(head.Head, "_add_weight_gradient", seen)
    inputs, leaves = packed(torch.bfloat16)
    inputs["bias"] = None
    for rows_per_tile in (300, 64):
        for budget in (1 << 20, 0):
            monkeypatch.setitem(head.TILE_BYTES, "cpu", rows_per_tile * 300 * 2)
            monkeypatch.setitem(head.KEPT_BYTES, "cpu", budget)
            more = {**inputs, "logits_dtype": "input"}
            gradients(more, leaves[:2], torch.ones(210))
    assert dtypes == [torch.bfloat16] * 3 + [torch.float32] * 4
