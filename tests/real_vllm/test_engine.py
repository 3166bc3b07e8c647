"""A real vLLM in this process beside the trainer: text, images, adapters. `tests/run_vllm.sh`."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: tests/run_vllm.sh makes an environment that has it")

from trainer_cases import image, noise, padded_logps, question, small_run, weights_of
from vllm_runs import on_two_processes

from cppo.demo.arithmetic import ArithmeticProblems
from cppo.demo.digits import DigitSums
from cppo.demo.warmup import CHECKPOINTS
from cppo.model.forward import set_attention
from cppo.model.hub_weights import hub_weights
from cppo.model.load import load_model, load_processor, special_token_ids_to_suppress
from cppo.model.prompts import Prompts, encode_questions
from cppo.options.trainer import CPPOConfig, LoraConfig, VLLMConfig
from cppo.questions import as_question
from cppo.rollouts.engine import EngineError
from cppo.rollouts.rollout import Rollouts, sample_completions
from cppo.rollouts.vllm_engine import VLLMEngine
from cppo.train.progress import read_metrics
from cppo.train.trainer import CPPOTrainer

EXACT = 1e-4  # nats, in fp32
OPTIONS = VLLMConfig(max_model_len=256, check_every=1)


class Case:
    """A trained checkpoint of a demo, and prompts for it."""

    def __init__(self, kind: str) -> None:
        folder = CHECKPOINTS / {"text": "arithmetic", "images": "digits"}[kind]
        self.model, self.processor = load_model(folder), load_processor(folder)
        set_attention(self.model, "sdpa")
        self.suppressed = special_token_ids_to_suppress(self.model, self.processor)
        if kind == "text":
            self.rows: Any = ArithmeticProblems("train", 32)
            questions = [as_question(self.rows[i]) for i in range(4)]
        else:
            self.rows = DigitSums("train", 32)
            pictures = [image(48, 24, 1), image(96, 60, 2), image(36, 108, 3)]
            questions = [as_question(self.rows[i]) for i in range(2)]
            questions += [question("How many?", pictures[:2]), question("Hi"), questions[0]]
            questions += [question("Which is larger?", pictures)]
        self.prompts: Prompts = encode_questions(self.model, self.processor, questions)

    def sampled(self, engine: Any, temperature: float | None, **options: Any) -> Rollouts:
        defaults = dict(group_size=4, max_new_tokens=16, suppressed=self.suppressed)
        defaults |= dict(temperature=temperature, engine=engine)
        arguments = (self.model, self.processor, self.prompts)
        return sample_completions(*arguments, **(defaults | options))

    def difference(self, rollouts: Rollouts, temperature: float | None) -> float:
        """Largest difference of the engine's log-probabilities from the model's own."""
        never = torch.tensor(self.suppressed)

        def head(_: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
            return logits.index_fill(-1, never, -torch.inf) / (temperature or 1.0)

        hook = self.model.get_output_embeddings().register_forward_hook(head)
        try:
            with torch.no_grad():
                expected = padded_logps(self.model, rollouts)
        finally:
            hook.remove()
        assert rollouts.sampling_logps is not None
        return (expected - rollouts.sampling_logps)[rollouts.completion_mask].abs().max().item()

    def move(self) -> None:
        """Changes every weight a little."""
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(torch.randn_like(p), alpha=0.05 * p.std().item() if p.numel() > 1 else 0.0)


@pytest.fixture(scope="module", params=["text", "images"])
def running(request: Any) -> Iterator[tuple[Case, VLLMEngine]]:
    case = Case(request.param)
    engine = VLLMEngine(case.model, case.processor, OPTIONS, "float32")
    yield case, engine
    engine.close()


def test_it_starts_with_the_policys_weights(running: tuple[Case, VLLMEngine]) -> None:
    """What a tied weight is without a name of its own in the file may be no number."""
    case, engine = running
    assert case.difference(case.sampled(engine, 1.0), 1.0) < EXACT


@pytest.mark.parametrize("temperature", [1.0, 0.7, None])
def test_log_probabilities_are_the_models_own_whenever_weights_were_sent(
    running: tuple[Case, VLLMEngine], temperature: float | None
) -> None:
    case, engine = running
    torch.manual_seed(0)
    for _ in range(3):
        case.move()
        stale = case.difference(case.sampled(engine, temperature), temperature)
        engine.sync(hub_weights(case.model))
        found = case.sampled(engine, temperature)
        assert case.difference(found, temperature) < EXACT < 100 * EXACT < stale
        assert not torch.isin(found.input_ids, torch.tensor(case.suppressed))[
            found.completion_mask
        ].any()
        assert len(found.completion_ids) == 4 * len(case.prompts.questions)


def test_greedy_tokens_are_those_of_the_built_in_loop(running: tuple[Case, VLLMEngine]) -> None:
    case, engine = running
    engine.sync(hub_weights(case.model))
    ours = case.sampled(None, None)
    assert case.sampled(engine, None).completion_ids == ours.completion_ids


def test_a_seed_gives_the_same_completions(running: tuple[Case, VLLMEngine]) -> None:
    case, engine = running
    engine.sync(hub_weights(case.model))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(case.sampled(engine, 1.0).completion_ids)
    assert found[0] == found[1] != found[2]
    assert len({tuple(ids) for ids in found[0][:4]}) > 1  # of one question
    # In parts, as one.
    torch.manual_seed(1)
    assert case.sampled(engine, 1.0, batch_size=8).completion_ids == found[0]


def test_the_generators_of_the_process_stay_as_they_are(running: tuple[Case, VLLMEngine]) -> None:
    case, engine = running
    torch.manual_seed(5)
    case.sampled(engine, 1.0)
    after = torch.rand(3)
    torch.manual_seed(5)
    case.sampled(None, 1.0)
    assert torch.equal(after, torch.rand(3))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def test_a_prompt_that_is_too_long_is_refused_in_words(running: tuple[Case, VLLMEngine]) -> None:
    case, engine = running
    with pytest.raises(EngineError, match="VLLMConfig.max_model_len must be at least"):
        case.sampled(engine, 1.0, max_new_tokens=256)


def test_more_prompt_tokens_than_vllm_runs_at_once(running: tuple[Case, VLLMEngine]) -> None:
    case, engine = running
    engine.sync(hub_weights(case.model))
    longest = "How many? " * 20
    questions = [question(f"{i}. {longest}") for i in range(100)]
    case.prompts, before = encode_questions(case.model, case.processor, questions), case.prompts
    try:
        assert int(case.prompts.attention_mask.sum()) > 8192
        found = case.sampled(engine, 1.0, group_size=2, max_new_tokens=4)
        assert case.difference(found, 1.0) < EXACT
    finally:
        case.prompts = before


# Training


def trainer(case: Case, output_dir: Any, **options: Any) -> CPPOTrainer:
    defaults: dict[str, Any] = dict(engine="vllm", vllm=OPTIONS, max_steps=6, batch_size=16)
    defaults |= dict(prune_rate=0.5, max_completion_tokens=16, temperature=0.8)
    rows, processor = case.rows, case.processor
    config = small_run(output_dir, **(defaults | options))
    return CPPOTrainer(case.model, noise, rows, config=config, processor=processor)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4)])
@pytest.mark.parametrize("kind", ["text", "images"])
def test_the_engine_has_the_weights_of_every_step(kind: str, lora: Any, tmp_path: Any) -> None:
    run = trainer(Case(kind), tmp_path, lora=lora)
    before = weights_of(run.model)
    run.train()
    rows = read_metrics(tmp_path)
    assert len(rows) == 6
    for row in rows:
        assert row["mismatch/max"] < EXACT and row["mismatch/corrected_share"] == 0
        assert row["kept_share"] == 0.5
    after = weights_of(run.model)
    assert max((after[n] - before[n]).abs().max().item() for n in after) > 1e-3
    # An engine that keeps the weights of before is seen.
    run.engine._engine.sync = lambda weights: None  # type: ignore[method-assign]
    run.policy.version += 1
    with torch.no_grad():
        for p in run.policy.parameters:
            p.add_(torch.randn_like(p), alpha=0.3 * p.std().item() if p.numel() > 1 else 0.0)
    with pytest.raises(EngineError, match="samples from another distribution than the policy's"):
        run.train_step()
    run.engine.close()


def test_an_engine_that_got_a_part_of_the_weights_samples_no_more(tmp_path: Any) -> None:
    case = Case("text")
    run = trainer(case, tmp_path, max_steps=3, save_every=1)
    run.train_step()

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        for number, pair in enumerate(hub_weights(case.model)):
            if number == 5:
                raise RuntimeError("a cable was pulled")
            yield pair

    with pytest.raises(EngineError, match="could not take over the weights.*a cable was pulled"):
        run.engine.sync(broken())
    for call in (lambda: case.sampled(run.engine, 1.0), run.train_step):
        with pytest.raises(EngineError, match="vLLM was broken off, start the run again"):
            call()
    run.engine.close()


def test_a_rollout_that_a_signal_breaks_off_leaves_nothing_behind(tmp_path: Any) -> None:
    """Its requests would be sampled on, and hold the prefix cache of the old weights."""
    case = Case("text")
    run = trainer(case, tmp_path)
    run.engine.prepare()

    class Broken(BaseException): ...

    def hear(*_: Any) -> None:
        raise Broken

    before = signal.signal(signal.SIGALRM, hear)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Broken):
            case.sampled(run.engine._engine, 1.0, group_size=64, max_new_tokens=200)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(EngineError, match="vLLM was broken off, start the run again.*Broken"):
        run.train_step()
    run.engine.close()


def test_a_bf16_engine_is_corrected_and_a_run_is_resumed(tmp_path: Any) -> None:
    options = dict(vllm=dataclasses.replace(OPTIONS, dtype="bfloat16"), save_every=1)
    first = trainer(Case("text"), tmp_path, max_steps=2, **options)
    assert first.config.loss.importance_correction == "token_truncate"
    first.train()
    first.engine.close()
    again = trainer(Case("text"), tmp_path, max_steps=4, **options)
    again.train(resume_from="auto")
    again.engine.close()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert 1e-4 < row["mismatch/mean"] < 0.1 and 0 < row["mismatch/kl_engine_policy"] < 0.1


def test_an_evaluation_by_vllm_is_that_of_the_built_in_loop(tmp_path: Any) -> None:
    case, found = Case("text"), {}
    rows = [case.rows[i] for i in range(8)]
    for engine in ("builtin", "vllm"):
        own = Case("text")
        config: CPPOConfig = small_run(tmp_path / engine, engine=engine, vllm=OPTIONS)
        parts: Any = (own.model, noise, rows)
        run = CPPOTrainer(*parts, config=config, processor=own.processor, eval_dataset=rows)
        found[engine] = run.evaluate()
        run.engine.close()
    assert found["vllm"]["eval/greedy/noise"] == found["builtin"]["eval/greedy/noise"]
    assert found["vllm"].keys() == found["builtin"].keys()


def test_each_of_two_processes_has_an_engine(tmp_path: Any) -> None:
    on_two_processes(tmp_path)
