"""How many completions can be decoded at once."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cppo.model.attention import head_sizes
from cppo.model.wrappers import unwrap

# Of the free memory; the rest is for what the layers compute.
_SHARE = 0.5
_UNKNOWN = 4 << 30  # where the system does not say
# Per element of a row's logits: themselves, in fp32, divided, their softmax.
_LOGIT_BYTES = 16


def rows_that_fit(model: nn.Module, width: int) -> int:
    """Completions whose keys and values fit into half of the memory that is free, at least 1.

    Args:
        width: tokens of a row, prompt and completion.
    """
    base = unwrap(model)
    parameter = next(base.parameters())
    free = free_memory(parameter.device)
    config = base.config.get_text_config()
    cached = width * token_bytes(config, _compute_dtype(parameter))
    return max(1, int(_SHARE * free / (cached + _logits(config))))


def _logits(config: Any) -> int:
    return _LOGIT_BYTES * int(config.vocab_size)


def _compute_dtype(like: torch.Tensor) -> torch.dtype:
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Of a token's keys and values in all layers.

    Args:
        config: of the text model.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(config.num_hidden_layers * heads * sum(head_sizes(config)) * dtype.itemsize)


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still have; caches of files and of PyTorch count as free.

    On a CPU the processes of a machine share what is free.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min([_free_of_machine(), *_free_of_container()]) // processes


def _free_of_machine() -> int:
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _UNKNOWN


def _free_of_container(folder: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What a limit on this process's group leaves; nothing without a limit."""
    limit, used, kinds = (folder / f"memory.{name}" for name in ("max", "current", "stat"))
    if not (limit.exists() and used.exists()) or not limit.read_text().strip().isdigit():
        return []
    lines = kinds.read_text().splitlines() if kinds.exists() else []
    # Copies of files count as used, and make room for whoever needs it.
    files = sum(int(line.split()[1]) for line in lines if re.match("(in)?active_file ", line))
    return [max(0, int(limit.read_text()) - max(0, int(used.read_text()) - files))]
