"""The specification of the whole loss: plain loops, numbers worked out by hand, fp64 gradcheck."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cppo import reference
from cppo.config import LossConfig
from cppo.records import NumItems, Views


def fp64(*values):
    return torch.tensor(values, dtype=torch.float64)


def loss_by_loops(views, targets, advantages, old, ref, mask, config):
    """The loss of padded views, one token at a time, straight from the definitions."""

    def per_token(b, t):
        lp = [torch.log_softmax(view[b, t] / config.temperature, -1) for view in views]
        return [x[targets[b, t]] for x in lp], [-(x.exp() * x).sum() for x in lp], lp

    policy_sums, lengths, contrasts = [], [], []
    for b in range(len(targets)):
        tokens = [t for t in range(targets.shape[1]) if mask[b, t]]
        stats = {t: per_token(b, t) for t in tokens}
        A, total = advantages[b], 0.0
        for t in tokens:
            logps, entropies, _ = stats[t]
            log_ratio = logps[0] - old[b, t]
            if config.importance == "sequence":
                log_ratio = sum(stats[u][0][0] - old[b, u] for u in tokens) / len(tokens)
            ratio = log_ratio.exp()
            clip = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            surrogate = torch.minimum(ratio * A, clip * A)
            d = ref[b, t] - logps[0]
            total = total - surrogate + config.kl_coef * (d.exp() - d - 1)
            total = total - config.entropy_coef * entropies[0]
        policy_sums.append(total)
        lengths.append(len(tokens))
        if A <= 0 and config.gating:
            continue
        rise = {t: (stats[t][1][2] - stats[t][1][0]).item() for t in tokens}
        rising = [t for t in tokens if rise[t] > 0]
        k = max(1, math.floor(config.fraction * len(rising)))
        score = {t: rise[t] / (stats[t][1][2].item() + 1e-6) for t in rising}
        chosen = sorted(rising, key=lambda t: -score[t])[:k]
        ours = []
        for t in chosen:
            (lo, lp, ln), _, (o, p, n) = stats[t]
            if config.divergence == "full":
                margin = (o.exp() * (o - p)).sum() - (o.exp() * (o - n)).sum()
            elif config.divergence == "k1":
                margin = ln - lp
            else:
                margin = ((lp - lo).exp() - lp) - ((ln - lo).exp() - ln)
            ours.append(F.softplus(margin / config.tau))
        contrasts.append(ours)
    if config.reduction == "grpo":
        loss = sum(s / n for s, n in zip(policy_sums, lengths, strict=True)) / len(targets)
    elif config.reduction == "dapo":
        loss = sum(policy_sums) / sum(lengths)
    else:
        loss = sum(policy_sums) / (len(targets) * targets.shape[1])
    if config.cpl_reduction == "token":
        flat = [x for ours in contrasts for x in ours]
        return loss + config.cpl_coef * sum(flat) / len(flat)
    return loss + config.cpl_coef * sum(sum(x) / len(x) for x in contrasts if x) / len(targets)


CONFIGS = {
    "grpo": LossConfig(),
    "dapo": LossConfig(reduction="dapo", cpl_reduction="sequence", cpl_coef=0.5),
    "dr_grpo": LossConfig(reduction="dr_grpo", divergence="k1", temperature=0.7),
    "gspo": LossConfig(importance="sequence", kl_coef=0.1, entropy_coef=0.02),
    "full": LossConfig(divergence="full", cpl_coef=1.0, tau=0.5, gating=False, fraction=0.8),
}


def example():
    """Three completions of 4, 2 and 3 tokens over a vocabulary of 6, all in fp64."""
    generator = torch.Generator().manual_seed(3)
    anchor, noise = torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64)
    views = Views(anchor, anchor + 0.2 * noise, anchor * torch.linspace(0.2, 1.2, 4)[:, None])
    targets = torch.randint(0, 6, (3, 4), generator=generator)
    mask = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    logps = torch.log_softmax(anchor, -1).gather(-1, targets[..., None])[..., 0]
    old, ref = logps + 0.3 * torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    return views, targets, fp64(1.0, -0.7, 0.4), old, ref, mask


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_equals_plain_loops(name):
    views, targets, advantages, old, ref, mask = example()
    config = CONFIGS[name]
    ours = [view.clone().requires_grad_() for view in views]
    loops = [view.clone().requires_grad_() for view in views]
    out = reference.cppo_loss(Views(*ours), targets, advantages, old, ref, mask, None, None, config)
    expected = loss_by_loops(loops, targets, advantages, old, ref, mask, config)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, ours), torch.autograd.grad(expected, loops)
    )


def test_reductions_by_hand():
    # Uniform logits, on-policy: the surrogate of every token is -A = -1 and +2.
    logits, targets = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    for config, num_items, expected in [
        (LossConfig(), None, (-1 + 2) / 2),
        (LossConfig(reduction="dapo"), None, (-1 + 6) / 4),
        (LossConfig(reduction="dr_grpo"), None, (-1 + 6) / 6),
        (LossConfig(reduction="dr_grpo", max_length=10), None, (-1 + 6) / 20),
        (LossConfig(), 8, (-1 + 2) / 8),
        (LossConfig(reduction="dapo"), NumItems(4, 10), (-1 + 6) / 10),
    ]:
        out = reference.cppo_loss(
            logits, targets, fp64(1, -2), mask=mask, num_items=num_items, config=config
        )
        torch.testing.assert_close(out.loss, torch.tensor(expected))


# Gradients


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("linear", [False, True])
def test_gradcheck_of_the_losses(name, linear):
    views, targets, advantages, old, ref, mask = example()
    shared = (old, ref, mask, None, None, CONFIGS[name])
    if linear:
        generator = torch.Generator().manual_seed(1)
        weight = 0.5 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
        bias = 0.5 * torch.randn(6, generator=generator, dtype=torch.float64)

        def loss(anchor, positive, negative, weight, bias):
            hidden = Views(anchor, positive, negative)
            return reference.linear_cppo_loss(
                hidden, weight, targets, advantages, bias, *shared
            ).loss

        inputs = (*views, weight, bias)
    else:

        def loss(*views):
            return reference.cppo_loss(Views(*views), targets, advantages, *shared).loss

        inputs = views
    inputs = [x.clone().requires_grad_() for x in inputs]
    # Entry by entry from the logits; along random directions through the head.
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=linear)


@pytest.mark.parametrize("linear", [False, True])
def test_gradcheck_of_the_token_statistics(linear):
    rows = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 1])
    if linear:
        targets = torch.tensor([0, 6, -100, 3, 3])
        stats = reference.linear_token_stats
        inputs = (rows, weight, bias)
        assert torch.autograd.gradcheck(lambda h, w, b: stats(h, w, targets, b, 0.7, mask), inputs)
    else:
        targets = torch.tensor([0, 3, -100, 2, 2])
        stats = reference.token_stats
        assert torch.autograd.gradcheck(lambda z: stats(z, targets, 0.7, mask), (rows,))
