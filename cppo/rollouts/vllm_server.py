"""A `vllm serve` as an engine: sampling over HTTP, with weights that are sent to it.

The server must be vLLM 0.32 or later, started with (`start_command` prints it):

    VLLM_SERVER_DEV_MODE=1          the routes by which weights are changed and its options read
    --enable-scale-out              /inference/v1/generate: token ids in, token ids out, and the
                                    version of the weights that sampled each of them
    --logprobs-mode processed_logprobs
                                    log-probabilities of the distribution that is sampled, that is
                                    after the temperature and without suppressed tokens
    --worker-extension-cls cppo.rollouts.vllm_worker.FileWeights     for weights by a file, or
    --weight-transfer-config '{"backend": "nccl"}'                   for weights by NCCL
    --dtype, --max-model-len        the trainer's compute dtype; prompt and completion together

Nothing of what it answers is trusted: its prompt must be ours to the token, every completion what
was asked for (`vllm_requests.collected`), and every token of it sampled by the weights of the last
`sync`.
"""

from __future__ import annotations

import base64
import functools
import io
import math
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from PIL import Image
from torch import Tensor

from cppo.model.prompts import Prompts
from cppo.options.vllm import VLLMConfig
from cppo.rollouts.engine import EngineError, StaleWeights
from cppo.rollouts.sampler import Draws, Sampled, Sampling
from cppo.rollouts.vllm_http import PassingError, Server, start_command
from cppo.rollouts.vllm_requests import (
    Choice,
    Request,
    check_prompt,
    collected,
    requests,
    sampling_arguments,
)
from cppo.rollouts.vllm_weights import sender

_GENERATE = "/inference/v1/generate"
_LOGPS = "processed_logprobs"
# vLLM's way to write NaN, minus infinity and "there is none" in JSON.
_NO_LOGP = -9999.0
# Weights that are on their way: no completion of theirs is used, whoever asked for it.
_HALFWAY = "-incomplete"


class ServerEngine:
    """Samples from a vLLM server.

    Args:
        options: address, timeouts, how weights reach it.
        image_token: the placeholder of an image's patch; None: of a text model.
        vocab: ids below it are tokens.
        say: is told what is waited for and what is tried again.
        on_gpu: whether the trainer is on a GPU: the "auto" of `VLLMConfig.transfer`.
    Raises: EngineError for a server that does not come up or was started with other options.
    """

    name = "vllm_server"

    version: str | None = None
    """Of the weights that the server has; None: none that are known. Of several processes one
    calls `sync`, and the others take over its version."""
    dtype: str | None
    """Of the server's weights, such as "bfloat16"."""
    max_model_len: int
    """Tokens of a prompt and its completion at most."""

    def __init__(
        self,
        options: VLLMConfig,
        *,
        image_token: int | None,
        vocab: int,
        say: Callable[[str], None] = print,
        on_gpu: bool = False,
    ) -> None:
        transfer = options.transfer
        if transfer == "auto":
            transfer = "nccl" if on_gpu else "file"
        self._options = options
        self._image_token = image_token
        self._vocab = vocab
        self._say = say
        self._run = f"cppo-{uuid.uuid4().hex[:12]}"
        self._syncs = 0
        self._server = Server(
            options.address.rstrip("/"),
            start_command(options.address, transfer),
            options.start_timeout,
            options.request_timeout,
            options.retries,
            say,
        )
        self._sender = sender(transfer, options, self._server)
        self._server.wait()
        self._read_options()

    def rows_at_once(self, width: int) -> int | None:
        """Any number: the server queues what it has no room for."""
        return None

    def generate(self, prompts: Prompts, sampling: Sampling, draws: Draws) -> Sampled:
        """Completions of all prompts; the same `draws` give the same ones.

        Raises: StaleWeights if the server has not the weights of the last `sync`; EngineError for
            one that does not answer, refuses, or answers what was not asked for.
        """
        if self.version is None:
            raise StaleWeights(
                f"cppo.rollouts: the vLLM server at {self._options.address} has no weights that "
                "are known: sync them first"
            )
        asked = requests(prompts, sampling, draws)
        self._check_lengths([len(own.expanded) for own in asked], sampling)
        answers = self._server.post_all(
            _GENERATE,
            [functools.partial(_body, request, sampling) for request in asked],
            lambda number, answer: self._choices(answer, asked[number]),
        )
        return collected(answers, asked, sampling, self._vocab)

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sends all weights, named as on the hub, and tied heads under both names.

        Raises: EngineError if they do not arrive; the server has no usable weights then.
        """
        self.version = None
        self._syncs += 1
        version = f"{self._run}-{self._syncs}"
        with self._sender.holding(weights):
            for tries in range(1, self._options.retries + 2):
                try:
                    self._send(version)
                    break
                except PassingError as error:
                    if tries > self._options.retries:
                        raise
                    self._say(f"the weights did not arrive, and are sent again: {error}")
                    self._server.pause(tries)
                    self._server.wait()
        self.version = version

    def sleep(self) -> None:
        if self._options.sleep:
            self._server.post("/sleep?level=1")

    def wake(self) -> None:
        if self._options.sleep:
            self._server.post("/wake_up")

    def close(self) -> None:
        """Leaves the server running."""
        self._sender.close()

    def _send(self, version: str) -> None:
        self._set_version(version + _HALFWAY)
        self._sender.send()
        # What was computed with other weights: of prompts, of images, of their patches.
        reset = self._server.post("/reset_prefix_cache")
        if not (isinstance(reset, dict) and reset.get("success")):
            raise PassingError(
                f"cppo.rollouts: the vLLM server at {self._options.address} does not forget its "
                "prefix cache: requests of somebody else are running"
            )
        self._server.post("/reset_mm_cache")
        self._server.post("/reset_encoder_cache")
        self._set_version(version)

    def _set_version(self, version: str) -> None:
        self._server.post("/update_weight_version", {"new_version": version})

    def _read_options(self) -> None:
        """Reads what the server was started with.

        Raises: EngineError for what cannot be used.
        """
        try:
            config = self._server.get("/server_info?config_format=json")["vllm_config"]
            model = config["model_config"]
            self.max_model_len = int(model["max_model_len"])
            self.dtype = str(model["dtype"]).removeprefix("torch.")
            found = {
                "--logprobs-mode": (model["logprobs_mode"], _LOGPS),
                **self._sender.options(config),
            }
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"cppo.rollouts: the server at {self._options.address} does not describe itself "
                f"as vLLM 0.32 does ({type(error).__name__}: {error})"
            ) from error
        wrong = [
            f"{name} {has}, not {wanted}" for name, (has, wanted) in found.items() if has != wanted
        ]
        if wrong:
            raise EngineError(
                f"cppo.rollouts: the vLLM server at {self._options.address} was started with "
                f"{' and '.join(wrong)}; start it as\n  {self._server.start}"
            )
        wanted = self._options.max_model_len
        if wanted is not None and wanted > self.max_model_len:
            raise EngineError(
                f"cppo.rollouts: VLLMConfig.max_model_len is {wanted}, the vLLM server at "
                f"{self._options.address} takes {self.max_model_len} tokens"
            )
        self._say(
            f"the vLLM server at {self._options.address} has {model['model']} in {self.dtype}, "
            f"{self.max_model_len} tokens at most"
        )

    def _check_lengths(self, prompts: list[int], sampling: Sampling) -> None:
        longest = max(prompts, default=0)
        if longest + sampling.max_new_tokens > self.max_model_len:
            raise EngineError(
                f"cppo.rollouts: a prompt of {longest} tokens and {sampling.max_new_tokens} new "
                f"ones are more than the {self.max_model_len} that the vLLM server at "
                f"{self._options.address} takes: start it with a larger --max-model-len"
            )

    def _choices(self, answer: Any, request: Request) -> list[Choice]:
        """The completions of an answer to one question."""
        try:
            theirs = list(answer["prompt_token_ids"])
            choices = [
                Choice(
                    list(choice["token_ids"]),
                    [_logp(entry) for entry in choice["logprobs"]["content"]],
                )
                for choice in answer["choices"]
            ]
            versions = [
                {span["version"] for span in choice["weight_versions"]}
                for choice in answer["choices"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"cppo.rollouts: the vLLM server at {self._options.address} answers in another "
                f"form than vLLM 0.32 does ({type(error).__name__}: {error}): {str(answer)[:300]}"
            ) from error
        name = f"the vLLM server at {self._options.address}"
        check_prompt(theirs, request, name, self._image_token)
        if any(sampled_by != {self.version} for sampled_by in versions):
            found = ", ".join(sorted(map(str, set().union(*versions) - {self.version})))
            self.version = None
            raise StaleWeights(
                f"cppo.rollouts: the vLLM server at {self._options.address} sampled with the "
                f"weights {found!r}, not with those of the last sync: it was restarted, or "
                "somebody else changed them"
            )
        return choices


def _body(request: Request, sampling: Sampling) -> dict[str, Any]:
    """As `vllm.entrypoints.scale_out.token_in_token_out.protocol.GenerateRequest`."""
    parts = [{"type": "image_url", "url": _data_url(image)} for image in request.images]
    return {
        "token_ids": request.token_ids,
        "sampling_params": sampling_arguments(sampling, request.seed),
        "return_token_ids": True,
        "content_parts": parts or None,
    }


def _data_url(image: Image.Image) -> str:
    """The image without a loss; vLLM converts it to RGB."""
    file = io.BytesIO()
    # Level 1 takes two thirds of the default's time, for a tenth more bytes.
    image.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _logp(entry: dict[str, Any]) -> float:
    value = float(entry["logprob"])
    return math.nan if value <= _NO_LOGP else value
