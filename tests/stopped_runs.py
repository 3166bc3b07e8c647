"""Stops small runs at many moments, and compares what comes out with the undisturbed run.

    python tests/stopped_runs.py FOLDER [--moments 20] [--cases text vision ...] [--processes 1 2]

An attempt is forked off after the imports, gets a signal at a random moment, every other time while
a checkpoint is written, and the next one goes on. When a run has come to its end, its
weights, optimizer, metrics and completions must be those of the undisturbed one, bit for bit, and
no piece of work may have been done twice but those that a signal broke off (SIGKILL: what came
after the last checkpoint). Then the run begins anew, until there were as many moments.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (what an attempt would import, once for all of them)
import torch
import torch._dynamo  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401
from trainer_cases import noise, text_rows, trainer_for

import cppo.train.checkpoint
import cppo.train.sealed
from cppo.demo.digits import DigitSums
from cppo.options.trainer import LoraConfig
from cppo.train.checkpoint import check_files, last_checkpoint, read_state
from cppo.train.journal import Journal
from cppo.train.progress import read_metrics

STEPS = 4
# Several batches of completions, micro-batches and optimizer steps in each step.
_PIECES = {
    "num_iterations": 2,
    "optimizer_steps": 2,
    "generation_batch_size": 4,
    "max_tokens_per_microbatch": 64,
    "lr_scheduler": "linear",
    "kl_coef": 0.1,
}
CASES: dict[str, dict[str, Any]] = {
    "text": {**_PIECES, "eval_every": 2},
    "vision": {**_PIECES, "family": "qwen2_5_vl", "prune_rate": 0.5, "cpl_coef": 0.5},
    "lora": {**_PIECES, "lora": LoraConfig(r=2, alpha=4, dropout=0.1)},
}
SIGNALS = ("SIGTERM", "SIGINT", "SIGKILL")


def train(folder: Path, case: str, resume: bool) -> None:
    options = {"rewards": noise, "max_steps": STEPS, "save_every": 1, **CASES[case]}
    if "eval_every" in options:
        options["eval_rows"] = text_rows(2)
    pieces = open(folder / f"pieces{os.environ.get('RANK', 0)}", "a", buffering=1)
    stock = Journal.once

    def once(journal: Journal, call: Any) -> Any:
        """Notes every piece that is done, after it is."""
        was_known = journal.is_replaying
        value = stock(journal, lambda: (pieces.write("begun\n"), call())[1])
        if not was_known:
            pieces.write(f"{journal.step}\n")
        return value

    Journal.once = once  # type: ignore[method-assign]
    trainer_for(folder / "run", **options).train(resume_from="auto" if resume else None)


def attempt(folder: Path, case: str, processes: int, arm: Any = lambda rank: None) -> list[int]:
    """Forks an attempt off; returns its process ids."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    sys.stdout.flush()
    started = []
    for rank in range(processes):
        process = os.fork()
        if process:
            started.append(process)
            continue
        code = 1
        try:
            with open(folder / f"said{rank}", "a") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            if processes > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                )  # fmt: skip
            arm(rank)
            train(folder, case, resume=True)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return started


def ends(started: list[int]) -> list[int]:
    """Exit statuses; minus the signal for a process that one has ended."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]


def pieces_done(folder: Path) -> int:
    return sum(f.read_text().count("begun") for f in folder.glob("pieces*"))


def is_over(started: list[int]) -> bool:
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return any(os.waitid(os.P_PID, process, flags) for process in started)


def stop_at(folder: Path, case: str, processes: int, name: str, rng: random.Random) -> list[int]:
    """One attempt that gets a signal while it writes, or after a random piece of work."""
    before = pieces_done(folder)
    if rng.random() < 0.5:
        flushes = rng.randrange(1, 25)
        return ends(attempt(folder, case, processes, lambda rank: arm_flush(flushes, name)))
    started = attempt(folder, case, processes)
    after = before + rng.randrange(40) * processes
    while pieces_done(folder) < after and not is_over(started):
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.01))
    for process in started:
        os.kill(process, signal.Signals[name])
    return ends(started)


def arm_flush(flushes: int, name: str) -> None:
    """Signals this process at its n-th flush to disk."""
    left, stock = iter(range(flushes)), cppo.train.sealed.flush

    def flush(path: Path) -> None:
        if next(left, None) == flushes - 1:
            os.kill(os.getpid(), signal.Signals[name])
        stock(path)

    cppo.train.sealed.flush = cppo.train.checkpoint.flush = flush


def result(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for what it took."""
    newest = last_checkpoint(folder / "run")
    assert newest is not None and newest.name == f"checkpoint-{STEPS:06d}", newest
    check_files(newest)
    weights = next(newest.glob("*model.safetensors")).read_bytes()
    state = read_state(newest)
    rows = read_metrics(folder / "run")
    for row in (*rows, *state["history"]):
        for name in [name for name in row if name.startswith("time/")]:
            del row[name]
    completions = (folder / "run" / "completions.jsonl").read_text()
    return {"weights": weights, "state": state, "rows": rows, "completions": completions}


def difference(one: Any, other: Any, place: str = "") -> str | None:
    """The first place in which two results differ."""
    if isinstance(one, torch.Tensor):
        return None if torch.equal(one, other) else place
    if isinstance(one, (list, tuple)) and len(one) == len(other):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return f"{place}: {one.keys() ^ other.keys()}"
        parts = (difference(one[key], other[key], f"{place}/{key}") for key in one)
        return next((part for part in parts if part), None)
    return None if one == other else f"{place}: {str(one)[:200]} and {str(other)[:200]}"


def matrix(root: Path, case: str, processes: int, name: str, moments: int) -> dict[str, Any]:
    """Stops runs of one kind by one signal until there were so many; what was seen."""
    rng = random.Random(f"{case} {processes} {name}")
    whole = root / f"{case}-{processes}" / "whole"
    if not whole.exists():
        assert set(ends(attempt(whole, case, processes))) == {0}, (whole / "said0").read_text()
    expected, all_pieces = result(whole), pieces_done(whole)
    seen = {"stopped": 0, "runs": 0, "repeated": 0, "seconds": 0.0}
    codes = {"SIGTERM": {143, -15}, "SIGINT": {130, -2}, "SIGKILL": {-9}}[name]
    folder = root / f"{case}-{processes}" / name
    shutil.rmtree(folder, ignore_errors=True)
    stops = 0
    while seen["stopped"] < moments or stops:
        started = time.monotonic()
        if seen["stopped"] < moments:
            statuses = stop_at(folder, case, processes, name, rng)
        else:
            statuses = ends(attempt(folder, case, processes))
        seen["seconds"] = max(seen["seconds"], time.monotonic() - started)
        if set(statuses) != {0}:
            if name == "SIGKILL" and processes > 1:
                # The one that was not killed while it wrote hears that the other is gone.
                statuses = [code for code in statuses if code != 1]
            assert set(statuses) <= codes, (statuses, (folder / "said0").read_text()[-3000:])
            seen["stopped"] += 1
            stops += 1
            continue
        found = result(folder)
        assert (wrong := difference(found, expected)) is None, (case, processes, name, wrong)
        repeated = pieces_done(folder) - all_pieces
        seen["repeated"] = max(seen["repeated"], repeated / max(stops, 1) / processes)
        seen["runs"] += 1
        if name != "SIGKILL":
            # At most one piece of every process was broken off at every stop.
            assert repeated <= stops * processes, (case, processes, name, repeated, stops)
        stops = 0
        shutil.rmtree(folder)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=list(SIGNALS))
    options = parser.parse_args()
    if options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"{options.folder} must be empty: runs of other code are no comparison")
    # A shell that starts something in the background has it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    DigitSums("train", 1)[0]  # loads the scans, for all attempts
    for case in options.cases:
        for processes in options.processes:
            for name in options.signals:
                seen = matrix(options.folder, case, processes, name, options.moments)
                print(json.dumps({"case": case, "processes": processes, "signal": name, **seen}))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
