"""An engine with weights of its own: it has the policy's whenever it samples, or the run ends."""

from __future__ import annotations

from typing import Any

import pytest
from trainer_cases import lines, noise, same, text_rows, trainer_for, weights_of

from cppo.options.trainer import LoraConfig, VLLMConfig
from cppo.rollouts.engine import EngineError, StaleWeights
from cppo.train import engine as engines
from cppo.train.checkpoint import last_checkpoint
from cppo.train.progress import read_metrics

# A run


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl"])
@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)])
def test_given_the_same_samples_a_run_is_the_same(
    family: str, lora: Any, other: Any, tmp_path: Any
) -> None:
    """Kept completions, losses, gradients and weights: pruned, gated, allocated, several steps."""
    options: dict[str, Any] = dict(rewards=noise, prune_rate=0.5, max_steps=3, lora=lora)
    options |= dict(optimizer_steps=2, eval_rows=text_rows(2) if family == "text" else None)
    ours = other(tmp_path / "other", family, **options)
    assert ours.config.loss.importance_correction == "token_truncate"  # what vLLM has by default
    object.__setattr__(ours.config.loss, "importance_correction", "none")
    built_in = trainer_for(tmp_path / "own", family, **options)
    ours.train(), built_in.train()
    tolerance = 0 if lora is None else 1e-5  # merged adapters are rounded in another place
    rows = zip(read_metrics(tmp_path / "other"), read_metrics(tmp_path / "own"), strict=True)
    for ours_row, row in rows:
        names = {name for name in row if not name.startswith("time/")}
        assert names <= ours_row.keys()
        for name in names:
            assert ours_row[name] == pytest.approx(row[name], abs=tolerance, rel=tolerance), name
        assert "loss" not in row or ours_row["mismatch/max"] < 1e-4
    first, second = weights_of(ours.model), weights_of(built_in.model)
    assert same(first, second) if lora is None else True
    kept = [[row["kept"] for row in lines(tmp_path / d / "completions.jsonl")] for d in
            ("other", "own")]  # fmt: skip
    assert kept[0] == kept[1]


def test_weights_are_sent_when_they_have_changed(other: Any, tmp_path: Any) -> None:
    trainer = other(tmp_path, max_steps=3, eval_rows=text_rows(2), eval_every=1)
    trainer.train()
    (engine,) = other.made
    # Before the first evaluation, and after each of the three updates.
    assert engine.calls.count("sync") == 4
    assert engine.calls.count("generate") == 3 + 2 * 4  # rollouts; sampled and greedy evaluations
    trainer.evaluate()
    trainer.sample(trainer.draw_questions())
    assert engine.calls.count("sync") == 4
    assert engine.calls.count("wake") == 3 + 4 + 2 and "sleep" in engine.calls
    assert all(row["time/sync"] >= 0 for row in read_metrics(tmp_path) if "loss" in row)


def test_refills_need_no_further_sync(other: Any, tmp_path: Any) -> None:
    options: dict[str, Any] = dict(drop_zero_variance=True, max_refills=2, max_steps=1)
    trainer = other(tmp_path, rewards=lambda completions, **_: [1.0] * len(completions), **options)
    trainer.train()
    (engine,) = other.made
    assert engine.calls.count("generate") == 3 and engine.calls.count("sync") == 1


def test_a_resumed_run_sends_the_weights_of_its_checkpoint(other: Any, tmp_path: Any) -> None:
    other(tmp_path, max_steps=2, save_every=1, rewards=noise).train()
    resumed = other(tmp_path, max_steps=4, save_every=1, rewards=noise)
    resumed.train(resume_from="auto")
    assert other.made[1].calls.count("sync") == 2
    straight = other(tmp_path / "straight", max_steps=4, save_every=1, rewards=noise)
    straight.train()
    assert same(weights_of(resumed.model), weights_of(straight.model))


def test_engine_and_dtype_belong_to_a_run_and_where_it_is_does_not(
    other: Any, tmp_path: Any
) -> None:
    other(tmp_path, max_steps=1).train()
    elsewhere = VLLMConfig(address="http://elsewhere:1", arguments={"block_size": 16})
    moved_away = other(tmp_path, max_steps=2, vllm=elsewhere)
    moved_away.train(resume_from="auto")
    other(tmp_path, max_steps=3, importance_correction="token_truncate").train(resume_from="auto")
    with pytest.raises(ValueError, match="loss.importance_correction .was 'token_truncate', is"):
        other(tmp_path, importance_correction="token_mask").train(resume_from="auto")
    with pytest.raises(ValueError, match=r"vllm.dtype \(was 'auto', is 'bfloat16'\)"):
        other(tmp_path, vllm=VLLMConfig(dtype="bfloat16")).train(resume_from="auto")
    with pytest.raises(ValueError, match=r"engine \(was 'vllm', is 'builtin'\)"):
        trainer_for(tmp_path, max_steps=3).train(resume_from="auto")


def test_prompts_that_vllm_has_no_room_for_are_bad_questions(
    other: Any, tmp_path: Any, capsys: Any
) -> None:
    long = {"prompt": "How many? " * 40, "answer": "1"}
    rows, server = [*text_rows(), long], VLLMConfig(max_model_len=100)
    options: dict[str, Any] = dict(rows=rows, vllm=server, max_steps=4)
    other(tmp_path / "0", skip_bad_questions=True, **options).train()
    assert "are more than 100: vllm.max_model_len says so" in capsys.readouterr().out
    with pytest.raises(ValueError, match="are more than 100: vllm.max_model_len says so"):
        other(tmp_path / "1", **options).train()
    with pytest.raises(ValueError, match="max_completion_tokens must be below the 6 tokens"):
        other(tmp_path / "2", vllm=VLLMConfig(max_model_len=6), max_steps=1)


# Faults


@pytest.mark.parametrize("name", ["vllm", "vllm_server"])
def test_the_tolerance_is_that_of_the_engine_s_own_dtype(
    name: str, other: Any, tmp_path: Any
) -> None:
    """A server was started with its own, and `arguments` override that of VLLMConfig."""

    def trainer(dtype: str | None) -> Any:
        made = other(tmp_path / str(dtype), name=name, max_steps=1, rewards=noise)
        engine = other.made[-1]
        stock, engine.dtype = engine.sync, dtype
        engine.sync = lambda weights: stock((n, (64 * w).round() / 64) for n, w in weights)
        return made

    trainer("bfloat16").train()
    for dtype in (None, "float32"):
        with pytest.raises(EngineError, match="allowed 0.001 on average"):
            trainer(dtype).train()


def test_an_engine_that_keeps_old_weights_ends_the_run_before_it_trains(
    other: Any, tmp_path: Any
) -> None:
    trainer = other(tmp_path, max_steps=4, save_every=1, rewards=noise, learning_rate=1e-2,
                    vllm=VLLMConfig(check_every=1))  # fmt: skip
    (engine,) = other.made
    stock = trainer._run.finish_step

    def finish(metrics: Any, is_last: bool) -> None:
        engine.takes_weights = trainer.step < 2
        stock(metrics, is_last)

    trainer._run.finish_step = finish
    with pytest.raises(EngineError, match="samples from another distribution than the policy's"):
        trainer.train()
    assert trainer.step == 2 and str(last_checkpoint(tmp_path)).endswith("checkpoint-000002")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    # Nothing was trained on its completions, and the run goes on from there.
    resumed = other(tmp_path, max_steps=3, rewards=noise, learning_rate=1e-2)
    resumed.train(resume_from="auto")
    assert resumed.step == 3


def test_how_often_the_engine_is_checked(other: Any, tmp_path: Any, monkeypatch: Any) -> None:
    checks: list[int] = []
    stock = engines.PolicyEngine._check

    def check(self: Any, *options: Any) -> None:
        checks.append(self._syncs)
        stock(self, *options)

    monkeypatch.setattr(engines.PolicyEngine, "_check", check)
    for every, expected in ((0, []), (1, [1, 2, 3, 4]), (2, [1, 3]), (50, [1])):
        checks.clear()
        other(tmp_path / str(every), max_steps=4, vllm=VLLMConfig(check_every=every)).train()
        assert checks == expected


def test_weights_that_were_lost_are_sent_again_once(other: Any, tmp_path: Any, capsys: Any) -> None:
    lost = StaleWeights("cppo.rollouts: the server has other weights")
    plain = other(tmp_path / "plain", max_steps=2)
    plain.train()
    trainer = other(tmp_path / "lost", faults={"generate": [None, lost]}, max_steps=2)
    trainer.train()
    assert "they are sent again" in capsys.readouterr().out
    assert other.made[1].calls.count("sync") == 3
    assert same(weights_of(trainer.model), weights_of(plain.model))
    twice = other(tmp_path / "twice", faults={"generate": [None, lost, lost]}, max_steps=2)
    with pytest.raises(StaleWeights):
        twice.train()
    assert twice.step == 1


def test_a_sync_that_fails_is_no_half_sync(other: Any, tmp_path: Any) -> None:
    broken = EngineError("cppo.rollouts: the connection broke")
    trainer = other(tmp_path, faults={"sync": [None, broken]}, max_steps=2, save_every=1)
    with pytest.raises(EngineError, match="the connection broke"):
        trainer.train()
    assert trainer.step == 1
    (engine,) = other.made
    assert engine.calls[-1] == "sync"  # nothing was sampled from what it has
    # The same trainer goes on: all weights are sent again.
    trainer.train_step()
    assert engine.calls.count("sync") == 3


def test_an_engine_that_cannot_be_trusted_is_asked_no_more(other: Any, tmp_path: Any) -> None:
    few = EngineError("cppo.rollouts: vLLM returned 3 of 4 completions of a question")
    trainer = other(tmp_path, faults={"generate": [None, few]}, max_steps=3, save_every=1)
    with pytest.raises(EngineError, match="3 of 4"):
        trainer.train()
    assert trainer.step == 1 and str(last_checkpoint(tmp_path)).endswith("checkpoint-000001")
