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

from cppo import LossConfig, backends
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


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", FUSED)
def test_a_view_has_some_rows_in_an_order_of_its_own(backend: str, inplace: bool) -> None:
    """Gradients are written at every place that is named, and nowhere else."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    whole, targets = torch.randn(5, 37, device=device), torch.arange(5, device=device)
    places = torch.tensor([-1, 3, 0, -1, 1], device=device)
    mask = torch.tensor([False, True, True, False, False], device=device)
    backends.pick("token_stats", whole, backend)
    ops = getattr(torch.ops, NAMESPACES[backend])
    view = torch.full((4, 37), 7.0, device=device)
    view[places[places >= 0]] = whole[places >= 0]
    expected = ops.token_stats(whole, targets, mask, None, 0.7, False)
    stats = ops.token_stats(view, targets, mask, places, 0.7, False)
    assert all(map(torch.equal, stats, expected))

    upstream, rest = torch.randn(2, 5, device=device), (stats[2], 0.7)
    of_whole = ops.token_stats_backward(*upstream, whole, targets, mask, None, *rest)
    if inplace:
        gradient = view.clone()
        ops.token_stats_backward_(*upstream, gradient, targets, mask, places, *rest)
    else:
        gradient = ops.token_stats_backward(*upstream, view, targets, mask, places, *rest)
    assert torch.equal(gradient[places[places >= 0]], of_whole[places >= 0])
    assert (gradient[1] == 0).all() and (gradient[2] == (7 if inplace else 0)).all()


@pytest.mark.skipif("cpp" not in FUSED, reason="the extension is not built")
def test_places_and_configs_that_do_not_fit_are_refused_in_words() -> None:
    ops = torch.ops.cppo
    rows, counted = torch.randn(3, 7), torch.ones(3, dtype=torch.bool)
    targets, places = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3, -1])
    refused = r"places must be in \[0, rows of the logits\) = \[0, 3\) .* got 3 at row 1"
    with pytest.raises(RuntimeError, match="cppo.token_stats: " + refused):
        ops.token_stats(rows, targets, None, places, 1.0, False)
    with pytest.raises(RuntimeError, match="cppo.contrast: positive_" + refused):
        ops.contrast(rows, rows, rows, counted, places, None, 1.0)
    with pytest.raises(RuntimeError, match="negative must have the 3 rows of the anchor"):
        ops.contrast(rows, rows, rows[1:], counted, None, None, 1.0)

    bounds, by = torch.tensor([0, 3]), torch.ones(2, dtype=torch.float64)
    given = (rows[:, 0], rows[:, 1], *[None] * 4, torch.ones(1), *[None] * 5, bounds, by)
    text = LossConfig().text
    ops.loss_terms(*given, text)
    for old, new, expected in (
        ("tau=0.1", "tau=x", "tau must be a number, got 'x'"),
        ("tau=0.1", "tau=", "tau must be a number, got ''"),
        ("clip_low", "clip_lo", "clip_low is not in"),
        ("=k3", "=k4", "divergence must be one of 'k3', 'k1', 'full', got 'k4'"),
        ("detach_anchor=False", "detach_anchor=0", "detach_anchor must be one of 'True', 'False'"),
    ):
        with pytest.raises(RuntimeError, match=f"cppo.loss_terms: config.*{expected}"):
            ops.loss_terms(*given, text.replace(old, new))


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
