"""Measures one case: first what is right, then how fast, each variant on the same inputs.

1. On a part of the inputs every backend of ours is held to the accuracy law of `cppo.testing`
   against fp64, outputs and gradients; a backend that breaks it is reported and never timed.
   Peers are not judged: their error against fp64 stands beside their time.
2. The first whole call is compared with the same fp64 results on those rows: what only goes wrong
   at full size (offsets, tails) is seen here.
3. Peak memory of one whole call.
4. Times, interleaved; then, when all cases had their turn, in further passes: what disturbs a
   shared machine for minutes is not in each of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cppo import backends, reference
from cppo.benchmarks import peers, timing
from cppo.benchmarks.cases import Case
from cppo.benchmarks.ceilings import Ceilings
from cppo.benchmarks.inputs import Inputs, part_of, restorer
from cppo.benchmarks.peers import Competitor
from cppo.records import Views
from cppo.testing import assert_as_accurate, in_fp64

Outputs = dict[str, Tensor]
_RESERVE = 2**32  # bytes


@dataclass(frozen=True)
class Budget:
    """How much is spent on a case.

    seconds: of timing for each variant and mode in a pass. quick: a call of fewer seconds is not
    slow. rounds: at least so many samples; of slow calls three, of those longer than 10 s two.
    passes: over the cases none of whose calls is slow. check_rows: rows on which fp64 is computed.
    patience: of a call longer than this many seconds the first is the only sample. limit: what is
    expected to take longer is not run at all.
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
    """What is kept of the samples of a pass, in milliseconds.

    Not the samples: their lists would lie between the blocks that the timed calls take and free,
    and with every pass these would find fewer gaps of their size.
    """

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
    call: Callable[[Inputs], Any] | None = None

    @property
    def variant(self) -> str:
        return self.backend or self.peer

    @property
    def count(self) -> int:
        return sum(each.samples for each in self.passes)

    def ms(self, percentile: str = "p50") -> float:
        """A percentile of a pass, its interquartile mean over the passes.

        A shared machine is fast in one pass and slow in another; a median over the passes would be
        of whichever of the two happened once more often, and a mean of one freak among them.
        """
        if not self.passes:
            return math.nan
        found = sorted(getattr(each, percentile) for each in self.passes)
        quarter = len(found) // 4
        return fmean(found[quarter : len(found) - quarter])


@dataclass(frozen=True)
class Variant:
    """One of our backends, or a peer (its name is then in the competitor)."""

    backend: str
    competitor: Competitor

    @property
    def name(self) -> str:
        return self.backend or self.competitor.peer


def measure(
    case: Case,
    device: torch.device,
    budget: Budget,
    ceilings: Ceilings,
    against: tuple[str, ...] = peers.NAMES,
    only_backends: tuple[str, ...] = (),
    modes: tuple[str, ...] = (),
    on_result: Callable[[Measured], None] = lambda measured: None,
) -> Iterator[Measured]:
    """Everything about one case; `on_result` hears of each variant when its memory is known."""
    variants, absent = variants_of(case, device, against, only_backends)
    inputs = case.make(device)
    restore = restorer(inputs)
    chosen = [m for m in case.modes if m in modes] or case.modes
    too_long = {v.name: _too_long(case, v, budget, ceilings, chosen[-1]) for v in variants}
    judged = {name: (reason, math.nan, "") for name, reason in too_long.items() if reason}
    todo = [v for v in variants if v.name not in judged]
    exact = check(case, inputs, todo, budget, judged, chosen[-1])
    for mode in chosen:
        results = []
        for variant in variants:
            measured = _first_call(case, mode, inputs, variant, exact, judged, device)
            restore()
            results.append(measured)
            on_result(measured)
        _time([m for m in results if m.status == "ok"], inputs, budget, device, restore)
        yield from results
        for name, reason in absent.items():
            yield Measured(case, mode, "", name, status=reason)
        timing.return_freed_memory()


def measure_again(known: Sequence[Measured], device: torch.device, budget: Budget) -> bool:
    """Another pass over one case, added to what is known of it; False where calls are slow."""
    timed_before = [m for m in known if m.passes]
    if not timed_before or max(m.ms() for m in timed_before) > 1e3 * budget.quick:
        return False
    case = timed_before[0].case
    inputs = case.make(device)
    restore = restorer(inputs)
    for mode in case.modes:
        members = [m for m in timed_before if m.mode == mode]
        _time(members, inputs, budget, device, restore)
    return True


def _timed(m: Measured, inputs: Inputs) -> timing.Call:
    assert m.call is not None
    return timed(m.case, m.mode, inputs, m.call)


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
    calls = {name: _timed(m, inputs) for name, m in quick.items()}
    rounds = {name: budget.rounds_of(m.first_seconds) for name, m in quick.items()}
    if device.type == "cpu":
        timing.reserve_memory(_reserve(members))
    for name, call in calls.items():
        if quick[name].first_seconds < budget.quick:  # the first call finds caches and memory cold
            call()
            restore()
    samples = timing.time_interleaved(calls, budget.seconds, rounds, device, restore)
    for name, m in quick.items():
        m.passes.append(Pass.of(samples[name]))


def _reserve(members: Sequence[Measured]) -> int:
    """Memory with which no call of these needs new pages; at most a quarter of what is free."""
    needed = 4 * max((m.peak_bytes or 0 for m in members), default=0)
    return min(_RESERVE, needed, timing.free_memory() // 4)


def variants_of(
    case: Case, device: torch.device, against: tuple[str, ...], only: tuple[str, ...] = ()
) -> tuple[list[Variant], dict[str, str]]:
    """Our backends and the peers of `against` that run here, and why other peers do not."""
    found, absent = peers.competitors(case, device, against)
    ours = _backends(case, device, only)
    return ours + [Variant("", competitor) for competitor in found], absent


def _backends(case: Case, device: torch.device, only: tuple[str, ...]) -> list[Variant]:
    """Ours, the fastest first. Not without being asked: the interpreter, and the specification
    where something faster runs."""
    names = backends.available(case.op, device)
    if only:
        names = [name for name in names if name in only]
    else:
        names = [n for n in names if n != "triton" or device.type != "cpu"]
        names = [n for n in names if n != "reference" or (len(names) == 1 and case.sizes)]
    return [Variant(name, Competitor("", _ours(case, name))) for name in names]


def _ours(case: Case, backend: str) -> Callable[[Inputs], Any]:
    return lambda inputs: case.run(inputs, backend)


# Calls


def _leaves(inputs: Inputs) -> tuple[Inputs, dict[str, Tensor]]:
    """The inputs with fresh leaves in place of what gradients flow to, and these leaves."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, value: Tensor) -> Tensor:
        leaves[name] = value.detach().requires_grad_()
        return leaves[name]

    fresh = dict(inputs)
    for name in ("logits", "hidden", "weight"):
        value = inputs.get(name)
        if isinstance(value, Views):
            fields = zip(value._fields, value, strict=True)
            views: list[Any] = [x if x is None else leaf(f"{name}.{f}", x) for f, x in fields]
            fresh[name] = Views(*views)
        elif isinstance(value, Tensor):
            fresh[name] = leaf(name, value)
    return fresh, leaves


def _upstream(name: str, value: Tensor, rows: int) -> Tensor:
    """The gradient that arrives at an output: gradients of the inputs are then of order one."""
    if name == "loss":
        return torch.full_like(value, float(rows))
    # Different at every row, the same in every dtype and for every variant.
    index = torch.arange(value.numel(), device=value.device, dtype=torch.float64)
    phase = index + (0.5 if name == "entropy" else 0.0)
    return torch.cos(phase).view(value.shape).to(value.dtype)


def run(case: Case, mode: str, inputs: Inputs, call: Callable[[Inputs], Any]) -> Outputs:
    """One call with its gradients ("both") or without autograd ("forward"), as it is timed."""
    if mode == "forward":
        with torch.no_grad():
            return peers.named(case, call(inputs))
    fresh, leaves = _leaves(inputs)
    outputs = peers.named(case, call(fresh))
    differentiable = {k: v for k, v in outputs.items() if v.requires_grad}
    if "loss" in differentiable:
        differentiable = {"loss": differentiable["loss"]}
    rows = inputs["targets"].numel()
    gradients = torch.autograd.grad(
        list(differentiable.values()),
        list(leaves.values()),
        [_upstream(name, value, rows) for name, value in differentiable.items()],
        allow_unused=True,
    )
    outputs = {name: value.detach() for name, value in outputs.items()}
    for name, gradient in zip(leaves, gradients, strict=True):
        outputs[f"grad.{name}"] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return outputs


def timed(case: Case, mode: str, inputs: Inputs, call: Callable[[Inputs], Any]) -> timing.Call:
    """What the clock runs for."""
    if case.sizes is None:
        return lambda: call(inputs)
    return lambda: run(case, mode, inputs, call)


# Correctness


Judged = dict[str, tuple[str, float, str]]


def check(
    case: Case,
    inputs: Inputs,
    variants: list[Variant],
    budget: Budget,
    judged: Judged,
    mode: str = "both",
) -> Outputs:
    """The fp64 results on a part of the inputs; `judged` gets (status, error, of which output)."""
    part = inputs
    if case.sizes is None:
        mode = "forward"
    else:
        part = part_of(inputs, max(2, budget.check_rows // case.sizes.length))
    specification, restore = _ours(case, "reference"), restorer(part)
    exact = run(case, mode, in_fp64(part), specification)
    with _summed_in_fp32():
        eager = run(case, mode, part, specification)
    timing.return_freed_memory()  # what fp64 took is several times what any call takes
    for variant in variants:
        if variant.competitor.fixed_shape:
            continue
        restore()
        try:
            outputs = run(case, mode, part, variant.competitor.call)
        except Exception as error:
            judged[variant.name] = (f"failed: {_line(error)}", math.nan, "")
            continue
        status = "ok"
        if variant.backend:
            status = _law(outputs, eager, exact)
        judged[variant.name] = (status, *largest_error(outputs, exact))
    restore()
    return exact


@contextmanager
def _summed_in_fp32() -> Iterator[None]:
    """The reference's bf16 products by fp32 sums rounded once, which is what a bf16 GEMM gives.

    torch's own takes minutes on a CPU without bf16 instructions.
    """

    def linear(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None = None
    ) -> Tensor:
        if hidden.dtype != torch.bfloat16 or hidden.device.type != "cpu" or softcap is not None:
            return whole(hidden, weight, bias, softcap)
        logits = torch.nn.functional.linear(hidden.float(), weight.float()).to(hidden.dtype)
        return logits if bias is None else logits.float() + bias

    whole, reference._linear = reference._linear, linear
    try:
        yield
    finally:
        reference._linear = whole


def _law(outputs: Outputs, eager: Outputs, exact: Outputs) -> str:
    """'ok', or the first output that breaks the accuracy law."""
    try:
        for name in exact:
            if exact[name].dtype.is_floating_point:
                assert_as_accurate(name, outputs[name], eager[name], exact[name])
            elif not torch.equal(outputs[name].cpu(), exact[name].cpu()):
                return f"wrong: {name} differs"
    except (AssertionError, KeyError) as error:
        return f"wrong: {_line(error)}"
    return "ok"


def largest_error(outputs: Outputs, exact: Outputs) -> tuple[float, str]:
    """max|x - exact| / max|exact| of the worst output, and its name; inf where not finite."""
    worst, of = 0.0, ""
    for name in outputs.keys() & exact.keys():
        truth = exact[name].double()
        if truth.numel() == 0:
            continue
        difference = (outputs[name].double() - truth).abs().max()
        scale = truth.abs().max().clamp(min=1e-30)
        error = float(difference / scale)
        error = math.inf if math.isnan(error) else error
        if error > worst or not of:
            worst, of = error, name
    return worst, of


def _first_call(
    case: Case,
    mode: str,
    inputs: Inputs,
    variant: Variant,
    exact: Outputs,
    judged: Judged,
    device: torch.device,
) -> Measured:
    competitor = variant.competitor
    status, error, of = judged.get(variant.name, ("ok", math.nan, ""))
    result = Measured(case, mode, variant.backend, competitor.peer, status, competitor.note)
    result.error, result.error_of, result.call = error, of, competitor.call
    if status != "ok":
        return result
    if shortage := _shortage(case, competitor, device):
        result.status = shortage
        return result
    kept: Outputs = {}
    call = timed(case, mode, inputs, competitor.call)

    def first() -> None:
        start = time.perf_counter()
        kept.update(peers.named(case, call()))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        result.first_seconds = time.perf_counter() - start

    try:
        if competitor.fixed_shape:
            call()  # compiles, outside of the measured memory
        result.peak_bytes = timing.peak_growth(first, device)
        if not kept:
            first()
    except Exception as error_:
        result.status = f"failed: {_line(error_)}"
        return result
    gradients = [value for name, value in kept.items() if name.startswith("grad.")]
    result.gradient_bytes = sum(g.numel() * g.element_size() for g in gradients)
    _compare_whole(result, kept, exact, competitor.fixed_shape)
    return result


def _compare_whole(result: Measured, kept: Outputs, exact: Outputs, is_only_check: bool) -> None:
    """The per-row outputs of the whole call on the rows of which fp64 is known."""
    rows: Outputs = {
        name: kept[name][: len(exact[name])]
        for name in ("logps", "entropy")
        if name in kept and name in exact
    }
    if not rows:
        return
    error, of = largest_error(rows, exact)
    if is_only_check:
        result.error, result.error_of = error, f"{of} (rows alone)"
    elif result.backend and not error <= 2 * result.error + 1e-5:
        result.status = f"wrong: {of} of the whole call is off by {error:.2g}"


def _shortage(case: Case, competitor: Competitor, device: torch.device) -> str:
    """Why this call would not fit into memory, or ''."""
    if not competitor.views_held or case.sizes is None:
        return ""
    views = competitor.views_held * case.sizes.views / 3 if case.op.endswith("loss") else 2
    needs = views * case.sizes.rows * case.sizes.vocabulary * 4
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = timing.free_memory()
    if needs < 0.8 * free:
        return ""
    return f"not run: needs about {needs / 2**30:.0f} GiB, {free / 2**30:.0f} free"


def _too_long(
    case: Case, variant: Variant, budget: Budget, ceilings: Ceilings, mode: str = "both"
) -> str:
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


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:160]
