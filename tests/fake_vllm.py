"""A stand-in for `vllm serve`: it answers at once, and goes wrong where a test says so."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from torch import Tensor

from cppo.rollouts.vllm_worker import FileWeights

GENERATE = "/inference/v1/generate"
IMAGE, CLOSING, VOCAB = 7, 2, 50
PATCHES = 3  # of an image
# One way to go wrong, for one request: it is given the server's handler and returns the answer, as
# (status, bytes), or None if nothing is to be sent.
Fault = Callable[["FakeVLLM"], tuple[int, bytes] | None]


class Worker(FileWeights):
    """vLLM's worker, with the extension mixed in."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def reload_weights(self, weights_iterator: list[tuple[str, Tensor]]) -> None:
        for name, weight in weights_iterator:
            if name.startswith("other."):
                raise ValueError(f"there is no {name}")
            self.weights[name] = weight.clone()


class FakeVLLM:
    """Serves on a port of its own from `start` to `stop`.

    Args:
        faults: by path, what goes wrong with the next requests; then they are answered.
        changes: by path, what is done to every answer.
    """

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.changes: dict[str, Callable[[Any], Any]] = {}
        self.requests: list[tuple[str, Any]] = []
        self.options = {
            "instance_id": "1",
            "model_config": {
                "model": "tiny",
                "dtype": "torch.float32",
                "max_model_len": 200,
                "logprobs_mode": "processed_logprobs",
            },
            "parallel_config": {"worker_extension_cls": "cppo.rollouts.vllm_worker.FileWeights"},
            "weight_transfer_config": None,
        }
        self.over = threading.Event()
        self._server: ThreadingHTTPServer | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def start(self) -> FakeVLLM:
        """Starts a server as it is after a start: with the checkpoint's weights."""
        self.version, self.worker = "default", Worker()
        handler = type("Handler", (_Handler,), {"vllm": self})
        self._server = _Listening(("127.0.0.1", self.port), handler)
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def stop(self) -> None:
        self.over.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def answer(self, path: str, body: Any) -> Any:
        if path == "/server_info?config_format=json":
            return {"vllm_config": self.options}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/collective_rpc":
            return {"results": [str(getattr(self.worker, body["method"])(*body["args"]))]}
        if path == "/get_world_size":
            return {"world_size": 2}
        if path == GENERATE:
            return self._completions(body)
        return {"success": True}

    def _completions(self, body: Any) -> Any:
        prompt: list[int] = []
        for token in body["token_ids"]:
            prompt += [token] * (PATCHES if token == IMAGE else 1)
        first = body["sampling_params"]["seed"] % 10 + 10
        return {
            "prompt_token_ids": prompt,
            "choices": [
                {
                    "token_ids": [first, 10 + number, CLOSING],
                    "logprobs": {
                        "content": [
                            {"token_id": token, "logprob": -0.5 * (number + 1)}
                            for token in (first, 10 + number, CLOSING)
                        ]
                    },
                    "weight_versions": [{"version": self.version, "start": 0, "end": 3}],
                }
                for number in range(body["sampling_params"]["n"])
            ],
        }


class _Listening(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    vllm: FakeVLLM

    def do_POST(self) -> None:
        self._do(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def do_GET(self) -> None:
        self._do(b"")

    def _do(self, data: bytes) -> None:
        vllm, body = self.vllm, json.loads(data) if data else None
        vllm.requests.append((self.path, body))
        faults = vllm.faults[self.path]
        if faults:
            answer = faults.popleft()(vllm)
            if answer is None:  # the connection ends
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                return
        else:
            change = vllm.changes.get(self.path, lambda answer: answer)
            try:
                answer = 200, json.dumps(change(vllm.answer(self.path, body))).encode()
            except (RuntimeError, ValueError) as error:
                answer = says(500, f"Worker failed with error '{error}'")(vllm)
        with contextlib.suppress(OSError):
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

    def log_message(self, format: str, *args: Any) -> None: ...


def says(status: int, message: str) -> Fault:
    """An answer in vLLM's words."""
    return lambda vllm: (status, json.dumps({"error": {"message": message}}).encode())


def hangs_up(vllm: FakeVLLM) -> None:
    """The connection ends without an answer."""


def is_silent(vllm: FakeVLLM) -> None:
    """No answer until the test is over."""
    vllm.over.wait(30)


def restarts(after: float) -> Fault:
    """The server dies, and is there again after some seconds."""

    def fault(vllm: FakeVLLM) -> None:
        def again() -> None:
            server, vllm._server = vllm._server, None
            if server is not None:
                server.shutdown()
                server.server_close()
                vllm.over.wait(after)
                vllm.start()

        threading.Thread(target=again, daemon=True).start()

    return fault
