"""The decoding loop: a question's prompt is run once, its completions share the cache.

`generate` of transformers gives the same greedy tokens (a test compares them) but runs finished
rows until the last one ends, and fills in sampling options that a checkpoint brings along. Here the
next token is drawn from softmax(logits / temperature) and from nothing else, so that the
log-probabilities of the loss are those of the distribution that was sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cppo.model.forward import (
    ImageBatch,
    LMHead,
    cache_argument,
    image_arguments,
    lm_head,
    unwrap,
)

# Finished rows leave the batch once they are this share of it: dropping copies the cache.
_DROP_SHARE = 0.2


@torch.no_grad()
def decode(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor | None,
    images: ImageBatch | None,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float | None,
    suppressed: Sequence[int],
    closing: Sequence[int],
    pad: int,
) -> Tensor:
    """Completions of some prompts: (Q x group_size, tokens) int64, padded on the right.

    Args:
        model: in eval mode, with the attention of `cppo.model.forward.set_attention`.
        input_ids: (Q, L) int64, padded on the left.
        attention_mask: (Q, L) bool.
        positions: (3, Q, L) rotary positions of a vision-language model; None for a text model.
        images: the images of these Q questions; None without any.
        temperature: of the softmax; None takes the most probable token.
        suppressed: token ids that are never drawn.
        closing: token ids that end a completion; they are part of it.
        pad: token id behind the end.
    """
    from transformers import DynamicCache

    base = unwrap(model)
    cache = DynamicCache(config=base.config.get_text_config())
    text_positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    prompt_positions = text_positions if positions is None else positions
    vision = image_arguments(base, images, range(len(input_ids)))
    mask = attention_mask.long()
    hidden = _last_hidden(base, cache, input_ids, mask, prompt_positions, **vision)
    head = lm_head(model, suppressed, hidden.dtype)
    cache.batch_repeat_interleave(group_size)
    # All rotary rows of a text token are equal, and go on from the prompt's highest.
    last = text_positions if positions is None else positions.amax(0)
    of_prompts = hidden, mask, last.amax(1) + 1
    hidden, mask, position = (x.repeat_interleave(group_size, 0) for x in of_prompts)
    count, device = len(hidden), input_ids.device
    end = torch.tensor(closing, device=device)
    tokens = torch.full((count, max_new_tokens), pad, device=device)
    numbers = torch.arange(count, device=device)  # of the completions in the batch
    is_open = torch.ones(count, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        drawn = _draw(hidden, head, temperature)
        tokens[numbers[is_open], step] = drawn[is_open]
        is_open &= ~torch.isin(drawn, end)
        num_open = int(is_open.sum())
        if num_open == 0 or step + 1 == max_new_tokens:
            return tokens[:, : step + 1]
        if num_open < (1 - _DROP_SHARE) * len(numbers):
            left = is_open.nonzero()[:, 0]
            cache.batch_select_indices(left)
            numbers, drawn, mask = numbers[left], drawn[left], mask[left]
            position, is_open = position[left], is_open[left]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        place = (position + step)[:, None]
        place = place if positions is None else place.expand(3, -1, -1)
        hidden = _last_hidden(base, cache, drawn[:, None], mask, place)
    raise AssertionError("max_new_tokens is at least 1")


def _last_hidden(
    base: Any, cache: Any, ids: Tensor, mask: Tensor, position_ids: Tensor, **extra: Any
) -> Tensor:
    """Hidden states of the last token, with a cache of the earlier ones."""
    return base.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids,
        use_cache=True,
        **cache_argument(base, cache),
        **extra,
    ).last_hidden_state[:, -1]


def _draw(hidden: Tensor, head: LMHead, temperature: float | None) -> Tensor:
    logits = head.logits(hidden).float()
    if temperature is None:
        return logits.argmax(-1)
    return torch.multinomial(torch.softmax(logits / temperature, -1), 1)[:, 0]
