"""token_stats and linear_token_stats on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from error_cases import refused

import cppo
from cppo import backends
from cppo.testing import ROW_CASES, assert_op_as_accurate, evaluate, make_inputs, to_packed

pytestmark = pytest.mark.usefixtures("poisoned")

OPS = ("token_stats", "linear_token_stats")
RUNS = [(op, backend) for op in OPS for backend in backends.available(op)]
BACKENDS = backends.available("token_stats")
HALF = (torch.bfloat16, torch.float16)


@pytest.mark.interpreted("", linear=["random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("case", ROW_CASES)
@pytest.mark.parametrize(("op", "backend"), RUNS)
def test_accuracy(op, backend, case, dtype):
    assert_op_as_accurate(op, backend, make_inputs(op, case, dtype=dtype))
    assert_op_as_accurate(op, backend, make_inputs(op, case, dtype=dtype, layout="packed"))


@pytest.mark.parametrize("vocabulary", [1, 2, 1023, 1025])
@pytest.mark.parametrize(("op", "backend"), RUNS)
def test_any_vocabulary(op, backend, vocabulary):
    inputs = make_inputs(op, lengths=(1, 2), vocabulary=vocabulary, layout="packed")
    assert_op_as_accurate(op, backend, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_vocabulary_of_qwen(backend, dtype):
    inputs = make_inputs("token_stats", lengths=(3,), vocabulary=151_936, dtype=dtype)
    assert_op_as_accurate("token_stats", backend, inputs)


@pytest.mark.parametrize(("op", "backend"), RUNS)
def test_results_are_fp32_and_zero_where_masked(op, backend):
    inputs = make_inputs(op, dtype=torch.bfloat16)
    stats = evaluate(op, inputs, backend)
    for name in ("logps", "entropy"):
        assert stats[name].dtype == torch.float32
        assert (stats[name][~inputs["mask"]] == 0).all()
        assert (stats[name][inputs["mask"]] != 0).all()


@pytest.mark.parametrize(("op", "backend"), RUNS)
def test_packed_equals_padded(op, backend):
    inputs = make_inputs(op)
    padded, packed = evaluate(op, inputs, backend), evaluate(op, to_packed(inputs), backend)
    for name in ("logps", "entropy"):
        torch.testing.assert_close(padded[name][inputs["mask"]], packed[name])


@pytest.mark.parametrize(("op", "backend"), RUNS)
def test_temperature(op, backend):
    inputs = make_inputs(op)
    assert_op_as_accurate(op, backend, {**inputs, "temperature": 0.6})
    cold = evaluate(op, {**inputs, "temperature": 0.1}, backend)["entropy"].sum()
    assert cold < evaluate(op, inputs, backend)["entropy"].sum()


@pytest.mark.parametrize(("op", "backend"), RUNS)
def test_a_masked_nan_leaves_no_trace(op, backend):
    inputs = make_inputs(op)
    name = "hidden" if op.startswith("linear") else "logits"
    rows = inputs[name].clone()
    rows[~inputs["mask"]] = math.nan
    clean, stained = evaluate(op, inputs, backend), evaluate(op, {**inputs, name: rows}, backend)
    assert all(torch.equal(clean[name], stained[name]) for name in clean)


def _strided(kind: str, rows: torch.Tensor) -> torch.Tensor:
    num_rows, vocabulary = rows.shape
    if kind == "all but the last":
        return torch.cat([rows, rows[:1]])[None, :-1][0]
    if kind == "columns of more":
        wide = torch.full((num_rows, vocabulary + 5), 1e9)
        wide[:, 2:-3] = rows
        return wide[:, 2:-3]
    if kind == "transposed":
        return rows.T.contiguous().T
    return rows[:1].expand(num_rows, vocabulary)


@pytest.mark.parametrize("kind", ["all but the last", "columns of more", "transposed", "expanded"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_logits(backend, kind):
    inputs = make_inputs("token_stats", layout="packed")
    logits = _strided(kind, inputs["logits"])
    expected = evaluate("token_stats", {**inputs, "logits": logits.clone()}, backend)
    ours = evaluate("token_stats", {**inputs, "logits": logits}, backend)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name])


def _gradient(backend, inputs, scalar, other=None):
    logits = inputs["logits"].clone().requires_grad_()
    stats = cppo.token_stats(**{**inputs, "logits": logits}, backend=backend)
    total = scalar(stats) if other is None else scalar(stats) + other(logits)
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients(backend):
    inputs = make_inputs("token_stats", dtype=torch.float64)
    logps = _gradient(backend, inputs, lambda s: s.logps.sum())  # expanded, one-sided
    entropy = _gradient(backend, inputs, lambda s: s.entropy.sum())
    both = _gradient(backend, inputs, lambda s: (3 * s.logps - s.entropy / 2).sum())
    torch.testing.assert_close(both, 3 * logps - entropy / 2)
    nothing = _gradient(backend, inputs, lambda s: (0 * s.logps).sum())
    assert torch.equal(nothing, torch.zeros_like(nothing))
    # d logp / d z = onehot - p: it sums to 0 over the vocabulary, and only 1 - p > 0.
    torch.testing.assert_close(logps.sum(-1), torch.zeros_like(logps[..., 0]))
    assert torch.equal((logps > 0).sum(-1) == 1, inputs["mask"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_consumer_of_the_logits(backend):
    inputs = make_inputs("token_stats", dtype=torch.float64)
    alone = _gradient(backend, inputs, lambda s: s.logps.sum())
    both = _gradient(backend, inputs, lambda s: s.logps.sum(), lambda z: z.square().sum())
    torch.testing.assert_close(both, alone + 2 * inputs["logits"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_targets_may_be_strided_and_short(backend, dtype):
    logits, ids = torch.randn(2, 5, 9), torch.randint(0, 9, (2, 6))
    ours = cppo.token_stats(logits, ids.to(dtype)[:, 1:], backend=backend)
    expected = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(ours.logps, expected)


Z, Y = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
H, W = torch.randn(2, 3, 4), torch.randn(5, 4)
OUT = Y.index_fill(1, torch.tensor([2]), 5)
stats, linear = cppo.token_stats, cppo.linear_token_stats
ERRORS = [
    (lambda: stats(Z.long(), Y), TypeError, "token_stats: logits must be of floating dtype"),
    (lambda: stats(Z, Y.float()), TypeError, "targets must be of integer dtype"),
    (lambda: stats(Z, Y.bool()), TypeError, "targets must be of integer dtype, got torch.bool"),
    (lambda: stats(Z, Y.tolist()), TypeError, "targets must be a Tensor, got list"),
    (lambda: stats(Z[0], Y), ValueError, "(B, L, V) = (2, 3, V >= 1) like targets, got (3, 5)"),
    (lambda: stats(Z[:, 1:], Y), ValueError, "logits must be (B, L, V)"),
    (lambda: stats(Z[..., :0], Y), ValueError, "V >= 1"),
    (lambda: stats(Z, Y[..., None]), ValueError, "targets must be (B, L) or (T,)"),
    (lambda: stats(Z, Y, mask=Y[:1]), ValueError, "mask must be (B, L) = (2, 3) like targets"),
    (lambda: stats(Z, Y, temperature=0), ValueError, "temperature must be finite and > 0, got 0"),
    (lambda: stats(Z, Y, temperature=-1.0), ValueError, "got -1.0"),
    (lambda: stats(Z, Y, temperature=math.nan), ValueError, "got nan"),
    (lambda: stats(Z, Y, temperature="1"), TypeError, "a number > 0, got str"),
    (lambda: stats(Z, OUT), ValueError, "[0, V) = [0, 5) where not masked, got 5 at (0, 2)"),
    (lambda: stats(Z[0], Y[0] - 100), ValueError, "got -100 at 0"),
    (lambda: stats(Z, Y.to("meta")), ValueError, "targets must be on cpu like logits, got meta"),
    (lambda: linear(H, W.double(), Y), TypeError, "weight must be torch.float32 like hidden"),
    (lambda: linear(H, W[:, 1:], Y), ValueError, "(V, D) = (V >= 1, 4) like hidden, got (5, 3)"),
    (lambda: linear(H, W, Y, bias=W[0]), ValueError, "bias must be (V,) = (5,) like weight"),
    (lambda: linear(H, W, Y, bias=W[:, 0].half()), TypeError, "bias must be torch.float32"),
    (lambda: linear(H, W.to("meta"), Y), ValueError, "weight must hold values, got one on meta"),
    (lambda: linear(H, W, OUT), ValueError, "got 5 at (0, 2)"),
    (lambda: linear(H[:1], W, Y), ValueError, "hidden must be (B, L, D) = (2, 3, D >= 1)"),
]

test_bad_input = refused(ERRORS)


def test_masked_targets_may_be_anything():
    mask = OUT < 5
    assert cppo.token_stats(Z, OUT, mask=mask).logps[:, 2].tolist() == [0, 0]
