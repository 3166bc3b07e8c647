"""The TRL adapter with tools, environments and several turns."""

import dataclasses
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")

from trainer_cases import image as picture
from trainer_cases import relative_difference, same, weights_of
from trl import GRPOTrainer
from trl.chat_template_utils import qwen3_chat_template, qwen3_vl_chat_template
from trl.trainer import grpo_trainer
from trl_cases import (
    HALF,
    HALF_LOOK,
    LOOK,
    CPPOMixin,
    completions_of,
    late,
    logged,
    noise,
    trainer_of,
    watched,
)

from cppo.integrations import trl_views

pytestmark = pytest.mark.skipif(
    not getattr(grpo_trainer, "_SUPPORTS_RESPONSE_TEMPLATE", False) and not find_spec("jmespath"),
    reason="tools in this TRL need jmespath",
)
CALL = '<tool_call>\n{{"name": "{name}", "arguments": {{"number": {number}}}}}\n</tool_call>'


def double(number: int) -> int:
    """Doubles a number.

    Args:
        number: the number.
    """
    return 2 * number


def zoom(number: int) -> list:
    """Shows a picture.

    Args:
        number: its number.
    """
    return [
        {"type": "image", "image": picture(24, 24, number)},
        {"type": "text", "text": "the picture"},
    ]


class Counter:
    """An environment: its method is a tool, its state lives as long as a completion."""

    def reset(self, **columns):
        self.total = 0

    def count(self, number: int) -> int:
        """Adds a number to the total.

        Args:
            number: the number.
        """
        self.total += number
        return self.total


class Calling(GRPOTrainer):
    """Every second completion calls a tool in its first turn and answers in its second."""

    def _generate_single_turn(self, prompt_ids, *rest, **more):
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        answers = completions_of(self, prompt_ids)
        (tool,) = {each.__name__ for each in self.tools}
        for row, prompt in enumerate(prompt_ids):
            if row % 2 == 0 and "<tool_response>" not in tokenizer.decode(prompt):
                call = CALL.format(name=tool, number=row)
                answers[row] = tokenizer(call, add_special_tokens=False)["input_ids"]
                answers[row].append(tokenizer.eos_token_id)
        return answers, None


class Mine(CPPOMixin, Calling):
    pass


def last_answer(completions, **columns):
    return noise([messages[-1:] for messages in completions])


def tool_run(cppo, family="text", template=qwen3_chat_template, **more):
    trainer = trainer_of(
        family,
        cppo,
        base=Mine,
        rewards=last_answer,
        max_completion_length=200,
        loss_type="dapo",
        chat_template=template,
        more=more,
    )
    seen = watched(trainer)
    trainer.train()
    return trainer, seen


@pytest.mark.parametrize(
    "more", [dict(tools=[double]), dict(environment_factory=Counter)], ids=["tools", "environment"]
)
def test_completions_with_tool_calls_are_pruned(more):
    runs = [tool_run(each, **more) for each in (HALF, late(HALF))]
    (early, early_seen), (after, after_seen) = runs
    assert same(weights_of(early.model), weights_of(after.model))
    assert 0 < 2 * sum(early_seen["tokens"]) == sum(after_seen["tokens"])
    whole, whole_seen = tool_run(dataclasses.replace(HALF, prune_rate=0.0), **more)
    (everything,), (rest,) = whole_seen["rollouts"], early_seen["rollouts"]
    assert logged(early, "cppo/kept_share") == [0.5]
    assert logged(whole, "tools/call_frequency") == [0.5] == logged(early, "tools/call_frequency")
    # What the tool wrote is in the rows that are left, and is not trained on.
    assert (everything["tool_mask"] == 0).any() and rest["tool_mask"].shape[0] == 4
    for row, tool_mask in zip(rest["completion_ids"], rest["tool_mask"], strict=True):
        (place,) = (everything["completion_ids"] == row).all(1).nonzero()[:, 0].unique()[:1]
        assert torch.equal(everything["tool_mask"][place], tool_mask)
    assert rest["num_items_in_batch"] == (rest["completion_mask"] * rest["tool_mask"]).sum()
    assert not same(weights_of(early.model), weights_of(whole.model))


def test_images_that_a_tool_brings_are_perturbed_with_the_others(monkeypatch):
    shown, perturb = [], trl_views.perturb_pixel_values

    def watch(pixels, grid, *rest, seeds, **more):
        shown.append((len(pixels), grid.prod(1).sum(), len(grid), len({*seeds})))
        return perturb(pixels, grid, *rest, seeds=seeds, **more)

    monkeypatch.setattr(trl_views, "perturb_pixel_values", watch)
    more = dict(family="qwen3_vl", template=qwen3_vl_chat_template, tools=[zoom])
    runs = [tool_run(each, **more) for each in (HALF_LOOK, late(HALF_LOOK))]
    assert same(*(weights_of(trainer.model) for trainer, _ in runs))
    (trainer, seen), _ = runs
    (rollout,) = seen["rollouts"]
    assert {*rollout["num_images"]} == {1, 2}
    # Both views of every image of the rows with A > 0, each image with a seed of its own.
    images = sum(
        count
        for count, advantage in zip(rollout["num_images"], rollout["advantages"], strict=True)
        if advantage > 0
    )
    assert len(shown) == 2 * 2 * 2  # runs, views, iterations
    for pixels, patches, found, seeds in shown:
        assert pixels == patches and found == images == seeds
    assert all(value > 0 for value in logged(trainer, "cppo/cpl_loss"))


class ZoomingAlike(Calling):
    """Every call brings the same picture; one answer after it may be cut short."""

    def _generate_single_turn(self, prompt_ids, *rest, **more):
        answers, logps = super()._generate_single_turn(prompt_ids, *rest, **more)
        tokenizer = self.processing_class.tokenizer
        call = tokenizer(CALL.format(name="zoom", number=3), add_special_tokens=False)["input_ids"]
        called = ["tool_call" in tokenizer.decode(answer) for answer in answers]
        if self.mask_truncated_completions and not any(called):  # the second turn
            answers[0].pop()
        return [
            [*call, answer[-1]] if calls else answer
            for calls, answer in zip(called, answers, strict=True)
        ], logps


class MineAlike(CPPOMixin, ZoomingAlike):
    pass


def zoomed(options, masked=False):
    """How far the weights moved in a run in fp64, and the tokens that were computed."""
    trainer = trainer_of(
        "qwen3_vl",
        options,
        base=MineAlike,
        rewards=last_answer,
        max_completion_length=200,
        mask_truncated_completions=masked,
        loss_type="dapo",
        chat_template=qwen3_vl_chat_template,
        more=dict(tools=[zoom]),
    )
    trainer.model.double()
    before = {name: p.detach().clone() for name, p in weights_of(trainer.model).items()}
    seen = watched(trainer)
    trainer.train()
    (rollout,) = seen["rollouts"]
    assert {*rollout["num_images"]} == {1, 2}
    assert bool((rollout["completion_mask"].sum(1) == 0).any()) == masked
    after = weights_of(trainer.model)
    return {name: after[name] - before[name] for name in before}, sum(seen["grad_tokens"])


def test_images_that_a_tool_brings_train_packed_as_padded():
    """They stand behind a prompt that is run once."""
    padded, tokens = zoomed(LOOK)
    for how in ("pack", "share_prompts"):
        moved, fewer = zoomed(dataclasses.replace(LOOK, **{how: True}))
        assert relative_difference(moved, padded) < 1e-6
        assert fewer < tokens
        tokens = fewer


def test_images_of_a_masked_completion_are_left_out():
    """A padded Qwen-VL itself cannot run them."""
    alone, _ = zoomed(dataclasses.replace(LOOK, pack=True), masked=True)
    shared, _ = zoomed(dataclasses.replace(LOOK, share_prompts=True), masked=True)
    assert relative_difference(shared, alone) < 1e-6
