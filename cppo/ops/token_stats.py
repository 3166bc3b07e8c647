"""Log-probability of the sampled token and entropy of its distribution."""

from __future__ import annotations

from torch import Tensor

from cppo import backends
from cppo.ops.checks import (
    LOGITS_DTYPES,
    autocast_dtype,
    cast,
    check_choice,
    check_head,
    check_positive,
    check_rows,
    check_same_device,
    check_targets,
    checked_mask,
    checked_scale,
    to,
)
from cppo.ops.memory import checked_inplace
from cppo.ops.sharded import gathered
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
        inplace: write the gradient into `logits`. Their version counter is bumped, so that
            autograd raises if anything else still needs the values. Ignored by "reference" and
            under torch.compile.
        backend: "auto", "reference", "cpp" or "triton".
    Returns: TokenStats(logps, entropy), each like targets, fp32 (fp64 for fp64 logits), 0 at
        masked rows, to which no gradient flows.
    Raises:
        ValueError: shapes or devices that disagree, temperature <= 0, an unmasked target out of
            range (with position and value; on a GPU only with CPPO_DEBUG=1), expanded logits or
            ones that share memory with targets or mask with inplace=True.
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
    in_place = checked_inplace(op, inplace, {"logits": logits}, targets=targets, mask=mask)
    options = backends.with_inplace(implementation, in_place)
    return implementation.token_stats(logits, targets, temperature, mask, **options)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    suppressed: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    logits_dtype: str = "fp32",
    mask: Tensor | None = None,
    backend: str = "auto",
) -> TokenStats:
    """`token_stats` of the logits of an LM head, which fused backends never hold.

    Specification: `cppo.reference.linear_token_stats`. logits = logit_scale * (hidden @ weight^T
    + bias), capped as softcap * tanh(logits / softcap) where the model does that (Gemma 2,
    arXiv 2408.00118). A token that is suppressed, or whose bias is -inf, has the logit -inf in
    either case.

    Args:
        hidden: (B, L, D) or (T, D), fp16, bf16, fp32 or fp64; gradients flow.
        weight: (V, D) LM head of hidden's dtype; gradients flow. It may be a DTensor or a
            parameter of DeepSpeed's ZeRO-3, which is gathered here and in the backward
            (`cppo.ops.sharded`: whose gradient it gets), and may be on another device than
            hidden: the work is done there.
        targets: (B, L) or (T,) integer in [0, V) where not masked, anything elsewhere.
        bias: (V,) of hidden's dtype, where the weight is; gradients flow. None: 0.
        suppressed: (K,) int64 in [0, V), where the weight is: tokens that are never sampled. As a
            bias of -inf for them, without its cost. None: none.
        temperature: divides the logits, > 0.
        logit_scale: the model's factor on its logits, > 0 (Cohere; Granite divides by it).
        softcap: the model's final-logit softcap, > 0. None: none.
        logits_dtype: "fp32" takes the sums of a product of bf16 or fp16 as they are; "input" rounds
            them to that dtype first, as nn.Linear does: faster, and off by some 1e-2 in a
            log-probability of a large vocabulary.
        mask: like targets, 1 or True at the rows that count. None: all.
        backend: "auto", "reference", "cpp" or "triton".
    Under torch.autocast hidden, weight and bias are cast to its dtype, as F.linear does.
    Returns: TokenStats(logps, entropy), each like targets, fp32 (fp64 for fp64 input), 0 at
        masked rows, to which no gradient flows.
    Raises:
        ValueError: shapes or devices that disagree; temperature, logit_scale or softcap <= 0;
            another logits_dtype; an unmasked target or a suppressed token out of range (with
            position and value; on a GPU only with CPPO_DEBUG=1).
        TypeError: dtypes that disagree or are not floating, targets that are not integers,
            suppressed that is not int64.
        RuntimeError: `backend` cannot run here.
    """
    op = "linear_token_stats"
    check_rows(op, "hidden", hidden, targets, "D")
    check_positive(op, "temperature", temperature)
    mask = checked_mask(op, mask, targets, "targets")
    check_same_device(op, hidden=hidden, targets=targets, mask=mask)
    scale, softcap = checked_scale(op, logit_scale, softcap)
    check_choice(op, "logits_dtype", logits_dtype, LOGITS_DTYPES)
    dtype = autocast_dtype(hidden.device)
    (states,) = cast(dtype, hidden)
    with gathered(weight, bias, dtype=dtype) as (weight, bias):
        check_head(op, states, weight, bias, suppressed)
        check_targets(op, targets, mask, weight.shape[0])
        implementation = backends.pick(op, weight, backend)
        stats = implementation.linear_token_stats(
            *to(weight.device, states, weight, targets, bias),
            temperature / scale,
            *to(weight.device, mask),
            softcap,
            suppressed,
            logits_dtype,
        )
    return TokenStats(*to(hidden.device, *stats))
