"""Log-probability of the sampled token and entropy of its distribution."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from cppo import backends
from cppo.ops.checks import (
    autocast,
    check_head,
    check_positive,
    check_rows,
    check_same_device,
    check_targets,
    checked_inplace,
    checked_mask,
)
from cppo.records import TokenStats


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> TokenStats:
    """Log-probability of each target and entropy of each row of logits, in nats.

    Specification: `cppo.reference.token_stats`: logp = z[y] - lse(z), H = lse(z) - sum_v p_v z_v
    with z = logits / temperature. Reductions run in fp32 (fp64 for fp64 logits).

    Args:
        logits: (B, L, V) or (T, V), fp16, bf16, fp32 or fp64; may be strided and hold -inf.
            Gradients flow from both results.
        targets: (B, L) or (T,) integer in [0, V) where not masked, anything elsewhere.
        temperature: divides the logits, > 0.
        mask: like targets, 1 or True at the rows that count. None: all.
        inplace: lets the backward write the gradient into the logits instead of new memory, and
            bump their version: who still needs their values gets autograd's error. Backends that
            have no use for it, and torch.compile, ignore it.
        backend: "auto", "reference", "cpp", "triton" or "cuda".
    Returns: TokenStats(logps, entropy), each like targets, fp32 (fp64 for fp64 logits), 0 at
        masked rows, to which no gradient flows.
    Raises:
        ValueError: shapes or devices that disagree, temperature <= 0, an unmasked target out of
            range (with position and value; on a GPU only with CPPO_DEBUG=1), expanded logits
            with inplace=True.
        TypeError: logits that are not floating, targets that are not integers.
        RuntimeError: `backend` cannot run here.
    """
    op = "token_stats"
    check_rows(op, "logits", logits, targets, "V")
    check_positive(op, "temperature", temperature)
    mask = checked_mask(op, mask, targets, "targets")
    check_same_device(op, logits=logits, targets=targets, mask=mask)
    check_targets(op, targets, mask, logits.shape[-1])
    implementation = backends.pick(op, logits, backend)
    options = backends.with_inplace(implementation, checked_inplace(op, inplace, logits=logits))
    return implementation.token_stats(logits, targets, temperature, mask, **options)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> TokenStats:
    """`token_stats` of the logits hidden @ weight^T + bias of the rows that count.

    Specification: `cppo.reference.linear_token_stats`. Fused backends never hold the (T, V)
    logits.

    Args:
        hidden: (B, L, D) or (T, D), fp16, bf16, fp32 or fp64; gradients flow.
        weight: (V, D) LM head of hidden's dtype; gradients flow.
        targets: (B, L) or (T,) integer in [0, V) where not masked, anything elsewhere.
        bias: (V,) of hidden's dtype; gradients flow. None: 0.
        temperature: divides the logits, > 0.
        mask: like targets, 1 or True at the rows that count. None: all.
        backend: "auto", "reference", "cpp", "triton" or "cuda".
    Under torch.autocast hidden, weight and bias are cast to its dtype, as F.linear does.
    Returns: TokenStats(logps, entropy), each like targets, fp32 (fp64 for fp64 input), 0 at
        masked rows, to which no gradient flows.
    Raises:
        ValueError: shapes or devices that disagree, temperature <= 0, an unmasked target out of
            range (with position and value; on a GPU only with CPPO_DEBUG=1).
        TypeError: dtypes that disagree or are not floating, targets that are not integers.
        RuntimeError: `backend` cannot run here.
    """
    op = "linear_token_stats"
    check_rows(op, "hidden", hidden, targets, "D")
    hidden, weight, bias = cast(tuple[Any, Any, Any], autocast(hidden, weight, bias))
    check_head(op, hidden, weight, bias)
    check_positive(op, "temperature", temperature)
    mask = checked_mask(op, mask, targets, "targets")
    check_same_device(op, hidden=hidden, targets=targets, mask=mask)
    check_targets(op, targets, mask, weight.shape[0])
    implementation = backends.pick(op, hidden, backend)
    return implementation.linear_token_stats(hidden, weight, targets, bias, temperature, mask)
