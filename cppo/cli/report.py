"""`cppo report RUN [RUN ...]`: the page of a run made anew, or several runs side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cppo.cli.config_file import ConfigError


def parser() -> argparse.ArgumentParser:
    """The arguments of `cppo report`."""
    found = argparse.ArgumentParser(prog="cppo report", description=__doc__)
    found.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    found.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the page (report.html in the run's folder; of several runs ./comparison.html)",
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run `cppo report`; return the exit status."""
    asked = parser().parse_args(argv)
    try:
        print(_write(asked.runs, asked.output))
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        raise ConfigError(f"{name}{error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return 0


def _write(runs: list[str], output: Path | None) -> Path:
    from cppo.report import write_comparison, write_report
    from cppo.report.page import is_ours

    twice = [run for i, run in enumerate(runs) if Path(run).resolve() in map(_resolved, runs[:i])]
    if twice:
        raise ConfigError(f"{twice[0]} is given twice")
    if output is None and len(runs) > 1:
        output = Path("comparison.html")
    if output is not None and not is_ours(output):
        raise ConfigError(f"--output: {output} is not a page of cppo report: choose another name")
    if len(runs) == 1:
        return write_report(runs[0], path=output)
    return write_comparison(runs, output or Path("comparison.html"))


def _resolved(run: str) -> Path:
    return Path(run).resolve()
