"""Runs that signals stop at random moments come out as the undisturbed one, bit for bit.

The whole matrix is `python tests/stopped_runs.py FOLDER`; tests/results/stopped-runs.txt is its
output. Here are a few moments of every kind.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).with_name("stopped_runs.py"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "processes"), [("text", 1), ("vision", 1), ("lora", 1), ("text", 2)]
)
def test_a_run_stopped_again_and_again_is_the_undisturbed_one(
    tmp_path: Path, case: str, processes: int
) -> None:
    options = ["--moments", "4", "--cases", case, "--processes", str(processes)]
    done = subprocess.run(
        [sys.executable, SCRIPT, str(tmp_path), *options],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=Path(SCRIPT).parent,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["signal"] for row in seen] == ["SIGTERM", "SIGINT", "SIGKILL"]
    assert all(row["stopped"] >= 4 and row["runs"] >= 1 for row in seen)


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time; from cppo.stopping import Stopping\n"
        "stopping = Stopping(is_main=True)\n"
        "with stopping.listening():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stopping.signal.name, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "SIGTERM" and done.returncode == -2
    assert "SIGTERM: a checkpoint is written; the same again ends at once" in done.stderr
