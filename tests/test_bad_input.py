"""What goes wrong with the trainer's arguments is answered in words: what was given and expected.

Options are in test_config.py and test_policy.py, rows in test_questions.py, rewards that fail in
test_scoring_failures.py, and the arguments of each op in the test of the op.
"""

import pytest
import torch
from trainer_cases import digit_share, image, small_run, text_rows, tiny, trainer_for

from cppo.demo.digits import DigitSums
from cppo.train.checkpoint import best_checkpoint
from cppo.train.trainer import CPPOTrainer

PICTURE = [{"prompt": "What?", "image": image(24, 24)}]
BAD_HELD_OUT = [*text_rows(2), {"prompt": [{"role": "human", "content": "Hi"}]}]
TYPE_ERRORS = [
    ({"config": {"max_steps": 3}}, "config must be a CPPOConfig"),
    ({"config": None}, "must be a CPPOConfig, got None"),
    ({"rewards": []}, r"one or more callables, got \[\]"),
    ({"rewards": "boxed"}, "one or more callables, got 'boxed'"),
    ({"rewards": 3}, "one or more callables, got 3"),
    ({"rewards": [digit_share, None]}, "one or more callables"),
    ({"rows": 7}, "train_dataset must have __len__ .* got int"),
    ({"rows": "rows.json"}, "a list of rows, .*, got str"),
    ({"rows": {"train": []}}, "train_dataset must have .* integer __getitem__ .* got dict"),
    ({"rows": ["What?"]}, "row 0: expected a mapping, got str"),
    ({"eval_rows": 3}, "eval_dataset must have .* got int"),
    ({"processor": None}, "must be a processor or tokenizer, got None"),
    ({"processor": "model"}, "processor or tokenizer, got str"),
    (
        {"family": "qwen2_5_vl", "processor": tiny("text")[1]},
        "processor of a vision-language model .*, got the tokenizer",
    ),
]
VALUE_ERRORS = [
    (
        {"rewards": [digit_share, digit_share]},
        r"must have different names .* got \['digit_share', 'digit_share'\]",
    ),
    (
        {"options": {"reward_weights": (1.0, 2.0)}},
        r"one weight per reward function \['digit_share'\], got \(1.0, 2.0\)",
    ),
    ({"options": {"trackers": ("tensorbord",)}}, "tensorbord"),
    ({"rows": []}, "train_dataset must have rows, got none"),
    ({"rows": [{"question": "?"}]}, r"row 0: has no 'prompt' \(columns: question\)"),
    ({"eval_rows": BAD_HELD_OUT}, r"row 2: prompt\[0\]: role must be one of .*, got 'human'"),
    ({"rows": PICTURE}, "model takes no images, but there are questions with images"),
    ({"eval_rows": DigitSums("heldout", 1)}, "model takes no images, .* 'What is the sum of the"),
    ({"model": torch.nn.Linear(2, 2)}, "LM head, got Linear"),
    (
        {"family": "qwen2_vl", "options": {"negative_views": ("noise_patchs",)}},
        "unknown perturbation 'noise_patchs'; did you mean 'noise_patches'",
    ),
]
CASES = [
    *((TypeError, *case) for case in TYPE_ERRORS),
    *((ValueError, *case) for case in VALUE_ERRORS),
]


def trainer_of(folder, family="text", options=None, **given):
    model, processor = tiny(family)
    return CPPOTrainer(
        given.get("model", model),
        given.get("rewards", digit_share),
        given.get("rows", text_rows() if family == "text" else DigitSums("train", 2)),
        config=given["config"] if "config" in given else small_run(folder, **(options or {})),
        processor=given.get("processor", processor),
        eval_dataset=given.get("eval_rows"),
    )


@pytest.mark.parametrize(("error", "given", "words"), CASES, ids=[words for *_, words in CASES])
def test_wrong_arguments_of_the_trainer(error, given, words, tmp_path):
    with pytest.raises(error, match=words):
        trainer_of(tmp_path, **given)


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl"])
def test_a_processor_without_a_chat_template(family, tmp_path):
    _, processor = tiny(family)
    processor.chat_template = None
    with pytest.raises(ValueError, match="processor must have a chat template, .* has none"):
        trainer_of(tmp_path, family, processor=processor)


def test_the_tokenizer_of_a_larger_model(tmp_path):
    _, tokenizer = tiny("text")
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(ValueError, match="its 136 tokens are more than the 135"):
        trainer_of(tmp_path, processor=tokenizer)


def test_a_best_metric_that_there_is_not(tmp_path):
    words = "best_metric must be one of sampled/reward, .*greedy/digit_share, got 'greedy/accuracy'"
    with pytest.raises(ValueError, match=words):
        trainer_for(tmp_path, best_metric="greedy/accuracy", eval_rows=text_rows(1))
    with pytest.raises(ValueError, match="got 'greedy/digit_share'"):
        options = dict(best_metric="greedy/digit_share", eval_greedy=False)
        trainer_for(tmp_path, **options, eval_rows=text_rows(1))


def test_an_evaluation_in_which_the_best_metric_has_no_rewards(tmp_path):
    def applies_later(completions, trainer_state, **columns):
        value = 1.0 if trainer_state.global_step == 1 else None
        return [value] * len(completions)

    rewards = [applies_later, digit_share]
    trainer = trainer_for(tmp_path, rewards=rewards, eval_rows=text_rows(1), eval_every=1)
    trainer.train()
    assert trainer.step == 2
    assert best_checkpoint(tmp_path).name == "checkpoint-000001"
