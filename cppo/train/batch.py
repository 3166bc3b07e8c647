"""The completions of an update, and how they are cut: optimizer steps, micro-batches, streams.

How a batch is cut depends on lengths and advantages alone. They are read from the device once per
batch, so that a micro-batch is cut, gated and packed without waiting for the device.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cppo.model.image_views import MadeViews
from cppo.model.ways import Ways
from cppo.ops.pack import pack_completions, plan_microbatches
from cppo.ops.packed_batch import PackedBatch
from cppo.options.trainer import LossConfig
from cppo.rollouts.rollout import Rollouts


@dataclass(frozen=True)
class Batch:
    """Scored rollouts that an update runs on.

    Every tensor of B entries is in the order of the rollouts, and `completions` in the methods are
    indices into that order.

    Args:
        rollouts: all completions, kept or not.
        advantages: (B,) fp32, on the CPU.
        kept: (K,) int64, on the CPU, the completions that the update runs on.
        places: (K,) int64, on the CPU, their places among the kept completions of all processes.
        suppressed: token ids that are never sampled.
        seed: seed of this batch's perturbations.
        per_token: what the loss takes besides (old and reference log-probabilities, weights of
            tokens, ...), by its name there, (B, L).
        share_prompts: run a question's prompt once for all its completions of a micro-batch.
        ways: how the model is run, which decides what a micro-batch costs.
        views: of images that the processor has prepared for this batch (`cppo.model.image_views`).
    """

    rollouts: Rollouts
    advantages: Tensor
    kept: Tensor
    suppressed: tuple[int, ...] = ()
    seed: int = 0
    per_token: dict[str, Tensor] = field(default_factory=dict)
    share_prompts: bool = False
    ways: Ways = Ways()
    places: Tensor | None = None
    views: MadeViews = field(default_factory=dict, repr=False, compare=False)

    def dealt(self, parts: int) -> list[Tensor]:
        """The kept completions, dealt like cards, so that every part has some of each question.

        They are dealt by their places, so that the number of processes does not change a part.
        """
        places = torch.arange(len(self.kept)) if self.places is None else self.places
        return [self.kept[places % parts == part] for part in range(parts)]

    def microbatches(self, completions: Tensor, max_tokens: int) -> list[Tensor]:
        """Parts of at most `max_tokens` tokens; all completions of a part have images, or none.

        Where they are run padded, the padding counts.
        """
        parts = []
        for alike in self._split_by_images(completions):
            if not self._is_packed(alike):
                parts += self._padded_parts(alike, max_tokens)
                continue
            units, lengths = self._units(alike, max_tokens)
            # A completion longer than the budget has a part to itself.
            plan = plan_microbatches(lengths, max([max_tokens, *lengths]))
            parts += [torch.cat([units[i] for i in part]) for part in plan]
        return parts

    def pack(self, completions: Tensor) -> PackedBatch:
        """Some completions as one stream without padding; `kept` of it stays on the CPU."""
        packed = pack_completions(
            self.rollouts.input_ids,
            self.rollouts.attention_mask,
            self.rollouts.completion_mask,
            self.to_device(completions),
            per_token=self.per_token,
            lengths=(self.lengths(completions), self.response_lengths(completions)),
        )
        return dataclasses.replace(packed, kept=completions)

    def to_device(self, values: Tensor) -> Tensor:
        """Values of the host where the rollouts are; the copy is only queued."""
        return values.to(self.rollouts.input_ids.device, non_blocking=True)

    def gated(self, completions: Tensor, loss: LossConfig) -> Tensor:
        """Those of the completions whose perturbed views the loss needs.

        With gating, completions with A <= 0 select no perception token, so their perturbed views
        are never run: the loss and its gradients are the same, the work is not.
        """
        if not loss.contrasts:
            return completions[:0]
        gated = self.have_images(completions)
        if loss.gating:
            gated &= self.advantages[completions] > 0
        return completions[gated]

    def compared(self, completions: Tensor, loss: LossConfig) -> Tensor:
        """Those of the completions that run under the removing view alone, for VPPO and PAPO.

        Both need an image; VPPO weighs a policy loss, which is not there where A = 0.
        """
        if loss.contrasts or not loss.perturbed_views:
            return completions[:0]
        compared = self.have_images(completions)
        if loss.perception == "vppo":
            compared &= self.advantages[completions] != 0
        return completions[compared]

    def views_run(self, completions: Tensor, loss: LossConfig) -> int:
        """How many perturbed views of completions a micro-batch runs."""
        alone = len(self.compared(completions, loss)) if loss.penalises_removed else 0
        return 2 * len(self.gated(completions, loss)) + alone

    def have_images(self, completions: Tensor) -> Tensor:
        """Which of the completions belong to a question with images: a bool for each."""
        images = self.rollouts.prompts.images
        if images is None:
            return torch.zeros(len(completions), dtype=torch.bool)
        return torch.tensor(images.per_question)[self.questions(completions)] > 0

    def questions(self, completions: Tensor) -> list[int]:
        """The question of each completion."""
        return (completions // self.rollouts.group_size).tolist()

    def lengths(self, completions: Tensor) -> list[int]:
        """Prompt and response tokens of each completion."""
        return self._lengths[0, completions].tolist()

    def response_lengths(self, completions: Tensor) -> list[int]:
        """Response tokens of each completion."""
        return self._lengths[1, completions].tolist()

    @functools.cached_property
    def _lengths(self) -> Tensor:
        """(2, B) int64 on the CPU: tokens and response tokens. The one wait for the device."""
        attended = self.rollouts.attention_mask.bool()
        responses = attended & self.rollouts.completion_mask.bool()
        return torch.stack([attended.sum(1), responses.sum(1)]).cpu()

    def counts(self, completions: Tensor) -> tuple[int, int]:
        """Completions and response tokens: the denominators of the loss."""
        return len(completions), sum(self.response_lengths(completions))

    def computed_tokens(self, completions: Tensor) -> int:
        """Tokens that the forward of a micro-batch runs: a shared prompt once, padding, too."""
        total = 0
        for alike in self._split_by_images(completions):
            if self._is_packed(alike):
                total += sum(self._units(alike, sys.maxsize)[1])
            else:
                total += len(alike) * max(self.lengths(alike))
        return total

    def _is_packed(self, completions: Tensor) -> bool:
        """Whether completions that all have images, or none, are run as one stream."""
        has_images = bool(self.have_images(completions[:1]).any())
        return self.ways.images if has_images else self.ways.text

    def _padded_parts(self, completions: Tensor, max_tokens: int) -> list[Tensor]:
        """Parts of at most `max_tokens` tokens once all are as long as the longest.

        So those of like length go together. Completions of a question with images stay neighbours,
        so that its images are encoded in as few parts as may be.
        """
        lengths, questions = self.lengths(completions), self.questions(completions)
        group = questions if self.have_images(completions[:1]).any() else range(len(lengths))
        longest: dict[int, int] = {}
        for member, length in zip(group, lengths, strict=True):
            longest[member] = max(length, longest.get(member, 0))
        order = sorted(range(len(lengths)), key=lambda i: (-longest[group[i]], group[i]))
        parts: list[list[int]] = []
        width = 0
        for i in order:
            if not parts or (len(parts[-1]) + 1) * max(width, lengths[i]) > max_tokens:
                parts.append([])
                width = 0
            parts[-1].append(i)
            width = max(width, lengths[i])
        return [completions[sorted(part)] for part in sorted(parts, key=min)]

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
        questions, responses = self.questions(completions), self.response_lengths(completions)
        starts: list[int] = []
        totals: list[int] = []
        for i, (length, response) in enumerate(zip(lengths, responses, strict=True)):
            more = response if self.share_prompts else length
            if i and questions[i] == questions[i - 1] and totals[-1] + more <= max_tokens:
                totals[-1] += more
            else:
                starts.append(i)
                totals.append(length)
        return list(completions.tensor_split(starts[1:])), totals
