"""The trainer's steps where every tensor is on a GPU: a pretended one (`pretend_cuda`)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_cuda import OnGPU, pretended
from trainer_cases import noise, text_rows, trainer_for

from cppo import CPPOConfig, LoraConfig
from cppo.benchmarks.experiments import decoding, shared_prompts, small_models
from cppo.fused.head import Head
from cppo.model.double_precision import DoublePrecision
from cppo.train import trainer as trainer_module
from cppo.train import weights
from cppo.train.processes import accelerator_for


class _Accelerator:
    """accelerate's, on the GPU."""

    device = torch.device("cuda")

    def __init__(self, plain: Any) -> None:
        self._plain = plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)


def _save_model(model: Any, processor: Any, folder: Path) -> None:
    """safetensors reads memory, which a pretended tensor has not."""
    own = {name: value.host for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=own)
    weights.save_processor(processor, folder)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setenv("CPPO_BACKEND", "reference")
    monkeypatch.setattr(
        trainer_module, "accelerator_for", lambda config: _Accelerator(accelerator_for(config))
    )
    monkeypatch.setattr(weights, "save_model", _save_model)
    with pretended() as device:
        yield device


def test_a_tensor_of_the_cpu_does_not_go_with_one_of_the_gpu(gpu: torch.device) -> None:
    there = torch.arange(3, device=gpu)
    assert there.device.type == "cuda" and (there + 1).tolist() == [1, 2, 3]
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.arange(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_of_a_gpu_computes_in_double_precision(
    gpu: torch.device, dtype: torch.dtype
) -> None:
    """The comparison of `cppo.model.check` needs it, and trains nothing frozen in bf16 without."""
    hidden, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(37, 8).to(dtype)
    with torch.no_grad(), DoublePrecision():
        found = Head(weight.to(gpu)).logits(hidden.to(gpu))
    torch.testing.assert_close(found.cpu(), hidden @ weight.double().T, rtol=1e-12, atol=1e-12)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": (
        "text",
        {"share_prompts": True, "prune": "unbiased", "prune_rate": 0.5, "eval_rows": text_rows(1)},
    ),
    "adapters": (
        "text",
        {
            "precision": "bf16",
            "attention": "sdpa",
            "lora": LoraConfig(r=2, dropout=0.1),
            "kl_coef": 0.1,
            "num_iterations": 2,
            "importance_correction": "token_truncate",
        },
    ),
    "images": (
        "qwen2_5_vl",
        {"precision": "bf16", "attention": "sdpa", "freeze_vision_tower": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_mixes_no_devices(case: str, gpu: torch.device, tmp_path: Path) -> None:
    family, options = CASES[case]
    sizes = {"batch_size": 4, "max_completion_tokens": 4, "max_steps": 1, "rewards": noise}
    trainer = trainer_for(tmp_path, family, **sizes, **options)
    row = trainer.train()
    assert all(isinstance(p, OnGPU) for p in trainer.model.parameters())
    assert row["grad_norm"] > 0 and row["time/rollout"] > 0 and trainer.policy.ways.packed


def test_the_experiments_that_take_a_device(gpu: torch.device) -> None:
    model = small_models.load("small", 64, gpu.type)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    setting = small_models.Setting(model, CPPOConfig(), optimizer, gpu.type)
    options = Namespace(model="small", vocabulary=64, device=gpu.type, repetitions=1)
    assert shared_prompts.measure(setting, (8, 4, 2), options)["tokens_packed"] > 0
    options = Namespace(model="arithmetic", name="", engine="cppo", device=gpu.type)
    vars(options).update(prompts=1, group=2, tokens=2, repetitions=1)
    assert decoding.measure(options, "bf16")["tokens"] > 0
