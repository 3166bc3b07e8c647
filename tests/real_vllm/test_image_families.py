"""A real vLLM beside tiny models of the families that take images, each with its own prompts.

`tests/run_vllm.sh`. A family's files have the names that its checkpoints on the hub have: vLLM
loads no others.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: tests/run_vllm.sh makes an environment that has it")

from safetensors.torch import save_file
from trainer_cases import image, noise, question, small_run
from vision_families import tiny_vision

from cppo.model.hub_weights import apart, hub_weights
from cppo.model.load import (
    load_model,
    load_processor,
    save_processor,
    special_token_ids_to_suppress,
)
from cppo.model.prompts import encode_questions
from cppo.options.trainer import VLLMConfig
from cppo.questions import Question
from cppo.rollouts.engine import EngineError
from cppo.rollouts.rollout import Rollouts, sample_completions
from cppo.rollouts.vllm_engine import VLLMEngine
from cppo.train.progress import read_metrics
from cppo.train.trainer import CPPOTrainer

EXACT = 1e-4  # nats, in fp32
OPTIONS = VLLMConfig(max_model_len=256, check_every=1)
# vLLM's attention on a CPU has no smaller heads.
_TEXT: dict[str, Any] = dict(hidden_size=128, head_dim=32)
_ROPE = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0)
_CHANGES: dict[str, dict[str, Any]] = {
    "glm4v": dict(
        text=_TEXT | dict(rope_parameters=_ROPE | dict(mrope_section=[8, 4, 4])),
        vision=dict(out_hidden_size=128),
    )
}
# What stands between `vision_tower.` and the rest in files of the hub.
_TOWERS = {"clip_vision_model", "siglip_vision_model"}
FAMILIES = ("llava", "internvl", "smolvlm", "mistral3", "glm4v")
PICTURES = (image(48, 24, 1), image(96, 60, 2), image(36, 108, 3))


class Case:
    """A tiny model of a family as its checkpoint is loaded, with questions for it."""

    def __init__(self, family: str, folder: Path) -> None:
        made, processor = tiny_vision(family, **_CHANGES.get(family, dict(text=_TEXT)))
        made.config.save_pretrained(folder)
        save_processor(processor, folder)
        weights = apart(hub_weights(made))
        if made.config.tie_word_embeddings:
            weights = {n: w for n, w in weights.items() if not n.endswith("lm_head.weight")}
        if made.config.vision_config.model_type in _TOWERS:
            inner = "vision_tower.vision_model."
            weights = {n.replace("vision_tower.", inner): w for n, w in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        self.model = load_model(folder, dtype=torch.float32)
        self.processor = load_processor(folder)
        self.suppressed = special_token_ids_to_suppress(self.model, self.processor)
        self.questions = [question(f"Number {i}?", [own]) for i, own in enumerate(PICTURES)]
        self.questions += [question("Which is larger?", PICTURES[:2]), question("Hi")]

    def sampled(self, engine: Any, questions: list[Question]) -> Rollouts:
        prompts = encode_questions(self.model, self.processor, questions)
        options: dict[str, Any] = dict(group_size=3, max_new_tokens=8, temperature=1.0)
        options |= dict(suppressed=self.suppressed, engine=engine)
        return sample_completions(self.model, self.processor, prompts, **options)

    def differences(self, engine: Any, questions: list[Question] | None = None) -> list[float]:
        """The largest for each question, of the engine's log-probabilities from the model's own."""
        rollouts = self.sampled(engine, questions or self.questions)
        assert rollouts.sampling_logps is not None
        own = [self._logps(rollouts, row) for row in range(len(rollouts.texts))]
        found = []
        for row, expected in enumerate(own):
            engines = rollouts.sampling_logps[row][rollouts.completion_mask[row]]
            found.append((expected - engines).abs().max().item())
        size = rollouts.group_size
        return [max(found[i : i + size]) for i in range(0, len(found), size)]

    def _logps(self, rollouts: Rollouts, row: int) -> torch.Tensor:
        """Those of a completion, by the model's own forward of that sequence alone."""
        ids = rollouts.input_ids[row][rollouts.attention_mask[row]][None]
        images = rollouts.prompts.images
        arguments = dict(images.prepared[row // rollouts.group_size]) if images else {}
        is_image = (ids == self.model.config.image_token_id).long()
        names = inspect.signature(self.model.model.forward).parameters
        types = {n: is_image for n in ("token_type_ids", "mm_token_type_ids") if n in names}
        with torch.no_grad():
            logits = self.model(input_ids=ids, use_cache=False, **types, **arguments).logits[0]
        logits[:, self.suppressed] = -torch.inf
        logps = logits.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        return logps[-int(rollouts.completion_mask[row].sum()) :]

    def move(self, part: str, amount: float) -> None:
        """Changes every weight of a part: all, or what is not of the language model."""
        text = set(map(id, self.model.get_decoder().parameters()))
        text.add(id(self.model.get_output_embeddings().weight))
        with torch.no_grad():
            for p in self.model.parameters():
                if (part == "all" or id(p) not in text) and p.numel() > 1:
                    p.add_(torch.randn_like(p), alpha=amount * p.std().item())


@pytest.fixture(scope="module", params=FAMILIES)
def running(
    request: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Case, VLLMEngine]]:
    case = Case(request.param, tmp_path_factory.mktemp(request.param))
    engine = VLLMEngine(case.model, case.processor, OPTIONS, "float32")
    yield case, engine
    engine.close()


def test_log_probabilities_are_the_models_own(running: tuple[Case, VLLMEngine]) -> None:
    """Of pictures of several sizes, two in one question, and none."""
    case, engine = running
    torch.manual_seed(0)
    assert max(case.differences(engine)) < EXACT


@pytest.mark.parametrize(("part", "amount"), [("all", 0.2), ("vision", 1.0)])
def test_they_follow_the_weights(
    running: tuple[Case, VLLMEngine], part: str, amount: float
) -> None:
    """What vLLM keeps of an image is forgotten: the same images are asked for again."""
    case, engine = running
    torch.manual_seed(1)
    case.move(part, amount)
    stale = case.differences(engine)
    engine.sync(hub_weights(case.model))
    assert max(case.differences(engine)) < EXACT
    # Each image is read by the weights that moved.
    assert min(stale[:4]) > 100 * EXACT
    assert (stale[4] > 100 * EXACT) == (part == "all")


def test_a_run_has_the_weights_of_every_step(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of InternVL, which takes several runs of its placeholder for an image."""
    case = Case("internvl", tmp_path_factory.mktemp("internvl"))
    parts = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    rows = [
        {"prompt": [{"role": "user", "content": parts}], "images": [own]} for own in PICTURES[:2]
    ]
    config = small_run(tmp_path, engine="vllm", vllm=OPTIONS, max_steps=3, temperature=0.8)
    run = CPPOTrainer(case.model, noise, rows, config=config, processor=case.processor)
    run.train()
    found = read_metrics(tmp_path)
    run.engine.close()
    assert len(found) == 3 and all(row["mismatch/max"] < EXACT for row in found)


def test_an_image_whose_tokens_see_each_other_is_refused_on_a_cpu(tmp_path: Path) -> None:
    case = Case("gemma3", tmp_path)
    engine = VLLMEngine(case.model, case.processor, OPTIONS, "float32")
    try:
        assert max(case.differences(engine, case.questions[4:])) < EXACT
        for _ in range(2):
            with pytest.raises(EngineError, match="see each other both ways"):
                case.sampled(engine, case.questions)
        case.move("all", 0.2)
        engine.sync(hub_weights(case.model))
        assert max(case.differences(engine, case.questions[4:])) < EXACT
        # It is wrong indeed.
        engine._hides_image = False
        assert max(case.differences(engine)) > 100 * EXACT
    finally:
        engine.close()


def test_an_image_that_vllm_expands_otherwise_is_refused(tmp_path: Path) -> None:
    """Of two images of a question, transformers cuts none into tiles for LLaVA-OneVision."""
    case = Case("llava_onevision", tmp_path)
    engine = VLLMEngine(case.model, case.processor, OPTIONS, "float32")
    try:
        for _ in range(2):
            with pytest.raises(EngineError, match="which is another prompt from token"):
                case.sampled(engine, case.questions)
            # Nothing of it is left behind.
            assert max(case.differences(engine, [*case.questions[:3], case.questions[4]])) < EXACT
    finally:
        engine.close()
