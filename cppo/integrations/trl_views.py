"""Contrastive perception in a micro-batch of TRL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cppo.integrations.contrast import contrastive_perception
from cppo.integrations.trl_pictures import pixels_of
from cppo.integrations.trl_rows import Batch, loss_mask, per_completion, take_rows
from cppo.records import Views
from cppo.seeds import seed_from
from cppo.views import perturb_pixel_values, views_from_names

Forwards = list[tuple[Batch, Any]]  # arguments and result of each


def view_seeds(trainer: Any, rollout: Batch, draw: tuple[int, ...]) -> Tensor | None:
    """(B,) seeds, one per completion and the same for all completions of a question.

    None if no process has an image: what follows is done by all of them or by none.
    """
    device, size = rollout["advantages"].device, len(rollout["advantages"])
    has_images = torch.tensor([rollout.get("pixel_values") is not None], device=device)
    if not trainer.accelerator.gather(has_images).any():
        return None
    first = trainer.accelerator.process_index * size
    questions = (row // trainer.num_generations for row in range(first, first + size))
    seeds = [seed_from("views", *draw, question) for question in questions]
    return torch.tensor(seeds, device=device)


def anchor_of(inputs: Batch, forwards: Forwards, owner: str) -> tuple[Batch, Any]:
    """The forward, among those of the loss, that is the micro-batch's own.

    Raises: RuntimeError if there is none, or it has no entropies.
    """
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    for call, result in forwards:
        is_own = torch.equal(call["input_ids"], ids) and _same_pixels(call, inputs)
        if is_own and result[0].requires_grad and len(result) > 1 and result[1] is not None:
            return call, result
    raise RuntimeError(
        "cppo.integrations.trl: contrastive perception needs the log-probabilities and "
        f"entropies of the micro-batch; {owner}._compute_loss does not ask "
        "_get_per_token_logps_and_entropies for both (compute_entropy=True). "
        "Set loss=LossConfig(cpl_coef=0)"
    )


def contrast(trainer: Any, inputs: Batch, forwards: Forwards) -> Tensor | float:
    """The contrastive loss of a micro-batch; both perturbed views in one forward."""
    call, anchor = anchor_of(inputs, forwards, type(trainer).__name__)
    config, log = trainer.cppo.loss, trainer._metrics["train"]
    gather = trainer.accelerator.gather
    mask, advantages = loss_mask(inputs).bool(), per_completion(inputs["advantages"])
    images = torch.tensor(inputs.get("num_images") or [0] * len(mask), device=mask.device)
    weight = inputs.get("cppo_weight", torch.ones_like(advantages))
    gated = (images > 0) & (weight > 0)
    if config.gating:
        gated &= advantages > 0
    looking, completions = gather(torch.stack([gated.sum(), (weight > 0).sum()])[None]).sum(0)
    log["cppo/gated_share"].append((looking / completions.clamp(min=1)).item())
    # Every process runs the forward if one does: DDP and FSDP wait for each other in it.
    if looking == 0:
        log["cppo/cpl_loss"].append(0.0)
        return 0.0
    # A process that looks at nothing runs a row with images if it has one, as in its anchor.
    rows = gated.nonzero()[:, 0] if gated.any() else images.argmax()[None]
    logps, entropies, *_ = trainer._forward(both_views(trainer, call, inputs, rows))
    found = contrastive_perception(
        Views(anchor[0][rows], *logps.chunk(2)),
        anchor[1][rows],
        entropies.chunk(2)[1],
        mask[rows] & gated[rows, None],
        len(gated),
        config,
    )
    # Rows that only fill up are among those that "sequence" divides by.
    loss = found.loss * weight.max() if config.cpl_reduction == "sequence" else found.loss
    log["cppo/cpl_loss"].append(gather(loss.detach()).mean().item())
    counts = torch.stack([found.selected.sum(), mask[gated].sum()])
    selected, tokens = gather(counts[None]).sum(0).tolist()
    log["cppo/perception_share"].append(selected / max(tokens, 1))
    return loss


def both_views(trainer: Any, call: Batch, inputs: Batch, rows: Tensor) -> Batch:
    """These rows twice: with their images under the positive and the negative view.

    Args: call: the arguments of the forward of the micro-batch `inputs`.
    """
    views = take_rows(call, rows)
    both = {k: _twice(v) for k, v in views.items()} | {"batch_size": None}
    both |= {"compute_aux_loss": False}
    if views.get("pixel_values") is None:
        return both
    pixels = [_perturbed(trainer, views, inputs, rows, name) for name in ("positive", "negative")]
    return both | {"pixel_values": torch.cat(pixels)}


def removing_view(trainer: Any, call: Batch, inputs: Batch, rows: Tensor) -> Batch:
    """The arguments of the forward of these rows with their images under the negative view.

    Args: call: the arguments of the forward of the rows, which are those of `inputs`.
    """
    view = call | {"compute_aux_loss": False}
    if call.get("pixel_values") is None:
        return view
    return view | {"pixel_values": _perturbed(trainer, call, inputs, rows, "negative")}


def _perturbed(trainer: Any, call: Batch, inputs: Batch, rows: Tensor, name: str) -> Tensor:
    """The pixel values of a forward, which is of these rows of `inputs`, under a view."""
    pictures = inputs.get("cppo_pictures")
    if pictures is not None:
        return pixels_of(trainer, call, [pictures[row] for row in rows.tolist()], name)
    counts = zip(inputs["cppo_seed"][rows].tolist(), call["num_images"], strict=True)
    images = [(seed, number) for seed, count in counts for number in range(count)]
    return perturb_pixel_values(
        call["pixel_values"],
        call["image_grid_thw"],
        views_from_names(getattr(trainer.cppo, f"{name}_views")),
        seeds=[seed_from(name, *image) for image in images],
        image_processor=trainer.processing_class.image_processor,
    )


def _same_pixels(call: Batch, inputs: Batch) -> bool:
    shown: Tensor | None = call.get("pixel_values")
    own: Tensor | None = inputs.get("pixel_values")
    if shown is None or own is None:
        return shown is own
    return torch.equal(shown, own)


def _twice(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.cat([value, value])
    return value + value if isinstance(value, list) else value
