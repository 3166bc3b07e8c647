"""The model as the trainer uses it: attention, frozen parts, adapters, schedule, loading."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cppo import forward
from cppo.config import CPPOConfig


def frozen_copy(model: nn.Module, config: CPPOConfig) -> nn.Module:
    """The reference policy: a copy that is never trained."""
    device = next(model.parameters()).device
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    forward.set_attention(reference, forward.choose_attention(config.attention, device))
    return reference


def prepare(model: Any, config: CPPOConfig, device: torch.device) -> Any:
    """Attention, frozen parts, adapters and checkpointing, as the config asks."""
    model = model.to(device)
    forward.set_attention(model, forward.choose_attention(config.attention, device))
    sees = forward.has_vision(model)
    if config.freeze_vision_tower and sees:
        forward.vision_tower(model).requires_grad_(False)
    if config.gradient_checkpointing:
        # transformers renamed it within 5.x.
        old = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    if config.lora is not None:
        from peft import LoraConfig, get_peft_model

        lora = config.lora
        targets = lora.target_modules
        options = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            exclude_modules=r".*visual.*" if config.freeze_vision_tower and sees else None,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model = get_peft_model(model, options)
    return model


def schedule(optimizer: torch.optim.Optimizer, config: CPPOConfig) -> Any:
    """The learning rate's course over all optimizer steps of the run."""
    from transformers import get_scheduler

    steps = config.max_steps * config.num_iterations * config.optimizer_steps
    try:
        return get_scheduler(config.lr_scheduler, optimizer, config.warmup_steps, steps)
    except ValueError as error:  # "polynomial" with a rate below its last one
        raise ValueError(f"CPPOConfig.lr_scheduler: {error}") from error


def restore_schedule(scheduler: Any, state: dict[str, Any]) -> None:
    """Puts a schedule where that of a checkpoint was, at the rate that this run has there.

    The run may go on for longer than the one that wrote the checkpoint, and so at another rate.
    """
    scheduler.load_state_dict(state)
    rates = [
        base * course(scheduler.last_epoch)
        for base, course in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    scheduler._last_lr = rates
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def load_weights(model: Any, path: Path) -> None:
    """Loads a checkpoint's weights, or its adapters, into a prepared model."""
    if hasattr(model, "get_base_model"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(path), device="cpu"))
        return
    dtype = next(model.parameters()).dtype
    with quiet():
        loaded = type(model).from_pretrained(path, dtype=dtype)
    model.load_state_dict(loaded.state_dict())


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers over our own."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
