"""Small TRL runs that the tests share: tiny models, completions that do not depend on sampling."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import torch
from datasets import Dataset
from trainer_cases import FAMILIES as BUILT
from trainer_cases import text_rows
from trainer_cases import tiny as built
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import apply_chat_template
from vision_families import tiny_vision

from cppo.demo.digits import DigitSums
from cppo.integrations.trl import CPPO, CPPOMixin
from cppo.integrations.trl_pictures import pictures_of
from cppo.integrations.trl_rows import WHOLE
from cppo.model.load import load_model
from cppo.options.trainer import LossConfig
from cppo.questions.messages import with_images

SCRATCH = tempfile.TemporaryDirectory(prefix="cppo-trl-")  # gone when the process ends
OFF = CPPO(trim=False, loss=LossConfig(cpl_coef=0))
HALF = CPPO(prune_rate=0.5, loss=LossConfig(cpl_coef=0))
LOOK = CPPO(loss=LossConfig(cpl_coef=1.0, cpl_reduction="sequence"))
HALF_LOOK = CPPO(prune_rate=0.5, loss=LOOK.loss)
# Plain gradient descent: Adam's first steps are the sign of a gradient, zero or not.
SMALL = dict(
    use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
    logging_steps=1, max_steps=2, num_generations=4, per_device_train_batch_size=8,
    max_completion_length=9, learning_rate=0.1, optim="sgd", loss_type="grpo", beta=0.1,
    num_iterations=2,
)  # fmt: skip


def tiny(family: str) -> tuple[Any, Any]:
    """A tiny model of any family, and its processor."""
    return built(family) if family in BUILT else tiny_vision(family)


@functools.cache
def folder_of(family: str) -> str:
    """A saved tiny model: TRL loads the reference model from its folder."""
    folder = Path(SCRATCH.name) / family
    model, processor = tiny(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def rows_of(family: str, count: int = 8) -> Dataset:
    if family != "text":
        digits = DigitSums("train", count)
        names = ("prompt", "images", "answer")
        return Dataset.from_list([{k: digits[i][k] for k in names} for i in range(count)])
    rows = text_rows(12)[::-1][:count]
    return Dataset.from_list(
        [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    )


def noise(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that depends on the completion alone and differs within groups."""
    return [random.Random(text[0]["content"]).random() for text in completions]


def completions_of(trainer: Any, prompt_ids: list[Any]) -> list[list[int]]:
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    letters = tokenizer("abcdefghij0123456789", add_special_tokens=False)["input_ids"]
    first = trainer.accelerator.process_index * len(prompt_ids)
    completions = []
    for row, prompt in enumerate(prompt_ids):
        rng = random.Random(repr((list(map(int, prompt)), first + row, trainer.state.global_step)))
        # Many more short completions than long ones: half of a batch is padding.
        length = rng.choice([2, 2, 3, 3, 4, trainer.max_completion_length])
        completions.append([rng.choice(letters) for _ in range(length - 1)])
        completions[-1].append(tokenizer.eos_token_id)
    return completions


class Fixed(GRPOTrainer):
    """A GRPOTrainer whose completions follow from their prompt and their place in the batch."""

    def _generate_single_turn(self, prompt_ids: list[Any], *rest: Any, **more: Any) -> Any:
        return completions_of(self, prompt_ids), None


class CPPOFixed(CPPOMixin, Fixed):
    """What a user writes for a trainer of their own."""


def trainer_of(
    family: str = "text",
    cppo: CPPO | None = None,
    *,
    base: type | None = None,
    config: type = GRPOConfig,
    rewards: Callable[..., Any] = noise,
    chat_template: str = "",
    rows: Dataset | None = None,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer of a fresh tiny model, TRL's own without `cppo`."""
    model, processor = load_model(folder_of(family)), tiny(family)[1]
    processor = getattr(processor, "tokenizer", processor) if family == "text" else processor
    processor.chat_template = chat_template or processor.chat_template
    options = {**SMALL, "output_dir": tempfile.mkdtemp(dir=SCRATCH.name), **options}
    torch.manual_seed(0)  # of LoRA's weights, which older TRL draws before it seeds
    if cppo is not None:
        more = {"cppo": cppo, **(more or {})}
    return (base or (Fixed if cppo is None else CPPOFixed))(
        model=model,
        reward_funcs=rewards,
        args=config(**{name: value for name, value in options.items() if value is not None}),
        train_dataset=rows or rows_of(family),
        processing_class=processor,
        **(more or {}),
    )


def trained(*args: Any, **options: Any) -> Any:
    """A trainer after its run."""
    trainer = trainer_of(*args, **options)
    trainer.train()
    return trainer


def late(options: CPPO) -> CPPO:
    """The same, with pruning after the old and reference log-probabilities."""
    return dataclasses.replace(options, early=False)


def logged(trainer: Any, name: str) -> list[float]:
    """A metric, step by step."""
    return [row[name] for row in trainer.state.log_history if name in row]


def watched(trainer: Any) -> dict[str, list[Any]]:
    """Records what passes the trainer: rollouts, micro-batches, tokens of each forward."""
    seen: dict[str, list[Any]] = {"rollouts": [], "micro": [], "tokens": [], "grad_tokens": []}
    rollout, loss = trainer._generate_and_score_completions, trainer._compute_loss
    model = trainer.model
    forward = model.forward

    def watch_rollout(inputs: Any) -> Any:
        seen["rollouts"].append(rollout(inputs))
        return seen["rollouts"][-1]

    def watch_loss(model: Any, inputs: Any) -> Any:
        seen["micro"].append(inputs)
        return loss(model, inputs)

    def watch_forward(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        seen["grad_tokens" if torch.is_grad_enabled() else "tokens"].append(ids.numel())
        return forward(*args, **kwargs)

    trainer._generate_and_score_completions = watch_rollout
    trainer._compute_loss = watch_loss
    model.forward = watch_forward
    return seen


def watched_run(*args: Any, **options: Any) -> tuple[Any, dict[str, list[Any]]]:
    """A trainer after its run, and what passed it."""
    trainer = trainer_of(*args, **options)
    seen = watched(trainer)
    trainer.train()
    return trainer, seen


def micro_batch(trainer: Any, rollouts: Any, advantages: Any) -> dict[str, Any]:
    """Our rollouts as TRL's inputs of a loss; each question has images."""
    width, prompts = rollouts.prompts.input_ids.shape[1], rollouts.prompts
    questions, group = prompts.questions, rollouts.group_size
    order = [number for number in range(len(questions)) for _ in range(group)]
    asked = [with_images(questions[q].messages, questions[q].images) for q in order]
    # As TRL calls the processor.
    processed = trainer.processing_class(
        images=[list(questions[q].images) for q in order],
        text=[
            apply_chat_template({"prompt": p}, trainer.processing_class)["prompt"] for p in asked
        ],
        padding=True,
        return_tensors="pt",
    )
    assert torch.equal(processed.pop("input_ids"), _padded_as(trainer, prompts)[order])
    processed.pop("attention_mask")
    completion_ids = rollouts.input_ids[:, width:]
    for name in WHOLE:
        if name in processed:
            answers = completion_ids.new_zeros(completion_ids.shape)
            processed[name] = torch.cat([processed[name], answers], 1)
    inputs = {
        "prompt_ids": prompts.input_ids[order],
        "prompt_mask": prompts.attention_mask[order].long(),
        "completion_ids": completion_ids,
        "completion_mask": rollouts.completion_mask[:, width:].long(),
        "advantages": advantages,
        "num_items_in_batch": rollouts.completion_mask.sum(),
        **processed,
        "num_images": [len(questions[q].images) for q in order],
        "cppo_seed": torch.zeros(len(order), dtype=torch.int64),
    }
    tiles = _tiles(trainer, questions, inputs)
    if tiles is not None:
        inputs["num_tiles"] = [tiles[q] for q in order]
    pictures = pictures_of(trainer, asked, inputs)
    return inputs if pictures is None else inputs | {"cppo_pictures": pictures}


def _padded_as(trainer: Any, prompts: Any) -> torch.Tensor:
    pad = trainer.processing_class.tokenizer.pad_token_id
    ids: torch.Tensor = prompts.input_ids.masked_fill(~prompts.attention_mask, pad)
    return ids


def _tiles(trainer: Any, questions: Any, inputs: dict[str, Any]) -> list[int] | None:
    """What each question's images are cut into, where TRL counts that."""
    pixels = inputs["pixel_values"]
    if pixels.dim() != 4 or len(pixels) == sum(inputs["num_images"]):
        return None
    cut = trainer.processing_class.image_processor
    return [len(cut(images=list(own.images))["pixel_values"]) for own in questions]
