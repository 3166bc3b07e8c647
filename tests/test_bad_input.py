"""What goes wrong is answered in words: what was given, where, and what was expected.

With the table of test_config this is the list of mistakes that were tried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import digit_share, image, small_run, text_rows, tiny, trainer_for

from cppo.config import CPPOConfig, LoraConfig
from cppo.demo.digits import DigitSums
from cppo.train.checkpoint import best_checkpoint
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
