"""The command line: `cppo train`, `eval`, `info`, `demo`, `data`, `bench`.

Reading order: command (which command runs, and how its errors are shown), train, evaluate, demo,
info, data, bench (the commands), measures and predictions (of an evaluation), config_file and
run_config (the YAML file), datasets and run_parts (from a configuration to its rows and a trainer),
model_sizes, dry_run.
"""

from cppo.cli.command import main

__all__ = ["main"]
