"""Requests to a vLLM server: many in flight, each with a deadline, each repeated if that may help.

There are no threads: a request in flight is a socket, and all of them are waited for together. So a
signal ends a rollout at once, and the server drops a request as soon as its socket is closed.
"""

from __future__ import annotations

import http.client
import json
import selectors
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from cppo.rollouts.engine import EngineError

T = TypeVar("T")

# vLLM queues what it has no room for: this many questions keep it busy.
_IN_FLIGHT = 64
# Seconds before a request is made again, doubled with each of its failures.
_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
_LOOK_EVERY = 0.5
_CONNECT_TIMEOUT = 10.0
_WORDS = 500  # characters of an answer that an error repeats
_FILE_WORKER = "cppo.rollouts.vllm_worker.FileWeights"


class RefusedError(EngineError):
    """The server does not do what it was asked for; `status` is 4xx."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class PassingError(EngineError):
    """A failure that may pass, and did not in the tries that there were."""


class _Failure(Exception):
    """One try that failed for a reason that may pass; `is_away`: the server may be gone."""

    def __init__(self, reason: str, *, is_away: bool = False) -> None:
        super().__init__(reason)
        self.is_away = is_away


class _Call(NamedTuple):
    """A request in flight: its number among all, and which try it is."""

    number: int
    tries: int
    connection: http.client.HTTPConnection
    deadline: float


class _Failed(NamedTuple):
    number: int
    tries: int
    failure: _Failure


def start_command(address: str, transfer: str, model: str = "MODEL") -> str:
    """The shell command that starts a server which cppo can use.

    Args:
        transfer: "nccl" or "file", as in `VLLMConfig`.
    """
    url = urlsplit(address)
    weights = (
        """--weight-transfer-config '{"backend": "nccl"}'"""
        if transfer == "nccl"
        else f"--worker-extension-cls {_FILE_WORKER}"
    )
    return (
        f"VLLM_SERVER_DEV_MODE=1 vllm serve {model} --host {url.hostname or '127.0.0.1'} "
        f"--port {url.port or 8000} --dtype bfloat16 --enable-scale-out "
        f"--logprobs-mode processed_logprobs --generation-config vllm {weights}"
    )


@dataclass(frozen=True)
class Server:
    """A vLLM server.

    Args:
        address: http://host:port.
        start: how to start it, for the errors.
        start_timeout, request_timeout, retries: as in `VLLMConfig`.
        say: is told what is waited for and what is tried again.
    """

    address: str
    start: str
    start_timeout: float
    request_timeout: float
    retries: int
    say: Callable[[str], None]

    def wait(self) -> None:
        """Waits until the server is healthy.

        Raises: EngineError if it is not within `start_timeout`.
        """
        deadline = time.monotonic() + self.start_timeout
        reason = self._illness()
        if reason:
            self.say(f"waiting for the vLLM server at {self.address} ({reason})")
        while reason:
            if time.monotonic() >= deadline:
                raise EngineError(
                    f"cppo.rollouts: no vLLM server at {self.address} within start_timeout = "
                    f"{self.start_timeout:g} s ({reason}); start one with\n  {self.start}"
                )
            time.sleep(min(_LOOK_EVERY, self.start_timeout))
            reason = self._illness()

    def pause(self, tries: int) -> None:
        """Lets time pass after a try that failed, more after each one."""
        time.sleep(min(_PAUSE * 2 ** (tries - 1), _LONGEST_PAUSE))

    def get(self, path: str) -> Any:
        """The answer to a question about the server."""
        return _Calls(self, "GET", path, [lambda: None], self.retries).all(_answer)[0]

    def post(self, path: str, body: Any = None) -> Any:
        """The answer to one request, which is made once; None for an empty answer.

        Raises: as `post_all`.
        """
        return _Calls(self, "POST", path, [lambda: body], 0).all(_answer)[0]

    def post_all(
        self, path: str, bodies: Sequence[Callable[[], Any]], read: Callable[[int, Any], T]
    ) -> list[T]:
        """What `read` makes of the answers, in the order of the requests.

        Args:
            bodies: each makes a request, when it is sent.
            read: of a request's number and its answer; what it raises ends all requests.
        Raises: RefusedError for a status of 4xx; PassingError for a request without an answer in
            `retries` + 1 tries; EngineError for a server that went away and does not come back.
        """
        return _Calls(self, "POST", path, bodies, self.retries).all(read)

    def send(self, method: str, path: str, body: Any) -> http.client.HTTPConnection:
        """A connection from which the answer to a request is to be read.

        Raises: OSError, HTTPException.
        """
        url = urlsplit(self.address)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        timeout = min(_CONNECT_TIMEOUT, self.request_timeout)
        connection = kind(url.hostname or "127.0.0.1", url.port, timeout=timeout)
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Connection": "close"}
        try:
            connection.request(method, url.path.rstrip("/") + path, data, headers)
        except BaseException:
            connection.close()
            raise
        return connection

    def _illness(self) -> str:
        """Why the server cannot be used yet; empty if it can."""
        try:
            connection = self.send("GET", "/health", None)
            try:
                status = connection.getresponse().status
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            return _named(error)
        return "" if status == 200 else f"/health answers {status}"


class _Calls:
    """Requests to one path.

    Args:
        bodies: each makes a request.
        retries: how often each is made again.
    """

    def __init__(
        self,
        server: Server,
        method: str,
        path: str,
        bodies: Sequence[Callable[[], Any]],
        retries: int,
    ) -> None:
        self._server = server
        self._method = method
        self._path = path
        self._bodies = bodies
        self._retries = retries
        self._waiting = deque((number, 1) for number in range(len(bodies)))
        self._open = selectors.DefaultSelector()

    def all(self, read: Callable[[int, Any], T]) -> list[T]:
        """What `read` makes of all answers."""
        answers: dict[int, T] = {}
        try:
            while len(answers) < len(self._bodies):
                failed = self._send()
                for call in self._ready():
                    try:
                        answer = self._receive(call)
                    except _Failure as failure:
                        failed.append(_Failed(call.number, call.tries, failure))
                    else:
                        answers[call.number] = read(call.number, answer)
                if failed:
                    self._again(failed)
        finally:
            # What is still open is not waited for, and the server stops working on it.
            for key in list(self._open.get_map().values()):
                key.data.connection.close()
            self._open.close()
        return [answers[number] for number in range(len(self._bodies))]

    def _send(self) -> list[_Failed]:
        """Sends what there is room for, up to one that cannot be sent; returns that one."""
        while self._waiting and len(self._open.get_map()) < _IN_FLIGHT:
            number, tries = self._waiting.popleft()
            try:
                connection = self._server.send(self._method, self._path, self._bodies[number]())
            except (OSError, http.client.HTTPException) as error:
                return [_Failed(number, tries, _Failure(_named(error), is_away=True))]
            deadline = time.monotonic() + self._server.request_timeout
            call = _Call(number, tries, connection, deadline)
            self._open.register(connection.sock, selectors.EVENT_READ, call)
        return []

    def _ready(self) -> list[_Call]:
        """Requests that are answered or late, as soon as there are any."""
        open_calls = [key.data for key in self._open.get_map().values()]
        if not open_calls:
            return []
        patience = min(call.deadline for call in open_calls) - time.monotonic()
        ready = [key.data for key, _ in self._open.select(max(patience, 0))]
        now = time.monotonic()
        return ready + [call for call in open_calls if call.deadline <= now and call not in ready]

    def _receive(self, call: _Call) -> Any:
        """The answer to a request.

        Raises: RefusedError; _Failure.
        """
        self._open.unregister(call.connection.sock)
        late = f"does not answer within request_timeout = {self._server.request_timeout:g} s"
        try:
            patience = call.deadline - time.monotonic()
            if patience <= 0:
                raise _Failure(late)
            call.connection.sock.settimeout(patience)
            response = call.connection.getresponse()
            status, data = response.status, response.read()
        except TimeoutError:
            raise _Failure(late) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Failure(_named(error), is_away=True) from error
        finally:
            call.connection.close()
        if 400 <= status < 500 and status != 429:
            raise RefusedError(
                f"cppo.rollouts: the vLLM server at {self._server.address} refuses {self._path} "
                f"({status}): {_words(data)}{self._hint(status)}",
                status,
            )
        if status != 200:
            raise _Failure(f"answers {status}: {_words(data)}")
        try:
            return json.loads(data) if data else None
        except ValueError:
            raise _Failure(f"answers with something that is not JSON: {_words(data)}") from None

    def _hint(self, status: int) -> str:
        # A server without a route's option answers one of these.
        return f"\nIt must be started as\n  {self._server.start}" if status in (403, 404) else ""

    def _again(self, failed: list[_Failed]) -> None:
        """Makes failed requests again, after a pause.

        Raises: PassingError for one that has no tries left.
        """
        is_away = any(one.failure.is_away for one in failed)
        for number, tries, failure in failed:
            if tries > self._retries:
                count = "1 try" if tries == 1 else f"{tries} tries"
                raise PassingError(
                    f"cppo.rollouts: the vLLM server at {self._server.address} {failure} "
                    f"({self._path}, in {count})"
                )
            self._waiting.append((number, tries + 1))
        self._server.say(
            f"the vLLM server {failed[0].failure}; {len(failed)} of its requests are made again"
        )
        self._server.pause(failed[0].tries)
        if is_away:
            self._server.wait()


def _answer(number: int, answer: Any) -> Any:
    return answer


def _words(data: bytes) -> str:
    """What an answer says, without vLLM's wrapping."""
    text = data.decode(errors="replace").strip()
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    if isinstance(found, dict):
        error = found.get("error", found.get("detail", found))
        found = error.get("message", error) if isinstance(error, dict) else error
    text = found if isinstance(found, str) else json.dumps(found)
    return (text[:_WORDS] + " ..." if len(text) > _WORDS else text) or "(no words)"


def _named(error: BaseException) -> str:
    return f"breaks off ({type(error).__name__}: {error})"
