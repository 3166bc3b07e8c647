"""`cppo inspect MODEL --image x.png --question "..."`: what a model looks at, on one page."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cppo.cli.config_file import ConfigError, build
from cppo.options.trainer import CPPOConfig

if TYPE_CHECKING:
    from cppo.inspection import Answer


def parser() -> argparse.ArgumentParser:
    """The arguments of `cppo inspect`."""
    found = argparse.ArgumentParser(prog="cppo inspect", description=__doc__)
    found.add_argument("model", help="a folder, a run, a hub name, or tiny_digits")
    found.add_argument("--image", nargs="+", required=True, metavar="FILE", help="in their order")
    found.add_argument("--question", required=True)
    found.add_argument("--answer", help="look at this answer, instead of sampling")
    found.add_argument("--samples", type=int, default=1, help="answers to sample (1)")
    found.add_argument("--greedy", action="store_true", help="the most probable answer")
    found.add_argument("--temperature", type=float, default=1.0, help="of the samples (1.0)")
    found.add_argument("--fraction", type=float, default=None, help="of LossConfig (0.5)")
    found.add_argument("--max-tokens", type=int, default=None, help="of an answer (256)")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument(
        "--output",
        default="inspect.html",
        metavar="FILE",
        help="the page, or with .json the numbers (inspect.html)",
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run `cppo inspect`; return the exit status."""
    asked = parser().parse_args(argv)
    try:
        answers, path = _inspected(asked)
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        raise ConfigError(str(error)) from error
    print("\n".join(answers))
    print(f"{path}: the image in three views, and each token's entropy shift")
    return 0


def _inspected(asked: argparse.Namespace) -> tuple[list[str], Path]:
    from cppo.cli.run_parts import load_named, run_of
    from cppo.inspection import inspect
    from cppo.model.load import quiet
    from cppo.questions import load_image

    run = run_of(asked.model)  # its views, its chat template, its limit of an answer
    config = CPPOConfig() if run is None else build(CPPOConfig, run[0].get("trainer", {}))
    if asked.fraction is not None:
        loss = dataclasses.replace(config.loss, fraction=asked.fraction)
        config = dataclasses.replace(config, loss=loss)
    if asked.max_tokens is not None:
        config = dataclasses.replace(config, max_completion_tokens=asked.max_tokens)
    images = [load_image(file, "--image: ") for file in asked.image]
    with quiet():
        _, model, processor = load_named(asked.model, run)
    found = inspect(
        model,
        processor,
        images,
        asked.question,
        answer=asked.answer,
        samples=asked.samples,
        temperature=None if asked.greedy else asked.temperature,
        seed=asked.seed,
        config=config,
    )
    return [_line(number, own) for number, own in enumerate(found.answers)], found.save(
        asked.output
    )


def _line(number: int, answer: Answer) -> str:
    words, share = " ".join(answer.text.split()), 100 * answer.perception_share
    return f"{number + 1}. {words}  ({share:.0f} % perception tokens)"
