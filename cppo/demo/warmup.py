r"""The supervised warm-up that gives each demo its starting point.

First comes a curriculum of completions that show their work (one digit, then one or two, then two
or three: without it the model does not learn to read images within this budget). Then come
completions of mixed style: 60 % give the right answer alone. A model that samples both styles is
right about three times in ten, and RL can find out that showing the work pays.

`python cppo/demo/warmup.py digits OUT` makes a checkpoint folder; the shipped ones are seed 0.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from cppo.demo.tasks import CHECKPOINTS, TASKS, Task
from cppo.model.load import is_vision_language, special_token_ids_to_suppress
from cppo.rewards import boxed

__all__ = [
    "CHECKPOINTS",
    "encode",
    "generated_accuracy",
    "save_checkpoint",
    "supervise",
    "warm_up",
]

MAX_NEW_TOKENS = 40
_BATCH_SIZE = 64


def warm_up(
    task: str, seed: int = 0, *, report: Callable[[str], None] = lambda line: None
) -> tuple[PreTrainedModel, Any]:
    """Train a demo's tiny model up to where RL starts.

    Args:
        task: "digits", "shortcut", "print" or "arithmetic".
        seed: of the weights and of the questions.
        report: called with a line of progress now and then.
    Returns: (model in eval mode, fp32; processor or tokenizer).
    Raises: ValueError for an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"warm_up: task must be one of {sorted(TASKS)}, got {task!r}")
    model, processor = TASKS[task].build(seed)
    supervise(model, processor, TASKS[task], seed=seed, report=report)
    return model, processor


def supervise(
    model: PreTrainedModel,
    processor: Any,
    task: Task,
    *,
    seed: int,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Train a model in place on the right completions of training rows, phase after phase.

    AdamW; after 10 steps of linear warm-up one cosine from `task.peak_lr` to 0 over all phases;
    gradients clipped at norm 1; the loss is the mean over completion tokens.
    Args:
        model, processor: as `warm_up` returns them.
        task: its rows, with columns `worked` and `direct`, its phases and its peak_lr.
        seed: of the rows and of the choice between the two styles.
        report: called with a line of progress now and then.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), task.peak_lr, betas=(0.9, 0.98), weight_decay=0.0
    )
    total, done, start = sum(phase.steps for phase in task.phases), 0, time.perf_counter()
    rng = np.random.default_rng(seed)
    model.train()
    for number, phase in enumerate(task.phases):
        # A seed per phase, far from those of RL and evaluation, so that no scene repeats.
        data = task.rows(
            "train", phase.steps * _BATCH_SIZE, seed=1000 * (seed + 1) + number, **phase.rows
        )
        for step in range(phase.steps):
            chosen = [data[step * _BATCH_SIZE + i] for i in range(_BATCH_SIZE)]
            styles = np.where(rng.random(_BATCH_SIZE) < phase.direct_fraction, "direct", "worked")
            targets = [row[style] for row, style in zip(chosen, styles, strict=True)]
            rise, progress = min(1.0, (done + 1) / 10), done / total
            for group in optimizer.param_groups:
                group["lr"] = task.peak_lr * rise * 0.5 * (1 + math.cos(math.pi * progress))
            loss = model(**encode(processor, chosen, targets), use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            if done % 20 == 0 or done == total:
                seconds = time.perf_counter() - start
                report(f"warm-up step {done}/{total}: loss {loss.item():.3f}, {seconds:.0f} s")
    model.eval()


def encode(processor: Any, rows: list[dict[str, Any]], targets: list[str] | None = None) -> Any:
    """Return the model inputs of questions, with their completions and labels if targets are given.

    Args:
        processor: a processor or a tokenizer that pads on the left.
        rows: dataset rows with `prompt` (messages) and, for a vision task, `images`.
        targets: completions, one per row; an end-of-sequence token is added.
    Returns: a dict of tensors; labels (B, L) int64 are -100 on prompts and padding.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = [
        processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        for row in rows
    ]
    targets = [target + tokenizer.eos_token for target in targets] if targets else []
    texts = (
        [text + target for text, target in zip(texts, targets, strict=True)] if targets else texts
    )
    images = [image for row in rows for image in row.get("images", ())]
    extra = {"images": images} if images else {}
    batch = processor(text=texts, padding=True, return_tensors="pt", **extra)
    if targets:
        labels = torch.full_like(batch["input_ids"], -100)
        for i, target in enumerate(targets):
            length = len(tokenizer(target)["input_ids"])
            labels[i, -length:] = batch["input_ids"][i, -length:]
        batch["labels"] = labels
    return batch


@torch.no_grad()
def generated_accuracy(
    model: PreTrainedModel,
    processor: Any,
    rows: Any,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 100,
) -> tuple[float, list[str]]:
    """Return the share of right answers and the completions themselves, one per row.

    Args:
        model, processor: as `warm_up` returns them.
        rows: a dataset of one of the demo tasks.
        temperature: of sampling over the whole vocabulary; 0 is greedy.
        seed: of sampling; the global random state is left as it was.
        batch_size: questions sampled together.
    """
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    suppressed = special_token_ids_to_suppress(model, processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    completions: list[str] = []
    answers: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(rows), batch_size):
            chosen = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            batch = encode(processor, chosen)
            output = model.generate(  # type: ignore[operator]
                **batch, max_new_tokens=MAX_NEW_TOKENS, suppress_tokens=suppressed, **sampling
            )
            new_tokens = output[:, batch["input_ids"].shape[1] :]
            completions += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            answers += [row["answer"] for row in chosen]
    rewards = boxed(completions, answer=answers)
    return sum(rewards) / max(1, len(rewards)), completions


def save_checkpoint(model: PreTrainedModel, processor: Any, folder: str | Path) -> None:
    """Write model (fp16) and processor in the usual form; `load_model` reads it in fp32.

    The model in memory is left in fp32.
    """
    halves = {name: value.half() for name, value in model.state_dict().items()}
    if is_vision_language(model) or model.config.tie_word_embeddings:
        halves.pop("lm_head.weight", None)
    model.save_pretrained(folder, state_dict=halves)
    processor.save_pretrained(folder)


def main() -> None:
    """Make a warm-up checkpoint and print how often it is right on held-out questions."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, processor = warm_up(args.task, args.seed, report=print)
    save_checkpoint(model, processor, args.folder)
    rows = TASKS[args.task].rows("heldout", 500)
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        accuracy, completions = generated_accuracy(model, processor, rows, temperature=temperature)
        worked = [text for text in completions if not text.startswith("\\boxed")]
        print(
            f"{args.task} seed {args.seed}: held-out accuracy, {name}: {accuracy:.3f}, "
            f"shows its work: {len(worked) / len(completions):.2f}"
        )
        print("\n".join(completions[:5]))


if __name__ == "__main__":
    main()
