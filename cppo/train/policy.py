"""The policy in training: its model, reference, optimizer and schedule."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from cppo.extras import require_package, without_peft_warning
from cppo.model import forward
from cppo.model.check import check_training_mode
from cppo.model.left_as_found import forked_random
from cppo.model.precision import autocast, hold_weights
from cppo.model.ways import choose_ways, shown_picture, ways_of
from cppo.model.wrappers import (
    IN_TOWER,
    has_adapters,
    has_vision,
    own_modules,
    unwrap,
    vision_tower,
)
from cppo.options.trainer import CPPOConfig
from cppo.train.checkpoint import last_checkpoint

# Devices on which one kernel makes the optimizer's step, without temporaries as large as the model.
_FUSED = ("cpu", "cuda")


class Policy:
    """A model in training: with its reference policy, its optimizer and its learning rate.

    Args:
        model: a transformers causal model; it is changed in place, as `prepare` does.
        processor: of a vision-language model, or the tokenizer of a text model.
        suppressed: token ids that are never sampled.
    Raises: as `prepare`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        config: CPPOConfig,
        device: torch.device,
        suppressed: tuple[int, ...] = (),
    ) -> None:
        self.processor, self.config, self.suppressed = processor, config, suppressed
        self.reference: nn.Module | None = None
        if config.loss.kl_coef > 0 and config.lora is None:
            self.reference = frozen_copy(model, config, device, processor)
        self.model: Any = prepare(model, config, device, processor)
        self.ways = ways_of(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=device.type in _FUSED,
        )
        self.scheduler = schedule(self.optimizer, config)
        self.version = 0
        """Counts the changes of the weights."""
        self._device = device

    def warnings(self) -> list[str]:
        """What is slower with this model than with others."""
        found = [] if self.ways.packed else [str(self.ways)]
        if self.config.share_prompts and not self.ways.packed:
            found.append("share_prompts has no effect on this model, whose batches are padded")
        return found

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of `config.precision`."""
        return autocast(self.config.precision, self._device)

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """The reference policy: a frozen copy, or the model without its adapters."""
        without_adapters = self.model.disable_adapter() if self.config.lora else nullcontext()
        with without_adapters:
            yield self.model if self.reference is None else self.reference

    def optimizer_step(self, step: int) -> float:
        """Clips the gradients and steps; returns their norm before clipping.

        Args:
            step: of the run, for the message.
        Raises: FloatingPointError for a gradient that is not finite; nothing has changed then.
        """
        limit = self.config.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit).item()
        if not norm < float("inf"):
            raise FloatingPointError(
                f"cppo.CPPOTrainer: the gradient of step {step} is not finite (norm {norm}); "
                f"the last checkpoint is {last_checkpoint(self.config.output_dir)}"
            )
        self.version += 1
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def skip_step(self) -> None:
        """A step with nothing to learn: the learning rate goes on."""
        with warnings.catch_warnings():
            # torch asks for a step of the optimizer before the schedule's first.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()


def frozen_copy(
    model: nn.Module, config: CPPOConfig, device: torch.device, processor: Any = None
) -> nn.Module:
    """The reference policy: a copy on the device that is never trained."""
    reference = copy.deepcopy(model).eval().requires_grad_(False).to(device)
    hold_weights(reference, config.precision, may_round=True)
    _choose_ways(reference, config, processor)
    return reference


def prepare(model: Any, config: CPPOConfig, device: torch.device, processor: Any = None) -> Any:
    """Attention, frozen parts, adapters, checkpointing and precision, as the config asks.

    Raises: ValueError or ImportError naming the option, before anything is trained: for adapters
        that cannot be added, a model of which nothing would be trained, and one that would be run
        wrongly.
    """
    _check_lora(model, config)
    model = model.to(device)
    if config.freeze_vision_tower:
        if not has_vision(model):
            raise ValueError(
                "CPPOConfig.freeze_vision_tower must be False for a model without a vision tower, "
                f"got True for {type(unwrap(model)).__name__}"
            )
        vision_tower(model).requires_grad_(False)
    without_noise(model)
    if config.gradient_checkpointing:
        # transformers renamed it within 5.x.
        old = model.gradient_checkpointing_enable
        try:
            getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
        except ValueError as error:
            raise ValueError(
                f"CPPOConfig.gradient_checkpointing must be False for this model: {error}"
            ) from error
    if config.lora is not None:
        model = _with_adapters(model, config)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "cppo.CPPOTrainer: model must have parameters to train, but all are frozen "
            "(requires_grad is False)" + _frozen_adapters(model)
        )
    # Of a peft model, only the adapters are saved.
    hold_weights(model, config.precision, may_round=hasattr(model, "peft_config"))
    _choose_ways(model, config, processor)
    return model


def _choose_ways(model: nn.Module, config: CPPOConfig, processor: Any) -> None:
    device = next(model.parameters()).device
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    layers = forward.layers_of(model, dtype)
    name = forward.choose_attention(config.attention, device, "CPPOConfig.attention", layers)
    shown = shown_picture(model, processor, config.chat_template_kwargs or {})
    ways = choose_ways(model, name, shares=config.share_prompts, shown=shown)
    is_packed = ways.text if shown is None else ways.images
    check_training_mode(model, packed=is_packed, shown=shown)


def without_noise(model: nn.Module) -> None:
    """Turns off, in place, what a model itself draws in training mode: dropout, jitter of routers.

    The completions were sampled without it, so with it their importance ratios would be noise. The
    dropout of adapters stays (`LoraConfig.dropout`), and so does what is saved as config.json.
    """
    for module in own_modules(model):
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if re.search("drop|jitter", name) and isinstance(value, float):
                vars(module)[name] = 0.0


def _check_lora(model: Any, config: CPPOConfig) -> None:
    if config.lora is None:
        return
    require_package("CPPOConfig.lora", "peft", "peft")
    if has_adapters(model):
        adapters = list(getattr(model, "peft_config", ()))
        raise ValueError(
            "CPPOConfig.lora must be None for a model that has adapters already, "
            f"got {type(model).__name__}" + (f" with {adapters}" if adapters else "")
        )


def _frozen_adapters(model: Any) -> str:
    if not getattr(model, "peft_config", None):
        return ""
    return ": load its adapters with PeftModel.from_pretrained(..., is_trainable=True)"


def _with_adapters(model: Any, config: CPPOConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = config.lora
    assert lora is not None
    targets = lora.target_modules
    is_frozen = config.freeze_vision_tower and has_vision(model)
    options = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=IN_TOWER if is_frozen else None,
        task_type="CAUSAL_LM",
    )
    _check_targets(model, targets)
    with forked_random(next(model.parameters()).device):
        torch.manual_seed(config.seed)
        try:
            with without_peft_warning():
                return get_peft_model(model, options)
        except ValueError as error:  # layers of a kind that has no adapters, or all left out
            reason = " ".join(str(error).split())
            raise _target_error(model, targets, reason) from error


def _check_targets(model: nn.Module, targets: str | tuple[str, ...]) -> None:
    """Raises for a name that no layer has; peft is content with one of several that some has."""
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        if targets != "all-linear" and not any(re.fullmatch(targets, name) for name in names):
            raise _target_error(model, targets, "it matches no layer")
        return
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise _target_error(model, targets, f"there is no {target!r}")


def _target_error(model: nn.Module, targets: str | tuple[str, ...], reason: str) -> ValueError:
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    return ValueError(
        "LoraConfig.target_modules must be 'all-linear' or name layers of the model (linear ones: "
        f"{known}), got {targets!r}: {reason}"
    )


def schedule(optimizer: torch.optim.Optimizer, config: CPPOConfig) -> Any:
    """The learning rate's course over all optimizer steps of the run."""
    from transformers import get_scheduler

    steps = config.steps() * config.num_iterations * config.optimizer_steps
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
