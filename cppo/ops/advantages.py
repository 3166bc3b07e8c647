"""From rewards to the completions that are worth training on."""

from __future__ import annotations

import torch
from torch import Tensor

from cppo import backends, reference
from cppo.ops.checks import (
    check_choice,
    check_finite,
    check_groups,
    check_indices,
    check_integer,
    check_interval,
    check_positive,
    check_same_device,
    check_shape,
    check_tensor,
    check_vector,
    may_read,
)
from cppo.options.trainer import ADVANTAGES_OF, PRUNES, SCALES, SCOPES

# What a rule needs beside the advantages.
_NEEDS = {"variance": ("rewards",), "shortest": ("lengths",), "efficiency": ("rewards", "lengths")}


def _noise(op: str, values: Tensor, prune: str, generator: torch.Generator | None) -> Tensor | None:
    """One number per completion for what is left to chance."""
    if generator is not None and not isinstance(generator, torch.Generator):
        kind = type(generator).__name__
        raise TypeError(f"cppo.{op}: generator must be a torch.Generator, got {kind}")
    if prune not in ("random", "unbiased"):
        return None
    device = "cpu" if generator is None else generator.device
    noise = torch.rand(values.numel(), generator=generator, device=device, dtype=torch.float32)
    return noise.to(values.device, non_blocking=True)  # else the host waits for the GPU


def _check_pruning(op: str, prune_rate: float, scope: str, prune: str) -> None:
    check_interval(op, "prune_rate", prune_rate, 0, 1, closed=False)
    check_choice(op, "scope", scope, SCOPES)
    check_choice(op, "prune", prune, PRUNES)


def _check_needs(op: str, prune: str, name: str, values: Tensor, **given: Tensor | None) -> None:
    """Errors unless what a rule needs is there, and is (B,) like `values`, real and finite."""
    for need in _NEEDS.get(prune, ()):
        if need in given and given[need] is None:
            raise ValueError(
                f"cppo.{op}: {need} must be a (B,) Tensor for prune = {prune!r}, got None"
            )
    for argument, tensor in given.items():
        if tensor is None:
            continue
        check_tensor(op, argument, tensor, "real")
        check_shape(op, argument, tensor, "(B,)", values.shape, name)
        check_same_device(op, **{name: values, argument: tensor})
        check_finite(op, argument, tensor)
    lengths = given.get("lengths")
    if lengths is not None and may_read(lengths) and (below := lengths.double() < 0).any():
        index = int(below.nonzero()[0, 0])
        raise ValueError(
            f"cppo.{op}: lengths must be >= 0, got {lengths[index].item()} at index {index}"
        )


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
    rewards: Tensor | None = None,
    lengths: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Tensor:
    """The completions that stay: those with the largest |advantage| of each question.

    Specification: `cppo.reference.prune_completions` (completion pruning, arXiv 2503.22342). Of a
    unit of n completions m = n - floor(round(n * prune_rate, 6)) stay, at least 1; of equal ones
    the lower index. `prune` says which:

    - "smallest", "largest" or "random": that side of |A| is dropped;
    - "variance" (PODS, arXiv 2504.13818): the i highest and m - i lowest rewards with the largest
      variance over all i. Of equal variances, as far as fp64 can tell, the smaller i, at least 1;
    - "shortest" and "efficiency" (GFPO, arXiv 2508.09726): the fewest tokens, or the highest reward
      per token (0 tokens count as 1);
    - "unbiased": completion i with probability p_i, in proportion to |A_i| but to no less than a
      tenth of the unit's mean |A|, at most 1; equal if all A are 0. With a loss weight of 1 / p_i
      (`prune_weights`) the mean gradient is that of all completions. Exactly m stay (systematic
      sampling: one random number decides for a unit).

    One launch. What "shortest" and "efficiency" rank by is worked out before it, by one or two
    operations on (B,), as the numbers of "random" are drawn before it. Nothing waits for a GPU.

    Args:
        advantages: (B,) any real dtype, finite. No gradients flow.
        group_size: completions per question, >= 1; divides B.
        prune_rate: share that is dropped, in [0, 1).
        scope: a unit is a question ("group": the paper) or everything ("batch": its code).
        prune: the rule, see above.
        drop_zero: also drop completions with A = 0; then nothing may be left.
        rewards: (B,) any real dtype, finite; for "variance" and "efficiency".
        lengths: (B,) any real dtype, >= 0, tokens of each completion; for "shortest" and
            "efficiency".
        generator: of the choice of "random" and "unbiased". None: torch's global CPU generator.
        backend: "auto", "reference", "cpp", "triton" or "cuda".
    Returns: (K,) int64 indices into the batch, ascending.
    Raises:
        ValueError: advantages not (B,), not a multiple of group_size or not finite (with the
            index; on a GPU only with CPPO_DEBUG=1); prune_rate outside [0, 1); unknown scope or
            prune; rewards or lengths that the rule needs missing, of another shape or on another
            device than advantages, not finite or below 0.
        TypeError: advantages, group_size, rewards, lengths or generator of the wrong type.
        RuntimeError: `backend` cannot run here.
    """
    op = "prune_completions"
    check_groups(op, "advantages", advantages, group_size)
    _check_pruning(op, prune_rate, scope, prune)
    _check_needs(op, prune, "advantages", advantages, rewards=rewards, lengths=lengths)
    implementation = backends.pick(op, advantages, backend)
    return implementation.prune_completions(
        advantages.detach(),
        group_size,
        prune_rate,
        scope,
        prune,
        drop_zero,
        _noise(op, advantages, prune, generator),
        rewards=None if rewards is None else rewards.detach(),
        lengths=lengths,
    )


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
    lengths: Tensor | None = None,
    advantages_of: str = "sampled",
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
        scope, prune, drop_zero, lengths, generator: see `prune_completions`.
        advantages_of: whose mean and std the advantages have: those of all completions ("sampled"),
            or only of the kept ones ("kept": PODS and GFPO), with 0 for the others. "kept" works
            them out again behind the launch, in plain PyTorch that waits for no GPU; `drop_zero`
            looks at the new ones. Not with "unbiased", which it would bias.
        backend: "auto", "reference", "cpp", "triton" or "cuda".
    Returns: advantages (B,) fp32 of all completions, and kept (K,) int64, ascending.
    Raises: what `group_advantages` and `prune_completions` raise (ValueError, TypeError,
        RuntimeError), and ValueError for an unknown advantages_of.
    """
    op = "advantages_and_prune"
    check_groups(op, "rewards", rewards, group_size)
    _check_scaling(op, scale, eps)
    _check_pruning(op, prune_rate, scope, prune)
    check_choice(op, "advantages_of", advantages_of, ADVANTAGES_OF)
    if prune == "unbiased":
        check_choice(op, "advantages_of with prune = 'unbiased'", advantages_of, ("sampled",))
    _check_needs(op, prune, "rewards", rewards, lengths=lengths)
    implementation = backends.pick(op, rewards, backend)
    return implementation.advantages_and_prune(
        rewards.detach(),
        group_size,
        prune_rate,
        scale,
        eps,
        scope,
        prune,
        drop_zero,
        _noise(op, rewards, prune, generator),
        lengths=lengths,
        advantages_of=advantages_of,
    )


def prune_weights(
    advantages: Tensor,
    kept: Tensor,
    group_size: int,
    prune_rate: float,
    *,
    scope: str = "group",
    prune: str = "unbiased",
) -> Tensor:
    """The loss weights that make pruning by chance unbiased: 1 / p of each kept completion.

    Specification: `cppo.reference.prune_weights`. As `token_weights` of a loss that divides by the
    number of completions (or tokens) sampled, not kept (`num_items`), they give the gradient of all
    completions in the mean over what `prune_completions` draws; a completion that `drop_zero`
    leaves out counts in neither. Where m of n stay, no weight is above 11 n / m. A dozen small
    operations of PyTorch on (B,): a kernel would gain nothing.

    Args:
        advantages: (B,) that the completions were pruned by. No gradients flow.
        kept: (K,) int64, what `prune_completions` returned.
        group_size, prune_rate, scope, prune: as there; all rules but "unbiased" give ones.
    Returns: (K,) fp32, >= 1.
    Raises:
        ValueError: advantages not (B,), not a multiple of group_size or not finite (with the
            index; on a GPU only with CPPO_DEBUG=1); kept not (K,), on another device or not indices
            of advantages (likewise); prune_rate outside [0, 1); unknown scope or prune.
        TypeError: advantages, kept or group_size of the wrong type.
    """
    op = "prune_weights"
    check_groups(op, "advantages", advantages, group_size)
    check_tensor(op, "kept", kept, "integer")
    check_vector(op, "kept", kept)
    kept = kept.long()
    check_same_device(op, advantages=advantages, kept=kept)
    _check_pruning(op, prune_rate, scope, prune)
    if may_read(kept):
        check_indices(op, "kept", kept, len(advantages))
    sizes = group_size, prune_rate
    return reference.prune_weights(advantages.detach(), kept, *sizes, scope, prune).float()


def select_groups(rewards: Tensor, group_size: int, *, top_p: float) -> Tensor:
    """The groups with the most signal: the fewest that hold the share `top_p` of all variance.

    Specification: `cppo.reference.select_groups` (RAGEN-2, arXiv 2604.06268). A group's variance is
    that of its rewards (divided by n); of equal ones, to 32 bits, the lower index. A group of equal
    rewards never stays, and if all are, none does. A few small operations of PyTorch, which wait
    for a GPU once, for the size of the result: a kernel would gain nothing.

    Args:
        rewards: (B,) any real dtype, finite; completions of a question are neighbours. No
            gradients flow.
        group_size: completions per question, >= 1; divides B.
        top_p: share of the sum of variances, in [0, 1]; 1 keeps every group that has any.
    Returns: (Q',) int64 indices of groups, ascending; group q holds the completions from
        q * group_size to (q + 1) * group_size - 1.
    Raises:
        ValueError: rewards not (B,), not a multiple of group_size or not finite (with the index; on
            a GPU only with CPPO_DEBUG=1); top_p outside [0, 1].
        TypeError: rewards, group_size or top_p of the wrong type.
    """
    check_groups("select_groups", "rewards", rewards, group_size)
    check_interval("select_groups", "top_p", top_p, 0, 1)
    return reference.select_groups(rewards.detach(), group_size, top_p)


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
