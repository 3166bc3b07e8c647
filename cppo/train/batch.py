"""The completions of an update, and how they are cut: optimizer steps, micro-batches, streams."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cppo.config import LossConfig
from cppo.ops.pack import pack_completions, plan_microbatches
from cppo.packed_batch import PackedBatch
from cppo.rollouts.rollout import Rollouts


@dataclass(frozen=True)
class Batch:
    """Scored rollouts that an update runs on.

    Every tensor of B entries is in the order of the rollouts, and `completions` in the methods are
    indices into that order.

    Args:
        rollouts: all completions, kept or not.
        advantages: (B,) fp32.
        kept: (K,) int64, the completions that the update runs on.
        places: (K,) int64, their places among the kept completions of all processes.
        suppressed: token ids that are never sampled.
        seed: seed of this batch's perturbations.
        per_token: old and reference log-probabilities (B, L), where they are needed.
        share_prompts: run a question's prompt once for all its completions of a micro-batch.
    """

    rollouts: Rollouts
    advantages: Tensor
    kept: Tensor
    suppressed: tuple[int, ...] = ()
    seed: int = 0
    per_token: dict[str, Tensor] = field(default_factory=dict)
    share_prompts: bool = False
    places: Tensor | None = None

    def dealt(self, parts: int) -> list[Tensor]:
        """The kept completions, dealt like cards, so that every part has some of each question.

        They are dealt by their places, so that the number of processes does not change a part.
        """
        places = torch.arange(len(self.kept)) if self.places is None else self.places
        places = places.to(self.kept.device)
        return [self.kept[places % parts == part] for part in range(parts)]

    def microbatches(self, completions: Tensor, max_tokens: int) -> list[Tensor]:
        """Parts of at most `max_tokens` tokens; all completions of a part have images, or none."""
        parts = []
        for alike in self._split_by_images(completions):
            units, lengths = self._units(alike, max_tokens)
            # A completion longer than the budget has a part to itself.
            plan = plan_microbatches(lengths, max([max_tokens, *lengths]))
            parts += [torch.cat([units[i] for i in part]) for part in plan]
        return parts

    def pack(self, completions: Tensor) -> PackedBatch:
        """Some completions as one stream without padding."""
        return pack_completions(
            self.rollouts.input_ids,
            self.rollouts.attention_mask,
            self.rollouts.completion_mask,
            completions,
            per_token=self.per_token,
        )

    def gated(self, completions: Tensor, loss: LossConfig) -> Tensor:
        """Those of the completions whose perturbed views the loss needs.

        With gating, completions with A <= 0 select no perception token, so their perturbed views
        are never run: the loss and its gradients are the same, the work is not.
        """
        if loss.cpl_coef == 0:
            return completions[:0]
        gated = self.have_images(completions)
        if loss.gating:
            gated &= self.advantages[completions] > 0
        return completions[gated]

    def have_images(self, completions: Tensor) -> Tensor:
        """Which of the completions belong to a question with images: a bool for each."""
        images = self.rollouts.prompts.images
        if images is None:
            return torch.zeros(len(completions), dtype=torch.bool, device=completions.device)
        per_question = torch.tensor(images.per_question, device=completions.device)
        return per_question[completions // self.rollouts.group_size] > 0

    def lengths(self, completions: Tensor) -> list[int]:
        """Prompt and response tokens of each completion."""
        return self.rollouts.attention_mask[completions].sum(1).tolist()

    def counts(self, completions: Tensor) -> tuple[int, int]:
        """Completions and response tokens: the denominators of the loss."""
        return len(completions), int(self.rollouts.completion_mask[completions].sum())

    def computed_tokens(self, completions: Tensor) -> int:
        """Tokens that the forward of a micro-batch runs: a shared prompt counts once."""
        parts = self._split_by_images(completions)
        return sum(sum(self._units(alike, sys.maxsize)[1]) for alike in parts)

    def _split_by_images(self, completions: Tensor) -> list[Tensor]:
        """The completions with images, and those without.

        Without an image all three views are the same, and the sign of their entropy shift, which
        selects perception tokens, would be the sign of a rounding error.
        """
        with_images = self.have_images(completions)
        parts = completions[with_images], completions[~with_images]
        return [alike for alike in parts if len(alike)]

    def _units(self, completions: Tensor, max_tokens: int) -> tuple[list[Tensor], list[int]]:
        """What stays together in a micro-batch, and the tokens of each unit.

        A unit is one completion. Where completions share their prompt, and for questions with
        images, it is as many completions of a question as fit, so that prompt and images are
        computed once.
        """
        lengths = self.lengths(completions)
        if not (self.share_prompts or self.have_images(completions[:1]).any()):
            return list(completions.split(1)), lengths
        questions = (completions // self.rollouts.group_size).tolist()
        is_prompt = self.rollouts.attention_mask & ~self.rollouts.completion_mask
        prompts = is_prompt[completions].sum(1).tolist()
        starts: list[int] = []
        totals: list[int] = []
        for i, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
            more = length - prompt if self.share_prompts else length
            if i and questions[i] == questions[i - 1] and totals[-1] + more <= max_tokens:
                totals[-1] += more
            else:
                starts.append(i)
                totals.append(length)
        return list(completions.tensor_split(starts[1:])), totals
