"""The small immutable records that flow from one stage to the next.

Symbols, used in every docstring of the package: B completions, G completions per question, K kept
completions, L padded length, S packed tokens (prompt + response), T response tokens, V vocabulary,
D hidden size. The three views of a question are called anchor, positive and negative.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor


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
    perception_share: selected tokens / tokens of completions whose perturbed views count;
    num_selected: the former. head_gemm_rows, head_resident_rows: what a fused head multiplied.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor
    perception_mask: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class PackedBatch:
    """Kept completions as one padding-free stream (the varlen form of flash-attn).

    Args:
        input_ids: (S,) the attended tokens of the kept completions, one after the other.
        position_ids: (S,) int64, restarting at 0 in every completion.
        cu_seqlens: (K+1,) int32, where each completion starts and ends in the stream.
        max_seqlen: length of the longest completion with its prompt, in tokens.
        kept: (K,) int64, the rows of the padded batch that are in the stream.
        rows: (T,) int64, positions in the stream whose next token is a response token.
        targets: (T,) int64, those response tokens.
        row_cu_seqlens: (K+1,) int32, where each completion starts and ends among the rows.
        token_index: (S,) int64, flat position of every packed token in the padded (B, L).
        target_index: (T,) int64, flat position of every target in the padded (B, L).
        shape: (B, L) of the padded batch.
        per_token: {name: (T,)} the tensors that were packed along, at the target positions.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    kept: Tensor
    rows: Tensor
    targets: Tensor
    row_cu_seqlens: Tensor
    token_index: Tensor
    target_index: Tensor
    shape: tuple[int, int]
    per_token: dict[str, Tensor] = field(default_factory=dict)

    @overload
    def unpack(self, values: Tensor) -> Tensor: ...
    @overload
    def unpack(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def unpack(self, values: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Puts per-target values back at their places in the padded batch.

        Args:
            values: (T,) any dtype, aligned with `targets`; gradients flow. A mapping of such
                tensors is unpacked in one launch.
        Returns: (B, L), zero everywhere else; a dict of them for a mapping.
        Raises: ValueError if `values` is not (T,).
        """
        # Not at the top: the ops are written in terms of these records.
        from cppo.ops.pack import unpack

        return unpack(values, self.target_index, self.shape)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        moved["per_token"] = {name: value.to(device) for name, value in self.per_token.items()}
        return PackedBatch(**moved)
