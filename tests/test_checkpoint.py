"""Checkpoints are whole or not there, and a resumed run is the run that was not interrupted."""

import shutil
from pathlib import Path

import pytest
import torch
from trainer_cases import same, text_rows, trainer_for, weights_of

from cppo.options.trainer import LoraConfig
from cppo.train.checkpoint import checkpoints, last_checkpoint, read_state, write_checkpoint
from cppo.train.progress import read_metrics
from cppo.train.sealed import CheckpointError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("run")
    trainer_for(folder, save_every=1).train()
    return folder


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_what_was_half_written_is_not_there(copied):
    whole = last_checkpoint(copied)
    hidden = copied / ".checkpoint-000003.partial"
    shutil.copytree(whole, hidden)
    torn = copied / "checkpoint-000009"  # a folder of another program, or copied by hand
    shutil.copytree(whole, torn)
    (torn / "trainer.json").unlink()
    assert last_checkpoint(copied) == whole
    trainer = trainer_for(copied, save_every=1, max_steps=3)
    trainer.train(resume_from="auto")
    assert trainer.step == 3 and len(trainer.history) == 3
    assert not hidden.exists()
    assert last_checkpoint(copied).name == "checkpoint-000003"


def test_a_torn_line_of_metrics_and_rows_after_the_checkpoint_go(copied):
    metrics, completions = copied / "metrics.jsonl", copied / "completions.jsonl"
    expected = metrics.read_text()
    with metrics.open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    written = completions.read_text()
    with completions.open("a") as file:
        file.write('{"step": 3, "completion": "x"}\n{"st')
    assert [row["step"] for row in read_metrics(copied)] == [1, 2, 3]
    trainer_for(copied, save_every=1).train(resume_from="auto")
    assert metrics.read_text() == expected and completions.read_text() == written


def test_auto_without_a_checkpoint_starts_afresh(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "of": "an older run"}\n')
    trainer.train(resume_from="auto")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    assert "loss" in read_metrics(tmp_path)[0]


def test_going_on_from_an_older_checkpoint(copied):
    """The newest checkpoint written is not the one that is dropped."""
    trainer = trainer_for(copied, save_every=1, keep_checkpoints=1, max_steps=2)
    older = checkpoints(copied)[0]
    expected = (last_checkpoint(copied) / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="checkpoint-000002, which is later than checkpoint-0000"):
        trainer.train(resume_from=older)
    trainer.train(resume_from=older, overwrite=True)
    assert (last_checkpoint(copied) / "model.safetensors").read_bytes() == expected
    assert [path.name for path in checkpoints(copied)] == ["checkpoint-000002"]


def test_writing_never_drops_what_was_just_written(tmp_path):
    def save(folder):
        (folder / "weights").write_text("x")

    for step in (5, 6, 2):
        write_checkpoint(tmp_path, step, save, {"step": step}, {"metric": None}, 2)
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["2", "5", "6"]
    # The same step again replaces the old one.
    write_checkpoint(tmp_path, 6, save, {"step": 6, "again": 1}, {"metric": 0.5}, 2)
    assert read_state(last_checkpoint(tmp_path)) == {"step": 6, "again": 1}
    assert not list(tmp_path.glob(".*"))


def test_a_failure_while_writing_leaves_the_older_ones(copied):
    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    before = checkpoints(copied)
    with pytest.raises(CheckpointError, match="step 3 could .*No space left.*checkpoint-000002$"):
        write_checkpoint(copied, 3, fail, {}, {"metric": None}, 1)
    assert checkpoints(copied) == before and not list(copied.glob(".checkpoint*"))


@pytest.mark.parametrize("where", ["", "nowhere", "checkpoint-000001/model.safetensors"])
def test_resuming_from_something_that_is_no_checkpoint(copied, where):
    trainer = trainer_for(copied)
    with pytest.raises(ValueError, match="is not a checkpoint of cppo .it has no trainer.json"):
        trainer.train(resume_from=copied / where)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(seed=1), r"changed: seed \(was 0, is 1\)$"),
        (dict(prune_rate=0.5), r"changed: prune_rate \(was 0.0, is 0.5\)$"),
        (dict(tau=0.2, group_size=8), r"group_size \(was 4, is 8\), loss.tau \(was 0.1, is 0.2\)$"),
        (dict(lora=LoraConfig()), r"changed: lora.alpha \(was None, is 32\), "),
        (dict(trackers=(), betas=(0.9, 0.99)), r"betas \(was .*0.999.*, is .*0.99\]?\)?'?\)$"),
    ],
)
def test_resuming_with_other_options(run, changes, words):
    with pytest.raises(ValueError, match=r"must be resumed with the options .*" + words):
        trainer_for(run, **changes).train(resume_from="auto")


def test_what_may_change_when_resuming(copied):
    moved = copied.rename(copied.with_name("moved"))
    trainer = trainer_for(
        moved, max_steps=3, eval_every=2, eval_samples=2, eval_greedy=False, save_every=3,
        keep_checkpoints=5, best_metric="sampled/reward", log_every=2, log_completions=0,
        trackers=("tensorboard",), eval_rows=text_rows(1),
    )  # fmt: skip
    trainer.train(resume_from="auto")
    assert trainer.step == 3


def test_perturbations_given_as_functions_can_be_saved(tmp_path):
    def grey(pixels, generator):
        return pixels.mean(0, keepdim=True).expand_as(pixels)

    from cppo.views import BlackSquares

    options = dict(positive_views=(grey,), negative_views=(BlackSquares(),), max_steps=1)
    trainer_for(tmp_path, "qwen2_vl", **options).train()
    trainer_for(tmp_path, "qwen2_vl", **{**options, "max_steps": 2}).train(resume_from="auto")
    other = {**options, "negative_views": ("zoom_crop",)}
    with pytest.raises(ValueError, match="changed: negative_views"):
        trainer_for(tmp_path, "qwen2_vl", **other).train(resume_from="auto")


@pytest.mark.gpu  # and of a CPU where there is no GPU: a trainer takes the device that is there
def test_a_run_with_deterministic_algorithms_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options = dict(precision="bf16", save_every=2, keep_checkpoints=2, num_iterations=2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = trainer_for(tmp_path, max_steps=4, **options)
        whole.train()
        rest = trainer_for(tmp_path / "rest", max_steps=4, **options)
        rest.train(resume_from=tmp_path / "checkpoint-000002")
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(weights_of(rest.model), weights_of(whole.model))
    assert rest.history[-1]["loss"] == whole.history[-1]["loss"]
