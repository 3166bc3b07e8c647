"""What test_integrations_trl runs on two processes: torchrun tests/trl_two_processes.py FOLDER.

Each process trains on half of the questions, with DDP and with FSDP2. The weights and metrics of
every case go to FOLDER/<case>-<ddp or fsdp2>.pt.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from trl_cases import CPPO, folder_of, logged, trained

from cppo.config import LossConfig

PRUNED = CPPO(prune_rate=0.5)
LOOKING = dataclasses.replace(PRUNED, loss=LossConfig(cpl_coef=1.0, cpl_reduction="sequence"))
CASES: dict[str, dict[str, Any]] = {
    "dapo": dict(family="text", cppo=PRUNED, loss_type="dapo"),
    # Micro-batches of one row: in some, one process looks at its image and the other does not.
    "vision": dict(
        family="qwen2_5_vl",
        cppo=LOOKING,
        gradient_accumulation_steps=2,
        num_iterations=1,
    ),
}
METRICS = ("cppo/kept_share", "cppo/looking_share", "cppo/cpl_loss")


def run(name: str, processes: int) -> Any:
    """A trainer after its run, on `processes` processes."""
    case = dict(CASES[name])
    size = 8 // processes // case.get("gradient_accumulation_steps", 1)
    backend = "gloo" if processes > 1 else None
    return trained(per_device_train_batch_size=size, ddp_backend=backend, **case)


def use_fsdp2() -> None:
    """What `accelerate launch --use_fsdp` sets; accelerate itself shards on accelerators only."""
    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
    )
    plain = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        weights[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return weights


def save(name: str, kind: str, folder: Path) -> None:
    trainer = run(name, 2)
    assert trainer.accelerator.num_processes == 2
    assert trainer.accelerator.is_fsdp2 == (kind == "fsdp2")
    weights = whole_weights(trainer.accelerator.unwrap_model(trainer.model))
    for value in weights.values():
        other = value.clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, value), "the processes' weights differ"
    if trainer.accelerator.is_main_process:
        metrics = {metric: logged(trainer, metric) for metric in METRICS}
        torch.save({**weights, "metrics": metrics}, folder / f"{name}-{kind}.pt")


if __name__ == "__main__":
    for case in CASES.values():
        folder_of(case["family"])  # once there is a process group, only the first one saves
    for kind in ("ddp", "fsdp2"):
        if kind == "fsdp2":
            use_fsdp2()
        for name in CASES:
            save(name, kind, Path(sys.argv[1]))
    dist.destroy_process_group()
