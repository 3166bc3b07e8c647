"""The compiled extension, loaded if it is there; `missing` remembers why a part is not.

Parts: `cpp` (cppo._C, tensor ops on the CPU), `cuda` (cppo._cuda, their CUDA kernels), `host`
(cppo._host, planners). The module is itself the backend namespace of all three: it holds one
function per op with the positional signature of `cppo.reference`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cppo.fused import pack
from cppo.fused.backend import Backend
from cppo.fused.pack import pack_completions, unpack  # noqa: F401  (this is a namespace)
from cppo.fused.prune import PruneBackend


def _read_build_info() -> dict[str, Any]:
    path = Path(__file__).parents[1] / "build_info.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _load(part: str, module: str) -> str:
    """Imports cppo.<module>; returns why it is not usable, or ''."""
    # A library that an earlier build left behind is not trusted: the record of the last one is.
    reason = build_info.get(part, "the package was not built")
    if reason:
        return str(reason)
    try:
        importlib.import_module(f"cppo.{module}")
    except Exception as error:
        return f"cppo.{module} does not load: {str(error).splitlines()[0]}"
    return ""


def _load_all() -> dict[str, str]:
    reasons = {"cpp": _load("cpp", "_C"), "host": _load("host", "_host")}
    reasons["cuda"] = reasons["cpp"] and f"cppo._C is missing: {reasons['cpp']}"
    if not reasons["cuda"] and torch.version.cuda is None:
        reasons["cuda"] = build_info.get("cuda") or f"torch {torch.__version__} is a CPU build"
    reasons["cuda"] = reasons["cuda"] or _load("cuda", "_cuda")
    return reasons


build_info = _read_build_info()
missing: dict[str, str] = _load_all()
_host: Any = None if missing["host"] else importlib.import_module("cppo._host")


def plan_microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    return _host.plan_microbatches(lengths, max_tokens)


def balance_ranks(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    return _host.balance_ranks(lengths, world_size)


if not missing["cpp"]:
    fused, _prune = Backend("cppo"), PruneBackend("cppo")
    group_advantages = _prune.group_advantages
    prune_completions = _prune.prune_completions
    advantages_and_prune = _prune.advantages_and_prune
    pack.register()
