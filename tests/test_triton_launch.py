"""How kernels are launched: what was compiled is found again, and only where it fits."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from cppo.triton_kernels import PRUNE, launch


class Compiled:
    """What Triton returns from a launch; remembers how it is launched itself."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launches.append((grid, arguments))


class Kernel:
    """A kernel whose compilations are counted."""

    arg_names = ["x_ptr", "mask_ptr", "length", "scale", "BLOCK"]

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**arguments: Any) -> Compiled:
            assert set(arguments) == {*self.arg_names, "num_warps"}
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launch, "_compiled", {})
    return Kernel()


def _launch(kernel: Kernel, programs: int = 3, num_warps: int = 4, **changed: Any) -> None:
    given = {"x_ptr": torch.zeros(2), "mask_ptr": None, "length": 5, "scale": 0.5, "BLOCK": 64}
    launch.launch(kernel, programs, num_warps, **{**given, **changed})


def test_a_second_launch_finds_what_was_compiled_and_keeps_the_order(kernel: Kernel) -> None:
    x = torch.ones(7)
    _launch(kernel)
    _launch(kernel, programs=9, x_ptr=x, length=6, scale=2.0)
    assert len(kernel.compiled) == 1
    assert kernel.compiled[0].launches == [((9, 1, 1), (x, None, 6, 2.0, 64))]


@pytest.mark.parametrize(
    "changed",
    [
        {"x_ptr": torch.zeros(2, dtype=torch.bfloat16)},
        {"mask_ptr": torch.zeros(2, dtype=torch.uint8)},
        {"BLOCK": 128},
        {"num_warps": 8},
        {"x_ptr": None, "mask_ptr": torch.zeros(2)},
    ],
    ids=["dtype", "given", "constant", "warps", "which"],
)
def test_what_is_compiled_in_is_compiled_anew(kernel: Kernel, changed: dict[str, Any]) -> None:
    _launch(kernel)
    _launch(kernel, **changed)
    _launch(kernel, **changed)
    assert [len(compiled.launches) for compiled in kernel.compiled] == [0, 1]


def test_another_kernel_is_another(kernel: Kernel) -> None:
    other = Kernel()
    _launch(kernel)
    _launch(other)
    assert len(kernel.compiled) == len(other.compiled) == 1


LAUNCH_TWICE = """
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from cppo.triton_kernels import PRIMITIVES, launch


class Driver:
    # Compiles for a GPU that is not there, and notes what it would be told to launch.
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
        load_binary=lambda *code: ("module", "function", 1, 0, 1024),
        unload_module=lambda module: None,
    )
    launches = []

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return "stream"

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        return lambda *arguments: self.launches.append(arguments)


driver.set_active(Driver())
logits, targets = torch.zeros(9, 8), torch.zeros(9, dtype=torch.int64)
for temperature in (0.5, 2.0):
    PRIMITIVES["token_stats"](logits, targets, None, None, temperature, False)
by_triton, by_us = Driver.launches
assert len(launch._compiled) == 1
assert by_us[:6] == by_triton[:6] and by_us[:5] == (9, 1, 1, "stream", "function")
names = next(iter(launch._compiled.values())).src.fn.arg_names
assert len(by_us) == len(by_triton) == 9 + len(names)
for name, ours, theirs in zip(names, by_us[9:], by_triton[9:]):
    if name in ("scale", "inverse_temperature"):
        assert ours == theirs / 4, name
    elif name in ("logits_ptr", "targets_ptr"):
        assert ours is not None and ours.data_ptr() == theirs.data_ptr(), name
    elif not name.endswith("_ptr"):
        assert ours == theirs, name
print("the same")
"""
CHECKED = "3.6, 3.7, 3.8 and 3.9"


def test_triton_is_told_the_same_by_a_compiled_kernel(tmp_path: Any) -> None:
    """`launch` calls what `kernel[grid](...)` returns, with the kernel's arguments in order.

    Triton's tutorial on softmax does so, but no page promises it.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH_TWICE], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "the same\n", (
        f"an interface of Triton has moved that cppo.triton_kernels.launch was checked with in "
        f"Triton {CHECKED}: {done.stderr}"
    )


@pytest.mark.parametrize("vocabulary", [1, 2048, 8192, 8193, 151_936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_pieces_of_a_gradient_cover_the_row_once(dtype: torch.dtype, vocabulary: int) -> None:
    shape = launch.launch_shape("token_stats_backward", torch.empty(0, dtype=dtype))
    split = launch.split_for_writing(vocabulary, shape)
    assert split.chunk % shape.size == 0
    assert (split.splits - 1) * split.chunk < vocabulary <= split.splits * split.chunk
    assert split.chunk * dtype.itemsize == 16 << 10


class OnSecondGpu(torch.Tensor):
    """Says that it is where no tensor can be here."""

    is_cuda = True
    device = torch.device("cuda:1")


@pytest.mark.parametrize("name", ["group_advantages", "prune_completions", "advantages_and_prune"])
def test_advantages_and_prune_launches_where_its_tensors_are(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[torch.device] = []

    class Enough(Exception):
        pass

    def enter(device: torch.device) -> None:
        entered.append(device)
        raise Enough

    monkeypatch.setattr(torch.cuda, "device", enter)
    with pytest.raises(Enough):
        PRUNE[name](torch.zeros(4).as_subclass(OnSecondGpu), 2, 2, 1)
    assert entered == [torch.device("cuda:1")]
