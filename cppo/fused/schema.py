"""The schemas of the fused ops, once for every backend.

Two `torch.library` namespaces implement them: `cppo` is the C++ extension, `cppo_triton` the Triton
kernels. A backend is its primitives; everything else is composed of them in Python.

    token_stats        log-probability and entropy of every row of logits
    perception_mask    the tokens whose entropy rises most
    contrast           KL(anchor || positive) - KL(anchor || negative) over the whole vocabulary
    loss_terms         the loss of the statistics, and its derivatives
    *_backward         the gradient of the logits, in one pass over them
    *_backward_        the same, written into the logits

T rows of logits, one per token; B completions. Per-row tensors are fp32 (fp64 for fp64 logits).

The options of the loss are one argument, `LossConfig.text`: "temperature=1.0 clip_low=0.2 ...".
The temperature of the logits is an argument of its own, because a scaled head divides by another.

A perturbed view of logits may hold the rows of gated completions alone. `places` (T,) int64 says
where row i of the batch lies in it; a row without a place is never named by a mask.
"""

from __future__ import annotations

from collections import namedtuple
from functools import lru_cache
from typing import Any

from cppo.options.loss import LossConfig

# Rows of `saved`, which the backward of a row of logits z needs: with x = (z - reference) /
# temperature the sum of e^x, and the mean of x under the softmax.
SAVED = ("reference", "sum", "mean")
# Rows of `contrasts`: the same of both perturbed views, and what `contrast` is there for.
CONTRASTS = (
    "positive_reference",
    "positive_sum",
    "negative_reference",
    "negative_sum",
    "margin",
)
# Rows of `coefficients`: the derivatives of the loss. With the full divergence the third is that
# by the margin, and the last is zero.
COEFFICIENTS = ("anchor_logp", "anchor_entropy", "positive_logp", "negative_logp")
# What `loss_terms` returns besides the loss.
TERMS = ("policy_loss", "entropy", "clip_fraction", "kl", "papo/kl", "cpl_loss")

_STATS = "Tensor logits, Tensor targets, Tensor? mask, Tensor? places"
_STATS_GRADIENTS = "Tensor? grad_logps, Tensor? grad_entropy"
_CONTRAST_BACKWARD = (
    "Tensor targets, Tensor? positive_places, Tensor? negative_places, Tensor saved, "
    "Tensor contrasts, Tensor coefficients, float temperature, bool detach_anchor"
)

PRIMITIVES = {
    "token_stats": f"({_STATS}, float temperature, bool inplace) -> (Tensor, Tensor, Tensor)",
    "token_stats_backward": f"({_STATS_GRADIENTS}, {_STATS}, Tensor saved, float temperature) "
    "-> Tensor",
    "token_stats_backward_": f"({_STATS_GRADIENTS}, "
    f"{_STATS.replace('Tensor', 'Tensor(a!)', 1)}, Tensor saved, float temperature) -> ()",
    "perception_mask": "(Tensor anchor_entropy, Tensor negative_entropy, float fraction, "
    "Tensor? mask, Tensor? cu_seqlens) -> Tensor",
    "contrast": "(Tensor anchor, Tensor positive, Tensor negative, Tensor mask, "
    "Tensor? positive_places, Tensor? negative_places, float temperature) -> Tensor",
    "contrast_backward": f"(Tensor anchor, Tensor positive, Tensor negative, {_CONTRAST_BACKWARD}) "
    "-> (Tensor, Tensor, Tensor)",
    "contrast_backward_": "(Tensor(a!) anchor, Tensor(b!) positive, Tensor(c!) negative, "
    f"{_CONTRAST_BACKWARD}) -> ()",
    # `denominators` (2,) fp64: of the policy terms, and of the contrastive term. `weights`: of the
    # clipped surrogates; None: 1.
    "loss_terms": "(Tensor logps, Tensor entropy, Tensor? positive_logps, Tensor? negative_logps, "
    "Tensor? margin, Tensor? selected, Tensor advantages, Tensor? old_logps, Tensor? ref_logps, "
    "Tensor? weights, Tensor? removed_logps, Tensor? mask, Tensor cu_seqlens, "
    "Tensor denominators, str config) "
    "-> (Tensor, Tensor, Tensor)",
}


_VIEWS = "Tensor anchor, Tensor? positive, Tensor? negative"
# `suppressed` (K,) int64: tokens that are never sampled.
_HEAD = "Tensor weight, Tensor? bias, Tensor? suppressed"
_LOGITS = "float? softcap, str logits_dtype"  # "fp32" or "input"
_ROWS = (
    "Tensor targets, Tensor advantages, Tensor? old_logps, Tensor? ref_logps, "
    "Tensor? sampling_logps, Tensor? token_weights, Tensor? removed_logps, Tensor? mask, "
    "Tensor? cu_seqlens, Tensor denominators, bool per_selected, float temperature, str config"
)
# `metrics` are TERMS.
_LOSS = (
    "Tensor loss, Tensor logps, Tensor entropy, Tensor selected, Tensor metrics, "
    "Tensor num_selected, Tensor num_gated"
)
_SAVED = "Tensor saved_anchor, Tensor saved_positive, Tensor saved_negative, Tensor coefficients"
_GRADIENTS = (
    "Tensor grad_anchor, Tensor grad_positive, Tensor grad_negative, Tensor grad_weight, "
    "Tensor grad_bias"
)
_GIVEN_BACKWARD = (
    f"Tensor targets, Tensor advantages, Tensor? mask, Tensor? cu_seqlens, {_SAVED}, "
    "float temperature, str config"
)

# `wants`: gradients of anchor, positive, negative, weight, bias.
COMPOSED = {
    "cppo_loss": f"({_VIEWS}, {_ROWS}, bool inplace) -> ({_LOSS}, {_SAVED})",
    "cppo_loss_backward": f"(Tensor grad_loss, {_VIEWS}, {_GIVEN_BACKWARD}) "
    "-> (Tensor, Tensor, Tensor)",
    "cppo_loss_backward_": "(Tensor grad_loss, Tensor(a!) anchor, Tensor(b!)? positive, "
    f"Tensor(c!)? negative, {_GIVEN_BACKWARD}) -> ()",
    # With `keeps` the last two results are the logits of all rows and what `token_stats` saved of
    # them, for a backward that writes its gradient into them; else they are empty.
    "linear_token_stats": f"(Tensor hidden, {_HEAD}, Tensor targets, Tensor? mask, "
    f"float temperature, {_LOGITS}, bool keeps) -> (Tensor, Tensor, Tensor, Tensor)",
    "linear_token_stats_backward": f"({_STATS_GRADIENTS}, Tensor hidden, {_HEAD}, Tensor targets, "
    "Tensor? mask, Tensor(a!)? kept_logits, Tensor? kept_saved, float temperature, "
    f"{_LOGITS}, bool[] wants) -> (Tensor, Tensor, Tensor)",
    # `work` is how many rows were multiplied and how many were resident. With `resident` there
    # are gradients, for a unit upstream gradient.
    "linear_cppo_loss": f"({_VIEWS}, {_HEAD}, {_ROWS}, {_LOGITS}, bool[] wants, "
    f"bool resident) -> ({_LOSS}, Tensor work, Tensor coefficients, {_GRADIENTS})",
    "linear_cppo_loss_backward": f"(Tensor grad_loss, {_VIEWS}, {_HEAD}, Tensor targets, "
    "Tensor advantages, Tensor? cu_seqlens, Tensor coefficients, float temperature, str config, "
    f"{_LOGITS}, bool[] wants) -> ({_GRADIENTS})",
}


def _record(op: str, text: str) -> Any:
    return namedtuple(op, [part.split(" ")[-1] for part in text.strip("()").split(", ")])  # noqa: PYI024


# Arguments of every op, and results of those that name them, as records: nothing below reads them
# by position.
ARGUMENTS = {
    op: _record(op, schema.split(" -> ")[0]) for op, schema in (PRIMITIVES | COMPOSED).items()
}
RESULTS = {
    op: _record(op, COMPOSED[op].split(" -> ")[1]) for op in ("cppo_loss", "linear_cppo_loss")
}


@lru_cache(maxsize=256)
def from_text(text: str) -> LossConfig:
    """The `LossConfig` of a `LossConfig.text`."""
    try:
        pairs = (pair.split("=") for pair in text.split(" "))
        return LossConfig(**{name: _value(value) for name, value in pairs})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"config must be the text of a LossConfig, got {text!r}: {error}"
        ) from None


def _value(text: str) -> Any:
    constants = {"None": None, "True": True, "False": False}
    if text in constants:
        return constants[text]
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        return text
