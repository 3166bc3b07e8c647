"""The gradients of TRL's trainer and of ours: of the same loss, on the same batch with images."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from trainer_cases import (
    VIEWS,
    Alone,
    fixed_batch,
    fixed_rollouts,
    gradients,
    question,
    relative_difference,
)
from trainer_cases import image as picture
from trl.trainer.utils import split_pixel_values_by_grid
from trl_cases import micro_batch, tiny, trainer_of

import cppo
from cppo import LossConfig
from cppo.integrations.trl import CPPO, check
from cppo.integrations.trl_perception import weigh
from cppo.records import NumItems
from cppo.train.algorithm import microbatch_loss
from cppo.train.perception import compared
from cppo.train.policy import Policy, prepare

PAPO = LossConfig(perception="papo", papo_coef=30.0)
LOSSES = {
    "cpl": LossConfig(cpl_coef=2.0),
    "cpl, token": LossConfig(cpl_coef=2.0, cpl_reduction="token"),
    "cpl_all": LossConfig(perception="cpl_all", cpl_coef=2.0),
    "vppo": LossConfig(perception="vppo", vppo_floor=0.5),
    "papo": PAPO,
    "papo, entropies": dataclasses.replace(PAPO, papo_entropy_coef=0.5),
}
# Options of TRL for a batch of two questions.
OF_TWO = dict(num_generations=3, per_device_train_batch_size=6, beta=0.0, num_iterations=1)
# Older TRL splits images by rows, not by their number.
_TWO = {"pixel_values": torch.zeros(3, 1), "num_images": [1, 2]}
SEVERAL = isinstance(split_pixel_values_by_grid(_TWO)["pixel_values"], list)


def skip_papo(name: str) -> None:
    if "papo" in name and not check()[-1].fits:
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


def of_our_trainer(family: str, loss: LossConfig) -> dict[str, torch.Tensor]:
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


def assert_gradients_of_our_trainer(
    family: str, loss: LossConfig, reduction: str, bound: float
) -> Any:
    """Compares the gradients, also with those without perception. Returns TRL's trainer."""
    model, _, batch = case(family)
    trainer = trainer_of(family, CPPO(loss=loss, **VIEWS), loss_type=reduction, **OF_TWO)
    trainer.model.load_state_dict(model.state_dict())
    trainer.current_gradient_accumulation_steps = 1
    inputs = micro_batch(trainer, batch.rollouts, batch.advantages)
    theirs = trainer.model.train()
    if loss.perception == "vppo":
        with torch.no_grad():
            inputs = weigh(trainer, inputs)
        assert inputs["advantages"].shape == inputs["completion_ids"].shape
    found = gradients(theirs, lambda: trainer.compute_loss(theirs, inputs).backward())
    ours = dataclasses.replace(loss, reduction=reduction)
    assert relative_difference(found, of_our_trainer(family, ours)) < bound
    plain = dataclasses.replace(ours, perception="cpl", cpl_coef=0.0)
    assert relative_difference(found, of_our_trainer(family, plain)) > 1e-2
    return trainer
