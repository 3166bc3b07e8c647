"""CPPOGRPOTrainer with `trl vllm-serve`, a real vLLM server. `tests/run_trl_vllm.sh`.

Slow: a server takes most of a minute to start. `cpu_transport` says what stands in for NCCL.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: tests/run_trl_vllm.sh makes an environment")
pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).parent))

import cpu_transport
from peft import LoraConfig
from trl.generation.vllm_client import VLLMClient
from trl_vllm_cases import EXACT, LOOK, LORA, STEPS, differences, folder_of, logged, run

from cppo.integrations import trl_vllm_mend

HERE = Path(__file__).parent
Run = Callable[..., Any]
STOCK = VLLMClient.init_communicator


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def start(kind: str, folder: Path, port: int) -> subprocess.Popen[bytes]:
    options = "--max_model_len 256 --enforce_eager true --dtype float32 --generation-config vllm"
    own = f"--host 127.0.0.1 --port {port} --worker-extension-cls cpu_worker.OnACpu"
    model = ["--model", str(folder_of(kind, folder))]
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    log = (folder / "server.log").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "trl.scripts.vllm_serve", *model, *options.split(), *own.split()],
        env=environment, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def address(tmp_path_factory: Any) -> Iterator[Callable[[str], str]]:
    """The address of a server for text or for images, which starts when it is first asked for."""
    servers: dict[str, tuple[str, subprocess.Popen[bytes], Path]] = {}

    def of(kind: str) -> str:
        if kind not in servers:
            folder, port = tmp_path_factory.mktemp(kind), free_port()
            servers[kind] = (f"http://127.0.0.1:{port}", start(kind, folder, port), folder)
        return servers[kind][0]

    yield of
    for _, process, folder in servers.values():
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        print((folder / "server.log").read_text()[-3000:])


@pytest.fixture
def served(address: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run` against a server; the weights go there without CUDA."""
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    cpu_transport.install(monkeypatch.setattr)
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: STOCK(self, "cuda"))

    def of(kind: str, *positional: Any, name: str = "", **options: Any) -> Any:
        (tmp_path / name).mkdir(exist_ok=True)
        options |= dict(vllm_server_base_url=address(kind), vllm_group_port=free_port())
        options |= dict(vllm_mode="server", vllm_server_timeout=500.0)
        return run(kind, tmp_path / name, *positional, **options)

    return of


def test_trl_sends_weights_to_cuda_alone(served: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, TRL syncs weights on a CPU: `cpu_transport` may go."""
    monkeypatch.setattr(VLLMClient, "init_communicator", STOCK)
    with pytest.raises(NotImplementedError, match="needs a CUDA device, got 'cpu'"):
        served("text")


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("kind", ["text", "images"])
def test_a_server_samples_with_the_weights_of_every_step(
    kind: str, lora: bool, served: Run
) -> None:
    seen: list[dict[str, Any]] = []
    trainer = served(kind, seen=seen, peft_config=LoraConfig(**LORA) if lora else None)
    largest = differences(trainer, f"server, {kind}{', LoRA' if lora else ''}")
    assert len(largest) == STEPS and max(largest) < EXACT
    assert logged(trainer, "cppo/kept_share") == [0.5] * STEPS
    assert max(logged(trainer, "grad_norm")) > 0
    for rollout in seen:
        assert len(rollout["completion_mask"]) == 4
        assert (rollout["importance_sampling_ratio"] > 0).all()


def test_vllm_packs_the_weights_of_lora_too_late(
    served: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, TRL or vLLM has mended it: `mend_adapters` may go."""
    monkeypatch.setattr(trl_vllm_mend, "mend_adapters", lambda generation: None)
    trainer = served("text", peft_config=LoraConfig(**LORA))
    first, *later = differences(trainer, "server, text, LoRA, packed after the merge is undone")
    assert first < EXACT < min(later) / 100


def test_weights_that_are_sent_once(served: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the differences would be if the weights of later steps did not reach the server."""
    update, updated = VLLMClient.update_named_params, []

    def once(self: Any, metadata: Any, named_params: Any) -> None:
        if not updated:
            updated.append(update(self, metadata, named_params))

    monkeypatch.setattr(VLLMClient, "update_named_params", once)
    first, *later = differences(served("text"), "server, text, weights sent once")
    assert first < EXACT < min(later) / 100


@pytest.mark.parametrize("mended", [True, False])
def test_images_that_come_again(mended: bool, served: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if not mended:
        monkeypatch.setattr(trl_vllm_mend, "mend_features", lambda generation: None)
    trainer = served("images", questions=2)
    what = "features of the weights of the step" if mended else "features of older weights"
    _, *later = differences(trainer, f"server, the same two images in every step, {what}")
    assert len(later) == STEPS - 1
    assert max(later) < EXACT if mended else min(later) > 100 * EXACT


def test_trl_stops_at_the_log_probabilities_of_image_prompts(
    served: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, TRL and vLLM name them alike: `mend_logprobs` may go."""
    monkeypatch.setattr(trl_vllm_mend, "mend_logprobs", lambda client: None)
    with pytest.raises(KeyError, match="'token'"):
        served("images")


def test_early_and_late_pruning_are_the_same_bit_for_bit(
    served: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same completions: those of a server may depend on which requests it runs together."""
    generate, recorded = VLLMClient.generate, []

    def record(self: Any, prompts: Any, **options: Any) -> Any:
        recorded.append((prompts, generate(self, prompts, **options)))
        return recorded[-1][1]

    def replay(self: Any, prompts: Any, **options: Any) -> Any:
        wanted, answer = recorded.pop(0)
        assert prompts == wanted
        return answer

    weights = []
    for name, way in (("early", record), ("late", replay)):
        monkeypatch.setattr(VLLMClient, "generate", way)
        options = dataclasses.replace(LOOK, early=name == "early")
        weights.append(served("text", options, name=name).model.state_dict())
    assert not recorded
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
