"""`cppo.inspect`: its numbers against transformers' own, what it leaves behind, and its page."""

import copy
import functools
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from trainer_cases import tiny
from vision_families import tiny_vision
from vision_pictures import answer_logits, picture, prepared

import cppo
from cppo.cli import inspect as command
from cppo.cli.config_file import ConfigError
from cppo.model.load import save_processor, special_token_ids_to_suppress

FAMILIES = ("qwen2_5_vl", "gemma3", "llava", "paligemma", "qwen3_5")


@functools.cache
def _built(family):
    return tiny_vision(family)


@functools.cache
def _found(family):
    model, processor = _built(family)
    config = cppo.CPPOConfig(max_completion_tokens=6)
    return cppo.inspect(
        model, processor, picture(60, 32), "What is it?", samples=3, seed=5, config=config
    )


def own_numbers(family, view, answer):
    """Log-probabilities and entropies of an answer by transformers, of a view's picture."""
    model, processor = _built(family)
    ids = [token.id for token in answer.tokens]
    logits = answer_logits(model, prepared(processor, "What is it?", [view]), ids)
    never = torch.tensor(special_token_ids_to_suppress(model, processor))
    logps = logits.index_fill(1, never, -torch.inf).log_softmax(-1)
    entropy = -(logps.exp() * logps).nan_to_num().sum(-1)
    return logps.gather(1, torch.tensor(ids)[:, None])[:, 0], entropy


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_numbers_are_those_of_each_picture_by_transformers(family):
    found = _found(family)
    assert len(found.answers) == 3 and set(found.views) == {"anchor", "positive", "negative"}
    for answer in found.answers:
        for name, (view,) in found.views.items():
            logps, entropy = own_numbers(family, view, answer)
            # Patches are perturbed as they are, pictures are rounded to whole levels.
            close = dict(rtol=0, atol=1e-4 if name == "anchor" else 2e-2)
            ours = torch.tensor([token.logps[name] for token in answer.tokens])
            torch.testing.assert_close(ours, logps, **close)
            ours = torch.tensor([token.entropies[name] for token in answer.tokens])
            torch.testing.assert_close(ours, entropy, **close)
        shift = [t.entropies["negative"] - t.entropies["anchor"] for t in answer.tokens]
        assert [token.shift for token in answer.tokens] == shift
        mask = cppo.perception_mask(
            torch.tensor([[t.entropies["anchor"] for t in answer.tokens]]),
            torch.tensor([[t.entropies["negative"] for t in answer.tokens]]),
            fraction=0.5,
            mask=torch.ones(1, len(shift), dtype=torch.bool),
        )
        assert [token.selected for token in answer.tokens] == mask[0].tolist()


def test_an_answer_that_is_given_is_looked_at_and_samples_are_seeded():
    model, processor = copy.deepcopy(_built("llava"))
    model.train()
    before = model.config.get_text_config()._attn_implementation
    again = functools.partial(cppo.inspect, model, processor, picture(60, 32), "What is it?")
    (answer,) = again(answer="a cat").answers
    assert "".join(token.text for token in answer.tokens) == "a cat" and not answer.is_cut
    assert again(answer="a cat").drawn == "1, given"
    config = cppo.CPPOConfig(max_completion_tokens=6)
    drawn = [again(samples=2, seed=seed, config=config) for seed in (1, 1, 2)]
    texts = [[own.text for own in found.answers] for found in drawn]
    assert texts[0] == texts[1] != texts[2]
    greedy = again(temperature=None, config=config, samples=4)
    assert len(greedy.answers) == 1 and greedy.answers[0].is_cut and greedy.drawn == "1, greedy"
    assert drawn[0].drawn == "2, sampled at temperature 1"
    assert model.training and model.config.get_text_config()._attn_implementation == before


def test_several_images_have_their_views():
    images = [picture(60, 32), picture(28, 76)]
    found = cppo.inspect(*_built("llava"), images, "Which?", answer="one")
    assert [len(views) for views in found.views.values()] == [2, 2, 2]


def test_json_has_everything_but_pictures_and_the_page_stands_alone(tmp_path):
    found = _found("gemma3")
    said = json.loads(found.json())
    assert [own["text"] for own in said["answers"]] == [own.text for own in found.answers]
    assert said["answers"][0]["tokens"][0]["logps"].keys() == found.views.keys()
    page = found.save(tmp_path / "new" / "page.html").read_text("utf-8")
    assert page.count('src="data:image/png') == 3 and "What is it?" in page
    assert not re.search(r"<script|https?://|@import", page)
    tokens = sum(len(own.tokens) for own in found.answers)
    assert page.count('title="') == tokens
    assert json.loads(found.save(tmp_path / "found.json").read_text("utf-8")) == said


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"samples": 0}, ValueError, "samples must be a whole number >= 1, got 0"),
        ({"answer": ""}, ValueError, "answer must have text, or be None"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0 or None, got 0.0"),
    ],
)
def test_what_cannot_be_inspected_is_said(options, error, words):
    with pytest.raises(error, match=f"cppo.inspect: {words}"):
        cppo.inspect(*_built("llava"), picture(60, 32), "What?", **options)


def test_a_model_without_eyes_is_refused():
    with pytest.raises(TypeError, match="cppo.inspect: model must be a vision-language model"):
        cppo.inspect(*tiny("text"), picture(60, 32), "What?")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, processor = _built("llava")
    model.save_pretrained(tmp_path / "model")
    save_processor(processor, tmp_path / "model")
    picture(60, 32).save(tmp_path / "x.png")
    asked = ["model", "--image", "x.png", "--question", "What?", "--max-tokens", "4"]
    assert command.main([*asked, "--samples", "2", "--fraction", "0.25"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and said[0].startswith("1. ") and "inspect.html" in said[2]
    assert (tmp_path / "inspect.html").is_file()
    assert command.main([*asked, "--greedy", "--output", "found.json"]) == 0
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert found["options"]["temperature"] is None and len(found["answers"]) == 1
    for wrong in (["--samples", "0"], ["--fraction", "2"], ["--image", "nothing.png"]):
        with pytest.raises(ConfigError):
            command.main([*asked, *wrong])
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(ConfigError, match="no.png"):
        command.main([*asked, "--image", "no.png"])


def test_the_page_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).resolve().parents[1] / "docs" / "inspect.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    model, processor = _built("llava")
    config = cppo.CPPOConfig(max_completion_tokens=3)
    names = {"cppo": cppo, "model": model, "processor": processor, "config": config}
    exec(block, names | {"image": picture(60, 32)})
    assert (tmp_path / "inspect.html").is_file() and len(capsys.readouterr().out.splitlines()) == 3
    options = set(re.findall(r"--[a-z][a-z-]+", page.read_text("utf-8")))
    known = {name for own in command.parser()._actions for name in own.option_strings}
    assert options == {name for name in known if name.startswith("--")} - {"--help"}


def test_the_picture_is_shown_as_the_model_sees_it():
    found = cppo.inspect(*_built("llava"), picture(600, 320), "What?", answer="a")
    assert found.views["anchor"][0].size == (52, 28)
    assert isinstance(found.views["negative"][0], Image.Image)
