"""The one place that chooses which implementation of an op runs.

`reference` is plain PyTorch on any device, `cpp` the compiled extension on the CPU, `cuda` its
CUDA kernels, `triton` the Triton kernels. A backend is a namespace that holds a callable named
like the op, with the positional signature of `cppo.reference`.

Environment: CPPO_BACKEND replaces `backend="auto"` and fails as loudly as an explicit choice.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from torch import Tensor

from cppo import reference
from cppo.fused import extension

_HAS_TRITON = importlib.util.find_spec("triton") is not None

NAMES = ("cuda", "triton", "cpp", "reference")

# Implementations of every op, the fastest first: `auto` takes the first that runs here.
BACKENDS: dict[str, tuple[str, ...]] = {
    "group_advantages": ("cuda", "triton", "cpp", "reference"),
    "prune_completions": ("cuda", "triton", "cpp", "reference"),
    "advantages_and_prune": ("cuda", "triton", "cpp", "reference"),
    "pack_completions": ("cuda", "cpp", "reference"),
    "unpack": ("cuda", "cpp", "reference"),
    "plan_microbatches": ("cpp", "reference"),
    "balance_ranks": ("cpp", "reference"),
    "token_stats": ("triton", "cpp", "reference"),
    "linear_token_stats": ("triton", "cpp", "reference"),
    "perception_mask": ("triton", "cpp", "reference"),
    "cppo_loss": ("triton", "cpp", "reference"),
    "linear_cppo_loss": ("triton", "cpp", "reference"),
}

# The ops that are composed of primitives (`cppo.fused`), the same way for every backend.
FUSED_OPS = (
    *("token_stats", "linear_token_stats", "perception_mask"),
    *("cppo_loss", "linear_cppo_loss"),
)
# Planners see no tensor and take no `backend`: CPPO_BACKEND counts only where they have it.
HOST_OPS = ("plan_microbatches", "balance_ranks")


def why_not(op: str, backend: str, device: str = "cpu") -> str:
    """Why `backend` cannot run `op` on tensors of the device type `device`; '' when it can."""
    if backend not in BACKENDS[op]:
        return "it has no implementation of this op"
    if backend == "reference":
        return ""
    if op in HOST_OPS:
        return extension.missing["host"]
    if backend == "triton":
        return _why_not_triton(device)
    if device != {"cpp": "cpu", "cuda": "cuda"}[backend]:
        return f"tensors are on {device}"
    return extension.missing[backend]


def _why_not_triton(device: str) -> str:
    if not _HAS_TRITON:
        return "triton is not installed"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "tensors are on cpu, where only Triton's interpreter runs (TRITON_INTERPRET=1)"
    return "" if device in ("cpu", "cuda") else f"tensors are on {device}"


def choose(op: str, device: str, backend: str = "auto") -> str:
    """The name of the backend that runs `op` on tensors of the device type `device`.

    Args: as of `pick`. Raises: as `pick` does.
    """
    source = ""
    if backend == "auto":
        backend = os.environ.get("CPPO_BACKEND") or "auto"
        source = " (from CPPO_BACKEND)" if backend != "auto" else ""
        if op in HOST_OPS and backend not in BACKENDS[op] and backend in NAMES:
            backend = "auto"
    if backend != "auto" and backend not in NAMES:
        raise ValueError(
            f"cppo.{op}: backend{source} must be 'auto' or one of {', '.join(NAMES)}, "
            f"got {backend!r}"
        )
    if backend == "auto":
        # In the interpreter Triton shows that a kernel is right; it is never the fastest.
        fast = (name for name in BACKENDS[op] if name != "triton" or device != "cpu")
        return next(name for name in fast if not why_not(op, name, device))
    reason = why_not(op, backend, device)
    if reason:
        raise RuntimeError(f"cppo.{op}: backend {backend!r}{source} cannot run here: {reason}")
    return backend


def pick(op: str, tensor: Tensor | None, backend: str = "auto") -> Any:
    """The namespace whose function `op` runs on the device of `tensor`.

    Args:
        op: a key of BACKENDS.
        tensor: any tensor argument of the call, or None for the planners.
        backend: "auto" (the fastest that runs here) or one of NAMES.
    Returns: a namespace with a callable named `op`, called like `cppo.reference.<op>`.
    Raises: ValueError for an unknown name; RuntimeError if an explicit choice cannot run here.
    """
    backend = choose(op, "cpu" if tensor is None else tensor.device.type, backend)
    if backend == "reference":
        return reference
    module: Any = extension
    if backend == "triton":
        from cppo.fused import triton

        module = triton
    return module.fused if op in FUSED_OPS else module


def with_inplace(implementation: Any, inplace: bool) -> dict[str, bool]:
    """The option of an op that takes it; plain PyTorch has no use for it."""
    return {"inplace": True} if inplace and implementation is not reference else {}


def available(op: str, device: Any = "cpu") -> list[str]:
    """Backends that run `op` here on `device` (a torch.device or its type), fastest first."""
    kind = getattr(device, "type", None) or str(device).split(":")[0]
    runs = [backend for backend in BACKENDS[op] if not why_not(op, backend, kind)]
    if kind == "cpu" and "triton" in runs:
        # Interpreted: it shows that the kernel is right, and is never the fastest.
        runs.remove("triton")
        runs.append("triton")
    return runs


def support_matrix(device: str = "cpu") -> dict[str, dict[str, str]]:
    """{op: {backend: why it does not run on `device`, '' when it does}} over all NAMES."""
    return {op: {name: why_not(op, name, device) for name in NAMES} for op in BACKENDS}
