"""The specification against numbers worked out by hand, plain loops, and fp64 gradcheck."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cppo import reference
from cppo.options.trainer import LossConfig
from cppo.records import NumItems, Views

LN2 = math.log(2)


def fp64(*values):
    return torch.tensor(values, dtype=torch.float64)


# Advantages and pruning


def test_group_advantages_by_hand():
    # Mean 1/2, every deviation 1/2, std sqrt(4 / 4 / 3).
    unit = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    advantages = reference.group_advantages(fp64(1, 0, 0, 1, 2, 2, 2, 2), 4)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, torch.tensor([unit, -unit, -unit, unit, 0, 0, 0, 0]))


def test_group_advantages_without_and_with_the_batch_std():
    rewards = fp64(1, 3, 5, 5)
    centred = torch.tensor([-1.0, 1.0, 0.0, 0.0])
    assert torch.equal(reference.group_advantages(rewards, 2, "none"), centred)
    # Mean 3.5, squares 6.25 + 0.25 + 2.25 + 2.25 = 11, n - 1 = 3.
    expected = centred / (math.sqrt(11 / 3) + 1e-4)
    torch.testing.assert_close(reference.group_advantages(rewards, 2, "batch"), expected)


def test_one_completion_per_question_has_no_advantage():
    assert torch.equal(reference.group_advantages(fp64(3, 1), 1), torch.zeros(2))


@pytest.mark.parametrize(
    ("unit_size", "rate", "kept"),
    [
        (16, 0.7, 5),  # 16 - floor(11.2)
        (16, 0.875, 2),
        (16, 0.0, 16),
        (8, 0.5, 4),
        (100, 0.29, 71),  # 100 * 0.29 = 28.999999999999996 is 29
        (4, 0.99, 1),  # 4 - floor(3.96)
        (1, 0.9, 1),
    ],
)
def test_kept_per_unit(unit_size, rate, kept):
    assert reference.kept_per_unit(unit_size, rate) == kept


def test_pruning_keeps_the_largest_of_each_question_and_the_lower_of_equals():
    advantages = fp64(0.1, -2, 1, 1, 0, 0, 0, 0)
    prune = reference.prune_completions
    assert prune(advantages, 4, 0.5).tolist() == [1, 2, 4, 5]
    assert prune(advantages, 4, 0.5, "batch").tolist() == [0, 1, 2, 3]
    assert prune(advantages, 4, 0.5, prune="largest").tolist() == [0, 2, 4, 5]
    assert prune(advantages, 4, 0.5, drop_zero=True).tolist() == [1, 2]
    noise = fp64(0.3, 0.1, 0.9, 0.2, 0.5, 0.6, 0.7, 0.8)
    assert prune(advantages, 4, 0.5, prune="random", noise=noise).tolist() == [0, 2, 6, 7]


# Packing and planning


# Token statistics


def test_token_stats_by_hand():
    logits = fp64([0.0, math.log(3)], [5.0, 5.0])
    logps, entropy = reference.token_stats(logits, torch.tensor([1, 0]))
    quarter = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    torch.testing.assert_close(logps, fp64(math.log(0.75), -LN2))
    torch.testing.assert_close(entropy, fp64(quarter, LN2))


def test_temperature_divides_the_logits():
    logits = fp64([0.0, 2 * math.log(3)])
    logps = reference.token_stats(logits, torch.tensor([1]), temperature=2.0).logps
    torch.testing.assert_close(logps, fp64(math.log(0.75)))


def test_minus_infinity_has_probability_zero():
    logits = fp64([-math.inf, 3.0, -math.inf], [1.0, 1.0, -math.inf]).requires_grad_()
    stats = reference.token_stats(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(stats.logps, fp64(0, -LN2))
    torch.testing.assert_close(stats.entropy, fp64(0, LN2))
    (gradient,) = torch.autograd.grad(stats.entropy.sum() + stats.logps.sum(), logits)
    torch.testing.assert_close(gradient, fp64([0, 0, 0], [0.5, -0.5, 0]))


def test_the_bias_is_added_in_fp32():
    # 256 + 1 is not a bfloat16.
    hidden, weight, bias = (
        torch.tensor(x).bfloat16() for x in ([[1.0]], [[256.0], [0.0]], [1.0, 0.0])
    )
    stats = reference.linear_token_stats(hidden, weight, torch.tensor([1]), bias)
    assert stats.logps.tolist() == [-257.0]


# Perception mask


@pytest.mark.parametrize(
    ("fraction", "selected"), [(0.5, [3]), (0.7, [0, 3]), (1.0, [0, 1, 3]), (0.0, [3])]
)
def test_perception_mask_by_hand(fraction, selected):
    # dH = 1, 0.5, -0.5, 2, 0 and scores 1/2, 1/3, -, 2/3, -: c = 3.
    negative = fp64([2, 1.5, 0.5, 3, 1])
    mask = reference.perception_mask(torch.ones_like(negative), negative, fraction)
    assert mask[0].nonzero().flatten().tolist() == selected


def test_ties_stay_in_and_nothing_rising_selects_nothing():
    anchor = fp64([1, 1, 1, 1], [2, 2, 2, 2])
    negative = fp64([3, 3, 2, 0], [2, 1, 0, 2])
    selected = reference.perception_mask(anchor, negative, 0.5)
    assert selected.tolist() == [[True, True, False, False], [False] * 4]


def test_masked_tokens_count_for_nothing():
    anchor, negative = fp64([1, 1, 1]), fp64([9, 2, 3])
    mask = torch.tensor([[False, True, True]])
    assert reference.perception_mask(anchor, negative, 0.5, mask).tolist() == [[False, False, True]]


# Divergences and the contrast


@pytest.mark.parametrize(
    ("d", "value", "slope"),
    [
        (0.0, 0.0, 0.0),
        (0.5, math.exp(0.5) - 1.5, math.exp(0.5) - 1),
        (-5.0, math.exp(-5) + 4, math.exp(-5) - 1),
        (3.0, 10.0, 0.0),  # e^3 - 4 > 10
        (30.0, 10.0, 0.0),
        (-15.0, 10.0, 0.0),
        (-30.0, 10.0, 0.0),
    ],
)
def test_k3_and_its_clamps(d, value, slope):
    view, anchor = fp64(d - 1).requires_grad_(), fp64(-1).requires_grad_()
    divergence = reference._divergence(view, anchor, "k3")
    torch.testing.assert_close(divergence, fp64(value))
    gradients = torch.autograd.grad(divergence.sum(), (view, anchor))
    torch.testing.assert_close(torch.cat(gradients), fp64(slope, -slope))


def test_k1():
    assert reference._divergence(fp64(-2.0), fp64(-0.5), "k1").tolist() == [1.5]


def contrast(views, divergence, targets, **options):
    """Loss and gradients of the contrast at every row."""
    leaves = [view.detach().requires_grad_() for view in views]
    logp_all = tuple(torch.log_softmax(leaf, -1) for leaf in leaves)
    logps = tuple(x.gather(-1, targets[:, None])[:, 0] for x in logp_all)
    everything = torch.ones_like(targets, dtype=torch.bool)
    config = LossConfig(divergence=divergence, **options)
    loss = reference.contrastive_loss(logp_all, logps, everything, config)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaves, allow_unused=True)


def test_detached_anchor_gets_no_gradient():
    views = torch.randn(3, 4, 7, dtype=torch.float64)
    for divergence in ("k3", "k1", "full"):
        targets = torch.arange(4)
        kept = contrast(views, divergence, targets)[1]
        anchor, *others = contrast(views, divergence, targets, detach_anchor=True)[1]
        assert anchor is None
        torch.testing.assert_close(others, list(kept[1:]))


# Policy loss


def policy(log_ratio, advantages, owner=None, **options):
    log_ratio = log_ratio.detach().requires_grad_()
    owner = torch.arange(len(log_ratio)) if owner is None else owner
    old = torch.zeros_like(log_ratio)
    count = int(owner.max()) + 1
    config = LossConfig(**options)
    loss, clipped = reference.policy_loss(log_ratio, advantages, old, owner, count, config)
    return loss.detach(), torch.autograd.grad(loss.sum(), log_ratio)[0], clipped


def test_clipped_surrogate_by_hand():
    ratio = fp64(1.1, 1.5, 0.5, 1.5, 0.5, 5.0)
    advantages = fp64(2, 2, 2, -1, -1, 0)
    loss, gradient, clipped = policy(ratio.log(), advantages, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(loss, fp64(-2.2, -2.6, -1.0, 1.5, 0.8, 0.0))
    torch.testing.assert_close(gradient, fp64(-2.2, 0, -1.0, 1.5, 0, 0))
    assert clipped.tolist() == [False, True, False, False, True, False]


def test_dual_clip_bounds_the_loss_of_bad_completions():
    ratio, advantages = fp64(2.0, 4.0, 4.0), fp64(-1, -1, 1)
    loss, gradient, clipped = policy(ratio.log(), advantages, dual_clip=3.0)
    torch.testing.assert_close(loss, fp64(2.0, 3.0, -1.2))
    torch.testing.assert_close(gradient, fp64(2.0, 0, 0))
    assert clipped.tolist() == [False, True, True]


def test_sequence_importance_is_the_geometric_mean():
    ratio = fp64(1.0, 1.21, 0.9)
    owner = torch.tensor([0, 0, 1])
    loss, gradient, _ = policy(ratio.log(), fp64(1, 1, -1), owner, importance="sequence")
    torch.testing.assert_close(loss, fp64(-1.1, -1.1, 0.9))
    torch.testing.assert_close(gradient, fp64(-1.1, -1.1, 0.9))


# The whole loss


def weight_by_hand(d, config):
    if config.importance_correction == "none":
        return 1.0
    w = min(max(math.exp(d), config.correction_min), config.correction_max)
    return w if w == math.exp(d) or config.importance_correction.endswith("truncate") else 0.0


def loss_by_loops(views, targets, advantages, old, ref, sampling, weights, removed, mask, config):
    """The loss of padded views, one token at a time, straight from the definitions."""

    def per_token(b, t):
        lp = [torch.log_softmax(view[b, t] / config.temperature, -1) for view in views]
        return [x[targets[b, t]] for x in lp], [-(x.exp() * x).sum() for x in lp], lp

    policy_sums, lengths, contrasts = [], [], []
    for b in range(len(targets)):
        tokens = [t for t in range(targets.shape[1]) if mask[b, t]]
        stats = {t: per_token(b, t) for t in tokens}
        A, total = advantages[b], 0.0
        d = {t: 0.0 if sampling[b, t].isnan() else old[b, t] - sampling[b, t] for t in tokens}
        if config.importance_correction.startswith("sequence"):
            d = dict.fromkeys(tokens, sum(d.values()))
        for t in tokens:
            logps, entropies, _ = stats[t]
            log_ratio = logps[0] - old[b, t]
            if config.importance == "sequence":
                log_ratio = sum(stats[u][0][0] - old[b, u] for u in tokens) / len(tokens)
            ratio = log_ratio.exp()
            clip = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            surrogate = torch.minimum(ratio * A, clip * A)
            far = ref[b, t] - logps[0]
            total = total - surrogate * weights[b, t] * weight_by_hand(d[t], config)
            total = total + config.kl_coef * (far.exp() - far - 1)
            total = total - config.entropy_coef * entropies[0]
            if removed is not None:
                away = removed[b, t] - logps[0]
                total = total - config.papo_coef * (away.exp() - away - 1).clamp(max=10)
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
        for t in tokens if config.perception == "cpl_all" else chosen:
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
    "corrected": LossConfig(importance_correction="token_mask", correction_max=1.3, kl_coef=0.1),
    "corrected gspo": LossConfig(importance="sequence", importance_correction="sequence_truncate"),
    "cpl_all": LossConfig(perception="cpl_all", cpl_coef=0.5),
    "papo": LossConfig(perception="papo", papo_coef=0.3, entropy_coef=-0.1, cpl_coef=0.0),
}


def example(config):
    """Three completions of 4, 2 and 3 tokens over a vocabulary of 6, all in fp64."""
    generator = torch.Generator().manual_seed(3)
    anchor, noise = torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64)
    views = Views(anchor, anchor + 0.2 * noise, anchor * torch.linspace(0.2, 1.2, 4)[:, None])
    targets = torch.randint(0, 6, (3, 4), generator=generator)
    mask = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    logps = torch.log_softmax(anchor, -1).gather(-1, targets[..., None])[..., 0]
    old, ref = logps + 0.3 * torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    sampling = old + 0.3 * torch.randn(3, 4, generator=generator, dtype=torch.float64)
    sampling[0, 1] = math.nan
    weights = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    weights[0, 2] = 0
    removed = logps - torch.linspace(-4, 2, 4) if config.perception == "papo" else None
    return views, targets, fp64(1.0, -0.7, 0.4), (old, ref, sampling, weights, removed, mask)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_equals_plain_loops(name):
    config = CONFIGS[name]
    views, targets, advantages, of_rows = example(config)
    ours = [view.clone().requires_grad_() for view in views]
    loops = [view.clone().requires_grad_() for view in views]
    out = reference.cppo_loss(Views(*ours), targets, advantages, *of_rows, config=config)
    expected = loss_by_loops(loops, targets, advantages, *of_rows, config)
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
    views, targets, advantages, of_rows = example(CONFIGS[name])
    shared = (*of_rows, None, None, CONFIGS[name])
    if linear:
        torch.manual_seed(1)
        weight, bias = (0.5 * torch.randn(*s, dtype=torch.float64) for s in ((6, 6), (6,)))

        def loss(anchor, positive, negative, weight, bias):
            rows = (Views(anchor, positive, negative), weight, targets, advantages, bias)
            return reference.linear_cppo_loss(*rows, *shared).loss

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
