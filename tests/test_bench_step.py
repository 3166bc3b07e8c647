"""The step benchmark: the trainer's own step, and others' updates on the same completions."""

from __future__ import annotations

import dataclasses
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cppo.benchmarks import report, run
from cppo.benchmarks.experiments import step, step_models
from cppo.benchmarks.experiments.small_models import small_qwen3
from cppo.benchmarks.experiments.step_baselines import published
from cppo.records import NumItems
from cppo.train.algorithm import microbatch_loss

TOY = ["--device", "cpu", "--precision", "fp32", "--questions", "2", "--group-size", "4"]
TOY += ["--completion", "6", "--rates", "0", "0.5", "--repeats", "1"]


@pytest.fixture(autouse=True)
def threads_as_before() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("model", ["toy", "toy-vl"])
def test_the_published_update_has_the_trainers_loss_and_gradient(
    model: str, tmp_path: Path
) -> None:
    options = ["--model", model, *TOY, "--questions", "4", "--group-size", "8"]
    steps = step.Steps(step._parser().parse_args(options))
    trainer = steps.trainer(step.Way(""), str(tmp_path))
    trainer.train_step()
    batch = dataclasses.replace(trainer.batch, suppressed=())  # as published: all tokens count
    whole = NumItems(*batch.counts(batch.kept))
    output = microbatch_loss(
        trainer.model, batch, batch.kept, whole, trainer.config, trainer.processor
    )
    output.loss.backward()
    assert model == "toy" or output.metrics["cpl_loss"] > 0
    norms = [trainer.policy.optimizer_step(0)]
    own_step = trainer.policy.optimizer_step
    trainer.policy.optimizer_step = lambda step: norms.append(own_step(step))  # type: ignore
    found = published(trainer, batch)
    assert found["loss"] == pytest.approx(output.loss.item(), abs=1e-6)
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_every_way_is_a_row_and_a_run_that_was_cut_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "steps.csv"
    arguments = ["--model", "toy", *TOY, "--output", str(path)]
    printed: list[str] = []
    assert not step.main(arguments, printed.append, deadline=time.monotonic())
    assert not path.exists() and not printed
    assert step.main(arguments, printed.append)
    rows = report.read(path)
    ways = [(row["peer"], row["shape"].partition("P=")[2]) for row in rows]
    assert ways == [
        *[("", "0"), ("published", "0"), ("TRL", "0"), ("", "0.5")],
        ("", "0.5 with allocation"),
    ]
    counts = [(row["questions"], row["sampled"], row["trained"]) for row in rows]
    assert counts == [*[("2", "8", "8")] * 3, ("2", "8", "4"), ("4", "16", "8")]
    for row in rows:
        parts = [float(row[f"{name}_s"]) for name in ("rollout", "reward", "update")]
        assert min(parts[0], parts[2]) > 0
        assert sum(parts) == pytest.approx(float(row["step_s"]), rel=1e-2)
    # The same completions, whatever is pruned: the weights do not move.
    assert rows[0]["tokens_sampled"] == rows[3]["tokens_sampled"]
    table = printed[0].splitlines()
    assert len(table) == 2 + len(rows) and "| TRL |" in table[4]

    def again(*_: Any) -> None:
        raise AssertionError("it is measured already")

    monkeypatch.setattr(step.Steps, "run", again)
    assert step.main(arguments, printed.append) and printed[1] == printed[0]
    with pytest.raises(AssertionError, match="already"):
        step.main([*arguments, "--fresh"])


def test_speed_ups_are_per_question_and_the_law_has_the_share_of_what_is_no_update() -> None:
    def row(shape: str, questions: int, rollout: float, update: float, **more: str) -> report.Row:
        times = {"rollout_s": rollout, "update_s": update, "step_s": rollout + update}
        counts = {"questions": questions, "trained": 8, "tokens_sampled": 100}
        texts = {name: str(value) for name, value in {**times, **counts}.items()}
        return {"shape": f"m Q=2 {shape}", "backend": "cppo", "peer": "", **texts, **more}

    rows = [
        row("P=0", 2, 2.0, 6.0),
        row("P=0", 2, 2.0, 12.0, backend="", peer="published"),
        row("P=0.875 with allocation", 16, 16.0, 6.0),
    ]
    _, _, first, theirs, pruned = step.summary(rows).splitlines()
    assert first.split(" | ")[7:-1] == ["25 %", "50", "1.00x", "1.00x", "1.00x"]
    assert theirs.split(" | ")[10:11] == ["0.57x"]
    # 22 s for 16 questions, where 2 took 8; the law: 1 / (1/4 + 1/8 * 3/4).
    assert pruned.split(" | ")[7:] == ["73 %", "6", "8.00x", "2.91x", "2.91x", "4.89x |"]


def test_random_weights_end_their_completions_as_often_as_wanted() -> None:
    model = small_qwen3(512, end=3)
    step_models.end_after(model, 3, 8.0)
    ids = torch.randint(10, 512, (8, 220), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ends = model(ids).logits[:, 180:].softmax(-1)[..., 3]
    assert ends.mean().item() == pytest.approx(1 / 8, rel=0.15)
    assert ends.std().item() < 0.02


@pytest.mark.parametrize("vision", [False, True])
def test_a_recipes_shape_gets_a_processor_that_fits(
    vision: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, vocab_size: 5000, "
    text += "num_attention_heads: 2, num_key_value_heads: 1"
    sizes = f"{{model_type: qwen2, {text}}}"
    if vision:
        tower = (
            "depth: 1, hidden_size: 32, intermediate_size: 64, num_heads: 2, out_hidden_size: 32"
        )
        sizes = f"{{model_type: qwen2_5_vl, text_config: {{{text}}}, "
        sizes += f"vision_config: {{{tower}}}}}"
    recipe = tmp_path / "shape.yaml"
    data = "data: {train: {loader: gsm8k, path: elsewhere}}\nrewards: [gsm8k]\n"
    recipe.write_text(f"model: {{path: a/b, architecture: {sizes}}}\n{data}")
    questions = [f"How many are {i} pens and {i + 1} pens?" for i in range(8)]
    monkeypatch.setattr(step_models, "read_texts", lambda count: (questions, questions))
    monkeypatch.setattr(
        step_models, "load_gsm8k", lambda path: [{"prompt": q, "answer": "1"} for q in questions]
    )
    printed: list[str] = []
    arguments = [*TOY, "--rates", "0", "--no-trl", "--output", str(tmp_path / "rows.csv")]
    assert step.main(["--model", str(recipe), *arguments], printed.append)
    assert len(report.read(tmp_path / "rows.csv")) == 2 and "| shape Q=2" in printed[0]


def test_the_gpu_that_is_measured_is_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another one the events would time an idle stream, and peers' kernels would not run."""
    entered: list[torch.device] = []

    def enter(device: torch.device | str) -> Any:
        entered.append(torch.device(device))
        return nullcontext()

    def measured(*_: Any) -> Any:
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(run, "_Session", measured)
    monkeypatch.setattr(step, "measure", measured)
    with pytest.raises(InterruptedError):
        run.bench(run.Options(device="cuda:1"), Console())
    with pytest.raises(InterruptedError):
        step.main(["--model", "toy", "--device", "cuda:1", "--output", str(tmp_path / "rows.csv")])
    assert entered == [torch.device("cuda", 1)] * 2
