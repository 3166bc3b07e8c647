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
sys.path.insert(0, str(Path(__file__).parents[1]))

import vllm._custom_ops
from datasets import Dataset
from trl import GRPOConfig
from trl.generation import vllm_generation

from cppo.config import LossConfig
from cppo.demo.arithmetic import ArithmeticProblems
from cppo.demo.digits import DigitSums
from cppo.demo.warmup import CHECKPOINTS
from cppo.integrations import trl_vllm
from cppo.integrations.trl import CPPO, CPPOGRPOTrainer
from cppo.model.load import load_model, load_processor

EXACT = 1e-4  # nats, in fp32
STEPS = 4


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM in fp32, as the model is; and its weights as they are, for TRL to write into."""
    monkeypatch.setattr(vllm._custom_ops, "_supports_onednn", False)
    options = dict(dtype="float32", enforce_eager=True, generation_config="vllm")
    monkeypatch.setattr(vllm_generation, "LLM", functools.partial(vllm_generation.LLM, **options))


def folder_of(kind: str, folder: Path) -> Path:
    """A demo's checkpoint, with the settings of videos that vLLM asks for."""
    source = CHECKPOINTS / {"text": "arithmetic", "images": "digits"}[kind]
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    load_processor(source).save_pretrained(folder)
    return folder


def length(completions: list[Any], **columns: Any) -> list[float]:
    texts = [messages[0]["content"] for messages in completions]
    return [len(text) + len({*text}) / 7 for text in texts]


def run(kind: str, folder: Path, cppo: CPPO, seen: list[dict[str, Any]]) -> Any:
    class Watched(CPPOGRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            seen.append(super()._generate_and_score_completions(inputs))
            return seen[-1]

    rows: Any = ArithmeticProblems("train", 16) if kind == "text" else DigitSums("train", 16)
    names = [name for name in ("prompt", "images") if name in rows[0]]
    rows = [{name: row[name] for name in names} for row in (rows[i] for i in range(16))]
    if kind == "text":
        rows = [{"prompt": [{"role": "user", "content": str(row["prompt"])}]} for row in rows]
    path = folder_of(kind, folder)
    trainer = Watched(
        model=load_model(path),
        processing_class=load_processor(path),
        reward_funcs=length,
        args=GRPOConfig(
            output_dir=str(folder / "out"),
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            max_steps=STEPS,
            learning_rate=1e-3,
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=12,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=256,
        ),
        train_dataset=Dataset.from_list(rows),
        cppo=cppo,
    )
    trainer.train()
    return trainer


LOOK = CPPO(prune_rate=0.5, loss=LossConfig(cpl_coef=0.02))


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.mark.parametrize("kind", ["text", "images"])
def test_vllm_samples_with_the_weights_of_every_step(kind: str, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    trainer = run(kind, tmp_path, LOOK, seen)
    differences = logged(trainer, "sampling/sampling_logp_difference/max")
    ratios = [logged(trainer, f"sampling/importance_sampling_ratio/{x}") for x in ("min", "max")]
    print(f"{kind}: largest differences {differences}, ratios {ratios}")
    assert len(differences) == STEPS and max(differences) < EXACT
    assert all(abs(ratio - 1) < 20 * EXACT for each in ratios for ratio in each)
    assert logged(trainer, "cppo/kept_share") == [0.5] * STEPS
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))
    for rollout in seen:
        mask = rollout["completion_mask"].bool()
        assert len(mask) == 4 and (rollout["importance_sampling_ratio"] > 0).all()
        assert torch.isfinite(rollout["old_per_token_logps"][mask]).all()


def test_without_the_mending_vllm_samples_from_another_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trl_vllm, "mend_image_tokens", lambda trainer: None)
    trainer = run("images", tmp_path, LOOK, [])
    differences = logged(trainer, "sampling/sampling_logp_difference/max")
    print(f"images, expanded twice: largest differences {differences}")
    assert min(differences) > 100 * EXACT


def test_early_and_late_pruning_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    weights = []
    for name in ("early", "late"):
        (tmp_path / name).mkdir()
        options = dataclasses.replace(LOOK, early=name == "early")
        weights.append(run("text", tmp_path / name, options, []).model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
