"""What a run was started with: a row of run.jsonl, which outlives the process and its console."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from cppo import __version__


def started(model: nn.Module, processes: int, options: dict[str, Any]) -> dict[str, Any]:
    """Time, command, model, device, versions and options, as JSON can hold them.

    Args:
        model: what is trained.
        processes: how many train it.
        options: what decides the course of the run, data and rewards included.
    """
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]]),
        "model": name or type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": _device(next(model.parameters()).device),
        "processes": processes,
        "versions": {
            "cppo": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "options": options,
    }


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU ({platform.machine()}), {threads} thread{'s' * (threads != 1)}"
    return str(device)
