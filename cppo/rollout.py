"""Questions in, sampled completions with rewards out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cppo.forward import unwrap
from cppo.prompts import Prompts, encode_questions, render, tokenizer_of
from cppo.questions import Question
from cppo.sampler import decode

__all__ = [
    "Prompts",
    "RewardError",
    "RewardFunction",
    "Rollouts",
    "encode_questions",
    "render",
    "reward_name",
    "sample_completions",
    "score",
    "tokenizer_of",
]

RewardFunction = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Rollouts:
    """G sampled completions of each of Q questions: B = Q x G rows, a question's rows contiguous.

    Args:
        prompts: the questions.
        group_size: G.
        input_ids: (B, L) int64, prompt padded on the left, completion on the right.
        attention_mask: (B, L) bool, prompt and completion tokens.
        completion_mask: (B, L) bool, completion tokens with the closing one.
        positions: (3, B, L) rotary positions of a vision-language model, else None.
        completion_ids: the B completions as token ids, with the closing one.
        texts: the B completions, decoded without special tokens.
        truncated: (B,) bool, cut at the token limit.
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

    def question_of(self, row: int) -> Question:
        """The question of a row of the batch."""
        return self.prompts.questions[row // self.group_size]


def sample_completions(
    model: nn.Module,
    processor: Any,
    prompts: Prompts,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float | None,
    suppressed: Sequence[int] = (),
    batch_size: int = 256,
) -> Rollouts:
    """Samples `group_size` completions of every question from the plain softmax of the model.

    Args:
        model: in any mode; it is put in eval mode while it samples.
        prompts: Q encoded questions.
        group_size: completions per question.
        max_new_tokens: tokens of a completion at most.
        temperature: of the softmax; None: the greedy completion.
        suppressed: token ids that are never sampled.
        batch_size: completions generated at once.
    Returns: Rollouts, padded to the longest completion.
    """
    tokenizer = tokenizer_of(processor)
    own = unwrap(model).generation_config.eos_token_id
    closing = own if isinstance(own, list) else [tokenizer.eos_token_id if own is None else own]
    pad = closing[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    chunk = max(1, batch_size // group_size)
    was_training = model.training
    model.eval()
    parts = []
    for first in range(0, len(prompts.questions), chunk):
        questions = range(first, min(first + chunk, len(prompts.questions)))
        part = slice(questions.start, questions.stop)
        parts.append(
            decode(
                model,
                prompts.input_ids[part],
                prompts.attention_mask[part],
                None if prompts.positions is None else prompts.positions[:, part],
                None if prompts.images is None else prompts.images.of(questions),
                group_size=group_size,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                suppressed=suppressed,
                closing=closing,
                pad=pad,
            )
        )
    model.train(was_training)
    width = max(part.shape[1] for part in parts)
    completions = torch.cat(
        [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=pad) for part in parts]
    )
    ends = torch.isin(completions, torch.tensor(closing, device=completions.device))
    # A completion is its tokens up to and with the first closing one.
    mask = ends.cumsum(1) - ends.long() == 0
    return _assemble(prompts, group_size, completions, mask, tokenizer, ~ends.any(1))


def _assemble(
    prompts: Prompts,
    group_size: int,
    completions: Tensor,
    mask: Tensor,
    tokenizer: Any,
    truncated: Tensor,
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
    )


class RewardError(RuntimeError):
    """A reward function raised or returned something that is not a finite number."""


def reward_name(function: RewardFunction) -> str:
    """The name under which a reward function appears in metrics and errors."""
    name = getattr(function, "name", None) or getattr(function, "__name__", None)
    return str(name or type(function).__name__)


def score(
    functions: Sequence[RewardFunction], weights: Sequence[float], rollouts: Rollouts
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the reward functions: (B,) fp32, and each function's own rewards by name.

    Raises: RewardError naming the function, the question and the completion.
    """
    rows = range(len(rollouts.texts))
    by_name: dict[str, Tensor] = {}
    total = torch.zeros(len(rollouts.texts), dtype=torch.float64)
    for function, weight in zip(functions, weights, strict=True):
        values = _call(function, rollouts, list(rows))
        by_name[reward_name(function)] = torch.tensor(values)
        total += weight * torch.tensor(values, dtype=torch.float64)
    return total.float(), by_name


def _call(function: RewardFunction, rollouts: Rollouts, rows: list[int]) -> list[float]:
    try:
        returned: Any = _evaluate(function, rollouts, rows)
    except Exception as error:
        raise RewardError(
            _describe(function, rollouts, _culprit(function, rollouts, rows), error)
        ) from error
    if isinstance(returned, (str, bytes)) or not isinstance(returned, Iterable):
        raise RewardError(
            f"cppo: reward function {reward_name(function)!r} must return a list of one number "
            f"per completion, got {type(returned).__name__}"
        )
    values = list(returned)
    if len(values) != len(rows):
        raise RewardError(
            f"cppo: reward function {reward_name(function)!r} must return one number per "
            f"completion = {len(rows)}, got {len(values)}"
        )
    numbers: list[float] = []
    for row, value in zip(rows, values, strict=True):
        # None: the function does not apply to this row.
        try:
            number = 0.0 if value is None else float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(_describe(function, rollouts, row, error)) from error
        if not math.isfinite(number):
            raise RewardError(_describe(function, rollouts, row, f"returned {number}"))
        numbers.append(number)
    return numbers


def _evaluate(
    function: RewardFunction, rollouts: Rollouts, rows: list[int]
) -> Sequence[float | None]:
    questions = [rollouts.question_of(row) for row in rows]
    names = sorted({name for question in questions for name in question.columns})
    columns = {name: [question.columns.get(name) for question in questions] for name in names}
    return function(
        completions=[rollouts.texts[row] for row in rows],
        completion_ids=[rollouts.completion_ids[row] for row in rows],
        prompts=[question.messages for question in questions],
        **columns,
    )


def _culprit(function: RewardFunction, rollouts: Rollouts, rows: list[int]) -> int | None:
    """The first row on which the function raises by itself, if there is one."""
    for row in rows:
        try:
            _evaluate(function, rollouts, [row])
        except Exception:
            return row
    return None


def _describe(function: RewardFunction, rollouts: Rollouts, row: int | None, what: object) -> str:
    cause = f"{type(what).__name__}: {what}" if isinstance(what, Exception) else str(what)
    head = f"cppo: reward function {reward_name(function)!r} failed ({cause})"
    if row is None:
        return head + " on the whole batch, on no completion by itself"
    question = rollouts.question_of(row)
    return (
        f"{head}\n  question: {question.messages!r}\n  answer: "
        f"{question.columns.get('answer')!r}\n  completion: {rollouts.texts[row]!r}"
    )
