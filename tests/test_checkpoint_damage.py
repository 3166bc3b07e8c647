"""Every file of a checkpoint, damaged in every way: refused with its name, and a way out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from trainer_cases import same, trainer_for, weights_of

from cppo import cli
from cppo.options.trainer import CPPOConfig, LoraConfig
from cppo.train.checkpoint import (
    best_checkpoint,
    check_files,
    checkpoints,
    last_checkpoint,
    recover,
    write_checkpoint,
)
from cppo.train.progress import read_metrics
from cppo.train.run_options import check_options, run_options
from cppo.train.sealed import CheckpointError, read_summary

CASES = {
    "text": {},
    "vision": {"family": "qwen2_5_vl", "prune_rate": 0.5},
    "lora": {"lora": LoraConfig(r=2, alpha=4)},
}
DAMAGES = ("gone", "empty", "cut", "first bit", "last bit", "another step", "another run")


def run_of(folder, case, **options):
    trainer_for(folder, save_every=1, max_steps=2, **{**CASES[case], **options}).train()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """For every case a run with two checkpoints, and another one that began with other weights."""
    folder = tmp_path_factory.mktemp("runs")
    for case in CASES:
        run_of(folder / case / "run", case)
        run_of(folder / case / "other", case, seed=1)
    return folder


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def copied(runs, case, tmp_path):
    return Path(shutil.copytree(runs / case, tmp_path / "runs")) / "run"


def files_of(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def damage(file, how):
    """Damages a file of the newest checkpoint; False if that leaves it as it was."""
    before = file.read_bytes()
    other = {"another step": file.parents[1] / "checkpoint-000001" / file.name}
    other["another run"] = file.parents[2] / "other" / file.parent.name / file.name
    if how == "gone":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "cut":
        file.write_bytes(before[: len(before) // 2])
    elif how.endswith("bit"):
        flip(file, 0 if how == "first bit" else len(before) - 1)
    else:
        shutil.copy(other[how], file)
    return not file.is_file() or file.read_bytes() != before


@pytest.mark.parametrize("how", DAMAGES)
def test_every_damage_is_refused_with_the_file_and_a_way_out(copied, case, how):
    newest, older = last_checkpoint(copied), checkpoints(copied)[0]
    backup = copied.parent / "backup"
    shutil.copytree(newest, backup)
    names = [path.relative_to(newest) for path in files_of(newest)]
    assert {"trainer.json", "trainer.pt"} < set(map(str, names))
    tried = 0
    for name in names:
        shutil.rmtree(newest)
        shutil.copytree(backup, newest)
        if not damage(newest / name, how):
            continue
        if how == "last bit" and name.suffix == ".json" and _reads_the_same(newest / name, backup):
            continue  # the line's end: another space is the same content of trainer.json
        tried += 1
        if how == "gone" and name.name == "trainer.json":
            continue  # a folder half copied: test_what_stops_nothing
        with pytest.raises(CheckpointError) as refused:
            check_files(newest)
        words = str(refused.value)
        # A whole trainer.json of another run disagrees with everything beside it.
        assert str(newest / name) in words or f"in {name}" in words, (name, words)
        assert f"newest whole checkpoint beside it is {older}" in words, (name, words)
    assert tried >= 2


def _reads_the_same(file, backup):
    if file.name != "trainer.json":
        return False
    try:
        return json.loads(file.read_bytes()) == json.loads((backup / file.name).read_bytes())
    except ValueError:
        return False


def test_every_bit_of_the_summary_counts(copied):
    summary = last_checkpoint(copied) / "trainer.json"
    whole = summary.read_bytes()
    content = json.loads(whole)
    for place in range(0, len(whole), 7):
        flip(summary, place)
        try:
            assert read_summary(summary.parent) == content, place
        except CheckpointError as error:
            assert str(summary) in str(error)
        summary.write_bytes(whole)


def test_a_run_and_an_evaluation_say_it(copied, case, capsys):
    newest, older = last_checkpoint(copied), checkpoints(copied)[0]
    weights = next(newest.glob("*model.safetensors"))
    flip(weights, weights.stat().st_size // 2)
    trainer = trainer_for(copied, max_steps=3, save_every=1, **CASES[case])
    with pytest.raises(CheckpointError, match=f"{weights} is damaged.*is {older}: resume from"):
        trainer.train(resume_from="auto")
    again = trainer_for(copied, max_steps=3, save_every=1, **CASES[case])
    again.train(resume_from=older, overwrite=True)
    assert [row["step"] for row in read_metrics(copied)] == [1, 2, 3]


def test_what_stops_nothing(copied, case, capsys):
    newest, older = last_checkpoint(copied), checkpoints(copied)[0]
    half = copied / "checkpoint-000007"
    shutil.copytree(newest, half)
    (half / "trainer.json").unlink()
    (older / "trainer.json").write_text("")
    with (copied / "completions.jsonl").open("ab") as file:
        file.write(b'{"step": 1, "comp\n5\n\xff\xfe\n{"step": "x"}\n')
    trainer = trainer_for(copied, max_steps=3, save_every=1, **CASES[case])
    with pytest.warns(UserWarning, match="checkpoint-000001/trainer.json is damaged"):
        trainer.train(resume_from="auto")
    assert trainer.step == 3
    said = " ".join(capsys.readouterr().out.split())
    assert f"{half} is left alone: it is half copied (it has no trainer.json)" in said
    assert last_checkpoint(copied).name == "checkpoint-000003"
    assert older.is_dir() and half.is_dir()  # what cannot be read is not removed either


def test_a_checkpoint_of_before_is_loaded_strictly(copied, case):
    """Without the sizes a missing tensor, a missing config and a torn archive are still found."""
    from safetensors.torch import load_file, save_file

    newest = last_checkpoint(copied)
    summary = read_summary(newest)
    for name in ("files", "checksum"):
        del summary[name]
    (newest / "trainer.json").write_text(json.dumps(summary))
    trainer = trainer_for(copied, max_steps=3, **CASES[case])
    trainer.train(resume_from="auto")
    assert trainer.step == 3
    shutil.rmtree(copied / "checkpoint-000003")

    weights = next(newest.glob("*model.safetensors"))
    tensors = load_file(weights)
    whole = dict(tensors)
    name = sorted(tensors)[len(tensors) // 2]
    for change, words in (
        (lambda: tensors.pop(name), "lacks"),
        (lambda: tensors.update(surplus=torch.zeros(1)), "has besides"),
        (lambda: tensors.update({name: torch.zeros(3, 5)}), "has another shape of"),
    ):
        tensors.clear()
        tensors.update(whole)
        change()
        save_file(tensors, weights, {"format": "pt"})
        trainer = trainer_for(copied, max_steps=3, **CASES[case])
        before = {n: v.clone() for n, v in weights_of(trainer.model).items()}
        with pytest.raises(CheckpointError, match=f"{newest} are not those of this .*: {words} "):
            trainer.train(resume_from="auto")
        assert same(weights_of(trainer.model), before)
    weights.write_bytes(weights.read_bytes()[:-10])
    trainer = trainer_for(copied, max_steps=3, **CASES[case])
    with pytest.raises(CheckpointError, match=f"the weights of {newest} cannot be loaded"):
        trainer.train(resume_from="auto")
    state = newest / "trainer.pt"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{state} cannot be read"):
        trainer.train(resume_from="auto")


def test_the_best_is_of_those_that_can_be_read(tmp_path):
    for step, metric in ((1, 0.5), (2, 0.9), (3, 0.7)):
        folder = tmp_path / f"checkpoint-{step:06d}"
        folder.mkdir()
        (folder / "trainer.json").write_text(json.dumps({"step": step, "metric": metric}))
    assert best_checkpoint(tmp_path).name == "checkpoint-000002"
    (tmp_path / "checkpoint-000002" / "trainer.json").write_text("{")
    with pytest.warns(UserWarning, match="checkpoint-000002/trainer.json is damaged"):
        assert best_checkpoint(tmp_path).name == "checkpoint-000003"


def test_killed_between_two_names(copied):
    newest = last_checkpoint(copied)
    newest.rename(newest.with_name(f".{newest.name}.replaced.partial"))
    assert last_checkpoint(copied) != newest
    recover(copied)
    assert last_checkpoint(copied) == newest
    check_files(newest)


def test_an_evaluation_of_a_damaged_checkpoint(empty_folder, capsys):
    recipe = Path(__file__).parents[1] / "recipes" / "digits.yaml"
    options = (
        "data.train.limit=8 data.eval.limit=2 trainer.batch_size=2 trainer.group_size=4 "
        "trainer.max_completion_tokens=4 trainer.warmup_steps=0 trainer.eval_every=0 "
        "trainer.max_steps=1 trainer.prune_rate=0.5 trainer.output_dir=run"
    )
    assert cli.main(["train", str(recipe), *options.split()]) == 0
    weights = Path("run/checkpoint-000001/model.safetensors")
    flip(weights, weights.stat().st_size // 2)
    capsys.readouterr()
    for command in (["eval", "run"], ["eval", str(weights.parent)]):
        assert cli.main(command) == 2
        assert f"error: {weights} is damaged" in capsys.readouterr().err
    train = ["train", str(recipe), *options.split(), "--resume", "trainer.max_steps=2"]
    assert cli.main(train) == 2
    assert f"{weights} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["model.safetensors", "adapter_config.json", "sub/chat.jinja", "pytorch_model.BIN"]
)
def test_a_file_of_another_run_beside_the_checkpoint_s_own(tmp_path, name):
    """Transformers takes one whole file before the shards, and adapters wherever they are."""

    def shards(folder):
        (folder / "model-00001-of-00001.safetensors").write_bytes(b"1")
        (folder / "model.safetensors.index.json").write_text("{}")

    older, newest = (
        write_checkpoint(tmp_path, step, shards, {}, {"metric": None}, 9) for step in (1, 2)
    )
    (newest / "README.md").write_text("mine")
    (newest / "notes.txt").write_text("mine")
    for contents in (True, False):
        check_files(newest, contents=contents)
    (newest / name).parent.mkdir(exist_ok=True)
    (newest / name).write_bytes(b"2")
    words = f"{newest / name} is not of this checkpoint .*newest whole checkpoint .* is {older}"
    for contents in (True, False):
        with pytest.raises(CheckpointError, match=words):
            check_files(newest, contents=contents)


def written(folder, step):
    return write_checkpoint(folder, step, lambda _: None, {}, {"metric": None}, 9)


def test_what_stands_where_a_checkpoint_is_written_is_kept(tmp_path):
    half = tmp_path / "checkpoint-000002"
    half.mkdir()
    (half / "mine").write_text("1")
    with pytest.warns(UserWarning, match="no whole checkpoint, it is now .*000002.incomplete$"):
        written(tmp_path, 2)
    assert (tmp_path / "checkpoint-000002.incomplete" / "mine").read_text() == "1"
    shutil.rmtree(half)
    half.write_text("2")
    with pytest.warns(UserWarning, match="it is now .*000002.incomplete-2$"):
        written(tmp_path, 2)
    assert (tmp_path / "checkpoint-000002.incomplete-2").read_text() == "2"
    written(tmp_path, 2)  # a whole one is replaced as before
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000002"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_leftover_that_is_a_file_or_a_link(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / ".checkpoint-000002.partial").write_text("")
    (tmp_path / ".checkpoint-000003.partial").symlink_to(tmp_path / "mine")
    check_files(written(tmp_path, 2))
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "checkpoint-000002"}


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, "[]", "3", "{}", '{"step": true, "metric": null}', '{"step": 2}',
     '{"step": 2, "metric": "high"}', '{"step": 2, "metric": null, "files": null}'],
    ids=range(8),
)  # fmt: skip
def test_a_summary_of_another_form(tmp_path, text):
    (tmp_path / "trainer.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/trainer.json is damaged"):
        check_files(tmp_path)


@pytest.mark.parametrize("options", [{}, {"options": None}, {"options": [1]}])
def test_a_summary_without_options(tmp_path, options):
    (tmp_path / "trainer.json").write_text(json.dumps({"step": 2, "metric": None, **options}))
    with pytest.raises(CheckpointError, match=f"{tmp_path}/trainer.json is damaged: it has no opt"):
        check_options(tmp_path, run_options(CPPOConfig(), 1), {})
