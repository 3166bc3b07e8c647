"""A real `vllm serve` on the CPU: its log-probabilities are transformers', before and after a sync.

Slow: a server takes half a minute to start. `tests/real_vllm/shim` stands on its PYTHONPATH.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trainer_cases import noise, small_run, weights_of
from vllm_runs import on_two_processes

from cppo.demo.arithmetic import ArithmeticProblems
from cppo.demo.digits import DigitSums
from cppo.demo.tasks import CHECKPOINTS
from cppo.model.forward import lm_head
from cppo.model.images import image_arguments, rotary_positions
from cppo.model.load import (
    closing_token_ids,
    load_model,
    load_processor,
    special_token_ids_to_suppress,
)
from cppo.model.prompts import Prompts, encode_questions
from cppo.model.wrappers import unwrap
from cppo.options.trainer import LoraConfig
from cppo.options.vllm import VLLMConfig
from cppo.questions import as_question
from cppo.rollouts.engine import EngineError, StaleWeights
from cppo.rollouts.sampler import Draws, Sampled, Sampling
from cppo.rollouts.vllm_http import start_command
from cppo.rollouts.vllm_server import ServerEngine
from cppo.train.progress import read_metrics
from cppo.train.trainer import CPPOTrainer

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.slow,
]
SHIM = Path(__file__).parent / "shim"
# In fp32, with other kernels than transformers'.
TOLERANCE = 1e-4
TEMPERATURE = 0.7
PLACES = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


class Case:
    """A model, its processor, questions, and a server of the same model."""

    def __init__(self, task: str, folder: Path) -> None:
        self.processor = load_processor(CHECKPOINTS / task)
        self.model = load_model(CHECKPOINTS / task, dtype=torch.float32).eval()
        self.folder = folder
        self.images = task == "digits"
        port = _free_port()
        self.options = VLLMConfig(
            address=f"http://127.0.0.1:{port}", start_timeout=240, max_model_len=256
        )
        self.server: subprocess.Popen[bytes] | None = None

    def start(self, model: Path) -> None:
        command = start_command(self.options.address, "file", str(model))
        _, *arguments = shlex.split(command.replace("bfloat16", "float32"))
        program = Path(sys.executable).with_name("vllm")
        paths = [str(SHIM), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.pathsep.join(paths)}
        log = (self.folder / "server.log").open("ab")
        self.server = subprocess.Popen(
            [program, *arguments[1:], "--max-model-len", "256", "--enforce-eager",
             "--no-enable-chunked-prefill",
             "--limit-mm-per-prompt", '{"image": 4, "video": 0}'],
            env={**os.environ, **PLACES, **environment},
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip

    def stop(self) -> None:
        if self.server is not None:
            os.killpg(self.server.pid, signal.SIGTERM)
            try:
                self.server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.server.pid, signal.SIGKILL)
                self.server.wait()

    def engine(self) -> ServerEngine:
        config = self.model.config
        return ServerEngine(
            self.options,
            image_token=config.image_token_id if self.images else None,
            vocab=config.get_text_config().vocab_size,
        )

    def prompts(self, seed: int = 0, images: int = 1) -> Prompts:
        questions = [self._question(seed + number, images) for number in range(3)]
        return encode_questions(self.model, self.processor, questions)

    def _question(self, seed: int, images: int) -> Any:
        if not self.images:
            text = f"Tom has {seed + 2} apples. How many are left?"
            return as_question({"prompt": text})
        parts: list[dict[str, str]] = []
        for number in range(images):
            parts += [{"type": "image"}, {"type": "text", "text": f"{number}, "}]
        parts.append({"type": "text", "text": "What is the sum of the digits?"})
        noise = np.random.default_rng(seed)
        pictures = [
            Image.fromarray(noise.integers(0, 256, (24, 24 * (1 + number), 3), dtype=np.uint8))
            for number in range(images)
        ]
        return as_question({"prompt": [{"role": "user", "content": parts}], "images": pictures})

    def sampling(self, **options: Any) -> Sampling:
        return Sampling(
            **{
                "group_size": 4,
                "max_new_tokens": 12,
                "temperature": TEMPERATURE,
                "suppressed": special_token_ids_to_suppress(self.model, self.processor),
                "closing": closing_token_ids(self.model, self.processor)[0],
                **options,
            }
        )

    def weights(self) -> list[tuple[str, torch.Tensor]]:
        """As a checkpoint names them, and the head although it is tied."""
        saved = dict(self.model.state_dict())
        renamed = {
            name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): own
            for name, own in saved.items()
        }
        renamed["lm_head.weight"] = self.model.get_output_embeddings().weight
        return list(renamed.items())

    @torch.no_grad()
    def change(self, seed: int) -> None:
        torch.manual_seed(seed)
        for weight in self.model.parameters():
            weight += 0.2 * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else 0


def draws(prompts: Prompts, sampling: Sampling, seed: int = 3) -> Draws:
    count = len(prompts.questions) * sampling.group_size
    return Draws(seed, count, slice(0, count))


@torch.no_grad()
def difference(case: Case, prompts: Prompts, sampling: Sampling, sampled: Sampled) -> float:
    """The largest between the engine's log-probabilities and transformers'."""
    base, head = unwrap(case.model), lm_head(case.model, sampling.suppressed)
    largest = 0.0
    for row, tokens in enumerate(sampled.tokens):
        question = row // sampling.group_size
        own = prompts.of([question])
        logps = sampled.logps[row]
        closing = [place for place, t in enumerate(tokens.tolist()) if t in sampling.closing]
        length = closing[0] + 1 if closing else len(tokens)
        ids = torch.cat([own.input_ids[0, own.attention_mask[0]], tokens[:length]])[None]
        extra = image_arguments(base, own.images, range(1))
        grid = None if own.images is None else own.images.joined("image_grid_thw")
        positions = rotary_positions(case.model, ids, torch.ones_like(ids).bool(), grid)
        hidden = base.model(
            input_ids=ids, position_ids=positions, use_cache=False, **extra
        ).last_hidden_state[0, -length - 1 : -1]
        logits = head.logits(hidden) / (sampling.temperature or 1.0)
        if sampling.temperature is None:
            assert torch.equal(logits.argmax(-1), tokens[:length])
        wanted = logits.log_softmax(-1).gather(1, tokens[:length, None])[:, 0]
        largest = max(largest, float((wanted - logps[:length]).abs().max()))
        assert not logps[length:].any()
    return largest


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture(scope="module", params=["arithmetic", "digits"])
def case(request: Any, tmp_path_factory: Any) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("server")
    case = Case(request.param, folder)
    case.model.save_pretrained(folder / "model")
    case.processor.save_pretrained(folder / "model")
    case.start(folder / "model")
    try:
        yield case
    finally:
        case.stop()
        print((folder / "server.log").read_text()[-3000:])


def test_log_probabilities_are_those_of_the_weights_that_were_sent(case: Case) -> None:
    engine = case.engine()
    assert engine.dtype == "float32" and engine.max_model_len == 256
    prompts, sampling = case.prompts(), case.sampling()
    with pytest.raises(StaleWeights, match="sync them first"):
        engine.generate(prompts, sampling, draws(prompts, sampling))
    for step in range(3):
        engine.sync(case.weights())
        sampled = engine.generate(prompts, sampling, draws(prompts, sampling, step))
        # The images of the first step again, with other weights: nothing of theirs is left over.
        assert difference(case, prompts, sampling, sampled) < TOLERANCE
        ends = (sampled.tokens == sampling.closing[0]).long().cumsum(1) > 0
        assert not set(sampled.tokens[~ends].tolist()) & set(sampling.suppressed)
        again = engine.generate(prompts, sampling, draws(prompts, sampling, step))
        assert torch.equal(again.tokens, sampled.tokens)
        case.change(step)
        # The weights here moved on: what was sampled before is far from them.
        assert difference(case, prompts, sampling, sampled) > 100 * TOLERANCE
        assert not list(Path("/dev/shm").glob(f"cppo-weights-{os.getpid()}-*"))


def test_greedy_completions_are_the_most_probable_ones(case: Case) -> None:
    engine = case.engine()
    engine.sync(case.weights())
    prompts, sampling = case.prompts(), case.sampling(temperature=None)
    sampled = engine.generate(prompts, sampling, draws(prompts, sampling))
    assert difference(case, prompts, sampling, sampled) < TOLERANCE
    groups = sampled.tokens.unflatten(0, (-1, sampling.group_size))
    assert (groups == groups[:, :1]).all()


def test_several_images(case: Case) -> None:
    if not case.images:
        pytest.skip("a text model")
    engine = case.engine()
    engine.sync(case.weights())
    for images in (2, 3):
        prompts, sampling = case.prompts(seed=100, images=images), case.sampling()
        sampled = engine.generate(prompts, sampling, draws(prompts, sampling))
        assert difference(case, prompts, sampling, sampled) < TOLERANCE


def test_weights_that_somebody_else_sent_are_stale(case: Case) -> None:
    engine, other = case.engine(), case.engine()
    prompts, sampling = case.prompts(), case.sampling()
    for own in (engine, other):
        own.sync(case.weights())
    with pytest.raises(StaleWeights, match=f"the weights '{other.version}'"):
        engine.generate(prompts, sampling, draws(prompts, sampling))
    engine.sync(case.weights())
    sampled = engine.generate(prompts, sampling, draws(prompts, sampling))
    assert difference(case, prompts, sampling, sampled) < TOLERANCE


def run_of(case: Case, folder: Path, **options: Any) -> CPPOTrainer:
    """A trainer of the checkpoint's weights, whose completions come from the case's server."""
    task = "digits" if case.images else "arithmetic"
    rows = DigitSums("train", 32) if case.images else ArithmeticProblems("train", 32)
    server = dataclasses.replace(case.options, check_every=1)
    defaults: dict[str, Any] = dict(engine="vllm_server", vllm=server, max_steps=6, batch_size=16)
    defaults |= dict(prune_rate=0.5, max_completion_tokens=16, temperature=TEMPERATURE)
    model, processor = load_model(CHECKPOINTS / task), load_processor(CHECKPOINTS / task)
    config = small_run(folder, **(defaults | options))
    return CPPOTrainer(model, noise, rows, config=config, processor=processor)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4)])
def test_a_run_samples_from_the_weights_of_every_step(
    case: Case, lora: Any, tmp_path: Path
) -> None:
    run = run_of(case, tmp_path, lora=lora)
    before = weights_of(run.model)
    run.train()
    rows = read_metrics(tmp_path)
    assert len(rows) == 6 and max(row["mismatch/max"] for row in rows) < TOLERANCE
    after = weights_of(run.model)
    assert max((after[name] - before[name]).abs().max().item() for name in after) > 1e-3


def test_a_run_ahead_is_off_by_one_update(case: Case, tmp_path: Path) -> None:
    run_of(case, tmp_path, ahead=1, max_steps=4).train()
    first, *later = [row["mismatch/mean"] for row in read_metrics(tmp_path)]
    assert first < TOLERANCE < min(later) and max(later) < 2


def test_two_processes_share_a_server(case: Case, tmp_path: Path) -> None:
    if case.images:
        pytest.skip("the text model is enough")
    on_two_processes(tmp_path, case.options.address)


def test_a_run_goes_on_when_its_server_was_restarted(case: Case, tmp_path: Path) -> None:
    if case.images:
        pytest.skip("once is enough: it takes a minute")
    run = run_of(case, tmp_path, max_steps=4)
    stock = run._run.finish_step

    def finish(metrics: Any, is_last: bool) -> None:
        stock(metrics, is_last)
        if run.step == 2:
            assert case.server is not None
            os.killpg(case.server.pid, signal.SIGKILL)
            case.server.wait()
            case.start(case.folder / "model")

    run._run.finish_step = finish  # type: ignore[method-assign]
    run.train()
    rows = read_metrics(tmp_path)
    assert len(rows) == 4 and max(row["mismatch/max"] for row in rows) < TOLERANCE


def test_a_server_that_is_killed_and_comes_back(case: Case) -> None:
    if case.images:
        pytest.skip("once is enough: it takes a minute")
    engine = case.engine()
    case.change(7)
    engine.sync(case.weights())
    assert case.server is not None
    os.killpg(case.server.pid, signal.SIGKILL)
    case.server.wait()
    case.start(case.folder / "model")
    prompts, sampling = case.prompts(), case.sampling()
    with pytest.raises(StaleWeights, match="the weights 'default'"):
        engine.generate(prompts, sampling, draws(prompts, sampling))
    engine.sync(case.weights())
    sampled = engine.generate(prompts, sampling, draws(prompts, sampling))
    assert difference(case, prompts, sampling, sampled) < TOLERANCE


def test_weights_of_another_model_are_refused_in_words(case: Case) -> None:
    """The last one: the server must be restarted then."""
    engine = case.engine()
    wrong = [
        (name, weight[:-1] if name.endswith("layers.0.self_attn.k_proj.weight") else weight)
        for name, weight in case.weights()
    ]
    for sent in (wrong, case.weights()):
        with pytest.raises(EngineError, match="restart the server: it took a part"):
            engine.sync(sent)
    prompts, sampling = case.prompts(), case.sampling()
    with pytest.raises(StaleWeights):
        engine.generate(prompts, sampling, draws(prompts, sampling))
