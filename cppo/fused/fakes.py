"""Shapes and dtypes of what the fused ops return, for torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cppo.fused.head import dtype_of_logits
from cppo.fused.schema import COEFFICIENTS, CONTRASTS, SAVED, TERMS, from_text


def accumulator(logits: Tensor) -> torch.dtype:
    """The dtype of every statistic: fp32, or fp64 for fp64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _new(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=accumulator(like))


def _like(tensor: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)


def token_stats(logits, targets, mask, places, temperature, inplace):
    shape = targets.shape
    saved = _new(logits, len(SAVED), targets.numel())
    return _new(logits, *shape), _new(logits, *shape), saved


def token_stats_backward(grad_logps, grad_entropy, logits, *rest):
    return logits.new_empty(logits.shape)


def perception_mask(anchor_entropy, negative_entropy, fraction, mask, cu_seqlens):
    return anchor_entropy.new_empty(anchor_entropy.shape, dtype=torch.bool)


def contrast(anchor, positive, negative, mask, *rest):
    return _new(anchor, len(CONTRASTS), mask.numel())


def contrast_backward(anchor, positive, negative, *rest):
    return tuple(_like(view, anchor) for view in (anchor, positive, negative))


def loss_terms(logps, *rest):
    return _new(logps), _new(logps, len(TERMS)), _new(logps, len(COEFFICIENTS), logps.numel())


def _loss(anchor: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    shape = targets.shape
    return (
        _new(anchor),
        _new(anchor, *shape),
        _new(anchor, *shape),
        anchor.new_empty(shape, dtype=torch.bool),
        _new(anchor, len(TERMS)),
        anchor.new_empty((), dtype=torch.int64),
        anchor.new_empty((), dtype=torch.int64),
    )


def cppo_loss(anchor, positive, negative, targets, *rest):
    rows, config = targets.numel(), from_text(rest[-2])
    of_positive = len(CONTRASTS) if config.divergence == "full" else len(SAVED)
    saved = (
        _new(anchor, len(SAVED), rows),
        anchor.new_empty(0) if positive is None else _new(anchor, of_positive, rows),
        anchor.new_empty(0) if negative is None else _new(anchor, len(SAVED), rows),
    )
    return *_loss(anchor, targets), *saved, _new(anchor, len(COEFFICIENTS), rows)


def cppo_loss_backward(grad_loss, anchor, positive, negative, *rest):
    return contrast_backward(anchor, positive, negative)


def linear_token_stats(hidden, weight, bias, suppressed, targets, *rest):
    *_, softcap, logits_dtype, keeps = rest
    rows = targets.numel() if keeps else 0
    dtype = dtype_of_logits(weight, bias, softcap, logits_dtype)
    logits = weight.new_empty((rows, len(weight)), dtype=dtype)
    shape = targets.shape
    return _new(hidden, *shape), _new(hidden, *shape), logits, _new(hidden, len(SAVED), rows)


def _gradients(inputs: tuple[Any, ...], wants: list[bool], dtype: torch.dtype) -> tuple[Any, ...]:
    like = next(value for value in inputs if value is not None)
    return tuple(
        like.new_empty(value.shape if want and value is not None else 0, dtype=dtype)
        for value, want in zip(inputs, wants, strict=True)
    )


def linear_token_stats_backward(grad_logps, grad_entropy, hidden, weight, bias, *rest):
    return _gradients((hidden, weight, bias), rest[-1], hidden.dtype)


def linear_cppo_loss(anchor, positive, negative, weight, bias, suppressed, targets, *rest):
    *_, wants, resident = rest
    wants = wants if resident else [False] * len(wants)
    coefficients = _new(anchor, len(COEFFICIENTS), targets.numel())
    work = anchor.new_empty(2, dtype=torch.int64)
    inputs = (anchor, positive, negative, weight, bias)
    gradients = _gradients(inputs, wants, accumulator(anchor))
    return *_loss(anchor, targets), work, coefficients, *gradients


def linear_cppo_loss_backward(grad_loss, anchor, positive, negative, weight, bias, *rest):
    inputs = (anchor, positive, negative, weight, bias)
    return _gradients(inputs, rest[-1], anchor.dtype)


def nothing(*arguments: Any) -> None:
    """Of an op that writes into its arguments."""


def fake(op: str) -> Callable[..., Any]:
    """That of an op, by its name."""
    return nothing if op.endswith("_") else globals()[op]
