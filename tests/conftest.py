"""Shared settings: reproducible tests, and kernels whose uninitialised memory is NaN."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator

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


# They call an op hundreds of times, or trace it again and again.
NOT_INTERPRETED = ("gradcheck", "any_shape", "torch_compile", "new_length", "distributed")
# The ops on hidden states are PyTorch around the ops on logits, whatever the kernels: of them these
# are run, on the random case.
LINEAR_INTERPRETED = (
    "test_accuracy[",
    "test_accuracy_of_every_option",
    "test_accuracy_in_small_tiles[triton-dtype0",
    "test_gating_and_a_masked_nan",
    "test_compact_views_equal_full_views[linear_cppo_loss-triton-both-packed]",
    "costs_less[triton-resident]",
)
# Of a test that combines what kernels do not connect (layouts, reductions, configurations) these
# cases have been through every branch of a kernel.
COMBINATIONS = {
    "test_a_number_of_items": ("triton-dr_grpo",),
    "test_parts_add_up": ("triton-grpo-token-True", "dapo-sequence-False", "dr_grpo-token-False"),
    "test_compact_views": ("both-padded", "both-packed", "negative-packed"),
    "test_packed_equals_padded[cppo_loss": ("default", "full"),
    "test_no_completion_with": ("padded-full", "packed-compact"),
    "test_in_place_gradients": ("padded-k3", "packed-detached", "compact-full", "compact-k1"),
    "test_only_the_views": ("k3-wants0", "k3-wants2", "full-wants1"),
    "test_opcheck_of_the_loss": ("k3", "full"),
    "test_opcheck_of_token_stats": ("dtype0",),
    "test_no_old_logps": ("triton-sequence",),
}


def _is_not_interpreted(item: pytest.Item) -> bool:
    """Whether a case of a Triton kernel is left to compiled backends and to GPUs.

    Interpreted, a kernel takes a thousand times its time. What a dtype changes (loads, stores and
    the accumulator) is run on the random case, every other case in fp32.
    """
    parameters = getattr(item, "callspec", None)
    if parameters is None or parameters.params.get("backend") != "triton":
        return False
    if any(word in item.name for word in NOT_INTERPRETED):
        return True
    for test, cases in COMBINATIONS.items():
        if item.name.startswith(test) and not any(case in item.name for case in cases):
            return True
    is_random = parameters.params.get("case", "random") == "random"
    linear_module = item.path.name in ("test_linear_plans.py", "test_heads.py")
    if linear_module or "linear" in parameters.params.get("op", ""):
        if not (is_random and any(name in item.name for name in LINEAR_INTERPRETED)):
            return True
    dtype = parameters.params.get("dtype", torch.float32)
    return dtype != torch.float32 and not is_random


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not INTERPRETS or config.getoption("--interpret-all"):
        return
    left_out = [item for item in items if _is_not_interpreted(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not _is_not_interpreted(item)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every torch.empty with NaN, so that a result that is not written shows."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    assert torch.empty(1).isnan()
    yield
    torch.set_deterministic_debug_mode(before)
