"""Questions in, sampled completions out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cppo.model.images import ImageBatch, no_images
from cppo.model.load import closing_token_ids
from cppo.model.prompts import Prompts, tokenizer_of
from cppo.questions import Question
from cppo.rollouts.engine import BuiltinEngine, Engine
from cppo.rollouts.sampler import Draws, Sampled, Sampling

Once = Callable[[Callable[[], Any]], Any]


@dataclass(frozen=True)
class Rollouts:
    """G sampled completions of each of Q questions: B = Q x G rows, a question's rows contiguous.

    Args:
        prompts: the questions.
        group_size: G.
        input_ids: (B, L) int64, prompt padded on the left, completion on the right.
        attention_mask: (B, L) bool, prompt and completion tokens.
        completion_mask: (B, L) bool, completion tokens with the closing one.
        positions: (3, B, L) rotary positions of a model with three rows of them, else None.
        completion_ids: the B completions as token ids, with the closing one.
        texts: the B completions, decoded without special tokens.
        truncated: (B,) bool, cut at the token limit.
        sampling_logps: (B, L) fp32, with which each completion token was sampled
            (`cppo.rollouts.engine.Sampled`), zero elsewhere; None: not known.
    """

    prompts: Prompts
    group_size: int
    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    positions: Tensor | None
    completion_ids: list[list[int]]
    texts: list[str]
    truncated: Tensor
    sampling_logps: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """(B,) int64 on the CPU: tokens of each completion, with the closing one."""
        return torch.tensor([len(ids) for ids in self.completion_ids], dtype=torch.int64)

    def question_of(self, row: int) -> Question:
        """The question of a row of the batch."""
        return self.prompts.questions[row // self.group_size]

    def generation_prompt_of(self, row: int) -> str:
        """What the chat template put before the completion of a row."""
        return self.prompts.generation_prompts[row // self.group_size]


def sample_completions(
    model: nn.Module,
    processor: Any,
    prompts: Prompts,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float | None,
    suppressed: Sequence[int] = (),
    batch_size: int = 1024,
    engine: Engine | None = None,
    once: Once = lambda generate: generate(),
) -> Rollouts:
    """Samples `group_size` completions of every question from the plain softmax of the policy.

    Args:
        model: the policy; it says which tokens end a text (`cppo.model.load.closing_token_ids`).
        prompts: Q encoded questions.
        group_size: completions per question.
        max_new_tokens: tokens of a completion at most.
        temperature: of the softmax; None: the greedy completion.
        suppressed: token ids that are never sampled.
        batch_size: completions generated at once at most; fewer where memory is short, and never
            less than one question's.
        engine: samples. None: the built-in loop on `model`.
        once: calls its argument, which generates such a batch, or returns what an earlier call
            gave; the seed of all of them goes through it, too.
    Returns: Rollouts, padded to the longest completion.
    Raises: EngineError if the engine cannot sample them.
    """
    sampling = sampling_of(
        model,
        processor,
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        suppressed=suppressed,
    )
    engine = engine or BuiltinEngine(model)
    parts: list[list[Tensor]] = []
    first = 0
    # Through `once` as well: what is generated after a stop has the numbers that it would have had.
    seed = int(once(lambda: torch.randint(2**62, ())))
    while first < len(prompts.questions):
        # What fits is found out where it is generated: a part of an earlier call may differ.
        call = functools.partial(_next_part, engine, prompts, first, sampling, batch_size, seed)
        parts.append([part.to(prompts.input_ids.device) for part in once(call)])
        first += len(parts[-1][0]) // group_size
    width = max(tokens.shape[1] for tokens, _ in parts)

    def joined(which: int, value: int) -> Tensor:
        own = [part[which] for part in parts]
        return torch.cat([F.pad(x, (0, width - x.shape[1]), value=value) for x in own])

    found = Sampled(joined(0, sampling.pad), joined(1, 0))
    return assembled(prompts, sampling, found, processor)


def sampling_of(
    model: nn.Module,
    processor: Any,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float | None,
    suppressed: Sequence[int] = (),
) -> Sampling:
    """How completions are drawn, with the ends that model and tokenizer name."""
    closing, _ = closing_token_ids(model, processor)
    pad = tokenizer_of(processor).pad_token_id
    # Behind an end, where the mask hides it.
    pad = closing[0] if pad is None else pad
    return Sampling(group_size, max_new_tokens, temperature, suppressed, closing, pad)


def assembled(prompts: Prompts, sampling: Sampling, found: Sampled, processor: Any) -> Rollouts:
    """Completions behind their prompts."""
    tokens, logps = (part.to(prompts.input_ids.device) for part in found)
    ends = torch.isin(tokens, torch.tensor(list(sampling.closing), device=tokens.device))
    # A completion is its tokens up to and with the first closing one.
    mask = ends.cumsum(1) - ends.long() == 0
    tokenizer = tokenizer_of(processor)
    return _assemble(prompts, sampling.group_size, tokens, mask, tokenizer, ~ends.any(1), logps)


def _next_part(
    engine: Engine,
    prompts: Prompts,
    first: int,
    sampling: Sampling,
    batch_size: int,
    seed: int,
) -> list[Tensor]:
    """Completions of the questions from `first` on, of as many as there is room for."""
    width = prompts.input_ids.shape[1] + sampling.max_new_tokens
    room = engine.rows_at_once(width)
    rows = batch_size if room is None else min(batch_size, room)
    count, group = len(prompts.questions), sampling.group_size
    stop = min(first + max(1, rows // group), count)
    draws = Draws(seed, count * group, slice(first * group, stop * group))
    return list(engine.generate(prompts.of(range(first, stop)), sampling, draws))


def _assemble(
    prompts: Prompts,
    group_size: int,
    completions: Tensor,
    mask: Tensor,
    tokenizer: Any,
    truncated: Tensor,
    logps: Tensor | None = None,
) -> Rollouts:
    def per_completion(x: Tensor) -> Tensor:
        return x.repeat_interleave(group_size, dim=-2)

    prompt_mask = per_completion(prompts.attention_mask)
    positions = None
    if prompts.positions is not None:
        prompt_positions = per_completion(prompts.positions)
        after = prompt_positions.amax(dim=(0, 2)) + 1
        steps = torch.arange(completions.shape[1], device=completions.device)
        own = (after[:, None] + steps).expand(3, -1, -1)
        positions = torch.cat([prompt_positions, own], dim=2)
    ids = [row[keep].tolist() for row, keep in zip(completions.cpu(), mask.cpu(), strict=True)]
    return Rollouts(
        prompts,
        group_size,
        torch.cat([per_completion(prompts.input_ids), completions], dim=1),
        torch.cat([prompt_mask, mask], dim=1),
        torch.cat([torch.zeros_like(prompt_mask), mask], dim=1),
        positions,
        ids,
        tokenizer.batch_decode(ids, skip_special_tokens=True),
        truncated,
        None if logps is None else torch.cat([logps.new_zeros(prompt_mask.shape), logps * mask], 1),
    )


def merge(parts: Sequence[Rollouts]) -> Rollouts:
    """The questions of several rollouts as one, padded to the longest prompt and completion."""
    if len(parts) == 1:
        return parts[0]
    widths, completion = _widths(parts)

    def joined(tensors: Sequence[Tensor], right: int) -> Tensor:
        return _joined(tensors, widths, right)

    def joined_if_known(tensors: Sequence[Tensor | None], right: int) -> Tensor | None:
        known = [x for x in tensors if x is not None]
        return joined(known, right) if known else None

    prompts = Prompts(
        [question for part in parts for question in part.prompts.questions],
        joined([part.prompts.input_ids for part in parts], 0),
        joined([part.prompts.attention_mask for part in parts], 0),
        joined_if_known([part.prompts.positions for part in parts], 0),
        _merged_images([part.prompts for part in parts]),
        [text for part in parts for text in part.prompts.generation_prompts],
        [ids for part in parts for ids in part.prompts.unexpanded],
    )
    return Rollouts(
        prompts,
        parts[0].group_size,
        joined([part.input_ids for part in parts], completion),
        joined([part.attention_mask for part in parts], completion),
        joined([part.completion_mask for part in parts], completion),
        joined_if_known([part.positions for part in parts], completion),
        [ids for part in parts for ids in part.completion_ids],
        [text for part in parts for text in part.texts],
        torch.cat([part.truncated for part in parts]),
        joined_if_known([part.sampling_logps for part in parts], completion),
    )


def merge_per_token(parts: Sequence[Rollouts], tensors: Sequence[Tensor]) -> Tensor:
    """A (B, L) tensor of each of several rollouts as one of `merge`; zeros where that pads."""
    widths, completion = _widths(parts)
    return _joined(tensors, widths, completion)


def _widths(parts: Sequence[Rollouts]) -> tuple[list[int], int]:
    """The width of the prompts of each part, and that of the longest completion."""
    widths = [part.prompts.input_ids.shape[1] for part in parts]
    pairs = zip(parts, widths, strict=True)
    return widths, max(part.input_ids.shape[1] - width for part, width in pairs)


def _joined(tensors: Sequence[Tensor], widths: Sequence[int], right: int) -> Tensor:
    """(..., B, L) tensors as one: `widths` columns padded on the left, the others up to `right`."""
    fitted = []
    for x, width in zip(tensors, widths, strict=True):
        end = right and right - (x.shape[-1] - width)
        fitted.append(F.pad(x, (max(widths) - width, end)))
    return torch.cat(fitted, dim=-2)


def _merged_images(prompts: Sequence[Prompts]) -> ImageBatch | None:
    if all(own.images is None for own in prompts):
        return None
    parts = [own.images or no_images(len(own.questions)) for own in prompts]
    return ImageBatch(
        tuple(own for part in parts for own in part.prepared),
        tuple(count for part in parts for count in part.per_question),
        tuple(count for part in parts for count in part.tokens),
    )


def take_questions(rollouts: Rollouts, questions: Sequence[int]) -> Rollouts:
    """The rollouts of some questions, all their completions, in the order given."""
    group, prompts = rollouts.group_size, rollouts.prompts
    own = torch.tensor(list(questions), dtype=torch.int64, device=rollouts.input_ids.device)
    rows = (own[:, None] * group + torch.arange(group, device=own.device)).flatten()
    numbers = rows.tolist()
    return Rollouts(
        prompts.of(questions),
        group,
        rollouts.input_ids[rows],
        rollouts.attention_mask[rows],
        rollouts.completion_mask[rows],
        None if rollouts.positions is None else rollouts.positions[:, rows],
        [rollouts.completion_ids[row] for row in numbers],
        [rollouts.texts[row] for row in numbers],
        rollouts.truncated[rows.to(rollouts.truncated.device)],
        None if rollouts.sampling_logps is None else rollouts.sampling_logps[rows],
    )
