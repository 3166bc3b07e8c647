"""What pruning, packing and dynamic allocation save: update-phase and whole-step time.

    python benchmarks/experiments/prune_rates.py                    this machine
    python benchmarks/experiments/prune_rates.py --smoke            toy size, writes nothing
    python benchmarks/experiments/prune_rates.py --model FOLDER     any prepared text model
    python benchmarks/experiments/prune_rates.py --device cuda --model smollm2 --questions 32 \\
        --vocabulary 49152

Prompts and completions have the lengths of GSM8K's questions and answers (CPPO_DATA_DIR, default
../shared/data) in words, digits and marks, about as many as tokens; their ids are random.
Completions are sampled by the trainer's own decoding loop; each ends with the probability that an
answer of GSM8K has of ending there, so that their lengths are distributed like the answers'.

    packing     packed: no padding token. padded: the same loss on rows padded to the longest kept
                prompt and completion, in micro-batches of as many tokens.
    allocation  no: the same questions at every rate. yes: 1 / (1 - rate) times the questions, so
                that the update is as large as without pruning.
    speedup     seconds per question at rate 0 without allocation, over seconds per question.

Variants are interleaved, repetition by repetition, every repetition on other rollouts; a time is
the mean over the repetitions of the faster of two tries (rollouts: one).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from cppo import reference
from cppo.benchmarks import report
from cppo.benchmarks.environment import (
    add_record_option,
    data_folder,
    environment,
    load_per_core,
    results_folder,
)
from cppo.benchmarks.experiments.small_models import (
    Setting,
    dummy_tokenizer,
    load,
    random_prompts,
    rollouts_of,
    seconds,
)
from cppo.config import CPPOConfig, LossConfig
from cppo.model import forward
from cppo.model.prompts import Prompts
from cppo.ops.loss import linear_cppo_loss
from cppo.questions import load_rows
from cppo.records import NumItems
from cppo.rollouts import sampler
from cppo.rollouts.rollout import Rollouts, sample_completions, take_questions
from cppo.train.algorithm import microbatch_loss
from cppo.train.batch import Batch
from cppo.train.views import forward_views

GROUP_SIZE = 16
TEMPLATE = 20  # tokens that a chat template adds to a question
RATES = (0.0, 0.5, 0.75, 0.875, 0.9375)
# Lin et al. 2025 (arXiv 2503.22342), table of GSM8K with Qwen2.5-1.5B, G = 16, with allocation.
PAPER = {0.0: 1.0, 0.5: 1.81, 0.75: 3.27, 0.875: 4.89, 0.9375: 8.32}
MAX_TOKENS = 8192
TRIES = 2
TOKEN = re.compile(r"\d|[^\W\d]+|[^\w\s]")
Variant = tuple[float, str, str]  # prune rate, packing, allocation


class Lengths:
    """Draws prompts and completions with the lengths of GSM8K's training set."""

    def __init__(self, seed: int, options: argparse.Namespace) -> None:
        self.questions, self.answers = [9, 12, 7], [3, 5, 2, 9]
        if not options.smoke:
            rows = [row["extra_info"] for row in load_rows(data_folder() / "gsm8k", "train")]
            self.questions = [TEMPLATE + len(TOKEN.findall(row["question"])) for row in rows]
            self.answers = [1 + len(TOKEN.findall(row["answer"])) for row in rows]
        self.vocabulary, self.device = options.vocabulary, options.device
        self._generator = torch.Generator().manual_seed(seed)
        counts = torch.bincount(torch.tensor(self.answers)).double()
        left = counts.flip(0).cumsum(0).flip(0)
        # Probability that an answer ends at its n-th token, given that it has that many.
        self.hazard = (counts / left)[1:].tolist()

    def _draw(self, lengths: list[int], count: int) -> Tensor:
        picked = torch.randint(len(lengths), (count,), generator=self._generator)
        return torch.tensor([lengths[i] for i in picked.tolist()])

    def prompts(self, count: int) -> Prompts:
        lengths = self._draw(self.questions, count)
        return random_prompts(lengths, self.vocabulary, self._generator, self.device)

    def rollouts(self, count: int) -> Rollouts:
        """Completions of `count` questions that were not sampled by a model."""
        prompts = self.prompts(count)
        lengths = self._draw(self.answers, count * GROUP_SIZE)
        return rollouts_of(prompts, lengths, self.vocabulary, self._generator)


@contextlib.contextmanager
def ending_like(hazard: list[float], embeddings: nn.Module) -> Iterator[None]:
    """Completions that the model samples end as often as the data's at every length."""
    draw, step = sampler._draw, 0

    def drawn(*arguments: Any) -> Tensor:
        nonlocal step
        tokens = draw(*arguments)
        ends = torch.rand(len(tokens), device=tokens.device) < hazard[min(step, len(hazard) - 1)]
        step += 1
        return tokens.masked_fill(ends, 0)

    def restart(module: nn.Module, ids: tuple[Tensor]) -> None:
        nonlocal step
        step = 0 if ids[0].shape[1] > 1 else step  # prompts, not one more token of each completion

    hook = embeddings.register_forward_pre_hook(restart)
    with patch.object(sampler, "_draw", drawn):
        yield
    hook.remove()


def batch_of(rollouts: Rollouts, rate: float, seed: int) -> Batch:
    """Rewards 0 or 1 by chance; the same ones at every rate."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 2, (len(rollouts.texts),), generator=generator).float()
    # Which of equal completions stay should not depend on their place.
    rewards += 1e-3 * torch.rand(len(rewards), generator=generator)
    advantages, kept = reference.advantages_and_prune(rewards, GROUP_SIZE, rate)
    device = rollouts.input_ids.device
    return Batch(rollouts, advantages.to(device), kept.to(device))


# Updates


def packed_losses(setting: Setting, batch: Batch) -> Iterator[Tensor]:
    """The loss of each micro-batch as the trainer computes it."""
    whole = NumItems(*batch.counts(batch.kept))
    for rows in batch.microbatches(batch.kept, MAX_TOKENS):
        with setting.autocast():
            yield microbatch_loss(setting.model, batch, rows, whole, setting.config, None).loss


def padded_losses(setting: Setting, batch: Batch) -> Iterator[Tensor]:
    """The same on rectangles: what a trainer without packing computes."""
    whole = NumItems(*batch.counts(batch.kept))
    for rows, ids, mask, response in rectangles(batch):
        with setting.autocast():
            hidden = padded_hidden(setting, ids, mask)
            head = forward.lm_head(setting.model, (), hidden.dtype)._asdict()
            yield linear_cppo_loss(
                hidden[:, :-1][response[:, 1:]],
                targets=ids[response],
                advantages=batch.advantages[rows],
                **head,
                cu_seqlens=nn.functional.pad(response.sum(1).cumsum(0), (1, 0)).int(),
                num_items=whole,
                config=setting.config.loss,
            ).loss


def rectangles(batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Rows, input ids, attention and completion mask of padded micro-batches of the kept rows."""
    rollouts, kept = batch.rollouts, batch.kept
    attended = rollouts.attention_mask[kept].any(0).nonzero()[:, 0]
    columns = slice(int(attended[0]), int(attended[-1]) + 1)  # cut to the longest that stay
    for rows in kept.split(max(1, MAX_TOKENS // (columns.stop - columns.start))):
        whole = rollouts.input_ids, rollouts.attention_mask, rollouts.completion_mask
        ids, mask, response = (x[rows, columns] for x in whole)
        yield rows, ids, mask, response


def padded_hidden(setting: Setting, ids: Tensor, mask: Tensor) -> Tensor:
    hidden: Tensor = setting.model.model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    return hidden


LOSSES = {"packed": packed_losses, "padded": padded_losses}


def update(packing: str, setting: Setting, batch: Batch) -> float:
    """One optimizer step; returns its loss."""
    total = 0.0
    for loss in LOSSES[packing](setting, batch):
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(setting.model.parameters(), 1.0)
    setting.optimizer.step()
    setting.optimizer.zero_grad(set_to_none=True)
    return total


def forward_alone(packing: str, setting: Setting, batch: Batch) -> None:
    with setting.autocast():
        if packing == "padded":
            for _, ids, mask, _ in rectangles(batch):
                padded_hidden(setting, ids, mask)
            return
        for rows in batch.microbatches(batch.kept, MAX_TOKENS):
            forward_views(setting.model, batch, rows, setting.config, None)


@contextlib.contextmanager
def tokens_seen(model: Any) -> Iterator[list[int]]:
    """Tokens of every forward, counted where the model embeds them."""
    seen: list[int] = []
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda _, ids: seen.append(ids[0].numel()))
    yield seen
    hook.remove()


# Measurements


def questions_at(rate: float, allocation: str, questions: int) -> int:
    return round(questions / (1 - rate)) if allocation == "yes" else questions


def measure_updates(
    setting: Setting, options: argparse.Namespace
) -> dict[Variant, dict[str, float]]:
    """Means over the repetitions of every (rate, packing, allocation)."""
    means: dict[Variant, dict[str, float]] = {}
    setting.model.train()
    for repetition in range(options.repetitions):
        everything = Lengths(repetition, options).rollouts(
            questions_at(max(RATES), "yes", options.questions)
        )
        variants = itertools.product(("no", "yes"), RATES, LOSSES)
        for allocation, rate, packing in variants:
            if (rate, allocation) == (0.0, "yes"):
                continue
            count = questions_at(rate, allocation, options.questions)
            batch = batch_of(take_questions(everything, range(count)), rate, repetition)
            found = measure_update(setting, packing, batch, rate == 0)
            own = means.setdefault((rate, packing, allocation), dict.fromkeys(found, 0.0))
            for name, value in found.items():
                own[name] += value / options.repetitions
    return means


def measure_update(
    setting: Setting, packing: str, batch: Batch, with_forward: bool
) -> dict[str, float]:
    """Seconds, tokens and loss of one update, and seconds of its forward alone."""
    with tokens_seen(setting.model) as seen:
        spent, loss = seconds(setting.device, update, packing, setting, batch, tries=TRIES)
    tokens, ahead = sum(seen) // TRIES, 0.0
    if with_forward:
        ahead, _ = seconds(setting.device, forward_alone, packing, setting, batch, tries=TRIES)
    kept = batch.lengths(batch.kept)
    return {
        "update_s": spent,
        "forward_s": ahead,
        "tokens_computed": tokens,
        "tokens_valid": sum(kept),
        "trained": len(kept),
        "loss": loss,
    }


def measure_rollouts(setting: Setting, options: argparse.Namespace) -> dict[int, float]:
    """Seconds that sampling takes, by number of questions."""
    data, embeddings = Lengths(1000, options), setting.model.get_input_embeddings()
    counts = {questions_at(r, a, options.questions) for r in RATES for a in ("no", "yes")}

    def sample(count: int) -> Any:
        with setting.autocast(), ending_like(data.hazard, embeddings):
            found = sample_completions(
                setting.model,
                dummy_tokenizer(),
                data.prompts(count),
                group_size=GROUP_SIZE,
                max_new_tokens=len(data.hazard),
                temperature=1.0,
                suppressed=(0,),
                batch_size=options.generation_batch_size,
            )
        assert not found.truncated.any(), "completions do not end as sampler._draw says any more"

    sample(1)
    return {count: seconds(setting.device, sample, count, tries=1)[0] for count in sorted(counts)}


def rows_of(
    updates: dict[Variant, dict[str, float]],
    rollouts: dict[int, float],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The table: one row per rate, packing and allocation."""
    rows = []
    for (rate, packing, allocation), own in updates.items():
        count = questions_at(rate, allocation, options.questions)
        base = updates[0.0, packing, "no"]["update_s"] / options.questions
        whole_base = base + rollouts[options.questions] / options.questions
        whole = own["update_s"] + rollouts[count]
        rows.append(
            {
                "model": options.model,
                "group_size": GROUP_SIZE,
                "prune_rate": rate,
                "packing": packing,
                "allocation": allocation,
                "questions": count,
                **{n: round(own[n]) for n in ("trained", "tokens_valid", "tokens_computed")},
                "forward_s": f"{own['forward_s']:.4f}" if rate == 0 else "",
                "update_s": f"{own['update_s']:.4f}",
                "rollout_s": f"{rollouts[count]:.4f}",
                "step_s": f"{whole:.4f}",
                "update_speedup": f"{base / (own['update_s'] / count):.2f}",
                "step_speedup": f"{whole_base / (whole / count):.2f}",
                "target": f"{0.9 / (1 - rate):.2f}" if 0 < rate <= 0.875 else "",
                "paper_speedup": PAPER[rate] if allocation == "yes" or rate == 0 else "",
            }
        )
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, measured or read, as a Markdown table; and padded against packed at rate 0."""
    names = "prune_rate packing allocation questions trained update_s rollout_s step_s".split()
    names += ["update_speedup", "step_speedup", "target", "paper_speedup"]
    table = report.markdown(names, [[str(row[name]) for name in names] for row in rows])
    packed, padded = (
        next(r for r in rows if float(r["prune_rate"]) == 0 and r["packing"] == packing)
        for packing in ("packed", "padded")
    )
    tokens, ahead, update_ratio = (
        float(padded[name]) / float(packed[name])
        for name in ("tokens_computed", "forward_s", "update_s")
    )
    return (
        f"{table}\n\npadded / packed at rate 0: {tokens:.2f}x the tokens; {ahead:.2f}x the time of "
        f"the forward ({ahead / tokens:.2f} of the token ratio), {update_ratio:.2f}x that of the "
        "update."
    )


def check(updates: dict[Variant, dict[str, float]], half: bool) -> None:
    """No time counts before packed and padded have given the same first loss."""
    for (rate, packing, allocation), own in updates.items():
        other = updates[rate, "packed", allocation]
        assert math.isclose(own["loss"], other["loss"], abs_tol=2e-2 if half else 2e-4), (
            f"rate {rate}: the {packing} loss is {own['loss']}, packed {other['loss']}"
        )
        if packing == "packed":
            assert own["tokens_computed"] == own["tokens_valid"], "a padding token was computed"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add: Callable[..., Any] = parser.add_argument
    add("--model", default="small", help="small, smollm2 or a folder")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--questions", type=int, default=4, help="of a step at prune rate 0")
    add("--vocabulary", type=int, default=4096, help="token ids that are drawn")
    add("--repetitions", type=int, default=3)
    add("--generation-batch-size", type=int, default=256)
    add("--learning-rate", type=float, default=0.0, help="0: the model stays")
    add("--output", type=Path, help="CSV file, overwritten")
    add("--smoke", action="store_true", help="toy size, nothing is written")
    add_record_option(parser)
    options = parser.parse_args()
    if options.smoke:
        options.questions, options.repetitions, options.vocabulary = 1, 1, 64
    start = time.perf_counter()
    model = load(options.model, options.vocabulary, options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    setting = Setting(model, CPPOConfig(loss=LossConfig(cpl_coef=0.0)), optimizer, options.device)
    updates = measure_updates(setting, options)
    check(updates, setting.half)
    rows = rows_of(updates, measure_rollouts(setting, options), options)
    print(summary(rows))
    spent = time.perf_counter() - start
    print(f"{spent:.0f} s; load {load_per_core():.2f} per core", file=sys.stderr)
    if not options.smoke:
        path = options.output or results_folder(options.record) / "prune_rates.csv"
        report.write(path, [row | environment(options.device) for row in rows])


if __name__ == "__main__":
    main()
