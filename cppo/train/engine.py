"""The engine of a policy in training: it samples from the policy's weights and no others.

    prepare    before a rollout: new weights go to the engine
    generate   samples; after a sync at which a check is due, the engine's log-probabilities are
               compared with what the trainer computes for the same tokens

An engine that has lost its weights (a server that was restarted) gets them again, and is asked
again, once. Any other fault ends the run with an error: nothing was trained on it, and the last
checkpoint is as it was.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cppo.model.hub_weights import hub_weights
from cppo.model.prompts import Prompts
from cppo.model.wrappers import has_vision, unwrap
from cppo.options.trainer import CPPOConfig
from cppo.questions import Question
from cppo.rollouts.engine import BuiltinEngine, Engine, EngineError, StaleWeights
from cppo.rollouts.rollout import assembled
from cppo.rollouts.sampler import Draws, Sampled, Sampling
from cppo.train.batch import Batch
from cppo.train.policy import Policy
from cppo.train.processes import Processes
from cppo.train.views import token_logps

# Mean differences of log-probabilities that are too much: of fp32 on both sides, and of others.
_TOLERANCE_FP32 = 1e-3
_TOLERANCE = 0.1


def engine_dtype(config: CPPOConfig) -> str:
    """The dtype that the engine of a config computes in."""
    of_trainer = "bfloat16" if config.precision == "bf16" else "float32"
    is_own = config.engine == "builtin" or config.vllm.dtype == "auto"
    return of_trainer if is_own else config.vllm.dtype


def new_engine(
    model: Any, processor: Any, config: CPPOConfig, say: Callable[[str], None] = print
) -> Engine:
    """The engine that `config.engine` names, without the policy's weights.

    Raises: ImportError for one that is not installed; EngineError for one that does not start.
    """
    if config.engine == "builtin":
        return BuiltinEngine(model)
    if config.engine == "vllm":
        from cppo.rollouts.vllm_engine import VLLMEngine

        return VLLMEngine(model, processor, config.vllm, engine_dtype(config))
    from cppo.rollouts.vllm_server import ServerEngine

    base = unwrap(model)
    image_token = base.config.image_token_id if has_vision(base) else None
    vocab = base.config.get_text_config().vocab_size
    on_gpu = next(base.parameters()).device.type == "cuda"
    return ServerEngine(config.vllm, image_token=image_token, vocab=vocab, say=say, on_gpu=on_gpu)


class _Ahead:
    """A call of `generate` in a thread, which ends with the process.

    Args:
        questions: of the call. count: of their completions.
    """

    def __init__(
        self, questions: Sequence[Question], count: int, call: Callable[[], Sampled]
    ) -> None:
        self.questions, self.count = questions, count
        self._call = call
        self._found: Sampled | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = self._call()
        except Exception as error:
            self._error = error

    def wait(self) -> None:
        """Waits until it has returned or raised."""
        while self._thread.is_alive():
            self._thread.join(0.1)  # so that a signal is heard

    def result(self) -> Sampled:
        """What it returned. Raises what it raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        assert self._found is not None
        return self._found


class PolicyEngine:
    """An `Engine` whose weights are those of a policy.

    Args:
        engine: samples.
        policy: whose weights it takes over.
        processes: with a server, the first one sends weights.
        say: prints a line.
    """

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        processes: Processes,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.name = engine.name
        self._engine, self._policy, self._processes, self._say = engine, policy, processes, say
        self._version: int | None = None  # of the policy's weights that the engine has
        self._syncs = 0
        self._is_check_due = False
        self._ahead: _Ahead | None = None

    @property
    def version(self) -> str | None:
        """Of the weights that the engine has, as it names them."""
        return self._engine.version

    @version.setter
    def version(self, version: str | None) -> None:
        self._engine.version = version

    @property
    def dtype(self) -> str:
        """Of the engine's weights: a server was started with one of its own."""
        return self._engine.dtype or engine_dtype(self._policy.config)

    @property
    def holds_weights(self) -> bool:
        """Whether it has weights of its own."""
        return self.name != "builtin"

    @property
    def _is_shared(self) -> bool:
        return self.name == "vllm_server"

    def prepare(self) -> None:
        """Wakes it, and brings it the weights if they have changed. Collective.

        Raises: EngineError on every process if that fails; ValueError on the others.
        """
        if not self.holds_weights:
            return
        self.wait()
        # A server is one for all processes.
        call = self._processes.of_first if self._is_shared else self._processes.together
        call(self._engine.wake)
        if self._version == self._policy.version:
            return
        self._version = None  # an engine that has got half of them has none
        self.version = call(self._sync)
        self._has_synced()

    def wait(self) -> None:
        """Waits for what is sampled ahead: the engine must keep its weights as long."""
        if self._ahead is not None:
            self._ahead.wait()

    def _sync(self) -> str | None:
        self._version = None
        self.sync(hub_weights(self._policy.model))
        return self.version

    def _has_synced(self) -> None:
        every = self._policy.config.vllm.check_every
        self._is_check_due |= every > 0 and self._syncs % every == 0
        self._version = self._policy.version
        self._syncs += 1

    def rows_at_once(self, width: int) -> int | None:
        return self._engine.rows_at_once(width)

    def generate(self, prompts: Prompts, sampling: Sampling, draws: Draws) -> Sampled:
        try:
            return self._checked(prompts, sampling, draws, self._sampled_ahead(prompts, draws))
        except StaleWeights as error:
            if self._processes.size > 1:
                raise
            self._ahead = None
            self._say(f"{error}; they are sent again")
            self._sync()
            self._has_synced()
            self._is_check_due = True
            return self._checked(prompts, sampling, draws, None)

    def _checked(
        self, prompts: Prompts, sampling: Sampling, draws: Draws, ahead: Sampled | None
    ) -> Sampled:
        """What was sampled ahead, else what is sampled now; by an engine that passed its check."""
        found = self._engine.generate(prompts, sampling, draws) if ahead is None else ahead
        if self._is_check_due:
            first, group = prompts.of([0]), sampling.group_size
            now = found
            if ahead is not None:  # the policy has moved on since
                own = Draws(draws.seed, group, slice(0, group))
                now = self._engine.generate(first, sampling, own)
            self._check(first, sampling, now)
            self._is_check_due = False
        return found

    def sample_ahead(self, prompts: Prompts, sampling: Sampling, seed: int) -> None:
        """Starts to sample completions that a later `generate` of these questions will return."""
        count = len(prompts.questions) * sampling.group_size
        draws = Draws(seed, count, slice(0, count))
        call = functools.partial(self._engine.generate, prompts, sampling, draws)
        self._ahead = _Ahead(prompts.questions, count, call)

    def _sampled_ahead(self, prompts: Prompts, draws: Draws) -> Sampled | None:
        """The completions of these prompts, if they were sampled ahead.

        Raises: what sampling them has raised.
        """
        ahead = self._ahead
        if ahead is None or draws.count != ahead.count:
            return None
        first = draws.own.start * len(ahead.questions) // ahead.count
        own = ahead.questions[first : first + len(prompts.questions)]
        if list(map(id, own)) != list(map(id, prompts.questions)):
            return None
        if draws.own.stop == ahead.count:
            self._ahead = None
        found = ahead.result()
        return Sampled(found.tokens[draws.own], found.logps[draws.own])

    def _check(self, prompts: Prompts, sampling: Sampling, found: Sampled) -> None:
        """Compares the log-probabilities of the first question's completions.

        Raises: EngineError if they differ by more than the dtypes explain.
        """
        config, policy = self._policy.config, self._policy
        group = sampling.group_size
        own = Sampled(found.tokens[:group], found.logps[:group])
        rollouts = assembled(prompts, sampling, own, policy.processor)
        assert rollouts.sampling_logps is not None
        loss = dataclasses.replace(config.loss, temperature=sampling.temperature or 1.0)
        kept = torch.arange(group)
        batch = Batch(
            rollouts, torch.zeros(group), kept, suppressed=policy.suppressed, ways=policy.ways
        )
        was_training = policy.model.training
        policy.model.eval()
        try:
            with policy.autocast():
                ours = token_logps(policy.model, batch, dataclasses.replace(config, loss=loss))
        finally:
            policy.model.train(was_training)
        difference = (ours - rollouts.sampling_logps)[rollouts.completion_mask].abs()
        mean, largest = difference.mean().item(), difference.max().item()
        is_fp32 = self.dtype == "float32" and config.precision == "fp32"
        default = _TOLERANCE_FP32 if is_fp32 else _TOLERANCE
        limit = config.vllm.check_tolerance or default
        if not mean <= limit:
            raise EngineError(
                f"cppo.rollouts: the engine ({self.name}) samples from another distribution than "
                f"the policy's: log-probabilities of {len(difference)} tokens differ by {mean:.2g} "
                f"on average and {largest:.2g} at most, allowed {limit:g} on average "
                "(VLLMConfig.check_tolerance). It has other weights, another model or another "
                "image processor, or its dtype or `logprobs_mode` is another one; nothing was "
                "trained on its completions"
            )

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._engine.sync(weights)

    def sleep(self) -> None:
        """Gives memory free once every process has what it sampled. Collective."""
        if self._is_shared:
            self._processes.gather(None)
            self._processes.of_first(self._engine.sleep)
        else:
            self._engine.sleep()

    def wake(self) -> None:
        self._engine.wake()

    def close(self) -> None:
        self._engine.close()
