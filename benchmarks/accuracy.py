"""Whether a variant is right: a part of its inputs against the specification in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cppo
from cppo.benchmarks import calls
from cppo.benchmarks.calls import Call, Outputs
from cppo.benchmarks.cases import Case
from cppo.benchmarks.inputs import Inputs, part_of, restorer
from cppo.benchmarks.peers import Competitor
from cppo.records import Views
from cppo.testing import assert_as_accurate, in_fp64


@dataclass(frozen=True)
class Variant:
    """One of our backends, or a peer, whose name is then in the competitor."""

    backend: str
    competitor: Competitor

    @property
    def name(self) -> str:
        return self.backend or self.competitor.peer


@dataclass(frozen=True)
class Verdict:
    """What the check on a part of the inputs found of one variant."""

    status: str = "ok"
    error: float = math.nan
    error_of: str = ""


def check(
    case: Case, inputs: Inputs, variants: Sequence[Variant], rows: int, mode: str = "both"
) -> tuple[Outputs, dict[str, Verdict]]:
    """The fp64 results on the first `rows` rows, and what they say of each variant."""
    part = inputs
    if case.sizes is None:
        mode = "forward"
    else:
        part = part_of(inputs, max(2, rows // case.sizes.length))
    restore = restorer(part)
    exact = calls.run(case, mode, in_fp64(part), calls.ours(case, "reference"))
    eager = calls.run(case, mode, part, _specification(case, part))
    verdicts = {}
    for variant in variants:
        if variant.competitor.fixed_shape:
            continue
        restore()
        try:
            outputs = calls.run(case, mode, part, variant.competitor.call)
        except Exception as error:
            verdicts[variant.name] = Verdict(f"failed: {first_line(error)}")
            continue
        status = _law(outputs, eager, exact) if variant.backend else "ok"
        verdicts[variant.name] = Verdict(status, *largest_error(outputs, exact))
    restore()
    return exact, verdicts


def _specification(case: Case, part: Inputs) -> Call:
    """The specification in the inputs' dtype.

    On a CPU without bf16 instructions torch takes minutes for a product in bf16. There logits are
    multiplied in fp32 and rounded once, which is what a bf16 GEMM gives.
    """
    if "weight" not in part or part["weight"].dtype != torch.bfloat16 or part["weight"].is_cuda:
        return calls.ours(case, "reference")

    def from_logits(inputs: Inputs) -> Any:
        rest = {k: v for k, v in inputs.items() if k not in ("hidden", "weight")}

        def logits(hidden: Tensor | None) -> Any:
            if hidden is None:
                return None
            # Here, so that the gradients of the weight add up in bf16, as those of a bf16 GEMM do.
            weight = inputs["weight"].float()
            return (hidden.float() @ weight.t()).to(hidden.dtype)

        hidden = inputs["hidden"]
        views = Views(*map(logits, hidden)) if isinstance(hidden, Views) else logits(hidden)
        op = getattr(cppo, case.op.removeprefix("linear_"))
        return op(logits=views, **rest, backend="reference")

    return from_logits


def _law(outputs: Outputs, eager: Outputs, exact: Outputs) -> str:
    """'ok', or the first output that breaks the accuracy law."""
    try:
        for name in exact:
            if exact[name].dtype.is_floating_point:
                assert_as_accurate(name, outputs[name], eager[name], exact[name])
            elif not torch.equal(outputs[name].cpu(), exact[name].cpu()):
                return f"wrong: {name} differs"
    except (AssertionError, KeyError) as error:
        return f"wrong: {first_line(error)}"
    return "ok"


def largest_error(outputs: Outputs, exact: Outputs) -> tuple[float, str]:
    """max|x - exact| / max|exact| of the worst output, and its name; inf where not finite."""
    worst, of = 0.0, ""
    for name in outputs.keys() & exact.keys():
        truth = exact[name].double()
        if truth.numel() == 0:
            continue
        difference = (outputs[name].detach().double() - truth).abs().max()
        error = float(difference / truth.abs().max().clamp(min=1e-30))
        error = math.inf if math.isnan(error) else error
        if error > worst or not of:
            worst, of = error, name
    return worst, of


def first_line(error: BaseException) -> str:
    """What fits into a status."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:160]
