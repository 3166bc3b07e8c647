"""Every family that takes images, in the trainer: its forward against the model's own, alone."""

import copy
import dataclasses
import functools
import json
import math
import re

import pytest
import torch
from trainer_cases import (
    config,
    digit_share,
    fixed_batch,
    fixed_rollouts,
    question,
    relative_difference,
)
from transformers import AutoModelForImageTextToText
from transformers.utils import is_torchvision_available
from vision_families import FAMILIES, tiny_vision
from vision_pictures import answer_logits, picture, prepared

from cppo.cli import info
from cppo.model import image_views
from cppo.model.forward import lm_head
from cppo.model.load import load_model, load_processor, special_token_ids_to_suppress
from cppo.model.processor_files import save_processor
from cppo.model.ways import ways_of
from cppo.model.wrappers import IN_TOWER
from cppo.options.trainer import LoraConfig
from cppo.records import NumItems
from cppo.rollouts.rollout import sample_completions
from cppo.train.algorithm import microbatch_loss
from cppo.train.policy import prepare
from cppo.train.trainer import CPPOTrainer
from cppo.train.views import anchor_hidden, forward_views, perturbed_images, token_logps
from cppo.views import MaskedPatches, prepared_views
from cppo.views.pictures import as_seen, cuts_patches, seen_size

CPU = torch.device("cpu")
# Text that is packed, and questions with images that are.
PACKED = dict.fromkeys(FAMILIES, (True, True)) | {
    "gemma3": (True, False),
    "paligemma": (False, False),
    "qwen3_5": (False, False),
}


PATCHES = {name: name.startswith(("qwen", "glm")) for name in FAMILIES}


@functools.cache
def _built(family):
    return tiny_vision(family)


def questions(family):
    """One image, two of other sizes, none, and one."""
    found = [
        question("How many?", [picture(60, 32, 1)]),
        question("Which?", [picture(28, 76, 2), picture(96, 40, 3)]),
        question("And now?"),
        question("What is it, and why?", [picture(64, 64, 4)]),
    ]
    # The processor of PaliGemma takes no prompt without an image.
    return [own for own in found if own.images or family != "paligemma"]


def case(family, *, dtype=torch.float32, **options):
    """A model in training, its processor, and a batch of two completions of each question."""
    model, processor = copy.deepcopy(_built(family))
    model = prepare(model.to(dtype), config(**options), CPU, processor)
    rollouts = fixed_rollouts(model, processor, questions(family))
    return model, processor, fixed_batch(rollouts, dtype=dtype)


def processed(processor, asked):
    """What transformers' processor makes of a question, written out once more."""
    content = asked.messages[0]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    return prepared(processor, text, asked.images)


def own_logps(model, processor, rollouts, row):
    """Log-probabilities of a completion by transformers, from what the processor returns."""
    answer = rollouts.completion_ids[row]
    logits = answer_logits(model, processed(processor, rollouts.question_of(row)), answer)
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def our_logps(model, batch, rows):
    packed = batch.pack(rows)
    hidden = anchor_hidden(model, batch, packed)
    logits = hidden @ lm_head(model).weight.T
    if (cap := lm_head(model).softcap) is not None:
        logits = cap * (logits / cap).tanh()
    logps = logits.log_softmax(-1).gather(1, packed.targets[:, None])[:, 0]
    return logps.split(batch.response_lengths(rows))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_logps_and_gradients_are_those_of_each_sequence_alone(family, dtype):
    model, processor, batch = case(family, dtype=dtype)
    assert (ways_of(model).text, ways_of(model).images) == PACKED[family]
    stock = copy.deepcopy(_built(family)[0]).to(dtype)
    parts = batch.microbatches(batch.kept, 10**6)
    assert len(parts) == (1 if family == "paligemma" else 2)  # with images, and without
    found = {}
    for rows in parts:
        values = our_logps(model, batch, rows)
        found |= zip(rows.tolist(), values, strict=True)
    expected = {row: own_logps(stock, processor, batch.rollouts, row) for row in found}
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    for row, values in expected.items():
        torch.testing.assert_close(found[row], values, rtol=0, atol=tolerance)
    for values in (found, expected):
        sum(batch.advantages[row] * own.sum() for row, own in values.items()).backward()
    both = [
        {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        for one in (model, stock)
    ]
    assert relative_difference(*both) < 10 * tolerance
    assert any("vis" in name for name in both[0])  # the tower learns


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_completions_are_those_of_generate(family):
    model, processor, batch = case(family)
    prompts = batch.rollouts.prompts
    model.eval()
    ours = sample_completions(
        model, processor, prompts, group_size=1, max_new_tokens=5, temperature=None
    )
    stock = _built(family)[0]
    for number, asked in enumerate(prompts.questions):
        inputs = processed(processor, asked)
        expected = stock.generate(**inputs, max_new_tokens=5, do_sample=False)
        found = ours.completion_ids[number]
        assert found == expected[0, inputs["input_ids"].shape[1] :][: len(found)].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_with_contrast_lower_the_loss_of_a_fixed_batch(family):
    options = config(cpl_coef=0.1, perception="cpl_all")
    model, processor, batch = case(family)
    old = token_logps(model, batch, options)
    batch = dataclasses.replace(batch, per_token={"old_logps": old})
    assert batch.gated(batch.kept, options.loss).numel()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)

    def loss():
        count = NumItems(len(batch.kept), sum(batch.response_lengths(batch.kept)))
        outputs = [
            microbatch_loss(model, batch, rows, count, options, processor)
            for rows in batch.microbatches(batch.kept, 10**6)
        ]
        assert any(out.perception_mask is not None and out.perception_mask.any() for out in outputs)
        return sum(out.loss for out in outputs)

    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        optimizer.step()
    assert all(map(math.isfinite, losses)) and losses[2] < losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_opens_in_plain_transformers_and_trains_on(family, tmp_path):
    if family == "mistral3" and not is_torchvision_available():
        pytest.skip("the processor of Mistral 3 needs torchvision")
    model, processor, batch = case(family)
    model.save_pretrained(tmp_path)
    save_processor(processor, tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    values = {
        row: own_logps(plain.eval(), processor, batch.rollouts, row)
        for row in (0, 2, len(batch.kept) - 1)
    }
    again = prepare(load_model(tmp_path), config(), CPU, processor)
    loaded = load_processor(tmp_path)
    rollouts = fixed_rollouts(again, loaded, questions(family))
    other = fixed_batch(rollouts)
    assert rollouts.completion_ids == batch.rollouts.completion_ids
    for row, expected in values.items():
        (found,) = our_logps(again, other, torch.tensor([row]))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    found.sum().backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_views_change_the_pictures_and_nothing_else(family):
    _, processor, batch = case(family)
    own = batch.rollouts.prompts.images
    options = config(positive_views=["gaussian_blur"], negative_views=["black_squares"])
    blurred, black = perturbed_images(batch, [0, 1], options, processor)
    for view in (blurred, black):
        assert view.tokens == (own.tokens[0], own.tokens[1])
        for ours, original in zip(view.prepared, (own.prepared[0], own.prepared[1]), strict=True):
            assert {n: (x.shape, x.dtype) for n, x in ours.items()} == {
                n: (x.shape, x.dtype) for n, x in original.items()
            }
            assert all(torch.equal(ours[n], original[n]) for n in ours if n != "pixel_values")
    distance = [
        [
            (a["pixel_values"] - b["pixel_values"]).abs().mean()
            for a, b in zip(view.prepared, (own.prepared[0], own.prepared[1]), strict=True)
        ]
        for view in (blurred, black)
    ]
    assert all(0 < near < far for near, far in zip(*distance, strict=True))
    again = perturbed_images(batch, [1], options, processor)[1]
    assert torch.equal(again.prepared[0]["pixel_values"], black.prepared[1]["pixel_values"])


@pytest.mark.parametrize("family", [name for name in FAMILIES if PATCHES[name]])
def test_patches_and_pictures_are_the_same_views(family, monkeypatch):
    _, processor, batch = case(family)
    scale = max(processor.image_processor.image_std) * 255
    views = [perturbed_images(batch, [0, 1, 3], config(), processor)]
    monkeypatch.setattr(image_views, "cuts_patches", lambda processor: False)
    views.append(perturbed_images(batch, [0, 1, 3], config(), processor))
    for of_patches, of_pictures in zip(*views, strict=True):
        for one, other in zip(of_patches.prepared, of_pictures.prepared, strict=True):
            assert torch.equal(one["image_grid_thw"], other["image_grid_thw"])
            off = (one["pixel_values"] - other["pixel_values"]).abs().max() * scale
            assert off < 0.51  # pictures are rounded to whole levels


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_are_perturbed_only_where_they_read_back(family):
    assert cuts_patches(_built(family)[1].image_processor) == PATCHES[family]


@pytest.mark.parametrize(
    ("family", "size", "expected"),
    [
        ("qwen2_5_vl", (50, 30), (48, 24)),
        ("llava", (60, 32), (52, 28)),  # then its middle is cut out
        ("gemma3", (60, 32), (56, 56)),
        ("paligemma", (500, 100), (28, 28)),
        ("llava_next", (600, 300), (56, 28)),  # and a small copy of the whole
        ("idefics3", (600, 300), (56, 28)),
        ("internvl", (600, 300), (56, 28)),
        ("mistral3", (64, 32), (56, 28)),
    ],
)
def test_pictures_are_perturbed_at_the_size_that_the_model_sees(family, size, expected):
    image_processor = _built(family)[1].image_processor
    assert seen_size(image_processor, size) == expected
    assert as_seen(picture(*size), image_processor).size == expected
    assert "resize" not in vars(image_processor)


@pytest.mark.parametrize("family", FAMILIES)
def test_views_are_made_once_per_question(family, monkeypatch):
    model, processor, batch = case(family)
    made = []
    plain = type(processor.image_processor).__call__

    def counted(own, images, *args, **kwargs):
        made.append(1)
        return plain(own, images, *args, **kwargs)

    perturbed_images(batch, [0], config(), processor)  # sizes are found out
    batch.views.clear()
    monkeypatch.setattr(type(processor.image_processor), "__call__", counted)
    for rows in (torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1])):
        forward_views(model, batch, rows, config(cpl_coef=0.1, gating=False), processor)
    assert len(made) in ((0,) if PATCHES[family] else (2, 4))  # 4 at the size of the originals


def test_a_view_with_other_tokens_is_made_at_the_first_size_or_an_error_in_words():
    image_processor = _built("mistral3")[1].image_processor
    tried = []

    def prepare(views):
        tried.append([view.size for view in views])
        return "prepared" if len(tried) == enough else None

    def made():
        tried.clear()
        return prepared_views(
            [picture(64, 32)],
            [MaskedPatches()],
            seeds=[0],
            image_processor=image_processor,
            prepare=prepare,
        )

    for enough in (1, 2):
        assert made() == "prepared" and tried == [[(56, 28)], [(64, 32)]][:enough]
    enough = 3
    with pytest.raises(ValueError, match=r"PixtralImageProcessorPil does not \(64 x 32\)"):
        made()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_placeholder_of_an_image_is_sampled(family):
    model, processor = _built(family)
    tokenizer = processor.tokenizer
    asked = processed(processor, question("", [picture(60, 32)]))["input_ids"][0].tolist()
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    suppressed = special_token_ids_to_suppress(model, processor)
    left = special.intersection(asked) - {*suppressed}
    marks = tokenizer.convert_ids_to_tokens(sorted(left))
    # Those of turns.
    known = re.compile(r"im_|turn|utterance|user|assistant|INST|^</?s>$|sop|gMASK")
    assert [mark for mark in marks if mark.strip() and not known.search(mark)] == []
    assert model.config.image_token_id in suppressed


def test_what_a_forward_pass_hangs_into_a_model_is_not_there_twice():
    model, processor = copy.deepcopy(_built("llava"))
    stock = copy.deepcopy(model)
    prepare(model, config(), CPU, processor)
    pixels = processed(processor, questions("llava")[0])["pixel_values"]
    ours, own = (one.model.get_image_features(pixels).pooler_output[0] for one in (model, stock))
    assert torch.equal(ours, own)
    hooks = [sum(len(part._forward_hooks) for part in one.modules()) for one in (model, stock)]
    assert hooks[0] == hooks[1] > 0


HARD = {
    "share_prompts": True,
    "gradient_checkpointing": True,
    "freeze_vision_tower": True,
    "precision": "bf16",
    "num_iterations": 2,
    "kl_coef": 0.05,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, HARD, {"lora": LoraConfig(r=2)}], ids=["", "hard", "lora"])
def test_two_steps_of_the_trainer(family, options, tmp_path):
    if "lora" in options:
        pytest.importorskip("peft")
    model, processor = copy.deepcopy(_built(family))
    asked = [{"prompt": "How many?", "image": picture(60, 32, i)} for i in range(3)]
    asked += [{"prompt": "Which?", "images": [picture(28, 76), picture(96, 40)]}]
    asked += [] if family == "paligemma" else [{"prompt": "And now?"}]
    sizes = {"batch_size": 12, "group_size": 4, "max_completion_tokens": 5, "max_steps": 2}
    trainer = CPPOTrainer(
        model,
        digit_share,
        asked,
        config=config(
            output_dir=str(tmp_path), cpl_coef=0.1, perception="cpl_all", **sizes, **options
        ),
        processor=processor,
    )
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(after[name], own) for name, own in before.items())
    assert all(torch.equal(after[name], own) for name, own in frozen.items())
    if options.get("freeze_vision_tower"):
        assert any(re.fullmatch(IN_TOWER, name) for name in frozen)
    assert sum(row.get("perturbed_views", 0) for row in trainer.history) > 0


@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_info_says_how_a_model_is_run(family, tmp_path, capsys):
    model, processor = _built(family)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert info.main([str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    expected = "packed" if family == "llava" else "padded (with images), because packed"
    assert said["forward"].startswith(expected)
    assert said["attention"] == "sdpa" and "views are made of pictures" in said["images"]
