"""perception_mask on every backend."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from error_cases import refused
from hypothesis import given
from hypothesis import strategies as st

import cppo
from cppo import backends
from cppo.testing import make_inputs, to_packed

pytestmark = pytest.mark.usefixtures("poisoned")

BACKENDS = backends.available("perception_mask")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("case", ["random", "all_masked", "one_row", "empty"])
def test_every_backend_selects_alike_in_both_layouts(backend, fraction, case):
    padded = {**make_inputs("perception_mask", case), "fraction": fraction}
    expected = cppo.perception_mask(**padded, backend="reference")
    assert torch.equal(cppo.perception_mask(**padded, backend=backend), expected)
    packed = cppo.perception_mask(**to_packed(padded), backend=backend)
    assert torch.equal(packed, expected[padded["mask"]])
    assert expected.any() == (case in ("random", "one_row") and expected.numel() > 0)


# Few distinct values, so that ties and empty selections are common.
TOKENS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()), max_size=12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(completions=st.lists(TOKENS, max_size=4), tenths=st.integers(0, 10))
def test_the_definition(backend, completions, tenths):
    tokens = [token for completion in completions for token in completion]
    anchor, negative, mask = torch.tensor(tokens, dtype=torch.float32).view(-1, 3).T
    ends = torch.tensor([0, *(len(c) for c in completions)]).cumsum(0).int()
    fraction = tenths / 10
    ours = cppo.perception_mask(
        anchor, negative, fraction=fraction, mask=mask, cu_seqlens=ends, backend=backend
    )
    expected = []
    for completion in completions:
        # In fp32, where 1/2 and 2/4 are no tie: 1e-6 is not the same share of both.
        epsilon = np.float32(1e-6)
        scores = [
            np.float32(n - a) / (np.float32(n) + epsilon) if m and n > a else None
            for a, n, m in completion
        ]
        rising = sorted((s for s in scores if s is not None), reverse=True)
        k = max(1, math.floor(fraction * len(rising)))
        expected += [s is not None and bool(s >= rising[k - 1]) for s in scores]
    assert ours.tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_is_never_selected(backend):
    anchor = torch.tensor([[0.0, math.nan, 0.0, 0.0]])
    negative = torch.tensor([[1.0, 3.0, math.nan, 0.5]])
    selected = cppo.perception_mask(anchor, negative, fraction=1.0, backend=backend)
    assert selected.tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_dtype_without_gradient(backend, dtype):
    anchor = torch.rand(3, 5).to(dtype).requires_grad_()
    negative = torch.rand(3, 5).to(dtype)
    selected = cppo.perception_mask(anchor, negative, backend=backend)
    assert selected.dtype == torch.bool and not selected.requires_grad
    # Scores are compared in fp32 or better.
    wide = cppo.perception_mask(anchor.double(), negative.double(), backend="reference")
    assert torch.equal(selected, wide)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_completions_permutes_the_selection(backend):
    inputs = make_inputs("perception_mask")
    order = torch.randperm(len(inputs["mask"]))
    plain = cppo.perception_mask(**inputs, backend=backend)
    moved = cppo.perception_mask(**{k: v[order] for k, v in inputs.items()}, backend=backend)
    assert torch.equal(plain[order], moved)


E = torch.rand(2, 3)
P = torch.rand(6)


def packed(*bounds, rows=P):
    return cppo.perception_mask(rows, rows, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


ERRORS = [
    (lambda: cppo.perception_mask(E.long(), E), TypeError, "anchor_entropy must be of floating"),
    (lambda: cppo.perception_mask(E, E.long()), TypeError, "negative_entropy must be of floating"),
    (lambda: cppo.perception_mask(E, None), TypeError, "must be a Tensor, got NoneType"),
    (
        lambda: cppo.perception_mask(E, E[:1]),
        ValueError,
        "negative_entropy must be (B, L) = (2, 3) like anchor_entropy, got (1, 3)",
    ),
    (lambda: cppo.perception_mask(E[None], E), ValueError, "must be (B, L) or (T,), got shape"),
    (lambda: cppo.perception_mask(E, E, fraction=-0.1), ValueError, "in [0, 1], got -0.1"),
    (lambda: cppo.perception_mask(E, E, fraction=1.5), ValueError, "in [0, 1], got 1.5"),
    (lambda: cppo.perception_mask(E, E, mask=E[0] > 0), ValueError, "mask must be (B, L)"),
    (lambda: cppo.perception_mask(P, P), ValueError, "cu_seqlens must be given for packed"),
    (
        lambda: cppo.perception_mask(E, E, cu_seqlens=torch.tensor([0, 6])),
        ValueError,
        "cu_seqlens must be None for padded",
    ),
    (lambda: packed(1, 6), ValueError, "cu_seqlens must start at 0, got 1"),
    (lambda: packed(0, 5), ValueError, "cu_seqlens must end at T = 6, got 5"),
    (lambda: packed(0, 4, 2, 6), ValueError, "must not decrease, got 4 then 2 at index 2"),
    (lambda: packed(), ValueError, "cu_seqlens must be (completions + 1,), got (0,)"),
    (
        lambda: cppo.perception_mask(P, P, cu_seqlens=torch.tensor([0.0, 6.0])),
        TypeError,
        "cu_seqlens must be of integer dtype",
    ),
    (lambda: cppo.perception_mask(E, E.to("meta")), ValueError, "must be on cpu"),
]

test_bad_input = refused(ERRORS, "perception_mask")
