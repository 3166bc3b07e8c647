"""The options of vLLM as an engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cppo.options.values import CheckedFields

ENGINES = ("builtin", "vllm", "vllm_server")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TRANSFERS = ("auto", "nccl", "file")
LOWEST_TEMPERATURE = 0.01  # vLLM takes it in place of a lower one, and says so in its log alone


@dataclass(frozen=True)
class VLLMConfig(CheckedFields):
    """Options of `CPPOConfig.engine` "vllm" and "vllm_server"; docs/rollouts.md says how to use it.

    Options of the engine itself are for "vllm": a server is started with options of its own.
    """

    dtype: str = "auto"
    """Dtype of the engine's weights: "float32", "bfloat16" or "float16". "auto": "bfloat16" for
    `CPPOConfig.precision` "bf16", "float32" for "fp32"."""
    max_model_len: int | None = None
    """Limit of a prompt and its completion together, in tokens. None: what the model allows."""
    memory_share: float = 0.3
    """Share of the GPU's memory for weights and cache of the engine; on a CPU, share of the free
    memory for the cache. In (0, 1]."""
    enforce_eager: bool = False
    """No compilation and no CUDA graphs: starts faster, samples slower. Always so on a CPU."""
    images_per_prompt: int = 8
    """Largest number of images in a question."""
    sleep: bool = False
    """Release the engine's memory while the policy is trained (GPUs)."""
    arguments: dict[str, Any] | None = None
    """Further arguments of `vllm.LLM`, which override those of cppo."""

    address: str = "http://127.0.0.1:8000"
    """Address of the server."""
    transfer: str = "auto"
    """How weights reach the server: "nccl" (GPUs), or "file" (one machine, through `folder`).
    "auto": "nccl" if the trainer is on a GPU."""
    folder: str | None = None
    """Where the file of weights is written, the same for trainer and server. None: /dev/shm, or the
    folder of temporary files."""
    start_timeout: float = 300.0
    """Seconds within which a server must answer, at the start and after it went away."""
    request_timeout: float = 600.0
    """Seconds within which a request must be answered."""
    retries: int = 2
    """How often a request that failed for a passing reason is made again."""

    check_every: int = 50
    """After the first and every so many syncs of weights, the engine's log-probabilities of a
    question's completions are compared with the trainer's. 0: never."""
    check_tolerance: float | None = None
    """Mean difference of log-probabilities that is too much, in nats. None: 1e-3 if both compute in
    fp32, else 0.1."""

    def __post_init__(self) -> None:
        self._take_plain()
        self._one_of("dtype", DTYPES)
        self._one_of("transfer", TRANSFERS)
        self._number("memory_share", above=0, at_most=1)
        self._integer("images_per_prompt", at_least=1)
        self._integer("retries", "check_every", at_least=0)
        if self.max_model_len is not None:
            self._integer("max_model_len", at_least=2)
        if self.check_tolerance is not None:
            self._number("check_tolerance", above=0, below=math.inf)
        self._number("start_timeout", "request_timeout", above=0, at_most=1e9)
        self._boolean("enforce_eager", "sleep")
        if not isinstance(self.address, str) or not self.address.startswith("http"):
            self._fail("address", "of the form http://host:port")
        if self.folder is not None and not isinstance(self.folder, str):
            self._fail("folder", "the path of a folder, or None")
        arguments = self.arguments
        if arguments is not None and not (
            isinstance(arguments, dict) and all(isinstance(name, str) for name in arguments)
        ):
            self._fail("arguments", "a dict with text as its keys, or None")
