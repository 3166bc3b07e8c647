"""Contrastive perception, VPPO and PAPO in TRL with models whose images are not Qwen-VL's patches.

What each family's processor makes of images has another layout, and TRL pads and splits it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")

from datasets import Dataset
from trainer_cases import (
    fixed_batch,
    fixed_rollouts,
    gradients,
    question,
    relative_difference,
    same,
    weights_of,
)
from trainer_cases import image as picture
from trl.trainer.utils import split_pixel_values_by_grid
from trl_cases import late, logged, micro_batch, tiny, trainer_of, watched, watched_run

import cppo
from cppo import LossConfig
from cppo.integrations import trl_pictures
from cppo.integrations.trl import CPPO, check
from cppo.integrations.trl_perception import weigh
from cppo.integrations.trl_pictures import pictures_of, pixels_of
from cppo.records import NumItems
from cppo.train.algorithm import microbatch_loss
from cppo.train.perception import compared
from cppo.train.policy import Policy, prepare

# Those that TRL can train.
FAMILIES = (
    *("gemma3", "llava", "llava_next", "idefics3", "smolvlm", "internvl", "mistral3", "gemma4"),
    *("glm4v", "qwen3_5"),
)
LOSSES = {
    "cpl": LossConfig(cpl_coef=2.0),
    "cpl_all": LossConfig(perception="cpl_all", cpl_coef=2.0),
    "vppo": LossConfig(perception="vppo", vppo_floor=0.5),
    "papo": LossConfig(perception="papo", papo_coef=30.0),
}
# Older TRL splits images by rows, not by their number.
_TWO = {"pixel_values": torch.zeros(3, 1), "num_images": [1, 2]}
SEVERAL = isinstance(split_pixel_values_by_grid(_TWO)["pixel_values"], list)


def dimmed(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return 0.9 * pixels + 0.05


def darkened(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return 0.2 * pixels


VIEWS = {"positive_views": (dimmed,), "negative_views": (darkened,)}


class Alone:
    size, rank = 1, 0


def unchanged(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return pixels


def skip_papo(name: str) -> None:
    if name == "papo" and not check()[-1].fits:
        pytest.skip("PAPO needs trl 1.15")


@functools.cache
def case(family: str) -> tuple[Any, Any, Any]:
    """A model as our trainer prepares it, its processor, and a batch of two questions."""
    model, processor = tiny(family)
    model = prepare(model, cppo.CPPOConfig(), torch.device("cpu"), processor)
    more = [picture(96, 48, 3)] if SEVERAL else []
    questions = [
        question("How many?", [picture(48, 24, 1)]),
        question("What is the sum of the digits?", [picture(24, 72, 2), *more]),
    ]
    batch = fixed_batch(fixed_rollouts(model, processor, questions, group_size=3))
    batch.advantages[4] = 0
    return model, processor, batch


def of_our_trainer(family: str, loss: LossConfig) -> Any:
    model, processor, batch = case(family)
    config, rows = cppo.CPPOConfig(loss=loss, max_completion_tokens=9, **VIEWS), torch.arange(6)
    items = NumItems(*batch.counts(rows))
    if loss.compares_removed:
        policy = Policy(model, processor, config, torch.device("cpu"))
        found, _ = compared(policy, batch, None, lambda call: call(), Alone())  # type: ignore[arg-type]
        batch = dataclasses.replace(batch, per_token=found)
    return gradients(
        model.train(),
        lambda: microbatch_loss(model, batch, rows, items, config, processor).loss.backward(),
    )


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, "cpl_all") for family in FAMILIES]
    + [(family, name) for family in ("gemma3", "llava") for name in ("vppo", "papo")]
    + [("gemma3", "cpl"), ("smolvlm", "cpl")],
)
def test_gradients_are_those_of_our_trainer_on_the_same_batch(family: str, name: str) -> None:
    skip_papo(name)
    skip_several(family)
    loss = LOSSES[name]
    model, _, batch = case(family)
    options = dict(num_generations=3, per_device_train_batch_size=6, beta=0.0, num_iterations=1)
    trainer = trainer_of(family, cppo=CPPO(loss=loss, **VIEWS), loss_type="grpo", **options)
    trainer.model.load_state_dict(model.state_dict())
    trainer.current_gradient_accumulation_steps = 1
    inputs = micro_batch(trainer, batch.rollouts, batch.advantages)
    theirs = trainer.model.train()
    if name == "vppo":
        with torch.no_grad():
            inputs = weigh(trainer, inputs)
    found = gradients(theirs, lambda: trainer.compute_loss(theirs, inputs).backward())
    ours = dataclasses.replace(loss, reduction="grpo")
    assert relative_difference(found, of_our_trainer(family, ours)) < 2e-5
    plain = dataclasses.replace(ours, perception="cpl", cpl_coef=0.0)
    assert relative_difference(found, of_our_trainer(family, plain)) > 1e-2


# A run of TRL


def skip_several(family: str) -> None:
    if not SEVERAL and family == "internvl":
        pytest.skip("this TRL cannot train InternVL")


def rows(count: int = 8) -> Dataset:
    """Questions with pictures of all sizes, one or two where TRL can split them."""
    sizes = [(48, 24), (24, 72), (96, 48), (60, 40)]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is {'it ' * (i % 3)}{i}?"}],
                "images": [picture(*sizes[(i + j) % 4], i + j) for j in range(1 + i % 2 * SEVERAL)],
            }
            for i in range(count)
        ]
    )


def run(family: str, options: CPPO, **more: Any) -> Any:
    more = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2) | more
    return watched_run(family, options, rows=rows(), **more)


@pytest.mark.parametrize("family", ["gemma3", "llava_next", "idefics3", "internvl", "gemma4"])
def test_a_run_makes_each_view_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a question's completions are dealt over two micro-batches, and trained on twice."""
    skip_several(family)
    made, original = [], trl_pictures.prepared_views

    def watch(images: Any, *args: Any, **options: Any) -> Any:
        made.append(id(images))
        return original(images, *args, **options)

    monkeypatch.setattr(trl_pictures, "prepared_views", watch)
    options = CPPO(prune_rate=0.5, loss=LOSSES["cpl_all"])
    trainer, seen = run(family, options)
    assert all(value > 0 for value in logged(trainer, "cppo/cpl_loss"))
    (rollout,) = seen["rollouts"]
    shown = {
        id(own): own
        for own, advantage in zip(rollout["cppo_pictures"], rollout["advantages"], strict=True)
        if advantage > 0
    }
    assert len(made) == 2 * len(shown) > 2  # of two questions
    assert len({own.seed for own in shown.values()}) == len(shown)
    after, _ = run(family, late(options))
    assert same(weights_of(trainer.model), weights_of(after.model))
    plain, _ = run(family, dataclasses.replace(options, loss=LossConfig(cpl_coef=0)))
    assert not same(weights_of(trainer.model), weights_of(plain.model))


# Mistral 3's processor does not take prompts of different lengths as TRL tokenizes them.
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mistral3"])
def test_each_row_keeps_its_own_pictures(family: str) -> None:
    """A view that changes nothing gives each row of each micro-batch the pixels that it has."""
    skip_several(family)
    views = {"positive_views": (unchanged,), "negative_views": (unchanged,)}
    trainer, seen = run(family, CPPO(prune_rate=0.25, loss=LOSSES["cpl_all"], **views))
    for micro in seen["micro"]:
        if "cppo_pictures" not in micro:
            assert family in ("glm4v", "qwen3_5")
            continue
        pixels = micro["pixel_values"]
        found = pixels_of(trainer, micro, micro["cppo_pictures"], "negative")
        assert found.shape == pixels.shape
        assert (found - pixels).abs().mean() < 0.05 < 0.2 < pixels.std()


@pytest.mark.parametrize("name", ["vppo", "papo"])
def test_a_run_of_another_perception(name: str) -> None:
    skip_papo(name)
    trainer, _ = run("gemma3", CPPO(prune_rate=0.5, loss=LOSSES[name]), num_iterations=1)
    key = {"vppo": "vppo_dependency", "papo": "papo_kl"}[name]
    assert all(value > 0 for value in logged(trainer, f"cppo/{key}"))


@pytest.mark.parametrize("family", ["llava_next", "idefics3"])
def test_further_questions_are_padded_as_the_others(family: str) -> None:
    """Their pictures are cut into more, or fewer, than those of the questions that stay."""
    skip_papo("papo")

    def sometimes(completions: Any, prompts: Any, **columns: Any) -> list[float]:
        texts = [text[0]["content"] for text in completions]
        is_even = [int(prompt[-1]["content"][-1]["text"][-2]) % 2 == 0 for prompt in prompts]
        return [
            len(t) % 5 + len(t) / 9 if even else 0.1 for t, even in zip(texts, is_even, strict=True)
        ]

    views = {"positive_views": (unchanged,), "negative_views": (unchanged,)}
    options = CPPO(drop_zero_variance=True, loss=LOSSES["cpl_all"], **views)
    trainer, seen = run(
        family, options, rewards=sometimes, num_iterations=1, loss_type="dapo", max_steps=4
    )
    assert max(logged(trainer, "cppo/refills")) > 0
    for micro in seen["micro"]:
        found = pixels_of(trainer, micro, micro["cppo_pictures"], "negative")
        assert (found - micro["pixel_values"]).abs().mean() < 0.05


@pytest.mark.parametrize("how", ["pack", "share_prompts"])
@pytest.mark.parametrize(
    "family", ["llava", "llava_next", "idefics3", "internvl", "gemma4", "glm4v"]
)
def test_pictures_train_packed_as_padded(family: str, how: str) -> None:
    skip_several(family)
    moved, tokens = {}, {}
    for packs in (False, True):
        options = dataclasses.replace(CPPO(prune_rate=0.25, loss=LOSSES["cpl_all"]), **{how: packs})
        trainer = trainer_of(
            family, options, rows=rows(), per_device_train_batch_size=4,
            gradient_accumulation_steps=2, num_iterations=1, beta=0.0,
        )  # fmt: skip
        trainer.model.double()
        before = {name: p.detach().clone() for name, p in weights_of(trainer.model).items()}
        seen = watched(trainer)
        trainer.train()
        after = weights_of(trainer.model)
        moved[packs] = {name: after[name] - before[name] for name in before}
        tokens[packs] = sum(seen["grad_tokens"])
    assert relative_difference(moved[True], moved[False]) < 1e-6
    assert tokens[True] < tokens[False]


# What is refused


@pytest.mark.parametrize("how", ["pack", "share_prompts"])
def test_images_that_must_not_be_packed_are_refused_before_training(how: str) -> None:
    options = CPPO(**{how: True})
    with pytest.raises(ValueError, match="leave them off: .*'gemma3'.*packed sequences, with imag"):
        trainer_of("gemma3", options, rows=rows())
    text = rows().remove_columns("images")
    trainer_of("gemma3", options, rows=text)  # they are right there
    asked = [{"role": "user", "content": [{"type": "image", "image": "cat.png"}]}]
    with pytest.raises(ValueError, match="packed sequences, with images"):
        trainer_of("gemma3", options, rows=Dataset.from_list([{"prompt": asked}] * 8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_images=[2]), "a completion has 2 images, of which its prompt has 1 .tools may"),
        (dict(image="cat.png"), "perturbs PIL images, got an image as str"),
        (dict(prompts=None), "has 1 images, of which its prompt has 0"),
    ],
)
def test_pictures_that_cannot_be_perturbed_are_told(change: dict[str, Any], words: str) -> None:
    trainer = trainer_of("gemma3", CPPO())
    image = change.get("image", picture(24, 24))
    prompts = [[{"role": "user", "content": [{"type": "image", "image": image}]}]]
    rollout = {"num_images": change.get("num_images", [1]), "cppo_seed": torch.zeros(1)}
    rollout["pixel_values"] = torch.zeros(1, 3, 56, 56)
    with pytest.raises(ValueError, match=words):
        pictures_of(trainer, change.get("prompts", prompts), rollout)
