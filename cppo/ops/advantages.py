"""From rewards to the completions that are worth training on."""

from __future__ import annotations

import torch
from torch import Tensor

from cppo import backends, reference
from cppo.config import PRUNES, SCALES, SCOPES
from cppo.ops.checks import (
    check_choice,
    check_groups,
    check_integer,
    check_interval,
    check_positive,
)


def _noise(values: Tensor, prune: str, generator: torch.Generator | None) -> Tensor | None:
    """One number per completion that ranks it in random pruning."""
    if prune != "random":
        return None
    device = "cpu" if generator is None else generator.device
    noise = torch.rand(values.numel(), generator=generator, device=device, dtype=torch.float32)
    return noise.to(values.device)


def _check_pruning(op: str, prune_rate: float, scope: str, prune: str) -> None:
    check_interval(op, "prune_rate", prune_rate, 0, 1, closed=False)
    check_choice(op, "scope", scope, SCOPES)
    check_choice(op, "prune", prune, PRUNES)


def _check_scaling(op: str, scale: str, eps: float) -> None:
    check_choice(op, "scale", scale, SCALES)
    check_positive(op, "eps", eps)


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    scale: str = "group",
    eps: float = 1e-4,
    backend: str = "auto",
) -> Tensor:
    """How much better each completion is than the others of its question.

    Specification: `cppo.reference.group_advantages`; (r - mean) / (std + eps) per question with
    the n-1 std (GRPO, arXiv 2402.03300), or without the division (Dr. GRPO, arXiv 2503.20783).

    Args:
        rewards: (B,) any real dtype, finite; completions of a question are neighbours. No
            gradients flow.
        group_size: completions per question, >= 1; divides B. 1 gives A = 0.
        scale: "group" divides by the std of the question, "batch" by that of all rewards,
            "none" by nothing.
        eps: added to the std, > 0.
        backend: "auto", "reference", "cpp", "triton" or "cuda".
    Returns: (B,) fp32 advantages; exactly 0 where all rewards of a question are equal.
    Raises:
        ValueError: rewards not (B,), not a multiple of group_size or not finite (with the
            index); unknown scale; eps <= 0. Non-finite values on a GPU: only with CPPO_DEBUG=1.
        TypeError: rewards or group_size of the wrong type.
        RuntimeError: `backend` cannot run here.
    """
    check_groups("group_advantages", "rewards", rewards, group_size)
    _check_scaling("group_advantages", scale, eps)
    implementation = backends.pick("group_advantages", rewards, backend)
    return implementation.group_advantages(rewards.detach(), group_size, scale, eps)


def prune_completions(
    advantages: Tensor,
    group_size: int,
    prune_rate: float,
    *,
    scope: str = "group",
    prune: str = "smallest",
    drop_zero: bool = False,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Tensor:
    """The completions that stay: those with the largest |advantage| of each question.

    Specification: `cppo.reference.prune_completions` (completion pruning, arXiv 2503.22342). Of a
    unit of n completions n - floor(round(n * prune_rate, 6)) stay, at least 1; of equal ones the
    lower index.

    Args:
        advantages: (B,) any real dtype, finite. No gradients flow.
        group_size: completions per question, >= 1; divides B.
        prune_rate: share that is dropped, in [0, 1).
        scope: a unit is a question ("group": the paper) or everything ("batch": its code).
        prune: the side that is dropped: "smallest", "largest" or "random".
        drop_zero: also drop completions with A = 0; then nothing may be left.
        generator: of the random choice when prune="random". None: torch's global CPU generator.
        backend: "auto", "reference", "cpp", "triton" or "cuda".
    Returns: (K,) int64 indices into the batch, ascending.
    Raises:
        ValueError: advantages not (B,), not a multiple of group_size or not finite (with the
            index; on a GPU only with CPPO_DEBUG=1); prune_rate outside [0, 1); unknown scope or
            prune.
        TypeError: advantages or group_size of the wrong type.
        RuntimeError: `backend` cannot run here.
    """
    check_groups("prune_completions", "advantages", advantages, group_size)
    _check_pruning("prune_completions", prune_rate, scope, prune)
    implementation = backends.pick("prune_completions", advantages, backend)
    options = (scope, prune, drop_zero, _noise(advantages, prune, generator))
    return implementation.prune_completions(advantages.detach(), group_size, prune_rate, *options)


def advantages_and_prune(
    rewards: Tensor,
    group_size: int,
    prune_rate: float,
    *,
    scale: str = "group",
    eps: float = 1e-4,
    scope: str = "group",
    prune: str = "smallest",
    drop_zero: bool = False,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`group_advantages` and `prune_completions` in one launch.

    Specification: `cppo.reference.advantages_and_prune`.

    Args:
        rewards: (B,) any real dtype, finite; completions of a question are neighbours. No
            gradients flow.
        group_size: completions per question, >= 1; divides B.
        prune_rate: share that is dropped, in [0, 1).
        scale, eps: see `group_advantages`.
        scope, prune, drop_zero, generator: see `prune_completions`.
        backend: "auto", "reference", "cpp", "triton" or "cuda".
    Returns: advantages (B,) fp32 of all completions, and kept (K,) int64, ascending.
    Raises: what `group_advantages` and `prune_completions` raise (ValueError, TypeError,
        RuntimeError).
    """
    check_groups("advantages_and_prune", "rewards", rewards, group_size)
    _check_scaling("advantages_and_prune", scale, eps)
    _check_pruning("advantages_and_prune", prune_rate, scope, prune)
    implementation = backends.pick("advantages_and_prune", rewards, backend)
    options = (scale, eps, scope, prune, drop_zero, _noise(rewards, prune, generator))
    return implementation.advantages_and_prune(rewards.detach(), group_size, prune_rate, *options)


def questions_needed(batch_size: int, group_size: int, prune_rate: float) -> int:
    """Questions whose kept completions fill a training batch (dynamic allocation).

    Specification: `cppo.reference.questions_needed` (arXiv 2503.22342, section 3.4).

    Args:
        batch_size: completions of the training batch after pruning, >= 0.
        group_size: completions per question, >= 1.
        prune_rate: share of them that is dropped, in [0, 1).
    Returns: ceil(batch_size / completions kept per question).
    Raises:
        ValueError: an argument outside its range.
        TypeError: sizes that are not integers, a rate that is not a number.
    """
    check_integer("questions_needed", "batch_size", batch_size, at_least=0)
    check_integer("questions_needed", "group_size", group_size, at_least=1)
    check_interval("questions_needed", "prune_rate", prune_rate, 0, 1, closed=False)
    return reference.questions_needed(batch_size, group_size, prune_rate)
