"""What `cppo.integrations.verl` adds to verl's configuration, and which runs it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

import cppo
from cppo.integrations.contrast import DIVERGENCES, FIELDS
from cppo.ops.checks import check_choice, check_interval
from cppo.options.idle import without_effect
from cppo.options.trainer import BY_ADVANTAGE, PLAIN_LOSS, SCOPES, CPPOConfig, LossConfig
from cppo.views import views_from_names

_FIELDS = (*FIELDS, "papo_coef", "papo_entropy_coef")


@dataclass
class Options:
    """actor_rollout_ref.actor.policy_loss: names and meanings of `cppo.LossConfig`.

    The defaults are the same, except that cpl_coef is 0. If it is set, the perturbed views run;
    with gating, they run for completions with A > 0 alone.
    divergence cannot be "full": it needs the whole vocabulary, which verl's loss does not see.
    perception cannot be "vppo": its weights compare the completions of a mini-batch before the
    first of their micro-batches, where no function of verl's runs. PAPO's log-probabilities
    without the image are the current policy's, not those of before the update.

    Raises: ValueError for a value out of range.
    """

    importance: str = LossConfig.importance
    perception: str = LossConfig.perception
    cpl_coef: float = PLAIN_LOSS.cpl_coef
    divergence: str = LossConfig.divergence
    tau: float = LossConfig.tau
    fraction: float = LossConfig.fraction
    gating: bool = LossConfig.gating
    detach_anchor: bool = LossConfig.detach_anchor
    cpl_reduction: str = LossConfig.cpl_reduction
    papo_coef: float = LossConfig.papo_coef
    papo_entropy_coef: float = LossConfig.papo_entropy_coef
    positive_views: Sequence[Any] = CPPOConfig.positive_views
    """Information-preserving perturbations, one is drawn per image."""
    negative_views: Sequence[Any] = CPPOConfig.negative_views
    """Information-removing perturbations, one is drawn per image."""

    def __post_init__(self) -> None:
        check_choice("integrations.verl", "policy_loss.divergence", self.divergence, DIVERGENCES)
        loss = LossConfig(
            importance=self.importance, **{name: getattr(self, name) for name in _FIELDS}
        )
        places = dict.fromkeys(("of_loss", "of_views"), "policy_loss.")
        idle = without_effect(loss, self.positive_views, self.negative_views, **places)
        if idle:
            warnings.warn(f"cppo.integrations.verl: {idle}", stacklevel=2)
        if self.perception == "vppo":
            raise ValueError(
                "cppo.integrations.verl: policy_loss.perception must be 'cpl', 'cpl_all' or "
                "'papo', got 'vppo': its weights of tokens compare the completions of a whole "
                "mini-batch, and verl's loss sees a micro-batch"
            )
        views_from_names(list(self.positive_views)), views_from_names(list(self.negative_views))

    @classmethod
    def of(cls, actor: Any) -> Options:
        """The options of a verl ActorConfig; defaults where policy_loss is verl's own class."""
        given = {
            field.name: actor.policy_loss.get(field.name, field.default) for field in fields(cls)
        }
        return cls(**given)


def loss_config(actor: Any) -> LossConfig:
    """Return the `cppo.LossConfig` that a verl ActorConfig asks for.

    Args: actor: clip_ratio, clip_ratio_low, _high and _c (dual clip, which GSPO does not have) are
        read besides policy_loss.
    """
    options = Options.of(actor)
    low, high = actor.get("clip_ratio_low"), actor.get("clip_ratio_high")
    return LossConfig(
        clip_low=actor.clip_ratio if low is None else low,
        clip_high=actor.clip_ratio if high is None else high,
        dual_clip=actor.get("clip_ratio_c", 3.0) if options.importance == "token" else None,
        importance=options.importance,
        **{name: getattr(options, name) for name in _FIELDS},
    )


@dataclass(frozen=True)
class Pruning:
    """trainer.v1.cppo: names and meanings are those of `cppo.CPPOConfig`.

    Raises: ValueError for a value out of range, TypeError for an unknown name.
    """

    prune_rate: float = 0.0
    """Share of each question's completions that is dropped before the update. In [0, 1)."""
    prune_scope: str = "group"
    """"group": per question (the paper). "batch": over the whole batch (its code)."""
    prune: str = "smallest"
    """The side that is dropped by |advantage|: "smallest", "largest" or "random". The other rules
    need rewards, lengths or loss weights, which are not at hand where verl's trainers prune."""

    def __post_init__(self) -> None:
        op = "integrations.verl"
        check_interval(op, "prune_rate", self.prune_rate, 0, 1, closed=False)
        check_choice(op, "prune_scope", self.prune_scope, SCOPES)
        check_choice(op, "prune", self.prune, BY_ADVANTAGE)

    def kept(self, sizes: dict[str, float], seed: int) -> set[str]:
        """Which completions stay.

        Args:
            sizes: |advantage| of each completion, named QUESTION_NUMBER; questions may have
                different numbers of completions (verl drops failed rollouts).
            seed: of prune="random".
        """
        units: dict[str, list[str]] = {}
        # By number, not by arrival: of equal completions the first stay.
        for question, number in sorted((q, int(n)) for q, n in (s.rsplit("_", 1) for s in sizes)):
            unit = question if self.prune_scope == "group" else ""
            units.setdefault(unit, []).append(f"{question}_{number}")
        generator = torch.Generator().manual_seed(seed)
        stay: set[str] = set()
        for names in units.values():
            advantages = torch.tensor([sizes[name] for name in names])
            rows = cppo.prune_completions(
                advantages, len(names), self.prune_rate, prune=self.prune, generator=generator
            )
            stay.update(names[row] for row in rows.tolist())
        return stay


def check_run(config: Any) -> None:
    """Raise ValueError for a run whose advantages need old or reference log-probabilities.

    Args: config: the configuration of a verl run.
    """
    algorithm = config.algorithm
    for wrong, words in (
        (
            algorithm.use_kl_in_reward,
            "algorithm.use_kl_in_reward puts log-probabilities into the rewards; use "
            "actor_rollout_ref.actor.use_kl_loss",
        ),
        (
            config.critic.enable or algorithm.adv_estimator == "gae",
            "a critic's advantages need its values of every completion; use "
            "algorithm.adv_estimator=grpo or cppo",
        ),
        (
            "token_baseline" in algorithm.adv_estimator,
            f"algorithm.adv_estimator={algorithm.adv_estimator} needs the log-probabilities of "
            "every completion; use grpo or cppo",
        ),
    ):
        if wrong:
            raise ValueError(f"cppo.integrations.verl: prune_rate > 0: {words}")
