"""What a demo's report shows of a trained model: images in three views, tokens by entropy shift."""

from __future__ import annotations

from typing import Any

import torch

from cppo.inspection.looking import contrasting, tokens_in_views
from cppo.questions import question_text
from cppo.seeds import seed_from
from cppo.train.trainer import CPPOTrainer
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
                "question": question_text(question.messages),
                "answer": question.columns["answer"],
            }
        )
    return examples


@torch.no_grad()
def example_completions(trainer: CPPOTrainer, count: int = 6) -> list[dict[str, Any]]:
    """Return completions of held-out questions with the entropy shift of every token."""
    config = contrasting(trainer.config, trainer.config.loss.temperature)
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
    tokens = tokens_in_views(trainer.model, batch, chosen, config, trainer.processor)
    return [
        {
            "question": question_text(rollouts.question_of(row).messages),
            "answer": rollouts.question_of(row).columns["answer"],
            "image": rollouts.question_of(row).images[0],
            "tokens": [token.text for token in own],
            "entropy_shift": [token.shift for token in own],
            "selected": [token.selected for token in own],
            "reward": rewards[row].item(),
            "advantage": batch.advantages[row].item(),
        }
        for row, own in zip(chosen.tolist(), tokens, strict=True)
    ]
