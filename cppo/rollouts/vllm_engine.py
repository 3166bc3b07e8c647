"""vLLM in this process: it takes over the policy's weights in place, and samples.

Only what vLLM offers to everyone is called: `LLM`, `SamplingParams`, `collective_rpc`, the resets
of its caches, `sleep` and `wake_up`. With several processes each has an engine of its own (data
parallel).
"""

from __future__ import annotations

import copy
import os
import random
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cppo.extras import require_package
from cppo.model.hub_weights import apart, hub_weights
from cppo.model.left_as_found import forked_random
from cppo.model.processor_files import save_processor
from cppo.model.prompts import Prompts
from cppo.model.wrappers import has_vision, unwrap
from cppo.options.vllm import VLLMConfig
from cppo.rollouts.engine import EngineError
from cppo.rollouts.memory import free_memory, token_bytes
from cppo.rollouts.sampler import Draws, Sampled, Sampling
from cppo.rollouts.vllm_requests import (
    Choice,
    Request,
    check_prompt,
    collected,
    requests,
    sampling_arguments,
)

_ROWS = 256  # completions that vLLM runs together unless it is told otherwise


class VLLMEngine:
    """An engine (`cppo.rollouts.engine.Engine`) that is vLLM in this process.

    Args:
        model: the policy: its config and its device; its weights come by `sync`.
        processor: its processor or tokenizer.
        options: `CPPOConfig.vllm`.
        dtype: of the engine's weights, "float32" for example.
    Raises: ImportError without vLLM; EngineError if it cannot start.
    """

    name = "vllm"
    version: str | None = None  # no other process has a part in it

    def __init__(self, model: nn.Module, processor: Any, options: VLLMConfig, dtype: str) -> None:
        require_package("CPPOConfig.engine = 'vllm'", "vllm", "vllm")
        base = unwrap(model)
        self._device = next(base.parameters()).device
        self._image_token = base.config.image_token_id if has_vision(base) else None
        self._vocab = base.config.get_text_config().vocab_size
        self._sleeps = options.sleep and self._device.type == "cuda"
        self._broken_by = ""
        self._folder = tempfile.TemporaryDirectory(prefix="cppo-vllm-")
        _save(model, processor, self._folder.name)
        arguments = self._arguments(base, options, dtype) | (options.arguments or {})
        self.dtype: str | None = str(arguments["dtype"]).removeprefix("torch.")
        _set_environment(self._device)
        with _left_alone(self._device), torch.autocast(self._device.type, enabled=False):
            try:
                from vllm import LLM, SamplingParams

                self._llm: Any = LLM(**arguments)
            except Exception as error:
                raise EngineError(
                    f"cppo.rollouts: vLLM does not start with {_words(arguments)}: {_said(error)}"
                ) from error
        for file in Path(self._folder.name).glob("*.safetensors"):
            file.unlink()  # they are loaded, and are as large as the model
        self._params: Any = SamplingParams
        self._limit = int(self._llm.model_config.max_model_len)
        # Of its attentions the one of CPUs knows no other mask than the causal one, and is taken.
        self._hides_image = self._device.type == "cpu" and self._llm.model_config.is_mm_prefix_lm

    def _arguments(self, base: Any, options: VLLMConfig, dtype: str) -> dict[str, Any]:
        """The arguments of `vllm.LLM`."""
        is_gpu = self._device.type == "cuda"
        arguments: dict[str, Any] = {
            "model": self._folder.name,
            "dtype": dtype,
            "max_model_len": options.max_model_len,
            "enforce_eager": options.enforce_eager or not is_gpu,
            "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled
            "generation_config": "vllm",  # not the checkpoint's sampling options
            "enable_sleep_mode": self._sleeps,
            "disable_log_stats": True,
            "seed": 0,
        }
        if is_gpu:
            arguments["gpu_memory_utilization"] = options.memory_share
        else:
            longest = options.max_model_len or base.config.get_text_config().max_position_embeddings
            cached = token_bytes(base.config.get_text_config(), getattr(torch, dtype)) * longest
            room = int(options.memory_share * free_memory(self._device))
            arguments["kv_cache_memory_bytes"] = min(_ROWS * cached, room)
            # A prompt in parts needs a seeded generator to go back, which one of a CPU cannot.
            arguments["enable_chunked_prefill"] = False
        if self._image_token is not None:
            limits = {"image": options.images_per_prompt, "video": 0}
            arguments["limit_mm_per_prompt"] = limits
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # An engine in each process of a group that is there already.
            arguments["distributed_executor_backend"] = "external_launcher"
        return arguments

    def rows_at_once(self, width: int) -> int | None:
        return None  # vLLM runs as many as it has room for

    def generate(self, prompts: Prompts, sampling: Sampling, draws: Draws) -> Sampled:
        asked = requests(prompts, sampling, draws)
        if self._hides_image and any(own.images for own in asked):
            raise EngineError(
                "cppo.rollouts: vLLM on a CPU hides from a token of an image those behind it, and "
                "the tokens of an image of this model see each other both ways: it would sample "
                "from another model; take engine 'builtin', or a GPU"
            )
        self._check_lengths([len(own.expanded) for own in asked], sampling)
        params = [self._params(**sampling_arguments(sampling, own.seed)) for own in asked]
        # vLLM draws from the generators of the process even where every request has its own.
        with self._in_one_piece("failed"), forked_random(self._device):
            found = self._llm.generate([_input(own) for own in asked], params, use_tqdm=False)
        for request, own in zip(asked, found, strict=False):
            check_prompt(list(own.prompt_token_ids), request, "vLLM", self._image_token)
        answers = [[_choice(completion) for completion in own.outputs] for own in found]
        return collected(answers, asked, sampling, self._vocab)

    def _check_lengths(self, prompts: list[int], sampling: Sampling) -> None:
        longest = max(prompts, default=0) + sampling.max_new_tokens
        if longest > self._limit:
            raise EngineError(
                f"cppo.rollouts: VLLMConfig.max_model_len must be at least {longest}, a prompt of "
                f"{max(prompts)} tokens and max_completion_tokens = {sampling.max_new_tokens}, got "
                f"{self._limit}"
            )

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        with self._in_one_piece("could not take over the weights"):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            # All that was computed with the old weights.
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("its prefix cache is in use")
            self._llm.reset_mm_cache()
            self._llm.llm_engine.reset_encoder_cache()

    @contextmanager
    def _in_one_piece(self, words: str) -> Iterator[None]:
        """Uses vLLM no more once something has broken off here.

        It would have a part of the weights, or requests whose answers come among the next ones.
        """
        if self._broken_by:
            raise EngineError(
                "cppo.rollouts: vLLM was broken off, start the run again "
                f"(train(resume_from='auto')): {self._broken_by}"
            )
        try:
            with torch.autocast(self._device.type, enabled=False):
                yield
        except BaseException as error:
            self._broken_by = _said(error)
            if not isinstance(error, Exception):
                raise
            raise EngineError(f"cppo.rollouts: vLLM {words}: {self._broken_by}") from error

    def sleep(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=1)

    def wake(self) -> None:
        if self._sleeps:
            self._llm.wake_up()

    def close(self) -> None:
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            self._folder.cleanup()


def _save(model: nn.Module, processor: Any, folder: str) -> None:
    """Writes what vLLM starts from.

    Its "dummy" weights, which would need no file, spoil buffers that no sync of weights mends: a
    vision model then reads its images wrongly.
    """
    from huggingface_hub import save_torch_state_dict

    base = unwrap(model)
    config = copy.deepcopy(base.config)
    # A model made from a config has none yet, and vLLM would take it for one of embeddings.
    config.architectures = config.architectures or [type(base).__name__]
    config.save_pretrained(folder)
    save_processor(processor, folder)
    # Of two names that share memory the file would have one, and not the one that vLLM reads.
    save_torch_state_dict(apart(hub_weights(model)), folder)


def _input(asked: Request) -> dict[str, Any]:
    images = {"multi_modal_data": {"image": asked.images}} if asked.images else {}
    return {"prompt_token_ids": asked.token_ids, **images}


def _choice(completion: Any) -> Choice:
    ids = list(completion.token_ids)
    steps = completion.logprobs or []
    return Choice(ids, [own[token].logprob for own, token in zip(steps, ids, strict=False)])


def _words(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _said(error: BaseException) -> str:
    """An error of vLLM's in one line; those of pydantic have several."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _set_environment(device: torch.device) -> None:
    """What vLLM reads when it is imported and started; what the user has set stays."""
    # In this process: a generator of weights cannot be sent to another one.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if device.type == "cpu":
        # It would tie this process to some cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@contextmanager
def _left_alone(device: torch.device) -> Iterator[None]:
    """vLLM seeds every generator and takes torch.set_num_threads away: both are put back."""
    python, numpy, set_threads = random.getstate(), np.random.get_state(), torch.set_num_threads
    threads = torch.get_num_threads()
    try:
        with forked_random(device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
