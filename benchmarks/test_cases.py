"""pytest-benchmark over the same cases: `pytest benchmarks/ [--cases small]`.

Each of our backends and eager PyTorch is one benchmark of its case and mode; what `cppo bench`
refuses to time (a result that breaks the accuracy law) fails here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from cppo.benchmarks import accuracy, calls, harness
from cppo.benchmarks.cases import Case, cases
from cppo.benchmarks.inputs import restorer
from cppo.benchmarks.run import BUDGETS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = metafunc.config.getoption("cases")
    found = [(case, mode) for case in cases(shapes, DEVICE) for mode in case.modes]
    names = [f"{case.name} {mode}" for case, mode in found]
    metafunc.parametrize(("case", "mode"), found, ids=names, scope="module")
    metafunc.parametrize("variant", ["cppo", "eager"])


@lru_cache(maxsize=1)
def _prepared(case: Case, shapes: str) -> tuple[Any, list[Any]]:
    variants, _ = harness.variants_of(case, DEVICE, harness.Selection(("eager",)))
    inputs = case.make(DEVICE)
    _, verdicts = accuracy.check(case, inputs, variants, BUDGETS[shapes].check_rows)
    assert all(verdict.status == "ok" for verdict in verdicts.values()), verdicts
    return inputs, variants


def test_case(case: Case, mode: str, variant: str, benchmark: Any, request: Any) -> None:
    inputs, variants = _prepared(case, request.config.getoption("cases"))
    chosen = [v for v in variants if bool(v.backend) == (variant == "cppo")]
    if not chosen:
        pytest.skip(f"no fast backend of {case.op} runs here")
    call = calls.timed(case, mode, inputs, chosen[0].competitor.call)
    if case.sizes is not None and case.sizes.inplace:
        result = benchmark.pedantic(call, setup=restorer(inputs), rounds=3)
    else:
        result = benchmark(call)
    assert calls.named(case, result)
