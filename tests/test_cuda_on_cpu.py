"""The CUDA kernels of packing and pruning, run on the CPU by an emulation of blocks and barriers.

The kernels themselves are compiled by nvcc in test_packaging and run on a GPU in
test_pack_completions and test_backends; here their arithmetic is held to the reference where there
is neither.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cppo import reference
from cppo.fused.prune import Pruning
from cppo.options.trainer import PRUNES, SCALES, SCOPES, kept_per_unit

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++") or shutil.which("c++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

P, I, L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
MAX_COLUMNS = 48


class Column(ctypes.Structure):
    _fields_ = [("from_", P), ("to", P), ("bytes", I)]


class Columns(ctypes.Structure):
    _fields_ = [("column", Column * MAX_COLUMNS), ("count", I)]


class Mask(ctypes.Structure):
    _fields_ = [("data", P), ("bytes", I)]


class Masks(ctypes.Structure):
    _fields_ = [("attention", Mask), ("completion", Mask), ("kept", P)] + [
        (name, L) for name in ("num_completions", "length", "num_kept")
    ]


class Streams(ctypes.Structure):
    _fields_ = [
        (name, P)
        for name in (
            "cu_seqlens",
            "row_cu_seqlens",
            "position_ids",
            "rows",
            "token_index",
            "target_index",
        )
    ] + [("input_ids", Column)]


class PruneArgs(ctypes.Structure):
    _fields_ = [
        *((name, P) for name in ("rewards", "given", "score", "advantages")),
        *((name, P) for name in ("ranked", "rank", "kept")),
        *((name, L) for name in ("total", "group_size", "unit_size", "keep")),
        ("eps", ctypes.c_double),
        ("scale", I),
        ("prune", I),
    ]


# In the order of csrc/prune_rules.h.
RULES = ("smallest", "largest", "score", "variance", "unbiased")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    source = ROOT / "tests" / "cuda_on_cpu.cpp"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run([str(COMPILER), *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def columns_of(pairs: list[tuple[Tensor, Tensor]]) -> Columns:
    columns = Columns(count=len(pairs))
    for i, (source, out) in enumerate(pairs):
        columns.column[i] = Column(source.data_ptr(), out.data_ptr(), source.element_size())
    return columns


def filled(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Memory whose content shows if it is left as it is."""
    return torch.full(size, 77).to(dtype)


CASES = [
    ((5, 70), torch.bool, 64),
    ((3, 200), torch.int32, 96),
    ((40, 3), torch.bool, 32),
    ((2, 0), torch.int64, 32),
    ((4, 33), torch.int64, 64),
]


@pytest.mark.parametrize(("shape", "mask_dtype", "threads"), CASES)
def test_emulated_kernels_equal_the_reference(
    kernels: ctypes.CDLL, shape: tuple[int, int], mask_dtype: torch.dtype, threads: int
) -> None:
    num_completions, length = shape
    attention = (torch.rand(shape) < 0.7).to(mask_dtype)  # holes everywhere
    attention[0] = 0
    completion = (torch.rand(shape) < 0.5).to(mask_dtype)
    kept = torch.randperm(num_completions)[: max(1, num_completions - 1)]
    dtypes = [torch.bool, torch.bfloat16, torch.float32, torch.float64, torch.complex128]
    along = [torch.randn(shape).to(dtype) for dtype in dtypes]
    ids = torch.randint(0, 99, shape, dtype=torch.int32)
    expected = reference.pack_completions(ids, attention, completion, kept, along)

    masks = Masks(
        Mask(attention.data_ptr(), attention.element_size()),
        Mask(completion.data_ptr(), completion.element_size()),
        kept.data_ptr(),
        num_completions,
        length,
        len(kept),
    )
    cu = [filled(len(kept) + 1, dtype=torch.int32) for _ in range(2)]
    orphans, sizes = filled(len(kept), dtype=torch.uint8), filled(4)
    pointers = [P(x.data_ptr()) for x in (*cu, orphans, sizes)]
    kernels.sizes(threads, ctypes.byref(masks), *pointers)
    assert torch.equal(cu[0], expected[2]) and torch.equal(cu[1], expected[5])
    num_tokens, num_rows = len(expected[0]), len(expected[3])
    assert sizes.tolist() == [num_tokens, num_rows, *expected[9:]]

    positions, token_index = filled(num_tokens), filled(num_tokens)
    rows, target_index = filled(num_rows), filled(num_rows)
    packed_ids, targets = (filled(n, dtype=torch.int32) for n in (num_tokens, num_rows))
    gathered = [filled(num_rows, dtype=dtype) for dtype in dtypes]
    streams = Streams(
        *(x.data_ptr() for x in (*cu, positions, rows, token_index, target_index)),
        Column(ids.data_ptr(), packed_ids.data_ptr(), 4),
    )
    columns = columns_of(list(zip([ids, *along], [targets, *gathered], strict=True)))
    kernels.pack(threads, ctypes.byref(masks), ctypes.byref(streams), ctypes.byref(columns))
    ours = (packed_ids, positions, cu[0], rows, targets, cu[1], token_index, target_index)
    for one, other in zip([*ours, *gathered], [*expected[:8], *expected[8]], strict=True):
        assert torch.equal(one, other)

    # Back again, and from there once more; two blocks share the rows.
    placed = [torch.zeros(shape, dtype=dtype) for dtype in dtypes]
    again = [filled(num_rows, dtype=dtype) for dtype in dtypes]
    index = P(target_index.data_ptr())
    sizes_of = (L(num_rows), L(num_completions * length))
    there = columns_of(list(zip(gathered, placed, strict=True)))
    back = columns_of(list(zip(placed, again, strict=True)))
    kernels.move(True, 2, threads, index, *sizes_of, ctypes.byref(there))
    kernels.move(False, 2, threads, index, *sizes_of, ctypes.byref(back))
    for one, other in zip(placed, reference.unpack(expected[8], expected[7], *shape), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(one, other) for one, other in zip(again, gathered, strict=True))


def test_emulated_lengths_that_are_too_small_write_nothing_past_the_streams(
    kernels: ctypes.CDLL,
) -> None:
    ids = torch.arange(8).view(2, 4)
    mask = torch.ones(2, 4, dtype=torch.bool)
    kept = torch.tensor([0, 9])  # of which the second is no row
    masks = Masks(Mask(mask.data_ptr(), 1), Mask(mask.data_ptr(), 1), kept.data_ptr(), 2, 4, 2)
    cu = [torch.tensor([0, 3, 3]).int(), torch.tensor([0, 1, 1]).int()]
    outputs = [filled(6) for _ in range(6)]
    positions, rows, token_index, target_index, packed_ids, targets = outputs
    streams = Streams(
        *(x.data_ptr() for x in (*cu, positions, rows, token_index, target_index)),
        Column(ids.data_ptr(), packed_ids.data_ptr(), 8),
    )
    columns = columns_of([(ids, targets)])
    kernels.pack(32, ctypes.byref(masks), ctypes.byref(streams), ctypes.byref(columns))
    assert positions.tolist() == [0, 1, 2, 77, 77, 77]
    assert targets.tolist() == [1, 77, 77, 77, 77, 77]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("prune", PRUNES)
@pytest.mark.parametrize("group_size", [1, 5, 40])
def test_emulated_pruning_equals_the_reference(
    kernels: ctypes.CDLL, group_size: int, prune: str, scale: str, scope: str
) -> None:
    total = 2 * group_size
    rewards = torch.randint(0, 4, (total,)).double() / 3
    given = {"noise": torch.rand(total).double(), "lengths": torch.randint(0, 9, (total,))}
    pruning = Pruning(group_size, 0.6, scope, prune, rewards=rewards, **given)
    unit_size, keep = pruning.unit(total)
    rule, score = pruning.rule
    options = (scale, 1e-4, scope, prune)
    expected = reference.advantages_and_prune(rewards, group_size, 0.6, *options, **given)

    advantages, kept = filled(total, dtype=torch.float32), filled(total // unit_size * keep)
    ranked, rank = filled(total, dtype=torch.float64), filled(total, dtype=torch.int32)
    again = filled(len(kept))
    exact = expected[0].double()
    where = {"score": score, "ranked": ranked, "rank": rank}
    sizes = {"total": total, "group_size": group_size, "unit_size": unit_size, "keep": keep}
    for tensors in (
        {"rewards": rewards, "advantages": advantages, "kept": kept},
        {"given": exact, "kept": again},
    ):
        pointers = {k: v.data_ptr() for k, v in {**where, **tensors}.items() if v is not None}
        # In the order of csrc/prune_rules.h.
        scales = {"group": 0, "batch": 1, "none": 2}
        args = PruneArgs(**pointers, **sizes, eps=1e-4, scale=scales[scale])
        args.prune = RULES.index(rule)
        kernels.prune(32, ctypes.byref(args))
    torch.testing.assert_close(advantages, expected[0], rtol=2e-7, atol=1e-12)
    assert torch.equal(kept, expected[1]) and torch.equal(again, expected[1])
    assert len(kept) == total // unit_size * kept_per_unit(unit_size, 0.6)
