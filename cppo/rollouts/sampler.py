"""The decoding loop: a question's prompt is run once, its completions start from its cache.

`generate` of transformers gives the same greedy tokens (a test compares them) but runs finished
rows until the last one ends, and fills in sampling options that a checkpoint brings along. Here the
next token is drawn from softmax(logits / temperature) and from nothing else, so that the
log-probabilities of the loss are those of the distribution that was sampled.

A GPU is never waited for within a token: which completions have ended is asked every few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cppo.model.cache import can_be_joined, completion_cache, prompt_cache, select_rows
from cppo.model.forward import LMHead, cache_argument, lm_head
from cppo.model.images import image_arguments, token_types
from cppo.model.prompts import Prompts
from cppo.model.wrappers import unwrap

# Finished rows leave the batch once they are this share of it: dropping copies the cache.
_DROP_SHARE = 0.2
# Tokens from one look at what has ended to the next. On a CPU looking is free.
_LOOK_EVERY = {"cpu": 1}
_LOOK_EVERY_ELSEWHERE = 8
# Prompt tokens, padding included, that are run at once: their activations are the largest there.
_PREFILL_TOKENS = 16_384
# Of the vocabulary; the first draw is among blocks, the second within one.
_BLOCK = 128


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        group_size: completions of each prompt.
        max_new_tokens: tokens of a completion at most.
        temperature: of the softmax; None takes the most probable token.
        suppressed: token ids that are never drawn.
        closing: token ids that end a completion; they are part of it.
        pad: token id behind the end.
    """

    group_size: int
    max_new_tokens: int
    temperature: float | None
    suppressed: Sequence[int] = ()
    closing: Sequence[int] = ()
    pad: int = 0


@dataclass(frozen=True)
class Draws:
    """A uniform number for each token of each completion, whichever are decoded together.

    Args:
        seed: of all completions of a call.
        count: how many there are.
        own: those that are decoded here.
    """

    seed: int
    count: int
    own: slice

    def start(self, device: torch.device) -> Callable[[], Tensor]:
        """What gives the numbers of the next token: fp64 in [0, 1), one per own completion."""
        generator = torch.Generator(device).manual_seed(self.seed)
        options: Any = {"dtype": torch.float64, "device": device, "generator": generator}
        return lambda: torch.rand(self.count, **options)[self.own]


class Sampled(NamedTuple):
    """Completions of Q prompts, those of a prompt next to each other: B = Q x group_size rows.

    tokens: (B, T) int64, padded on the right behind the closing token.
    logps: (B, T) fp32, with which each token was sampled: of the softmax of the logits, divided by
    the temperature (by 1 where the most probable token is taken), without the suppressed tokens;
    0 behind the end.
    """

    tokens: Tensor
    logps: Tensor


@torch.no_grad()
def decode(model: nn.Module, prompts: Prompts, sampling: Sampling, draws: Draws) -> Sampled:
    """Completions of Q prompts.

    Args:
        model: in eval mode, with the attention of `cppo.model.forward.set_attention`.
        draws: of these Q x group_size completions.
    Raises: FloatingPointError for hidden states that are not finite, and for logits that say
        nothing: not a number, all -inf, or too large for their temperature.
    """
    rows = _run_prompts(unwrap(model), prompts, sampling)
    device, count = rows.hidden.device, len(rows.hidden)
    head = lm_head(model, sampling.suppressed, _compute_dtype(rows.hidden))
    end = torch.tensor(list(sampling.closing), dtype=torch.int64, device=device)
    tokens = torch.full((sampling.max_new_tokens, count), sampling.pad, device=device)
    logps = torch.zeros(tokens.shape, device=device)
    longest = torch.zeros((), dtype=torch.int64, device=device)
    next_draws = draws.start(device)
    for step in range(sampling.max_new_tokens):
        uniform = next_draws()[rows.numbers]
        drawn, logp = _draw(rows.hidden, head, sampling.temperature, uniform)
        longest += rows.is_open.any()
        tokens[step].index_copy_(0, rows.numbers, drawn.where(rows.is_open, sampling.pad))
        logps[step].index_copy_(0, rows.numbers, logp.where(rows.is_open, 0))
        rows.is_open &= (drawn[:, None] != end).all(1)
        if step + 1 == sampling.max_new_tokens:
            break
        if (step + 1) % _LOOK_EVERY.get(device.type, _LOOK_EVERY_ELSEWHERE) == 0:
            left = rows.look()
            if not left:
                break
            if len(left) < (1 - _DROP_SHARE) * len(drawn):
                drawn = rows.keep(left, drawn)
        rows.run(drawn, step)
    rows.look()
    # Where a softmax is not a number, some token was drawn all the same.
    if bad := int(logps.isnan().any(0).sum()):
        raise FloatingPointError(
            f"cppo.rollouts: the model's logits are not finite in {bad} of {count} completions: "
            "nothing can be sampled from them"
        )
    return Sampled(tokens[: int(longest)].T, logps[: int(longest)].T)


@dataclass
class _Rows:
    """The B completions that are being drawn, after prompts of L tokens.

    Args:
        hidden: (B, D) of the last token.
        mask: (B, L + max_new_tokens) int64, what may be attended to; all of the tokens to come.
        position: (B,) int64, of a completion's first token.
        numbers: (B,) int64, of the completions among those that there were at first.
        is_open: (B,) bool, whether a completion goes on.
        length: L.
        has_three: whether there are three rotary positions of a token.
    """

    base: Any
    cache: Any
    hidden: Tensor
    mask: Tensor
    position: Tensor
    numbers: Tensor
    is_open: Tensor
    length: int
    has_three: bool

    def look(self) -> list[int]:
        """Which rows go on: the one place that waits for the device."""
        is_finite = self.hidden.isfinite().all(1)
        states = torch.where(is_finite, self.is_open.long(), 2).tolist()
        if 2 in states:
            raise FloatingPointError(
                f"cppo.rollouts: the model's hidden states are not finite in {states.count(2)} of "
                f"{len(states)} completions: nothing can be sampled from them"
            )
        return [row for row, state in enumerate(states) if state]

    def keep(self, left: list[int], drawn: Tensor) -> Tensor:
        """Keeps some rows; returns their tokens."""
        index = torch.tensor(left, device=drawn.device)
        select_rows(self.cache, index)
        for name in ("hidden", "mask", "position", "numbers", "is_open"):
            setattr(self, name, getattr(self, name)[index])
        return drawn[index]

    def run(self, drawn: Tensor, step: int) -> None:
        """Runs the model on the tokens of a step, (B,) int64."""
        place = (self.position + step)[:, None]
        self.hidden = _last_hidden(
            self.base,
            self.cache,
            drawn[:, None],
            self.mask[:, : self.length + step + 1],
            place.expand(3, -1, -1) if self.has_three else place,
        )


def _run_prompts(base: Any, prompts: Prompts, sampling: Sampling) -> _Rows:
    """Runs the prompts, each once and as many together as `_PREFILL_TOKENS` has room for."""
    count, length = prompts.input_ids.shape
    mask = prompts.attention_mask.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    positions = positions if prompts.positions is None else prompts.positions
    caches, outputs, first = [prompt_cache(base)], [], 0
    together = max(1, _PREFILL_TOKENS // length) if can_be_joined(caches[0]) else count
    for first in range(0, count, together):
        part = range(first, min(first + together, count))
        own = slice(part.start, part.stop)
        caches += [prompt_cache(base)] if first else []
        images = None if prompts.images is None else prompts.images.of(part)
        outputs.append(
            _last_hidden(
                base,
                caches[-1],
                prompts.input_ids[own],
                mask[own],
                positions[..., own, :],
                **token_types(base, prompts.input_ids[own]),
                **image_arguments(base, images, range(len(part))),
            )
        )
    group, room = sampling.group_size, sampling.max_new_tokens
    cache = completion_cache(caches, group, room)
    # All rotary rows of a text token are equal, and go on from the prompt's highest.
    highest = positions if prompts.positions is None else positions.amax(0)
    of_prompts = torch.cat(outputs), F.pad(mask, (0, room), value=1), highest.amax(1) + 1
    hidden, mask, position = (x.repeat_interleave(group, 0) for x in of_prompts)
    numbers = torch.arange(len(hidden), device=hidden.device)
    is_open = torch.ones_like(numbers, dtype=torch.bool)
    has_three = prompts.positions is not None
    return _Rows(base, cache, hidden, mask, position, numbers, is_open, length, has_three)


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


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """What the LM head computes in: cast once, and not by autocast for every token."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _draw(
    hidden: Tensor, head: LMHead, temperature: float | None, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """(B,) tokens after (B, D) hidden states and their log-probabilities, fp32.

    Args:
        uniform: (B,) fp64 in [0, 1).
    """
    logits = head.logits(hidden.to(head.weight.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature is None:
        drawn = logits.argmax(-1)
        return drawn, (logits.gather(1, drawn[:, None])[:, 0] - logits.logsumexp(-1)).float()
    weights = torch.softmax(logits.div_(temperature), -1)
    drawn = inverse_cdf(weights, uniform)
    return drawn, weights.gather(1, drawn[:, None])[:, 0].log().float()


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first token at which the sum of the weights exceeds `uniform` times their sum.

    Specification: token v has the probability of its share of the weights; one of weight 0 never
    comes. The draw is among blocks of the vocabulary first, then within the block; running sums are
    fp64.
    Args:
        weights: (B, V) not negative, fp32 or fp64, with a positive sum in each row.
        uniform: (B,) fp64 in [0, 1).
    Returns: (B,) int64. Of a row that is not finite: some token.
    """
    last = weights.shape[1] - 1
    whole = weights.shape[1] // _BLOCK
    blocks = weights[:, : whole * _BLOCK].unflatten(1, (whole, _BLOCK))
    rest = weights[:, whole * _BLOCK :]
    sums = torch.cat([blocks.sum(2), rest.sum(1, keepdim=True)], 1).double()
    block, aim = _first_above(sums, uniform[:, None] * sums.sum(1, True))
    column = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, column.clamp(max=last)).double().masked_fill(column > last, 0)
    place, _ = _first_above(inside, aim)
    return (block * _BLOCK + place)[:, 0].clamp(max=last)


def _first_above(weights: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1) first columns at which the running sum exceeds `aim`, and what of it is left there."""
    ends = weights.cumsum(1)
    # Rounding may bring it to the sum itself, which nothing exceeds.
    aim = torch.minimum(aim, ends[:, -1:].nextafter(aim.new_zeros(())))
    column = torch.searchsorted(ends, aim, right=True).clamp(max=weights.shape[1] - 1)
    return column, (aim - (ends - weights).gather(1, column)).clamp(min=0)
