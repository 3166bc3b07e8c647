"""Every option of the losses, once: `LossConfig`, a frozen dataclass.

Each field has its documentation below it. An invalid value raises ValueError naming the field, the
value and what is allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from cppo.options.values import CheckedFields, is_finite_number

IMPORTANCE = ("token", "sequence")
CORRECTIONS = (
    *("none", "bypass", "token_truncate", "token_mask"),
    *("sequence_truncate", "sequence_mask"),
)
REDUCTIONS = ("grpo", "dapo", "dr_grpo")
DIVERGENCES = ("k3", "k1", "full")
CPL_REDUCTIONS = ("token", "sequence")
PERCEPTIONS = ("cpl", "cpl_all", "vppo", "papo")
# Fields of LossConfig that say how images are contrasted, where cpl_coef > 0.
CONTRAST = (
    *("perception", "divergence", "tau", "fraction"),
    *("gating", "detach_anchor", "cpl_reduction"),
)
# Fields that only one other `perception` reads.
REMOVING = {"vppo": ("vppo_fraction", "vppo_floor"), "papo": ("papo_coef", "papo_entropy_coef")}


@dataclass(frozen=True)
class LossConfig(CheckedFields):
    """Coefficients of `cppo_loss` and `linear_cppo_loss`; `cppo.reference` has the formulas."""

    # All fields as "name=value name=value ...", which is one argument of a compiled op. No field.
    text = ""

    temperature: float = 1.0
    """Divides the logits everywhere: sampling, log-probabilities, entropies. > 0."""
    clip_low: float = 0.2
    """The importance ratio is clipped below at 1 - clip_low. In [0, 1]."""
    clip_high: float = 0.2
    """The importance ratio is clipped above at 1 + clip_high. >= 0."""
    dual_clip: float | None = None
    """For A < 0 the surrogate is bounded below by dual_clip * A. > 1; None: off."""
    importance: str = "token"
    """"token": a ratio per token (GRPO). "sequence": its geometric mean per completion (GSPO),
    whose gradient reaches every token: not with perception "vppo"."""
    reduction: str = "grpo"
    """"grpo": mean over completions of the token mean. "dapo": sum over tokens / tokens.
    "dr_grpo": sum over tokens / (completions x max_length)."""
    max_length: int | None = None
    """Length that "dr_grpo" divides by, in tokens. None: L if padded, the longest if packed; in
    CPPOConfig, `max_completion_tokens`."""
    kl_coef: float = 0.0
    """Weight of the k3 estimate of KL(policy || reference). >= 0; needs `ref_logps`."""
    kl_clamp: float | None = None
    """Upper bound of a token's k3 estimate; above it there is no gradient. > 0; verl has 10. None:
    no bound, so that a token far from the reference is pulled back."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; below 0 entropy is penalised (VPPO: -0.06)."""
    perception: str = "cpl"
    """How tokens that depend on the image are treated (docs/methods.md). "cpl": the contrastive
    loss acts on the tokens that `fraction` selects. "cpl_all": it acts on every token of a gated
    completion. "vppo": `token_weights` let the policy loss act on the tokens that depend on the
    image most (`cppo.visual_dependency`). "papo": depending on it earns a bonus
    (`removed_logps`). The last two have no contrastive loss; their papers remove the image by
    "masked_patches"."""
    cpl_coef: float = 0.01
    """Weight of the contrastive perception loss. >= 0; acts where perturbed views are given. 0.01
    is the paper's. The trainer and the adapters make the views themselves: their own default is 0,
    and any other value turns the loss on."""
    divergence: str = "k3"
    """"k3" or "k1" on the sampled token, or "full": over the whole vocabulary."""
    tau: float = 0.1
    """Temperature of the contrast. > 0."""
    fraction: float = 0.5
    """Share of the tokens with rising entropy that are perception tokens. In [0, 1]."""
    gating: bool = True
    """Perception tokens only in completions with A > 0."""
    detach_anchor: bool = False
    """Stops the contrastive gradient at the anchor view."""
    cpl_reduction: str = "sequence"
    """"sequence": mean over completions of their token mean, independent of how a batch is cut into
    micro-batches. "token": mean over the selected tokens (the authors' code)."""
    vppo_fraction: float = 0.4
    """"vppo": share of a completion's tokens that keep their policy loss. In (0, 1]."""
    vppo_floor: float = 0.9
    """"vppo": factor of the completion that depends least on the image; the mean is 1. In
    [0, 1]."""
    papo_coef: float = 0.01
    """"papo": weight of the k3 estimate of KL(policy || policy without the image), which is
    maximised. >= 0; needs `removed_logps`."""
    papo_entropy_coef: float = 0.0
    """"papo": weight of the penalty on the entropy without the image (the paper: 0.03, and as much
    on the policy's own by entropy_coef = -0.03). >= 0. The trainer adds it, with a gradient
    through the removing view; the losses do not see that view."""
    importance_correction: str = "none"
    """Corrects for an engine (vLLM, say) that sampled with other log-probabilities than the
    model's: the surrogate of a token is multiplied by w, of d = old_logp - sampling_logp.
    "token_truncate": w = clamp(e^d, correction_min, correction_max) (truncated importance sampling:
    Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
    "token_mask": w = e^d, but 0 outside of the bounds (IcePop). "sequence_truncate",
    "sequence_mask": the same with e^(sum of d) of a completion for all its tokens. "bypass": w = 1,
    and the ratio is to sampling_logps or, where the engine gave none, to the policy's own. "none":
    w = 1. The names are TRL's, except "bypass", which is verl's. All but "none" need
    `sampling_logps`; d is 0 where it is NaN, and the exponent is at most 20."""
    correction_min: float = 0.0
    """Lower bound of w. In [0, correction_max)."""
    correction_max: float = 3.0
    """Upper bound of w. > correction_min; inf: no bound but e^20."""

    def __post_init__(self) -> None:
        self._take_plain()
        self._number("temperature", "tau", above=0, below=math.inf)
        self._number("clip_low", "fraction", at_least=0, at_most=1)
        self._number("clip_high", "kl_coef", "cpl_coef", at_least=0, below=math.inf)
        if not is_finite_number(self.entropy_coef):
            self._fail("entropy_coef", "a finite number")
        self._number("vppo_fraction", above=0, at_most=1)
        self._number("vppo_floor", at_least=0, at_most=1)
        self._number("papo_coef", "papo_entropy_coef", at_least=0, below=math.inf)
        if self.dual_clip is not None:
            self._number("dual_clip", above=1, below=math.inf)
        if self.kl_clamp is not None:
            self._number("kl_clamp", above=0, below=math.inf)
        if self.max_length is not None:
            self._integer("max_length", at_least=1)
        self._one_of("importance", IMPORTANCE)
        self._one_of("importance_correction", CORRECTIONS)
        self._number("correction_min", at_least=0, below=math.inf)
        if self.correction_max != math.inf:
            self._number("correction_max", above=self.correction_min)
        self._one_of("reduction", REDUCTIONS)
        self._one_of("divergence", DIVERGENCES)
        self._one_of("cpl_reduction", CPL_REDUCTIONS)
        self._one_of("perception", PERCEPTIONS)
        self._boolean("gating", "detach_anchor")
        if self.perception == "vppo" and self.importance == "sequence":
            # Their ratio is one for all: its gradient would reach the tokens of weight 0, too.
            self._fail("importance", "'token' with perception = 'vppo', which chooses tokens")
        # Made here, and not where torch.compile would trace it.
        self._set("text", " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self)))

    @property
    def contrasts(self) -> bool:
        """Whether the loss has a contrastive term where perturbed views are given."""
        return self.cpl_coef > 0 and self.perception in ("cpl", "cpl_all")

    @property
    def idle_options(self) -> list[str]:
        """Fields that are set and have no effect: those of the contrastive loss while it is off,
        and those of a `perception` that is not chosen."""
        others = [names for kind, names in REMOVING.items() if kind != self.perception]
        idle = [*([] if self.contrasts else CONTRAST), *(name for own in others for name in own)]
        if self.perception in REMOVING:
            idle.remove("perception")
        return [name for name in idle if getattr(self, name) != getattr(LossConfig, name)]

    @property
    def penalises_removed(self) -> bool:
        """Whether a gradient flows through the removing view: PAPO's penalty on its entropy."""
        return self.perception == "papo" and self.papo_entropy_coef > 0

    @property
    def perturbed_views(self) -> tuple[str, ...]:
        """Which perturbed views are run at all."""
        if self.contrasts:
            return "positive", "negative"
        return ("negative",) if self.compares_removed or self.penalises_removed else ()

    @property
    def compares_removed(self) -> bool:
        """Whether the loss needs log-probabilities under the removing view, without a gradient."""
        return self.perception == "vppo" or (self.perception == "papo" and self.papo_coef > 0)
