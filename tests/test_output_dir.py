"""One folder, one run: what is refused, what --overwrite removes, and what it leaves alone."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from cppo import cli
from cppo.train.checkpoint import checkpoints
from cppo.train.output_dir import Claim, claim_output_dir
from cppo.train.progress import read_metrics

RECIPE = str(Path(__file__).parents[1] / "recipes" / "digits.yaml")
TINY = (
    "data.train.limit=8 data.eval.limit=2 trainer.batch_size=2 trainer.group_size=4 "
    "trainer.prune_rate=0.5 trainer.max_completion_tokens=4 trainer.warmup_steps=0 "
    "trainer.eval_every=0 trainer.eval_greedy=false trainer.log_every=1"
).split()
OF_A_RUN = (
    *("metrics.jsonl", "completions.jsonl", "metrics.partial", "config.yaml", "eval.csv"),
    *("held_out.jsonl", "run.jsonl", "held_out.partial", "run.partial", "report.partial"),
    *("summary.json", "report.html", "cppo/events.out.tfevents.17.host.1.0", "cppo/hparams.yml"),
    *("predictions_math_test.jsonl", "predictions_math_test.jsonl.partial"),
    "predictions_math_test.jsonl.new",
    *("cppo/1700.5/events.out.tfevents.17.host.1.1", ".checkpoint-000009.partial/model"),
)
NOT_OF_A_RUN = (
    *(
        "notes.txt",
        "config.yml",
        "data.csv",
        "checkpoint-last/x",
        "checkpoints/a",
        "cppo/backends.py",
    ),
    *("cppo/demo/hparams.json", "checkpoint-500/trainer_state.json", "sub/metrics.jsonl"),
)


def checkpoint(run, step):
    folder = run / f"checkpoint-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "trainer.json").write_text(json.dumps({"step": step, "metric": None}))
    return folder


def fill(run, names):
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text('{"step": 1}\n')


def files(run):
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return found - {".lock"}


def test_an_empty_or_absent_folder_is_free(tmp_path):
    for folder in (tmp_path, tmp_path / "new", str(tmp_path / "a" / "b")):
        for resume_from in (None, "auto"):
            for overwrite in (False, True):
                claim = claim_output_dir(folder, resume_from, overwrite=overwrite)
                assert claim == Claim(Path(folder))
    assert not files(tmp_path) and not (tmp_path / "new").exists()


def test_a_folder_without_a_run_is_free_and_keeps_its_files(tmp_path):
    """An evaluation before training, a configuration of one's own, an empty metrics.jsonl."""
    fill(tmp_path, ("eval.csv", "config.yaml", *NOT_OF_A_RUN))
    (tmp_path / "metrics.jsonl").touch()
    for overwrite in (False, True):
        assert claim_output_dir(tmp_path, overwrite=overwrite) == Claim(tmp_path)


def test_a_run_is_refused_by_its_checkpoints_or_its_rows(tmp_path):
    fill(tmp_path, ("metrics.jsonl",))
    with pytest.raises(ValueError, match="already holds a run without a checkpoint .*: resume it"):
        claim_output_dir(tmp_path)
    assert claim_output_dir(tmp_path, "auto") == Claim(tmp_path)  # it begins again
    checkpoint(tmp_path, 20), checkpoint(tmp_path, 100)
    with pytest.raises(ValueError, match=f"output_dir {tmp_path} already holds checkpoint-000100"):
        claim_output_dir(tmp_path)
    assert claim_output_dir(tmp_path, "auto").start == tmp_path / "checkpoint-000100"


def test_overwriting_removes_what_a_run_writes_and_nothing_else(tmp_path):
    fill(tmp_path, (*OF_A_RUN, *NOT_OF_A_RUN))
    elsewhere = tmp_path.parent / f"{tmp_path.name}_elsewhere"
    fill(elsewhere, ("model.safetensors",))
    (checkpoint(tmp_path, 5) / "model.safetensors").write_text("")
    shutil.copy(tmp_path / "checkpoint-000005" / "trainer.json", elsewhere)
    (tmp_path / "checkpoint-000006").symlink_to(elsewhere)
    claim = claim_output_dir(tmp_path, overwrite=True)
    assert claim.start is None and set(OF_A_RUN) <= files(tmp_path)  # nothing has happened yet
    claim.clear()
    assert files(tmp_path) == set(NOT_OF_A_RUN)
    assert not checkpoints(tmp_path) and files(elsewhere) == {"model.safetensors", "trainer.json"}
    assert claim_output_dir(tmp_path) == Claim(tmp_path)
    claim.clear()  # a second time is no error


def test_a_run_without_a_checkpoint_is_overwritten_too(tmp_path):
    fill(tmp_path, ("metrics.jsonl", "cppo/events.out.tfevents.1", "mine.txt"))
    claim_output_dir(tmp_path, "auto", overwrite=True).clear()
    assert files(tmp_path) == {"mine.txt"}


def test_an_earlier_checkpoint_does_not_go_on_beside_the_later_ones(tmp_path):
    early, late = checkpoint(tmp_path, 10), checkpoint(tmp_path, 50)
    fill(tmp_path, OF_A_RUN)
    words = "already holds checkpoint-000050, which is later than checkpoint-000010"
    with pytest.raises(ValueError, match=words):
        claim_output_dir(tmp_path, early)
    claim = claim_output_dir(tmp_path, str(early), overwrite=True)
    assert claim == Claim(tmp_path, early, (late,))
    assert claim_output_dir(tmp_path, late) == Claim(tmp_path, late)
    assert claim_output_dir(tmp_path, late, overwrite=True) == Claim(tmp_path, late)


def test_a_checkpoint_of_another_run_needs_a_free_folder(tmp_path):
    other, here = checkpoint(tmp_path / "other", 10), tmp_path / "here"
    assert claim_output_dir(here, other) == Claim(here, other)
    own = checkpoint(here, 30)
    with pytest.raises(ValueError, match="already holds checkpoint-000030"):
        claim_output_dir(here, other)
    assert claim_output_dir(here, other, overwrite=True) == Claim(here, other, (own,))


def test_what_is_no_folder_or_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir must be a folder, got the file .*/file"):
        claim_output_dir(tmp_path / "file")
    for name in ("nowhere", "file", "."):
        with pytest.raises(ValueError, match="is not a checkpoint of cppo"):
            claim_output_dir(tmp_path / "new", tmp_path / name)


def test_what_the_system_refuses_is_said(empty_folder, capsys):
    Path("run/config.yaml").mkdir(parents=True)
    train = ["train", RECIPE, *TINY, "trainer.max_steps=1"]
    assert cli.main([*train, "trainer.output_dir=run"]) == 2
    error = capsys.readouterr().err
    assert "output_dir run cannot be written to (Is a directory: run/config.yaml)" in error
    assert cli.main([*train, f"trainer.output_dir={'n' * 300}"]) == 2
    assert "cannot be written to (File name too long" in capsys.readouterr().err
    assert cli.main(["eval", "n" * 300]) == 2
    assert "cannot be read (File name too long)" in capsys.readouterr().err


@pytest.mark.parametrize("needed", [".", "inner", "../checkpoint-000007"])
def test_what_a_run_needs_is_never_removed(tmp_path, needed):
    folder = checkpoint(tmp_path, 7)
    (folder / "inner").mkdir()
    with pytest.raises(ValueError, match="is needed, overwriting"):
        claim_output_dir(tmp_path, overwrite=True, needed=[folder / needed])
    assert claim_output_dir(tmp_path, overwrite=True, needed=[tmp_path, "a/hub"]).old == (folder,)


def test_train_overwrites_and_evaluates_the_new_run(empty_folder, capsys):
    train = ["train", RECIPE, *TINY, "trainer.output_dir=run", "trainer.save_every=1"]
    train += ["trainer.trackers=[tensorboard]"]
    assert cli.main([*train, "trainer.max_steps=3"]) == 0
    assert cli.main(["eval", "run"]) == 0
    Path("run/mine.txt").touch()
    events = {path.name for path in Path("run/cppo").rglob("events*")}
    capsys.readouterr()

    assert cli.main([*train, "trainer.max_steps=1"]) == 2
    words = "go on with --resume, start anew with --overwrite, or choose another"
    assert f"already holds checkpoint-000003: {words}" in capsys.readouterr().err
    # A mistake costs nothing of the run that is there.
    assert cli.main([*train, "--overwrite", "model={path: no/such/model}"]) == 2
    weights = [*train, "--overwrite", "model={path: run/checkpoint-000003}"]
    assert cli.main(weights) == 2
    assert "run/checkpoint-000003 is needed" in capsys.readouterr().err
    assert [path.name for path in checkpoints("run")][-1] == "checkpoint-000003"

    assert cli.main([*train, "--overwrite", "trainer.max_steps=1"]) == 0
    assert [path.name for path in checkpoints("run")] == ["checkpoint-000001"]
    assert [row["step"] for row in read_metrics("run")] == [0, 1]
    assert {row["step"] for row in map(json.loads, open("run/completions.jsonl"))} == {1}
    assert not events & {path.name for path in Path("run/cppo").rglob("events*")}
    assert not Path("run/eval.csv").exists() and Path("run/mine.txt").exists()
    assert cli.main(["eval", "run"]) == 0
    assert "run/checkpoint-000001 on 2 questions" in capsys.readouterr().out


def test_an_evaluation_stays_beside_the_run_that_it_measured(empty_folder, capsys):
    """A run that was copied since is evaluated into its own folder, not into the original's."""
    train = ["train", RECIPE, *TINY, "trainer.output_dir=run", "trainer.max_steps=1"]
    assert cli.main(train) == 0
    shutil.copytree("run", "elsewhere/copy")
    assert cli.main(["eval", "elsewhere/copy"]) == 0
    assert cli.main(["eval", "elsewhere/copy/checkpoint-000001"]) == 0
    assert not Path("run/eval.csv").exists()
    with open("elsewhere/copy/eval.csv", newline="") as file:
        assert {row["model"] for row in csv.DictReader(file)} == {
            "elsewhere/copy/checkpoint-000001"
        }
    capsys.readouterr()
    Path("other.csv").write_text("name,value\na,1\n")
    assert cli.main(["eval", "run", "--csv", "other.csv"]) == 2
    assert "other.csv has other columns than `cppo eval` writes" in capsys.readouterr().err
    assert Path("other.csv").read_text() == "name,value\na,1\n"


def test_a_demo_does_not_go_on_in_the_folder_of_another(tmp_path, capsys):
    folder = tmp_path / "demo"
    demo = ["demo", "--task=arithmetic", "--held-out=4", f"--output={folder}"]
    assert cli.main([*demo, "--steps=2"]) == 0
    capsys.readouterr()
    assert cli.main([*demo, "--steps=1"]) == 2
    error = capsys.readouterr().err
    assert "already holds checkpoint-000002: go on with --resume and the same options" in error
    assert cli.main([*demo, "--steps=1", "--overwrite", f"--start={folder}/checkpoint-000002"]) == 2
    assert "is needed" in capsys.readouterr().err
    # Over a run of another task, whose configuration would describe the new one wrongly.
    assert cli.main([*demo, "--steps=1", "--overwrite"]) == 0
    assert json.loads((folder / "summary.json").read_text())["held-out questions"] == 4
    assert cli.main(["eval", str(folder), "--checkpoint", "last"]) == 0
    assert "checkpoint-000001 on 4 questions" in capsys.readouterr().out
