"""`cppo train` and `cppo eval` with a real vLLM. `tests/run_vllm.sh`."""

from __future__ import annotations

import csv
from importlib.metadata import version
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: tests/run_vllm.sh makes an environment that has it")

from cli_cases import ARITHMETIC, TINY, cppo

from cppo.cli import engines
from cppo.extras import vllm_build
from cppo.train.progress import read_metrics

VLLM = ["trainer.engine=vllm", "trainer.vllm.max_model_len=128", "trainer.vllm.check_every=1"]


def test_a_run_and_its_evaluations(tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    given = [*TINY, "trainer.max_completion_tokens=32", "data.eval.limit=16"]
    status, out, _ = cppo(capsys, "train", ARITHMETIC, *given, *VLLM)
    name, number = vllm_build() or ("", "")
    assert status == 0 and f"rollouts: vllm {number} (float32), in this process" in out
    assert engines.support()["vllm"] == f"{version(name)} ({name})"
    rows = [row for row in read_metrics("run") if "loss" in row]
    assert len(rows) == 2 and all(row["mismatch/max"] < 1e-4 for row in rows)
    for engine in ("vllm", "builtin"):
        overrides = [] if engine == "vllm" else ["trainer.engine=builtin"]
        status, out, _ = cppo(capsys, "eval", "run", "--checkpoint", "last", *overrides)
        assert status == 0 and ("rollouts: vllm" in out) == (engine == "vllm")
    with open("run/eval.csv", newline="") as file:
        greedy = [row for row in csv.DictReader(file) if row["mode"] == "greedy"]
    half = len(greedy) // 2
    assert half and greedy[:half] == greedy[half:]


def test_mistakes_are_one_line(tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for option, words in (
        ("trainer.vllm.max_model_len=16", "are more than 16: vllm.max_model_len says so"),
        ("trainer.vllm.arguments={nonsense: 1}", "unexpected keyword argument 'nonsense'"),
        ("trainer.vllm.arguments={dtype: float99}", "Input should be 'auto', 'half', "),
        ("trainer.vllm.tensor_parallel_size=2", "has one GPU each; `vllm serve --tensor"),
    ):
        status, _, err = cppo(capsys, "eval", ARITHMETIC, *TINY, "trainer.engine=vllm", option)
        (error,) = [line for line in err.splitlines() if line.startswith("cppo eval: error: ")]
        assert status == 2 and words in error, option
