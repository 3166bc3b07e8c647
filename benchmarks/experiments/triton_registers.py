"""Compiles every Triton kernel for GPUs that are not here; prints or writes what each one takes.

The real launchers run on tiny tensors on the CPU, with a driver that only names an architecture,
and every launch is a warm-up: what is compiled is what a GPU would run, with the same
specialisation. Registers and stack (spills) are read off the machine code.

    python benchmarks/experiments/triton_registers.py --write    # ./cppo-bench
    python benchmarks/experiments/triton_registers.py --arch 90 --dtype bf16 --case loss
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cppo.benchmarks import report
from cppo.benchmarks.environment import experiment_parser, results_folder
from cppo.fused import triton as ops
from cppo.options.trainer import LossConfig
from cppo.records import Views
from cppo.triton_kernels import PRIMITIVES, launch

ARCHITECTURES = (80, 90, 100)
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
VOCABULARY = 151_936


class NoDriver:
    """A driver for a GPU that is not there: enough to compile, nothing to launch."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        # What is compiled is kept per device.
        return int(self._target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


class KeepsNothing(dict[Any, Any]):
    """In place of the launched kernels: the next launch is a warm-up too."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class Recorder:
    """Collects the kernels that launches compile; `with` it, launches are warm-ups."""

    def __init__(self, arch: int) -> None:
        self.compiled: list[tuple[str, Any]] = []
        self.num_launches = 0
        self._arch = arch

    def __enter__(self) -> Recorder:
        driver.set_active(NoDriver(self._arch))
        recorder, run = self, JITFunction.run

        def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            del warmup
            recorder.num_launches += 1
            known = {
                id(kernel) for cache in self.device_caches.values() for kernel in cache[0].values()
            }
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            if id(kernel) not in known:
                prefix = "merge_" if kwargs.get("STEP") == "merge" else ""
                recorder.compiled.append((prefix + self.__name__.lstrip("_"), kernel))
            return kernel

        # Attributes of Triton, checked with 3.6 and 3.9, and of our launcher; `patch` raises where
        # one has moved, and tests/test_triton_compile.py where it means something else.
        self._replaced = contextlib.ExitStack()
        self._replaced.enter_context(patch.object(JITFunction, "run", warm_up))
        self._replaced.enter_context(patch.object(launch, "_compiled", KeepsNothing()))
        return self

    def __exit__(self, *error: object) -> None:
        self._replaced.close()


# The calls that a GPU would see


def _logits(dtype: torch.dtype, *shape: int) -> Tensor:
    # Never written, so it costs no memory.
    return torch.empty(*shape, dtype=dtype)


def _token_stats(dtype: torch.dtype, vocabulary: int = VOCABULARY, masked: bool = True) -> None:
    logits, targets = _logits(dtype, 2, 3, vocabulary), torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.ones(2, 3, dtype=torch.bool) if masked else None
    logps, entropy, saved = PRIMITIVES["token_stats"](logits, targets, mask, None, 1.0, False)
    rows = (logits, targets, mask, None, saved, 1.0)
    PRIMITIVES["token_stats_backward"](logps, entropy, *rows)


def _split(call: Callable[..., None]) -> Callable[..., None]:
    """The call on a GPU of so many multiprocessors that rows are split."""

    def split_call(dtype: torch.dtype) -> None:
        with patch.object(launch, "multiprocessors", lambda device: 132):
            call(dtype)

    return split_call


def _unaligned(dtype: torch.dtype) -> None:
    _token_stats(dtype, vocabulary=50_257, masked=False)


def _padded_rows(dtype: torch.dtype) -> None:
    """Unaligned, but rows start at multiples of 16 bytes: as the tiles of the fused head."""
    logits, targets = _logits(dtype, 6, 50_264)[:, :50_257], torch.zeros(6, dtype=torch.int64)
    logps, entropy, saved = PRIMITIVES["token_stats"](logits, targets, None, None, 1.0, False)
    rows = (logits, targets, None, None, saved, 1.0)
    PRIMITIVES["token_stats_backward_"](logps, entropy, *rows)


def _perception_mask(dtype: torch.dtype) -> None:
    entropy = torch.zeros(6, dtype=dtype)
    mask = torch.ones(6, dtype=torch.bool)
    PRIMITIVES["perception_mask"](entropy, entropy, 0.5, mask, torch.tensor([0, 2, 6]))


def _loss(
    dtype: torch.dtype,
    config: LossConfig,
    views: int = 3,
    packed: bool = True,
    vocabulary: int = VOCABULARY,
    weighted: bool = False,
) -> None:
    shape = (6, vocabulary) if packed else (2, 3, vocabulary)
    anchor = _logits(dtype, *shape).requires_grad_()
    # Compact: the rows of the completion with A > 0 alone.
    other = anchor[:4] if packed and config.gating else anchor
    rows = torch.zeros(shape[:-1])
    cu_seqlens = torch.tensor([0, 4, 6], dtype=torch.int32) if packed else None
    mask = None if packed else torch.ones(2, 3, dtype=torch.bool)
    out = ops.fused.cppo_loss(
        Views(anchor, *((other, other) if views == 3 else (None, None))),
        rows.long(),
        torch.tensor([1.0, -1.0]),
        old_logps=rows,
        ref_logps=rows,
        token_weights=rows if weighted else None,
        mask=mask,
        cu_seqlens=cu_seqlens,
        config=config,
    )
    torch.autograd.grad(out.loss, anchor)


def _padded_loss(dtype: torch.dtype) -> None:
    config = LossConfig(reduction="dapo", importance="sequence", cpl_reduction="sequence")
    _loss(dtype, config, packed=False, weighted=True)


def _full_loss(dtype: torch.dtype, vocabulary: int = VOCABULARY) -> None:
    config = LossConfig(divergence="full", dual_clip=3.0)
    _loss(dtype, config, vocabulary=vocabulary, weighted=True)


def _advantages(dtype: torch.dtype) -> None:
    rewards = torch.zeros(4096, dtype=dtype)
    ops.advantages_and_prune(rewards, 16, 0.5)
    random: dict[str, Any] = {"scope": "batch", "prune": "random", "noise": rewards.float()}
    ops.advantages_and_prune(rewards, 16, 0.5, "batch", **random)
    for prune in ("variance", "unbiased"):
        more: dict[str, Any] = {"prune": prune, "noise": rewards.float()}
        ops.advantages_and_prune(rewards, 16, 0.5, **more)
        ops.prune_completions(rewards.float(), 16, 0.5, **more, rewards=rewards)
    ops.prune_completions(rewards, 16, 0.5, prune="largest")


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "stats": _token_stats,
    "stats split": _split(_token_stats),
    "stats unaligned": _unaligned,
    "stats unaligned padded": _padded_rows,
    "mask": _perception_mask,
    "loss": lambda dtype: _loss(dtype, LossConfig()),
    "loss anchor": lambda dtype: _loss(dtype, LossConfig(), views=1),
    "loss padded": _padded_loss,
    "loss full": _full_loss,
    "loss full unaligned": lambda dtype: _full_loss(dtype, 50_257),
    "loss full split": _split(_full_loss),
    "advantages": _advantages,
}


# What the machine code says


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def measure(kernel: Any) -> dict[str, int]:
    """Registers, bytes of stack and shared memory, loads of 16 and of 2 bytes of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def ask(*command: str) -> str:
            return subprocess.run(
                [*command, file.name], capture_output=True, text=True, check=True
            ).stdout

        usage = ask(_tool("cuobjdump"), "-res-usage")
        code = ask(_tool("nvdisasm"))
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1]
    return {
        "registers": int(registers),
        "spill_bytes": int(stack),
        "shared_bytes": kernel.metadata.shared,
        "wide_loads": len(re.findall(r"\bLDG\.E[\w.]*\.128", code)),
        "two_byte_loads": len(re.findall(r"\bLDG\.E\.U16\b", code)),
    }


def compile_case(case: str, dtype: str, arch: int) -> Iterator[dict[str, Any]]:
    """One row of the table for every kernel that the case launches."""
    with Recorder(arch) as recorder:
        CASES[case](DTYPES[dtype])
    seen: Counter[str] = Counter()
    for name, kernel in recorder.compiled:
        # The same kernel with other optional inputs is another variant.
        seen[name] += 1
        yield {
            "kernel": name,
            "case": case,
            "variant": seen[name],
            "dtype": dtype,
            "arch": arch,
            **measure(kernel),
            "triton": triton.__version__,
        }


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("triton_registers: TRITON_INTERPRET=1 interprets, it compiles nothing")
    parser = experiment_parser(__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", default=("bf16", "fp32"), choices=DTYPES)
    parser.add_argument("--case", nargs="+", default=tuple(CASES), choices=CASES)
    parser.add_argument("--write", action="store_true", help="a file, not to the terminal")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for arch in options.arch:
        for dtype in options.dtype:
            for case in options.case:
                rows += compile_case(case, dtype, arch)
    if options.write or options.record:
        report.write(results_folder(options.record) / "triton_registers.csv", rows)
        return
    writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main()
