"""The accuracy law itself: what it lets pass and what it stops."""

import math

import pytest
import torch

from cppo.testing import DIFFERENTIABLE, ROW_CASES, assert_as_accurate, evaluate, make_inputs

EXACT = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
EAGER = (EXACT + torch.tensor([0.0, 0.01, 0.0])).float()


def test_twice_the_eager_error_passes_and_three_times_does_not():
    off = torch.tensor([0.019, 0.0, 0.0])
    assert_as_accurate("x", (EXACT + off).float(), EAGER, EXACT)
    with pytest.raises(AssertionError, match=r"x: error 0.03 > 0.02 allowed at \(0,\)"):
        assert_as_accurate("x", (EXACT + off / 0.019 * 0.03).float(), EAGER, EXACT)


def test_the_floor_is_relative_to_the_scale():
    large = 1e4 * EXACT
    assert_as_accurate("x", large + 0.02, large, large)
    with pytest.raises(AssertionError, match="allowed"):
        assert_as_accurate("x", large + 0.04, large, large)
    with pytest.raises(AssertionError, match="allowed"):
        assert_as_accurate("x", EXACT + 1e-5, EXACT, EXACT)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_places_must_be_the_same(value):
    stained = EXACT.clone()
    stained[1] = value
    assert_as_accurate("x", stained.float(), EAGER, stained)
    for ours, exact in ((stained, EXACT), (EXACT, stained), (stained.roll(1), stained)):
        with pytest.raises(AssertionError, match="at other places than fp64"):
            assert_as_accurate("x", ours.float(), EAGER, exact)


def test_beyond_the_range_of_the_dtype_is_infinity():
    exact = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert_as_accurate("x", exact.half(), exact.half(), exact)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_as_accurate("x", exact[:1], exact, exact)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
@pytest.mark.parametrize("case", ROW_CASES)
def test_inputs_are_repeatable_and_gradients_have_the_inputs_shape(op, case):
    inputs, again = make_inputs(op, case), make_inputs(op, case)
    outputs, repeated = evaluate(op, inputs), evaluate(op, again)
    assert all(torch.equal(outputs[n], repeated[n]) or outputs[n].isnan().any() for n in outputs)
    name = "hidden" if op.startswith("linear") else "logits"
    for key, gradient in outputs.items():
        if key.startswith(f"grad.{name}."):
            assert gradient.shape == getattr(inputs[name], key.rsplit(".", 1)[1]).shape
    assert any(key.startswith("grad.") for key in outputs)
