"""CPPO's training once more, by hand and in fp64: what `CPPOTrainer` does, from the formulas alone.

This file shares nothing with the package. It takes what an outsider could have logged of a run (the
model at the start, and of every completion its tokens, its images and its reward) and trains on it
in the plainest way there is: one unpadded completion at a time through transformers' own forward,
all log-probabilities of its tokens held in one (tokens, vocabulary) matrix, one formula of the
papers per function, autograd, and AdamW written out. From top to bottom it reads as one step:

    rewards -> advantages -> pruning -> log-probabilities -> loss -> gradient -> AdamW

Papers: CPPO (completion pruning, arXiv 2503.22342), contrastive perception (2601.00501), GRPO
(2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), GSPO (2507.18071), VPPO (2510.09285), PAPO
(2507.06448), AdamW (1711.05101), LoRA (2106.09685).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Completion:
    """A sampled completion: token ids (P,) and (C,), the closing one included, and its reward.

    pixel_values and image_grid_thw are the images of the prompt, None without any.
    """

    prompt: Tensor
    answer: Tensor
    reward: float
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None


@dataclass(frozen=True)
class Run:
    """A run as an outsider knows it.

    config: the options, which are only read. model: plain transformers, the weights of the start,
    fp64. start: what is trained, at the start: parameters of the model, or LoRA's adapters.
    suppressed: token ids that are never sampled. views: what the positive and the negative
    perturbation do to pixel values. steps: all completions of every step, kept or not, the G of a
    question in a row.
    """

    config: Any
    model: nn.Module
    start: Weights
    suppressed: list[int]
    views: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    steps: list[list[Completion]] = field(default_factory=list)


class Outcome(NamedTuple):
    """The trained weights and AdamW's first moments at the end, and the norm of the gradient.

    The norm is that of every step, before clipping: the mean over the optimizer steps in it.
    """

    weights: Weights
    first_moments: Weights
    gradient_norms: list[float]


def group_advantages(rewards: Tensor, config: Any) -> Tensor:
    """A = (r - mean of the group) / (std + 1e-4), the std with n - 1."""
    groups = rewards.view(-1, config.group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if config.scale_rewards == "none":  # Dr. GRPO
        return centred.flatten()
    of_group = config.scale_rewards == "group"
    # "batch" means all completions of the step, on whichever process they were sampled.
    std = groups.std(dim=1, keepdim=True) if of_group else rewards.std()
    return (centred / (std + 1e-4)).flatten()


def kept_completions(advantages: Tensor, config: Any) -> list[int]:
    """Of every group the n - floor(n * prune_rate) completions with the largest |A|, ascending."""
    n = config.group_size
    count = max(1, n - math.floor(round(n * config.prune_rate, 6)))
    kept: list[int] = []
    for group in torch.arange(len(advantages)).view(-1, n).tolist():
        kept += sorted(sorted(group, key=lambda i: -abs(advantages[i].item()))[:count])
    return kept


class Policy:
    """The distribution of the next token under given weights."""

    def __init__(self, run: Run, trained: Weights) -> None:
        self.run = run
        self.weights = merged(run, trained) if run.config.lora else trained

    def __call__(self, completion: Completion, pixel_values: Tensor | None = None) -> Tensor:
        """(C, V) log-probabilities at every token of the answer; other pixels may be shown."""
        ids = torch.cat([completion.prompt, completion.answer])[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        if completion.pixel_values is not None:
            shown = completion.pixel_values if pixel_values is None else pixel_values
            is_image = (ids == self.run.model.config.image_token_id).int()
            inputs |= {"pixel_values": shown, "mm_token_type_ids": is_image}
            inputs["image_grid_thw"] = completion.image_grid_thw
        logits = functional_call(self.run.model, self.weights, kwargs=inputs).logits[0]
        # The logits at one position are about the token at the next.
        logits = logits[len(completion.prompt) - 1 : -1]
        logits = logits.index_fill(1, torch.tensor(self.run.suppressed), -torch.inf)
        return torch.log_softmax(logits / self.run.config.loss.temperature, dim=1)


def merged(run: Run, adapters: Weights) -> Weights:
    """LoRA: W + (alpha / r) B A."""
    weights, lora = dict(run.model.named_parameters()), run.config.lora
    for layer in [name.removesuffix(".lora_A") for name in adapters if name.endswith(".lora_A")]:
        update = adapters[f"{layer}.lora_B"] @ adapters[f"{layer}.lora_A"]
        weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + lora.alpha / lora.r * update
    return weights


def of_answer(log_probabilities: Tensor, completion: Completion) -> Tensor:
    """(C,) log-probabilities of the tokens that were sampled."""
    return log_probabilities.gather(1, completion.answer[:, None])[:, 0]


def entropy(log_probabilities: Tensor) -> Tensor:
    """(C,) H = -sum_v p_v log p_v; a token with p = 0 adds nothing."""
    finite = log_probabilities.masked_fill(log_probabilities.isneginf(), 0.0)
    return -(log_probabilities.exp() * finite).sum(dim=1)


def policy_loss(logps: Tensor, old: Tensor, advantage: float, loss: Any) -> Tensor:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), at most -dual_clip A where A < 0.

    rho = pi / pi_old of the token; in GSPO the geometric mean of that over the completion.
    """
    log_ratio = logps - old
    if loss.importance == "sequence":
        log_ratio = log_ratio.mean().expand_as(logps)
    rho = log_ratio.exp()
    clipped = rho.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    value = torch.minimum(rho * advantage, clipped * advantage)
    if loss.dual_clip is not None and advantage < 0:
        value = value.clamp(min=loss.dual_clip * advantage)
    return -value


def reference_kl(logps: Tensor, reference: Tensor) -> Tensor:
    """k3, an estimate of KL(pi || pi_ref): e^d - d - 1 with d = log pi_ref - log pi."""
    d = (reference - logps).clamp(-20, 20)
    return d.exp() - d - 1


def divergence(anchor: Tensor, view: Tensor, completion: Completion, kind: str) -> Tensor:
    """How far a view is from the anchor, both given as (C, V) log-probabilities."""
    if kind == "full":  # KL(pi_anchor || pi_view)
        difference = (anchor - view).masked_fill(anchor.isneginf(), 0.0)
        return (anchor.exp() * difference).sum(dim=1)
    d = of_answer(view, completion) - of_answer(anchor, completion)
    if kind == "k1":
        return -d
    d = d.clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)  # k3


def perception_tokens(anchor: Tensor, negative: Tensor, fraction: float) -> Tensor:
    """(C,) bool: the tokens whose entropy rises most under the negative view.

    Of the c tokens with H_neg > H_anchor beyond the rounding error 2^-17 (1 + H_neg) of an entropy,
    the k = max(1, floor(fraction c)) with the largest rise relative to H_neg; equal ones stay in.
    """
    rises = negative - anchor > 2**-17 * (1 + negative)
    if not rises.any():
        return rises
    score = (negative - anchor) / (negative + 1e-6)
    k = max(1, math.floor(fraction * int(rises.sum())))
    return rises & (score >= score[rises].topk(k).values[-1])


def contrast(policy: Policy, anchor: Tensor, completion: Completion) -> Tensor:
    """softplus((div(a, p) - div(a, n)) / tau) at the perception tokens."""
    loss, pixels = policy.run.config.loss, completion.pixel_values
    positive, negative = (policy(completion, view(pixels)) for view in policy.run.views)
    selected = perception_tokens(entropy(anchor), entropy(negative), loss.fraction)
    if loss.perception == "cpl_all":
        selected = torch.ones_like(selected)
    anchor = anchor.detach() if loss.detach_anchor else anchor
    near = divergence(anchor, positive, completion, loss.divergence)
    far = divergence(anchor, negative, completion, loss.divergence)
    return F.softplus((near - far) / loss.tau)[selected]


# A kept completion, its advantage, and its log-probabilities under pi_old, under pi_ref, and under
# pi_old without the image, which None has.
Row = tuple[Completion, float, Tensor, Tensor, Tensor | None]


def dependency(logps: Tensor, removed: Tensor) -> Tensor:
    """k3 of the tokens without and with the image: how much they depend on it, at most 10."""
    d = (removed - logps).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(max=10)


def vppo_weights(rows: list[Row], loss: Any) -> list[Tensor]:
    """VPPO: which tokens of each completion are trained on, times the size of its advantage.

    The completions of an optimizer step are compared, those with an image and an advantage.
    """
    weights = [torch.ones_like(row[2]) for row in rows]
    seen = {
        i: dependency(old, removed)
        for i, (_, advantage, old, _, removed) in enumerate(rows)
        if removed is not None and advantage != 0
    }
    means = torch.stack([of_tokens.mean() for of_tokens in seen.values()])
    shares = (means - means.min()) / (means.max() - means.min())
    for (i, of_tokens), share in zip(seen.items(), shares, strict=True):
        count = math.ceil(round(loss.vppo_fraction * len(of_tokens), 6))
        size = loss.vppo_floor + (1 - loss.vppo_floor) * share / shares.mean()
        weights[i] = torch.zeros_like(of_tokens)
        weights[i][of_tokens.topk(count).indices] = size
    return weights


def papo_term(policy: Policy, logps: Tensor, row: Row) -> Tensor:
    """PAPO: less of it, the more a token depends on the image; and the entropy without that."""
    loss, completion, removed = policy.run.config.loss, row[0], row[4]
    if completion.pixel_values is None:
        return torch.zeros_like(logps)
    without = torch.zeros(())
    if loss.papo_entropy_coef:
        negative = policy(completion, policy.run.views[1](completion.pixel_values))
        removed, without = of_answer(negative, completion).detach(), entropy(negative)
    assert removed is not None
    return loss.papo_entropy_coef * without - loss.papo_coef * dependency(logps, removed)


def without_image(policy: Policy, completion: Completion) -> Tensor | None:
    """(C,) log-probabilities of the tokens under the removing view, where VPPO or PAPO has one."""
    if completion.pixel_values is None or policy.run.config.loss.perception not in ("vppo", "papo"):
        return None
    return of_answer(policy(completion, policy.run.views[1](completion.pixel_values)), completion)


def batch_loss(policy: Policy, rows: list[Row]) -> Tensor:
    """policy + kl_coef KL - entropy_coef H + cpl_coef CPL, over all rows of an optimizer step."""
    loss = policy.run.config.loss
    per_token, contrasts = [], []
    weights = (
        vppo_weights(rows, loss) if loss.perception == "vppo" else [torch.tensor(1.0)] * len(rows)
    )
    for row, weight in zip(rows, weights, strict=True):
        completion, advantage, old, reference, _ = row
        anchor = policy(completion)
        logps = of_answer(anchor, completion)
        value = weight * policy_loss(logps, old, advantage, loss)
        if loss.perception == "papo":
            value = value + papo_term(policy, logps, row)
        value = value + loss.kl_coef * reference_kl(logps, reference)
        per_token.append(value - loss.entropy_coef * entropy(anchor))
        # Gating: where an answer was not good, looking harder at the picture teaches nothing.
        is_gated = completion.pixel_values is not None and (advantage > 0 or not loss.gating)
        if is_gated and loss.perception in ("cpl", "cpl_all"):
            contrasts.append(contrast(policy, anchor, completion))
    # The mean of all perception tokens, or of the completions' means, 0 where none is selected.
    by_token = loss.cpl_reduction == "token"
    summands = [values.sum() if by_token else values.mean() for values in contrasts if len(values)]
    count = sum(len(values) for values in contrasts) if by_token else len(rows)
    return reduced(per_token, loss) + loss.cpl_coef * sum(summands) / max(count, 1)


def reduced(per_token: list[Tensor], loss: Any) -> Tensor:
    """One number of the values of all tokens of several completions."""
    if loss.reduction == "grpo":
        return torch.stack([values.mean() for values in per_token]).mean()
    if loss.reduction == "dapo":
        return torch.cat(per_token).mean()
    return torch.cat(per_token).sum() / (len(per_token) * loss.max_length)  # Dr. GRPO


def learning_rate(t: int, config: Any) -> float:
    """The rate of optimizer step t = 0, 1, ...: linearly up from 0, then along the schedule."""
    if t < config.warmup_steps:
        return config.learning_rate * t / config.warmup_steps
    total = config.max_steps * config.num_iterations * config.optimizer_steps
    done = (t - config.warmup_steps) / (total - config.warmup_steps)
    course = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.learning_rate * course.get(config.lr_scheduler, 1.0)


class AdamW:
    """Decoupled weight decay: w <- w - lr (m^ / (sqrt(v^) + 1e-8) + decay w).

    m and v are the running means of g and g^2 from 0 on; m^ and v^ are those divided by
    1 - beta^t, which takes out the weight of the zeros. `reach` adds lr max|g| / (sqrt(v^) + 1e-8),
    how far a weight moves if its gradient errs by the largest gradient of its tensor.
    """

    def __init__(self, weights: Weights, config: Any) -> None:
        self.config, self.t = config, 0
        zeros = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.m, self.v, self.reach = dict(zeros), dict(zeros), dict(zeros)

    def step(self, weights: Weights, gradient: Weights) -> Weights:
        rate, (beta1, beta2) = learning_rate(self.t, self.config), self.config.betas
        self.t += 1
        moved = {}
        for name, g in gradient.items():
            self.m[name] = beta1 * self.m[name] + (1 - beta1) * g
            self.v[name] = beta2 * self.v[name] + (1 - beta2) * g**2
            mean = self.m[name] / (1 - beta1**self.t)
            size = (self.v[name] / (1 - beta2**self.t)).sqrt() + 1e-8
            decay = self.config.weight_decay * weights[name]
            moved[name] = weights[name] - rate * (mean / size + decay)
            self.reach[name] = self.reach[name] + rate * g.abs().max() / size
        return moved


def retrain(run: Run) -> tuple[Outcome, Weights]:
    """Trains again, on the completions that the run has sampled: where it ends, and the reach."""
    config, weights = run.config, run.start
    optimizer, gradient_norms = AdamW(weights, config), []
    for completions in run.steps:
        rewards = torch.tensor([one.reward for one in completions], dtype=torch.float64)
        advantages = group_advantages(rewards, config)
        rows: list[Row] = []
        for i in kept_completions(advantages, config):
            with torch.no_grad():
                old = of_answer(Policy(run, weights)(completions[i]), completions[i])
                reference = of_answer(Policy(run, run.start)(completions[i]), completions[i])
                removed = without_image(Policy(run, weights), completions[i])
            rows.append((completions[i], advantages[i].item(), old, reference, removed))
        norms = []
        # The completions are dealt to the optimizer steps like cards.
        for part in [*range(config.optimizer_steps)] * config.num_iterations:
            gradient = gradient_of(run, weights, rows[part :: config.optimizer_steps])
            norms.append(math.sqrt(sum((g**2).sum().item() for g in gradient.values())))
            scale = min(1.0, (config.max_grad_norm or math.inf) / (norms[-1] + 1e-6))
            weights = optimizer.step(weights, {name: scale * g for name, g in gradient.items()})
        gradient_norms.append(sum(norms) / len(norms))
    return Outcome(weights, optimizer.m, gradient_norms), optimizer.reach


def gradient_of(run: Run, weights: Weights, rows: list[Row]) -> Weights:
    """The gradient of the loss of `rows` with respect to every trained weight."""
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    loss = batch_loss(Policy(run, leaves), rows)
    values = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, values, strict=True))
