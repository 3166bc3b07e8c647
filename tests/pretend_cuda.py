"""A GPU that is pretended on the CPU: its tensors say that they are on "cuda:0".

Each has its values on the CPU, and every operation on it computes them there, so code that reads
values goes on as on a GPU. An operation that mixes it with a tensor of the CPU raises, where CUDA
would: that, and what runs on CUDA alone, is what no test on a CPU sees.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from cppo.fused import backend, schema
from cppo.model import check, double_precision

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
# What takes tensors of both devices: copies, and an index of the host into a tensor on the GPU.
_MAY_MIX = {aten.copy_.default, aten.index.Tensor}
_INDEX_PUT = {aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class OnGPU(Tensor):
    """A tensor "on the GPU"; `host` has its values."""

    host: Tensor
    device = torch.device("cuda", 0)  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]
    is_cpu = False  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor) -> OnGPU:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device="cpu",
        )
        made.host = host.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGPU({self.host!r})"

    def get_device(self) -> int:
        return 0

    @property  # type: ignore[override]
    def data(self) -> OnGPU:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, new: OnGPU) -> None:
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.host = new.host

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.host.__reduce_ex__(protocol)

    def __tensor_flatten__(self) -> Any:
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> OnGPU:
        return OnGPU(inner["host"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (composed := _composed().get(func._schema.name)) is not None:
            with _Devices():
                return composed(*args)
        _check_devices(func, args, kwargs)
        compute = _ONLY_ON_CUDA.get(func, func)
        host_args, host_kwargs = tree_map_only(OnGPU, lambda x: x.host, (args, kwargs))
        found = compute(*host_args, **host_kwargs)
        leaves, spec = tree_flatten(found)
        wrapped = [OnGPU(x) if isinstance(x, Tensor) else x for x in leaves]
        result = tree_unflatten(wrapped, spec)
        return return_and_correct_aliasing(func, args, kwargs, result)


def _check_devices(func: Any, args: Any, kwargs: Any) -> None:
    leaves = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    if func in _INDEX_PUT and isinstance(args[0], OnGPU):
        # What autograd makes of zeros is made in C++, by the device that it sees there.
        leaves = [args[2]] if func is not aten.index_put.default else []
    if func in _MAY_MIX and isinstance(args[0], OnGPU) or func is aten.copy_.default:
        return
    # A number of the host goes with a tensor on the GPU, not the other way round.
    wrong = [x for x in leaves if not isinstance(x, OnGPU) and x.ndim]
    if wrong:
        shapes = [(tuple(x.shape), "cuda" if isinstance(x, OnGPU) else "cpu") for x in leaves]
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, got {shapes}")


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`mm` with an `out_dtype`, which CUDA alone has."""
    if a.dtype != b.dtype or not (a.dtype in HALF and dtype in (torch.float32, a.dtype)):
        raise RuntimeError(f"mm: {a.dtype} x {b.dtype} has no result in {dtype}")
    found = a.float() @ b.float()
    return found.to(dtype) if out is None else out.copy_(found)


def _sum_product(
    total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor, **kwargs: Any
) -> Tensor:
    if total.dtype != dtype:
        raise RuntimeError(f"addmm: a sum in {total.dtype} has no result in {dtype}")
    return out.copy_(total + _product(a, b, dtype))


_ONLY_ON_CUDA: dict[Any, Any] = {
    aten.mm.dtype: _product,
    aten.mm.dtype_out: _product,
    aten.addmm.dtype_out: _sum_product,
}


@functools.cache
def _composed() -> dict[str, Any]:
    """The fused ops that Python composes: they are run as they are, not as one operation."""
    if find_spec("triton") is None:
        return {}
    from cppo.fused import triton  # noqa: F401

    kernels = SimpleNamespace(
        **{op: getattr(torch.ops.cppo_triton, op).default for op in schema.PRIMITIVES}
    )
    return {f"cppo_triton::{op}": run for op, run in backend._compositions(kernels).items()}


class _Moved(torch.autograd.Function):
    """To the GPU and back, with gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.host.clone() if isinstance(x, OnGPU) else OnGPU(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.host.clone() if isinstance(gradient, OnGPU) else OnGPU(gradient.clone())


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _moved(x: Tensor, to_gpu: bool) -> Tensor:
    return x if isinstance(x, OnGPU) == to_gpu else _Moved.apply(x)


class _Devices(TorchFunctionMode):
    """Makes what is asked for on "cuda", and moves tensors there and back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        kwargs.pop("pin_memory", None)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is Tensor.cpu:
            return _moved(args[0], False)
        if func is Tensor.cuda:
            return _moved(args[0], True)
        if func in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], OnGPU):
            if func is Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            return args[0].host.tolist()
        if func is Tensor.backward:  # what runs within it is not seen by a mode that is running
            with self:
                kwargs["grad_tensors"] = kwargs.pop("gradient", None)
                return torch.autograd.backward(*args, **kwargs)
        if name == "pad_sequence":  # it makes its result in C++, by the device that it sees there
            with torch._C.DisableTorchFunction():
                host = tree_map_only(OnGPU, lambda x: x.host, (args, kwargs))
                return OnGPU(func(*host[0], **host[1]))
        if func is torch.tensor:  # of numbers that are on the GPU
            args = tree_map_only(OnGPU, lambda x: x.host.tolist(), args)
        device = kwargs.get("device")
        if _is_cuda(device) and not name.startswith("__"):
            del kwargs["device"]
            found = func(*args, **kwargs)
            return _moved(found.detach(), True) if not isinstance(found, OnGPU) else found
        found = func(*args, **kwargs)
        if name == "new_tensor" and isinstance(args[0], OnGPU):
            return _moved(found, device is None)
        if device is not None and isinstance(found, OnGPU):  # `new_zeros(..., device="cpu")`
            return _moved(found, False)
        return found

    def _to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        for given in args:
            if isinstance(given, Tensor):
                device, dtype = given.device, given.dtype
            elif isinstance(given, torch.dtype):
                dtype = given
            elif isinstance(given, (str, torch.device)):
                device = given
        copy = kwargs.get("copy", False)
        moved = x if device is None else _moved(x, _is_cuda(device))
        return (
            moved
            if dtype is None and not copy
            else torch.ops.aten.to.dtype(moved, dtype or moved.dtype, False, copy)
        )


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")


class _Event:
    def __init__(self, device: Any = None, *, enable_timing: bool = False) -> None:
        assert device is None or _is_cuda(device)
        self.at = 0.0

    def record(self, stream: Any) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


@contextlib.contextmanager
def pretended() -> Iterator[torch.device]:
    """Within it "cuda" is a device."""
    enabled, of_autocast = torch.is_autocast_enabled, torch.get_autocast_dtype
    fork = torch.random.fork_rng
    changed = {
        "Generator": _Generator,
        "Event": _Event,
        "autocast": _Autocast,
        "is_autocast_enabled": lambda kind="cpu": enabled("cpu"),
        "get_autocast_dtype": lambda kind: of_autocast("cpu"),
    }
    of_cuda = {
        "memory_reserved": lambda device: 0,
        "memory_allocated": lambda device: 0,
        "mem_get_info": lambda device: (1 << 30, 1 << 30),
        "get_device_name": lambda device: "pretended",
        "get_device_capability": lambda device: (9, 0),
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
    }
    with contextlib.ExitStack() as stack:
        plain = (*double_precision.PLAIN, OnGPU)
        for module in (double_precision, check):
            stack.enter_context(patch.object(module, "PLAIN", plain))
        for name, value in changed.items():
            stack.enter_context(patch.object(torch, name, value))
        for name, value in of_cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(
            patch.object(torch.random, "fork_rng", lambda *_, **__: fork(devices=[]))
        )
        stack.enter_context(patch.object(torch.accelerator, "current_stream", lambda device: None))
        stack.enter_context(_Devices())
        yield torch.device("cuda")
