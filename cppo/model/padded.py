"""The forward of a stream's sequences as a padded batch, for models that cannot be packed.

Masks, positions and attention are the model's own, as in `generate`; what it costs is padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cppo.model.forward import Stream
from cppo.model.images import image_arguments, token_types
from cppo.model.wrappers import unwrap


def run_padded(model: nn.Module, stream: Stream) -> Tensor:
    """What `cppo.packed_hidden` returns, by a padded batch. Prompts are not shared."""
    base = unwrap(model)
    batch, positions, images, image_of, _ = stream
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
