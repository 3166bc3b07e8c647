"""The loss at points whose value can be worked out by hand, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import every_run, loss_of

import cppo
from cppo import LossConfig, Views, backends

# KL(policy || reference) by k3: e^d - d - 1 with d = log of reference over policy, whose derivative
# by the policy's log-probability is 1 - e^d. Only the exponent is bounded, at 20.
FAR = {
    4.5: (84.51713, -89.01713),  # e^4.5 = 90.01713
    1.0: (0.71828, -1.71828),
    -12.0: (11.00001, 0.99999),  # the policy is more sure than the reference
    25.0: (math.exp(20) - 21, 0.0),
}


@pytest.mark.parametrize("d", FAR)
@every_run
def test_the_pull_towards_the_reference_grows_with_the_distance(op, backend, d):
    value, slope = FAR[d]
    z = torch.tensor([[0.3, -0.2, 0.1]], requires_grad=True)
    logps = z.detach().log_softmax(-1)
    output = loss_of(
        op,
        backend,
        z,
        targets=torch.tensor([1]),
        advantages=torch.zeros(1),
        ref_logps=logps[:, 1] + d,
        cu_seqlens=torch.tensor([0, 1]),
        config=LossConfig(kl_coef=0.5),
    )
    output.loss.backward()
    assert output.metrics["kl"].item() == pytest.approx(value, rel=1e-5)
    assert output.loss.item() == pytest.approx(0.5 * value, rel=1e-5)
    expected = 0.5 * slope * (torch.tensor([0.0, 1.0, 0.0]) - logps[0].exp())
    torch.testing.assert_close(z.grad[0], expected, rtol=1e-4, atol=1e-6)


@every_run
def test_a_bound_on_the_kl_takes_its_gradient_away(op, backend):
    z = torch.tensor([[0.3, -0.2, 0.1], [0.3, -0.2, 0.1]], requires_grad=True)
    logps = z.detach().log_softmax(-1)[:, 1]
    output = loss_of(
        op,
        backend,
        z,
        targets=torch.tensor([1, 1]),
        advantages=torch.zeros(2),
        ref_logps=logps + torch.tensor([4.5, 1.0]),
        cu_seqlens=torch.tensor([0, 1, 2]),
        config=LossConfig(kl_coef=1.0, kl_clamp=10),
    )
    output.loss.backward()
    assert output.metrics["kl"].item() == pytest.approx((10 + math.e - 2) / 2, rel=1e-5)
    assert not z.grad[0].any() and z.grad[1].abs().min() > 0.1


# Metrics are means, whatever the loss is divided by.


@pytest.mark.parametrize("reduction", ["grpo", "dapo", "dr_grpo"])
@every_run
def test_metrics_are_means_and_parts_add_up_to_them(op, backend, reduction):
    config = LossConfig(reduction=reduction, max_length=50)
    z, targets = torch.randn(8, 5), torch.randint(0, 5, (8,))
    logps = z.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    # The ratio of every other token is e, beyond both clips of the first completion's A > 0.
    old = logps.gather(1, targets[:, None])[:, 0] - torch.tensor([1.0, 0.0]).repeat(4)
    of_token = {"entropy": entropy, "clip_fraction": torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0])}
    of_token["kl"] = torch.full((8,), math.e - 2)

    def metrics(first, last, bounds, advantages, **options):
        return loss_of(
            op,
            backend,
            z[first:last],
            targets=targets[first:last],
            advantages=torch.tensor(advantages),
            old_logps=old[first:last],
            ref_logps=logps.gather(1, targets[:, None])[first:last, 0] + 1,
            cu_seqlens=torch.tensor(bounds),
            config=config,
            **options,
        ).metrics

    whole = metrics(0, 8, [0, 4, 6, 8], [1.0, -1.0, 0.0])
    share = cppo.NumItems(completions=3, tokens=8)
    parts = [
        metrics(0, 4, [0, 4], [1.0], num_items=share),
        metrics(4, 8, [0, 2, 4], [-1.0, 0.0], num_items=share),
    ]
    for name, values in of_token.items():
        per_completion = torch.stack([part.mean() for part in values.split([4, 2, 2])])
        expected = per_completion.mean() if reduction == "grpo" else values.mean()
        torch.testing.assert_close(whole[name], expected, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(sum(part[name] for part in parts), expected)


@pytest.mark.parametrize("cpl_reduction", ["sequence", "token"])
@every_run
def test_a_count_of_fp32_is_a_number_like_any_other(op, backend, cpl_reduction):
    """As exact as the logits, without a gradient; and metrics are of the dtype of the loss."""
    generator = torch.Generator().manual_seed(0)
    z = Views(*torch.randn(3, 6, 5, dtype=torch.float64, generator=generator))
    options = {"reduction": "dr_grpo", "cpl_reduction": cpl_reduction, "max_length": 7}
    inputs = {
        "targets": torch.randint(0, 5, (6,), generator=generator),
        "advantages": torch.tensor([1.0, 2.0]),
        "cu_seqlens": torch.tensor([0, 4, 6]),
        "config": LossConfig(cpl_coef=0.5, **options),
    }
    exact = loss_of(op, backend, z, **inputs, num_items=9.0)
    given = loss_of(op, backend, z, **inputs, num_items=torch.tensor(9.0, requires_grad=True))
    torch.testing.assert_close(given.loss, exact.loss, rtol=1e-12, atol=0)
    assert not given.loss.requires_grad
    shares = cppo.NumItems(torch.tensor(3.0), torch.tensor(9.0), torch.tensor(2.0))
    narrow = loss_of(op, backend, Views(*(own.float() for own in z)), **inputs, num_items=shares)
    means = [value for name, value in narrow.metrics.items() if name != "num_selected"]
    assert {value.dtype for value in means} == {torch.float32}


# Entropies: a rise below the rounding error of an entropy selects nothing.


@pytest.mark.parametrize("backend", backends.available("perception_mask"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rise_within_the_rounding_error_is_none(backend, dtype):
    before = torch.tensor([[0.0, 0.0, 1.0, 1.0, 10.0, 10.0]], dtype=dtype)
    # 2^-17 (1 + H) is 7.6e-6 at H = 0, 1.5e-5 at H = 1 and 8.4e-5 at H = 10.
    rise = torch.tensor([[7e-6, 8e-6, 1.4e-5, 1.7e-5, 8e-5, 9e-5]], dtype=dtype)
    selected = cppo.perception_mask(before, before + rise, fraction=1.0, backend=backend)
    assert selected.tolist() == [[False, True] * 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", ["k3", "full"])
@every_run
def test_rows_that_are_certain_under_every_view_select_nothing(op, backend, divergence, dtype):
    """One logit stands 20 to 30 above the others: every entropy is 0 up to rounding."""
    targets = torch.randint(0, 17, (21,))

    def view():
        certain = 22 + 8 * torch.rand(21, 1)
        return torch.randn(21, 17).scatter(1, targets[:, None], certain).to(dtype)

    output = loss_of(
        op,
        backend,
        Views(view(), view(), view()),
        targets=targets,
        advantages=torch.ones(3),
        cu_seqlens=torch.tensor([0, 7, 14, 21]),
        config=LossConfig(cpl_coef=1.0, divergence=divergence),
    )
    assert output.entropy.max() < 5e-6
    assert not output.perception_mask.any()
    assert output.metrics["cpl_loss"] == 0
