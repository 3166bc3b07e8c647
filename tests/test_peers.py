"""No case in which a peer is right and we are wrong.

What the peers compute on a CPU, beside ours on the same inputs, each against fp64: where a peer's
result is finite and close, ours must be as close (up to the accuracy law's own slack). Where a peer
fails or is wrong, ours must still be right. Peers that are not installed are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cppo
from cppo import backends, reference
from cppo.benchmarks import eager, peers
from cppo.benchmarks.environment import version

Stats = Callable[..., tuple[Tensor, Tensor]]
VOCABULARY, HIDDEN, SHAPE = 1_283, 24, (3, 11)
# Rounding of the last bit of what is compared: logs of probabilities of order ten.
SLACK = 2e-6

LOGIT_CASES = ("random", "bf16", "low", "large", "minus_inf", "strided", "shared", "expanded")
HIDDEN_CASES = ("random", "bf16", "low", "large", "expanded")


def _ours(op: str, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def stats(*rows: Tensor) -> tuple[Tensor, Tensor]:
        result = getattr(cppo, op)(*rows, backend=backend)
        return result.logps, result.entropy

    return stats


def _eager(rows: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
    function = eager.token_stats if len(more) == 1 else eager.linear_token_stats
    found = function(rows, *more)
    return found["logps"], found["entropy"]


def _library(name: str, kind: str) -> Stats:
    peer = next(peer for peer in peers.PEERS if peer.name == name)
    pytest.importorskip(
        {"liger": "liger_kernel"}.get(name, name), reason=f"{peer.distribution} is not installed"
    )
    if name == "verl" and version("verl") and not torch.cuda.is_available():
        pytest.importorskip("verl.utils.experimental.torch_functional", reason="verl has no part")
    load = peer.logits if kind == "logits" else peer.linear
    assert load is not None
    stats: Any = load()
    return lambda *rows: stats(*rows, True)


def _logits(case: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(*SHAPE, VOCABULARY, generator=generator)
    if case == "bf16":
        return logits.bfloat16()
    if case == "low":
        return logits - 150
    if case == "large":
        return logits * 5e3
    if case == "minus_inf":
        logits[..., -7:] = -torch.inf
    if case == "strided":
        wide = torch.randn(SHAPE[0], SHAPE[1] + 1, VOCABULARY, generator=generator)
        wide[:, :-1] = logits
        return wide[:, :-1]
    return logits


def _targets() -> Tensor:
    return torch.randint(0, VOCABULARY - 7, SHAPE, generator=torch.Generator().manual_seed(2))


def _upstream(case: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    if case == "expanded":
        return torch.ones(()).expand(SHAPE), torch.full((), -0.5).expand(SHAPE)
    first, second = torch.randn(2, *SHAPE, generator=generator)
    return first, second


def _evaluate(stats: Stats, leaves: list[Tensor], targets: Tensor, case: str) -> list[Tensor]:
    """Both outputs and the gradient of every leaf."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    logps, entropy = stats(*leaves, targets)
    upstream = [g.to(x.dtype) for g, x in zip(_upstream(case), (logps, entropy), strict=True)]
    outputs, gradients = [logps, entropy], upstream
    if case == "shared":
        # A second consumer of the same logits, after the op: it must find them unchanged.
        outputs, gradients = [*outputs, leaves[0].square().sum()], [*upstream, torch.ones(())]
    found = torch.autograd.grad(outputs, leaves, gradients)
    return [logps.detach(), entropy.detach(), *found]


def _exact(leaves: list[Tensor], targets: Tensor, case: str) -> list[Tensor]:
    function = reference.token_stats if len(leaves) == 1 else reference.linear_token_stats
    return _evaluate(
        lambda *rows: tuple(function(*rows)), [x.double() for x in leaves], targets, case
    )


def _error(value: Tensor, exact: Tensor) -> float:
    """Relative to the largest value; inf where a number is missing."""
    finite = exact.isfinite()
    if not torch.equal(value.isfinite(), finite):
        return torch.inf
    difference = (value.double() - exact)[finite].abs().max()
    return float(difference / exact[finite].abs().max().clamp(min=1.0))


def _compare(ours: Stats, theirs: Stats, leaves: list[Tensor], case: str) -> None:
    targets = _targets()
    exact = _exact(leaves, targets, case)
    mine = _evaluate(ours, leaves, targets, case)
    try:
        other = _evaluate(theirs, leaves, targets, case)
    except Exception:
        other = [torch.full_like(x, torch.nan) for x in exact]
    names = ("logps", "entropy", "grad", "grad of the weight")
    for name, own, peer, truth in zip(names, mine, other, exact, strict=False):
        error, peers_error = _error(own, truth), _error(peer, truth)
        assert error <= 2 * peers_error + SLACK, f"{name}: ours {error:.2g}, {peers_error:.2g}"
        # Right in itself: to the rounding of the input's dtype.
        own_limit = 1e-2 if leaves[0].dtype == torch.bfloat16 else 1e-4
        assert error <= own_limit, f"{name}: off by {error:.2g}"


def _fast(op: str) -> list[str]:
    return [name for name in backends.available(op) if name != "triton"]


@pytest.mark.parametrize("case", LOGIT_CASES)
@pytest.mark.parametrize("name", ["eager", "trl"])
@pytest.mark.parametrize("backend", _fast("token_stats"))
def test_logits(backend: str, name: str, case: str) -> None:
    theirs = _eager if name == "eager" else _library(name, "logits")
    _compare(_ours("token_stats", backend), theirs, [_logits(case)], case)


@pytest.mark.parametrize("case", HIDDEN_CASES)
@pytest.mark.parametrize("name", ["eager", "trl", "liger", "verl"])
@pytest.mark.parametrize("backend", _fast("linear_token_stats"))
def test_hidden_states(backend: str, name: str, case: str) -> None:
    theirs = _eager if name == "eager" else _library(name, "linear")
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(*SHAPE, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) / HIDDEN**0.5
    if case == "low":
        # All logits near -150: the first hidden unit is constant, and so is its weight.
        hidden[..., 0], weight[:, 0] = 15.0, -10.0
    if case == "large":
        hidden = hidden * 50
    if case == "bf16":
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    _compare(_ours("linear_token_stats", backend), theirs, [hidden, weight], case)


@pytest.mark.parametrize("backend", _fast("linear_token_stats"))
def test_torch_linear_cross_entropy(backend: str) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(*SHAPE, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) / HIDDEN**0.5
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    stats: Any = peers._torch_linear()
    exact = reference.linear_token_stats(hidden.double(), weight.double(), _targets()).logps
    theirs = _error(stats(hidden, weight, _targets(), False)[0], exact)
    ours = _error(_ours("linear_token_stats", backend)(hidden, weight, _targets())[0], exact)
    assert ours <= 2 * theirs + SLACK
