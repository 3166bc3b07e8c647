"""What `cppo.integrations.trl` adds to a GRPOConfig, and which runs it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from cppo import reference
from cppo.integrations import contrast
from cppo.integrations.fit import installed
from cppo.model.check import counts_padding as model_counts_padding
from cppo.ops.checks import check_choice, check_config, check_integer, check_interval
from cppo.options.idle import without_effect
from cppo.options.trainer import PLAIN_LOSS, PRUNES, SCOPES, CPPOConfig, LossConfig
from cppo.views import views_from_names


@dataclass(frozen=True)
class CPPO:
    """Options of `CPPOGRPOTrainer`; names and meanings are those of `cppo.CPPOConfig`.

    Raises: ValueError for a value out of range, for a field of `loss` that TRL decides, and for
        divergence "full", which needs more than the log-probabilities that TRL computes; TypeError
        for a value of another kind.
    """

    prune_rate: float = 0.0
    """Share of each question's completions that is dropped before the update. In [0, 1)."""
    prune_scope: str = "group"
    """"group": per question (the paper). "batch": over the process's completions (its code)."""
    prune: str = "smallest"
    """Which completions are dropped: those with the "smallest" or "largest" |advantage|, or
    "random" ones. Or which stay: those with the largest reward "variance" of a question, the
    "shortest", or a random choice whose advantages A / p leave the gradient "unbiased"
    (docs/methods.md). Not "efficiency": a rollout of TRL holds no rewards."""
    drop_zero_variance: bool = False
    """Drop questions whose completions all have the same reward (dynamic sampling)."""
    max_refills: int = 3
    """With `drop_zero_variance`: how often a rollout may draw further questions of the dataset in
    place of those that are dropped. 0: none."""
    early: bool = True
    """Prune before the old and reference log-probabilities are computed, not after: the same
    parameters for less work."""
    trim: bool = True
    """Cut each micro-batch to its own longest prompt and completion. Rotary positions see the same
    distances; a model whose positions count the padding (GPT-2), or that has virtual tokens before
    it (prompt tuning), is not trimmed, and a warning says so."""
    pack: bool = False
    """Run every forward on one stream without padding, and without a kernel of flash-attn."""
    share_prompts: bool = False
    """Pack, and run the prompt of a question, with its images, once for all its completions of a
    micro-batch. These are brought together if the loss does not depend on it."""
    loss: LossConfig = PLAIN_LOSS
    """What removing the image does to the loss, where there are images (docs/methods.md). By
    default it does nothing; LossConfig() contrasts as the paper does. These fields count:
    perception, cpl_coef (0: no contrastive loss), divergence, tau, fraction, gating, detach_anchor,
    cpl_reduction; vppo_fraction, vppo_floor; papo_coef, papo_entropy_coef."""
    positive_views: tuple[Any, ...] = CPPOConfig.positive_views
    """Information-preserving perturbations, one is drawn per image."""
    negative_views: tuple[Any, ...] = CPPOConfig.negative_views
    """Information-removing perturbations, one is drawn per image."""

    def __post_init__(self) -> None:
        op = "integrations.trl.CPPO"
        check_interval(op, "prune_rate", self.prune_rate, 0, 1, closed=False)
        check_choice(op, "prune_scope", self.prune_scope, SCOPES)
        check_choice(op, "prune", self.prune, [name for name in PRUNES if name != "efficiency"])
        if self.prune == "variance" and self.prune_scope == "batch":
            raise ValueError(
                f"cppo.{op}: prune = 'variance' must have prune_scope = 'group', got 'batch': a "
                "rollout of TRL holds advantages, which are like rewards within a question only"
            )
        check_integer(op, "max_refills", self.max_refills, 0)
        for name in ("drop_zero_variance", "early", "trim", "pack", "share_prompts"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"cppo.{op}: {name} must be True or False, got {getattr(self, name)!r}"
                )
        check_config(op, self.loss, "loss")
        check_choice(op, "loss.divergence", self.loss.divergence, contrast.DIVERGENCES)
        for field in fields(LossConfig):
            value = getattr(self.loss, field.name)
            named = (*contrast.FIELDS, *contrast.REMOVING_FIELDS)
            if field.name not in named and value != field.default:
                raise ValueError(
                    f"cppo.{op}: loss.{field.name} = {value!r} would have no effect; TRL has "
                    "its own: beta, epsilon, epsilon_high, temperature, loss_type, ..."
                )
        views_from_names(self.positive_views), views_from_names(self.negative_views)

    @property
    def packs(self) -> bool:
        """Whether forwards run without padding."""
        return self.pack or self.share_prompts

    @property
    def prunes(self) -> bool:
        """Whether any completion may be dropped."""
        return self.prune_rate > 0 or self.drop_zero_variance


def per_device_train_batch_size(
    rows: int, num_generations: int, prune_rate: float, steps_per_generation: int = 1
) -> int:
    """Return the GRPOConfig.per_device_train_batch_size whose micro-batches keep `rows` rows.

    This is dynamic allocation in TRL: pruning leaves b (1 - P) rows of a micro-batch of b, and more
    questions fill the freed room (arXiv 2503.22342, section 3.4).
    Args:
        rows: completions of a micro-batch after pruning.
        num_generations, steps_per_generation: as in GRPOConfig, where the latter is by default
            gradient_accumulation_steps.
        prune_rate: as in `CPPO`.
    Raises: ValueError if no whole number of questions gives that size, or for a number out of
        range; TypeError for what is no number.
    """
    op = "per_device_train_batch_size"
    check_integer(op, "rows", rows, 1)
    check_integer(op, "num_generations", num_generations, 1)
    check_integer(op, "steps_per_generation", steps_per_generation, 1)
    check_interval(op, "prune_rate", prune_rate, 0, 1, closed=False)
    kept = reference.kept_per_unit(num_generations, prune_rate)
    questions, rest = divmod(rows * steps_per_generation, kept)
    size, over = divmod(questions * num_generations, steps_per_generation)
    if rest or over:
        raise ValueError(
            f"cppo.per_device_train_batch_size: {rows} rows x {steps_per_generation} steps must be "
            f"whole questions, of which {kept} of {num_generations} completions are kept"
        )
    return size


def check_run(trainer: Any) -> None:
    """Raise ValueError for a run that would silently lose rows or compute wrong numbers."""
    options, args = trainer.cppo, trainer.args
    steps, group_size = args.steps_per_generation, trainer.num_generations
    rows = args.per_device_train_batch_size * steps

    def refuse(words: str) -> None:
        raise ValueError(f"cppo.integrations.trl: {words}")

    if options.packs:
        _check_packing(trainer, refuse)
    images = getattr(trainer.processing_class, "image_processor", None)
    looks = bool(options.loss.perturbed_views) and images is not None
    idle = without_effect(options.loss, options.positive_views, options.negative_views)
    if images is not None and idle:
        warnings.warn(f"cppo.integrations.trl: CPPO: {idle}", stacklevel=3)
    if not options.prunes and not looks:
        return
    if looks:
        _check_perception(trainer, refuse)
    if hasattr(trainer, "compute_liger_loss") and args.use_liger_kernel:
        refuse("use_liger_kernel=True computes the loss elsewhere in this TRL; set it to False")
    if not options.prunes:
        return
    if options.drop_zero_variance and options.max_refills:
        _check_refills(trainer, rows % group_size == 0, refuse)
    if options.prune == "unbiased" and loss_type(trainer) == "bnpo":
        refuse(
            "prune='unbiased' would be biased with loss_type='bnpo', which divides a micro-batch "
            "by the tokens that are left in it; take 'dapo'"
        )
    if options.prune == "shortest" and getattr(args, "mask_truncated_completions", False):
        refuse(
            "prune='shortest' needs mask_truncated_completions=False: with it TRL does not say how "
            "long a completion is that was cut"
        )
    extra = getattr(trainer, "_entropy_bonus_enabled", False) or trainer.aux_loss_enabled
    if extra and averages_rows(trainer) and _fills(options, rows, group_size, steps):
        refuse(
            f"what prune_rate = {options.prune_rate} leaves of {rows} completions per process is "
            f"filled up to steps_per_generation = {steps} equal micro-batches; with loss_type = "
            f"{loss_type(trainer)!r} that would also scale the entropy bonus or the router's loss. "
            "Choose numbers that divide, or loss_type='dapo'"
        )


def _check_perception(trainer: Any, refuse: Callable[[str], None]) -> None:
    """Refuse a loss that the chosen `perception` cannot act on."""
    perception, args = trainer.cppo.loss.perception, trainer.args
    if perception in ("vppo", "papo") and is_of_completions(trainer):
        refuse(
            f"perception = {perception!r} needs a loss of tokens; that of "
            f"{type(trainer).__name__} is of completions: take GRPOTrainer"
        )
    if perception == "papo" and installed("trl")[1] < (1, 15):
        refuse("perception = 'papo' needs trl 1.15: before, entropies had no gradient")
    of_all = getattr(args, "importance_sampling_level", "token") == "sequence"
    # The gradient of these is through the log-probability of the token, not through the ratio.
    if perception == "vppo" and of_all and loss_type(trainer) not in ("cispo", "vespo"):
        refuse(
            "perception = 'vppo' chooses tokens, and the gradient of a ratio per completion "
            "reaches all of them: take importance_sampling_level='token'"
        )


def _check_packing(trainer: Any, refuse: Callable[[str], None]) -> None:
    """Refuse what has no meaning in a packed stream; the model is checked next door."""
    if hasattr(trainer, "compute_liger_loss") and trainer.args.use_liger_kernel:
        refuse("use_liger_kernel=True runs the model elsewhere in this TRL, not packed")
    if getattr(trainer, "aux_loss_enabled", False):
        refuse(
            "the router's loss of a mixture of experts is not computed on a packed stream; set "
            "router_aux_loss_coef=0"
        )
    if getattr(trainer, "use_transformers_continuous_batching", False):
        refuse(
            "use_transformers_continuous_batching=True samples with an attention of its own, which "
            "pack and share_prompts replace; set it to False, or take vLLM"
        )
    if trainer.cppo.share_prompts and not hasattr(trainer, "_buffered_inputs"):
        refuse("share_prompts deals the rows of TRL's buffer, which this trainer does not have")


def loss_type(trainer: Any) -> str:
    """How the trainer's loss is reduced, as a `loss_type`; RLOO has none, and GMPO reads none."""
    if is_of_completions(trainer):
        return "grpo"
    kind: str = trainer.args.loss_type
    return kind


def is_of_completions(trainer: Any) -> bool:
    """Whether the loss has a ratio and an advantage per completion, whatever its options say."""
    names = {base.__name__ for base in type(trainer).__mro__}
    return "GMPOTrainer" in names or not hasattr(trainer.args, "loss_type")


def averages_rows(trainer: Any) -> bool:
    """Whether TRL divides a micro-batch's loss by its rows, not by tokens."""
    return loss_type(trainer) in ("grpo", "dr_grpo", "luspo", "sapo")


def counts_padding(trainer: Any) -> bool:
    """Whether the log-probabilities of a row depend on how far its batch is padded."""
    adapter = getattr(trainer.accelerator.unwrap_model(trainer.model), "active_peft_config", None)
    # Virtual tokens stand before the padding, and the prompt behind it.
    return getattr(adapter, "is_prompt_learning", False) or model_counts_padding(trainer.model)


def exchanged(trainer: Any) -> int:
    """Micro-batches among which rows may change places without another sum of gradients.

    They are those of an optimizer step, if the loss is a sum over rows or tokens. It is not where
    a micro-batch has a mean, a threshold or an entropy of its own.
    """
    args, loss = trainer.args, trainer.cppo.loss
    sums = averages_rows(trainer) or loss_type(trainer) in ("dapo", "cispo", "vespo")
    alone = getattr(trainer, "_entropy_bonus_enabled", False) or not sums
    # The contrastive loss, divided by the perception tokens of a micro-batch.
    alone |= loss.contrasts and loss.cpl_reduction == "token"
    if alone or getattr(trainer, "top_entropy_quantile", 1.0) < 1.0:
        return 1
    steps, accumulated = args.steps_per_generation, args.gradient_accumulation_steps
    if steps % accumulated and accumulated % steps:
        return 1
    return min(steps, accumulated)


def _fills(options: CPPO, rows: int, group_size: int, steps: int) -> bool:
    """Whether rows that weigh nothing may have to fill the micro-batches."""
    if options.drop_zero_variance or options.prune_scope == "group" and rows % group_size:
        return True
    unit = group_size if options.prune_scope == "group" else rows
    return rows // unit * reference.kept_per_unit(unit, options.prune_rate) % steps > 0


def _check_refills(trainer: Any, has_whole_groups: bool, refuse: Callable[[str], None]) -> None:
    """Refuse further questions where they cannot be drawn or joined."""
    if installed("trl")[1] < (1, 15):
        refuse("max_refills needs trl 1.15, whose log-probabilities of padding are 0")
    if not has_whole_groups:
        refuse(
            "max_refills replaces whole questions: per_device_train_batch_size x "
            "steps_per_generation must be a multiple of num_generations. Or set max_refills=0"
        )
    # A stream of datasets inherits torch's __getitem__, which raises.
    if not hasattr(trainer.train_dataset, "__len__"):
        refuse("max_refills draws from a dataset with rows, not from a stream; set max_refills=0")
    if counts_padding(trainer):
        refuse(
            "max_refills joins draws of different widths, and positions of this model count the "
            "padding, so that its old and reference log-probabilities would be those of other "
            "positions; set max_refills=0"
        )
