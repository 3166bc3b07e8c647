"""Packed, padded or refused: what is chosen for models that do otherwise than they seem to."""

import copy
import dataclasses
import importlib.util
import inspect

import pytest
import torch
import transformers
from families import tiny_family
from models_table import PAGE, rendered
from trainer_cases import fixed_batch, fixed_rollouts, tiny
from trainer_cases import question as asks
from vision_families import tiny_vision
from vision_pictures import picture

from cppo.model import ways
from cppo.model.forward import Stream
from cppo.model.packed import packed_hidden
from cppo.model.prompts import encode_questions
from cppo.model.ways import Ways, choose_ways, hidden_states, shown_picture, ways_of
from cppo.ops.pack import pack_completions
from cppo.questions import as_question


def chosen(model, processor, **options):
    return choose_ways(model, "sdpa", shown=shown_picture(model, processor), **options)


def changed_call(module, change):
    """Has a module called with other arguments."""
    plain = module.forward

    def forward(*args, **kwargs):
        return plain(*args, **change(kwargs))

    forward.__signature__ = inspect.signature(plain)
    module.forward = forward


def without(*names):
    return lambda arguments: {k: v for k, v in arguments.items() if k not in names}


def test_the_page_says_what_the_models_show():
    page = PAGE.read_text("utf-8")
    if f"(transformers {transformers.__version__})" not in page:
        pytest.skip("the page is of another transformers")
    if importlib.util.find_spec("fla") is not None:
        pytest.skip("with flash-linear-attention Qwen3.5 is packed")
    assert rendered(page) == page


def test_images_that_attend_both_ways_only_where_a_config_says_so_are_padded():
    model, processor = tiny_vision("gemma4")
    assert chosen(copy.deepcopy(model), processor).packed
    model.config.text_config.use_bidirectional_attention = "vision"
    found = chosen(model, processor)
    assert found.text and not found.images and "with images, its logits are off" in found.reason


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_body_that_drops_the_bounds_of_sequences_is_padded(family):
    model, processor = tiny_vision(family)
    changed_call(model.model.language_model, without("cu_seq_lens_q", "cu_seq_lens_k"))
    assert not chosen(model, processor).text
    with pytest.raises(ValueError, match="cannot be run on packed sequences: .*cu_seq_lens"):
        packed_hidden(model, batch_of(model, processor)[0])


def test_a_body_that_ignores_positions_is_padded_where_they_are_learned():
    model = tiny_family("opt")
    changed_call(model.model.decoder, without("position_ids"))
    found = choose_ways(model, "sdpa")
    assert not found.text and "model_type 'opt'" in found.reason


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_body_that_ignores_masks_is_refused(family):
    model, processor = tiny_vision(family)
    changed_call(model.model, lambda own: own | {"attention_mask": None})
    with pytest.raises(ValueError, match=f"model_type '{family}' "):
        chosen(model, processor)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_body_that_ignores_encoded_images_is_refused(family):
    model, processor = tiny_vision(family)
    changed_call(model.model, without("mm_encoder_outputs"))
    with pytest.raises(ValueError, match="on padded sequences, with images, its logits are off by"):
        chosen(model, processor)


def test_a_model_that_cannot_encode_images_by_themselves_is_refused():
    model, processor = tiny_vision("llava")
    plain = model.model.forward
    model.model.forward = lambda input_ids, pixel_values=None, **kwargs: plain(
        input_ids, pixel_values=pixel_values, **kwargs
    )
    with pytest.raises(ValueError, match=r"get_image_features.*model_type 'llava'"):
        chosen(model, processor)


def batch_of(model, processor):
    """A stream of two answers to a question with a picture, and its images."""
    question = as_question({"prompt": "What?", "image": picture(60, 32)})
    prompts = encode_questions(model, processor, [question])
    ids = torch.cat([prompts.input_ids.repeat(2, 1), torch.tensor([[3, 4], [5, 6]])], 1)
    mask = torch.ones_like(ids).bool()
    is_answer = torch.arange(ids.shape[1]) >= prompts.input_ids.shape[1]
    return pack_completions(ids, mask, mask & is_answer), prompts.images


def test_packed_hidden_refuses_images_that_attend_both_ways():
    model, processor = tiny_vision("gemma3")
    ways.set_attention(model, "sdpa")
    batch, images = batch_of(model, processor)
    with pytest.raises(ValueError, match="on packed sequences, with images, its logits are off by"):
        packed_hidden(model, batch, None, images, [0, 0])
    assert chosen(model, processor).text
    padded = hidden_states(model, Stream(batch, None, images, [0, 0]))
    assert padded.shape == (4, 32) and not ways_of(model).images


def test_without_a_choice_it_is_packed():
    model, _ = tiny("text")
    assert ways_of(model).packed and str(ways_of(model)) == "packed"
    assert shown_picture(*tiny("text")) is None


@pytest.mark.parametrize("has_images", [False, True], ids=["text", "images"])
def test_padding_counts_as_tokens_of_a_micro_batch(has_images):
    model, processor = tiny("qwen2_5_vl")
    images = [picture(48, 24)] if has_images else []
    texts = ["short"] * 4 + ["x" * 200] + ["short"] * 4
    rollouts = fixed_rollouts(model, processor, [asks(text, images) for text in texts])
    packed = fixed_batch(rollouts)
    budget = max(packed.lengths(packed.kept)) + 100

    def cut(batch):
        parts = batch.microbatches(batch.kept, budget)
        assert sorted(i for part in parts for i in part.tolist()) == batch.kept.tolist()
        lengths = [batch.lengths(part) for part in parts]
        padded = [len(own) * max(own) for own in lengths]
        return parts, [sum(own) for own in lengths], padded

    parts, tokens, padded = cut(packed)
    assert max(padded) > 2 * budget  # the long one, with short ones
    assert [packed.computed_tokens(part) for part in parts] == tokens
    batch = dataclasses.replace(packed, ways=Ways(text=has_images, images=not has_images))
    parts, _, padded = cut(batch)
    assert max(padded) <= budget and len(parts) < 6
    assert [batch.computed_tokens(part) for part in parts] == padded
    if has_images:  # of one question all are in one part
        assert all(len(part) % 2 == 0 for part in parts if len(part) > 1)


def test_a_model_without_a_token_or_a_body_for_images_is_refused_in_words():
    model, processor = tiny_vision("llava")
    model.config.image_token_id = None
    with pytest.raises(ValueError, match=r"config\.image_token_id.*'llava' has none"):
        chosen(model, processor)
    model, processor = tiny_vision("llava")
    model.other = model.model
    del model.model
    with pytest.raises(ValueError, match="get_image_features"):
        chosen(model, processor)


@pytest.mark.parametrize(
    ("family", "name"), [("gemma3", "token_type_ids"), ("llava", "moe_mm_token_type_ids")]
)
def test_a_processor_that_tells_tokens_apart_in_its_own_way_is_refused(family, name):
    model, processor = tiny_vision(family)

    class Marks(type(processor)):
        def __call__(self, *args, **kwargs):
            made = super().__call__(*args, **kwargs)
            made[name] = torch.ones_like(made["input_ids"])
            return made

    processor.__class__ = Marks
    if family == "llava":  # as Ernie 4.5, which routes tokens of images to experts of their own
        plain = inspect.signature(model.model.forward)
        new = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        named = [p for p in plain.parameters.values() if p.kind is not p.VAR_KEYWORD]
        changed_call(model.model, lambda own: own)
        model.model.forward.__signature__ = plain.replace(parameters=[*named, new])
    with pytest.raises(ValueError, match=f"tells its tokens apart by {name}"):
        chosen(model, processor)


def test_the_trial_picture_is_one_that_a_processor_takes():
    model, processor = tiny_vision("gemma3")
    processor.image_processor.do_resize = False
    assert chosen(model, processor).text
    shown = shown_picture(model, processor)()
    assert shown.images.prepared[0]["pixel_values"].shape[-2:] == (56, 56)


def test_images_that_no_trial_has_shown_are_compared_at_first_use():
    model, processor = tiny_vision("paligemma")
    assert not choose_ways(model, "sdpa").text  # a template of text alone has no trial
    batch, images = batch_of(model, processor)
    changed_call(model.model, without("mm_encoder_outputs"))
    with pytest.raises(ValueError, match="on padded sequences, with images, its logits are off by"):
        hidden_states(model, Stream(batch, None, images, [0, 0]))
