"""Two processes that do not agree, or of which one is gone: an end in words, within the limit."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_checkpoint_damage import flip
from trainer_cases import noise, trainer_for

from cppo.train import fingerprint
from cppo.train.checkpoint import last_checkpoint
from cppo.train.sealed import _checksum

pytestmark = pytest.mark.slow
SCRIPT = str(Path(__file__).with_name("failing_processes.py"))


def run(folder, part):
    """What each of two processes ended with; {} for one that did not come to an end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(folder), part],
            env={
                **os.environ,
                **shared,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
            },
            cwd=Path(SCRIPT).parent,
            stdout=subprocess.DEVNULL,
        )
        for rank in ("0", "1")
    ]
    try:
        processes[0].wait(120)
        if part not in ("frozen", "slow"):
            processes[1].wait(60)
    finally:
        for process in processes:
            process.kill()
    files = [folder / f"rank{rank}.json" for rank in (0, 1)]
    return [json.loads(file.read_text()) if file.is_file() else {} for file in files]


def letters(completions, **columns):
    return [-value for value in noise(completions)]


def start(folder, processes=2, **options):
    """A run of two steps, whose checkpoints say how many processes wrote them."""
    trainer_for(folder, max_steps=2, save_every=1, **{"rewards": noise, **options}).train()
    for file in folder.glob("checkpoint-*/trainer.json"):
        summary = json.loads(file.read_text())
        summary["options"]["processes"] = processes
        summary["options"]["rewards"] = fingerprints()
        file.write_text(json.dumps({**summary, "checksum": _checksum(summary)}))


def fingerprints():
    return [fingerprint.of_function(noise)]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("none", "run/checkpoint-000002 is not a checkpoint of cppo (it has no trainer.json)"),
        ("another run's", "checkpoint's checksum must be the same on every process"),
        ("damaged", "run/checkpoint-000002/model.safetensors is damaged"),
        ("cut", "run/checkpoint-000002/trainer.pt is damaged"),
        ("of one process", "must be resumed with the options .*processes .was 1, is 2."),
        ("same", None),
    ],
)
def test_processes_resume_the_same_checkpoint_or_none(tmp_path, other, words):
    first, second = tmp_path / "disk0" / "run", tmp_path / "disk1" / "run"
    start(first, processes=1 if other == "of one process" else 2)
    if other == "another run's":
        start(second, rewards=letters)
    else:
        shutil.copytree(first, second)
    newest = last_checkpoint(second)
    if other == "none":
        shutil.rmtree(newest)
    elif other == "damaged":
        # The first process of a machine reads everything; here both are on one.
        flip(last_checkpoint(first) / "model.safetensors", -1)
    elif other == "cut":
        os.truncate(newest / "trainer.pt", 999)
    before = {path: path.read_bytes() for path in first.rglob("*.safetensors")}
    both = run(tmp_path, "other_checkpoint")
    if words is None:
        assert both[0]["sum"] == both[1]["sum"]
        assert last_checkpoint(first).name == "checkpoint-000003"
        return
    for told in both:
        assert words in told["error"] or re.search(words, told["error"]), told
    assert {path: path.read_bytes() for path in first.rglob("*.safetensors")} == before


def test_rows_that_differ_between_processes(tmp_path):
    for told in run(tmp_path, "other_rows"):
        assert "train_dataset must be the same on every process, is '6 rows" in told["error"]
        assert "'7 rows" in told["error"] and "on process 1" in told["error"]


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("other_held_out", "eval_dataset"),
        ("no_held_out", "eval_dataset"),
        ("other_model", "model's parameters"),
    ],
)
def test_what_else_differs_between_processes(tmp_path, part, name):
    for told in run(tmp_path, part):
        assert f"{name} must be the same on every process" in told["error"]


def test_weights_that_differ_between_processes_are_those_of_the_first(tmp_path):
    both = run(tmp_path, "other_weights")
    assert both[0]["sum"] == both[1]["sum"]


def test_the_reference_policy_is_that_of_the_first(tmp_path):
    both = run(tmp_path, "other_models")
    assert both[0]["sum"] == both[1]["sum"] != both[0]["reference"]
    assert both[0]["reference"] == both[1]["reference"]


@pytest.mark.parametrize("part", ["frozen", "dead", "slow"])
def test_a_process_that_does_not_come(tmp_path, part):
    first, _ = run(tmp_path, part)
    assert first["error"].startswith("ProcessError: cppo: process 0 of 2 waited ")
    assert "process_timeout = 6 s" in first["error"]
    assert first["seconds"] < 60
    # What was reported as saved is there.
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-000001"


def test_a_process_that_comes_late(tmp_path):
    both = run(tmp_path, "slow_but_in_time")
    assert both[0]["sum"] == both[1]["sum"]


def test_every_process_hears_that_a_checkpoint_was_not_written(tmp_path):
    first, second = run(tmp_path, "full_disk")
    words = "the checkpoint of step 1 could not be written to"
    assert words in first["error"] and words in second["error"]
    assert "No space left on device" in second["error"]
    assert not list((tmp_path / "run").glob(".checkpoint*"))


def test_a_disk_that_is_full_for_a_while_ends_no_process(tmp_path):
    both = run(tmp_path, "full_for_a_while")
    assert "sum" in both[0] and both[0]["sum"] == both[1].get("sum"), both
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-000003"
