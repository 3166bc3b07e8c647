"""The forward of a stream's sequences as a padded batch, for models that cannot be packed.

Masks, positions and attention are the model's own, as in `generate`; what it costs is padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cppo.model.images import ImageBatch, image_arguments, token_types
from cppo.model.wrappers import unwrap
from cppo.ops.packed_batch import PackedBatch


def run_padded(
    model: nn.Module,
    batch: PackedBatch,
    positions: Tensor | None = None,
    images: ImageBatch | None = None,
    image_of: Sequence[int] = (),
) -> Tensor:
    """`cppo.packed_hidden` by a padded batch: its arguments and what it returns are the same."""
    base = unwrap(model)
    starts, lengths = batch.cu_seqlens[:-1], batch.cu_seqlens.diff()
    numbers = torch.arange(len(lengths), device=lengths.device)
    row = numbers.repeat_interleave(lengths, output_size=len(batch.input_ids))
    column = torch.arange(len(row), device=row.device) - starts[row]

    def padded(stream: Tensor) -> Tensor:
        whole = stream.new_zeros(*stream.shape[:-1], len(lengths), batch.max_seqlen)
        whole[..., row, column] = stream
        return whole

    is_response = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    is_response[batch.rows + 1] = True
    input_ids = padded(batch.input_ids)
    # On the right: what follows a token changes nothing. Positions then are the model's own.
    own = {} if positions is None else {"position_ids": padded(positions)}
    output = base.model(
        input_ids=input_ids,
        attention_mask=padded(torch.ones_like(batch.input_ids)),
        use_cache=False,
        **own,
        **token_types(base, input_ids, padded(is_response)),
        **image_arguments(base, images, image_of),
    )
    return output.last_hidden_state[row[batch.rows], column[batch.rows]]
