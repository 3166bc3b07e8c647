"""CPPOGRPOTrainer with a real vLLM in its process, with TRL's defaults. `tests/run_trl_vllm.sh`."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: tests/run_trl_vllm.sh makes an environment")
pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).parent))

import vllm._custom_ops
from peft import LoraConfig
from trl.generation import vllm_generation
from trl_vllm_cases import EXACT, LOOK, LORA, STEPS, differences, logged, run

from cppo.integrations import trl_vllm_mend

COLOCATE = dict(vllm_mode="colocate", vllm_max_model_length=256)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM in fp32, as the model is; and its weights as they are, for TRL to write into."""
    monkeypatch.setattr(vllm._custom_ops, "_supports_onednn", False)
    options = dict(dtype="float32", enforce_eager=True, generation_config="vllm")
    monkeypatch.setattr(vllm_generation, "LLM", functools.partial(vllm_generation.LLM, **options))


@pytest.mark.parametrize("kind", ["text", "images"])
def test_vllm_samples_with_the_weights_of_every_step(kind: str, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    trainer = run(kind, tmp_path, seen=seen, **COLOCATE)
    largest = differences(trainer, kind)
    ratios = [logged(trainer, f"sampling/importance_sampling_ratio/{x}") for x in ("min", "max")]
    assert len(largest) == STEPS and max(largest) < EXACT
    assert all(abs(ratio - 1) < 20 * EXACT for each in ratios for ratio in each)
    assert logged(trainer, "cppo/kept_share") == [0.5] * STEPS
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))
    for rollout in seen:
        mask = rollout["completion_mask"].bool()
        assert len(mask) == 4 and (rollout["importance_sampling_ratio"] > 0).all()
        assert torch.isfinite(rollout["old_per_token_logps"][mask]).all()


@pytest.mark.parametrize("mended", [True, False])
def test_images_that_come_again(
    mended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not mended:
        monkeypatch.setattr(trl_vllm_mend, "mend_features", lambda generation: None)
    trainer = run("images", tmp_path, questions=2, **COLOCATE)
    what = "features of the weights of the step" if mended else "features of older weights"
    first, *later = differences(trainer, f"the same two images in every step, {what}")
    assert first < EXACT and len(later) == STEPS - 1
    assert max(later) < EXACT if mended else min(later) > 100 * EXACT


def test_without_the_mending_vllm_samples_from_another_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trl_vllm_mend, "mend_tokens", lambda llm, token: None)
    trainer = run("images", tmp_path, **COLOCATE)
    assert min(differences(trainer, "images, expanded twice")) > 100 * EXACT


@pytest.mark.parametrize("kind", ["text", "images"])
def test_lora(kind: str, tmp_path: Path) -> None:
    trainer = run(kind, tmp_path, peft_config=LoraConfig(**LORA), **COLOCATE)
    largest = differences(trainer, f"{kind}, LoRA")
    assert len(largest) == STEPS and max(largest) < EXACT


@pytest.mark.parametrize("peft", [None, LORA], ids=["all weights", "LoRA"])
def test_weights_that_are_sent_once(
    peft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the differences would be if the weights of later steps did not reach vLLM."""
    sync, synced = vllm_generation.VLLMGeneration.sync_weights, []

    def once(self: Any) -> None:
        if not synced:
            synced.append(sync(self))

    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", once)
    peft_config = LoraConfig(**peft) if peft else None
    trainer = run("text", tmp_path, peft_config=peft_config, **COLOCATE)
    first, *later = differences(trainer, f"text, weights sent once{', LoRA' if peft else ''}")
    assert first < EXACT < min(later) / 100


def test_two_updates_of_a_rollout(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    trainer = run("text", tmp_path, seen=seen, num_iterations=2, max_steps=2 * STEPS, **COLOCATE)
    largest = differences(trainer, "text, num_iterations=2")
    assert len(largest) == len(seen) == STEPS and max(largest) < EXACT
    assert len(logged(trainer, "grad_norm")) == 2 * STEPS


@pytest.mark.parametrize("kind", ["text", "images"])
def test_early_and_late_pruning_are_the_same_bit_for_bit(kind: str, tmp_path: Path) -> None:
    weights = []
    for name in ("early", "late"):
        (tmp_path / name).mkdir()
        options = dataclasses.replace(LOOK, early=name == "early")
        weights.append(run(kind, tmp_path / name, options, **COLOCATE).model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
