"""The line at the start of a command that says which backends its ops use, and why no better."""

from pathlib import Path

import pytest
import torch
from cli_cases import DIGITS, TINY

from cppo import backends
from cppo.cli import info, main, run_config
from cppo.fused import extension


def lines_of(text):
    return [line for line in text.splitlines() if line.startswith("ops: ")]


@pytest.fixture
def pure(monkeypatch):
    """As if the package had been built without torch; returns the line that says so."""
    reason = "the build found no installed torch"
    loaded = {"cpp": reason, "host": reason, "cuda": f"cppo._C is missing: {reason}"}
    monkeypatch.setattr(extension, "missing", loaded)
    missing = f"the compiled extension is missing: {reason}"
    return f"ops: reference ({missing}; see cppo info) on cpu"


def test_the_line_of_a_compiled_install():
    if extension.missing["cpp"]:
        pytest.skip(extension.missing["cpp"])
    vectors = torch.ops.cppo.row_capability()
    assert (
        info.ops_line("cpu") == info.ops_line(torch.device("cpu")) == f"ops: cpp ({vectors}) on cpu"
    )


def test_the_line_says_why_ops_are_left_to_pytorch(pure, monkeypatch):
    assert info.ops_line("cpu") == pure
    assert (
        info.ops_line("mps")
        == "ops: reference (there are no kernels for mps; see cppo info) on mps"
    )
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    none = "no cuda: cppo._C is missing: the build found no installed torch"
    packing = f"reference (for pack_completions, unpack: {none}; see cppo info)"
    assert info.ops_line("cuda:0") == f"ops: triton, {packing} on cuda"
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    both = f"no triton: triton is not installed; {none}"
    assert info.ops_line("cuda") == f"ops: reference ({both}; see cppo info) on cuda"
    monkeypatch.setattr(extension, "missing", {"cpp": "", "host": "", "cuda": ""})
    assert info.ops_line("cuda").startswith("ops: cuda, reference (for token_stats, ")
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    assert info.ops_line("cuda") == "ops: cuda, triton on cuda"


def test_the_line_obeys_the_variable(monkeypatch):
    monkeypatch.setenv("CPPO_BACKEND", "reference")
    assert info.ops_line("cpu") == "ops: reference (CPPO_BACKEND) on cpu"
    assert "CPPO_BACKEND" not in info.ops_line("cpu", obey=False)
    monkeypatch.setenv("CPPO_BACKEND", "auto")
    assert "CPPO_BACKEND" not in info.ops_line("cpu")
    for name, words in (("tritn", "must be 'auto' or one of"), ("cuda", "tensors are on cpu")):
        monkeypatch.setenv("CPPO_BACKEND", name)
        with pytest.raises(run_config.ConfigError, match=words):
            info.ops_line("cpu")


def test_train_eval_demo_and_bench_print_it_once(pure, empty_folder, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")  # it stays one line in a narrow terminal
    demo = ["demo", "--task=arithmetic", "--steps=1", "--held-out=2", "--output=demo"]
    for command in (
        ["train", DIGITS, *TINY],
        ["eval", "run"],
        demo,
        ["bench", "--shapes", "toy", "--op", "group_advantages", "--against", "none"],
    ):
        main(command)
        assert lines_of(capsys.readouterr().out) == [pure], command


def test_a_backend_that_cannot_run_is_found_before_training(empty_folder, monkeypatch, capsys):
    monkeypatch.setenv("CPPO_BACKEND", "cuda")
    assert main(["train", DIGITS, *TINY]) == 2
    assert "(from CPPO_BACKEND) cannot run here" in capsys.readouterr().err
    assert not list(Path("run").glob("*"))
