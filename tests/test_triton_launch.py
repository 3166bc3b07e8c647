"""How kernels are launched: what was compiled is found again, and only where it fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from cppo.triton_kernels import rows


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
    monkeypatch.setattr(rows, "_compiled", {})
    return Kernel()


def _launch(kernel: Kernel, programs: int = 3, num_warps: int = 4, **changed: Any) -> None:
    given = {"x_ptr": torch.zeros(2), "mask_ptr": None, "length": 5, "scale": 0.5, "BLOCK": 64}
    rows.launch(kernel, programs, num_warps, **{**given, **changed})


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


@pytest.mark.parametrize("vocabulary", [1, 2048, 8192, 8193, 151_936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_pieces_of_a_gradient_cover_the_row_once(dtype: torch.dtype, vocabulary: int) -> None:
    shape = rows.launch_shape("gradient", torch.empty(0, dtype=dtype))
    split = rows.split_for_writing(vocabulary, shape)
    assert split.chunk % shape.size == 0
    assert (split.splits - 1) * split.chunk < vocabulary <= split.splits * split.chunk
    assert split.chunk * dtype.itemsize == 16 << 10
