"""How weights reach a vLLM server: by a file, or by NCCL."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cppo.model.hub_weights import apart
from cppo.options.vllm import VLLMConfig
from cppo.rollouts.engine import EngineError
from cppo.rollouts.vllm_http import PassingError, Server
from cppo.rollouts.vllm_worker import FileWeights

_SHARED_MEMORY = Path("/dev/shm")


class Sender(Protocol):
    """Sends weights to a server. Versions and caches are not its part."""

    def options(self, config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """By name: what an option of the server's configuration is, and what it must be."""

    def holding(self, weights: Iterable[tuple[str, Tensor]]) -> contextlib.AbstractContextManager:
        """Holds weights, for `send` to send them as often as it takes."""

    def send(self) -> None:
        """Raises: PassingError, RefusedError."""

    def close(self) -> None:
        """Ends what connects it to the server."""


def sender(transfer: str, options: VLLMConfig, server: Server) -> Sender:
    """The sender of `VLLMConfig.transfer`."""
    if transfer == "nccl":
        return NCCLSender(server)
    return FileSender(server, options.folder)


class FileSender:
    """Writes weights to a file that every worker of the server reads.

    Args:
        folder: for trainer and server the same; None: /dev/shm, or that of temporary files.
    """

    def __init__(self, server: Server, folder: str | None) -> None:
        self._server = server
        shared = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
        self._folder = shared if folder is None else Path(folder)
        self._path: Path | None = None
        self._count = 0

    def options(self, config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        name = f"{FileWeights.__module__}.{FileWeights.__qualname__}"
        return {"--worker-extension-cls": (config["parallel_config"]["worker_extension_cls"], name)}

    @contextlib.contextmanager
    def holding(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
        path = self._folder / f"cppo-weights-{os.getpid()}-{uuid.uuid4().hex[:8]}.safetensors"
        try:
            tensors = apart(weights)
            self._count = len(tensors)
            try:
                save_file(tensors, path)
            except (OSError, SafetensorError) as error:
                raise EngineError(
                    f"cppo.rollouts: the weights cannot be written to {self._folder} "
                    f"(VLLMConfig.folder): {error}"
                ) from error
            del tensors
            self._path = path
            yield
        finally:
            self._path = None
            path.unlink(missing_ok=True)

    def send(self) -> None:
        method = FileWeights.load_weights_of_file.__name__
        answer = self._server.post("/collective_rpc", {"method": method, "args": [str(self._path)]})
        loaded = answer.get("results") if isinstance(answer, dict) else None
        if not loaded or {str(count) for count in loaded} != {str(self._count)}:
            raise PassingError(
                f"cppo.rollouts: the workers of the vLLM server at {self._server.address} took "
                f"{loaded} weights, and {self._count} were sent"
            )

    def close(self) -> None: ...


class NCCLSender:
    """Broadcasts weights from this process's GPU, by the trainer's side of vLLM's weight transfer.

    Only vLLM's public classes are used. The server joins a group with this process, which is made
    anew when the server was restarted or a transfer broke off.
    """

    def __init__(self, server: Server) -> None:
        try:
            from vllm.distributed import weight_transfer
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            raise EngineError(
                f"cppo.rollouts: VLLMConfig.transfer = 'nccl' needs vLLM beside the trainer, too "
                f"({error}); install cppo[vllm], or take 'file' on one machine"
            ) from error
        self._vllm = weight_transfer
        self._init_info = NCCLTrainerInitInfo
        self._server = server
        self._client = weight_transfer.HTTPVLLMWeightSyncClient(
            server.address, timeout=server.request_timeout
        )
        self._weights: list[tuple[str, Tensor]] = []
        self._group: Any = None
        self._instance: str | None = None

    def options(self, config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        backend = (config["weight_transfer_config"] or {}).get("backend")
        return {"--weight-transfer-config": (backend, "nccl")}

    @contextlib.contextmanager
    def holding(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
        self._weights = [(name, weight.detach()) for name, weight in weights]
        try:
            yield
        finally:
            self._weights = []

    def send(self) -> None:
        instance = self._server.get("/server_info?config_format=json")["vllm_config"]["instance_id"]
        if instance != self._instance:
            self.close()
        try:
            self._group = self._group or self._joined()
            self._group.send_weights()
        except (OSError, RuntimeError, ValueError) as error:
            self.close()
            raise PassingError(
                f"cppo.rollouts: weights do not reach the vLLM server at {self._server.address} "
                f"by NCCL ({type(error).__name__}: {error})"
            ) from error
        self._instance = instance

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            # The server may be gone, or still in the transfer that broke off.
            with contextlib.suppress(OSError, RuntimeError):
                self._client.shutdown_weight_transfer_engine()
            group.shutdown()

    def _joined(self) -> Any:
        workers = self._server.get("/get_world_size")["world_size"]
        address, port = _own_address(self._server.address)
        info = self._init_info(
            master_address=address, master_port=port, world_size=workers + 1, rank=0
        )
        return self._vllm.WeightTransferTrainerFactory.trainer_init(
            info, client=self._client, source=self._source()
        )

    def _source(self) -> Any:
        held = self

        class Source(self._vllm.WeightSource):  # type: ignore[name-defined]
            def metadata(self) -> list[Any]:
                meta = held._vllm.ParamMeta
                return [meta(name, own.dtype, tuple(own.shape)) for name, own in held._weights]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                return iter(held._weights)

        return Source()


def _own_address(server: str) -> tuple[str, int]:
    """The address under which the server reaches this machine, and a free port of it."""
    url = urlsplit(server)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((url.hostname or "127.0.0.1", url.port or 80))  # sends nothing
        address = probe.getsockname()[0]
    with socket.create_server((address, 0)) as free:
        return address, free.getsockname()[1]
