"""`cppo bench`: every op against the peers that are installed and the machine's limits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from cppo import backends
from cppo.cli.config_file import ConfigError
from cppo.cli.info import default_device, ops_line
from cppo.extras import require_package

if TYPE_CHECKING:
    from cppo.benchmarks import run

_SHAPES = {
    "toy": "that everything runs",
    "small": "a first look, two minutes (default)",
    "paper": "the tables of the README",
    "full": "all sweeps",
}
# What a first look leaves out: torch.compile takes half a minute for each case.
_QUICK = ("eager", "trl", "liger", "verl", "torch", "flash-attn")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the ops; exit status 1 if a result is wrong or slower than a file to compare with."""
    arguments = _parser().parse_args(argv)
    from cppo.benchmarks import report, run

    options = _options(arguments)
    path = _checked_path(arguments, options)
    console = Console(width=None if Console().is_terminal else 120)
    if arguments.plot_only:
        _plot(console, path)
        return 0
    earlier = report.read(arguments.compare) if arguments.compare else []
    line = ops_line(options.device, obey=False)
    console.print(line, soft_wrap=True, markup=False, highlight=False)
    new, wrong = run.bench(options, console)
    run.report_wrong(console, wrong)
    if not new and not wrong:
        console.print("no case to measure: see --op, --match, --dtype and --missing")
    if new and options.writes:
        console.print(f"rows: {path}")
    if arguments.plot and path.exists():
        _plot(console, path)
    lines = report.slower(earlier, new)
    for slow in lines:
        console.print(f"[bold red]slower than in {arguments.compare}:[/] {slow}")
    if arguments.compare and not lines:
        console.print(f"no ratio is more than 15 % below {arguments.compare}")
    return 1 if wrong or lines else 0


def _options(arguments: argparse.Namespace) -> run.Options:
    """What the harness needs of the arguments. Raises: ConfigError."""
    from cppo.benchmarks import peers, run

    device = arguments.device or default_device()
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: torch sees no GPU here")
    against = tuple(arguments.against or ())
    if unknown := set(against) - {*peers.NAMES, "all", "none"}:
        raise ConfigError(
            f"--against: unknown peer {', '.join(sorted(unknown))}; "
            f"choose from {', '.join(peers.NAMES)}, all, none"
        )
    if not against:
        against = _QUICK if arguments.shapes in ("toy", "small") else peers.NAMES
    elif "all" in against:
        against = peers.NAMES
    return run.Options(
        shapes=arguments.shapes,
        ops=tuple(arguments.op or ()),
        backends=tuple(arguments.backend or ()),
        dtypes=tuple(arguments.dtype or ()),
        modes=tuple(arguments.mode or ()),
        match=arguments.match or "",
        against=against,
        device=device,
        output=arguments.output,
        record=arguments.record,
        seconds=arguments.seconds,
        passes=arguments.passes,
        missing_only=arguments.missing,
    )


def _checked_path(arguments: argparse.Namespace, options: run.Options) -> Path:
    """The file of the rows. Raises: ConfigError for files and packages that are not there."""
    from cppo.benchmarks import report

    try:
        if arguments.plot or arguments.plot_only:
            require_package("--plot", "matplotlib", "bench")
        path = options.path
        for option, wanted in (
            ("--compare", arguments.compare),
            ("--plot-only", path if arguments.plot_only else None),
        ):
            if wanted is not None and not wanted.is_file():
                raise ValueError(f"{option}: there is no file {wanted}")
            report.check(wanted or path)
    except (ImportError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return path


def _plot(console: Console, path: Path) -> None:
    from cppo.benchmarks import charts

    for picture in charts.draw(path):
        console.print(f"written: {picture}")


def _parser() -> argparse.ArgumentParser:
    from cppo.benchmarks import environment

    parser = argparse.ArgumentParser(
        prog="cppo bench",
        description="Measure every op against every peer that is installed. Nothing is timed "
        "before its result was compared with fp64.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    shapes = "; ".join(f"{name}: {text}" for name, text in _SHAPES.items())
    add("--shapes", choices=tuple(_SHAPES), default="small", help=shapes)
    add("--op", nargs="+", choices=tuple(backends.BACKENDS), metavar="OP", help="these ops alone")
    add("--match", metavar="TEXT", help="cases whose shape holds this: 'T=512', 'full divergence'")
    add("--backend", nargs="+", choices=backends.NAMES, help="of ours; else the fast ones")
    add("--against", nargs="+", metavar="PEER", help="these peers, or all, or none")
    add("--dtype", nargs="+", choices=("fp32", "bf16"))
    add("--mode", nargs="+", choices=("forward", "both"), help="both: with gradients")
    add("--device", help="cpu, cuda, cuda:1; else a GPU where there is one")
    add("--seconds", type=float, help="timing per variant and mode in a pass")
    add("--passes", type=int, help="over the cases, minutes apart; of paper 12, else 1")
    add("--output", type=Path, help="CSV file; rows of the same case are replaced")
    environment.add_record_option(parser)
    add("--missing", action="store_true", help="only cases without a row in the file: resume")
    add("--compare", type=Path, metavar="CSV", help="fail if a ratio fell by more than 15 %%")
    add("--plot", action="store_true", help="PNG charts and an HTML page (needs matplotlib)")
    add("--plot-only", action="store_true", help="the same from the file, nothing is measured")
    return parser
