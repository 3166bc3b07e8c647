"""The scripts of benchmarks/experiments run at toy size, and write nothing then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "experiments"


def _printed(script: str, folder: Path) -> list[str]:
    command = [sys.executable, str(FOLDER / script), "--smoke"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(folder.iterdir()) == []
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("script", "columns"),
    [
        ("prune_rates.py", ["prune_rate", "update_speedup", "step_speedup", "paper_speedup"]),
        ("shared_prompts.py", ["tokens_shared", "speedup", "gradient_error"]),
        ("decoding.py", ["model", "precision", "tokens_per_s"]),
    ],
)
def test_at_toy_size(script: str, columns: list[str], tmp_path: Path) -> None:
    header, rule, *rows = _printed(script, tmp_path)
    names = [name.strip() for name in header.strip("|").split("|")]
    assert set(columns) <= set(names) and rule.startswith("|---")
    table = [row for row in rows if row.startswith("|")]
    assert all(len(row.strip("|").split("|")) == len(names) for row in table)
    if script == "prune_rates.py":
        # Five rates, packed and padded, with and without allocation; at rate 0 they are the same.
        assert len(table) == 5 * 2 * 2 - 2
        assert rows[-1].startswith("padded / packed at rate 0: ")


def test_the_costs_of_reliability_at_toy_size(tmp_path: Path) -> None:
    printed = "\n".join(_printed("reliability.py", tmp_path))
    assert "save without checksums" in printed and "piece of a step" in printed


def test_the_time_of_the_host_at_toy_size(tmp_path: Path) -> None:
    printed = _printed("host_time.py", tmp_path)
    assert len(printed) == 8 and all(int(line.split()[-2]) > 0 for line in printed)


def test_sampled_completions_end_where_those_of_the_data_do() -> None:
    """`ending_like` replaces `sampler._draw`: it must still be what the decoding loop draws by."""
    from cppo.benchmarks.experiments import prune_rates, small_models

    model = small_models.load("small", 64, "cpu")
    generator = torch.Generator().manual_seed(0)
    prompts = small_models.random_prompts(torch.tensor([4, 7]), 64, generator, "cpu")
    with prune_rates.ending_like([0.0, 0.0, 1.0], model.get_input_embeddings()):
        found = prune_rates.sample_completions(
            model,
            small_models.dummy_tokenizer(),
            prompts,
            group_size=3,
            max_new_tokens=8,
            temperature=1.0,
            suppressed=(0,),
            batch_size=3,  # a question at a time: each starts at the first length again
        )
    assert [len(ids) for ids in found.completion_ids] == [3] * 6
