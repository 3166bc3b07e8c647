"""What `cppo.integrations.verl` computes in verl: policy loss, advantages, the contrastive term.

Importing this module does not import verl; each function imports what it needs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import cppo
from cppo import reference
from cppo.integrations.contrast import contrastive_perception
from cppo.integrations.verl_options import Options, loss_config
from cppo.options.trainer import LossConfig
from cppo.records import Views
from cppo.seeds import seed_from
from cppo.views import perturb_pixel_values, views_from_names


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The clipped surrogate of `cppo.cppo_loss`, called and reduced as verl's policy losses are.

    Specification: `cppo.reference.policy_loss`, reduced by verl's `agg_loss`. Value, gradient and
    metrics are those of verl's "vanilla" (importance "token") and "gspo" ("sequence").
    Args:
        old_log_prob, log_prob, advantages, response_mask, rollout_is_weights: (B, T); gradients
            flow to log_prob. Masked entries may hold anything.
        loss_agg_mode: one of verl's. config: verl's ActorConfig.
    Returns: the loss and metrics of verl's names.
    """
    from verl.trainer.ppo.core_algos import agg_loss

    valid, options = response_mask.bool(), loss_config(config)
    owner = valid.nonzero()[:, 0]
    log_ratio = torch.where(valid, log_prob - old_log_prob, 0.0)
    kl = -log_ratio.detach()
    if options.importance == "sequence":
        # The ratio is the sequence's, the gradient each token's own, as in verl: so a weight acts
        # on the token that it belongs to.
        mean = -kl.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio + kl + mean).clamp(max=10.0)
        options = replace(options, importance="token")
    else:
        log_ratio = log_ratio.clamp(-20.0, 20.0)
        kl = -log_ratio.detach()
    ratios, signs = log_ratio[valid], advantages[valid]
    weights = None if rollout_is_weights is None else rollout_is_weights[valid]
    zeros = torch.zeros_like(ratios)
    per_row, clipped = reference.policy_loss(
        ratios, signs, zeros, owner, len(valid), options, weights
    )
    losses = torch.zeros_like(log_prob).masked_scatter(valid, per_row.to(log_prob.dtype))
    loss = agg_loss(losses, valid, loss_agg_mode, **config.global_batch_info)
    lower = torch.zeros_like(clipped)
    if options.dual_clip is not None:
        lower = (ratios.detach().exp() > options.dual_clip) & (signs < 0)
    count = max(len(owner), 1)
    return loss, {
        "actor/pg_clipfrac": (clipped & ~lower).sum().item() / count,
        "actor/pg_clipfrac_lower": lower.sum().item() / count,
        "actor/ppo_kl": kl[valid].sum().item() / count,
    }


def group_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any],
    config: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """`cppo.group_advantages` as a verl advantage estimator; groups may differ in size.

    Args:
        token_level_rewards, response_mask: (B, T); the reward of a completion is the sum.
        index: (B,) the question of each completion.
        config: norm_adv_by_std_in_grpo=False leaves out the division by the std.
    Returns: advantages and returns, the same (B, T) fp32. A group of one has A = 0.
    """
    scale = "group" if config is None or config.get("norm_adv_by_std_in_grpo", True) else "none"
    rewards = token_level_rewards.sum(-1)
    groups: dict[Any, list[int]] = defaultdict(list)
    for row, question in enumerate(index):
        groups[question].append(row)
    advantages = rewards.new_zeros(len(rewards), dtype=torch.float32)
    for rows in groups.values():
        advantages[rows] = cppo.group_advantages(rewards[rows], len(rows), scale=scale)
    spread = advantages[:, None] * response_mask
    return spread, spread


def contrasts(engine: Any, loss_function: Any) -> bool:
    """Whether this is an update with the policy loss "cppo" of a model that sees images.

    Raises: ValueError if it is one with another loss than verl's PPO loss around it.
    """
    actor = getattr(loss_function, "keywords", {}).get("config")
    of_policy = getattr(actor, "policy_loss", None)
    if of_policy is None or not hasattr(engine.model_config.hf_config, "vision_config"):
        return False
    if of_policy.get("loss_mode") != "cppo" or not loss_config(actor).perturbed_views:
        return False
    name = getattr(loss_function.func, "__name__", "")
    if name != "ppo_loss":
        raise ValueError(
            f"cppo.integrations.verl: policy_loss.cpl_coef > 0: the perturbed views are added to "
            f"verl's ppo_loss only, got {name}; turn distillation off, or set cpl_coef=0 of "
            "cppo.integrations.verl.PolicyLossConfig (papo_coef=0 with PAPO)"
        )
    return True


def loss_with_contrast(
    engine: Any,
    loss_function: Callable[..., Any],
    asked_for_entropy: bool,
    *,
    model_output: dict[str, Tensor],
    data: Any,
    dp_group: Any = None,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's loss of a micro-batch plus the contrastive loss times cpl_coef, or PAPO's term."""
    from verl.utils.metric import AggregationType, Metric
    from verl.utils.tensordict_utils import index_select_tensor_dict
    from verl.workers.utils.padding import no_padding_2_padding

    seen = dict(model_output)
    if not asked_for_entropy:
        del seen["entropy"]
    loss, metrics = loss_function(model_output=seen, data=data, dp_group=dp_group)
    actor = loss_function.keywords["config"]  # type: ignore[attr-defined]
    config, options, dp_size = loss_config(actor), Options.of(actor), data["dp_size"]
    if config.perception == "papo":
        logps = no_padding_2_padding(model_output["log_probs"], data)
        term, kl = _papo(engine, actor, logps, data, dp_group)
        metrics["actor/papo_kl"] = Metric(AggregationType.SUM, kl.detach())
        return loss + term, metrics

    mask, is_gated = _gated(data, config)
    gated_rows = is_gated.nonzero()[:, 0]
    cpl = num_selected = loss.new_zeros(())
    if _any_rank(len(gated_rows) > 0, dp_group, loss.device):
        # Every rank runs the views if one does, or FSDP would wait: here on a row that selects
        # nothing.
        rows = gated_rows if len(gated_rows) else is_gated.new_zeros(1, dtype=torch.int64)
        part = index_select_tensor_dict(data, rows)
        positive, _ = _view(engine, part, "positive", options.positive_views)
        negative, negative_entropy = _view(engine, part, "negative", options.negative_views)
        width = positive.shape[1]
        anchor, entropy = (
            no_padding_2_padding(model_output[name], data)[rows, :width]
            for name in ("log_probs", "entropy")
        )
        # verl averages gradients over ranks and counts completions over the mini-batch.
        completions = (data["global_batch_size"] or len(data) * dp_size) / dp_size
        contrast = contrastive_perception(
            Views(anchor, positive, negative),
            entropy.detach(),
            negative_entropy.detach(),
            mask[rows, :width] & is_gated[rows, None],
            completions,
            config,
        )
        cpl, num_selected = contrast.loss, contrast.selected.sum()
        if config.cpl_reduction == "token":
            # The empty rows that fill up a mini-batch do not count.
            cpl = cpl * mask.any(1).sum() / completions
    for name, value in (
        ("cpl_loss", cpl),
        ("perception_tokens", num_selected * dp_size),
        ("gated_completions", len(gated_rows) * dp_size),
    ):
        metrics[f"actor/{name}"] = Metric(AggregationType.SUM, value)
    return loss + config.cpl_coef * cpl, metrics


def _papo(
    engine: Any, actor: Any, logps: Tensor, data: Any, dp_group: Any
) -> tuple[Tensor, Tensor]:
    """PAPO's term (arXiv 2507.06448) and its k3, both reduced as verl reduces its KL loss."""
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.utils.tensordict_utils import index_select_tensor_dict

    config = replace(loss_config(actor), gating=False)
    mask, looks = _gated(data, config)
    rows = looks.nonzero()[:, 0]
    per_token, depends = torch.zeros(2, *logps.shape).to(logps)
    if _any_rank(len(rows) > 0, dp_group, logps.device):
        # Every rank runs the view if one does, here on a row that counts for nothing.
        rows = rows if len(rows) else looks.new_zeros(1, dtype=torch.int64)
        part, views = index_select_tensor_dict(data, rows), Options.of(actor).negative_views
        with torch.set_grad_enabled(config.penalises_removed):
            removed, entropy = _view(engine, part, "negative", views)
        own = logps[rows, : removed.shape[1]]
        seen = mask[rows, : removed.shape[1]] & looks[rows, None]
        k3 = reference._k3(removed.detach() - own, bound=10) * seen
        places = rows[:, None], torch.arange(removed.shape[1], device=rows.device)
        depends = depends.index_put(places, k3)
        term = config.papo_entropy_coef * entropy * seen - config.papo_coef * k3
        per_token = per_token.index_put(places, term.to(logps.dtype))
    found = [
        agg_loss(values, mask, actor.loss_agg_mode, **actor.global_batch_info)
        for values in (per_token, depends)
    ]
    return found[0], found[1]


def _gated(data: Any, config: LossConfig) -> tuple[Tensor, Tensor]:
    """The response mask (B, T), and which completions (B,) are seen under the perturbed views."""
    padded = data.select("response_mask", "advantages").to_padded_tensor()
    mask = padded["response_mask"].bool()
    is_gated = mask.any(1)
    if config.gating:
        is_gated &= (padded["advantages"] * mask).sum(1) > 0
    has_images = torch.tensor([_images(row) is not None for row in _multi_modal(data)])
    return mask, is_gated & has_images.to(is_gated.device)


def _view(engine: Any, data: Any, name: str, perturbations: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (R, T) of the responses with their images perturbed."""
    from verl.utils.tensordict_utils import assign_non_tensor_stack
    from verl.workers.utils.padding import no_padding_2_padding

    perturbed = []
    for inputs, prompt in zip(_multi_modal(data), data["prompts"].unbind(), strict=True):
        images = _images(inputs)
        if images is not None:
            # Completions of a question share a perturbation. Another image with the same words
            # gets another one, and so does the next step.
            content = str(images[0].sum(dtype=torch.float64).item())
            where = (engine.lr_scheduler.last_epoch, name, content, *prompt.tolist())
            pixel_values = perturb_pixel_values(
                *images,
                views_from_names(list(perturbations)),
                seeds=[seed_from(number, *where) for number in range(len(images[1]))],
                image_processor=engine.model_config.get_processor(),
            )
            inputs = {**inputs, "pixel_values": pixel_values}
        perturbed.append(inputs)
    view = data.copy()
    assign_non_tensor_stack(view, "multi_modal_inputs", perturbed)
    inputs, arguments = engine.prepare_model_inputs(micro_batch=view)
    output = engine.prepare_model_outputs(
        output=engine.module(**inputs, use_cache=False),
        output_args=arguments,
        micro_batch=view,
        logits_processor_func=None,
    )
    logps, entropy = (no_padding_2_padding(output[x], view) for x in ("log_probs", "entropy"))
    return logps, entropy


def _multi_modal(data: Any) -> list[dict[str, Any]]:
    """What the processor made of each row's images and videos."""
    stack = data.get("multi_modal_inputs", None)
    rows = [{}] * len(data) if stack is None else list(stack)
    return [dict(getattr(row, "data", row) or {}) for row in rows]


def _images(inputs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    pixel_values, grid = inputs.get("pixel_values"), inputs.get("image_grid_thw")
    if pixel_values is not None and grid is None:
        raise ValueError(
            "cppo.integrations.verl: contrastive perception (and PAPO) perturbs the patches of "
            "Qwen-VL's processors; of other images verl's batches hold what the processor made "
            f"({', '.join(sorted(inputs))}), but not the pictures, which are needed to prepare "
            "perturbed ones. Set cpl_coef to 0"
        )
    return None if pixel_values is None or grid is None else (pixel_values, grid)


def _any_rank(own: bool, group: Any, device: torch.device) -> bool:
    flag = torch.tensor(float(own), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=group)
    return bool(flag)
