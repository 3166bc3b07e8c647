"""The ops below the public ones (`torch.ops.cppo.*`, `cppo._host`) can be called by anybody.

None of them may crash, or touch memory outside its tensors, whatever it is given.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cppo import backends
from cppo.fused import extension
from cppo.testing import make_inputs

FUZZ = Path(__file__).with_name("private_ops.py")
NAMESPACES = {"cpp": "cppo", "triton": "cppo_triton"}
FUSED = [name for name in backends.available("cppo_loss") if name != "reference"]


@pytest.mark.parametrize("backend", FUSED)
def test_no_argument_crashes_an_op(backend: str) -> None:
    """In a process of its own: a crash is a failure, not the end of the tests."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(FUZZ), NAMESPACES[backend]]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    last = "\n".join(done.stderr.splitlines()[-12:])
    assert done.returncode == 0, f"exit status {done.returncode} after\n{last}"
    raised, returned = (int(word) for word in done.stdout.split() if word.isdigit())
    assert raised > 100 and returned > 50


@pytest.mark.parametrize("backend", FUSED)
def test_the_error_names_op_argument_and_sizes(backend: str) -> None:
    backends.pick("token_stats", torch.zeros(1), backend)
    ops = getattr(torch.ops, NAMESPACES[backend])
    inputs = make_inputs("token_stats", layout="packed")
    logits, targets = inputs["logits"], inputs["targets"]
    short = torch.ones(len(targets) - 2, dtype=torch.bool)
    expected = rf"cppo.token_stats: mask must .*{len(targets)} entries.*\({len(short)},\)"
    with pytest.raises((RuntimeError, ValueError), match=expected):
        ops.token_stats(logits, targets, short, None, 1.0, False)
    *_, saved = ops.token_stats(logits, targets, None, None, 1.0, False)
    with pytest.raises((RuntimeError, ValueError), match="cppo.token_stats: saved must be"):
        ops.token_stats_backward(None, None, logits, targets, None, None, saved[:, 1:], 1.0)
    with pytest.raises((RuntimeError, ValueError), match=r"fraction must be in \[0, 1\], got 2"):
        ops.perception_mask(saved, saved, 2.0, None, None)


def test_planners_refuse_what_overflows() -> None:
    if extension.missing["host"]:
        pytest.skip(extension.missing["host"])
    host = extension._host
    for lengths in ([2**62] * 3, [2**63 - 1, 1]):
        with pytest.raises(ValueError, match="lengths must add up to less than 2\\^63"):
            host.balance_ranks(lengths, 2)
    for call in (
        lambda: host.balance_ranks([1, 2], 0),
        lambda: host.balance_ranks([-1, 2], 1),
        lambda: host.plan_microbatches([-1], 3),
        lambda: host.plan_microbatches([4], 3),
    ):
        with pytest.raises(ValueError):
            call()
    assert host.plan_microbatches([], -5) == [] and host.balance_ranks([], 2) == [[], []]
