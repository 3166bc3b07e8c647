"""What a model says of a few short sequences: by itself, and by each way in which it is run here.

packed     all in one stream, as in an update
shared     the prompt that two of them have in common once in the stream, as with share_prompts
padded     as a padded batch, as in an update of a model that cannot be packed
decoded    padded on the left, token by token with a cache, as in a rollout
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cppo.model.forward import Attention, LMHead, Stream, cache_argument, lm_head, run_packed
from cppo.model.images import (
    ImageBatch,
    has_three_rows,
    image_arguments,
    image_token_mask,
    no_images,
    rotary_positions,
    sees_prompt_both_ways,
    token_types,
)
from cppo.model.padded import run_padded
from cppo.model.shared_prompts import share_prompts
from cppo.model.wrappers import unwrap
from cppo.ops.pack import pack_completions

# Tokens of the two sequences of text, which begin alike, and tokens of that beginning.
LENGTHS, PROMPT = (8, 6), 4
# Tokens behind a prompt with images, which two sequences have in common.
_ANSWERS = (3, 2)

Pairs = Iterator[tuple[str, tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Case:
    """A few sequences.

    Args:
        ids: (B, L) int64; behind a sequence stand any tokens.
        lengths: tokens of each.
        prompts: tokens of each one's prompt.
        questions: of each; those of one question have their prompt in common, one after the other.
        images: of the questions.
    """

    ids: Tensor
    lengths: Sequence[int]
    prompts: Sequence[int]
    questions: Sequence[int]
    images: ImageBatch

    @property
    def has_images(self) -> bool:
        return any(self.images.per_question)

    def column(self, values: Sequence[int]) -> Tensor:
        """(B, 1), on the device of the tokens."""
        return torch.tensor(list(values), device=self.ids.device)[:, None]

    def stream(self, base: Any, prompts: Sequence[int]) -> Stream:
        """All of them in one stream."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        mask = place < self.column(self.lengths)
        batch = pack_completions(self.ids, mask, mask & (place >= self.column(prompts)))
        positions = self.positions(base, self.ids, mask)
        flat = None if positions is None else positions.flatten(1)[:, batch.token_index]
        return Stream(batch, flat, self.images, self.questions)

    def positions(self, base: Any, ids: Tensor, mask: Tensor) -> Tensor | None:
        """(3, B, L) rotary positions of the sequences, padded anywhere."""
        grid = self.images.of(self.questions).joined("image_grid_thw")
        return rotary_positions(base, ids, mask, grid)


def text_case(base: Any) -> Case:
    """Two sequences that begin alike."""
    longest = max(LENGTHS)
    chosen = ordinary_tokens(base, 2 * longest - PROMPT)
    first, rest = chosen[:longest], chosen[longest:]
    ids = torch.stack([first, torch.cat([first[:PROMPT], rest])])
    return Case(ids, LENGTHS, (PROMPT, PROMPT), (0, 0), no_images(1))


def image_case(base: Any, prompt: Tensor, images: ImageBatch) -> Case:
    """Two answers to a question with images, and a sequence without.

    Args:
        prompt: (P,) int64, the question's tokens.
        images: of this question.
    """
    answers = ordinary_tokens(base, sum(_ANSWERS)).split(list(_ANSWERS))
    rows = [*(torch.cat([prompt, own]) for own in answers), ordinary_tokens(base, LENGTHS[1])]
    size, none = len(prompt), no_images(1)
    return Case(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        [len(row) for row in rows],
        (size, size, PROMPT),
        (0, 0, 1),
        ImageBatch(
            images.prepared + none.prepared,
            images.per_question + none.per_question,
            images.tokens + none.tokens,
        ),
    )


def ordinary_tokens(base: Any, count: int) -> Tensor:
    """(count,) tokens that all differ, none of them special."""
    table = base.get_input_embeddings().weight
    named = {**vars(base.config.get_text_config()), **vars(base.config)}
    special = {value for name, value in named.items() if "token" in name and type(value) is int}
    ordinary = [token for token in range(table.shape[0]) if token not in special]
    chosen = [ordinary[i * len(ordinary) // count] for i in range(count)]
    return torch.tensor(chosen, device=table.device)


def pairs(model: Any, case: Case, *, packed: bool, shares: bool) -> Pairs:
    """Logits by each way of calling the model, and the model's own for the same tokens.

    Args:
        packed: by a stream; else by a padded batch.
        shares: with shared prompts, too.
    """
    base, head = unwrap(model), lm_head(model)
    alone = _Alone(model, case)
    own = alone.logits(case.prompts)
    if alone.hidden is not None:
        hidden = alone.hidden[0, : case.lengths[0]]
        yield "by its LM head", (head.logits(hidden), own[0])

    def compared(prompts: Sequence[int], run: Callable[..., Tensor], shares: bool = False) -> Any:
        stream = case.stream(base, prompts)
        if shares:
            shared = share_prompts(stream.batch, list(case.questions))
            stream = stream._replace(shared=shared)
        hidden = run(model, stream)
        sizes = zip(alone.logits(prompts), prompts, strict=True)
        return head.logits(hidden), torch.cat([row[prompt - 1 : -1] for row, prompt in sizes])

    # Without images every token but the first is looked at.
    prompts = case.prompts if case.has_images else (1,) * len(case.ids)
    if packed:
        yield "on packed sequences", compared(prompts, run_packed)
    else:
        yield "on padded sequences", compared(prompts, run_padded)
    if shares:
        together = compared(case.prompts, run_packed, shares=True)
        yield "on packed sequences that share a prompt", together
    ends = [length - 1 for length in case.lengths]
    last = torch.stack([row[-2:] for row in alone.logits(ends)])
    yield "on prompts padded to one length, with a cache", (_decoded(base, head, case), last)


class _Alone:
    """The model's own logits of each sequence, by its eager attention.

    hidden: what its head was given for the first one; a model that goes around its own body shows
    none.
    """

    hidden: Tensor | None = None

    def __init__(self, model: Any, case: Case) -> None:
        self._model, self._case = model, case
        self._found: dict[tuple[int, ...], list[Tensor]] = {}

    def logits(self, prompts: Sequence[int]) -> list[Tensor]:
        """(L, V) of each."""
        # Where a prompt ends changes only a model whose prompts see themselves both ways.
        key = tuple(prompts) if sees_prompt_both_ways(unwrap(self._model)) else ()
        if key not in self._found:
            self._found[key] = self._run(prompts)
        return self._found[key]

    def _run(self, prompts: Sequence[int]) -> list[Tensor]:
        base, case = unwrap(self._model), self._case
        attention = Attention.of(base)
        seen: list[Tensor] = []
        hook = base.model.register_forward_hook(
            lambda *call: seen.append(call[-1].last_hidden_state)
        )
        # Without images they are one batch: every sequence is alone in its row.
        parts = (
            [[row] for row in range(len(case.ids))]
            if case.has_images
            else [[*range(len(case.ids))]]
        )
        with hook:
            base.set_attn_implementation("eager")
            found = [row for part in parts for row in self._alone(part, prompts)]
        attention.restore()
        self.hidden = seen[0] if seen else None
        return [row[:length] for row, length in zip(found, case.lengths, strict=True)]

    def _alone(self, rows: list[int], prompts: Sequence[int]) -> Tensor:
        base, case = unwrap(self._model), self._case
        width = case.lengths[rows[0]] if len(rows) == 1 else case.ids.shape[1]
        ids = case.ids[rows, :width]
        types = token_types(
            base, ids, torch.arange(width, device=ids.device) >= case.column(prompts)[rows]
        )
        if case.has_images and has_three_rows(base):  # it finds its positions by itself
            types = {"mm_token_type_ids": image_token_mask(base, ids).int()}
        return self._model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            **types,
            **case.images.prepared[case.questions[rows[0]]],
        ).logits


def _decoded(base: Any, head: LMHead, case: Case) -> Tensor:
    """(B, 2, V) logits of the last two tokens, the last one with a cache, as the sampler does."""
    from cppo.model.cache import completion_cache, prompt_cache

    cache = prompt_cache(base)
    longest = max(case.lengths)
    place = torch.arange(longest, device=case.ids.device) - (longest - case.column(case.lengths))
    rows, mask = case.ids.gather(1, place.clamp(min=0)), (place >= 0).long()
    rows = rows.where(mask.bool(), 0)
    positions = case.positions(base, rows, mask)
    if positions is None:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids = rows[:, :-1]
    more = token_types(base, ids) | image_arguments(base, case.images, case.questions)
    logits = []
    for start, stop in ((0, longest - 1), (longest - 1, longest)):
        output = base.model(
            input_ids=rows[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[..., start:stop],
            use_cache=True,
            **cache_argument(base, cache),
            **more,
        )
        logits.append(head.logits(output.last_hidden_state[:, -1]))
        if not start:
            cache, more = completion_cache([cache], 1, 1), {}
    return torch.stack(logits, dim=1)
