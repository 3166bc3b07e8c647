"""What test_integrations_trl runs on two processes: torchrun tests/trl_two_processes.py FOLDER.

Each process trains on half of the questions; the weights of every case go to FOLDER/<case>.pt.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from trainer_cases import weights_of
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


def run(name: str, processes: int) -> Any:
    """A trainer after its run, on `processes` processes."""
    case = dict(CASES[name])
    size = 8 // processes // case.get("gradient_accumulation_steps", 1)
    backend = "gloo" if processes > 1 else None
    return trained(per_device_train_batch_size=size, ddp_backend=backend, **case)


if __name__ == "__main__":
    for case in CASES.values():
        folder_of(case["family"])  # once there is a process group, only the first one saves
    for name in CASES:
        trainer = run(name, 2)
        assert trainer.accelerator.num_processes == 2
        if name == "vision":
            assert 0.5 in logged(trainer, "cppo/looking_share"), "both processes always look"
        weights = weights_of(trainer.accelerator.unwrap_model(trainer.model))
        for value in weights.values():
            other = value.clone()
            dist.broadcast(other, 0)
            assert torch.equal(other, value), "the processes' weights differ"
        if trainer.accelerator.is_main_process:
            torch.save(weights, Path(sys.argv[1]) / f"{name}.pt")
    dist.destroy_process_group()
