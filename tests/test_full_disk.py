"""A full disk, a folder that vanishes or may not be written: words, and a run that goes on."""

import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from trainer_cases import noise, same, trainer_for, weights_of

from cppo.train import checkpoint, weights
from cppo.train.checkpoint import check_files, last_checkpoint
from cppo.train.output_dir import Claim
from cppo.train.progress import read_metrics
from cppo.train.sealed import CheckpointError

STEPS = 4
OPTIONS = {"max_steps": STEPS, "save_every": 1, "num_iterations": 2}


class Disk:
    """A small disk of its own, and a file that fills it."""

    def __init__(self, folder):
        self.folder, self.ballast = folder, folder / "ballast"

    def fill(self):
        """Leaves nothing, though the disk may still say that it has room for a checkpoint."""
        with self.ballast.open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 10, 1):
                try:
                    while file.write(b"x" * size) == size:
                        pass
                except OSError:
                    pass

    def free(self):
        self.ballast.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trainer = trainer_for(tmp_path_factory.mktemp("whole"), rewards=noise, **OPTIONS)
    trainer.train()
    return weights_of(trainer.model)


def reward_with(events):
    """A reward whose n-th call first does `events[n]`."""
    calls = []

    def reward(completions, **columns):
        calls.append(1)
        events.get(len(calls), lambda: None)()
        return noise(completions)

    return reward


def check(run, trainer, undisturbed):
    assert trainer.step == STEPS and same(weights_of(trainer.model), undisturbed)
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4]
    assert last_checkpoint(run).name == f"checkpoint-{STEPS:06d}"
    check_files(last_checkpoint(run))
    assert not list(run.glob(".*.partial"))


def test_a_disk_that_is_full_during_a_step(disk, undisturbed, capsys):
    run = disk.folder / "run"
    options = {**OPTIONS, "resume_with_changes": True}
    trainer = trainer_for(run, rewards=reward_with({2: disk.fill, 3: disk.free}), **options)
    trainer.train()
    said = " ".join(capsys.readouterr().out.split())
    assert f"the checkpoint of step 2 could not be written to {run}" in said
    assert f"the newest one there is {run}/checkpoint-000001; tried again" in said
    check(run, trainer, undisturbed)


@pytest.mark.parametrize("moment", ["model", "state", "summary"])
def test_a_disk_that_is_full_while_a_checkpoint_is_written(
    disk, undisturbed, monkeypatch, capsys, moment
):
    run = disk.folder / "run"
    owner, name = {
        "model": (weights, "save_model"),
        "state": (checkpoint, "write_tensors"),
        "summary": (checkpoint, "seal"),
    }[moment]
    stock, calls = getattr(owner, name), []

    def full(*args):
        calls.append(1)
        if len(calls) != 2:
            return stock(*args)
        disk.fill()
        try:
            return stock(*args)
        finally:
            disk.free()

    monkeypatch.setattr(owner, name, full)
    trainer = trainer_for(run, rewards=noise, **OPTIONS)
    trainer.train()
    assert len(calls) >= 4
    said = " ".join(capsys.readouterr().out.split())
    assert f"the checkpoint of step 2 could not be written to {run}" in said
    check(run, trainer, undisturbed)


def test_a_disk_that_is_full_at_the_start(disk, undisturbed):
    run = disk.folder / "run"
    disk.fill()
    trainer = trainer_for(run, rewards=noise, **OPTIONS)
    trainer.files["config.yaml"] = "x" * 10_000
    with pytest.raises(ValueError, match=f"output_dir {run} cannot be written to .No space left"):
        trainer.train()
    disk.free()
    trainer = trainer_for(run, rewards=noise, **OPTIONS)
    trainer.train(resume_from="auto")
    check(run, trainer, undisturbed)


def test_a_disk_that_is_full_at_the_end_and_a_run_that_is_resumed(disk, undisturbed):
    run = disk.folder / "run"
    trainer = trainer_for(run, rewards=reward_with({3: disk.fill}), **OPTIONS)
    with pytest.raises(CheckpointError, match="step 4 could not .*there is .*checkpoint-000002$"):
        trainer.train()
    check_files(last_checkpoint(run))
    disk.free()
    again = trainer_for(run, rewards=noise, resume_with_changes=True, **OPTIONS)
    again.train(resume_from="auto")
    check(run, again, undisturbed)


def test_a_signal_on_a_full_disk(disk, capsys):
    run = disk.folder / "run"

    def fill_and_stop():
        disk.fill()
        os.kill(os.getpid(), signal.SIGTERM)

    reward = reward_with({2: fill_and_stop})
    with pytest.raises(SystemExit) as ended:
        trainer_for(run, rewards=reward, **OPTIONS).train()
    assert ended.value.code == 143
    said = " ".join(capsys.readouterr().out.split())
    assert "stopped by SIGTERM; " in said and "0 MB are free there" in said
    assert f"the newest checkpoint is {run}/checkpoint-000001" in said


def test_the_room_is_looked_at_first(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path, rewards=noise, max_steps=1)
    size = sum(p.nbytes for p in trainer.parameters)
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * size - 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    begun = []
    monkeypatch.setattr(weights, "save_model", lambda *args: begun.append(args))
    words = "it takes about 0.0[0-9]+ GB, and 0.0[0-9]+ GB are free"
    with pytest.raises(CheckpointError, match=words):
        trainer.train()
    assert not begun


def test_a_folder_that_vanishes(tmp_path, undisturbed, capsys):
    run = tmp_path / "run"
    trainer = trainer_for(run, rewards=reward_with({3: lambda: shutil.rmtree(run)}), **OPTIONS)
    trainer.files["config.yaml"] = "options"
    trainer.train()
    check(run, trainer, undisturbed)
    assert (run / "config.yaml").read_text() == "options"
    assert "was removed during the run: it is made again" in capsys.readouterr().out


def let_others_in(tmp_path):
    """Lets a process that becomes another user reach the test's folder."""
    if os.getuid() != 0:
        pytest.skip("needs the right to become another user")
    for folder in tmp_path.parents:
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    tmp_path.chmod(0o755)


def test_a_folder_that_may_not_be_written(tmp_path):
    """As another user, to whom a folder of root's is closed."""
    let_others_in(tmp_path)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o755)
    script = (
        "import os, sys; from pathlib import Path\n"
        "from cppo.train.output_dir import claim_output_dir\n"
        "from cppo.train.checkpoint import write_checkpoint\n"
        f"closed = Path({str(closed)!r}); os.setgid(65534); os.setuid(65534)\n"
        "for call in (claim_output_dir(closed / 'run').lock, claim_output_dir(closed).lock,\n"
        "             lambda: write_checkpoint(closed, 1, print, {}, {'metric': None}, 1)):\n"
        "    try:\n        call()\n"
        "    except ValueError as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    first, second, third = done.stdout.splitlines()
    assert f"output_dir {closed / 'run'} cannot be written to (Permission denied" in first
    assert f"output_dir {closed} cannot be written to (Permission denied" in second
    assert f"step 1 could not be written to {closed} (Permission denied" in third


def test_a_folder_whose_name_is_too_long(tmp_path):
    trainer = trainer_for(tmp_path / ("n" * 300), rewards=noise, max_steps=1)
    with pytest.raises(ValueError, match="cannot be written to .File name too long"):
        trainer.train()


def test_what_another_user_closed_is_said(tmp_path):
    """A checkpoint that may not be entered, and a folder below one that may not."""
    let_others_in(tmp_path)
    closed = tmp_path / "run" / "checkpoint-000002"
    closed.mkdir(parents=True)
    closed.chmod(0o700)
    script = (
        "import os; from pathlib import Path; from cppo.train.output_dir import claim_output_dir\n"
        "from cppo.train.checkpoint import best_checkpoint, check_files, last_checkpoint\n"
        f"run = Path({str(closed.parent)!r}); os.setgid(65534); os.setuid(65534)\n"
        "for call, path in ((claim_output_dir, run), (claim_output_dir, run / closed / 'new'),\n"
        "                   (check_files, run / closed), (last_checkpoint, run)):\n"
        "    try:\n        call(path)\n"
        "    except ValueError as error:\n        print(error)\n"
    ).replace("run / closed", "run / 'checkpoint-000002'")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    assert all("Permission denied" in line and str(closed) in line for line in lines)


class OtherThread(threading.Thread):
    """Calls something, and keeps what it raises."""

    def __init__(self, call):
        super().__init__(daemon=True)
        self.call, self.error = call, ""
        self.start()

    def run(self):
        try:
            self.call()
        except ValueError as error:
            self.error = str(error)


def test_two_trainers_of_one_process_in_one_folder(tmp_path):
    """The second is refused, and does not end the lock of the first."""
    refused = []

    def reward(completions, **columns):
        if not refused:
            for _ in range(2):
                other = trainer_for(tmp_path, rewards=noise, max_steps=1)
                thread = OtherThread(other.train)
                thread.join()
                refused.append(thread.error)
        return noise(completions)

    trainer = trainer_for(tmp_path, rewards=reward, max_steps=1)
    trainer.train()
    assert len(refused) == 2
    assert all(f"is in use by process {os.getpid()}" in words for words in refused)
    trainer.train(resume_from="auto")


OTHER_PROCESS = (
    "import sys; from pathlib import Path; from cppo.train.output_dir import Claim\n"
    "try:\n    Claim(Path(sys.argv[1])).lock()\n"
    "except ValueError as error:\n    print(error)\n"
)


def locked_out(run):
    """What a process is told that wants the folder; "" if it gets it."""
    command = [sys.executable, "-c", OTHER_PROCESS, str(run)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_copy_of_the_folder_does_not_end_the_lock(tmp_path):
    release = Claim(tmp_path / "run").lock()
    shutil.copytree(tmp_path / "run", tmp_path / "backup")
    assert f"is in use by process {os.getpid()} on " in locked_out(tmp_path / "run")
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        Claim(tmp_path / "run").lock()
    release()
    assert not locked_out(tmp_path / "run")
    Claim(tmp_path / "run").lock()()


def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    release = Claim(tmp_path).lock()
    hold, end = os.pipe()
    child = os.fork()
    if child == 0:
        release()  # as the `finally` of a child that leaves: it is not the child's
        os.close(end)
        os.read(hold, 1)  # until the parent lets it go
        os._exit(0)
    try:
        assert "is in use by" in locked_out(tmp_path)
        release()
        assert not locked_out(tmp_path)
    finally:
        os.close(end)
        os.waitpid(child, 0)


def test_two_runs_in_one_folder(tmp_path):
    """The lock names its holder, and ends with it however it ends."""
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from cppo.train.output_dir import Claim\n"
            "Claim(Path(sys.argv[1])).lock(); print('held', flush=True); time.sleep(100)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    trainer = trainer_for(tmp_path, rewards=noise, max_steps=1)
    with pytest.raises(ValueError, match=f"is in use by process {holder.pid} on .* since "):
        trainer.train()
    holder.kill()
    holder.wait()
    trainer.train()
    trainer.train(resume_from="auto")  # this process has let go of it, too
    assert trainer.step == 1
