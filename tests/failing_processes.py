"""One process of a run on two, with something wrong: test_failing_processes starts both.

python tests/failing_processes.py FOLDER PART, with the variables of torch.distributed set. What a
process ended with is FOLDER/rank<rank>.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from trainer_cases import noise, text_rows, tiny, trainer_for, weights_of

from cppo.train.trainer import CPPOTrainer

RANK = int(os.environ["RANK"])


def other_checkpoint(folder: Path) -> CPPOTrainer:
    """Each process has a disk of its own, with another checkpoint or with none at the same path."""
    os.chdir(folder / f"disk{RANK}")
    return trainer_for(Path("run"), rewards=noise, max_steps=3)


def other_rows(folder: Path) -> CPPOTrainer:
    return trainer_for(folder / "run", rewards=noise, rows=text_rows(6 + RANK), max_steps=1)


def other_held_out(folder: Path) -> CPPOTrainer:
    eval_rows = text_rows(2) if RANK == 0 else None
    return trainer_for(folder / "run", rewards=noise, eval_rows=eval_rows, max_steps=1)


def no_held_out(folder: Path) -> CPPOTrainer:
    eval_rows = text_rows(2) if RANK == 1 else None
    return trainer_for(folder / "run", rewards=noise, eval_rows=eval_rows, max_steps=1)


def other_model(folder: Path) -> CPPOTrainer:
    trainer = trainer_for(folder / "run", rewards=noise, max_steps=1)
    if RANK == 1:
        trainer.parameters[0].requires_grad_(False)
    return trainer


def other_weights(folder: Path) -> CPPOTrainer:
    trainer = trainer_for(folder / "run", rewards=noise, max_steps=1)
    with torch.no_grad():
        for p in trainer.parameters:
            p.add_(RANK)
    return trainer


def other_models(folder: Path) -> CPPOTrainer:
    """As of a model that each process has made at random."""
    model, _ = tiny("text", seed=RANK)
    options = dict(model=model, kl_coef=0.1, num_iterations=2)
    return trainer_for(folder / "run", rewards=noise, max_steps=1, **options)


def misbehaving(folder: Path, what: Any) -> CPPOTrainer:
    calls = []

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 2 and RANK == 1:
            what()
        return noise(completions)

    return trainer_for(folder / "run", rewards=reward, max_steps=3, save_every=1, process_timeout=6)


def frozen(folder: Path) -> CPPOTrainer:
    return misbehaving(folder, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def dead(folder: Path) -> CPPOTrainer:
    return misbehaving(folder, lambda: os._exit(3))


def slow(folder: Path) -> CPPOTrainer:
    return misbehaving(folder, lambda: time.sleep(20))


def slow_but_in_time(folder: Path) -> CPPOTrainer:
    return misbehaving(folder, lambda: time.sleep(2))


def full_disk(folder: Path) -> CPPOTrainer:
    """The last checkpoint cannot be written: every process hears of it."""
    trainer = trainer_for(folder / "run", rewards=noise, max_steps=1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    trainer.model.save_pretrained = fail
    return trainer


def full_for_a_while(folder: Path) -> CPPOTrainer:
    """The first checkpoint cannot be written, the next one can."""
    trainer = trainer_for(folder / "run", rewards=noise, max_steps=3, save_every=1)
    stock, calls = trainer.model.save_pretrained, []

    def fail_once(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        stock(*args, **kwargs)

    trainer.model.save_pretrained = fail_once
    return trainer


def main(folder: Path, part: str) -> None:
    started, told = time.monotonic(), {}
    try:
        trainer = globals()[part](folder)
        trainer.train(resume_from="auto" if part == "other_checkpoint" else None)
        models = {"sum": trainer.model, "reference": trainer.reference}
        for name, model in models.items():
            if model is not None:
                told[name] = sum(v.double().sum().item() for v in weights_of(model).values())
    except Exception as error:
        told["error"] = f"{type(error).__name__}: {error}"
    told["seconds"] = time.monotonic() - started
    (folder / f"rank{RANK}.json").write_text(json.dumps(told))
    os._exit(0)  # leaving a group whose other member is gone takes its own time


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
