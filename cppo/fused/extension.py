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
from torch import Tensor

from cppo.config import kept_per_unit
from cppo.fused import pack
from cppo.fused.backend import Backend
from cppo.fused.pack import pack_completions, unpack  # noqa: F401  (this is a namespace)


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


def group_advantages(
    rewards: Tensor, group_size: int, scale: str = "group", eps: float = 1e-4
) -> Tensor:
    return torch.ops.cppo.group_advantages(rewards, group_size, scale, eps)


def _unit(total: int, group_size: int, prune_rate: float, scope: str) -> tuple[int, int]:
    """Size of a pruning unit, and how many of its completions stay."""
    unit_size = total if scope == "batch" and total else group_size
    return unit_size, kept_per_unit(unit_size, prune_rate)


def prune_completions(
    advantages: Tensor,
    group_size: int,
    prune_rate: float,
    scope: str = "group",
    prune: str = "smallest",
    drop_zero: bool = False,
    noise: Tensor | None = None,
) -> Tensor:
    unit_size, keep = _unit(advantages.shape[0], group_size, prune_rate, scope)
    drop_here = drop_zero and advantages.is_cuda
    kept = torch.ops.cppo.prune_completions(
        advantages, unit_size, keep, prune, drop_zero and not drop_here, noise
    )
    return kept[advantages[kept] != 0] if drop_here else kept


def advantages_and_prune(
    rewards: Tensor,
    group_size: int,
    prune_rate: float,
    scale: str = "group",
    eps: float = 1e-4,
    scope: str = "group",
    prune: str = "smallest",
    drop_zero: bool = False,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    unit_size, keep = _unit(rewards.shape[0], group_size, prune_rate, scope)
    drop_here = drop_zero and rewards.is_cuda
    advantages, kept = torch.ops.cppo.advantages_and_prune(
        rewards, group_size, unit_size, keep, scale, eps, prune, drop_zero and not drop_here, noise
    )
    return advantages, kept[advantages[kept] != 0] if drop_here else kept


def plan_microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    return _host.plan_microbatches(lengths, max_tokens)


def balance_ranks(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    return _host.balance_ranks(lengths, world_size)


def _register_fakes() -> None:
    """What torch.compile and opcheck are told about shapes and dtypes."""

    @torch.library.register_fake("cppo::group_advantages")
    def _(rewards, group_size, scale, eps):
        return rewards.new_empty(rewards.shape, dtype=torch.float32)

    def kept_like(x, unit_size, keep, drop_zero):
        if drop_zero:
            num_kept = torch.library.get_ctx().new_dynamic_size()
        else:
            num_kept = x.shape[0] // unit_size * keep
        return x.new_empty(num_kept, dtype=torch.int64)

    @torch.library.register_fake("cppo::prune_completions")
    def _(advantages, unit_size, keep, prune, drop_zero, noise):
        return kept_like(advantages, unit_size, keep, drop_zero)

    @torch.library.register_fake("cppo::advantages_and_prune")
    def _(rewards, group_size, unit_size, keep, scale, eps, prune, drop_zero, noise):
        advantages = rewards.new_empty(rewards.shape, dtype=torch.float32)
        return advantages, kept_like(rewards, unit_size, keep, drop_zero)

    pack.register()


if not missing["cpp"]:
    _register_fakes()
    fused = Backend("cppo")
