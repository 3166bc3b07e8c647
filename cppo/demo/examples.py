"""What a demo's report shows of a trained model: images in three views, tokens by entropy shift."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from cppo.config import CPPOConfig
from cppo.model.forward import lm_head
from cppo.model.prompts import tokenizer_of
from cppo.ops.perception_mask import perception_mask
from cppo.ops.token_stats import linear_token_stats
from cppo.seeds import seed_from
from cppo.train.trainer import CPPOTrainer
from cppo.train.views import forward_views
from cppo.views import perturb, views_from_names


def example_views(trainer: CPPOTrainer, count: int = 4) -> list[dict[str, Any]]:
    """Return held-out images in their three views."""
    config = trainer.config
    examples = []
    for number, question in enumerate(trainer.eval_questions[:count]):
        image = question.images[0]
        seed = seed_from(config.seed, "examples", number)
        examples.append(
            {
                "anchor": image,
                "positive": perturb(image, views_from_names(config.positive_views), seed=seed),
                "negative": perturb(image, views_from_names(config.negative_views), seed=seed),
                "question": _question_text(question),
                "answer": question.columns["answer"],
            }
        )
    return examples


@torch.no_grad()
def example_completions(trainer: CPPOTrainer, count: int = 6) -> list[dict[str, Any]]:
    """Return completions of held-out questions with the entropy shift of every token."""
    config = dataclasses.replace(
        trainer.config,
        # Any positive coefficient makes the views run.
        loss=dataclasses.replace(trainer.config.loss, gating=False, cpl_coef=1.0, perception="cpl"),
    )
    torch.manual_seed(seed_from(config.seed, "examples") % 2**32)
    asked = trainer.eval_questions[: 4 * count]
    rollouts = trainer.sample([trainer.questions.encode(question) for question in asked])
    rows = range(len(rollouts.texts))
    answers = [rollouts.question_of(row).columns["answer"] for row in rows]
    rewards = torch.tensor(trainer.reward_functions[0](rollouts.texts, answer=answers))
    batch = trainer.make_batch(rollouts, rewards)
    # The best completion of those questions where it stands out most.
    best, place = batch.advantages.view(-1, config.group_size).max(1)
    questions = best.topk(min(count, len(best))).indices.sort().values
    chosen = questions * config.group_size + place[questions]
    entropy, packed = _entropies(trainer, batch, chosen, config), batch.pack(chosen)
    shift = entropy["negative"] - entropy["anchor"]
    selected = perception_mask(
        entropy["anchor"],
        entropy["negative"],
        fraction=config.loss.fraction,
        cu_seqlens=packed.row_cu_seqlens,
    )
    bounds = packed.row_cu_seqlens.tolist()
    tokenizer = tokenizer_of(trainer.processor)
    return [
        {
            "question": _question_text(rollouts.question_of(row)),
            "answer": rollouts.question_of(row).columns["answer"],
            "image": rollouts.question_of(row).images[0],
            "tokens": [tokenizer.decode([token]) for token in packed.targets[start:stop].tolist()],
            "entropy_shift": shift[start:stop].tolist(),
            "selected": selected[start:stop].tolist(),
            "reward": rewards[row].item(),
            "advantage": batch.advantages[row].item(),
        }
        for row, start, stop in zip(chosen.tolist(), bounds[:-1], bounds[1:], strict=True)
    ]


def _entropies(
    trainer: CPPOTrainer, batch: Any, rows: torch.Tensor, config: CPPOConfig
) -> dict[str, torch.Tensor]:
    """The entropy of every token of some completions, by view."""
    views, packed = forward_views(trainer.model, batch, rows, config, trainer.processor)
    head = lm_head(trainer.model, batch.suppressed)._asdict()
    return {
        name: linear_token_stats(hidden, targets=packed.targets, **head).entropy
        for name, hidden in views._asdict().items()
        if hidden is not None
    }


def _question_text(question: Any) -> str:
    content = question.messages[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")
