"""Contrastive perception, VPPO and PAPO in TRL with models whose images are not Qwen-VL's patches.

What each family's processor makes of images has another layout, and TRL pads and splits it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")

from trainer_cases import fixed_batch, fixed_rollouts, gradients, question, relative_difference
from trainer_cases import image as picture
from trl.trainer.utils import split_pixel_values_by_grid
from trl_cases import logged, micro_batch, rows_of, tiny, trainer_of, watched_run

import cppo
from cppo import LossConfig
from cppo.integrations.trl import CPPO, check
from cppo.integrations.trl_perception import weigh
from cppo.integrations.trl_pictures import Pictures
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
    assert relative_difference(found, of_our_trainer(family, ours)) < 1e-5
    plain = dataclasses.replace(ours, perception="cpl", cpl_coef=0.0)
    assert relative_difference(found, of_our_trainer(family, plain)) > 1e-2
