"""What test_integrations_trl runs on two processes: torchrun tests/trl_two_processes.py FOLDER.

Each process trains on half of the questions, with DDP, FSDP2 and, where DeepSpeed is installed,
ZeRO-3. The weights and metrics of every case go to FOLDER/<case>-<kind>.pt.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from trainer_cases import assert_same_everywhere
from trl_cases import CPPO, folder_of, logged, trained

from cppo.integrations.trl import check, patch_trl
from cppo.options.trainer import LossConfig

PRUNED = CPPO(prune_rate=0.5)
LOOKING = dataclasses.replace(PRUNED, loss=LossConfig(cpl_coef=1.0, cpl_reduction="sequence"))
CASES: dict[str, dict[str, Any]] = {
    "dapo": dict(family="text", cppo=PRUNED, loss_type="dapo"),
    # Micro-batches of one row: in some, one process looks at its image and the other does not.
    "vision": dict(
        family="qwen2_5_vl", cppo=LOOKING, gradient_accumulation_steps=2, num_iterations=1
    ),
    "packed": dict(
        family="qwen2_5_vl",
        cppo=dataclasses.replace(LOOKING, share_prompts=True),
        gradient_accumulation_steps=2,
        num_iterations=1,
    ),
}
if check()[-1].fits:  # older TRL cannot train InternVL
    CASES["pictures"] = CASES["vision"] | dict(family="internvl")
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
KINDS = ("ddp", "fsdp2", "zero3") if HAS_DEEPSPEED else ("ddp", "fsdp2")
ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    **dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    ),
}
METRICS = ("cppo/kept_share", "cppo/gated_share", "cppo/cpl_loss")


def run(name: str, processes: int, **options: Any) -> Any:
    """A trainer after its run, on `processes` processes."""
    case = dict(CASES[name])
    size = 8 // processes // case.get("gradient_accumulation_steps", 1)
    backend = "gloo" if processes > 1 else None
    return trained(per_device_train_batch_size=size, ddp_backend=backend, **case, **options)


@contextmanager
def fsdp2() -> Iterator[None]:
    """What `accelerate launch --use_fsdp` sets; accelerate itself shards on accelerators only."""
    plain = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    variables = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    with patch.dict(os.environ, variables), patch.object(PartialState, "__init__", init):
        yield


def whole_weights(model: torch.nn.Module, kind: str) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parameter in model.named_parameters():
        if kind == "zero3":
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
        else:
            value = parameter.detach()
            weights[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return weights


def save(name: str, kind: str, folder: Path) -> None:
    trainer = run(name, 2, **({"deepspeed": ZERO3} if kind == "zero3" else {}))
    assert trainer.accelerator.num_processes == 2
    assert trainer.accelerator.is_fsdp2 == (kind == "fsdp2")
    assert trainer.is_deepspeed_enabled == (kind == "zero3")
    weights = whole_weights(trainer.accelerator.unwrap_model(trainer.model), kind)
    assert_same_everywhere(weights)
    if trainer.accelerator.is_main_process:
        metrics = {metric: logged(trainer, metric) for metric in METRICS}
        torch.save({**weights, "metrics": metrics}, folder / f"{name}-{kind}.pt")


if __name__ == "__main__":
    for case in CASES.values():
        folder_of(case["family"])  # once there is a process group, only the first one saves
    for kind in KINDS:
        with fsdp2() if kind == "fsdp2" else nullcontext():
            # First: once a ZeRO-3 config was made, models are loaded in shards, and not packed.
            save("packed", kind, Path(sys.argv[1]))
            save("vision", kind, Path(sys.argv[1]))
            if "pictures" in CASES:
                save("pictures", kind, Path(sys.argv[1]))
            # A head in shards goes through our kernel too.
            undo = patch_trl("reference") if kind != "ddp" and check()[-1].fits else lambda: None
            save("dapo", kind, Path(sys.argv[1]))
            undo()
    dist.destroy_process_group()
