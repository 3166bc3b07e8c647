"""Contrastive perception, VPPO and PAPO in TRL with models whose images are not Qwen-VL's patches.

What each family's processor makes of images has another layout, and TRL pads and splits it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")

from datasets import Dataset
from trainer_cases import image as picture
from trainer_cases import relative_difference, same, weights_of
from trl_cases import late, logged, trainer_of, watched, watched_run
from trl_gradients import LOSSES, SEVERAL, assert_gradients_of_our_trainer, skip_papo

from cppo import LossConfig
from cppo.integrations import trl_pictures
from cppo.integrations.trl import CPPO
from cppo.integrations.trl_pictures import pictures_of, pixels_of

# Those that TRL can train.
FAMILIES = (
    *("gemma3", "llava", "llava_next", "idefics3", "smolvlm", "internvl", "mistral3", "gemma4"),
    *("glm4v", "qwen3_5"),
)


def unchanged(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return pixels


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, "cpl_all") for family in FAMILIES]
    + [(family, name) for family in ("gemma3", "llava") for name in ("vppo", "papo")]
    + [("gemma3", "cpl"), ("smolvlm", "cpl")],
)
def test_gradients_are_those_of_our_trainer_on_the_same_batch(family: str, name: str) -> None:
    skip_papo(name)
    skip_several(family)
    assert_gradients_of_our_trainer(family, LOSSES[name], "grpo", 2e-5)


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
