"""The paired study: what is left to run, how a run becomes a row, and what the rows say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cppo.benchmarks import report
from cppo.benchmarks.environment import device_name
from cppo.benchmarks.experiments import study
from cppo.benchmarks.experiments.study import (
    CPL,
    METHODS,
    Cell,
    Options,
    append,
    config_of,
    plan,
    run_cell,
)
from cppo.benchmarks.experiments.study_report import (
    Curve,
    best_coefficient,
    bootstrap,
    compared,
    curves,
    in_words,
    paired,
    plot,
    summary,
)
from cppo.demo.tasks import TASKS
from cppo.demo.warmup import CHECKPOINTS


def row(method, seed, accuracies, seconds, task="digits"):
    steps = range(0, 10 * len(accuracies), 10)
    return {
        **{"task": task, "method": method, "seed": str(seed), "misread": "0.75"},
        **{f"accuracy_{step}": str(a) for step, a in zip(steps, accuracies, strict=True)},
        **{f"seconds_{step}": str(s) for step, s in zip(steps, seconds, strict=True)},
    }


# What is run


def test_a_plan_is_paired_and_leaves_out_what_is_done():
    rows = [{"task": "digits", "method": "GRPO", "seed": "3", "device": device_name()}]
    cells = plan(["digits", "shortcut"], [3, 4], ["GRPO", "pruning"], rows)
    assert cells == [
        Cell("digits", 3, ("pruning",)),
        Cell("shortcut", 3, ("GRPO", "pruning")),
        Cell("digits", 4, ("GRPO", "pruning")),
        Cell("shortcut", 4, ("GRPO", "pruning")),
    ]
    rows += [rows[0] | {"method": "pruning"}]
    assert plan(["digits"], [3], ["GRPO", "pruning"], rows) == []


def test_what_another_processor_began_is_run_as_a_whole():
    begun = {"task": "digits", "method": "GRPO", "seed": "3", "device": "Another, 1 of 4 threads"}
    methods = ["GRPO", "pruning"]
    assert plan(["digits"], [3], methods, [begun]) == [Cell("digits", 3, ("GRPO", "pruning"))]
    assert plan(["digits"], [3], methods, [begun, begun | {"method": "pruning"}]) == []
    here = begun | {"device": device_name().partition(",")[0] + ", 7 of 8 threads"}
    assert plan(["digits"], [3], methods, [here]) == [Cell("digits", 3, ("pruning",))]


def test_the_best_coefficient_is_planned_once_it_is_known():
    tuned = [
        row(name, seed, [0.3, accuracy], [0, 1])
        for name, both in zip(CPL, [(0.5, 0.7), (0.6, 0.8), (0.9, 0.1)], strict=True)
        for seed, accuracy in zip((100, 101), both, strict=True)
    ]
    assert best_coefficient(tuned, "digits", CPL) == (CPL[1],)
    assert best_coefficient(tuned, "shortcut", CPL) == ()
    assert best_coefficient(tuned[:-1], "digits", CPL) == ()  # one has fewer seeds
    assert CPL[1] not in plan(["digits"], [0], [], [])[0].methods
    (cell,) = plan(["digits"], [0], [], tuned)
    assert cell.methods == (*study.PLAN["digits"], CPL[1])


# What a method changes beside its coefficient of CPL.
CHANGES: dict[str, dict[str, Any]] = {
    "pruning": {},
    "PODS": {"prune": "variance", "advantages_of": "kept"},
    "unbiased pruning": {"prune": "unbiased"},
    "VPPO": {"perception": "vppo", "negative_views": ("masked_patches",)},
    "PAPO": {"perception": "papo", "negative_views": ("masked_patches",)},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_differ_from_grpo_in_what_they_name_alone(method):
    base, config = (config_of("digits", name, 5, 40) for name in ("GRPO", method))
    assert (base.prune_rate, base.loss.cpl_coef, base.seed, base.max_steps) == (0, 0, 5, 40)
    changes = dict(CHANGES.get(method, {}))
    perception = changes.pop("perception", "cpl")
    prunes = method in ("pruning", "PODS", "unbiased pruning")
    if prunes:  # a quarter of the same 256 completions
        changes |= {"prune_rate": 0.75, "batch_size": 64}
    coefficient = float(method.split()[1]) if method in CPL else 0.0
    loss = study.replace(base.loss, cpl_coef=coefficient, perception=perception)
    assert config == study.replace(base, loss=loss, **changes)


def test_runs_are_paired_and_are_not_repeated(tmp_path, monkeypatch):
    # A start that is as good as the task's own, without its warm-up.
    monkeypatch.setattr(study, "start_of", lambda task, seed, folder: CHECKPOINTS / "digits")
    options = Options(tmp_path / "study.csv", tmp_path, steps=2, eval_every=1, held_out=24)
    run_cell(Cell("digits", 0, ("GRPO", "CPL 0.2")), options)
    run_cell(Cell("digits", 0, ("GRPO",)), options)
    first, other, again = report.read(options.rows)
    assert [own["method"] for own in (first, other, again)] == ["GRPO", "CPL 0.2", "GRPO"]
    accuracies = [f"accuracy_{step}" for step in (0, 1, 2)]
    # Another method before it changes nothing of a run.
    assert [first[name] for name in accuracies] == [again[name] for name in accuracies]
    assert first["accuracy_0"] == other["accuracy_0"]
    # The first step has a learning rate of 0.
    assert first["accuracy_0"] == first["accuracy_1"] != first["accuracy_2"]
    assert 0 == float(first["seconds_0"]) < float(first["seconds_1"]) < float(first["seconds_2"])
    assert 0 <= float(first["misread"]) <= 1
    assert first["held_out"] == "24" and first["commit"] and first["torch"]
    assert plan(["digits"], [0], ["GRPO", "CPL 0.2"], report.read(options.rows)) == []


def test_a_warm_up_is_made_once_for_its_settings(tmp_path, monkeypatch):
    made = []

    def warm_up(task, seed):
        made.append((task, seed))
        return TASKS[task].build(seed)

    monkeypatch.setattr(study, "warm_up", warm_up)
    first = study.start_of("arithmetic", 1, tmp_path)
    assert study.start_of("arithmetic", 1, tmp_path) == first and (first / "config.json").is_file()
    assert study.start_of("arithmetic", 2, tmp_path) != first
    shorter = study.replace(TASKS["arithmetic"], phases=TASKS["arithmetic"].phases[:1])
    monkeypatch.setitem(study.TASKS, "arithmetic", shorter)
    assert study.start_of("arithmetic", 1, tmp_path) != first
    assert made == [("arithmetic", 1), ("arithmetic", 2), ("arithmetic", 1)]
    assert len(list(tmp_path.iterdir())) == 3


def test_rows_of_other_settings_are_refused(tmp_path):
    path = tmp_path / "new" / "study.csv"
    for seed in (1, 2):
        append(path, {"seed": seed, "steps": 9, "held_out": 4000, "accuracy_9": 0.5})
    lines = ["seed,steps,held_out,accuracy_9", "1,9,4000,0.5", "2,9,4000,0.5"]
    for wrong in (
        {"seed": 3, "steps": 9, "held_out": 400, "accuracy_9": 0.5},
        {"seed": 3, "steps": 8, "held_out": 4000, "accuracy_8": 0.5},
    ):
        with pytest.raises(ValueError, match="study.csv has runs of 9 steps and 4000 questions; "):
            append(path, wrong)
    assert path.read_text().splitlines() == lines


# What is reported


def test_differences_by_hand():
    # The method takes half of the time: it ends when GRPO is at step 10, between 0.5 and 0.7.
    runs = {0: np.array([30.0, 50, 70]), 1: np.array([40.0, 60, 60])}
    base = Curve(runs, np.array([0, 10, 20]), 0)
    runs = {1: np.array([40.0, 50, 55]), 2: np.array([0.0, 0, 0])}
    method = Curve(runs, np.array([0, 6, 12]), 0)
    steps, time = paired(method, base)
    assert steps.tolist() == [-5] and time.tolist() == [-5]  # seed 1 alone has both
    steps, time = paired(base, method)
    assert steps.tolist() == [5] and time.tolist() == [5]
    base.accuracy[1][0] += 1  # another start: not a pair
    assert paired(method, base)[0].size == 0
    faster = Curve({0: np.array([30.0, 66, 66])}, np.array([0, 2, 15]), 0)
    steps, time = paired(faster, base)
    assert steps.tolist() == [-4] and time.tolist() == [6]  # 66 where GRPO is at 60


def test_bootstrap_by_hand():
    assert bootstrap(np.array([2.0, 2, 2])) == (2, 2, 2)
    # Means of two draws of {0, 1} are 0, 1/2, 1 with 1/4, 1/2, 1/4.
    assert bootstrap(np.array([0.0, 1])) == (0.5, 0, 1)
    # Of four draws of {0, 0, 0, 1} at most two are 1 in 94.9 % of all cases, three in 99.6 %.
    assert bootstrap(np.array([0.0, 0, 0, 1])) == (0.25, 0, 0.75)
    normal = np.random.default_rng(1).normal(1, 2, 400)
    _, low, high = bootstrap(normal)
    standard_error = normal.std() / 20
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error, rel=0.05)


@pytest.fixture
def rows():
    found = [row("GRPO", seed, [0.3, 0.5 + seed / 50], [0, 10]) for seed in range(4)]
    found += [row("pruning", seed, [0.3, 0.5 + seed / 50], [0, 5]) for seed in range(4)]
    shifts = (0.010, 0.012, 0.014, 0.016)
    found += [row("PODS", i, [0.3, 0.48 + i / 50 + x], [0, 5]) for i, x in enumerate(shifts)]
    return [*found, row("CPL 0.2", 0, [0.3, 0.9], [0, 20]), row("CPL 0.2", 100, [0, 0], [0, 1])]


def test_what_an_unfinished_study_says(rows):
    assert set(compared(curves(rows)["digits"])) == {"pruning", "PODS"}  # two seeds at least
    table, verdict = summary(rows).split("\n\n")
    _, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    by_method = {line[1]: line[2:] for line in lines}
    assert by_method["GRPO"][2:] == ["100 %", "10", "30.0", "53.0", "75 %", "4"]
    # The faster one ends when GRPO has half of its rise, 11.5 points on average, before it.
    assert by_method["pruning"][0] == "0.0 (0.0 to 0.0)"
    assert by_method["pruning"][1].startswith("**+11.5 (")
    assert by_method["pruning"][2:4] == ["50 %", "5"]
    assert by_method["PODS"][0] == "**-0.7 (-0.9 to -0.5)**"
    assert by_method["CPL 0.2"][4:6] == ["30.0", "90.0"]  # not those of the tuning seed
    assert verdict == (
        "`digits`: At equal steps PODS is below GRPO; pruning is not told apart from GRPO (± 0.2 "
        "points at most). At equal time pruning and PODS are above GRPO (± 1.2 points at most)."
    )


def test_the_points_of_a_method_in_a_text(rows, tmp_path, monkeypatch):
    rows = [*rows, *({**own, "task": "print"} for own in rows)]
    assert in_words(rows, "PODS", "steps") == "-0.7 and -0.7"
    assert in_words(rows, "pruning", "steps") == "0.0 and 0.0"
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.write(tmp_path / "study.csv", rows)
    place = "<!-- paired: study; pruning; time -->"
    assert report.rendered(f"{place}?<!-- /paired -->") == f"{place}+11.5 and +11.5<!-- /paired -->"


def test_the_newest_run_of_a_seed_counts(rows):
    again = row("PODS", 3, [0.3, 0.9], [0, 5])
    runs = curves([*rows, again])["digits"]["PODS"].accuracy
    assert [seed for seed in runs if runs[seed][-1] == 90] == [3] and len(runs) == 4


def test_without_grpo_nothing_is_compared(rows):
    table, *verdicts = summary([own for own in rows if own["method"] == "pruning"]).split("\n\n")
    assert table.splitlines()[2:] == ["| digits | pruning |  |  |  | 5 | 30.0 | 53.0 | 75 % | 4 |"]
    assert not verdicts


def test_the_figure_is_small(rows, tmp_path):
    pytest.importorskip("matplotlib")
    plot(rows, tmp_path / "study.png")
    assert 5_000 < (tmp_path / "study.png").stat().st_size < 100_000
