"""`cppo train`: train the model of a configuration file."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cppo.cli.config_file import ConfigError
from cppo.cli.run_config import CONFIG_NAME, dump, load

if TYPE_CHECKING:
    from cppo.train.output_dir import Claim
    from cppo.train.trainer import CPPOTrainer


def main(options: argparse.Namespace) -> int:
    """Train the model of a configuration file; key=value sets single options over it."""
    resume, overrides = options.resume, list(options.overrides)
    if resume and "=" in resume and not Path(resume).exists():  # an override, no checkpoint
        resume, overrides = "auto", [*overrides, resume]
    config = load(options.config, overrides)
    if options.dry_run:
        from cppo.cli import dry_run

        print(dry_run.report(config))
        return 0
    from cppo.cli.datasets import overlap
    from cppo.cli.engines import engine_words
    from cppo.cli.info import ops_line
    from cppo.cli.run_parts import make_trainer

    output_dir = Path(config.trainer.output_dir)
    quoted = shlex.quote(str(output_dir))
    claim = claim_folder(
        output_dir,
        resume,
        overwrite=options.overwrite,
        needed=config.model.path,
        ways="go on with --resume, start anew with --overwrite, or choose another "
        "trainer.output_dir",
    )
    trainer = make_trainer(config)
    trainer.files[CONFIG_NAME] = dump(config)
    is_main = trainer.processes.is_main
    if is_main:
        print(ops_line(trainer.accelerator.device))
        if config.trainer.engine != "builtin":
            print(f"rollouts: {engine_words(config.trainer)}")
        if words := overlap(config.data):
            print(words)
        if {"tensorboard", "all"} & set(config.trainer.trackers):
            print(f"curves: tensorboard --logdir {quoted}")
    try:
        run_trainer(trainer, claim.start, overwrite=options.overwrite)
    finally:
        trainer.engine.close()
    if is_main:
        print(f"report: {output_dir / 'report.html'}; next: cppo eval {quoted}")
    return 0


def claim_folder(
    folder: Path | str, resume: Any, *, overwrite: bool, needed: Any, ways: str
) -> Claim:
    """Ask `claim_output_dir` whether a run may write into its folder.

    Args:
        needed: a path that the run reads, if it reads one, and that must not be removed.
    Raises: ConfigError if it may not.
    """
    from cppo.train.output_dir import claim_output_dir

    try:
        return claim_output_dir(
            folder,
            resume,
            overwrite=overwrite,
            needed=[needed] if needed else [],
            writes_config=True,
            ways=ways,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def run_trainer(trainer: CPPOTrainer, resume_from: Any, *, overwrite: bool) -> None:
    """Train, and say of whatever stops the run where to go on.

    Raises: ConfigError for what one of our own checks refused; KeyboardInterrupt with the newest
        checkpoint in its words.
    """
    from cppo.cli.run_parts import in_keys
    from cppo.rollouts.engine import EngineError
    from cppo.train.checkpoint import last_checkpoint
    from cppo.train.processes import ProcessError
    from cppo.train.scoring import RewardError

    checks = EngineError, FloatingPointError, ProcessError, RewardError, ValueError, TypeError
    try:
        trainer.train(resume_from=resume_from, overwrite=overwrite)
    except KeyboardInterrupt as stopped:
        newest = last_checkpoint(trainer.config.output_dir)
        words = str(stopped) or f"the newest checkpoint is {newest or 'none'}"
        raise KeyboardInterrupt(f"{words}; go on with --resume") from None
    except checks as error:
        if not str(error).startswith("cppo"):
            raise  # not one of our checks: a defect, whose traceback is wanted
        newest = last_checkpoint(trainer.config.output_dir)
        words = in_keys(str(error))
        raise ConfigError(f"{words}\n  last checkpoint: {newest or 'none'}") from error
