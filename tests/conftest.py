"""Shared settings: reproducible tests, and kernels whose uninitialised memory is NaN."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# A shell that starts something in the background has it ignore Ctrl-C, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton")
if INTERPRETS:
    import interpreter

    interpreter.speed_up()

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--interpret-all", action="store_true", help="every case of Triton's kernels")


def _is_not_interpreted(item: pytest.Item) -> bool:
    """Whether a case of a Triton kernel is left to compiled backends and to GPUs.

    Interpreted, a kernel takes a thousand times its time. What a dtype changes (loads, stores and
    the accumulator) is run on the random case, every other case in fp32. `interpreted` on a test
    names the cases that run: those that have been through every branch of a kernel. The ops on
    hidden states are PyTorch around the others, whatever the kernels: only named cases run.
    """
    parameters = getattr(item, "callspec", None)
    if parameters is None or parameters.params.get("backend") != "triton":
        return False
    marker = item.get_closest_marker("interpreted")
    if "linear" in parameters.params.get("op", ""):
        cases = marker.kwargs.get("linear", ()) if marker else ()
    else:
        cases = marker.args if marker else ("",)
    if not any(case in parameters.id for case in cases):
        return True
    is_random = parameters.params.get("case", "random") == "random"
    return parameters.params.get("dtype", torch.float32) != torch.float32 and not is_random


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not INTERPRETS or config.getoption("--interpret-all"):
        return
    left_out = [item for item in items if _is_not_interpreted(item)]
    config.hook.pytest_deselected(items=left_out)
    kept = {item.nodeid for item in items} - {item.nodeid for item in left_out}
    items[:] = [item for item in items if item.nodeid in kept]
    _check_that_cases_are_there(items, left_out)


def _check_that_cases_are_there(kept: list[pytest.Item], left_out: list[pytest.Item]) -> None:
    """A renamed parameter must not take a case away in silence."""
    interpreted = {item.nodeid.split("[")[0] for item in kept if "triton" in item.name}
    for item in left_out:
        test, marker = item.nodeid.split("[")[0], item.get_closest_marker("interpreted")
        named = marker is not None and (marker.args or marker.kwargs.get("linear"))
        if named and test not in interpreted:
            raise pytest.UsageError(f"{test}: interpreted names no case of this test: {marker}")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test, with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every torch.empty with NaN, so that a result that is not written shows."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    assert torch.empty(1).isnan()
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def stats_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of each call of cppo.linear_token_stats."""
    import cppo

    calls, stats = [], cppo.linear_token_stats

    def watch(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return stats(*args, **kwargs)

    monkeypatch.setattr(cppo, "linear_token_stats", watch)
    return calls


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes trainers whose engine is a stand-in for vLLM; the engines are its `made`."""
    from other_engine import trainers

    return trainers(monkeypatch)
