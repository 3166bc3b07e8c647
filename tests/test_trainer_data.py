"""A run on data as people have it: questions that cannot be asked, rewards that do not apply."""

import pytest
from PIL import Image
from trainer_cases import digit_share, image, lines, small_run, text_rows, tiny, trainer_for

from cppo.questions import QuestionError
from cppo.rewards import completion_text
from cppo.train.scoring import RewardError
from cppo.train.trainer import CPPOTrainer


def bad_rows(tmp_path):
    """Four questions that can be asked and three that cannot."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    return [
        *({"prompt": "<image>How many?", "images": [image(48, 48, i)]} for i in range(3)),
        {"prompt": "<image>How long?", "images": [Image.new("RGB", (8000, 10))]},
        {"prompt": "<image>What?", "images": [str(broken)]},
        {"prompt": "Is <|image_pad|> a word?"},
        {"prompt": "How many without a picture?"},
    ]


def test_bad_questions_end_a_run_or_are_left_out_and_counted(tmp_path, capsys):
    rows = bad_rows(tmp_path)
    options = dict(rows=rows, batch_size=16, max_steps=2, max_completion_tokens=3)
    with pytest.raises(QuestionError, match="row [345]"):
        trainer_for(tmp_path / "a", "qwen2_5_vl", **options).train()
    trainer = trainer_for(
        tmp_path / "b", "qwen2_5_vl", **options, skip_bad_questions=True, log_completions=16
    )
    trainer.train()
    # Two epochs of seven rows, to ask the four good ones twice.
    skipped = [row["questions/skipped"] for row in trainer.history]
    assert sum(skipped) == trainer.questions.position - 8 and sum(skipped) >= 3
    asked = [str(row["question"]) for row in lines(tmp_path / "b" / "completions.jsonl")]
    assert len(asked) == 32
    assert not any(word in text for text in asked for word in ("How long", "What?", "a word"))
    said = " ".join(capsys.readouterr().out.split())
    assert "skipped a question: " in said and "the image processor refused image 0" in said


def test_nothing_but_bad_questions_ends_in_words(tmp_path):
    rows = bad_rows(tmp_path)[4:5]
    options = dict(rows=rows, skip_bad_questions=True)
    with pytest.raises(ValueError, match="no question of train_dataset can be asked"):
        trainer_for(tmp_path / "run", "qwen2_5_vl", **options).train()


def test_a_reward_that_does_not_apply(tmp_path):
    def odd_rows_only(completions, answer, **columns):
        texts = [completion_text(completion) for completion in completions]
        return [
            None if i % 4 == 0 or int(a) == 0 else float(len(text) + i % 4)
            for i, (text, a) in enumerate(zip(texts, answer, strict=True))
        ]

    trainer = trainer_for(
        tmp_path, rewards=odd_rows_only, rows=text_rows(2), max_steps=1, log_completions=8
    )
    (row,) = [trainer.train()]
    # Of two questions of four, one has no rewards at all and one lacks its first.
    assert row["reward/scored_share"] == 3 / 8 and row["kept_share"] == 3 / 8
    written = lines(tmp_path / "completions.jsonl")
    unscored = [line for line in written if line["reward"] is None]
    assert len(unscored) == 5
    assert all(line["advantage"] == 0 and not line["kept"] for line in unscored)
    rewards = [line["reward"] for line in written if line["reward"] is not None]
    mean = sum(rewards) / 3
    assert row["reward/mean"] == pytest.approx(mean)
    for line in written:
        if line["reward"] is not None:
            assert (line["advantage"] > 0) == (line["reward"] > mean)


def test_large_rewards_keep_their_differences(tmp_path):
    def large(completions, **columns):
        return [1e9 + i % 4 for i in range(len(completions))]

    trainer = trainer_for(tmp_path, rewards=large, max_steps=1, log_completions=8)
    trainer.train()
    advantages = [row["advantage"] for row in lines(tmp_path / "completions.jsonl")]
    # 0, 1, 2, 3 have mean 1.5 and variance 5/3.
    expected = [x / ((5 / 3) ** 0.5 + 1e-4) for x in (-1.5, -0.5, 0.5, 1.5)] * 2
    assert advantages == pytest.approx(expected)


def test_extra_columns_and_the_state_of_the_run(tmp_path):
    steps = []

    def judge(completions, log_extra, log_metric, trainer_state, **columns):
        steps.append((trainer_state.global_step, trainer_state.max_steps))
        log_extra("length", [len(completion_text(text)) for text in completions])
        log_metric("calls", 1)
        return [float(i % 4) for i in range(len(completions))]

    trainer = trainer_for(tmp_path, rewards=judge, max_steps=2, eval_rows=text_rows(1))
    row = trainer.train()
    # Evaluated before, twice (sampled and greedy); two steps; evaluated after.
    assert steps == [(0, 2), (0, 2), (0, 2), (1, 2), (2, 2), (2, 2)]
    assert row["logged/calls"] == 1
    assert all(
        line["length"] == len(line["completion"]) for line in lines(tmp_path / "completions.jsonl")
    )


def test_a_reward_that_takes_too_long_is_named(tmp_path):
    def slow(completions, **columns):
        while True:
            pass

    trainer = trainer_for(tmp_path, rewards=slow, reward_timeout=0.5)
    with pytest.raises(RewardError, match="'slow' did not return within reward_timeout = 0.5"):
        trainer.train()


def test_arguments_of_the_chat_template(tmp_path):
    model, tokenizer = tiny("text")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if enable_thinking is defined and not enable_thinking %}!{% endif %}"
    )
    for arguments, end in (({"enable_thinking": False}, "!"), (None, "?")):
        options = small_run(tmp_path / end, chat_template_kwargs=arguments)
        trainer = CPPOTrainer(model, digit_share, text_rows(), config=options, processor=tokenizer)
        rollouts = trainer.sample(trainer.draw_questions(1))
        prompt = rollouts.input_ids[0][rollouts.attention_mask[0] & ~rollouts.completion_mask[0]]
        assert tokenizer.decode(prompt).endswith(end)
    options = small_run(tmp_path, chat_template_kwargs={"thinking": False})
    with pytest.raises(ValueError, match="'thinking', which the chat template does not read"):
        CPPOTrainer(model, digit_share, text_rows(), config=options, processor=tokenizer)
