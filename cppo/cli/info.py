"""`cppo info`: what runs here, what does not and why, and how the extension was built."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cppo import __version__, backends
from cppo.cli.config_file import ConfigError
from cppo.cli.engines import support
from cppo.fused import extension

# Read from the installed metadata: importing triton or transformers only to print a version
# would take seconds.
PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "flash-attn", "math-verify")
PARTS = {
    "cpp": "C++ tensor ops (cppo._C)",
    "cuda": "CUDA kernels (cppo._cuda)",
    "host": "C++ planners (cppo._host)",
}


def default_device() -> str:
    """Return the device of a command that names none: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def ops_line(device: Any, *, obey: bool = True) -> str:
    """Return a line for the start of a run: which backends its ops use on a device, and why.

    Args:
        device: a torch.device or its name.
        obey: whether CPPO_BACKEND counts; `cppo bench` calls each backend by its name.
    Returns: "ops: cpp (avx512) on cpu"; for ops that run in plain PyTorch also the reason.
    Raises: ConfigError for a CPPO_BACKEND that does not exist or cannot run there.
    """
    kind = torch.device(device).type
    forced = obey and os.environ.get("CPPO_BACKEND", "auto") not in ("", "auto")
    chosen: dict[str, list[str]] = {}
    for op in backends.BACKENDS:
        if op in backends.HOST_OPS:
            continue
        try:
            name = backends.choose(op, kind) if forced else backends.available(op, kind)[0]
        except (ValueError, RuntimeError) as error:
            raise ConfigError(str(error)) from error
        chosen.setdefault(name, []).append(op)
    notes = {"cpp": _vectors()}
    if forced:
        notes = dict.fromkeys(chosen, "CPPO_BACKEND")
    elif "reference" in chosen:
        which = "" if len(chosen) == 1 else f"for {', '.join(chosen['reference'])}: "
        notes["reference"] = f"{which}{_why_reference(chosen['reference'], kind)}; see cppo info"
    used = [f"{name} ({notes[name]})" if name in notes else name for name in chosen]
    return f"ops: {', '.join(used)} on {kind}"


def _why_reference(ops: list[str], kind: str) -> str:
    """Why no backend made for a device runs these ops."""
    reasons = []
    for name in {"cpu": ("cpp",), "cuda": ("triton", "cuda")}.get(kind, ()):
        own = [op for op in ops if name in backends.BACKENDS[op]]
        if own:
            missing = "the compiled extension is missing" if name == "cpp" else f"no {name}"
            reasons.append(f"{missing}: {backends.why_not(own[0], name, kind)}")
    return "; ".join(reasons) or f"there are no kernels for {kind}"


def _vectors() -> str:
    """The instruction set of the compiled ops on the CPU; '' without them."""
    return "" if extension.missing["cpp"] else str(torch.ops.cppo.row_capability())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def collect() -> dict[str, Any]:
    """Return everything `cppo info` shows, as plain data: versions, build, devices, engines, ops.

    Returns: a dict that json can write; `ops` is {device: {op: {backend: why not, or ''}}}.
    """
    from cppo.model.forward import choose_attention

    processor = f"{platform.machine()} {_vectors()}".rstrip()
    devices = {"cpu": f"{processor}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        devices["cuda"] = torch.cuda.get_device_name()
    return {
        "versions": {
            "cppo": __version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
            "CUDA of torch": torch.version.cuda or "none (CPU build)",
        },
        "build": {"missing": extension.missing, **extension.build_info},
        "devices": devices,
        "attention": {device: choose_attention("auto", device) for device in devices},
        "engines": support(),
        "ops": {device: backends.support_matrix(device) for device in devices},
    }


def _op_table(device: str, matrix: dict[str, dict[str, str]], notes: list[str]) -> Table:
    """One row per op; a number in a cell refers to a reason, which is appended to `notes`."""
    table = Table(title=f"ops on {device}", title_justify="left")
    table.add_column("op")
    for name in backends.NAMES:
        table.add_column(name, justify="center")
    for op, reasons in matrix.items():
        automatic = backends.available(op, device)[0]
        cells = []
        for name in backends.NAMES:
            if name not in backends.BACKENDS[op]:
                cells.append("")
            elif not reasons[name]:
                cells.append("auto" if name == automatic else "yes")
            else:
                note = f"{name}: {reasons[name]}"
                if note not in notes:
                    notes.append(note)
                cells.append(f"({notes.index(note) + 1})")
        table.add_row(op, *cells)
    return table


def _fact_table(title: str, facts: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, escape(value))
    return table


def render(facts: dict[str, Any], console: Console) -> None:
    """Print what `collect` returned as tables."""
    notes: list[str] = []
    for device, matrix in facts["ops"].items():
        console.print(_op_table(device, matrix, notes))
    console.print("auto: what backend='auto' takes; yes: runs too; empty: no such implementation")
    for number, note in enumerate(notes, 1):
        console.print(f"({number}) {note}", highlight=False, markup=False)
    build = facts["build"]
    built = {title: build["missing"][part] or "loaded" for part, title in PARTS.items()}
    compiler = build.get("compiler") or "none"
    built["compiler"] = f"{compiler}; {build['nvcc']}" if build.get("nvcc") else compiler
    built["built against"] = f"torch {build.get('torch') or 'none'} (stable ABI of 2.11)"
    if build.get("cuda_archs"):
        built["CUDA architectures"] = " ".join(build["cuda_archs"])
    console.print(_fact_table("extension", built))
    used = {device: f"{name}" for device, name in facts["attention"].items()}
    console.print(_fact_table("attention of the trainer", used))
    console.print(_fact_table("engines of rollouts", facts["engines"]))
    console.print(_fact_table("devices", facts["devices"]))
    console.print(_fact_table("versions", facts["versions"]))


def _model_info(path: str, as_json: bool) -> int:
    from cppo.cli.model_info import model_facts
    from cppo.cli.run_parts import load_named, run_of
    from cppo.model.load import quiet

    try:
        with quiet():
            facts = model_facts(*load_named(path, run_of(path)))
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    if as_json:
        _print_json(facts)
    else:
        _console().print(_fact_table("how the trainer runs it", facts))
    return 0


def _print_json(facts: dict[str, Any]) -> None:
    json.dump(facts, sys.stdout, indent=1)
    print()


def _console() -> Console:
    # A pipe has no width of its own; long reasons should not wrap at 80 columns there.
    return Console(width=None if sys.stdout.isatty() else 110)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `cppo info [MODEL] [--json]`; return the exit status."""
    parser = argparse.ArgumentParser(prog="cppo info", description=__doc__)
    parser.add_argument("model", nargs="?", help="a model or a run: how the trainer would run it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args(argv)
    if arguments.model is not None:
        return _model_info(arguments.model, arguments.json)
    facts = collect()
    if arguments.json:
        _print_json(facts)
    else:
        render(facts, _console())
    return 0
