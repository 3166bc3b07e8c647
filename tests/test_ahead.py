"""A step ahead: a server samples the next completions while this step trains."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
from other_engine import OtherEngine
from trainer_cases import lines, noise, text_rows, tiny

from cppo.options.trainer import CPPOConfig, VLLMConfig
from cppo.rollouts.engine import EngineError, StaleWeights
from cppo.rollouts.sampler import Sampled
from cppo.train import engine as engines
from cppo.train import trainer as trainer_module
from cppo.train.algorithm import cppo_update
from cppo.train.checkpoint import last_checkpoint
from cppo.train.progress import read_metrics


def ahead(other: Any, output_dir: Any, faults: Any = None, **options: Any) -> Any:
    """A trainer with a server that samples a step ahead."""
    defaults: dict[str, Any] = dict(rewards=noise, max_steps=4, ahead=1, learning_rate=1e-2)
    return other(output_dir, faults=faults, name="vllm_server", **(defaults | options))


def test_a_step_ahead_is_off_policy_by_one_update(other: Any, tmp_path: Any) -> None:
    trainer = ahead(other, tmp_path, eval_rows=text_rows(2))
    trainer.train()
    (engine,) = other.made
    first, *later = [row["mismatch/mean"] for row in read_metrics(tmp_path) if "loss" in row]
    assert first < 1e-5 and all(1e-3 < value < 1 for value in later)
    # A rollout per step, and two evaluations, sampled and greedy.
    assert engine.calls.count("generate") == 4 + 4
    assert engine.calls.count("sync") == 5
    # The questions are those of a run that does not look ahead.
    plain = ahead(other, tmp_path / "plain", ahead=0)
    plain.train()
    assert _asked(tmp_path) == _asked(tmp_path / "plain")


def _asked(folder: Any) -> list[Any]:
    return [row["question"] for row in lines(folder / "completions.jsonl")]


def test_an_engine_ahead_is_checked_with_the_weights_that_it_has(other: Any, tmp_path: Any) -> None:
    trainer = ahead(other, tmp_path, vllm=VLLMConfig(check_every=1))
    trainer.train()  # although its completions are off by an update
    (engine,) = other.made
    assert engine.calls.count("generate") == 4 + 3  # the first needs none of its own
    trainer = ahead(other, tmp_path / "stale", vllm=VLLMConfig(check_every=1))
    engine = other.made[1]
    trainer.train_step()
    engine.takes_weights = False
    trainer._run.step = 1
    with pytest.raises(EngineError, match="samples from another distribution than the policy's"):
        trainer.train_step()


def test_a_run_ahead_is_resumed_with_the_questions_that_were_not_trained_on(
    other: Any, tmp_path: Any
) -> None:
    ahead(other, tmp_path, max_steps=4, save_every=1).train()
    cut = ahead(other, tmp_path / "cut", max_steps=4, save_every=1)
    stock = cut._run.finish_step

    def finish(metrics: Any, is_last: bool) -> None:
        stock(metrics, is_last)
        if cut.step == 2:
            raise RuntimeError("the machine is gone")

    cut._run.finish_step = finish
    with pytest.raises(RuntimeError, match="gone"):
        cut.train()
    ahead(other, tmp_path / "cut", max_steps=4, save_every=1).train(resume_from="auto")
    assert _asked(tmp_path) == _asked(tmp_path / "cut") and len(_asked(tmp_path)) == 8


def test_what_fails_ahead_fails_when_it_is_needed(other: Any, tmp_path: Any, capsys: Any) -> None:
    lost = StaleWeights("cppo.rollouts: the server has other weights")
    trainer = ahead(other, tmp_path / "0", faults={"generate": [None, None, lost]})
    trainer.train()
    assert "they are sent again" in capsys.readouterr().out
    rows = [row["mismatch/mean"] for row in read_metrics(tmp_path / "0")]
    assert rows[2] < 1e-5 < rows[1]  # sampled anew, with the weights of now
    gone = EngineError("cppo.rollouts: the server went away")
    trainer = ahead(other, tmp_path / "1", faults={"generate": [None, None, gone]}, save_every=1)
    with pytest.raises(EngineError, match="went away"):
        trainer.train()
    assert trainer.step == 2 and str(last_checkpoint(tmp_path / "1")).endswith("000002")


def test_a_step_ahead_begins_when_its_questions_are_known(other: Any, tmp_path: Any) -> None:
    """Refills take the questions that would have come next."""

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(i == 0) for i in range(len(completions))]  # equal but for one question

    options: dict[str, Any] = dict(rewards=reward, drop_zero_variance=True, max_refills=1)
    sampled = []
    for number in (1, 0):
        trainer = ahead(other, tmp_path / str(number), ahead=number, log_completions=100, **options)
        trainer.train()
        sampled.append(other.made[-1].calls.count("generate"))
        assert trainer.questions.position > 8  # it had to refill
    assert sampled[0] == sampled[1]  # nothing was sampled in vain
    assert _asked(tmp_path / "1") == _asked(tmp_path / "0")


def test_a_signal_ends_the_wait_for_a_step_ahead(
    other: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    is_slow = threading.Event()
    stock = OtherEngine.generate

    def generate(*options: Any) -> Sampled:
        if threading.current_thread() is not threading.main_thread() and not is_slow.is_set():
            is_slow.set()
            time.sleep(20)
        return stock(*options)

    def wait(own: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)

    monkeypatch.setattr(OtherEngine, "generate", generate)
    trainer = ahead(other, tmp_path)
    start = time.monotonic()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(engines._Ahead, "wait", wait)
        trainer.train()
    assert is_slow.is_set() and time.monotonic() - start < 10
    assert trainer.step == 1
    ahead(other, tmp_path).train(resume_from="auto")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_server_sleeps_when_nobody_samples_any_more() -> None:
    calls: list[str] = []

    class Processes:
        """The second of two."""

        def gather(self, value: Any) -> list[Any]:
            calls.append("all have come")
            return [value, value]

        def of_first(self, call: Any) -> None:
            calls.append(call.__name__)

    engine = OtherEngine(tiny("text")[0])
    engine.name = "vllm_server"
    engines.PolicyEngine(engine, Any, Processes()).sleep()  # type: ignore[arg-type]
    assert calls == ["all have come", "sleep"] and engine.calls == []


def test_a_step_ahead_is_sampled_while_another_one_trains(
    other: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    wait = 0.4
    stock = OtherEngine.generate

    def slow(*options: Any) -> Sampled:
        time.sleep(wait)  # as a server would: on another device
        return stock(*options)

    monkeypatch.setattr(OtherEngine, "generate", slow)
    monkeypatch.setattr(
        trainer_module, "cppo_update", lambda *a: (cppo_update(*a), time.sleep(wait))
    )
    seconds = {}
    for number in (0, 1):
        trainer = ahead(other, tmp_path / str(number), ahead=number, max_steps=5)
        start = time.monotonic()
        trainer.train()
        seconds[number] = time.monotonic() - start
    # 10 waits against 6.
    assert seconds[1] < seconds[0] - 2.5 * wait


def test_ahead_needs_a_server_and_a_correction() -> None:
    for options, words in (
        ({"engine": "vllm"}, "CPPOConfig.ahead must be 0 without a server"),
        ({"engine": "vllm_server", "vllm": VLLMConfig(sleep=True)}, "CPPOConfig.ahead must be 0"),
        ({"engine": "vllm_server", "importance_correction": "none"}, "another one with ahead = 1"),
        ({"engine": "vllm_server", "ahead": 2}, "CPPOConfig.ahead must be 0 or 1"),
    ):
        with pytest.raises(ValueError, match=words):
            CPPOConfig(**{"ahead": 1, **options})
