"""What goes wrong is answered in words: what was given, where, and what was expected.

With the table of test_config this is the list of mistakes that were tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import digit_share, image, small_run, text_rows, tiny, trainer_for

import cppo
from cppo.config import CPPOConfig, LoraConfig, LossConfig
from cppo.demo.digits import DigitSums
from cppo.model.load import load_model, load_processor
from cppo.train.checkpoint import best_checkpoint
from cppo.train.scoring import RewardError
from cppo.train.trainer import CPPOTrainer

# The trainer's arguments: what is given instead of something right, the error, its words.

ARGUMENTS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("config is a dict", {"config": {"max_steps": 3}}, TypeError, "config must be a CPPOConfig"),
    ("config is missing", {"config": None}, TypeError, "must be a CPPOConfig, got None"),
    ("no reward", {"rewards": []}, TypeError, r"one or more callables, got \[\]"),
    ("a reward's name", {"rewards": "boxed"}, TypeError, "one or more callables, got 'boxed'"),
    ("a reward is a number", {"rewards": 3}, TypeError, "one or more callables, got 3"),
    ("one reward is None", {"rewards": [digit_share, None]}, TypeError, "one or more callables"),
    (
        "two rewards of one name",
        {"rewards": [digit_share, digit_share]},
        ValueError,
        r"must have different names .* got \['digit_share', 'digit_share'\]",
    ),
    (
        "two weights for one reward",
        {"options": {"reward_weights": (1.0, 2.0)}},
        ValueError,
        r"one weight per reward function \['digit_share'\], got \(1.0, 2.0\)",
    ),
    ("no rows", {"rows": []}, ValueError, "train_dataset must have rows, got none"),
    ("rows are a number", {"rows": 7}, TypeError, "train_dataset must have __len__ .* got int"),
    ("rows are a path", {"rows": "rows.json"}, TypeError, "a list of rows, .*, got str"),
    (
        "rows are a dict of splits",
        {"rows": {"train": [], "test": []}},
        TypeError,
        "train_dataset must have .* integer __getitem__ .* got dict",
    ),
    ("a row is text", {"rows": ["What?"]}, TypeError, "row 0: expected a mapping, got str"),
    (
        "a row has no prompt",
        {"rows": [{"question": "What?"}]},
        ValueError,
        r"row 0: has no 'prompt' \(columns: question\)",
    ),
    (
        "a held-out row has an unknown role",
        {"eval_rows": [*text_rows(2), {"prompt": [{"role": "human", "content": "Hi"}]}]},
        ValueError,
        r"row 2: prompt\[0\]: role must be one of .*, got 'human'",
    ),
    (
        "a held-out row marks an image that is not there",
        {"eval_rows": [{"prompt": "<image> What?"}]},
        ValueError,
        "row 0: the messages mark 1 images .*, the row has 0",
    ),
    (
        "held-out rows are a number",
        {"eval_rows": 3},
        TypeError,
        "eval_dataset must have .* got int",
    ),
    (
        "images for a text model",
        {"rows": [{"prompt": "What?", "image": image(24, 24)}]},
        ValueError,
        "model takes no images, but there are questions with images",
    ),
    (
        "held-out images for a text model",
        {"eval_rows": DigitSums("heldout", 1)},
        ValueError,
        "model takes no images, .* 'What is the sum of the digits.'",
    ),
    ("no processor", {"processor": None}, TypeError, "must be a processor or tokenizer, got None"),
    ("a path as processor", {"processor": "model"}, TypeError, "processor or tokenizer, got str"),
    (
        "a tokenizer for a model that sees",
        {"family": "qwen2_5_vl", "processor": tiny("text")[1]},
        TypeError,
        "processor of a vision-language model .*, got the tokenizer",
    ),
    ("a model that is none", {"model": torch.nn.Linear(2, 2)}, ValueError, "LM head, got Linear"),
    (
        "processes that share no batch",
        {"options": {"batch_size": 6, "dynamic_allocation": False}},
        ValueError,
        "CPPOConfig.batch_size must be a multiple of group_size = 4, got 6",
    ),
    (
        "an unknown schedule",
        {"options": {"lr_scheduler": "cosin"}},
        ValueError,
        "CPPOConfig.lr_scheduler must be one of .*cosine.*, got .cosin.",
    ),
    (
        "an unknown tracker",
        {"options": {"trackers": ("tensorbord",)}},
        ValueError,
        "tensorbord",
    ),
    (
        "an unknown perturbation",
        {"family": "qwen2_vl", "options": {"negative_views": ("noise_patchs",)}},
        ValueError,
        "unknown perturbation 'noise_patchs'; did you mean 'noise_patches'",
    ),
    (
        "adapters on layers that are not there",
        {"options": {"lora": LoraConfig(target_modules=("query_proj",))}},
        ValueError,
        "query_proj",
    ),
    (
        "flash attention on a CPU",
        {"options": {"attention": "flash_attention_2"}},
        ValueError,
        "CPPOConfig.attention must be 'auto' or one that runs here .*, got 'flash_attention_2'",
    ),
]


@pytest.mark.parametrize(
    ("given", "error", "words"), [case[1:] for case in ARGUMENTS], ids=[c[0] for c in ARGUMENTS]
)
def test_wrong_arguments_of_the_trainer(
    given: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    family = given.get("family", "text")
    model, processor = tiny(family)

    def options() -> CPPOConfig:
        return small_run(tmp_path, **given.get("options", {}))

    with pytest.raises(error, match=words):
        CPPOTrainer(
            given.get("model", model),
            given.get("rewards", digit_share),
            given.get("rows", text_rows() if family == "text" else DigitSums("train", 2)),
            config=given["config"] if "config" in given else options(),
            processor=given.get("processor", processor),
            eval_dataset=given.get("eval_rows"),
        )


def test_a_processor_without_a_chat_template(tmp_path: Path) -> None:
    for family in ("text", "qwen2_5_vl"):
        model, processor = tiny(family)
        processor.chat_template = None
        with pytest.raises(ValueError, match="processor must have a chat template, .* has none"):
            CPPOTrainer(
                model, digit_share, text_rows(), config=small_run(tmp_path), processor=processor
            )


def test_the_tokenizer_of_a_larger_model(tmp_path: Path) -> None:
    model, tokenizer = tiny("text")
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(ValueError, match="its 136 tokens are more than the 135"):
        CPPOTrainer(
            model, digit_share, text_rows(), config=small_run(tmp_path), processor=tokenizer
        )


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"max_steps": -1}, "CPPOConfig.max_steps must be an integer >= 1, got -1"),
    ({"max_steps": 2.5}, "max_steps must be an integer >= 1, got 2.5"),
    ({"prune_rate": 1.0}, "CPPOConfig.prune_rate must be a number >= 0 and < 1, got 1.0"),
    ({"prune_rate": math.nan}, "prune_rate must be a number >= 0 and < 1, got nan"),
    ({"group_size": 1}, "group_size must be an integer >= 2, got 1"),
    ({"learning_rate": "1e-6"}, "learning_rate must be a number > 0, got '1e-6'"),
    ({"betas": (0.9, "x")}, r"betas must be two numbers in \[0, 1\), got \(0.9, 'x'\)"),
    ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
    ({"reward_weights": (1.0, math.inf)}, "reward_weights must be finite numbers, one per rew"),
    ({"reward_weights": 2.0}, "reward_weights must be finite numbers, .*, got 2.0"),
    ({"trackers": "wandb"}, "trackers must be a tuple or list, got 'wandb'"),
    ({"positive_views": "rotation"}, "positive_views must be a tuple or list, got 'rotation'"),
    ({"loss": {"tau": 1}}, "CPPOConfig.loss must be a LossConfig, got {'tau': 1}"),
    ({"lora": 8}, "CPPOConfig.lora must be a LoraConfig or None, got 8"),
    ({"scale_rewards": None}, "scale_rewards must be one of 'group', 'none', 'batch', got None"),
]


@pytest.mark.parametrize(("options", "words"), CONFIGS, ids=[str(c[0]) for c in CONFIGS])
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CPPOConfig(**options)


def test_a_best_metric_that_there_is_not(tmp_path: Path) -> None:
    words = "best_metric must be one of sampled/reward, .*greedy/digit_share, got 'greedy/accuracy'"
    with pytest.raises(ValueError, match=words):
        trainer_for(tmp_path, best_metric="greedy/accuracy", eval_rows=text_rows(1))
    with pytest.raises(ValueError, match="got 'greedy/digit_share'"):
        options = dict(best_metric="greedy/digit_share", eval_greedy=False)
        trainer_for(tmp_path, **options, eval_rows=text_rows(1))


def test_an_evaluation_in_which_the_best_metric_has_no_rewards(tmp_path: Path) -> None:
    def applies_later(completions: list[str], trainer_state: Any, **columns: Any) -> list[Any]:
        value = 1.0 if trainer_state.global_step == 1 else None
        return [value] * len(completions)

    rewards = [applies_later, digit_share]
    trainer = trainer_for(tmp_path, rewards=rewards, eval_rows=text_rows(1), eval_every=1)
    trainer.train()
    assert trainer.step == 2
    assert best_checkpoint(tmp_path).name == "checkpoint-000001"


def bad_value(value: Any) -> Callable[..., list[Any]]:
    def reward(completions: list[str], **columns: Any) -> list[Any]:
        return [0.0] * (len(completions) - 1) + [value]

    return reward


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (bad_value(math.nan), "returned nan"),
        (bad_value(-math.inf), "returned -inf"),
        (bad_value("yes"), "returned 'yes', which is no number"),
        (lambda completions, **columns: [1.0], "one number per completion = 8, got 1"),
        (lambda completions, **columns: 1.0, "a list of one number per completion, got float"),
    ],
    ids=["nan", "-inf", "text", "too few", "no list"],
)
def test_rewards_that_are_none(reward: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="cppo: reward function '(reward|<lambda>)' .*" + words):
        trainer_for(tmp_path, rewards=reward).train()


def test_a_row_that_is_malformed_further_on(tmp_path: Path) -> None:
    rows = [*text_rows(2), {"prompt": []}]
    trainer = trainer_for(tmp_path, rows=rows, max_steps=3)
    with pytest.raises(ValueError, match="row 2: prompt has no messages"):
        trainer.train()


@pytest.mark.parametrize("load", [load_model, load_processor])
def test_loading_from_nowhere(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"cppo.{load.__name__}: path must be .* is missing"):
        load(tmp_path / "no such model")
    with pytest.raises(ValueError, match="is a folder without a config.json"):
        load(tmp_path)


def test_resuming_from_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a checkpoint of cppo"):
        trainer_for(tmp_path).train(resume_from=tmp_path / "nowhere")


# The ops, as one's own trainer calls them.

LOGITS, TARGETS = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
ADVANTAGES = torch.tensor([1.0, -1.0])
IDS, ONES = torch.arange(14).view(2, 7), torch.ones(2, 7)

OPS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    (
        "rewards of no whole groups",
        lambda: cppo.group_advantages(torch.ones(7), 4),
        ValueError,
        "cppo.group_advantages: rewards must .*4.* got 7",
    ),
    (
        "a reward that is not a number",
        lambda: cppo.advantages_and_prune(torch.tensor([1.0, math.nan]), 2, 0.5),
        ValueError,
        "cppo.advantages_and_prune: rewards .*finite.* got nan at index 1",
    ),
    (
        "everything is pruned",
        lambda: cppo.prune_completions(ADVANTAGES, 2, 1.0),
        ValueError,
        r"cppo.prune_completions: prune_rate must be a number in \[0, 1\), got 1.0",
    ),
    (
        "an unknown side to prune",
        lambda: cppo.prune_completions(ADVANTAGES, 2, 0.5, prune="middle"),
        ValueError,
        "prune must be one of 'smallest', 'largest', 'random', got 'middle'",
    ),
    (
        "a mask of another length",
        lambda: cppo.pack_completions(IDS, ONES[:, :6], ONES),
        ValueError,
        r"cppo.pack_completions: attention_mask must be \(B, L\) = \(2, 7\) .*, got \(2, 6\)",
    ),
    (
        "a completion twice",
        lambda: cppo.pack_completions(IDS, ONES, ONES, torch.tensor([1, 1])),
        ValueError,
        "kept must be unique, got 1 more than once",
    ),
    (
        "a completion longer than a micro-batch",
        lambda: cppo.plan_microbatches([5, 12], 10),
        ValueError,
        "cppo.plan_microbatches: .*12.*10|cppo.plan_microbatches: .*10.*12",
    ),
    (
        "a target outside the vocabulary",
        lambda: cppo.token_stats(LOGITS, TARGETS + 5),
        ValueError,
        r"cppo.token_stats: targets must be in .* \[0, 5\) .* got 5 at \(0, 0\)",
    ),
    (
        "a temperature of zero",
        lambda: cppo.token_stats(LOGITS, TARGETS, temperature=0),
        ValueError,
        "cppo.token_stats: temperature must be .*> 0, got 0",
    ),
    (
        "a head of another width",
        lambda: cppo.linear_token_stats(LOGITS, torch.randn(9, 4), TARGETS),
        ValueError,
        r"weight must be \(V, D\) = \(V >= 1, 5\) like hidden, got \(9, 4\)",
    ),
    (
        "entropies of different shape",
        lambda: cppo.perception_mask(torch.rand(2, 3), torch.rand(2, 4)),
        ValueError,
        r"cppo.perception_mask: .*\(2, 3\).*\(2, 4\)",
    ),
    (
        "a negative share of tokens",
        lambda: cppo.perception_mask(torch.rand(2, 3), torch.rand(2, 3), fraction=-0.5),
        ValueError,
        "cppo.perception_mask: fraction must be .*, got -0.5",
    ),
    (
        "packed rows that do not end",
        lambda: cppo.cppo_loss(
            LOGITS[0], TARGETS[0], ADVANTAGES, cu_seqlens=torch.tensor([0, 1, 2])
        ),
        ValueError,
        "cppo.cppo_loss: cu_seqlens must end at T = 3, got 2",
    ),
    (
        "a positive view alone",
        lambda: cppo.cppo_loss(cppo.Views(LOGITS, LOGITS), TARGETS, ADVANTAGES),
        ValueError,
        "cppo.cppo_loss: logits.negative must be given with logits.positive, got None",
    ),
    (
        "no reference for the KL",
        lambda: cppo.cppo_loss(LOGITS, TARGETS, ADVANTAGES, config=LossConfig(kl_coef=0.1)),
        ValueError,
        "cppo.cppo_loss: ref_logps must be given when config.kl_coef > 0",
    ),
    (
        "options as a dict",
        lambda: cppo.cppo_loss(LOGITS, TARGETS, ADVANTAGES, config={"tau": 1}),
        TypeError,
        "cppo.cppo_loss: config must be a cppo.LossConfig, got dict",
    ),
    (
        "logits of whole numbers",
        lambda: cppo.cppo_loss(LOGITS.long(), TARGETS, ADVANTAGES),
        TypeError,
        "cppo.cppo_loss: logits must be of floating dtype, got torch.int64",
    ),
    (
        "a contrast of temperature zero",
        lambda: LossConfig(tau=0.0),
        ValueError,
        "LossConfig.tau must be a number > 0, got 0.0",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "words"), [case[1:] for case in OPS], ids=[case[0] for case in OPS]
)
def test_wrong_tensors(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
