"""VPPO, PAPO and every gated token in TRL: the gradients of our trainer, and what is run."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")

from trainer_cases import fixed_rollouts, packed, question, same, tiny, weights_of
from trainer_cases import image as picture
from trl import RLOOConfig, RLOOTrainer
from trl_cases import logged, micro_batch, trained, trainer_of, watched_run
from trl_gradients import LOSSES, OF_TWO, PAPO, VIEWS, assert_gradients_of_our_trainer, skip_papo

from cppo.integrations import trl_options, trl_perception
from cppo.integrations.trl import CPPO, CPPOMixin
from cppo.integrations.trl_perception import weigh


@pytest.mark.parametrize(
    ("name", "reduction"),
    [(name, "grpo") for name in LOSSES] + [("papo, entropies", "dapo"), ("papo", "dr_grpo")],
)
def test_gradients_are_those_of_our_trainer_on_the_same_batch(name: str, reduction: str) -> None:
    skip_papo(name)
    trainer = assert_gradients_of_our_trainer("qwen2_5_vl", LOSSES[name], reduction, 1e-5)
    if name == "vppo":
        assert 0.4 <= trainer._metrics["train"]["cppo/vppo_token_share"][0] < 0.7


@pytest.mark.parametrize("loss_type", ["bnpo", "luspo", "cispo", "sapo"])
def test_the_term_is_divided_as_the_distance_to_the_reference_is(loss_type: str) -> None:
    """Both are means of k3: with the reference's log-probabilities for those without the image."""
    skip_papo("papo")
    trainer = trainer_of("qwen2_5_vl", cppo=CPPO(loss=PAPO), loss_type=loss_type, num_iterations=1)
    trainer.current_gradient_accumulation_steps = 2
    trainer.args.steps_per_generation = 4
    torch.manual_seed(0)
    mask = (torch.rand(4, 5) < 0.7).long()
    mask[:, 0] = 1
    logps = -torch.rand(4, 5)
    kl = (-0.5 * logps).exp() + 0.5 * logps - 1
    inputs = {"completion_mask": mask, "num_items_in_batch": torch.tensor(37)}
    ours = trl_perception._reduced(trainer, kl * mask, mask, inputs)
    trainer.beta = 1.0

    def forward(*args: Any, **kwargs: Any) -> Any:
        return logps, torch.zeros_like(logps), None

    trainer._forward = lambda call: forward()
    ids = torch.ones(4, 5, dtype=torch.long)
    inputs |= {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids}
    inputs |= {"advantages": torch.zeros(4), "ref_per_token_logps": logps - 0.5 * logps}
    trainer.model.train()
    assert torch.allclose(trainer._compute_loss(trainer.model, inputs), ours)


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo", "dr_grpo"])
def test_rows_that_fill_up_leave_the_term_as_it_is(loss_type: str) -> None:
    """They have no token, so that only a mean over rows has to make up for them."""
    trainer = SimpleNamespace(
        cppo=CPPO(loss=PAPO),
        args=SimpleNamespace(loss_type=loss_type, steps_per_generation=1),
        loss_type=loss_type,
        current_gradient_accumulation_steps=1,
        max_completion_length=4,
        accelerator=SimpleNamespace(gather=lambda values: values, num_processes=1),
        _metrics={"train": defaultdict(list)},
        _forward=lambda call: (-0.1 * call["input_ids"][:, 2:], torch.zeros(1)),
    )

    def term(rows: int, **weight: Any) -> Any:
        ids = torch.arange(18).view(3, 6)[:rows]
        mask = torch.tensor([1, 1, 0])[:rows, None].expand(-1, 4)
        inputs = {"prompt_ids": ids[:, :2], "completion_ids": ids[:, 2:], "num_images": [1] * rows}
        inputs |= {"completion_mask": torch.ones_like(mask), "tool_mask": mask, **weight}
        inputs |= {"advantages": torch.zeros(rows), "num_items_in_batch": mask.sum()}
        own = (-0.3 * ids[:, 2:]).requires_grad_()
        call = {"input_ids": ids, "num_images": [1] * rows}
        return trl_perception.papo(trainer, inputs, [(call, (own, own))])

    filled = term(3, cppo_weight=torch.tensor([1.5, 1.5, 0.0]))
    assert torch.allclose(filled, term(2))


@pytest.mark.parametrize("prune_rate", [0.0, 0.5])
@pytest.mark.parametrize("name", ["vppo", "papo"])
def test_a_run(name: str, prune_rate: float) -> None:
    skip_papo(name)
    options = CPPO(prune_rate=prune_rate, loss=LOSSES[name], negative_views=("masked_patches",))
    trainer, seen = watched_run("qwen2_5_vl", cppo=options, num_iterations=1, beta=0.0)
    keys = {
        "vppo": ("vppo_dependency", "vppo_token_share", "vppo_largest_factor"),
        "papo": ("papo_kl",),
    }
    for key in keys[name]:
        values = logged(trainer, f"cppo/{key}")
        assert len(values) == 2 and all(value > 0 for value in values)
    for rollout in seen["rollouts"]:
        assert rollout["advantages"].dim() == (2 if name == "vppo" else 1)
    if name == "vppo":
        for micro in seen["micro"]:
            counts = micro["completion_mask"].sum(1)
            learning = (micro["advantages"] != 0).sum(1)
            assert ((learning == (0.4 * counts - 1e-6).ceil()) | (learning == 0)).all()
        # A rollout of 8 or 4 rows: the policy's own logps and those without the image.
        tokens = [
            micro["prompt_ids"].numel() + micro["completion_ids"].numel() for micro in seen["micro"]
        ]
        assert len(seen["tokens"]) >= 2 * len(tokens)
    assert not same(weights_of(trainer.model), weights_of(trainer_of("qwen2_5_vl").model))


def test_a_rollout_whose_completions_were_all_cut_is_weighed() -> None:
    """mask_truncated_completions leaves no token of them."""
    model, processor = tiny("qwen2_5_vl")
    questions = [question("How many?", [picture(48, 24, i)]) for i in (1, 2)]
    rollouts = fixed_rollouts(packed(model), processor, questions, group_size=3)
    trainer = trainer_of("qwen2_5_vl", CPPO(loss=LOSSES["vppo"], **VIEWS), **OF_TWO)
    advantages = torch.tensor([1.0, 0.0, -1.0, 1.0, 0.0, -1.0])
    inputs = micro_batch(trainer, rollouts, advantages)
    inputs["tool_mask"] = torch.zeros_like(inputs["completion_mask"])
    trainer.model.train()
    with torch.no_grad():
        rollout = weigh(trainer, inputs)
    assert not rollout["advantages"].any()
    assert trainer._metrics["train"]["cppo/vppo_token_share"] == [0.0]


@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_a_ratio_of_the_whole_completion_chooses_no_tokens(loss_type: str) -> None:
    options = dict(importance_sampling_level="sequence", loss_type=loss_type, num_iterations=1)

    def made() -> Any:
        return trainer_of("qwen2_5_vl", cppo=CPPO(loss=LOSSES["vppo"]), **options)

    if loss_type == "cispo":
        made()  # its gradient is through the token's own log-probability
        return
    with pytest.raises(ValueError, match="take importance_sampling_level='token'"):
        made()


@pytest.mark.parametrize("name", ["vppo", "papo"])
def test_text_alone_is_plain_trl_bit_for_bit(name: str) -> None:
    ours = trained("text", cppo=CPPO(trim=False, loss=LOSSES[name]))
    assert same(weights_of(ours.model), weights_of(trained("text").model))


@pytest.mark.parametrize("name", ["vppo", "papo"])
def test_a_loss_of_completions_is_refused(name: str) -> None:
    class Mine(CPPOMixin, RLOOTrainer):
        pass

    with pytest.raises(ValueError, match=f"perception = '{name}' needs a loss of tokens; that of"):
        trainer_of(
            "qwen2_5_vl", cppo=CPPO(loss=LOSSES[name]), base=Mine, config=RLOOConfig,
            loss_type=None,
        )  # fmt: skip


def test_papo_is_refused_where_entropies_have_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_options, "installed", lambda package: ("1.14.0", (1, 14)))
    with pytest.raises(ValueError, match="perception = 'papo' needs trl 1.15"):
        trainer_of("qwen2_5_vl", cppo=CPPO(loss=PAPO))
