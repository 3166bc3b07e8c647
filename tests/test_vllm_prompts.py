"""What vLLM is given: prompts before a processor expands their images; what it must return."""

import itertools
import os

import pytest
import torch
from prompt_cases import CHATML, CHATML_WITH_BOS, vision_processor
from tokenizers import processors
from trainer_cases import VISION_FAMILIES, image, question, questions_for, tiny
from vision_families import FAMILIES, tiny_vision
from vllm_cases import SAMPLING

from cppo.model.prompts import PromptEncoder, encode_questions
from cppo.rollouts.engine import EngineError
from cppo.rollouts.rollout import assembled, merge, take_questions
from cppo.rollouts.sampler import Draws, Sampled, Sampling
from cppo.rollouts.vllm_requests import Request, check_prompt, requests, sampling_arguments


def asked(prompts):
    count = len(prompts.questions) * SAMPLING.group_size
    return requests(prompts, SAMPLING, Draws(1, count, slice(0, count)))


def one_for_each_run(ids, token):
    runs = itertools.groupby(ids, lambda own: own == token)
    return [own for is_image, run in runs for own in ([token] if is_image else run)]


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_qwens_prompts_have_one_token_for_each_image(family):
    model, processor = tiny(family)
    prompts = encode_questions(model, processor, questions_for(family))
    for request, ids, own in zip(
        asked(prompts), prompts.token_ids(), prompts.questions, strict=True
    ):
        assert request.expanded == ids and request.images == own.images
        assert request.token_ids == one_for_each_run(ids, model.config.image_token_id)
        assert request.token_ids.count(model.config.image_token_id) == len(own.images)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"paligemma"}))
def test_a_prompt_is_the_processors_but_for_what_stands_for_its_image(family):
    _, processor = tiny_vision(family)
    own = PromptEncoder(processor)(question("Which is larger?", [image(60, 40)]))
    ids, expanded = own.unexpanded, own.input_ids
    before = len(os.path.commonprefix([ids, expanded]))
    behind = len(os.path.commonprefix([ids[::-1], expanded[::-1]]))
    # Gemma 3 puts newlines around an image, which are one token with the one that stands there.
    changed = 2 if family == "gemma3" else 1
    assert len(ids) < len(expanded) and before + behind >= len(ids) - changed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 2])
def test_a_prompt_is_what_the_template_writes(family, count):
    _, processor = tiny_vision(family)
    pictures = [image(60, 40), image(30, 80)][:count]
    own = PromptEncoder(processor)(question("Which?", pictures))
    text = processor.apply_chat_template(own.question.messages, add_generation_prompt=True)
    assert processor.tokenizer.decode(own.unexpanded) == text


def test_a_prompt_without_images_is_as_it_is():
    model, processor = tiny("qwen3_vl")
    prompts = encode_questions(model, processor, [question("Hi"), question("How many?")])
    assert prompts.unexpanded == prompts.token_ids()


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_BOS], ids=["plain", "with_bos"])
def test_the_first_token_of_a_text_is_there_once(template):
    """A tokenizer may put it there, a template, or both."""
    processor = vision_processor(template)
    tokenizer = processor.tokenizer
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    own = PromptEncoder(processor)(question("Hi?", [image(48, 24)]))
    assert own.unexpanded == one_for_each_run(own.input_ids, processor.image_token_id)
    assert own.unexpanded.count(tokenizer.bos_token_id) == 1


def test_they_stay_with_their_questions():
    model, processor = tiny("qwen3_vl")
    prompts = encode_questions(model, processor, questions_for("qwen3_vl"))
    assert prompts.of([2, 0]).unexpanded == [prompts.unexpanded[q] for q in (2, 0)]
    parts = []
    for questions in ([1], [0, 3]):
        rows = len(questions) * SAMPLING.group_size
        found = Sampled(torch.full((rows, 2), 5), torch.zeros(rows, 2))
        parts.append(assembled(prompts.of(questions), SAMPLING, found, processor))
    merged = merge(parts)
    assert merged.prompts.unexpanded == [prompts.unexpanded[q] for q in (1, 0, 3)]
    assert take_questions(merged, [2]).prompts.unexpanded == [prompts.unexpanded[3]]


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (lambda ids: [*ids, 7], "a prompt of 5 tokens of ours of 4 .3 and 2 of them of.* 4 on"),
        (lambda ids: ids[:-1], "a prompt of 3 tokens of ours of 4 .2 and 2.*from token 3 on"),
        (lambda ids: [5, 7, 6, 6], "a prompt of 4 tokens of ours of 4 .1 and 2.*from token 2 on"),
    ],
)
def test_another_prompt_is_refused(theirs, words):
    request = Request(token_ids=[5, 7, 6], expanded=[5, 7, 7, 6], images=[], seed=0)
    check_prompt([5, 7, 7, 6], request, "vLLM", 7)
    with pytest.raises(EngineError, match=words):
        check_prompt(theirs(request.expanded), request, "vLLM", 7)


@pytest.mark.parametrize(("temperature", "sent"), [(None, 0.0), (0.01, 0.01), (1.0, 1.0)])
def test_vllm_is_asked_for_the_temperature(temperature, sent):
    sampling = Sampling(2, 4, temperature, (), (1,), 0)
    assert sampling_arguments(sampling, seed=3)["temperature"] == sent


def test_a_temperature_that_vllm_would_raise_is_refused():
    with pytest.raises(EngineError, match="temperatures of 0.01 and more, got 0.002"):
        sampling_arguments(Sampling(2, 4, 0.002, (), (1,), 0), seed=3)
