"""A stand-in for vLLM: an engine with a model of its own, and trainers that have one."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
from torch import Tensor, nn
from trainer_cases import trainer_for

from cppo.model.hub_weights import hub_weights
from cppo.model.prompts import Prompts
from cppo.rollouts.engine import BuiltinEngine
from cppo.rollouts.sampler import Draws, Sampled, Sampling
from cppo.train import trainer as trainer_module


class OtherEngine:
    """An engine as vLLM is one: a model of its own, which gets weights by their names on the hub.

    Args:
        faults: what to raise at each call of "sync" or "generate", None for nothing.
    """

    name = "vllm"
    version: str | None = None
    dtype: str | None = None

    def __init__(self, model: nn.Module, faults: dict[str, list[Any]] | None = None) -> None:
        model = copy.deepcopy(model)
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        self._model: Any = model.requires_grad_(False)
        for p in self._model.parameters():
            p.zero_()  # no weights yet
        self._engine = BuiltinEngine(self._model)
        self._faults = faults or {}
        self.calls: list[str] = []
        self.takes_weights = True

    def _called(self, name: str) -> None:
        self.calls.append(name)
        faults = self._faults.get(name)
        fault = faults.pop(0) if faults else None
        if fault is not None:
            raise fault

    def rows_at_once(self, width: int) -> int | None:
        return None

    def generate(self, prompts: Prompts, sampling: Sampling, draws: Draws) -> Sampled:
        self._called("generate")
        return self._engine.generate(prompts, sampling, draws)

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = dict(hub_weights(self._model))
        for name, value in weights:
            if self.takes_weights:
                own.pop(name).copy_(value)
        self._called("sync")
        assert not (self.takes_weights and own), f"not sent: {sorted(own)}"

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self) -> None:
        self.calls.append("wake")

    def close(self) -> None: ...


def trainers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes trainers whose engine is `OtherEngine`; the engines that were made are its `made`."""

    def make(
        output_dir: Any,
        family: str = "text",
        faults: Any = None,
        name: str = "vllm",
        **options: Any,
    ) -> Any:
        def new(model: nn.Module, *_: Any) -> OtherEngine:
            engine = OtherEngine(model, faults)
            engine.name = name
            make.made.append(engine)  # type: ignore[attr-defined]
            return engine

        monkeypatch.setattr(trainer_module, "new_engine", new)
        return trainer_for(output_dir, family, engine=name, **options)

    make.made = []  # type: ignore[attr-defined]
    return make
