"""Completion pruning and contrastive perception in TRL's GRPOTrainer, trl >= 1.7.

    from cppo.integrations.trl import CPPO, CPPOGRPOTrainer

    trainer = CPPOGRPOTrainer(model, rewards, args=GRPOConfig(...), cppo=CPPO(prune_rate=0.75))

No code of TRL is copied. Three of its methods are wrapped; each calls `super()` and changes only
its arguments and its result:

    _generate_and_score_completions     returns a scored rollout, a dict of rows; the pruned rows
                                        are taken out of it
    _get_per_token_logps_and_entropies  runs every forward. In a rollout (old and reference
                                        log-probabilities) it waits until the rollout is pruned;
                                        in the loss its arguments are remembered
    _compute_loss                       the loss of a micro-batch. Its padding is cut off before;
                                        then the remembered forward is repeated on perturbed images

`check()` says whether the installed TRL has what is wrapped here, `patch_trl()` gives TRL our
kernel for log-probabilities, and runs that cannot work are refused when the trainer is made.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import cppo
from cppo.integrations.contrast import contrastive_perception
from cppo.integrations.fit import AnyTrainer
from cppo.integrations.trl_fit import HAS_KERNEL, Fit, check, patch_trl
from cppo.integrations.trl_options import CPPO, check_run, per_device_train_batch_size
from cppo.records import Views
from cppo.seeds import seed_from
from cppo.views import perturb_pixel_values, views_from_names

__all__ = [
    "CPPO",
    "CPPOGRPOTrainer",
    "CPPOMixin",
    "Fit",
    "check",
    "patch_trl",
    "per_device_train_batch_size",
]

# Entries of a TRL batch with a column per token of the completion, or of prompt and completion.
_PER_TOKEN = (
    "completion_ids completion_mask tool_mask advantages importance_sampling_ratio "
    "old_per_token_logps ref_per_token_logps sampling_per_token_logps"
).split()
_WHOLE = ("token_type_ids", "mm_token_type_ids")


_Call = dict[str, Any]  # the arguments of a forward


class CPPOMixin(AnyTrainer):
    """Goes before any GRPOTrainer: `class Mine(CPPOMixin, TheirGRPOTrainer): ...`.

    Args: those of the trainer, and `cppo`, a `CPPO`.
    Raises: RuntimeError if the installed TRL does not fit; ValueError for a run that would lose
        rows or compute wrong numbers.
    """

    def __init__(self, *args: Any, cppo: CPPO = CPPO(), **kwargs: Any) -> None:  # noqa: B008
        unfit = [str(fit) for fit in check() if not fit.fits and fit.part != HAS_KERNEL]
        if unfit:
            raise RuntimeError("cppo.integrations.trl: " + "; ".join(unfit))
        self.cppo = cppo
        self._postponed: list[tuple[_Call, AbstractContextManager[Any], Tensor]] | None = None
        self._remembered: list[tuple[_Call, Any]] | None = None
        super().__init__(*args, **kwargs)
        check_run(self)

    # A rollout

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's rollout, then pruning, then the postponed forwards on the rows that are left."""
        options = self.cppo
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._postponed = [] if options.early and options.prune_rate > 0 else None
        try:
            rollout = super()._generate_and_score_completions(inputs)
        finally:
            postponed, self._postponed = self._postponed or [], None
        if "image_grid_thw" in rollout and options.loss.cpl_coef > 0:
            rollout["cppo_seed"] = self._view_seeds(rollout["advantages"])
        if options.prune_rate == 0:
            return rollout
        kept = cppo.prune_completions(
            _per_completion(rollout["advantages"]),
            self.num_generations,
            options.prune_rate,
            scope=options.prune_scope,
            prune=options.prune,
        )
        pruned = _take_rows(rollout, kept)
        for call, adapters, placeholder in postponed:
            (name,) = (name for name, value in rollout.items() if value is placeholder)
            with torch.no_grad(), adapters:
                pruned[name] = self._forward(call, kept)[0]
        # The denominator of "dapo", "cispo" and "vespo": tokens of the remaining completions.
        tokens = pruned["completion_mask"] * pruned.get("tool_mask", 1)
        pruned["num_items_in_batch"] = self.accelerator.gather(tokens.sum()).sum()
        self._metrics["train"]["cppo/kept_share"].append(len(kept) / len(rollout["advantages"]))
        return pruned

    def _view_seeds(self, advantages: Tensor) -> Tensor:
        """(B,) seeds, one per completion and the same for all completions of a question."""
        first = self.accelerator.process_index * len(advantages)
        step = (self.args.seed, self.state.global_step, self._step)
        rows = range(first, first + len(advantages))
        seeds = [seed_from("views", *step, row // self.num_generations) for row in rows]
        return torch.tensor(seeds, device=advantages.device)

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
        """TRL's forward, or a placeholder while a rollout waits to be pruned."""
        call = dict(kwargs, model=model, input_ids=input_ids, attention_mask=attention_mask)
        call |= dict(logits_to_keep=logits_to_keep, batch_size=batch_size)
        if self._postponed is not None:
            placeholder = torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device)
            self._postponed.append((call, self._adapters(), placeholder))
            return placeholder, None, None
        result = super()._get_per_token_logps_and_entropies(**call)
        if self._remembered is not None:
            self._remembered.append((call, result))
        return result

    def _forward(self, call: _Call, kept: Tensor) -> Any:
        """A postponed forward, on the rows that are left."""
        size = min(call["batch_size"] or len(kept), len(kept))
        # Equal parts: older TRL reads past the last image in a smaller one.
        size = next(part for part in range(size, 0, -1) if len(kept) % part == 0)
        call = _take_rows(call, kept) | {"batch_size": size}
        return super()._get_per_token_logps_and_entropies(**call)

    def _adapters(self) -> AbstractContextManager[Any]:
        """Sets the LoRA adapters as they are now, for a forward that runs later."""
        model = self.accelerator.unwrap_model(self.model)
        if not hasattr(model, "peft_config"):
            return nullcontext()
        from trl.trainer.utils import use_adapter

        enabled = model.get_model_status().enabled
        return use_adapter(model, model.active_adapter if enabled else None)

    # A micro-batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss of a micro-batch without its padding, plus contrastive perception."""
        if self.cppo.trim:
            inputs = self._trimmed(inputs)
        if not self.model.training or "cppo_seed" not in inputs:
            return super()._compute_loss(model, inputs)
        self._remembered = []
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            remembered, self._remembered = self._remembered, None
        weight = self.cppo.loss.cpl_coef / self.current_gradient_accumulation_steps
        return loss + weight * self._contrastive_perception(inputs, *remembered[0])

    def _trimmed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The micro-batch without the columns that are padding in every row."""
        prompt, length = inputs["prompt_mask"].shape[1], inputs["completion_mask"].shape[1]
        multiple = self.pad_to_multiple_of or 1

        def width(mask: Tensor) -> int:
            used = max(1, int(mask.any(0).sum()))
            return min(mask.shape[1], -(-used // multiple) * multiple)

        start, end = prompt - width(inputs["prompt_mask"]), width(inputs["completion_mask"])
        trimmed = dict(inputs)
        for name, value in inputs.items():
            if name in ("prompt_ids", "prompt_mask"):
                trimmed[name] = value[:, start:]
            elif name in _WHOLE:
                trimmed[name] = value[:, start : prompt + end]
            elif name in _PER_TOKEN and value.dim() == 2:
                trimmed[name] = value[:, :end]
        share = (prompt - start + end) / (prompt + length)
        self._metrics["train" if self.model.training else "eval"]["cppo/width_share"].append(share)
        return trimmed

    def _contrastive_perception(
        self, inputs: dict[str, Any], call: _Call, anchor: Any
    ) -> Tensor | float:
        """The contrastive loss of a micro-batch; both perturbed views in one forward."""
        config = self.cppo.loss
        mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
        gated = torch.tensor(inputs["num_images"], device=mask.device) > 0
        if config.gating:
            gated &= _per_completion(inputs["advantages"]) > 0
        log = self._metrics["train"]
        gated_share = self.accelerator.gather(gated.float()).mean().item()
        log["cppo/gated_share"].append(gated_share)
        # Every process runs the forward if one does: DDP and FSDP wait for each other in it.
        if gated_share == 0:
            log["cppo/cpl_loss"].append(0.0)
            return 0.0
        rows = gated.nonzero()[:, 0] if gated.any() else gated[:1].long() * 0
        views = self._both_views(call, inputs["cppo_seed"], rows)
        logps, entropies, *_ = super()._get_per_token_logps_and_entropies(**views)
        contrast = contrastive_perception(
            Views(anchor[0][rows], *logps.chunk(2)),
            anchor[1][rows],
            entropies.chunk(2)[1],
            mask[rows] & gated[rows, None],
            len(gated),
            config,
        )
        log["cppo/cpl_loss"].append(self.accelerator.gather(contrast.loss.detach()).mean().item())
        counts = torch.stack([contrast.selected.sum(), mask[gated].sum()])
        selected, tokens = self.accelerator.gather(counts[None]).sum(0).tolist()
        log["cppo/perception_share"].append(selected / max(tokens, 1))
        return contrast.loss

    def _both_views(self, call: _Call, seeds: Tensor, rows: Tensor) -> _Call:
        """These rows twice: with their images under the positive and the negative view."""
        views = _take_rows(call, rows)
        counts = zip(seeds[rows].tolist(), views["num_images"], strict=True)
        images = [(seed, number) for seed, count in counts for number in range(count)]
        pixels = [
            perturb_pixel_values(
                views["pixel_values"],
                views["image_grid_thw"],
                views_from_names(getattr(self.cppo, f"{name}_views")),
                seeds=[seed_from(name, *image) for image in images],
                image_processor=self.processing_class.image_processor,
            )
            for name in ("positive", "negative")
        ]
        both = {k: _twice(v) for k, v in views.items()} | {"pixel_values": torch.cat(pixels)}
        return both | {"batch_size": None, "compute_aux_loss": False}


def _per_completion(advantages: Tensor) -> Tensor:
    """(B,) advantages; where a subclass has (B, T), each completion's largest in size."""
    if advantages.dim() == 1:
        return advantages
    return advantages.gather(1, advantages.abs().argmax(1, keepdim=True))[:, 0]


def _take_rows(batch: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some rows of a TRL batch, or of a forward's arguments, with their images."""
    from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

    def take(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim():
            return value[rows]
        return [value[row] for row in rows.tolist()] if isinstance(value, list) else value

    split = split_pixel_values_by_grid({k: v for k, v in batch.items() if v is not None})
    return unsplit_pixel_values_by_grid({k: take(v) for k, v in split.items()})


def _twice(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.cat([value, value])
    return value + value if isinstance(value, list) else value


CPPOGRPOTrainer: Any


def __getattr__(name: str) -> Any:
    """`CPPOGRPOTrainer`, made when it is first asked for: importing this module imports no TRL."""
    if name != "CPPOGRPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trl import GRPOTrainer

    globals()[name] = type(name, (CPPOMixin, GRPOTrainer), {"__module__": __name__})
    return globals()[name]
