"""The README does what it says: its code runs, its tables are the committed rows."""

import inspect
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from cppo.benchmarks import report
from cppo.demo.tiny import build_tiny_text_model
from cppo.demo.warmup import CHECKPOINTS
from cppo.train.algorithm import cppo_update

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("CPPO_DATA_DIR", ROOT.parent / "shared" / "data"))
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _rollout():
    """Two questions x eight completions, as a user's trainer has them before its update."""
    model, _ = build_tiny_text_model(size="test")
    generator = torch.Generator().manual_seed(0)
    attention_mask = torch.ones(16, 12, dtype=torch.int64)
    attention_mask[:8, :3] = 0
    attention_mask[1::3, 10:] = 0
    completion_mask = attention_mask.clone()
    completion_mask[:, :5] = 0
    rewards = torch.rand(16, generator=generator)
    groups = rewards.view(2, 8)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    return {
        "model": model.train(),
        "input_ids": torch.randint(10, 100, (16, 12), generator=generator),
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        "rewards": rewards,
        "advantages": advantages.flatten(),
    }


def test_before_and_after_are_the_same_loss_when_nothing_is_pruned():
    before, after = _rollout(), _rollout()
    # The left-padded rows need positions that count from the first token, as the packed ones do.
    position_ids = (before["attention_mask"].cumsum(1) - 1).clamp(min=0)
    code = BLOCKS[0].replace("attention_mask=attention_mask", "**padded")
    padded = {"attention_mask": before["attention_mask"], "position_ids": position_ids}
    exec(code, before | {"padded": padded}, before)
    exec(BLOCKS[1].replace("prune_rate=0.75", "prune_rate=0"), after)
    assert torch.allclose(before["loss"], after["output"].loss, atol=1e-6)
    before["loss"].backward()
    for ours, theirs in zip(after["model"].parameters(), before["model"].parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_after_keeps_a_quarter_as_printed():
    after = _rollout()
    exec(BLOCKS[1], after)
    assert len(after["kept"]) == 4
    assert all(p.grad is not None for p in after["model"].parameters())


def test_the_trainer_block_runs(tmp_path):
    data = DATA / "gsm8k"
    if not data.is_dir():
        pytest.skip(f"no GSM8K files in {data} (set CPPO_DATA_DIR)")
    page = (ROOT / "docs" / "api" / "trainer.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for printed, small in {
        '"Qwen/Qwen2.5-1.5B-Instruct"': repr(str(CHECKPOINTS / "arithmetic")),
        '"gsm8k/train.parquet"': repr(str(data / "train.parquet")),
        "batch_size=64": f"batch_size=4, max_steps=1, output_dir={str(tmp_path)!r}",
        "max_completion_tokens=512": "max_completion_tokens=4",
    }.items():
        assert printed in code
        code = code.replace(printed, small)
    names = {}
    exec(code, names)
    assert names["trainer"].step == 1


def test_the_algorithm_is_shown_as_it_runs():
    shown = next(block for block in BLOCKS if "def cppo_update" in block)
    code = inspect.getsource(cppo_update).replace(f'    """{cppo_update.__doc__}"""\n', "")
    assert shown == code


@pytest.mark.parametrize("path", TEXTS, ids=[path.name for path in TEXTS])
def test_measured_numbers_are_the_committed_rows(path):
    # `python benchmarks/report.py README.md docs/*.md` writes them anew.
    assert path.read_text() == report.rendered(path.read_text())


@pytest.mark.parametrize("path", TEXTS, ids=[path.name for path in TEXTS])
def test_no_merge_left_its_marks(path):
    assert not re.search(r"^(<{7}|={7}|>{7}|\|{7})( |$)", path.read_text(), re.MULTILINE)


def test_a_changed_number_is_caught():
    row = re.search(r"-->\n\|.*\n\|.*\n.*\| (\S+) \|\n", README)
    assert row is not None
    changed = README[: row.start(1)] + "0.123" + README[row.end(1) :]
    assert report.rendered(changed) == README


def test_every_result_file_is_named_in_a_text():
    listed = ["git", "-C", str(ROOT), "ls-files", "benchmarks/results/*.csv"]
    tracked = subprocess.run(listed, capture_output=True, text=True, check=False).stdout.split()
    # A reader's own rows may lie beside the committed ones; without git there are none of them.
    results = [Path(name).name for name in tracked] or [
        path.name for path in (ROOT / "benchmarks" / "results").glob("*.csv")
    ]
    assert results
    texts = "".join(path.read_text() for path in [*TEXTS, ROOT / "CONTRIBUTING.md"])
    assert not [name for name in results if name not in texts]
