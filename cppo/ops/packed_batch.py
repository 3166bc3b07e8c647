"""Completions as one stream without padding, and the way back to the padded batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from cppo import backends
from cppo.records import map_tensors


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
        several = values if isinstance(values, Mapping) else {"values": values}
        for name, value in several.items():
            if value.shape != self.target_index.shape:
                label = f"values[{name!r}]" if isinstance(values, Mapping) else name
                raise ValueError(
                    f"cppo.PackedBatch.unpack: {label} must be (T,) = "
                    f"{tuple(self.target_index.shape)}, got {tuple(value.shape)}"
                )
        implementation = backends.pick("unpack", self.target_index)
        placed = implementation.unpack(list(several.values()), self.target_index, *self.shape)
        return dict(zip(several, placed, strict=True)) if isinstance(values, Mapping) else placed[0]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        return map_tensors(self, lambda tensor: tensor.to(device))
