"""An engine with weights of its own: it has the policy's whenever it samples, or the run ends."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from test_trainer import moved
from torch import Tensor, nn
from trainer_cases import (
    config,
    fixed_case,
    gradients,
    lines,
    noise,
    packed,
    padded_logps,
    questions_for,
    relative_difference,
    same,
    text_rows,
    tiny,
    trainer_for,
    weights_of,
)

from cppo.config import CPPOConfig, LoraConfig, LossConfig, VLLMConfig
from cppo.loss_config import CORRECTIONS
from cppo.model.hub_weights import hub_weights
from cppo.model.prompts import Prompts, encode_questions
from cppo.records import NumItems
from cppo.rollouts.engine import BuiltinEngine, EngineError, StaleWeights
from cppo.rollouts.sampler import Draws, Sampled, Sampling
from cppo.train import engine as engines
from cppo.train import trainer as trainer_module
from cppo.train import update
from cppo.train.algorithm import cppo_update, microbatch_loss
from cppo.train.checkpoint import last_checkpoint
from cppo.train.mismatch import mismatch, mismatch_metrics
from cppo.train.progress import read_metrics


class OtherEngine:
    """An engine as vLLM is one: a model of its own, which gets weights by their names on the hub.

    Args:
        faults: what to raise at each call of "sync" or "generate", None for nothing.
    """

    name = "vllm"
    version: str | None = None

    def __init__(self, model: nn.Module, faults: dict[str, list[Any]] | None = None) -> None:
        model = copy.deepcopy(model)
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        self._model: Any = model.requires_grad_(False)
        for p in self._model.parameters():
            p.zero_()  # no weights yet
        self._engine = BuiltinEngine(self._model)
        self._faults = faults or {}
        self.calls: list[str] = []
        self.takes_weights = True

    def _called(self, name: str) -> None:
        self.calls.append(name)
        faults = self._faults.get(name)
        fault = faults.pop(0) if faults else None
        if fault is not None:
            raise fault

    def rows_at_once(self, width: int) -> int | None:
        return None

    def generate(self, prompts: Prompts, sampling: Sampling, draws: Draws) -> Sampled:
        self._called("generate")
        return self._engine.generate(prompts, sampling, draws)

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = dict(hub_weights(self._model))
        for name, value in weights:
            if self.takes_weights:
                own.pop(name).copy_(value)
        self._called("sync")
        assert not (self.takes_weights and own), f"not sent: {sorted(own)}"

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self) -> None:
        self.calls.append("wake")

    def close(self) -> None: ...


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes trainers whose engine is `OtherEngine`; the engines that were made are its `made`."""

    def make(
        output_dir: Any,
        family: str = "text",
        faults: Any = None,
        name: str = "vllm",
        **options: Any,
    ) -> Any:
        def new(model: nn.Module, *_: Any) -> OtherEngine:
            engine = OtherEngine(model, faults)
            engine.name = name
            make.made.append(engine)  # type: ignore[attr-defined]
            return engine

        monkeypatch.setattr(trainer_module, "new_engine", new)
        return trainer_for(output_dir, family, engine=name, **options)

    make.made = []  # type: ignore[attr-defined]
    return make


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


# Faults


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


# Ahead


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


# The mismatch


def test_metrics_of_the_mismatch_by_hand() -> None:
    model, _, batch = fixed_case("text", lengths=[2, 3, 1, 2, 1, 1, 1, 1])
    d = torch.zeros(batch.rollouts.input_ids.shape)
    tokens = batch.rollouts.completion_mask.nonzero().tolist()
    values = [0.5, -0.25, 0.0, 1.5, math.nan, -2.0, *[0.0] * (len(tokens) - 6)]
    logps = torch.full(d.shape, -3.0)
    for (row, column), value in zip(tokens, values, strict=True):
        d[row, column] = value
    per_token = {"sampling_logps": logps - d, "old_logps": logps}
    stream = dataclasses.replace(batch, per_token=per_token).pack(batch.kept)
    known = [v for v in values if not math.isnan(v)]
    for mode, corrected in (
        ("none", None), ("bypass", None), ("token_truncate", 2), ("token_mask", 2),
        # Ratios of the completions e^0.25, e^1.5, e^-2, then 1: the second and third are bounded.
        ("sequence_truncate", 3), ("sequence_mask", 3),
    ):  # fmt: skip
        config = LossConfig(importance_correction=mode, correction_min=0.5, correction_max=3.0)
        sums = mismatch(torch.zeros(len(tokens)), stream, config)
        found = mismatch_metrics({name: float(value) for name, value in sums.items()})
        assert found["mismatch/mean"] == pytest.approx(sum(map(abs, known)) / len(known))
        assert found["mismatch/max"] == 2.0
        k3 = [math.exp(v) - 1 - v for v in known]
        assert found["mismatch/kl_engine_policy"] == pytest.approx(sum(k3) / len(known))
        reverse = [v * math.exp(v) - math.exp(v) + 1 for v in known]
        assert found["mismatch/kl_policy_engine"] == pytest.approx(sum(reverse) / len(known))
        share = None if corrected is None else corrected / len(known)
        assert found.get("mismatch/corrected_share") == (share and pytest.approx(share))


@pytest.mark.parametrize("has_old", [False, True])
@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("family", ["text", "qwen2_5_vl"])
def test_gradients_of_an_update_are_those_of_the_formula(
    family: str, mode: str, has_old: bool
) -> None:
    """In fp64, read anew from the padded forward of the stock model."""
    model, processor, batch = fixed_case(family, dtype=torch.float64)
    mask = batch.rollouts.completion_mask
    logps = padded_logps(model, batch.rollouts)
    torch.manual_seed(1)
    engine = (logps.detach() + 0.6 * torch.randn(mask.shape, dtype=torch.float64)) * mask
    old = (logps.detach() + 0.1 * torch.randn(mask.shape, dtype=torch.float64)) * mask
    knows_old = has_old and mode != "bypass"
    per_token = {"sampling_logps": engine} | ({"old_logps": old} if knows_old else {})
    batch = dataclasses.replace(batch, per_token=per_token)
    options: Any = dict(cpl_coef=0.0, correction_min=0.5, correction_max=1.5)
    own = config(importance_correction=mode, **options)
    everything = torch.arange(len(mask))
    items = NumItems(len(mask), int(mask.sum()))
    found = gradients(
        model,
        lambda: microbatch_loss(model, batch, everything, items, own, processor).loss.backward(),
    )

    before = old if knows_old else logps.detach()
    d = (before - engine) * mask
    if mode.startswith("sequence"):
        d = d.sum(1, keepdim=True).expand_as(d)
    weight = d.exp()
    inside = (weight >= 0.5) & (weight <= 1.5)
    assert 0 < (inside & mask).sum() < mask.sum()
    if mode.endswith("truncate"):
        weight = weight.clamp(0.5, 1.5)
    elif mode.endswith("mask"):
        weight = weight * inside
    else:
        weight = torch.ones_like(d)
    logps = padded_logps(model, batch.rollouts)
    ratio = (logps - (engine if mode == "bypass" else before)).exp()
    a = batch.advantages[:, None]
    surrogate = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * weight
    loss = -((surrogate * mask).sum(1) / mask.sum(1)).mean()
    expected = gradients(model, loss)
    assert relative_difference(found, expected) < 1e-6


def test_bypass_takes_the_engines_numbers_for_the_old_ones(
    other: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    forwards: list[str] = []
    stock = update.token_logps
    monkeypatch.setattr(update, "token_logps", lambda *a: forwards.append("old") or stock(*a))
    options: dict[str, Any] = dict(optimizer_steps=2, max_steps=2, rewards=noise)
    other(tmp_path / "0", importance_correction="bypass", **options).train()
    assert forwards == []
    other(tmp_path / "1", importance_correction="token_truncate", **options).train()
    assert len(forwards) == 2
    rows = [read_metrics(tmp_path / run)[0] for run in "01"]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-4)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "bypass"])
def test_an_engine_in_bf16_is_corrected(mode: str, other: Any, tmp_path: Any) -> None:
    trainer = other(tmp_path, importance_correction=mode, max_steps=2, rewards=noise,
                    vllm=VLLMConfig(dtype="bfloat16"))  # fmt: skip
    (engine,) = other.made
    engine._model.to(torch.bfloat16)
    assert max(moved(trainer).values()) > 0
    for row in read_metrics(tmp_path):
        assert 1e-4 < row["mismatch/mean"] < 0.1 and row["mismatch/kl_engine_policy"] > 0


# Options


def test_the_correction_is_one_option_in_two_places() -> None:
    def found(config: CPPOConfig, **changes: Any) -> str:
        return dataclasses.replace(config, **changes).loss.importance_correction

    assert found(CPPOConfig()) == "none"
    # A copy with another engine, as of a config.yaml that a run has written.
    assert found(CPPOConfig(), engine="vllm") == "token_truncate"
    assert found(CPPOConfig(importance_correction="none"), engine="vllm") == "none"
    assert found(CPPOConfig(engine="vllm"), importance_correction="none") == "none"
    assert found(CPPOConfig(engine="vllm"), max_steps=3) == "token_truncate"
    of_loss = CPPOConfig(engine="vllm", loss=LossConfig(importance_correction="sequence_mask"))
    assert found(of_loss, max_steps=3) == "sequence_mask"
    assert found(of_loss, importance_correction="bypass") == "bypass"
    with pytest.raises(ValueError, match="CPPOConfig.importance_correction must be one of"):
        CPPOConfig(importance_correction="tis")
    with pytest.raises(ValueError, match="CPPOConfig.engine must be one of"):
        CPPOConfig(engine="sglang")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "fp8"}, "VLLMConfig.dtype must be one of"),
        ({"memory_share": 1.5}, "VLLMConfig.memory_share"),
        ({"max_model_len": 1}, "VLLMConfig.max_model_len"),
        ({"address": "localhost:8000"}, "VLLMConfig.address must be of the form http://host:port"),
        ({"check_tolerance": 0}, "VLLMConfig.check_tolerance"),
        ({"arguments": {1: 2}}, "VLLMConfig.arguments"),
        ({"retries": -1}, "VLLMConfig.retries"),
    ],
)
def test_mistakes_in_the_options_of_vllm(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VLLMConfig(**options)


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [
        ("fp32", "auto", "float32"),
        ("bf16", "auto", "bfloat16"),
        ("fp32", "bfloat16", "bfloat16"),
        ("bf16", "float32", "float32"),
    ],
)
def test_the_dtype_of_the_engine(precision: str, dtype: str, expected: str) -> None:
    config = CPPOConfig(engine="vllm", precision=precision, vllm=VLLMConfig(dtype=dtype))
    assert engines.engine_dtype(config) == expected


def test_vllm_that_is_not_installed_is_named(tmp_path: Any) -> None:
    with pytest.raises(ImportError, match=r"CPPOConfig.engine = 'vllm' needs .* 'cppo\[vllm\]'"):
        trainer_for(tmp_path, engine="vllm")


def test_what_an_engine_samples_for_a_prompt_with_images() -> None:
    """One token for each image, in its place: vLLM writes one for each patch by itself."""
    from cppo.rollouts.vllm_requests import requests

    model, processor = tiny("qwen2_5_vl")
    prompts = encode_questions(packed(model), processor, questions_for("qwen2_5_vl"))
    sampling = Sampling(2, 4, 1.0)
    image = model.config.image_token_id
    found = requests(prompts, sampling, Draws(3, 8, slice(0, 8)), image)
    tokenizer = processor.tokenizer
    for own, question in zip(found, prompts.questions, strict=True):
        text = processor.apply_chat_template(
            question.messages, tokenize=False, add_generation_prompt=True
        )
        assert own.token_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert own.token_ids.count(image) == len(own.images) == len(question.images)
    assert len({own.seed for own in found}) == 4
    # A part of the questions has the seeds that it has in the whole.
    part = requests(prompts.of([2, 3]), sampling, Draws(3, 8, slice(4, 8)), image)
    assert [own.seed for own in part] == [own.seed for own in found[2:]]
