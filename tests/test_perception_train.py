"""What an update with each `LossConfig.perception` runs, and what it does not.

That it computes the right thing is in tests/test_retraining.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_step import in_parts
from trainer_cases import (
    Alone,
    config,
    fixed_batch,
    fixed_rollouts,
    noise,
    questions_for,
    relative_difference,
    same,
    tiny,
    trainer_for,
    weights_of,
)

from cppo import backends
from cppo.train import views
from cppo.train.algorithm import microbatch_loss
from cppo.train.perception import compared, removed_entropy
from cppo.train.policy import Policy
from cppo.train.progress import PhaseTimer

HAS_FUSED = any(name != "reference" for name in backends.available("linear_cppo_loss"))


def policy_and_batch(**options: Any) -> tuple[Policy, Any]:
    """A model and sixteen completions, of four questions with 1, 2, no and 1 images."""
    model, processor = tiny("qwen2_5_vl", dtype=torch.float64)
    policy = Policy(model, processor, config(**options), torch.device("cpu"))
    rollouts = fixed_rollouts(policy.model, processor, questions_for("qwen2_5_vl"), group_size=4)
    batch = fixed_batch(rollouts, dtype=torch.float64)
    batch.advantages[5] = 0
    return policy, batch


class Together(Alone):
    """Two processes, of which this is one."""

    size = 2

    def __init__(self, other: list[float]) -> None:
        self.other = other

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


def now(call: Any) -> Any:
    return call()


# Forwards of a step: completions under a view, with a gradient or without.
Forwards = list[tuple[str, int, bool]]
IMAGES = 12  # of the completions of each step
WEIGHED = 11  # of them those with an advantage
PLAIN: Forwards = [("anchor", IMAGES, True), ("anchor", 4, True)]
RAN: dict[str, tuple[dict[str, Any], Forwards]] = {
    "cpl": ({}, [*PLAIN, ("positive", 6, True), ("negative", 6, True)]),
    "cpl_all": ({"perception": "cpl_all"}, [*PLAIN, ("positive", 6, True), ("negative", 6, True)]),
    "off": ({"cpl_coef": 0.0}, PLAIN),
    "vppo": (
        {"perception": "vppo"},
        [*PLAIN, ("anchor", WEIGHED, False), ("negative", WEIGHED, False)],
    ),
    "papo": ({"perception": "papo"}, [*PLAIN, ("negative", IMAGES, False)]),
    "papo, entropies": (
        {"perception": "papo", "papo_entropy_coef": 0.03, "entropy_coef": -0.03},
        [*PLAIN, ("negative", IMAGES, True)],
    ),
    "papo of nothing": ({"perception": "papo", "papo_coef": 0.0}, PLAIN),
}


@pytest.mark.parametrize("name", RAN)
def test_the_views_that_an_update_runs(tmp_path: Any, name: str, monkeypatch: Any) -> None:
    options, expected = RAN[name]
    trainer = trainer_for(tmp_path, "qwen2_5_vl", negative_views=("masked_patches",), **options)
    _, batch = policy_and_batch()
    ran: Forwards = []
    shown: dict[int, str] = {}
    stock, perturb = views.hidden_states, views._perturbed

    def perturbed(*arguments: Any) -> Any:
        view = perturb(*arguments)
        shown[id(view)] = arguments[-1]
        seen.append(view)
        return view

    def forward(model: Any, stream: Any) -> Any:
        view = shown.get(id(stream.images), "anchor")
        ran.append((view, len(stream.batch.kept), torch.is_grad_enabled()))
        return stock(model, stream)

    seen: list[Any] = []  # alive, so that no other has their ids
    monkeypatch.setattr(views, "hidden_states", forward)
    monkeypatch.setattr(views, "_perturbed", perturbed)
    update = trainer.new_update(PhaseTimer(), lambda batch: None)
    rollouts = batch.rollouts
    batch = dataclasses.replace(batch, advantages=batch.advantages.float())
    batch = update.prepared(batch)

    for completions, num_items in update.optimizer_steps(batch):
        for part in batch.microbatches(completions, 10**6):
            update.add_gradient(microbatch_loss, batch, part, num_items)
    assert sorted(ran) == sorted(expected)
    metrics = update.metrics()
    perturbed_views = sum(n for view, n, _ in ran if view != "anchor")
    assert metrics["perturbed_views"] == perturbed_views / 16
    if HAS_FUSED:
        check_rows(name, metrics["head_gemm_rows"], batch, rollouts)


def check_rows(name: str, ours: float, batch: Any, rollouts: Any) -> None:
    """Rows of the forward once, those with a gradient twice (hidden states and weight)."""
    every = sum(batch.response_lengths(batch.kept))
    still = batch.response_lengths(torch.tensor([5]))[0]
    plain = every + 2 * (every - still)
    if name in ("off", "papo of nothing"):
        # Where nearly every row has a gradient, all are multiplied.
        assert plain <= ours <= 3 * every
    elif name == "vppo":
        learn = int((batch.per_token["token_weights"][rollouts.completion_mask.bool()] > 0).sum())
        assert ours == every + 2 * (learn - still) < plain
    elif name == "papo":
        assert ours == 3 * every, "the term is there where A = 0, too"
    else:
        assert ours > plain


def test_the_weights_of_vppo_are_where_they_belong() -> None:
    policy, batch = policy_and_batch(perception="vppo", vppo_floor=0.5, optimizer_steps=2)
    found, metrics = compared(policy, batch, None, now, Alone())  # type: ignore[arg-type]
    weights, mask = found["token_weights"], batch.rollouts.completion_mask.bool()
    assert weights.shape == mask.shape and not weights.isnan().any()
    plain = [5, 8, 9, 10, 11]  # no advantage, no image
    assert (weights[plain][mask[plain]] == 1).all()
    for row in set(range(16)) - set(plain):
        tokens = int(mask[row].sum())
        own = weights[row][mask[row]]
        assert (own > 0).sum() == -(-2 * tokens // 5) and own.unique().numel() <= 2
    for part in batch.dealt(2):  # the factors of an optimizer step have a mean of 1
        factors = [weights[i][mask[i]].max() for i in part.tolist() if i not in plain]
        assert torch.stack(factors).mean().item() == pytest.approx(1)
        assert min(factors).item() == pytest.approx(0.5)
    share = metrics["vppo/token_share"]
    known = [i for i in range(16) if i not in plain]
    assert (
        share.terms == mask[known].sum() and share.total == (weights[known][mask[known]] > 0).sum()
    )
    assert metrics["vppo/largest_factor"].value == pytest.approx(weights.max().item())


def test_weights_of_chance_and_of_the_image_multiply(tmp_path: Any) -> None:
    options: dict[str, Any] = dict(prune="unbiased", prune_rate=0.5, rewards=noise, batch_size=16)
    trainer = trainer_for(
        tmp_path,
        "qwen2_5_vl",
        dynamic_allocation=False,
        perception="vppo",
        vppo_floor=0.5,
        **options,
    )
    questions = questions_for("qwen2_5_vl")
    rollouts = fixed_rollouts(trainer.model, trainer.processor, questions, group_size=4)
    batch = trainer.make_batch(rollouts, torch.tensor(noise(rollouts.texts)).double())
    chance = batch.per_token["token_weights"]
    trainer.model.eval()
    image = compared(trainer.policy, batch, None, now, Alone())[0]["token_weights"]  # type: ignore[arg-type]
    both = trainer.new_update(PhaseTimer(), lambda batch: None).prepared(batch)
    mask = rollouts.completion_mask.bool()
    expected, ours = (chance * image)[mask], both.per_token["token_weights"][mask]
    torch.testing.assert_close(ours, expected)
    # Neither is 1 everywhere, and the image's 0 stays 0.
    assert chance[batch.kept].unique().numel() > 2 and image[mask].unique().numel() > 2
    assert ((ours == 0) == ((chance == 0) | (image == 0))[mask]).all()
    # And the loss takes the product.
    packed = both.pack(both.kept)
    assert torch.equal(packed.per_token["token_weights"], ours[packed_order(both, mask)])


def packed_order(batch: Any, mask: torch.Tensor) -> torch.Tensor:
    """The places of the kept completions' response tokens among those of all."""
    places = torch.full(mask.shape, -1).masked_scatter(mask, torch.arange(int(mask.sum())))
    return places[batch.kept][mask[batch.kept]]


def test_completions_of_other_processes_are_compared_too() -> None:
    policy, batch = policy_and_batch(perception="vppo", vppo_floor=0.0)
    alone, _ = compared(policy, batch, None, now, Alone())  # type: ignore[arg-type]
    others = Together([0.5, float("nan")])
    both, _ = compared(policy, batch, None, now, others)  # type: ignore[arg-type]
    ours, theirs = alone["token_weights"], both["token_weights"]
    assert torch.equal(ours > 0, theirs > 0)
    # The other's completion depends on its image most: it has most of the mean.
    assert (theirs <= ours).all() and theirs.sum() < 0.5 * ours.sum()


def test_text_alone_is_trained_as_ever(tmp_path: Any) -> None:
    def trained(name: str, **options: Any) -> dict[str, torch.Tensor]:
        trainer = trainer_for(tmp_path / name, "text", **options)
        trainer.train()
        return weights_of(trainer.model)

    plain = trained("plain")
    for name in ("cpl_all", "vppo", "papo"):
        entropies = {"papo_entropy_coef": 0.03} if name == "papo" else {}
        assert same(trained(name, perception=name, **entropies), plain)


@pytest.mark.parametrize("reduction", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("perception", ["vppo", "papo", "papo, entropies", "cpl_all"])
def test_how_a_batch_is_cut_changes_nothing(perception: str, reduction: str) -> None:
    more = {"papo_entropy_coef": 0.5} if "entropies" in perception else {}
    options = {"perception": perception.split(",")[0], "papo_coef": 5.0, "cpl_coef": 1.0}
    policy, batch = policy_and_batch(reduction=reduction, max_length=9, **options, **more)
    model, processor, options = policy.model, policy.processor, policy.config
    if options.loss.compares_removed:
        found, _ = compared(policy, batch, None, now, Alone())  # type: ignore[arg-type]
        batch = dataclasses.replace(batch, per_token=found)
    cuts = [batch.microbatches(batch.kept, tokens) for tokens in (10**6, 150)]
    assert len(cuts[0]) < len(cuts[1])
    (loss, whole, outputs), (part_loss, parts, _) = (
        in_parts(model, processor, batch, cut, options) for cut in cuts
    )
    assert part_loss == pytest.approx(loss, rel=1e-6)
    assert relative_difference(parts, whole) < 1e-6
    if more:
        by_hand = 0.5 * sum(
            o.metrics["papo/entropy"] for o in outputs if "papo/entropy" in o.metrics
        )
        scale = (
            1.0 if reduction != "dr_grpo" else sum(batch.response_lengths(batch.kept)) / (16 * 9)
        )
        plain = dataclasses.replace(options.loss, papo_entropy_coef=0.0)
        told, _ = compared(
            Policy(model, processor, dataclasses.replace(options, loss=plain), torch.device("cpu")),
            batch, None, now, Alone(),  # type: ignore[arg-type]
        )  # fmt: skip
        without = dataclasses.replace(batch, per_token=told)
        rest, _, _ = in_parts(
            model, processor, without, cuts[0], dataclasses.replace(options, loss=plain)
        )
        assert loss - rest == pytest.approx((by_hand * scale).item(), rel=1e-6)


def test_no_penalty_where_there_is_no_image() -> None:
    policy, batch = policy_and_batch(perception="papo", papo_entropy_coef=0.1)
    packed = batch.pack(torch.tensor([8, 9]))
    given = (policy.model, batch, packed, None, policy.config, policy.processor)
    assert removed_entropy(*given) is None  # type: ignore[arg-type]
