"""Every metric, worked out anew from the completions of a run: docs/metrics.md in numbers."""

import pytest
import torch
from metric_cases import (
    assert_metrics,
    expected_entropy,
    expected_perception_share,
    noise,
    recorded_run,
)
from test_distributed import launch
from trainer_cases import image, trainer_for

from cppo.train.metrics import Largest, Mean, Total, over_processes


@pytest.mark.parametrize("reduction", ["grpo", "dapo", "dr_grpo"])
def test_metrics_of_a_text_run(tmp_path, reduction):
    # With this seed some completions begin with a vowel.
    options = dict(
        reduction=reduction, max_tokens_per_microbatch=60, max_completion_tokens=9, seed=1
    )
    told = recorded_run(tmp_path, **options)
    assert len(told["steps"]) == 2
    for row, step in zip(told["history"], told["steps"], strict=True):
        assert_metrics(row, [step])
        assert row["entropy"] == pytest.approx(expected_entropy([step], reduction), rel=1e-5)
        # The second reward function does not apply to every completion.
        assert 0 < sum(own["text"][:1] in "aeiou" for own in step["completions"]) < 16


@pytest.mark.parametrize("gating", [True, False])
def test_perception_tokens_are_counted_among_those_that_look(tmp_path, gating):
    rows = [{"prompt": [{"role": "user", "content": f"What is {i}?"}]} for i in range(2)]
    rows += [{**row, "images": [image(48, 48, i)]} for i, row in enumerate(rows)]
    options = dict(gating=gating, rows=rows, batch_size=16, rewards=[noise], reward_weights=(1.0,))
    told = recorded_run(tmp_path, "qwen2_5_vl", **options, max_steps=1, prune_rate=0.0)
    (step,), (row,) = told["steps"], told["history"]
    blind = [own for own in step["completions"] if not own["images"]]
    assert len(blind) == 8 and any(own["advantage"] > 0 for own in blind)
    assert step["selected"] > 0
    assert row["perception_share"] == pytest.approx(expected_perception_share([step], gating))


@pytest.mark.slow
def test_metrics_of_two_processes(tmp_path):
    launch("torchrun", tmp_path, "metrics")
    told = [torch.load(tmp_path / "metrics" / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for step, row in enumerate(told[0]["history"]):
        both = [own["steps"][step] for own in told]
        assert_metrics(row, both)
        assert row["entropy"] == pytest.approx(expected_entropy(both, "dr_grpo"), rel=1e-5)
        share = expected_perception_share(both, gating=True)
        assert row["perception_share"] == pytest.approx(share)
        lengths = [max(own["tokens"] for own in step["completions"]) for step in both]
        assert row["completion/max_tokens"] == max(lengths)


class Together:
    """Stands for the processes of a run: what they have, seen by one of them."""

    def __init__(self, *parts):
        self.parts = list(parts)

    def gather(self, own):
        return self.parts


def test_a_mean_over_processes_is_no_mean_of_means():
    first = {"a": Mean(2.0, 4), "b": Total(3.0), "c": Largest(5.0), "d": Mean(0.0, 0)}
    second = {"a": Mean(6.0, 1), "b": Total(4.0), "c": Largest(2.0), "e": Mean(7.0, 2)}
    combined = over_processes(first, Together(first, second))
    # What only one process knows counts; a mean of nothing is left out.
    assert combined == {"a": 8 / 5, "b": 7.0, "c": 5.0, "e": 3.5}


def test_rewards_that_differ_by_their_rounding_are_equal(tmp_path):
    def almost(completions, **columns):
        return [0.1 + 0.2 if i % 2 else 0.3 for i in range(len(completions))]

    trainer = trainer_for(tmp_path, rewards=almost, max_steps=1)
    row = trainer.train()
    assert row["reward/zero_variance_share"] == 1.0 and row["grad_norm"] == 0.0
