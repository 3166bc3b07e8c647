"""The pages on other people's loops and TRL do what they say; their examples run."""

import csv
import dataclasses
import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from trainer_cases import trainer_for

from cppo.demo.warmup import CHECKPOINTS
from cppo.options.loss import CORRECTIONS
from cppo.options.vllm import ENGINES, VLLMConfig

ROOT = Path(__file__).parents[1]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def run_example(name, argument, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, str(argument)])
    return runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def readme_block(containing):
    found = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in found if containing in block]
    return block


def rewards_in(output):
    return [float(value) for value in re.findall(r"reward:? (\d\.\d+)", output)]


def test_the_own_loop_page_is_the_example_and_learns(monkeypatch, capsys):
    (code,) = blocks("own_loop.md")
    example = (ROOT / "examples" / "own_loop.py").read_text()
    assert example.endswith(code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 70
    names = run_example("own_loop.py", 6, monkeypatch)
    rewards = rewards_in(capsys.readouterr().out)
    assert len(rewards) == 6 and sum(rewards[3:]) / 3 > rewards[0] + 0.1
    assert len(names["kept"]) == 32


def test_the_hf_trainer_page_is_the_example_and_trains(monkeypatch, capsys):
    shown, wrapper = blocks("hf_trainer.md")
    assert shown in (ROOT / "examples" / "hf_trainer.py").read_text()
    names = run_example("hf_trainer.py", 8, monkeypatch)
    assert len(rewards_in(capsys.readouterr().out)) == 1
    assert names["trainer"].state.global_step == 2

    # Wrapped for several processes: the same loss.
    exec(wrapper, names)
    inputs = names["collate"](names["rows"][:2])
    model = names["model"]
    whole = names["trainer"].compute_loss(model, dict(inputs))
    assert torch.equal(names["Policy"](model)(**inputs)["loss"], whole)
    whole.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_rollouts_example_learns_and_its_page_names_every_option(monkeypatch, capsys):
    names = run_example("rollouts.py", 4, monkeypatch)
    rewards = names["rewards"]
    words = f"reward {rewards[0]:.3f} in the first step, {rewards[3]:.3f} in the last"
    assert capsys.readouterr().out.splitlines()[-1] == words
    assert len(rewards) == 4 and sum(rewards[1:]) / 3 > rewards[0] + 0.1
    (code,) = blocks("rollouts.md")
    exec(code, names)
    assert names["config"].loss.importance_correction == "token_truncate"
    page = (ROOT / "docs" / "rollouts.md").read_text()
    quoted = set(re.findall(r"`([\w.]+)`", page)) | set(re.findall(r'`"(\w+)"`', page))
    of_vllm = {field.name for field in dataclasses.fields(VLLMConfig)}
    of_server = {"address", "transfer", "folder", "start_timeout", "request_timeout", "retries"}
    assert of_vllm - of_server <= quoted
    assert {*ENGINES, *CORRECTIONS} <= quoted


@pytest.mark.parametrize("name", ["trl_text.py", "trl_vision.py"])
def test_the_trl_examples_run(name, monkeypatch, capsys):
    pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")
    trainer = run_example(name, 1, monkeypatch)["trainer"]
    (row,) = [row for row in trainer.state.log_history if "reward" in row]
    assert row["cppo/kept_share"] == 0.25
    assert rewards_in(capsys.readouterr().out) == pytest.approx([row["reward"]], abs=1e-3)
    if name == "trl_vision.py":
        assert row["cppo/cpl_loss"] > 0 and 0 < row["cppo/gated_share"] < 1


def rows_of_table(name: str) -> list[dict[str, str]]:
    """Committed rows, of which docs/trl.md has the table."""
    pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")
    script = importlib.import_module(f"cppo.benchmarks.experiments.{name}")
    with (ROOT / "benchmarks" / "results" / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    page = (ROOT / "docs" / "trl.md").read_text()
    (printed,) = re.findall(rf"<!-- table: {name} -->\n(.*?)\n<!-- /table -->", page, re.DOTALL)
    assert printed == script.summary(rows)
    return rows


def test_the_trl_table_is_the_committed_rows():
    rows = rows_of_table("trl_update")
    pruned = [float(row["times_faster"]) for row in rows if row["variant"] == "prune 0.875"]
    assert len(pruned) == 2 and min(pruned) >= 4


def test_the_table_of_packing_is_the_committed_rows():
    faster = {
        (row["prompts"], row["variant"]): float(row["times_faster"])
        for row in rows_of_table("trl_packed")
    }
    for prompts in ("GSM8K", "pictures"):
        assert 1 < faster[prompts, "trim"] < faster[prompts, "pack"]
        assert faster[prompts, "pack"] < faster[prompts, "share prompts"]


def test_the_trl_page(tmp_path):
    pytest.importorskip("trl", reason="trl is not installed: pip install 'cppo[trl]'")
    from cppo.integrations.trl import check
    from cppo.model.load import load_model, load_processor

    usage, mixin, allocation, kernel = blocks("trl.md")
    path = CHECKPOINTS / "arithmetic"
    names = {"model": load_model(path), "processor": load_processor(path)}
    for printed, small in {
        'model="Qwen/Qwen2.5-1.5B-Instruct"': "model=model, processing_class=processor",
        "GRPOConfig(": f"GRPOConfig(output_dir={str(tmp_path)!r}, max_steps=1, use_cpu=True, "
        "bf16=False, report_to=[], save_strategy='no', max_completion_length=4, ",
    }.items():
        assert printed in usage
        usage = usage.replace(printed, small)
    exec(usage, names)
    assert names["trainer"].state.log_history[0]["cppo/kept_share"] == 0.25
    before = names["trainer"]
    exec(
        readme_block("CPPOGRPOTrainer"),
        {**names, "args": before.args, "rows": before.train_dataset},
    )
    exec(mixin, names)
    assert names["Mine"].__mro__[1].__name__ == "CPPOMixin"
    exec(allocation, names)
    if not check()[-1].fits:
        with pytest.raises(RuntimeError, match="patch_trl"):
            exec(kernel, names)
        return
    exec(kernel, names)
    names["undo"]()


def test_the_rewards_of_the_pages_work_under_both_trainers(tmp_path):
    (of_trl, *_), (own, of_template) = blocks("trl.md"), blocks("rewards.md")
    functions = []
    for code in (of_trl, own):
        names = {}
        (source,) = re.findall(r"(def reward\(.*?\n(?:    .*\n)+)", code)
        exec(source, names)
        functions.append(names["reward"])
    functions[1].__name__ = "own"
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {i} + {i}?"}], "answer": str(2 * i)}
        for i in range(4)
    ]
    metrics = trainer_for(tmp_path, rewards=functions, rows=rows, max_steps=1).train()
    assert {"reward/reward_reward", "reward/own"} <= metrics.keys()
    exec(of_template, names)
    assert names["reward"](["a thought</think>4", "4"]) == [1.0, 0.0]
