"""Completion pruning and contrastive perception in TRL's GRPOTrainer, trl >= 1.7.

    from cppo.integrations.trl import CPPO, CPPOGRPOTrainer

    trainer = CPPOGRPOTrainer(model, rewards, args=GRPOConfig(...), cppo=CPPO(prune_rate=0.75))

No code of TRL is copied. Five of its methods are wrapped; each calls `super()` and changes only
its arguments and its result:

    _generate_and_score_completions     returns a scored rollout, a dict of rows; the pruned rows
                                        are taken out of it
    _generate                           makes the completions; its prompts, with their images, are
                                        remembered
    _get_per_token_logps_and_entropies  runs every forward. In a rollout (old and reference
                                        log-probabilities) it waits until the rollout is pruned, or
                                        until somebody reads what it returned; in the loss its
                                        arguments are remembered
    _compute_loss                       the loss of a micro-batch. Its padding is cut off before;
                                        then the remembered forward is repeated on perturbed images
    _prepare_inputs                     the micro-batches of a rollout; where prompts are shared,
                                        the rows of a question are brought together

`check()` says whether the installed TRL has what is wrapped here, `patch_trl()` gives TRL our
kernel for log-probabilities, and runs that cannot work are refused when the trainer is made.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cppo.integrations import trl_packed, trl_vllm, trl_vllm_mend
from cppo.integrations.fit import AnyTrainer, parameters
from cppo.integrations.trl_fit import OPTIONAL, Fit, check, patch_trl
from cppo.integrations.trl_options import (
    CPPO,
    averages_rows,
    check_run,
    counts_padding,
    exchanged,
    per_device_train_batch_size,
)
from cppo.integrations.trl_perception import papo, weigh
from cppo.integrations.trl_pictures import pictures_of
from cppo.integrations.trl_postponed import Postponed
from cppo.integrations.trl_refill import Sampled, sample
from cppo.integrations.trl_rows import (
    ROUNDED,
    Batch,
    filled,
    keep,
    loss_mask,
    settled,
    take_rows,
    trimmed,
)
from cppo.integrations.trl_views import Forwards, contrast, view_seeds

__all__ = [
    "CPPO",
    "CPPOGRPOTrainer",
    "CPPOMixin",
    "Fit",
    "check",
    "patch_trl",
    "per_device_train_batch_size",
]


# What is wrapped; a trainer without them would train as if cppo were not there.
_WRAPPED = (
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    "_compute_loss",
)


class CPPOMixin(AnyTrainer):
    """Goes before any GRPOTrainer: `class Mine(CPPOMixin, TheirGRPOTrainer): ...`.

    Args: those of the trainer, and `cppo`, a `CPPO`.
    Raises: RuntimeError if the installed TRL does not fit; ValueError for a run that would lose
        rows or compute wrong numbers; TypeError for a `cppo` that is none.
    """

    def __init__(self, *args: Any, cppo: CPPO = CPPO(), **kwargs: Any) -> None:  # noqa: B008
        if not isinstance(cppo, CPPO):
            raise TypeError(
                f"cppo.integrations.trl: cppo must be a CPPO such as CPPO(prune_rate=0.75), got "
                f"{type(cppo).__name__}"
            )
        unfit = [str(fit) for fit in check() if not fit.fits and fit.part not in OPTIONAL]
        if unfit:
            raise RuntimeError("cppo.integrations.trl: " + "; ".join(unfit))
        trainer: Any = super()
        lacking = [name for name in _WRAPPED if not hasattr(trainer, name)]
        if lacking:
            raise ValueError(
                f"cppo.integrations.trl: {type(self).__name__} must be made of CPPOMixin and a "
                f"trainer that has {' and '.join(lacking)}, such as GRPOTrainer or RLOOTrainer; "
                "AsyncGRPOTrainer scores completions in a worker of its own, where nothing prunes "
                "them: take GRPOTrainer with vLLM"
            )
        self.cppo = cppo
        self._postpones = False
        self._has_warned = False
        self._forwards: Forwards | None = None
        self._prompts: list[Any] | None = None  # of the rollout that is being made
        self._draw = (-1, 0)  # the last rollout's global step, and its number within that step
        super().__init__(*args, **kwargs)
        check_run(self)
        if cppo.trim and not cppo.packs and counts_padding(self):
            self.cppo = dataclasses.replace(cppo, trim=False)
            warnings.warn(
                "cppo.integrations.trl: micro-batches are not trimmed (CPPO.trim): positions of "
                f"{type(self.accelerator.unwrap_model(self.model)).__name__} count the padding, so "
                "that the old and reference log-probabilities would be those of other positions; "
                "CPPO(pack=True) does without padding, if the model can be packed",
                stacklevel=2,
            )
        self._limit = trl_packed.prepare(self) if cppo.packs else None
        trl_vllm_mend.mend(self)

    # A rollout

    def _generate_and_score_completions(self, inputs: Any) -> Batch:
        """TRL's rollout, then pruning, then the postponed forwards on the rows that are left."""
        generate = super()._generate_and_score_completions
        if not self.model.training:
            return generate(inputs)
        # What a resumed run draws again: TRL restores the step, not its count of rollouts.
        step, number = self._draw
        number = number + 1 if step == self.state.global_step else 0
        self._draw = (self.state.global_step, number)
        draw = (self.args.seed, *self._draw)
        corrects = self.cppo.early and self.cppo.prunes and trl_vllm.is_postponed(self, generate)
        sampled = sample(self, inputs, draw, partial(self._rollout, generate, draw, corrects))
        batch = self._pruned(sampled, draw, corrects) if self.cppo.prunes else sampled.parts[0]
        if self.cppo.loss.perception != "vppo":
            return batch
        with torch.no_grad():
            return weigh(self, batch)

    def _pruned(self, sampled: Sampled, draw: tuple[int, ...], corrects: bool) -> Batch:
        """The rows that stay; corrects: whether vLLM's importance weights waited for it."""
        kept = keep(self, sampled.advantages(), sampled.lengths(), sampled.tokens(), draw)
        with torch.no_grad():
            batch = filled(*sampled.take(kept.rows, self.accelerator.gather), kept)
            if corrects:
                if batch.get("old_per_token_logps") is None:
                    batch["old_per_token_logps"] = self._old_logps(batch)
                trl_vllm.correct(self, batch)
        # The denominator of "dapo", "cispo" and "vespo": tokens of the remaining completions.
        batch["num_items_in_batch"] = self.accelerator.gather(loss_mask(batch).sum()).sum()
        self._metrics["train"]["cppo/kept_share"].append(kept.share)
        return batch

    def _rollout(
        self, generate: Any, draw: tuple[int, ...], corrects: bool, inputs: Any, refill: int
    ) -> Batch:
        """TRL's rollout of these questions; what can wait for the pruning is not computed.

        Args:
            corrects: whether vLLM's importance weights wait as well.
            refill: the number of the draw; 0 is the rollout's own questions.
        """
        self._postpones = self.cppo.early and self.cppo.prunes
        if corrects:
            self.vllm_importance_sampling_correction = False
        try:
            rollout: Batch = generate(inputs)
        finally:
            self._postpones = False
            prompts, self._prompts = self._prompts, None
            if corrects:
                self.vllm_importance_sampling_correction = True
        loss, seeds = self.cppo.loss, None
        if loss.perturbed_views:
            seeds = view_seeds(self, rollout, (*draw, refill))
            if seeds is not None:
                rollout["cppo_seed"] = seeds
                pictures = pictures_of(self, prompts, rollout)
                if pictures is not None:
                    rollout["cppo_pictures"] = pictures
        # VPPO asks where A is 0, and the gate of the contrast where it is positive.
        asks = seeds is not None and (loss.perception == "vppo" or loss.contrasts and loss.gating)
        if asks or self.cppo.drop_zero_variance:
            # Without centring an advantage of equal rewards may be one to learn from.
            below = math.inf if self.cppo.drop_zero_variance else ROUNDED
            rollout["advantages"] = settled(self, rollout["advantages"], below)
        return rollout

    def _generate(self, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's completions; what they are of is remembered, with its images."""
        self._prompts = prompts if self.model.training else None
        return super()._generate(prompts, *args, **kwargs)

    # A forward

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """TRL's forward, or a stand-in for it while a rollout waits to be pruned."""
        call = dict(kwargs, model=model, input_ids=input_ids, attention_mask=attention_mask)
        call |= dict(logits_to_keep=logits_to_keep, batch_size=batch_size)
        if self._postpones:
            compute = partial(self._postponed, call, self._adapters())
            shape = (len(input_ids), logits_to_keep)
            return Postponed.of(shape, input_ids.device, compute), None, None
        result = self._forward(call)
        if self._forwards is not None:
            self._forwards.append((call, result))
        return result

    def _forward(self, call: Batch) -> Any:
        """TRL's forward, now; without its padding where that is wanted."""
        if self.cppo.packs:
            call = call | {"model": trl_packed.Packed(self, call, self._limit)}
        return super()._get_per_token_logps_and_entropies(**call)

    def _postponed(
        self, call: Batch, adapters: AbstractContextManager[Any], rows: Tensor | None
    ) -> Tensor:
        """(K, T) log-probabilities of the rows that are left; None: of all, for who reads them."""
        if rows is not None:
            call = take_rows(call, rows)
        elif not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "cppo.integrations.trl: the old or reference log-probabilities are read before the "
                f"rollout of {type(self).__name__} is pruned: they are computed for every sampled "
                "completion, as with CPPO(early=False)",
                stacklevel=2,
            )
        size, count = call["batch_size"], len(call["input_ids"])
        with torch.no_grad(), adapters:
            return self._forward(call | {"batch_size": _part(size or count, count)})[0]

    def _old_logps(self, batch: Batch) -> Tensor:
        """(K, T) log-probabilities of a pruned rollout under the model that trains."""
        return self._forward(self._call_of(batch))[0]

    def _call_of(self, batch: Batch) -> Batch:
        """The arguments of the forward of a rollout under the model that trains."""
        ids, masks = (
            torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1)
            for name in ("ids", "mask")
        )
        names = parameters(super()._get_per_token_logps_and_entropies)
        call = {name: batch[name] for name in names if name in batch}
        call |= dict(model=self.model, input_ids=ids, attention_mask=masks)
        call |= dict(logits_to_keep=batch["completion_ids"].shape[1])
        size = _part(self.args.per_device_train_batch_size, len(ids))
        return call | {"batch_size": size}

    def _adapters(self) -> AbstractContextManager[Any]:
        """Sets the LoRA adapters as they are now, for a forward that runs later."""
        model = self.accelerator.unwrap_model(self.model)
        if not hasattr(model, "peft_config"):
            return nullcontext()
        from trl.trainer.utils import use_adapter

        config = model.active_peft_config
        # These have no layers whose status could be asked for.
        is_outside = config.is_prompt_learning or config.is_adaption_prompt
        enabled = (
            model.has_active_enabled_adapter if is_outside else model.get_model_status().enabled
        )
        return use_adapter(model, model.active_adapter if enabled else None)

    # A micro-batch

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's micro-batch; the rows of a question meet in one where prompts are shared."""
        trainer: Any = self
        before = getattr(trainer, "_buffered_inputs", None)
        inputs = super()._prepare_inputs(generation_batch)
        if not self.cppo.share_prompts or trainer._buffered_inputs is before:
            return inputs
        model = self.accelerator.unwrap_model(self.model)
        parts = trl_packed.together(model, trainer._buffered_inputs, exchanged(self))
        trainer._buffered_inputs = parts
        return parts[trainer._step % self.args.steps_per_generation]

    def _compute_loss(self, model: Any, inputs: Batch) -> Tensor:
        """TRL's loss of a micro-batch without its padding, plus contrastive perception."""
        log = self._metrics["train" if self.model.training else "eval"]
        if self.cppo.trim:
            inputs, share = trimmed(inputs, self.pad_to_multiple_of or 1)
            log["cppo/width_share"].append(share)
        loss_config = self.cppo.loss
        # What VPPO has to say is in the advantages.
        looks = self.model.training and "cppo_seed" in inputs and loss_config.perception != "vppo"
        self._forwards = [] if looks else None
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            forwards, self._forwards = self._forwards, None
        if "cppo_weight" in inputs and averages_rows(self):
            loss = loss * inputs["cppo_weight"].max()
        if forwards is None:
            return loss
        if loss_config.perception == "papo":
            return loss + papo(self, inputs, forwards)
        weight = loss_config.cpl_coef / self.current_gradient_accumulation_steps
        return loss + weight * contrast(self, inputs, forwards)


def _part(size: int, count: int) -> int:
    """The largest part of at most `size` rows that divides `count`.

    Equal parts: older TRL reads past the last image in a smaller one.
    """
    return next(part for part in range(min(size, count), 0, -1) if count % part == 0)


CPPOGRPOTrainer: Any


def __getattr__(name: str) -> Any:
    """`CPPOGRPOTrainer`, made when it is first asked for: importing this module imports no TRL."""
    if name != "CPPOGRPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trl import GRPOTrainer

    globals()[name] = type(name, (CPPOMixin, GRPOTrainer), {"__module__": __name__})
    return globals()[name]
