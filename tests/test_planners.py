"""plan_microbatches and balance_ranks: compiled where the extension is there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from error_cases import refused
from hypothesis import given
from hypothesis import strategies as st

import cppo
from cppo import reference

LENGTHS = st.lists(st.integers(0, 50), max_size=40)


@given(lengths=LENGTHS, spare=st.integers(0, 60))
def test_microbatches_hold_everything_once_and_fit(lengths, spare):
    max_tokens = max(lengths, default=0) + spare or 1
    plan = cppo.plan_microbatches(lengths, max_tokens)
    assert sorted(i for part in plan for i in part) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in part) for part in plan]
    assert all(total <= max_tokens for total in totals)
    # First fit leaves at most one part half empty or less.
    assert sum(2 * total <= max_tokens for total in totals) <= 1
    assert plan == reference.plan_microbatches(lengths, max_tokens)


@given(lengths=LENGTHS, world_size=st.integers(1, 9))
def test_ranks_get_equal_counts_and_similar_totals(lengths, world_size):
    ranks = cppo.balance_ranks(lengths, world_size)
    assert len(ranks) == world_size
    assert sorted(i for members in ranks for i in members) == list(range(len(lengths)))
    counts = [len(members) for members in ranks]
    assert max(counts) - min(counts) <= 1
    assert ranks == reference.balance_ranks(lengths, world_size)


DATA = Path(os.environ.get("CPPO_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))
TOKEN = re.compile(r"\d|[^\W\d]+|[^\w\s]")


@pytest.fixture(scope="module")
def gsm8k_lengths():
    """Tokens (words, digits, marks) of every question with its answer."""
    file = DATA / "gsm8k" / "train.parquet"
    if not file.exists():
        pytest.skip(f"no GSM8K files in {DATA} (set CPPO_DATA_DIR)")
    rows = pytest.importorskip("pyarrow.parquet").read_table(file)["extra_info"].to_pylist()
    return [len(TOKEN.findall(row["question"] + " " + row["answer"])) for row in rows]


@pytest.mark.parametrize("max_tokens", [2048, 4096, 8192, 16384])
@pytest.mark.parametrize("count", [256, 1024, 7473])
def test_micro_batches_of_gsm8k_are_full(gsm8k_lengths, count, max_tokens):
    lengths = gsm8k_lengths[:count]
    plan = cppo.plan_microbatches(lengths, max_tokens)
    assert sorted(i for part in plan for i in part) == list(range(count))
    fewest = -(-sum(lengths) // max_tokens)
    assert len(plan) <= 1.05 * fewest


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_get_the_same_tokens_of_gsm8k(gsm8k_lengths, world_size):
    lengths = gsm8k_lengths[:512]
    totals = [
        sum(lengths[i] for i in members) for members in cppo.balance_ranks(lengths, world_size)
    ]
    assert max(totals) <= 1.01 * sum(lengths) / world_size


def test_totals_are_closer_than_dealing_in_order():
    lengths = [1000, 10, 20, 900, 30, 40, 800, 50, 60]  # dealt in order: 2700, 90, 120
    totals = [sum(lengths[i] for i in members) for members in cppo.balance_ranks(lengths, 3)]
    assert max(totals) - min(totals) <= 200


def test_by_hand_and_from_a_tensor():
    assert cppo.plan_microbatches(torch.tensor([6, 3, 5, 4]), 10) == [[0, 3], [1, 2]]
    assert cppo.balance_ranks(torch.tensor([5, 9, 1, 4]), 2) == [[1, 2], [0, 3]]
    assert cppo.plan_microbatches([], 5) == [] and cppo.balance_ranks([], 2) == [[], []]


ERRORS = [
    (lambda: cppo.plan_microbatches([3, 9], 8), ValueError, "lengths[1] must be <= max_tokens = 8"),
    (lambda: cppo.plan_microbatches([3, -1], 8), ValueError, "lengths[1] must be >= 0, got -1"),
    (lambda: cppo.plan_microbatches([3], 0), ValueError, "max_tokens must be >= 1, got 0"),
    (lambda: cppo.plan_microbatches([3.5], 8), TypeError, "lengths[0] must be an integer"),
    (lambda: cppo.plan_microbatches([3], 8.0), TypeError, "max_tokens must be an integer"),
    (lambda: cppo.balance_ranks([3], 0), ValueError, "world_size must be >= 1, got 0"),
    (lambda: cppo.balance_ranks([-3], 1), ValueError, "lengths[0] must be >= 0, got -3"),
    (lambda: cppo.balance_ranks(["3"], 1), TypeError, "lengths[0] must be an integer, got str"),
]

test_bad_input = refused(ERRORS)
