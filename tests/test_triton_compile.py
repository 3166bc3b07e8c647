"""Triton's real code without a GPU: what kernels compile to, and that they compile once.

Every compilation happens in a process of its own, where nothing is interpreted; see
benchmarks/experiments/triton_registers.py for how launches compile for a GPU that is not there.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "experiments" / "triton_registers.py"
TABLE = ROOT / "benchmarks" / "results" / "triton_registers.csv"
ARCHITECTURES = ("80", "90", "100")
# Kernels that read logits, and the dtypes that the table has.
ROW_KERNELS = (
    "token_stats_kernel",
    "token_stats_backward_kernel",
    "contrast_kernel",
    "contrast_backward_kernel",
)
MERGES = ("merge_token_stats_kernel", "merge_contrast_kernel")
# These see no logits: the table has them once, whatever the dtype.
OTHERS = (
    "perception_mask_kernel",
    "loss_kernel",
    "finish_kernel",
    "advantages_and_prune_kernel",
    "prune_completions_kernel",
)


def _python(cache: Path, *arguments: str) -> str:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cache, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _is_good(row: dict[str, str]) -> bool:
    """No spills; rows of logits that lie well are read 16 bytes at a time, but for the target.

    Others are read one by one, but by threads that hold whole lanes: with few registers.
    """
    is_row_kernel = row["kernel"] in ROW_KERNELS and "unaligned" not in row["case"]
    most = 96 if is_row_kernel else 112
    if row["kernel"] not in ROW_KERNELS or row["dtype"] == "fp64":
        most = 255
    wide = int(row["wide_loads"]) > 0 and int(row["two_byte_loads"]) <= 2
    return (
        (wide or not is_row_kernel)
        and int(row["spill_bytes"]) == 0
        and int(row["registers"]) <= most
    )


def test_the_table_is_complete_and_free_of_spills() -> None:
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    assert [row for row in rows if not _is_good(row)] == []
    for arch in ARCHITECTURES:
        found = {(row["kernel"], row["dtype"]) for row in rows if row["arch"] == arch}
        for kernel in (*ROW_KERNELS, *MERGES):
            assert {(kernel, "bf16"), (kernel, "fp32")} <= found, arch
        assert set(OTHERS) <= {kernel for kernel, _ in found}, arch


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_for_every_architecture(arch: str, tmp_path: Path) -> None:
    dtype = {"80": "fp16", "90": "bf16", "100": "fp32"}[arch]
    cases = [
        "advantages",
        *(("stats split", "loss full split") if arch == "90" else ("loss full",)),
    ]
    printed = _python(tmp_path, str(SCRIPT), "--arch", arch, "--dtype", dtype, "--case", *cases)
    rows = list(csv.DictReader(printed.splitlines()))
    assert [row for row in rows if not _is_good(row)] == []
    compiled = {row["kernel"] for row in rows}
    assert {*OTHERS, "contrast_kernel", "contrast_backward_kernel"} <= compiled
    if arch == "90":
        assert {*ROW_KERNELS, *MERGES} <= compiled


COUNT = """
import sys

import torch

sys.path.insert(0, sys.argv[1])
import triton_registers as registers
from cppo.options.trainer import LossConfig
from cppo.triton_kernels import PRIMITIVES


def step(num_rows, cu_seqlens, config):
    temperature = config.temperature
    logits = torch.empty(num_rows + 1, 1024, dtype=torch.bfloat16)[1:]
    targets = torch.zeros(num_rows, dtype=torch.int64)
    mask = torch.ones(num_rows, dtype=torch.bool)
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    logps, entropy, saved = PRIMITIVES["token_stats"](
        logits, targets, mask, targets, temperature, False
    )
    rows = (logits, targets, mask, targets, saved, temperature)
    PRIMITIVES["token_stats_backward"](logps, entropy, *rows)
    selected = PRIMITIVES["perception_mask"](entropy, entropy, config.fraction, mask, cu_seqlens)
    views, places = (logits,) * 3, (targets, None)
    contrasts = PRIMITIVES["contrast"](*views, selected, *places, temperature)
    advantages = torch.ones(len(cu_seqlens) - 1)
    rows = (selected, advantages, logps, None, logps.exp(), logps, mask, cu_seqlens)
    _, _, coefficients = PRIMITIVES["loss_terms"](
        logps, entropy, None, None, contrasts[4], *rows, torch.ones(2).double(), config.text
    )
    rows = (targets, *places, saved, contrasts, coefficients, temperature, False)
    PRIMITIVES["contrast_backward"](*views, *rows)


with registers.Recorder(90) as recorder:
    step(6, [0, 2, 6], LossConfig(divergence="full"))
    first = len(recorder.compiled)
    others = dict(divergence="full", temperature=0.7, fraction=0.1, tau=0.3, clip_low=0.0)
    step(1, [0, 1], LossConfig(**others))
    others |= dict(temperature=1.3, cpl_coef=1.0, entropy_coef=1.0)
    step(16, [0, 16], LossConfig(**others))
    others |= dict(max_length=16, kl_coef=1.0, clip_high=1.0)
    step(32, [0, 1, 1, 17, 32], LossConfig(**others))
    print(first, len(recorder.compiled), recorder.num_launches)
"""


def test_nothing_that_changes_from_step_to_step_is_compiled_in(tmp_path: Path) -> None:
    printed = _python(tmp_path, "-c", COUNT, str(SCRIPT.parent))
    first, after, launches = map(int, printed.split())
    assert 0 < first == after and launches >= 4 * first


def test_no_kernel_is_listed_twice() -> None:
    with TABLE.open() as file:
        keys = Counter(
            (r["kernel"], r["case"], r["dtype"], r["arch"], r["variant"])
            for r in csv.DictReader(file)
        )
    assert max(keys.values()) == 1


_NUMBERS = """
import sys
import cppo.triton_kernels
from triton.runtime.jit import JITFunction
kernels = {k.__name__: k for name, module in sys.modules.items()
           if name.startswith("cppo.triton_kernels.") and not name.endswith("advantages_and_prune")
           for k in vars(module).values() if isinstance(k, JITFunction)
           and k.__name__.endswith("_kernel")}
for name, kernel in kernels.items():
    for p in kernel.params:
        free = p.is_constexpr or p.do_not_specialize or p.annotation_type == "fp64"
        kind = p.is_constexpr or p.name.endswith("_ptr") or p.annotation_type
        if not free or not kind or p.is_constexpr != p.name.isupper():
            print(name, p.name)
print(len(kernels), "kernels")
"""


def test_no_kernel_that_is_found_again_is_specialised_on_a_number(tmp_path: Path) -> None:
    """What `launch` relies on: constants are in capitals, all else is of one type."""
    assert _python(tmp_path, "-c", _NUMBERS).split("\n") == ["7 kernels", ""]
