"""The TRL adapter where rows do not divide: over processes, over micro-batches."""

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")

from launching import torchrun
from trainer_cases import relative_difference, weights_of
from trl_cases import HALF, logged, watched_run
from trl_split_groups import CASES, METRICS, PRUNED, run


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_questions_that_lie_on_several_processes_train_like_on_one(processes, tmp_path):
    torchrun("trl_split_groups.py", str(tmp_path), processes=processes)
    for name in CASES:
        one, seen = run(name, 1)
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert relative_difference(found["weights"], weights_of(one.model)) < 1e-6, name
        for metric in METRICS:
            expected = logged(one, metric)
            assert found["metrics"][metric] == pytest.approx(expected, rel=2e-4), (name, metric)
        # Every process runs as many rows as every other, in each micro-batch.
        assert all(each == found["micro"][0] for each in found["micro"]), name


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "sapo"])
def test_kept_rows_that_do_not_divide_are_filled_up_not_dropped(loss_type):
    options = dict(loss_type=loss_type, num_iterations=1, max_steps=1, family="text")
    whole, _ = watched_run(cppo=PRUNED, **options)
    parts = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    filled, seen = watched_run(cppo=PRUNED, **parts, **options)
    assert relative_difference(weights_of(filled.model), weights_of(whole.model)) < 1e-6
    assert logged(filled, "cppo/kept_share") == [0.25] == logged(whole, "cppo/kept_share")
    (rollout,) = seen["rollouts"]
    assert rollout["cppo_weight"].tolist() == [2, 2, 0, 0]
    assert not rollout["advantages"][2:].any() and not rollout["tool_mask"][2:].any()
    assert rollout["advantages"][:2].all() and rollout["tool_mask"][:2].all()
    tokens = rollout["completion_mask"]
    assert rollout["num_items_in_batch"] == tokens[:2].sum() < tokens.sum()
    assert [len(micro["advantages"]) for micro in seen["micro"]] == [1, 1, 1, 1]
    assert logged(filled, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4, abs=1e-6)
    assert torch.tensor(logged(filled, "entropy")).isfinite().all()


def test_rows_that_divide_are_not_filled():
    _, seen = watched_run(cppo=HALF)
    assert all("cppo_weight" not in rollout for rollout in seen["rollouts"])
    assert all("tool_mask" not in rollout for rollout in seen["rollouts"])
