"""Measures one case: first whether it is right, then how fast, each variant on the same inputs.

1. On a part of the inputs every backend of ours is held to the accuracy law of `cppo.testing`
   against fp64, outputs and gradients. A backend that breaks it is reported and never timed.
   Peers are not judged: their error against fp64 stands beside their time.
2. The first whole call is compared with the same fp64 results on those rows. This finds what only
   goes wrong at full size: offsets, tails.
3. Peak memory of one whole call.
4. Times, interleaved. When all cases have had their turn, quick ones are timed again in further
   passes: what disturbs a shared machine for minutes is then not in all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

import torch

from cppo import backends
from cppo.benchmarks import accuracy, calls, peers, timing
from cppo.benchmarks.accuracy import Variant, Verdict, first_line
from cppo.benchmarks.calls import Call, Outputs
from cppo.benchmarks.cases import Case
from cppo.benchmarks.inputs import Inputs, restorer
from cppo.benchmarks.peers import Competitor
from cppo.benchmarks.timing import Ceilings
from cppo.rollouts.memory import free_memory


@dataclass(frozen=True)
class Budget:
    """How much time is spent on a case.

    Args:
        seconds: of timing for each variant and mode in a pass.
        quick: a call of fewer seconds is quick; only quick calls are timed in further passes.
        rounds: the least number of samples of a quick call. Slow calls get three, those longer
            than 10 s two.
        passes: over the cases whose calls are all quick.
        check_rows: rows on which fp64 is computed.
        patience: of a call longer than this many seconds the first is the only sample.
        limit: what is expected to take more seconds than this is not run at all.
    """

    seconds: float = 5.0
    quick: float = 1.0
    rounds: int = 7
    passes: int = 1
    check_rows: int = 64
    patience: float = 60.0
    limit: float = 150.0

    def rounds_of(self, call_seconds: float) -> int:
        if call_seconds < self.quick:
            return self.rounds
        return 3 if call_seconds < 10 else 2


class Pass(NamedTuple):
    """The samples of one pass: how many, and their percentiles in milliseconds."""

    samples: int
    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Pass:
        return cls(len(samples), *(timing.percentile(samples, share) for share in (0.2, 0.5, 0.8)))


@dataclass(eq=False)
class Measured:
    """What is known of one variant in one mode; no passes where nothing was timed."""

    case: Case
    mode: str
    backend: str
    peer: str
    status: str = "ok"
    note: str = ""
    error: float = math.nan
    error_of: str = ""
    passes: list[Pass] = field(default_factory=list)
    peak_bytes: int | None = None
    gradient_bytes: int = 0
    first_seconds: float = 0.0
    call: Call | None = None

    @property
    def variant(self) -> str:
        return self.backend or self.peer

    @property
    def is_bad(self) -> bool:
        return self.status.startswith(("wrong", "failed"))

    @property
    def count(self) -> int:
        return sum(each.samples for each in self.passes)

    def ms(self, percentile: str = "p50") -> float:
        """A percentile of a pass, its interquartile mean over the passes.

        A shared machine is fast in one pass and slow in another. A median over the passes would
        follow whichever happened once more often, and a mean would follow a single freak.
        """
        if not self.passes:
            return math.nan
        found = sorted(getattr(each, percentile) for each in self.passes)
        quarter = len(found) // 4
        return fmean(found[quarter : len(found) - quarter])


@dataclass(frozen=True)
class Selection:
    """Which variants and modes of a case are measured; empty tuples mean all."""

    against: tuple[str, ...] = peers.NAMES
    backends: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()


def measure(
    case: Case,
    device: torch.device,
    budget: Budget,
    ceilings: Ceilings,
    selection: Selection = Selection(),  # noqa: B008  (frozen)
    on_result: Callable[[Measured], None] = lambda measured: None,
) -> Iterator[Measured]:
    """Everything about one case; `on_result` hears of each variant when its memory is known."""
    variants, absent = variants_of(case, device, selection)
    inputs = case.make(device)
    restore = restorer(inputs)
    modes = [mode for mode in case.modes if mode in selection.modes] or case.modes
    too_long = {v.name: _too_long(case, v, budget, ceilings, modes[-1]) for v in variants}
    verdicts = {name: Verdict(reason) for name, reason in too_long.items() if reason}
    todo = [v for v in variants if v.name not in verdicts]
    exact, checked = accuracy.check(case, inputs, todo, budget.check_rows, modes[-1])
    verdicts |= checked
    for mode in modes:
        results = []
        for variant in variants:
            measured = _start(case, mode, variant, verdicts.get(variant.name, Verdict()), device)
            if measured.status == "ok":
                _first_call(measured, inputs, variant.competitor, exact, device)
            restore()
            results.append(measured)
            on_result(measured)
        _time([m for m in results if m.status == "ok"], inputs, budget, device, restore)
        yield from results
        for name, reason in absent.items():
            yield Measured(case, mode, "", name, status=reason)


def measure_again(known: Sequence[Measured], device: torch.device, budget: Budget) -> bool:
    """Another pass over one case, added to what is known of it; False where calls are slow."""
    timed_before = [m for m in known if m.passes]
    if not timed_before or max(m.ms() for m in timed_before) > 1e3 * budget.quick:
        return False
    case = timed_before[0].case
    inputs = case.make(device)
    for mode in case.modes:
        members = [m for m in timed_before if m.mode == mode]
        _time(members, inputs, budget, device, restorer(inputs))
    return True


def _time(
    members: Sequence[Measured],
    inputs: Inputs,
    budget: Budget,
    device: torch.device,
    restore: timing.Call,
) -> None:
    """One pass over the variants of one case and mode, whose first calls went well."""
    quick = {}
    for m in members:
        if m.first_seconds > budget.patience:
            m.passes.append(Pass.of([1e3 * m.first_seconds]))
        else:
            quick[m.variant] = m
    waiting = {name: _timed(m, inputs) for name, m in quick.items()}
    for name, call in waiting.items():
        if quick[name].first_seconds < budget.quick:  # the first call finds caches and memory cold
            call()
            restore()
    rounds = {name: budget.rounds_of(m.first_seconds) for name, m in quick.items()}
    samples = timing.time_interleaved(waiting, budget.seconds, rounds, device, restore)
    for name, m in quick.items():
        m.passes.append(Pass.of(samples[name]))


def _timed(m: Measured, inputs: Inputs) -> timing.Call:
    assert m.call is not None
    return calls.timed(m.case, m.mode, inputs, m.call)


def variants_of(
    case: Case, device: torch.device, selection: Selection
) -> tuple[list[Variant], dict[str, str]]:
    """Our backends and the chosen peers that run here, and why other peers do not.

    Ours come first, the fastest in front. Two are left out unless asked for: Triton's interpreter,
    and the specification where something faster runs.
    """
    names = backends.available(case.op, device)
    if selection.backends:
        names = [name for name in names if name in selection.backends]
    else:
        names = [n for n in names if n != "triton" or device.type != "cpu"]
        names = [n for n in names if n != "reference" or (len(names) == 1 and case.sizes)]
    found, absent = peers.competitors(case, device, selection.against)
    variants = [Variant(name, Competitor("", calls.ours(case, name))) for name in names]
    return variants + [Variant("", competitor) for competitor in found], absent


# The first whole call


def _start(
    case: Case, mode: str, variant: Variant, verdict: Verdict, device: torch.device
) -> Measured:
    """A variant before its first call, with the reason where it gets none."""
    peer = variant.competitor
    status = verdict.status
    if status == "ok":
        status = _shortage(case, peer, device) or status
    m = Measured(case, mode, variant.backend, peer.peer, status, peer.note, call=peer.call)
    m.error, m.error_of = verdict.error, verdict.error_of
    return m


def _first_call(
    m: Measured, inputs: Inputs, competitor: Competitor, exact: Outputs, device: torch.device
) -> None:
    kept: Outputs = {}
    call = _timed(m, inputs)

    def first() -> None:
        start = time.perf_counter()
        kept.update(calls.named(m.case, call()))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        m.first_seconds = time.perf_counter() - start

    try:
        if competitor.fixed_shape:
            call()  # compiles, outside of the measured memory
        m.peak_bytes = timing.peak_growth(first, device)
    except Exception as error:
        m.status = f"failed: {first_line(error)}"
        return
    gradients = [value for name, value in kept.items() if name.startswith("grad.")]
    m.gradient_bytes = sum(g.numel() * g.element_size() for g in gradients)
    _compare_whole(m, kept, exact, competitor.fixed_shape)


def _compare_whole(m: Measured, kept: Outputs, exact: Outputs, is_only_check: bool) -> None:
    """The per-row outputs of the whole call on the rows of which fp64 is known."""
    known = [name for name in ("logps", "entropy") if name in kept and name in exact]
    rows = {name: kept[name][: len(exact[name])] for name in known}
    if not rows:
        return
    error, of = accuracy.largest_error(rows, exact)
    if is_only_check:
        m.error, m.error_of = error, f"{of} (rows alone)"
    elif m.backend and not error <= 2 * m.error + 1e-5:
        m.status = f"wrong: {of} of the whole call is off by {error:.2g}"


def _shortage(case: Case, competitor: Competitor, device: torch.device) -> str:
    """Why this call would not fit into memory, or ''."""
    if not competitor.views_held or case.sizes is None:
        return ""
    views = competitor.views_held * case.sizes.views / 3 if case.op.endswith("loss") else 2
    needs = views * case.sizes.rows * case.sizes.vocabulary * 4
    free = free_memory(device)
    if needs < 0.8 * free:
        return ""
    return f"not run: needs about {needs / 2**30:.0f} GiB, {free / 2**30:.0f} free"


def _too_long(case: Case, variant: Variant, budget: Budget, ceilings: Ceilings, mode: str) -> str:
    """Why nobody would wait for torch's own matrix products here, or ''."""
    if case.sizes is None or not case.sizes.hidden or variant.backend not in ("", "reference"):
        return ""
    products = case.sizes.views * (1 if mode == "forward" else 3)
    unit = 2.0 * case.sizes.rows * case.sizes.vocabulary * case.sizes.hidden
    rate = ceilings.gemm(case.dtype) * 1e12
    seconds = products * unit / rate
    if seconds < budget.limit:
        return ""
    return (
        f"not run: about {seconds / 60:.0f} min at torch's {rate / 1e9:.2g} GFLOP/s in {case.dtype}"
    )
