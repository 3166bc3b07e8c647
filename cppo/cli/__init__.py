"""The command line: `cppo train`, `cppo eval`, `cppo info`, `cppo demo`, `cppo bench`.

Reading order: command (which command runs, and how its errors are shown), train, evaluate, demo,
info, bench (the commands), config_file and run_config (the YAML file), run_parts (from a
configuration to a trainer), dry_run.
"""

from cppo.cli.command import main

__all__ = ["main"]
