"""The loss: clipped policy surrogate plus contrastive perception, from logits or hidden states."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from cppo import backends
from cppo.fused.batch import OF_ROWS
from cppo.ops.checks import (
    LOGITS_DTYPES,
    autocast_dtype,
    cast,
    check_choice,
    check_config,
    check_cu_seqlens,
    check_finite,
    check_head,
    check_layout,
    check_rows,
    check_same_device,
    check_shape,
    check_targets,
    check_tensor,
    check_vector,
    check_weights,
    checked_mask,
    checked_scale,
    may_read,
    to,
)
from cppo.ops.memory import checked_inplace
from cppo.ops.sharded import gathered
from cppo.options.loss import LossConfig
from cppo.options.values import is_number
from cppo.records import LossOutput, NumItems, Views


class _Rows(NamedTuple):
    """What both losses take besides the views: one entry per row or per completion."""

    targets: Tensor
    advantages: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None
    sampling_logps: Tensor | None
    token_weights: Tensor | None
    removed_logps: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None


def _num_gated_rows(rows: _Rows) -> int:
    """Length of the first dimension of a view that holds the completions with A > 0 alone."""
    positive = rows.advantages > 0
    if rows.cu_seqlens is None:
        return int(positive.sum())
    return int(rows.cu_seqlens.diff()[positive].sum())


def _check_views(op: str, name: str, views: Views, rows: _Rows, config: LossConfig) -> None:
    """The perturbed views: both or neither, like the anchor, all rows or the gated ones."""
    if views.positive is not None and views.negative is None:
        raise ValueError(f"cppo.{op}: {name}.negative must be given with {name}.positive, got None")
    if config.perception in ("vppo", "papo") and any(view is not None for view in views[1:]):
        raise ValueError(
            f"cppo.{op}: {name} must be the anchor alone with config.perception = "
            f"{config.perception!r}, which has no contrastive loss, got perturbed views"
        )
    if views.negative is not None and views.positive is None and config.cpl_coef > 0:
        raise ValueError(
            f"cppo.{op}: {name}.positive must be given with {name}.negative when "
            f"config.cpl_coef > 0, got None with cpl_coef = {config.cpl_coef:g}"
        )
    anchor = views.anchor
    check_same_device(op, **{f"{name}.{field}": view for field, view in views._asdict().items()})
    for view_name, view in zip(views._fields[1:], views[1:], strict=True):
        if view is None:
            continue
        check_tensor(op, f"{name}.{view_name}", view, "floating")
        if view.dtype != anchor.dtype:
            raise TypeError(
                f"cppo.{op}: {name}.{view_name} must be {anchor.dtype} like {name}.anchor, "
                f"got {view.dtype}"
            )
        if view.ndim != anchor.ndim or view.shape[1:] != anchor.shape[1:]:
            raise ValueError(
                f"cppo.{op}: {name}.{view_name} must be (rows, "
                f"{', '.join(map(str, anchor.shape[1:]))}) like {name}.anchor, "
                f"got {tuple(view.shape)}"
            )
        if view.shape[0] == anchor.shape[0]:
            continue
        if not config.gating:
            raise ValueError(
                f"cppo.{op}: {name}.{view_name} must have all {len(anchor)} rows when "
                f"config.gating is off, got {len(view)}"
            )
        if may_read(rows.advantages, rows.cu_seqlens) and len(view) != _num_gated_rows(rows):
            raise ValueError(
                f"cppo.{op}: {name}.{view_name} must have {len(anchor)} rows (all) or "
                f"{_num_gated_rows(rows)} (those of completions with A > 0), got {len(view)}"
            )


def _check_count(op: str, name: str, value: Any, *, zero: bool) -> None:
    expected = f"a number or 0-dim tensor {'>=' if zero else '>'} 0"
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"cppo.{op}: {name} must be {expected}, got {tuple(value.shape)}")
        if not may_read(value):
            return
        value = value.item()
    if not is_number(value):
        raise TypeError(f"cppo.{op}: {name} must be {expected}, got {type(value).__name__}")
    if not 0 <= float(value) < math.inf or (value == 0 and not zero):
        raise ValueError(f"cppo.{op}: {name} must be {expected}, got {value!r}")


def _check_num_items(op: str, num_items: Any, rows: _Rows, config: LossConfig) -> None:
    if num_items is None:
        return
    if not isinstance(num_items, NumItems):
        _check_count(op, "num_items", num_items, zero=False)
        return
    for field, value in zip(num_items._fields, num_items, strict=True):
        if value is not None:
            _check_count(op, f"num_items.{field}", value, zero=True)
    by_length = config.reduction == "dr_grpo" and config.max_length is None
    if by_length and rows.cu_seqlens is not None:
        raise ValueError(
            f"cppo.{op}: config.max_length must be given for reduction 'dr_grpo' with NumItems "
            "and packed rows (the parts would divide by their own longest), got None"
        )


def _checked_rows(op: str, name: str, anchor: Tensor, rows: _Rows, config: LossConfig) -> _Rows:
    """Everything but the views and the vocabulary; no gradient flows into these."""
    check_rows(op, name, anchor, rows.targets, "D" if name.startswith("hidden") else "V")
    targets, advantages = rows.targets, rows.advantages
    check_layout(op, "targets", targets, rows.cu_seqlens)
    check_tensor(op, "advantages", advantages, "floating")
    check_vector(op, "advantages", advantages)
    check_same_device(op, **{name: anchor}, **rows._asdict())
    if rows.cu_seqlens is None:
        check_shape(op, "advantages", advantages, "(B,)", targets.shape[:1], "targets")
    else:
        check_cu_seqlens(op, rows.cu_seqlens, targets.numel(), advantages.numel())
    check_finite(op, "advantages", advantages)
    mask = checked_mask(op, rows.mask, targets, "targets")
    if config.kl_coef > 0 and rows.ref_logps is None:
        raise ValueError(
            f"cppo.{op}: ref_logps must be given when config.kl_coef > 0, got None with "
            f"kl_coef = {config.kl_coef:g}"
        )
    _check_perception(op, rows, config)
    symbols = "(T,)" if targets.ndim == 1 else "(B, L)"
    of_rows: dict[str, Tensor | None] = {}
    for field in OF_ROWS:
        values = getattr(rows, field)
        if values is not None:
            check_tensor(op, field, values, "floating")
            check_shape(op, field, values, symbols, targets.shape, "targets")
            values = values.detach()
        of_rows[field] = values
    if rows.token_weights is not None:
        check_weights(op, "token_weights", rows.token_weights, mask)
    if not _corrects(op, rows, config):
        of_rows["sampling_logps"] = None
    if config.perception != "papo":
        of_rows["removed_logps"] = None
    return _Rows(targets, advantages.detach(), **of_rows, mask=mask, cu_seqlens=rows.cu_seqlens)


def _check_perception(op: str, rows: _Rows, config: LossConfig) -> None:
    """Raises ValueError where what VPPO or PAPO takes from the removing view is missing."""
    needed = "token_weights" if config.perception == "vppo" else "removed_logps"
    if config.compares_removed and getattr(rows, needed) is None:
        raise ValueError(
            f"cppo.{op}: {needed} must be given with config.perception = {config.perception!r}, "
            "got None"
        )


def _corrects(op: str, rows: _Rows, config: LossConfig) -> bool:
    """Whether the loss reads sampling_logps."""
    correction = f"config.importance_correction = {config.importance_correction!r}"
    if config.importance_correction == "none":
        return False
    if rows.sampling_logps is None:
        raise ValueError(f"cppo.{op}: sampling_logps must be given with {correction}, got None")
    if config.importance_correction == "bypass" and rows.old_logps is not None:
        raise ValueError(
            f"cppo.{op}: old_logps must be None with {correction}, which puts sampling_logps in "
            f"their place, got a tensor of shape {tuple(rows.old_logps.shape)}"
        )
    return True


def _as_views(op: str, name: str, rows: Any) -> tuple[Views, str]:
    """The views, and what the anchor is called in messages."""
    if isinstance(rows, Views):
        check_tensor(op, f"{name}.anchor", rows.anchor, "floating")
        return rows, f"{name}.anchor"
    if not isinstance(rows, Tensor):
        raise TypeError(
            f"cppo.{op}: {name} must be a Tensor or cppo.Views, got {type(rows).__name__}"
        )
    check_tensor(op, name, rows, "floating")
    return Views(rows), name


def cppo_loss(
    logits: Tensor | Views,
    targets: Tensor,
    advantages: Tensor,
    *,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    removed_logps: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: float | Tensor | NumItems | None = None,
    config: LossConfig = LossConfig(),  # noqa: B008  (frozen)
    inplace: bool = False,
    backend: str = "auto",
) -> LossOutput:
    """The training loss: policy + kl_coef * KL + cpl_coef * CPL - entropy_coef * H.

    With config.perception = "papo" it is policy + kl_coef * KL - papo_coef * k3 - entropy_coef * H,
    k3 of `removed_logps`; with "vppo" the policy's `token_weights` are all there is to it.

    Specification: `cppo.reference.cppo_loss`. Policy: the clipped surrogate of GRPO
    (arXiv 2402.03300) and its variants (`LossConfig`); CPL: the contrastive perception loss
    (arXiv 2601.00501). Reductions run in fp32 (fp64 for fp64 logits).

    Args:
        logits: the anchor's (B, L, V), or packed (T, V) with cu_seqlens; or `Views` of three.
            fp16, bf16, fp32 or fp64, the same for all views; may be strided and hold -inf. With
            config.gating the positive and the negative hold all rows or only those of the
            completions with A > 0, in their order: (B_positive, L, V) or (T_positive, V).
            Gradients flow.
        targets: (B, L) or (T,) integer in [0, V) where not masked, anything elsewhere.
        advantages: (B,) floating and finite, one per completion. No gradients flow.
        old_logps: like targets, of the policy that sampled. None: on-policy, the ratio is 1 with
            a gradient. No gradients flow.
        ref_logps: like targets, of the reference policy; needed when config.kl_coef > 0. No
            gradients flow.
        sampling_logps: like targets, as the engine that sampled gave them, NaN where it gave none;
            needed when config.importance_correction is not "none", else not read. The correction
            takes the policy's own logps where old_logps are None. No gradients flow.
        token_weights: like targets, floating, finite and >= 0 where not masked: multiplies each
            token's clipped surrogate, and nothing else; the loss is divided by as much as without.
            None: 1. No gradients flow. Needed when config.perception = "vppo": of
            `cppo.visual_dependency`.
        removed_logps: like targets, of the policy under the removing view; NaN in a completion that
            has none. Needed when config.perception = "papo" (with papo_coef > 0), else not read. No
            gradients flow.
        mask: like targets, 1 or True at response tokens. None: all.
        cu_seqlens: (B + 1,) int32 or int64, where the packed completions start and end; from 0
            to T, not decreasing.
        num_items: what the policy terms are divided by instead of this batch's own count, > 0;
            or a `NumItems`, so that the losses of the parts of a batch add up to the whole's.
        config: every coefficient.
        inplace: write the gradients into `logits`. Their version counter is bumped, so that
            autograd raises if anything else still needs the values. Ignored by "reference" and
            under torch.compile.
        backend: "auto", "reference", "cpp" or "triton".
    Returns: a `LossOutput`. The loss is exactly 0, and attached, where nothing counts.
    Raises:
        ValueError: shapes or devices that disagree; a positive without a negative (or the other
            way round with cpl_coef > 0), or one with perception "vppo" or "papo"; no ref_logps with
            kl_coef > 0, token_weights with "vppo" or removed_logps with "papo"; no sampling_logps
            with an importance_correction, or old_logps with that of "bypass"; cu_seqlens missing,
            superfluous or not from 0 to T; num_items <= 0; expanded logits with inplace=True, or
            views that share memory with each other or with targets, advantages or masks; an
            unmasked target out of range, non-finite advantages, an unmasked weight that is not
            finite and >= 0 (values on a GPU are checked only with CPPO_DEBUG=1).
        TypeError: dtypes that disagree or do not fit.
        RuntimeError: `backend` cannot run here.
    """
    op = "cppo_loss"
    check_config(op, config)
    views, name = _as_views(op, "logits", logits)
    of_rows = (old_logps, ref_logps, sampling_logps, token_weights, removed_logps)
    rows = _Rows(targets, advantages, *of_rows, mask, cu_seqlens)
    rows = _checked_rows(op, name, views.anchor, rows, config)
    _check_views(op, "logits", views, rows, config)
    check_targets(op, targets, rows.mask, views.anchor.shape[-1])
    _check_num_items(op, num_items, rows, config)
    implementation = backends.pick(op, views.anchor, backend)
    named = {name: views.anchor}
    named |= {f"logits.{field}": getattr(views, field) for field in views._fields[1:]}
    read = {field: getattr(rows, field) for field in ("targets", "advantages", "mask")}
    in_place = checked_inplace(op, inplace, named, **read, cu_seqlens=rows.cu_seqlens)
    options = backends.with_inplace(implementation, in_place)
    return implementation.cppo_loss(views, *rows, num_items, config, **options)


def linear_cppo_loss(
    hidden: Tensor | Views,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    suppressed: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    removed_logps: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: float | Tensor | NumItems | None = None,
    config: LossConfig = LossConfig(),  # noqa: B008  (frozen)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    logits_dtype: str = "fp32",
    backend: str = "auto",
) -> LossOutput:
    """`cppo_loss` of the logits of an LM head, which fused backends never hold.

    Specification: `cppo.reference.linear_cppo_loss`. The logits, and what `weight`, `bias`,
    `suppressed`, `logit_scale`, `softcap` and `logits_dtype` may be: as in `linear_token_stats`.

    Args:
        hidden: the anchor's (B, L, D), or packed (T, D) with cu_seqlens; or `Views` of three, the
            perturbed ones whole or compact as in `cppo_loss`. fp16, bf16, fp32 or fp64.
            Gradients flow.
        weight: (V, D) LM head of hidden's dtype; gradients flow.
        targets: (B, L) or (T,) integer in [0, V) where not masked, anything elsewhere.
        advantages: (B,) floating and finite, one per completion. No gradients flow.
        bias: (V,) of hidden's dtype; gradients flow. None: 0.
        suppressed: (K,) int64, tokens that are never sampled. None: none.
        old_logps, ref_logps, sampling_logps, token_weights, removed_logps: as in `cppo_loss`.
        mask, cu_seqlens, num_items, config: as there.
        logit_scale, softcap: of the model's logits, > 0.
        logits_dtype: "fp32", or "input" for logits rounded to the dtype of hidden.
        backend: "auto", "reference", "cpp" or "triton".
    Under torch.autocast hidden, weight and bias are cast to its dtype, as F.linear does.
    Returns: a `LossOutput`. The loss is exactly 0, and attached, where nothing counts.
    Raises:
        ValueError, TypeError, RuntimeError: as `cppo_loss`; also for a weight, bias or suppressed
            whose shape, dtype, device or values do not fit.
    """
    op = "linear_cppo_loss"
    check_config(op, config)
    views, name = _as_views(op, "hidden", hidden)
    of_rows = (old_logps, ref_logps, sampling_logps, token_weights, removed_logps)
    rows = _Rows(targets, advantages, *of_rows, mask, cu_seqlens)
    rows = _checked_rows(op, name, views.anchor, rows, config)
    _check_views(op, "hidden", views, rows, config)
    _check_num_items(op, num_items, rows, config)
    scale, softcap = checked_scale(op, logit_scale, softcap)
    check_choice(op, "logits_dtype", logits_dtype, LOGITS_DTYPES)
    home = views.anchor.device
    dtype = autocast_dtype(home)
    views = Views(*cast(dtype, *views))
    with gathered(weight, bias, dtype=dtype) as (weight, bias):
        check_head(op, views.anchor, weight, bias, suppressed)
        check_targets(op, targets, rows.mask, weight.shape[0])
        implementation = backends.pick(op, weight, backend)
        views, rows = Views(*to(weight.device, *views)), _Rows(*to(weight.device, *rows))
        options = (config, softcap, scale, suppressed, logits_dtype)
        output = implementation.linear_cppo_loss(
            views, weight, *rows[:2], bias, *rows[2:], num_items, *options
        )
    metrics = {name: value.to(home) for name, value in output.metrics.items()}
    loss, logps, entropy, selected = to(home, *output[:4])
    return LossOutput(loss, logps, entropy, selected, metrics)
