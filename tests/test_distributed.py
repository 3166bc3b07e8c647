"""Two gloo processes do what one does, and neither waits for the other in vain."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_cases import relative_difference, weights_of
from two_processes import FAMILIES, dealt, updated

from cppo.train.checkpoint import checkpoints
from cppo.train.progress import read_metrics

SCRIPT = str(Path(__file__).with_name("two_processes.py"))
BIN = Path(sys.executable).parent
# With --cpu accelerate starts one process, whatever --num_processes says; --multi_gpu starts them
# all, and without a GPU they run on gloo.
LAUNCHERS = {
    "accelerate": [
        str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1",
        "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
    ],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"],
}  # fmt: skip


def launch(launcher, folder, *parts, processes=2):
    """Runs parts of the script on some processes; fails with what they said."""
    for part in parts:
        (folder / part).mkdir()
    command = [str(processes) if word == "2" else word for word in LAUNCHERS[launcher]]
    done = subprocess.run(
        [*command, SCRIPT, str(folder), *parts],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch("accelerate", folder, "update", "deal", "train", "uneven")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_update_like_one(launched, tmp_path, family):
    trainer, metrics, _ = updated(tmp_path, family, range(4))
    expected = weights_of(trainer.model)
    two = torch.load(launched / "update" / f"{family}.pt", weights_only=True)
    assert relative_difference(two["weights"], expected) < 1e-6
    start = updated.__globals__["tiny"](family, dtype=torch.float64)[0].state_dict()
    assert max((expected[n] - start[n]).abs().max().item() for n in expected) > 1e-3
    for name in ("loss", "policy_loss", "kl", "entropy", "grad_norm", "clip_fraction"):
        assert two["metrics"][name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-9), name
    if family != "text":
        assert metrics["cpl_loss"] > 0
        for name in ("cpl_loss", "perception_share"):
            assert two["metrics"][name] == pytest.approx(metrics[name], rel=1e-5), name


@pytest.mark.slow
def test_optimizer_steps_are_dealt_the_same_completions(launched, tmp_path):
    expected = weights_of(dealt(tmp_path, range(4)).model)
    two = torch.load(launched / "deal" / "weights.pt", weights_only=True)
    assert relative_difference(two, expected) < 1e-9


@pytest.mark.slow
def test_four_processes_with_uneven_shares_update_like_one(tmp_path):
    # One process sampled three questions, one a single one, two none at all.
    launch("accelerate", tmp_path, "update", processes=4)
    trainer, metrics, batch = updated(tmp_path / "one", "text", range(4))
    four = torch.load(tmp_path / "update" / "text.pt", weights_only=True)
    assert relative_difference(four["weights"], weights_of(trainer.model)) < 1e-6
    for name in ("loss", "policy_loss", "kl", "entropy", "grad_norm", "clip_fraction"):
        assert four["metrics"][name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-9), name
    before, after = four["tokens"]
    total = sum(batch.lengths(batch.kept))
    assert before[2:] == [0, 0] and sum(before) == sum(after) == total
    # A question is the smallest thing that moves: each process has one now, in one piece.
    assert max(after) < 0.5 * total < max(before)
    assert four["groups"] == [[[0, 1, 2, 3]]] * 4


@pytest.mark.slow
def test_a_run_on_two_processes(launched):
    ranks = [json.loads((launched / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["sum"] == ranks[1]["sum"]
    for first, second in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True):
        # 8 completions to train on of 16 sampled: two questions of four on each process.
        assert len(first) == len(second) == 8
        groups = [own[i : i + 4] for own in (first, second) for i in (0, 4)]
        assert all(len(set(group)) == 1 for group in groups)
        assert len({group[0] for group in groups}) == 4
    rows = read_metrics(launched / "train")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1]["tokens/sampled"] == pytest.approx(16 * rows[1]["completion/tokens"])
    assert "eval/sampled/noise" in rows[0]
    assert [path.name for path in checkpoints(launched / "train")] == ["checkpoint-000002"]
    assert len((launched / "train" / "completions.jsonl").read_text().splitlines()) == 4
    assert len(list((launched / "train").rglob("events.out.*"))) == 2  # scalars and options


@pytest.mark.slow
def test_processes_with_nothing_to_learn_or_shares_that_do_not_divide(launched):
    told = json.loads((launched / "uneven" / "uneven.json").read_text())
    assert told["words"] == [
        "cppo.CPPOTrainer: questions must divide evenly over the processes, got 3 over 2"
    ]
    assert [row["kept_share"] for row in told["one"]] == [0.5, 0.5]
    assert all(row["grad_norm"] > 0 for row in told["one"])
    assert [row["kept_share"] for row in told["none"]] == [0, 0]
    assert [row["loss"] for row in told["none"]] == [0, 0]
    # Both draw once more for the one that got nothing: the other one fills the batch.
    assert [row["kept_share"] for row in told["filled"]] == [8 / 16] * 2
    assert all(row["grad_norm"] > 0 for row in told["filled"])
