"""The small immutable records that flow from one stage to the next.

Symbols, used in every docstring of the package: B completions, G completions per question, K kept
completions, L padded length, S packed tokens (prompt + response), T response tokens, V vocabulary,
D hidden size. The three views of a question are called anchor, positive and negative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

_T = TypeVar("_T")


class Views(NamedTuple):
    """One tensor per view: the original image, an information-preserving and a removing one.

    `positive` and `negative` are None where only the anchor exists (plain GRPO, text models).
    """

    anchor: Tensor
    positive: Tensor | None = None
    negative: Tensor | None = None


class TokenStats(NamedTuple):
    """Log-probability of each target and entropy of each row, fp32 or better, in nats."""

    logps: Tensor
    entropy: Tensor


class Dependency(NamedTuple):
    """How much tokens and completions depend on the image; of `cppo.visual_dependency`.

    token_weights, per_token: like the log-probabilities, fp32 or better, zero where masked: what
    the losses take, and S. per_completion: (B,) fp64, the mean S of each; NaN: not known.
    """

    token_weights: Tensor
    per_token: Tensor
    per_completion: Tensor


class NumItems(NamedTuple):
    """Sizes of the whole batch of which one call sees a part (a micro-batch, a rank's share).

    Passed as `num_items`, they make the sum over the parts equal to the loss of the whole.
    `selected` is needed only for `cpl_reduction="token"`, whose denominator is not known before
    the forward pass; without it the part's own count is used, weighted by the part's share.
    """

    completions: int | Tensor
    tokens: int | Tensor
    selected: int | Tensor | None = None


class LossOutput(NamedTuple):
    """What the two losses return.

    loss: 0-dim, differentiable. logps, entropy: detached, of the anchor, in the input's layout,
    zero at masked rows. perception_mask: bool, same layout. metrics: {name: 0-dim detached}:

    policy_loss, cpl_loss: their parts of the loss, before cpl_coef.
    entropy, clip_fraction, kl: means over completions of the token mean ("grpo") or over tokens
    ("dapo", "dr_grpo"); of a batch in parts, what each part adds to the mean of the whole.
    papo/kl: how much the tokens depend on the image, a mean like kl.
    perception_share: selected tokens / tokens of completions whose perturbed views count;
    num_selected: the former. head_gemm_rows, head_resident_rows: what a fused head multiplied.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor
    perception_mask: Tensor
    metrics: dict[str, Tensor]


def map_tensors(value: _T, change: Callable[[Tensor], Tensor]) -> _T:
    """A copy of `value` in which every tensor is replaced by `change(tensor)`.

    Args:
        value: a tensor, or dataclasses, tuples, lists and dicts that hold some, however nested.
            Everything else in it stays the same object.
        change: for example `lambda x: x.to("cpu")`.
    """
    result: Any = value
    if isinstance(value, Tensor):
        result = change(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
        result = dataclasses.replace(value, **map_tensors(fields, change))
    elif isinstance(value, dict):
        result = {key: map_tensors(part, change) for key, part in value.items()}
    elif isinstance(value, (list, tuple)):
        parts = [map_tensors(part, change) for part in value]
        result = type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return result
