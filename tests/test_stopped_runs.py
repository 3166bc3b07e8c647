"""Runs that signals stop at random moments come out as the undisturbed one, bit for bit.

The whole matrix is `python tests/stopped_runs.py FOLDER`; tests/results/stopped-runs.txt is its
output. Here are a few moments of every kind.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from trainer_cases import noise, same, trainer_for, weights_of

from cppo.train import algorithm
from cppo.train.checkpoint import last_checkpoint
from cppo.train.sealed import read_summary
from cppo.train.stopping import Stopping

SCRIPT = str(Path(__file__).with_name("stopped_runs.py"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "processes"), [("text", 1), ("vision", 1), ("lora", 1), ("text", 2)]
)
def test_a_run_stopped_again_and_again_is_the_undisturbed_one(tmp_path, case, processes):
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


def test_a_second_signal_ends_at_once(tmp_path):
    script = (
        "import os, signal, sys, time; from cppo.train.stopping import Stopping\n"
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


OPTIONS = {
    "max_steps": 3,
    "num_iterations": 2,
    "optimizer_steps": 2,
    "max_tokens_per_microbatch": 64,
    "save_every": 1,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trainer = trainer_for(tmp_path_factory.mktemp("whole"), rewards=noise, **OPTIONS)
    trainer.train()
    return weights_of(trainer.model)


def stop_in_a_microbatch(trainer, step):
    """Sends SIGINT within the second micro-batch of a step."""
    stock, calls = algorithm.microbatch_loss, []

    def run(*args):
        calls.append(trainer.step)
        if calls.count(step - 1) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return stock(*args)

    return patch.object(algorithm, "microbatch_loss", run)


def test_the_same_trainer_goes_on(tmp_path, undisturbed):
    """As in a notebook: nothing of the step that was broken off is left in it."""
    for resume_from in ("auto", tmp_path / "run" / "checkpoint-000001"):
        trainer = trainer_for(tmp_path / "run", rewards=noise, **OPTIONS)
        stopped = pytest.raises(KeyboardInterrupt, match="checkpoint-000002")
        with stop_in_a_microbatch(trainer, 2), stopped:
            trainer.train(overwrite=True)
        assert any(p.grad is not None for p in trainer.parameters)
        trainer.train(resume_from=resume_from, overwrite=True)
        assert same(weights_of(trainer.model), undisturbed)


def test_a_trainer_that_has_trained_begins_nothing_anew(tmp_path):
    """What its folder holds stays: of a model that was trained there is no fresh start."""
    trainer = trainer_for(tmp_path, rewards=noise, max_steps=1)
    last = trainer.train()
    with pytest.raises(ValueError, match="trained already, up to step 1"):
        trainer.train(overwrite=True)
    assert last_checkpoint(tmp_path).name == "checkpoint-000001"
    assert trainer.train("auto") == last


def test_a_reward_that_catches_everything(tmp_path, undisturbed):
    def careful(completions, **columns):
        try:
            if trainer.step == 1 and not stopped:
                stopped.append(1)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
            return noise(completions)
        except BaseException:
            return [0.0] * len(completions)

    stopped = []
    trainer = trainer_for(tmp_path, rewards=careful, **OPTIONS)
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 143
    again = trainer_for(tmp_path, rewards=noise, **OPTIONS)
    with pytest.raises(ValueError, match="stopped within a step.*changed: rewards"):
        trainer_for(tmp_path, rewards=noise, resume_with_changes=True, **OPTIONS).train("auto")
    stopped.append(1)
    again = trainer_for(tmp_path, rewards=careful, resume_with_changes=True, **OPTIONS)
    trainer = again  # whose step the reward looks at
    again._run._trained_on = read_summary(last_checkpoint(tmp_path))["options"] and {
        name: read_summary(last_checkpoint(tmp_path))["options"][name]
        for name in ("train_dataset", "rewards", "chat_template")
    }
    again.train("auto")
    assert same(weights_of(again.model), undisturbed)


def test_nobody_reads_what_is_said(tmp_path):
    """Ctrl-C in `cppo train | tee`: the reader is gone first, the checkpoint is written."""
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from trainer_cases import noise, trainer_for\n"
        "def reward(completions, **columns):\n"
        "    if trainer.step == 1:\n"
        "        os.close(reader); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return noise(completions)\n"
        "reader, writer = os.pipe()\n"
        "os.dup2(writer, 1); os.dup2(writer, 2); os.close(writer)\n"
        "trainer = trainer_for(Path(sys.argv[1]), rewards=reward, max_steps=3)\n"
        "trainer.train()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run"), str(Path(SCRIPT).parent)]
    done = subprocess.run(command, timeout=120, check=False)
    assert done.returncode == 143
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-000002"


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stopping = Stopping(is_main=True)
        with stopping.listening():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            assert stopping.signal is None
    finally:
        signal.signal(signal.SIGINT, before)
