"""Trains small runs, some undisturbed and some killed again and again; test_checkpoint compares.

python tests/killed_runs.py FOLDER: FOLDER/<case>/whole and FOLDER/<case>/killed, and the kills that
happened in FOLDER/kills.json. Every attempt is a process of its own, forked off after the imports
and before any tensor was computed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (what an attempt would import, once for all of them)
import torch._dynamo  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401
from trainer_cases import trainer_for

import cppo.checkpoint
from cppo.config import LoraConfig
from cppo.demo.digits import DigitSums
from cppo.progress import read_metrics
from cppo.rewards import completion_text

STEPS = 6
CASES: dict[str, dict[str, Any]] = {
    "text": {"num_iterations": 2, "lr_scheduler": "linear", "keep_checkpoints": 1},
    "vision": {"family": "qwen2_5_vl", "prune_rate": 0.5, "cpl_coef": 0.5},
    "lora": {"lora": LoraConfig(r=2, alpha=4), "kl_coef": 0.1},
}


def noise(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that depends on the completion alone and differs within groups."""
    return [random.Random(completion_text(text)).random() for text in completions]


def train(folder: Path, case: str) -> None:
    """One attempt: goes on from the last checkpoint, if there is one."""
    options = {"rewards": noise, "max_steps": STEPS, "save_every": 1, **CASES[case]}
    trainer_for(folder, **options).train(resume_from="auto")


def start(folder: Path, case: str, before: Callable[[], None] = lambda: None) -> int:
    """Forks an attempt off; returns its process id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        before()
        train(folder, case)
        os._exit(0)
    finally:
        os._exit(1)


def finish(process: int) -> str:
    """How an attempt ended: "killed" or "finished"."""
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    if status:
        raise SystemExit(f"an attempt failed with status {status}")
    return "finished"


def rows_in(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def kill_from_outside(folder: Path, case: str, rows: int, delay: float) -> str:
    """Kills an attempt `delay` seconds after its metrics have `rows` rows."""
    process = start(folder, case)
    while rows_in(folder) < rows:
        time.sleep(0.002)
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    return finish(process)


def kill_while_writing(folder: Path, case: str, flushes: int) -> str:
    """Kills an attempt while it writes a checkpoint: at its n-th flush to disk."""

    def arm() -> None:
        left = iter(range(flushes))
        stock = cppo.checkpoint._flush

        def flush(path: Path) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            stock(path)

        cppo.checkpoint._flush = flush

    return finish(start(folder, case, arm))


def main(root: Path) -> None:
    DigitSums("train", 1)[0]  # loads the scans, for all attempts
    rng = random.Random(0)
    kills = {}
    for case in CASES:
        whole, killed = root / case / "whole", root / case / "killed"
        if finish(start(whole, case)) != "finished":
            raise SystemExit("the undisturbed run was killed")
        # The shortest, so that two steps before the end an attempt is killed before it is done.
        per_step = min(row["time/step"] for row in read_metrics(whole))
        ends = [
            kill_from_outside(killed, case, rows, rng.uniform(0, per_step)) for rows in (1, 2, 4)
        ]
        ends += [kill_while_writing(killed, case, rng.randrange(12)) for _ in range(2)]
        kills[case] = ends
        if finish(start(killed, case)) != "finished":
            raise SystemExit("the last attempt was killed")
    (root / "kills.json").write_text(json.dumps(kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
