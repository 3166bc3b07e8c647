"""visual_dependency: VPPO's weights by hand, by plain loops, and at the edges."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import cppo

NAN = math.nan


def fp64(values):
    return torch.tensor(values, dtype=torch.float64)


def by_loops(completions, fraction, floor, of_all=None):
    """Weights, S and their means of lists of (old, removed), as the paper and its code say it."""
    dependence, weights, means = [], [], []
    for tokens in completions:
        d = [0.0 if math.isnan(removed) else removed - old for old, removed in tokens]
        d = [min(max(x, -20.0), 20.0) for x in d]
        s = [min(max(math.exp(x) - x - 1, 0.0), 10.0) for x in d]
        known = s and not any(math.isnan(removed) for _, removed in tokens)
        dependence.append(s)
        means.append(sum(s) / len(s) if known else NAN)
    scores = [x for x in (means if of_all is None else of_all) if not math.isnan(x)]
    for s, mean in zip(dependence, means, strict=True):
        if math.isnan(mean):
            weights.append([1.0] * len(s))
            continue
        factor, spread = 1.0, max(scores) - min(scores)
        if len(scores) > 1 and spread > 1e-6:
            normal = [(x - min(scores)) / spread for x in scores]
            own = (mean - min(scores)) / spread
            factor = floor + (1 - floor) * own / (sum(normal) / len(normal))
        k = math.ceil(round(fraction * len(s), 6))
        best = sorted(range(len(s)), key=lambda i: (-s[i], i))[:k]
        weights.append([factor if i in best else 0.0 for i in range(len(s))])
    return weights, dependence, means


def packed(completions, dtype=torch.float64):
    tokens = [token for completion in completions for token in completion]
    old, removed = torch.tensor(tokens, dtype=dtype).view(-1, 2).T
    ends = torch.tensor([0, *(len(c) for c in completions)]).cumsum(0)
    return old, removed, ends


def padded(completions, dtype=torch.float64):
    """With NaN where nothing is."""
    width = max((len(c) for c in completions), default=0)
    rows = torch.full((len(completions), width, 2), NAN, dtype=dtype)
    for row, tokens in zip(rows, completions, strict=True):
        row[: len(tokens)] = torch.tensor(tokens, dtype=dtype).view(-1, 2)
    mask = torch.arange(width) < torch.tensor([len(c) for c in completions]).view(-1, 1)
    return rows[..., 0], rows[..., 1], mask


def test_the_released_rule_by_hand():
    """dp_actor.py of VPPO-RL: top 40 %, least to largest mean, factors of mean 1."""
    old = fp64([[0.0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, NAN, NAN]])
    d = [[0.0, 1.0, -1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [30.0, -30.0, 0.0, NAN, NAN]]
    e = math.e
    # e^d - d - 1; of 30 the bound, of -30 the clamp at -20: 20 - 1 + e^-20, which is over 10 too.
    one = [0.0, e - 2, 1 / e, e**2 - 3, 0.0]
    means = [sum(one) / 5, 0.0, 20 / 3]
    mask = torch.tensor([[1] * 5, [1] * 5, [1, 1, 1, 0, 0]])
    found = cppo.visual_dependency(old, fp64(d), mask=mask)
    torch.testing.assert_close(found.per_completion, fp64(means))
    torch.testing.assert_close(found.per_token[0], fp64(one))
    assert found.per_token[2].tolist() == [10, 10, 0, 0, 0]
    share = sum(means) / (20 / 3) / 3
    factors = [0.9 + 0.1 * mean / (20 / 3) / share for mean in means]
    assert sum(factors) / 3 == pytest.approx(1)
    # ceil(0.4 * 5) = 2 of five tokens, ceil(0.4 * 3) = 2 of three; of equal ones the first.
    chosen = [[0, 1, 0, 1, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    expected = fp64(chosen) * fp64(factors)[:, None]
    torch.testing.assert_close(found.token_weights, expected)


# Few distinct differences, so that ties are common; one of -0.01 and one below the clamp.
TOKEN = st.tuples(
    st.sampled_from([0.0, -1.5]), st.sampled_from([0.0, -1.5, -1.51, 1.0, -30.0, 5.0])
)
COMPLETION = st.lists(TOKEN, max_size=7)


@given(
    completions=st.lists(COMPLETION, max_size=5),
    without=st.integers(0, 8),
    tenths=st.integers(1, 10),
    floor=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_the_definition(completions, without, tenths, floor):
    if without < len(completions) and completions[without]:
        completions[without] = [(old, NAN) for old, _ in completions[without]]
    options = {"fraction": tenths / 10, "floor": floor}
    weights, dependence, means = by_loops(completions, **options)
    old, removed, ends = packed(completions)
    found = cppo.visual_dependency(old, removed, cu_seqlens=ends, **options)
    # Means are sums of multiples of 2^-36, and a small spread of them divides that.
    for ours, expected, tolerance in (
        (found.token_weights, [w for own in weights for w in own], 1e-6),
        (found.per_token, [s for own in dependence for s in own], 1e-14),
        (found.per_completion, means, 1e-11),
    ):
        exact = fp64(expected)
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance, equal_nan=True)
    old, removed, mask = padded(completions)
    same = cppo.visual_dependency(old, removed, mask=mask, **options)
    assert torch.equal(same.token_weights[mask], found.token_weights)
    assert not same.token_weights[~mask].any() and not same.per_token[~mask].any()
    torch.testing.assert_close(same.per_completion, found.per_completion, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_selects_what_fp64_of_the_same_numbers_does(dtype):
    torch.manual_seed(0)
    old = (-torch.rand(5, 40) * 3).to(dtype)
    removed = (old.float() - torch.rand(5, 40)).to(dtype)
    ours = cppo.visual_dependency(old, removed)
    exact = cppo.visual_dependency(old.double(), removed.double())
    assert ours.token_weights.dtype == ours.per_token.dtype == torch.float32
    assert torch.equal(ours.token_weights > 0, exact.token_weights > 0)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-7, atol=1e-7)


def test_parts_of_an_optimizer_step_equal_the_whole():
    torch.manual_seed(0)
    old, removed = -torch.rand(2, 6, 9)
    removed[4] = NAN
    whole = cppo.visual_dependency(old, removed)
    parts = [(old[rows], removed[rows]) for rows in (slice(0, 2), slice(2, 6))]
    means = torch.cat([cppo.visual_dependency(*part).per_completion for part in parts])
    weights = [cppo.visual_dependency(*part, of_all=means).token_weights for part in parts]
    assert torch.equal(torch.cat(weights), whole.token_weights)
    known = [0, 1, 2, 3, 5]
    factors = whole.token_weights[known].amax(1)
    assert factors.mean().item() == pytest.approx(1) and factors.amin().item() == pytest.approx(0.9)
    assert whole.token_weights[4].tolist() == [1.0] * 9


@pytest.mark.parametrize(
    "removed", [[[-1.0, -2.0]], [[-1.0, -2.0], [-2.0, -1.0]], [[NAN, NAN], [-1.0, -2.0]]]
)
def test_completions_that_are_alike_or_alone_keep_their_size(removed):
    removed = torch.tensor(removed)
    found = cppo.visual_dependency(torch.full_like(removed, -1.5), removed, fraction=0.5)
    assert found.token_weights.sum(1).tolist() == [2.0 if x.isnan().any() else 1.0 for x in removed]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_nothing_at_all(shape):
    found = cppo.visual_dependency(torch.empty(shape), torch.empty(shape))
    assert found.token_weights.shape == shape and found.per_completion.isnan().all()
    none, ends = torch.empty(0), torch.zeros(3, dtype=torch.int32)
    assert cppo.visual_dependency(none, none, cu_seqlens=ends).per_completion.isnan().all()


def test_what_is_not_finite_is_bounded():
    far = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0]])
    found = cppo.visual_dependency(torch.tensor([[0.0, -math.inf, -math.inf, 0.0]]), far)
    assert found.per_token.tolist() == [[10.0, 10.0, 0.0, 0.0]]


def test_no_gradient_flows():
    old, removed = torch.rand(2, 2, 3, requires_grad=True)
    assert not any(x.requires_grad for x in cppo.visual_dependency(old, removed))


def test_every_whole_share_is_whole():
    for count in range(1, 300):
        row = torch.zeros(1, count)
        for fraction in (0.1, 0.2, 0.4, 0.7):
            ours = cppo.visual_dependency(row, row, fraction=fraction).token_weights.sum()
            assert ours == -(-count * round(fraction * 10) // 10)
        assert cppo.visual_dependency(row, row, fraction=1e-9).token_weights.sum() == 1


class _Reads(TorchDispatchMode):
    """Fails where a value is read by the host, or a shape depends on one."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "bincount"), name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1])
        return op(*args, **(kwargs or {}))


def test_the_host_does_not_wait_and_the_graph_is_whole(monkeypatch):
    monkeypatch.setattr("cppo.ops.checks.may_read", lambda *tensors: False)
    torch.manual_seed(0)
    old, removed = -torch.rand(2, 4, 5)
    mask = torch.rand(4, 5) > 0.2
    ends = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()
    rows = old[mask], removed[mask]
    calls = (
        lambda: cppo.visual_dependency(old, removed, mask=mask),
        lambda: cppo.visual_dependency(*rows, cu_seqlens=ends),
    )
    expected = [call() for call in calls]
    for call, known in zip(calls, expected, strict=True):
        with _Reads():
            assert torch.equal(call().token_weights, known.token_weights)
    compiled = torch.compile(cppo.visual_dependency, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(old, removed, mask=mask).token_weights, expected[0].token_weights)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fraction": 0.0}, ValueError, "fraction must be"),
        ({"fraction": 1.1}, ValueError, "fraction must be"),
        ({"floor": -0.1}, ValueError, "floor must be"),
        ({"old_logps": torch.ones(2, 3).long()}, TypeError, "old_logps must be of floating dtype"),
        ({"removed_logps": torch.ones(2, 2)}, ValueError, "(B, L) = (2, 3) like old_logps"),
        ({"mask": torch.ones(3)}, ValueError, "mask must be (B, L) = (2, 3) like old_logps"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens must be None for padded"),
        ({"of_all": torch.ones(2, 1)}, ValueError, "of_all must be"),
        ({"of_all": torch.ones(2).long()}, TypeError, "of_all must be of floating dtype"),
        ({"removed_logps": torch.ones(2, 3, device="meta")}, ValueError, "must be on"),
    ],
)
def test_bad_input(changes, error, message):
    good = {"old_logps": torch.rand(2, 3), "removed_logps": torch.rand(2, 3)}
    with pytest.raises(error, match=rf"^cppo\.visual_dependency: .*{re.escape(message)}"):
        cppo.visual_dependency(**{**good, **changes})


def test_packed_rows_need_their_bounds():
    with pytest.raises(ValueError, match="cu_seqlens must be given for packed old_logps"):
        cppo.visual_dependency(torch.zeros(3), torch.zeros(3))
