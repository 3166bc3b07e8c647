"""Weights by NCCL, through vLLM's own trainer side without its communicator, which needs GPUs."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM
from vllm_cases import engine, vllm, weights

__all__ = ["vllm"]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


class Communicator:
    """Where a broadcast would go."""

    def __init__(self) -> None:
        self.sent: list[list[tuple[str, torch.Tensor]]] = []
        self.is_over = False

    def destroy(self) -> None:
        self.is_over = True


def test_vllm_sends_every_weight(vllm: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.weight_transfer import nccl_engine

    communicator, opened = Communicator(), []

    def open_endpoint(info: Any) -> Communicator:
        opened.append(info)
        return communicator

    def broadcast(iterator: Any, group: Communicator, **_: Any) -> None:
        group.sent.append([(name, weight.clone()) for name, weight in iterator])

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", open_endpoint)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    vllm.options["weight_transfer_config"] = {"backend": "nccl"}
    found = engine(vllm, transfer="nccl")
    for value in (1.0, 2.0):
        found.sync(weights(value))
        sent = communicator.sent[-1]
        wanted = list(weights(value))
        assert [name for name, _ in sent] == [name for name, _ in wanted]
        for (_, own), (_, weight) in zip(sent, wanted, strict=True):
            assert torch.equal(own, weight)
    (info,) = opened
    asked = dict(vllm.requests)
    init = asked["/init_weight_transfer_engine"]["init_info"]
    assert (init["master_port"], init["world_size"], init["rank_offset"]) == (
        info.master_port,
        3,
        1,
    )
    update = asked["/update_weights"]["update_info"]
    assert update["names"] == [name for name, _ in weights()]
    assert update["dtype_names"] == ["float32"] * 3
    assert update["shapes"] == [[4, 2], [4, 2], [3]]
    assert vllm.paths[-9:] == [
        "/update_weight_version",
        "/server_info?config_format=json",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/reset_encoder_cache",
        "/update_weight_version",
    ]
    assert vllm.version == found.version
    found.close()
    assert communicator.is_over and vllm.paths[-1] == "/shutdown_weight_transfer_engine"
