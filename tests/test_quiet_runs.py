"""Ordinary runs say what cppo has to say and nothing that a library tells its own developers."""

import subprocess
import sys

import pytest
from cli_cases import ARITHMETIC, DIGITS, TINY

RUN = [*TINY, "trainer.max_steps=1", "trainer.warmup_steps=0"]
ADAPTED = ["trainer.lora.r=2", "trainer.precision=bf16", "trainer.gradient_checkpointing=true"]


def command(*arguments, cwd):
    """Exit status and stderr of a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "cppo", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=500,
    )
    assert "Warning" not in done.stdout
    return done.returncode, done.stderr


def test_a_run_on_images_and_its_evaluation(tmp_path):
    assert command("train", DIGITS, *RUN, cwd=tmp_path) == (0, "")
    assert command("eval", "run", cwd=tmp_path) == (0, "")


def test_a_run_of_adapters_and_its_evaluation(tmp_path):
    pytest.importorskip("peft")
    assert command("train", ARITHMETIC, *RUN, *ADAPTED, cwd=tmp_path) == (0, "")
    assert command("eval", "run", cwd=tmp_path) == (0, "")


def test_info_inspect_and_the_demo(tmp_path):
    from cppo.demo.digits import DigitSums
    from cppo.questions import as_question

    as_question(DigitSums("train", 1)[0]).images[0].save(tmp_path / "a.png")
    assert command("info", cwd=tmp_path) == (0, "")
    assert command("info", "tiny_digits", cwd=tmp_path) == (0, "")
    look = ["inspect", "tiny_digits", "--image", "a.png", "--question", "Sum?"]
    assert command(*look, cwd=tmp_path) == (0, "")
    demo = ["demo", "--task", "arithmetic", "--steps", "1", "--held-out", "2", "--output", "demo"]
    assert command(*demo, cwd=tmp_path) == (0, "")
