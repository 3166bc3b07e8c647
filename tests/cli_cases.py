"""What the tests of the command line share: recipes, a run of a few seconds, a captured call."""

from __future__ import annotations

from pathlib import Path

import pytest

from cppo.cli import main

RECIPES = sorted(Path(__file__).parents[1].joinpath("recipes").glob("*.yaml"))
DIGITS, ARITHMETIC, GSM8K = (
    str(RECIPES[0].with_name(f"{name}.yaml"))
    for name in ("digits", "arithmetic", "gsm8k_qwen2.5_1.5b")
)
TINY = (
    "data.train.limit=8 data.eval.limit=2 trainer.output_dir=run trainer.max_steps=2 "
    "trainer.batch_size=2 trainer.group_size=4 trainer.prune_rate=0.5 "
    "trainer.max_completion_tokens=4 trainer.warmup_steps=1 trainer.eval_every=0 "
    "trainer.log_every=1"
).split()


def cppo(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    capsys.readouterr()
    status = main(arguments)
    return status, *capsys.readouterr()
