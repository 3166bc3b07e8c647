"""Prompts that a run cannot ask: said at the start or when they are drawn, with the row."""

import pytest
from trainer_cases import config, tiny, trainer_for
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, Phi3Config
from transformers import Phi3ForCausalLM as Phi3

from cppo.model import check as model_check
from cppo.questions.errors import QuestionError
from cppo.questions.stream import all_questions
from cppo.train import evaluate
from cppo.train.draws import QuestionDraws

SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
ENDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
LIMIT = 30
FOLLOWS = "beyond that the rotary positions of model_type .* depend on the longest sequence of a b"
LEARNED = "model_type 'opt' has learned positions for no more"


def limited(kind):
    """A model with LIMIT positions for the tokenizer of the tiny text model."""
    sizes = {**SIZES, **ENDS, "vocab_size": len(tiny("text")[1])}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "opt":
        return OPTForCausalLM(
            OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=LIMIT)
        )
    if kind == "longrope":
        half = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2
        rope |= {"short_factor": [1.0] * half, "long_factor": [2.0] * half}
        rope |= {"original_max_position_embeddings": LIMIT}
        return Phi3(
            Phi3Config(
                **sizes,
                intermediate_size=24,
                max_position_embeddings=64,
                original_max_position_embeddings=LIMIT,
                rope_parameters=rope,
            )
        )
    own = {"intermediate_size": 24, "max_position_embeddings": LIMIT}
    return LlamaForCausalLM(LlamaConfig(**sizes, **own, rope_parameters=rope))


def length(completions, **columns):
    """A reward that differs between completions."""
    return [float(len(completion)) for completion in completions]


KINDS = pytest.mark.parametrize(
    ("kind", "reason"), [("opt", LEARNED), ("dynamic", FOLLOWS), ("longrope", FOLLOWS)]
)


@KINDS
def test_completions_that_no_position_is_left_for_are_refused_at_the_start(kind, reason, tmp_path):
    for most in (40, LIMIT):
        words = (
            f"CPPOConfig.max_completion_tokens must be below the {LIMIT} tokens that a prompt and "
            f"its completion may have, got {most}: {reason}"
        )
        with pytest.raises(ValueError, match=words):
            trainer_for(
                tmp_path, model=limited(kind), max_completion_tokens=most, skip_bad_questions=True
            )
    assert not list(tmp_path.glob("**/*.jsonl"))


@KINDS
def test_a_prompt_that_leaves_no_room_is_refused_when_drawn(kind, reason, tmp_path):
    rows = [{"prompt": "Hi" * n} for n in (1, 30, 1, 1)]
    words = (
        f"row 1: its prompt of .* tokens and max_completion_tokens = 6 are more than {LIMIT}: "
        + reason
    )
    options = dict(rows=rows, rewards=length, max_steps=1, batch_size=16)
    trainer = trainer_for(tmp_path / "a", model=limited(kind), **options)
    with pytest.raises(QuestionError, match=words):
        trainer.train()
    trainer = trainer_for(tmp_path / "b", model=limited(kind), skip_bad_questions=True, **options)
    trainer.train()
    assert trainer.questions.skipped > 0


def test_a_sequence_may_fill_every_position(tmp_path):
    trainer = trainer_for(tmp_path, model=limited("opt"), rows=[{"prompt": "Hi"}])
    room = LIMIT - len(trainer.draw_questions(1)[0].input_ids)
    options = dict(rows=[{"prompt": "Hi"}], max_steps=1, rewards=length)
    for most in (room, room + 1):
        options |= dict(model=limited("opt"), max_completion_tokens=most)
        longer = trainer_for(tmp_path / str(most), **options)
        if most == room:
            longer.train()
    with pytest.raises(QuestionError, match="row 0: its prompt of "):
        longer.train()


@KINDS
def test_a_held_out_prompt_that_leaves_no_room_is_refused_at_the_start(kind, reason, tmp_path):
    rows = [{"prompt": "Hi"}, {"prompt": "Hi" * 30}]
    words = f"row 1: its prompt of .* are more than {LIMIT}: {reason}"
    model = limited(kind)
    with pytest.raises(QuestionError, match=words):
        trainer_for(tmp_path, model=model, rows=rows[:1], eval_rows=rows, skip_bad_questions=True)
    trainer = trainer_for(tmp_path, model=model, rows=rows[:1])
    with pytest.raises(QuestionError, match=words):
        evaluate.evaluate(
            trainer.model,
            trainer.processor,
            trainer.reward_functions,
            all_questions(rows),
            config=trainer.config,
        )


def test_models_without_a_limit_have_none():
    for family in ("text", "qwen2_vl", "qwen3_vl"):  # the last one's tower has learned positions
        assert model_check.position_limit(tiny(family)[0]) is None


@pytest.mark.parametrize("limit", [1, 7])
def test_a_limit_that_leaves_out_all_is_refused_with_its_option_alone(limit, tmp_path):
    rows = [{"prompt": "Hi" * n} for n in (2, 1, 3)]
    words = (
        "no question of train_dataset can be asked, all that were read are left out: 3 by "
        rf"max_prompt_tokens = {limit} \(the shortest prompt has 8 tokens\)$"
    )
    with pytest.raises(ValueError, match=words):
        trainer_for(tmp_path, rows=rows, max_prompt_tokens=limit, eval_rows=rows)
    trainer_for(tmp_path, rows=rows, max_prompt_tokens=8)


def test_bad_questions_alone_are_refused_with_their_option_alone(tmp_path):
    rows = [{"prompt": "<|im_end|>"}] * 3
    words = r"are left out: 3 by skip_bad_questions = True \(the first: .*row \d.*im_end.*\)$"
    with pytest.raises(ValueError, match=words):
        trainer_for(tmp_path, rows=rows, skip_bad_questions=True)
    mixed = [*rows, {"prompt": "Hi"}]
    words = r"left out: 1 by max_prompt_tokens = 2 \(.* 8 tokens\), 3 by skip_bad_questions = True"
    with pytest.raises(ValueError, match=words):
        trainer_for(tmp_path, rows=mixed, skip_bad_questions=True, max_prompt_tokens=2)
    trainer = trainer_for(tmp_path, rows=mixed, skip_bad_questions=True)
    assert trainer.questions.position == 0 and trainer.questions.skipped == 0


def test_questions_that_are_seen_ahead_are_counted_when_they_are_drawn(tmp_path):
    rows = [{"prompt": "<|im_end|>"}, *[{"prompt": "Hi" * n} for n in (1, 2, 3)]]
    trainer = trainer_for(tmp_path, rows=rows, skip_bad_questions=True)
    questions = trainer.questions
    seen = questions.look_ahead(4)
    assert questions.position == 0 and questions.skipped == 0
    assert questions.draw(4) == seen
    assert questions.position == 5 and questions.skipped == 1
    # One of them comes to another draw, and is read again.
    assert questions.look_ahead(4) and len(questions.draw(8)) == 8
    assert questions.skipped == questions.position - 12


class FirstOfTwo:
    """The first process, beside one whose every question was left out at first."""

    rank, size = 0, 2

    def __init__(self):
        self.others = [["it is another process's"], []]

    def gather(self, value):
        return [value, self.others.pop(0)]


def test_what_another_process_leaves_out_is_said(tmp_path):
    rows = [{"prompt": f"What is {i} + {i}?"} for i in range(4)]
    said = []
    options = config(output_dir=str(tmp_path), max_prompt_tokens=99)
    draws = QuestionDraws(rows, tiny("text")[1], options, FirstOfTwo(), said.append)
    assert len(draws.draw(1)) == 1 and draws.position == 3
    assert said == ["skipped a question: it is another process's"]
