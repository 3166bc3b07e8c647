"""Which tokens of a model's answer depend on the image, by the numbers that training uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cppo.inspection.record import Answer, Inspection, Token
from cppo.model.forward import lm_head
from cppo.model.left_as_found import left_as_found
from cppo.model.load import special_token_ids_to_suppress
from cppo.model.prompts import encode_questions, tokenizer_of
from cppo.model.ways import choose_ways, shown_picture
from cppo.model.wrappers import has_vision, unwrap
from cppo.ops.perception_mask import perception_mask
from cppo.ops.token_stats import linear_token_stats
from cppo.options.trainer import CPPOConfig, LossConfig
from cppo.questions import Question, as_question
from cppo.rollouts.rollout import Rollouts, assembled, sample_completions, sampling_of
from cppo.rollouts.sampler import Sampled
from cppo.seeds import seed_from
from cppo.train.batch import Batch
from cppo.train.views import forward_views
from cppo.views import perturb, views_from_names
from cppo.views.pictures import as_seen


def inspect(
    model: Any,
    processor: Any,
    image: Image.Image | Sequence[Image.Image],
    question: str,
    *,
    answer: str | None = None,
    samples: int = 1,
    temperature: float | None = 1.0,
    seed: int = 0,
    config: CPPOConfig | None = None,
) -> Inspection:
    """Return what a model looks at: its answers, token by token, in three views of the image.

    Specification: log-probabilities and entropies of the answer's tokens under the image (anchor),
    the positive and the negative view, and `cppo.perception_mask` of them (arXiv 2601.00501), by
    the forward of the trainer.
    Args:
        model: a vision-language model of transformers, which runs in its own dtype, without
            autocast; it is left as it was found.
        processor: its processor.
        image: one or several, in the order of their places before the question.
        question: text.
        answer: an answer to look at. None: the model samples.
        samples: how many answers are sampled.
        temperature: of the softmax, for sampling and for the numbers. None: the greedy answer, and
            numbers at temperature 1.
        seed: of the samples and of the perturbations.
        config: gives the views (`positive_views`, `negative_views`), `loss.fraction`,
            `max_completion_tokens` and `chat_template_kwargs`. None: `CPPOConfig()`.
    Returns: Inspection, with `.html()`, `.json()` and `.save(path)`.
    Raises: TypeError for a model without a vision encoder; ValueError for samples < 1, an empty
        answer, and a model, image or question that the trainer would refuse.
    """
    config = CPPOConfig() if config is None else config
    _check(model, samples, temperature, answer)
    images = [image] if isinstance(image, Image.Image) else list(image)
    asked = as_question({"prompt": question, "images": images})
    template = config.chat_template_kwargs or {}
    with left_as_found(model):
        choose_ways(model, "auto", shown=shown_picture(model, processor, template))
        torch.manual_seed(seed)
        rollouts = _answers(model, processor, asked, answer, samples, temperature, config)
        rows = torch.arange(len(rollouts.texts))
        never = tuple(special_token_ids_to_suppress(model, processor))
        batch = Batch(rollouts, torch.ones(len(rows)), rows, suppressed=never, seed=seed)
        looking = contrasting(config, temperature or 1.0)
        tokens = tokens_in_views(model, batch, rows, looking, processor)
    cut = [bool(own) and answer is None for own in rollouts.truncated]
    answers = [Answer(*own) for own in zip(rollouts.texts, tokens, cut, strict=True)]
    return Inspection(
        _name(model),
        question,
        _views(asked, processor, seed, config),
        answers,
        {
            "given": answer is not None,
            "temperature": temperature,
            "seed": seed,
            "fraction": config.loss.fraction,
            "positive_views": [str(own) for own in config.positive_views],
            "negative_views": [str(own) for own in config.negative_views],
        },
    )


def _name(model: nn.Module) -> str:
    base = unwrap(model)
    return base.config.name_or_path or type(base).__name__


def _check(model: nn.Module, samples: int, temperature: float | None, answer: str | None) -> None:
    if not has_vision(model):
        raise TypeError(
            "cppo.inspect: model must be a vision-language model, got "
            f"{type(unwrap(model)).__name__}, which takes no images"
        )
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"cppo.inspect: samples must be a whole number >= 1, got {samples!r}")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"cppo.inspect: temperature must be > 0 or None, got {temperature!r}")
    if answer is not None and not answer:
        raise ValueError("cppo.inspect: answer must have text, or be None")


def _answers(
    model: Any,
    processor: Any,
    asked: Question,
    answer: str | None,
    samples: int,
    temperature: float | None,
    config: CPPOConfig,
) -> Rollouts:
    """Sampled answers, or the one that was given, behind the question."""
    prompts = encode_questions(model, processor, [asked], config.chat_template_kwargs or {})
    options: dict[str, Any] = {
        "group_size": 1 if answer is not None or temperature is None else samples,
        "max_new_tokens": config.max_completion_tokens,
        "temperature": temperature,
        "suppressed": special_token_ids_to_suppress(model, processor),
    }
    if answer is None:
        return sample_completions(model, processor, prompts, **options)
    ids = tokenizer_of(processor)(answer, add_special_tokens=False)["input_ids"]
    given = Sampled(torch.tensor([ids]), torch.zeros(1, len(ids)))
    return assembled(prompts, sampling_of(model, processor, **options), given, processor)


def contrasting(config: CPPOConfig, temperature: float) -> CPPOConfig:
    """The config under which all completions with images run in all three views."""
    loss = LossConfig(
        cpl_coef=1.0, gating=False, fraction=config.loss.fraction, temperature=temperature
    )
    return dataclasses.replace(config, loss=loss)


@torch.no_grad()
def tokens_in_views(
    model: Any, batch: Batch, rows: Tensor, config: CPPOConfig, processor: Any
) -> list[list[Token]]:
    """The tokens of some completions, with their numbers in every view.

    Args:
        rows: (R,) int64, completions of the batch whose questions have images.
        config: of `contrasting`.
    """
    hidden, packed = forward_views(model, batch, rows, config, processor)
    head, loss = lm_head(model, batch.suppressed)._asdict(), config.loss
    stats = {
        name: linear_token_stats(own, targets=packed.targets, temperature=loss.temperature, **head)
        for name, own in hidden._asdict().items()
    }
    selected = perception_mask(
        stats["anchor"].entropy,
        stats["negative"].entropy,
        fraction=loss.fraction,
        cu_seqlens=packed.row_cu_seqlens,
    )
    logps = {name: own.logps.tolist() for name, own in stats.items()}
    entropies = {name: own.entropy.tolist() for name, own in stats.items()}
    decode = tokenizer_of(processor).decode
    found = [
        Token(
            decode([token]),
            token,
            {name: values[place] for name, values in logps.items()},
            {name: values[place] for name, values in entropies.items()},
            entropies["negative"][place] - entropies["anchor"][place],
            chosen,
        )
        for place, (token, chosen) in enumerate(
            zip(packed.targets.tolist(), selected.tolist(), strict=True)
        )
    ]
    bounds = packed.row_cu_seqlens.tolist()
    return [found[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]


def _views(
    asked: Question, processor: Any, seed: int, config: CPPOConfig
) -> dict[str, list[Image.Image]]:
    """The pictures that the model was shown, by view: what `tokens_in_views` drew for them."""
    seen = [as_seen(image, processor.image_processor) for image in asked.images]
    views = {"anchor": seen}
    for name in ("positive", "negative"):
        chosen = views_from_names(list(getattr(config, f"{name}_views")))
        seeds = [seed_from(seed, name, 0, number) for number in range(len(seen))]
        views[name] = perturb(seen, chosen, seed=seeds)
    return views
