"""How weights reach a vLLM server, and what is left when they do not."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM, hangs_up, restarts, says
from vllm_cases import engine, sample, synced, vllm, weights

from cppo.rollouts.engine import EngineError, StaleWeights

__all__ = ["vllm"]


def test_a_sync_sends_every_weight_and_resets_what_was_computed(
    vllm: FakeVLLM, tmp_path: Path
) -> None:
    found = engine(vllm, tmp_path)
    vllm.requests.clear()
    found.sync(weights(2.0))
    assert vllm.paths == [
        "/update_weight_version",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/reset_encoder_cache",
        "/update_weight_version",
    ]
    assert vllm.requests[0][1]["new_version"] == f"{found.version}-incomplete"
    assert vllm.version == found.version
    for name, weight in weights(2.0):
        assert torch.equal(vllm.worker.weights[name], weight)
    assert list(tmp_path.iterdir()) == []
    first = found.version
    found.sync(weights())
    assert first is not None and first.endswith("-1")
    assert found.version == first[:-1] + "2"
    # Another run has other versions.
    other = engine(vllm, tmp_path)
    other.sync(weights())
    assert other.version != first


# 9
@pytest.mark.parametrize(
    "path",
    ["/update_weight_version", "/collective_rpc", "/reset_prefix_cache", "/reset_encoder_cache"],
)
def test_a_sync_that_breaks_off_is_made_again_whole(
    vllm: FakeVLLM, tmp_path: Path, path: str
) -> None:
    found = synced(vllm, tmp_path)
    before = found.version
    vllm.faults[path].append(restarts(after=0.1) if path == "/collective_rpc" else hangs_up)
    found.sync(weights(3.0))
    assert vllm.version == found.version != before
    assert torch.equal(vllm.worker.weights["lm_head.weight"], torch.full((4, 2), 3.0))
    assert vllm.paths[-6:].count("/collective_rpc") == 1
    assert vllm.paths[-1] == "/update_weight_version"
    assert len(sample(found).tokens) == 6


def test_a_sync_that_fails_leaves_no_usable_weights(vllm: FakeVLLM, tmp_path: Path) -> None:
    found = synced(vllm, tmp_path)
    vllm.faults["/collective_rpc"].extend([says(500, "Worker failed with error 'shape'")] * 3)
    with pytest.raises(EngineError, match="answers 500: Worker failed with error 'shape'"):
        found.sync(weights())
    assert vllm.version.endswith("-incomplete")
    with pytest.raises(StaleWeights):
        sample(found)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_took_a_part_of_the_weights_must_be_restarted(
    vllm: FakeVLLM, tmp_path: Path
) -> None:
    found = engine(vllm, tmp_path)
    wrong = [*weights(), ("other.weight", torch.ones(2))]
    words = "Worker failed .*restart the server: .*ValueError: there is no other.weight"
    for sent in (wrong, list(weights())):
        with pytest.raises(EngineError, match=words):
            found.sync(sent)
    vllm.stop()
    vllm.start()
    found.sync(weights())
    assert len(sample(found).tokens) == 6


def test_a_worker_that_takes_too_few_weights(vllm: FakeVLLM, tmp_path: Path) -> None:
    found = engine(vllm, tmp_path)
    vllm.changes["/collective_rpc"] = lambda answer: {"results": ["3", "2"]}
    with pytest.raises(EngineError, match=r"took \['3', '2'\] weights, and 3 were sent"):
        found.sync(weights())


def test_a_prefix_cache_that_is_in_use(vllm: FakeVLLM, tmp_path: Path) -> None:
    found = engine(vllm, tmp_path)
    vllm.changes["/reset_prefix_cache"] = lambda answer: {"success": False}
    with pytest.raises(EngineError, match="requests of somebody else are running"):
        found.sync(weights())


def test_a_folder_that_is_not_there(vllm: FakeVLLM, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be written to .*VLLMConfig.folder"):
        engine(vllm, tmp_path / "none").sync(weights())


class _Transfer(types.ModuleType):
    """A stand-in for the trainer's side of vLLM's weight transfer: records what it is asked."""

    def __init__(self) -> None:
        super().__init__("vllm.distributed.weight_transfer")
        self.calls: list[Any] = []
        self.broken = 0
        transfer = self

        class HTTPVLLMWeightSyncClient:
            def __init__(self, address: str, timeout: float) -> None:
                transfer.calls.append(("client", address, timeout))

            def shutdown_weight_transfer_engine(self) -> None:
                transfer.calls.append("leave")

        class WeightSource: ...

        class WeightTransferTrainerFactory:
            @staticmethod
            def trainer_init(info: Any, *, client: Any, source: Any) -> Any:
                assert isinstance(client, HTTPVLLMWeightSyncClient)
                transfer.calls.append(("join", info))
                return _Group(transfer, source)

        self.HTTPVLLMWeightSyncClient = HTTPVLLMWeightSyncClient
        self.WeightSource = WeightSource
        self.WeightTransferTrainerFactory = WeightTransferTrainerFactory
        self.ParamMeta = lambda name, dtype, shape: (name, dtype, shape)


class _Group:
    def __init__(self, transfer: _Transfer, source: Any) -> None:
        self._transfer, self._source = transfer, source

    def send_weights(self) -> None:
        if self._transfer.broken:
            self._transfer.broken -= 1
            raise RuntimeError("NCCL error: remote process exited")
        meta = self._source.metadata()
        sent = list(self._source)
        assert meta == [(name, own.dtype, tuple(own.shape)) for name, own in sent]
        assert not any(own.requires_grad for _, own in sent)
        self._transfer.calls.append(("send", [name for name, _ in sent], float(sent[0][1][0, 0])))

    def shutdown(self) -> None:
        self._transfer.calls.append("end")


@pytest.fixture
def transfer(monkeypatch: pytest.MonkeyPatch, vllm: FakeVLLM) -> _Transfer:
    found = _Transfer()
    nccl = types.ModuleType("vllm.distributed.weight_transfer.nccl_engine")
    nccl.NCCLTrainerInitInfo = lambda **info: info  # type: ignore[attr-defined]
    distributed = types.ModuleType("vllm.distributed")
    distributed.weight_transfer = found  # type: ignore[attr-defined]
    for module in (types.ModuleType("vllm"), distributed, found, nccl):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vllm.options["weight_transfer_config"] = {"backend": "nccl"}
    return found


NAMES = [name for name, _ in weights()]


def test_weights_by_nccl(vllm: FakeVLLM, transfer: _Transfer) -> None:
    found = engine(vllm, transfer="nccl")
    found.sync((name, torch.nn.Parameter(weight)) for name, weight in weights())
    found.sync(weights(2.0))
    (client, join, *sends) = transfer.calls
    assert client == ("client", vllm.address, 5.0)
    port = join[1].pop("master_port")
    assert port != vllm.port
    # The server has two workers.
    assert join == ("join", {"master_address": "127.0.0.1", "world_size": 3, "rank": 0})
    assert sends == [("send", NAMES, 1.0), ("send", NAMES, 2.0)]
    assert vllm.version == found.version and "/collective_rpc" not in vllm.paths
    assert vllm.paths[-4:-1] == ["/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]
    found.close()
    assert transfer.calls[-2:] == ["leave", "end"]


def test_a_broken_transfer_is_made_again_by_a_new_group(
    vllm: FakeVLLM, transfer: _Transfer
) -> None:
    found = engine(vllm, transfer="auto", on_gpu=True)
    transfer.broken = 1
    found.sync(weights())
    names = [call if isinstance(call, str) else call[0] for call in transfer.calls]
    assert names == ["client", "join", "leave", "end", "join", "send"]
    transfer.broken = 3
    with pytest.raises(EngineError, match="by NCCL .RuntimeError: NCCL error: remote process"):
        found.sync(weights())
    assert found.version is None


def test_a_server_that_was_restarted_joins_a_new_group(vllm: FakeVLLM, transfer: _Transfer) -> None:
    found = engine(vllm, transfer="nccl")
    found.sync(weights())
    vllm.options["instance_id"] = "2"
    found.sync(weights())
    names = [call if isinstance(call, str) else call[0] for call in transfer.calls]
    assert names == ["client", "join", "send", "leave", "end", "join", "send"]


def test_nccl_needs_vllm_and_a_server_that_was_started_for_it(
    vllm: FakeVLLM, transfer: _Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm.options["weight_transfer_config"] = None
    with pytest.raises(EngineError, match="--weight-transfer-config None, not nccl"):
        engine(vllm, transfer="nccl")
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm.distributed", None)
    with pytest.raises(EngineError, match="'nccl' needs vLLM beside the trainer"):
        engine(vllm, transfer="nccl")
