"""Running a model without leaving a trace on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

# Buffers that a forward pass writes into (rotary frequencies, counters) are small.
_SMALL = 1 << 16


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, autocast or compilation; everything is put back afterwards.

    Put back are the attributes, modes, hooks and buffers of every module, its configs, and the
    state of the random number generators. Parameters are not: a forward pass leaves them alone.
    """
    device = next(model.parameters()).device
    modules, configs = list(model.modules()), model_configs(model)
    attributes = [(vars(holder), dict(vars(holder))) for holder in [*modules, *configs]]
    # transformers adds hooks at the first forward, and notes in an attribute that they are there.
    attributes += [
        (hooks, dict(hooks))
        for module in modules
        for name, hooks in vars(module).items()
        if "hooks" in name and isinstance(hooks, dict)
    ]
    buffers = [(module._buffers, dict(module._buffers)) for module in modules]
    values = [
        (buffer, buffer._version, buffer.clone())
        for _, named in buffers
        for buffer in named.values()
        if buffer is not None and buffer.numel() <= _SMALL
    ]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(forked_random(device))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            model.eval()
            yield
        finally:
            for now, before in attributes + buffers:
                now.clear()
                now.update(before)
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.copy_(value)
            torch.clear_autocast_cache()


def forked_random(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside, on the CPU or on `device`, leaves their generators as they were.

    Left to itself `fork_rng` takes every GPU of the machine, and warns of it.
    """
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def model_configs(model: nn.Module) -> list[Any]:
    """Every config that a module of the model reads."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if config is not None and id(config) not in found and hasattr(config, "sub_configs"):
            found[id(config)] = config
            for name in config.sub_configs:
                add(getattr(config, name, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())
