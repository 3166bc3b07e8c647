"""What samples completions: an engine.

The built-in one runs the policy's own model. Another one (`cppo.rollouts.vllm`) holds weights of
its own, which `sync` brings up to date, and computes in its own kernels: its numbers differ from
the trainer's by rounding, and by more where it computes in another dtype. So an engine says with
which log-probability it sampled each token, and the loss corrects for the difference
(`LossConfig.importance_correction`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from cppo.model.prompts import Prompts
from cppo.rollouts.memory import rows_that_fit
from cppo.rollouts.sampler import Draws, Sampled, Sampling, decode


class EngineError(RuntimeError):
    """An engine that cannot sample, or whose answer cannot be trusted."""


class StaleWeights(EngineError):
    """An engine that has other weights than those of the last `sync`: they must be sent again."""


class Engine(Protocol):
    """Samples completions from the plain softmax of a policy.

    Every method but `generate` may do nothing. `generate` raises EngineError in words; it never
    returns fewer completions than were asked for.
    """

    name: str
    """As in `CPPOConfig.engine`."""
    version: str | None
    """Of the weights of the last sync, for an engine that several processes share: one of them
    calls `sync`, the others take this over. None: nothing to take over."""

    @property
    def dtype(self) -> str | None:
        """Of its weights, such as "bfloat16"; None: what `VLLMConfig.dtype` says."""

    def rows_at_once(self, width: int) -> int | None:
        """Completions of `width` tokens, prompt included, that fit into its memory; None: any."""

    def generate(self, prompts: Prompts, sampling: Sampling, draws: Draws) -> Sampled:
        """Completions of all prompts; the same `draws` give the same ones."""

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over all weights, named as on the hub. One that raises leaves no usable weights."""

    def sleep(self) -> None:
        """Gives memory free while nothing is sampled."""

    def wake(self) -> None:
        """Takes it back."""

    def close(self) -> None:
        """Ends what the engine runs."""


@dataclass
class BuiltinEngine:
    """The decoding loop of `cppo.rollouts.sampler` on the policy's own model."""

    model: nn.Module
    name: str = "builtin"
    version: str | None = None
    dtype: str | None = None

    def rows_at_once(self, width: int) -> int | None:
        return rows_that_fit(self.model, width)

    def generate(self, prompts: Prompts, sampling: Sampling, draws: Draws) -> Sampled:
        was_training = self.model.training
        self.model.eval()
        try:
            return decode(self.model, prompts, sampling, draws)
        finally:
            self.model.train(was_training)

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Its weights are the policy's."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...
