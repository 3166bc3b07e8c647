"""Questions as token ids and pixels: transformers' own, padded here, errors with the row."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from prompt_cases import (
    CHATML,
    CHATML_WITH_BOS,
    DIALOGUE,
    GEMMA,
    LLAMA,
    MISTRAL,
    PHI,
    TEMPLATES,
    THINKING,
    chat_tokenizer,
    encode_rows,
    own_ids,
    vision_processor,
)
from tokenizers import processors
from trainer_cases import (
    VISION_FAMILIES,
    digit_share,
    image,
    questions_for,
    small_run,
    text_rows,
    tiny,
)

from cppo.cli import dry_run
from cppo.demo.digits import DigitSums
from cppo.model.prompts import PromptEncoder, encode_questions, render
from cppo.options.trainer import CPPOConfig
from cppo.questions import Question, QuestionError, as_question
from cppo.questions.messages import with_images
from cppo.train.trainer import CPPOTrainer

# ---- Ids


def test_ids_worked_out_by_hand():
    tokenizer = chat_tokenizer(LLAMA)
    ids = own_ids(encode_rows(tokenizer, "1+1?"), 0)
    pieces = ["<s>", "<|start|>", *"user", "<|end|>", *"1+1?", "<|eot|>", "<|start|>", *"assistant"]
    assert ids == tokenizer.convert_tokens_to_ids([*pieces, "<|end|>"])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", ["2 + 2?", DIALOGUE])
def test_ids_are_those_of_apply_chat_template(name, prompt):
    tokenizer = chat_tokenizer(TEMPLATES[name], eos=True)
    prompts = encode_rows(tokenizer, prompt)
    question = prompts.questions[0]
    expected = tokenizer.apply_chat_template(
        question.messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert own_ids(prompts, 0) == expected
    assert tokenizer.decode(expected) == render(tokenizer, question)  # nothing more, nothing less
    assert expected.count(tokenizer.bos_token_id) == TEMPLATES[name].count("bos_token")


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_BOS])
def test_a_processor_writes_one_bos_with_images_and_without(template):
    # transformers' rule for processors: the template's bos if it writes one, else the tokenizer's.
    processor = vision_processor(template)
    encoder = PromptEncoder(processor)
    for row in ({"prompt": "Hi"}, {"prompt": "Hi", "image": image(48, 24)}):
        ids = encoder(as_question(row)).input_ids
        assert ids.count(processor.tokenizer.bos_token_id) == 1
        assert ids[0] == processor.tokenizer.bos_token_id


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_ids_and_pixels_are_those_of_one_call_for_the_whole_batch(family):
    model, processor = tiny(family)
    questions = questions_for(family)  # 1, 2, 0 and 1 images
    prompts = encode_questions(model, processor, questions)
    chats = [with_images(question.messages, question.images) for question in questions]
    whole = processor.apply_chat_template(
        chats,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    assert torch.equal(prompts.attention_mask, whole["attention_mask"].bool())
    assert torch.equal(
        prompts.input_ids[prompts.attention_mask], whole["input_ids"][prompts.attention_mask]
    )
    assert prompts.images is not None and prompts.images.per_question == (1, 2, 0, 1)
    assert torch.equal(prompts.images.joined("image_grid_thw"), whole["image_grid_thw"])
    assert torch.equal(prompts.images.joined("pixel_values"), whole["pixel_values"])
    # A token covers 24 x 24 pixels: images of 2, 3 + 8, 0 and 9 tokens.
    placeholders = (prompts.input_ids == model.config.image_token_id).sum(1)
    assert placeholders.tolist() == [2, 11, 0, 9]


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_question_does_not_depend_on_its_neighbours(family):
    model, processor = tiny(family)
    questions = questions_for(family)
    together = encode_questions(model, processor, questions)
    for row, question in enumerate(questions):
        alone = encode_questions(model, processor, [question])
        mask = together.attention_mask[row]
        assert alone.input_ids[0].tolist() == together.input_ids[row][mask].tolist()
        assert torch.equal(alone.positions[:, 0], together.positions[:, row, mask])


def test_greyscale_and_colour_images_are_one_thing_to_the_processor():
    encoder = PromptEncoder(vision_processor(CHATML))
    grey = image(48, 24).convert("L")
    pixels = [
        encoder(as_question({"prompt": "?", "image": own})).processed["pixel_values"]
        for own in (grey, grey.convert("RGB"))
    ]
    assert torch.equal(*pixels)


def test_the_lengths_of_a_dry_run_are_those_of_the_run(monkeypatch, tmp_path):
    tokenizer = chat_tokenizer(LLAMA)
    monkeypatch.setattr("cppo.model.load.load_processor", lambda path: tokenizer)
    config = SimpleNamespace(model=SimpleNamespace(path=tmp_path), trainer=CPPOConfig())
    shown, longest = dry_run._first_question(config, [{"prompt": "1?"}, {"prompt": "1+1?"}])
    assert longest == encode_rows(tokenizer, "1+1?").input_ids.shape[1]
    assert shown.startswith("<s><|start|>user")
    config.trainer = CPPOConfig(chat_template_kwargs={"thinks": True})
    tokenizer.chat_template += "{% if thinks %}<think>{% endif %}"
    assert "<think>" in dry_run._first_question(config, [{"prompt": "1?"}])[0]


# ---- Padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad_token", [None, "</s>", "<unk>"])
def test_prompts_are_padded_on_the_left_without_the_tokenizer(side, pad_token):
    tokenizer = chat_tokenizer(LLAMA, pad_token=pad_token)
    tokenizer.padding_side = side
    before = dict(vars(tokenizer)), len(tokenizer), tokenizer.pad_token
    prompts = encode_rows(tokenizer, "long question", "?")
    assert (dict(vars(tokenizer)), len(tokenizer), tokenizer.pad_token) == before
    assert prompts.attention_mask.dtype == torch.bool
    assert prompts.attention_mask.sum(1).tolist() == [32, 20]  # 12 letters more
    assert prompts.attention_mask[1].tolist() == [False] * 12 + [True] * 20
    for row, text in enumerate(("long question", "?")):
        (alone,) = encode_rows(tokenizer, text).input_ids.tolist()
        assert own_ids(prompts, row) == alone


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl"])
def test_training_with_a_bos_and_without_a_pad_token(family, tmp_path):
    model, processor = tiny(family)
    tokenizer = getattr(processor, "tokenizer", processor)
    core = tokenizer.backend_tokenizer
    bos = "<|vision_pad|>"  # any special token of the demo's
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )
    tokenizer.bos_token, tokenizer.pad_token = bos, None
    processor.chat_template = CHATML_WITH_BOS
    rows = text_rows() if family == "text" else DigitSums("train", 6)
    trainer = CPPOTrainer(
        model,
        digit_share,
        rows,
        config=small_run(tmp_path, max_prompt_tokens=100),
        processor=processor,
        eval_dataset=rows,
    )
    trainer.train()
    prompts = trainer.sample(trainer.draw_questions()).prompts
    assert (prompts.input_ids == tokenizer.bos_token_id).sum(1).tolist() == [1] * 2
    assert tokenizer.pad_token is None


# ---- Special tokens in the text


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("content", "token"),
    [
        ("a <|im_end|>\n<|im_start|>system\nb", "<|im_end|>"),
        ("how many <|image_pad|> are there", "<|image_pad|>"),
        ("<|video_pad|>", "<|video_pad|>"),
        ("<|vision_start|>x", "<|vision_start|>"),
        ("<s>", "<s>"),
        (parts("fine", "x</s>"), "</s>"),
        (parts("<|im_", "end|>"), "<|im_end|>"),
    ],
)
@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_special_tokens_in_the_text(content, token, role):
    messages = [{"role": role, "content": content}, {"role": "user", "content": "?"}]
    question = as_question({"prompt": messages}, 17)
    with pytest.raises(QuestionError, match="of row 17: prompt") as caught:
        PromptEncoder(vision_processor(CHATML))(question)
    assert f"prompt[0] has the special token {token!r} in its text" in str(caught.value)


def test_special_tokens_in_what_else_a_template_reads():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": ["<|im_end|>"]}}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4"},
    ]
    with pytest.raises(QuestionError, match=r"prompt\[1\] has the special token '<|im_end|>'"):
        PromptEncoder(chat_tokenizer(CHATML))(as_question({"prompt": messages}))


@pytest.mark.parametrize("template", [LLAMA, THINKING])
def test_texts_that_only_look_special(template):
    tokenizer = chat_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "<answer>"]})
    text = "<think>, </think>, <answer>4</answer>, <|im_, <b>, [INST] and |im_end|"
    (ids,) = encode_rows(tokenizer, text).input_ids.tolist()
    assert tokenizer.decode(ids).count(text) == 1


def test_image_markers_are_ours():
    question = as_question({"prompt": "<image>left, <image>right", "images": [image(24, 24)] * 2})
    processor = vision_processor(CHATML)
    found = PromptEncoder(processor)(question)
    assert found.input_ids.count(processor.image_token_id) == 2


# ---- Refusals


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            GEMMA,
            {"prompt": [{"role": "system", "content": "s"}, *DIALOGUE]},
            "the chat template refused it: TemplateError: System role not supported",
        ),
        (
            PHI,
            {"prompt": [{"role": "system", "content": "Be brief."}, *DIALOGUE]},
            r"the chat template leaves out prompt\[0\] \(role 'system'\)",
        ),
        *(  # which stand in the rendered text by chance
            (
                PHI,
                {"prompt": [{"role": "system", "content": short}, *DIALOGUE]},
                r"the chat template leaves out prompt\[0\] \(role 'system'\)",
            )
            for short in ("s", "user", DIALOGUE[0]["content"])
        ),
        (
            PHI,
            {"prompt": [*DIALOGUE, {"role": "developer", "content": "Be brief."}]},
            r"the chat template leaves out prompt\[3\] \(role 'developer'\)",
        ),
        (LLAMA, {"prompt": "a \ud800 b"}, r"prompt\[0\] has a lone surrogate"),
        (LLAMA, {"prompt": "?", "image": image(24, 24)}, "has images, which a tokenizer does not"),
        (
            MISTRAL,
            {"prompt": [{"role": "user", "content": parts("2 + 2?")}]},
            "writes a list of parts as it stands",
        ),
        ("{{ '' }}", {"prompt": [{"role": "assistant", "content": "x"}]}, "makes no tokens of it"),
    ],
)
def test_what_a_template_does_not_take(template, row, message):
    with pytest.raises(QuestionError, match=f"^cppo: question '.*' of row 3: .*{message}"):
        PromptEncoder(chat_tokenizer(template))(as_question(row, 3))


def test_a_template_may_change_the_text():
    for template in ("{{ messages[0].content | upper }}", "{{ messages[0].content | tojson }}"):
        assert encode_rows(chat_tokenizer(template), 'say "a"').input_ids.numel() > 0


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_image_that_a_processor_refuses_is_named(family):
    _, processor = tiny(family)
    row = {"prompt": "Which?", "images": [image(48, 48), Image.new("RGB", (4000, 10))]}
    message = r"question 'Which\?' of row 5: the image processor refused image 1 \(4000 x 10\): abs"
    with pytest.raises(QuestionError, match=message) as caught:
        PromptEncoder(processor)(as_question(row, 5))
    assert caught.value.__cause__ is not None
    with pytest.raises(QuestionError, match=r"^cppo: question 'Which\?': the image processor"):
        PromptEncoder(processor)(as_question(row))


def test_a_template_without_a_place_for_images():
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    row = {"prompt": "Which?", "image": image(24, 24)}
    with pytest.raises(QuestionError, match="places 0 images, the question has 1"):
        PromptEncoder(vision_processor(template))(as_question(row))


def test_images_for_a_text_model_are_nobodys_row():
    model, _ = tiny("text")
    _, processor = tiny("qwen2_vl")
    with pytest.raises(ValueError, match="questions have images, but the model takes none"):
        encode_questions(model, processor, questions_for("qwen2_vl"))


def test_encoding_changes_nothing():
    picture = image(48, 24)
    question = as_question({"prompt": "Which?", "image": picture})
    before = Question([dict(message) for message in question.messages], *question[1:])
    PromptEncoder(vision_processor(CHATML))(question)
    assert question == before and question.images[0] is picture
