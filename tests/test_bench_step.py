"""The step benchmark compares like with like: the same loss and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cppo.benchmarks import report
from cppo.benchmarks.experiments import step, step_models
from cppo.benchmarks.experiments.step_batch import make_batch

CPU = torch.device("cpu")


@pytest.mark.parametrize("model_name", ["toy", "toy-vl"])
def test_ours_without_pruning_is_the_three_view_scheme(model_name: str) -> None:
    model = step_models.build(model_name, CPU, torch.float32)
    batch = make_batch(model, questions=2, group_size=4, prompt=6, completion=9)
    step.set_attention(model, "sdpa")
    update = step.Update(model, batch, at_once=4)
    gradients = {}
    losses = {}
    for scheme in ("three views", "cppo, rate 0", "cppo"):
        model.zero_grad()
        rate = 0.5 if scheme in step.PRUNED else 0.0
        losses[scheme] = step.run_scheme(scheme, rate, update, step.Clock(CPU))
        gradients[scheme] = torch.cat([p.grad.flatten() for p in model.parameters()])
    theirs, ours = gradients["three views"], gradients["cppo, rate 0"]
    assert losses["cppo, rate 0"] == pytest.approx(losses["three views"], abs=1e-6)
    assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))
    assert not torch.allclose(gradients["cppo"], theirs, atol=1e-3 * float(theirs.abs().max()))


def test_every_phase_of_every_scheme_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    arguments = ["--model", "toy", "--prompt", "4", "--completion", "5", "--repeats", "1"]
    arguments += ["--prune-rate", "0.5", "0.75", "--device", "cpu", "--output", str(path)]
    printed: list[str] = []
    step.main(arguments, printed.append)
    written = report.read(path)
    assert [row["backend"] or row["peer"] for row in written] == 2 * list(step.SCHEMES)
    assert [row["shape"][-6:].strip() for row in written] == 5 * ["P=0.5"] + 5 * ["P=0.75"]
    assert all(scheme in printed[0] for scheme in step.SCHEMES)
    for row in written:
        phases = [float(row[f"{phase}_s"]) for phase in step.PHASES]
        assert sum(phases) == pytest.approx(float(row["step_s"]), rel=1e-2)
        assert float(row["forward_s"]) > 0 and float(row["backward_s"]) > 0
    packs = {row["backend"] or row["peer"]: float(row["pack_s"]) for row in written}
    assert packs["three views"] == 0 and packs["cppo"] > 0
    losses = {row["backend"] or row["peer"]: float(row["loss"]) for row in written}
    assert losses["cppo, rate 0"] == pytest.approx(losses["three views"], abs=1e-4)
