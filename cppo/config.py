"""Every option, once: `LossConfig` for the losses, `CPPOConfig` for the trainer.

Both are frozen dataclasses whose fields are documented where they stand; a value that makes no
sense raises ValueError naming the field, the value and what is allowed.
"""

from __future__ import annotations

import math
import operator
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

IMPORTANCE = ("token", "sequence")
REDUCTIONS = ("grpo", "dapo", "dr_grpo")
DIVERGENCES = ("k3", "k1", "full")
CPL_REDUCTIONS = ("token", "sequence")
SCALES = ("group", "none", "batch")
SCOPES = ("group", "batch")
PRUNES = ("smallest", "largest", "random")
PRECISIONS = ("fp32", "bf16")
SCHEDULES = (
    *("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts"),
    *("polynomial", "inverse_sqrt"),
)
ATTENTIONS = ("auto", "sdpa", "varlen", "flash_attention_2")
MODES = ("sampled", "greedy")  # of an evaluation; its metrics are "<mode>/<reward>"
LONGEST_WAIT = 1e9  # seconds, 31 years: what timers of Python and torch can still count


def _plain(value: Any) -> Any:
    """A list as a tuple, and a scalar of NumPy or torch as Python's own number."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if isinstance(value, (int, float, str, type(None))):  # first: torch.compile asks no further
        return value
    return value.item() if getattr(value, "shape", None) == () else value


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


class _Checked:
    """Field checks that name the config, the field, what is allowed and what came."""

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _take_plain(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]
            self._set(one.name, _plain(getattr(self, one.name)))

    def _fail(self, name: str, expected: str) -> None:
        value = getattr(self, name)
        raise ValueError(f"{type(self).__name__}.{name} must be {expected}, got {value!r}")

    def _one_of(self, name: str, choices: Sequence[str]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in choices:
            self._fail(name, "one of " + ", ".join(repr(choice) for choice in choices))

    def _number(
        self,
        *names: str,
        at_least: float = -math.inf,
        above: float = -math.inf,
        at_most: float = math.inf,
        below: float = math.inf,
    ) -> None:
        for name in names:
            value = getattr(self, name)
            if _is_number(value) and at_least <= value <= at_most and above < value < below:
                continue
            bounds = ((">=", at_least), (">", above), ("<=", at_most), ("<", below))
            words = [f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound)]
            self._fail(name, "a number " + " and ".join(words))

    def _integer(self, *names: str, at_least: int) -> None:
        for name in names:
            value = getattr(self, name)
            is_one = hasattr(value, "__index__") and not isinstance(value, bool)
            if not is_one or operator.index(value) < at_least:
                self._fail(name, f"an integer >= {at_least}")
            if operator.index(value) >= 2**63:  # torch has 64 bits for them
                self._fail(name, f"an integer >= {at_least} and < 2**63")
            self._set(name, operator.index(value))

    def _boolean(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                self._fail(name, "true or false")


# The first line of a config.yaml that a run has written into its folder.
WRITTEN_BY_A_RUN = "# All options of this run, as `cppo train` took them."


@dataclass(frozen=True)
class LossConfig(_Checked):
    """Coefficients of `cppo_loss` and `linear_cppo_loss`."""

    text: ClassVar[str]
    """All fields as "name=value name=value ...": one argument of a compiled op."""
    temperature: float = 1.0
    """Divides the logits everywhere: sampling, log-probabilities, entropies. > 0."""
    clip_low: float = 0.2
    """The importance ratio is clipped below at 1 - clip_low. In [0, 1]."""
    clip_high: float = 0.2
    """The importance ratio is clipped above at 1 + clip_high. >= 0."""
    dual_clip: float | None = None
    """For A < 0 the surrogate is bounded below by dual_clip * A. > 1; None: off."""
    importance: str = "token"
    """"token": a ratio per token (GRPO). "sequence": its geometric mean per completion (GSPO)."""
    reduction: str = "grpo"
    """"grpo": mean over completions of the token mean. "dapo": sum over tokens / tokens.
    "dr_grpo": sum over tokens / (completions x max_length)."""
    max_length: int | None = None
    """Length that "dr_grpo" divides by, in tokens. None: L if padded, the longest if packed; in
    CPPOConfig, `max_completion_tokens`."""
    kl_coef: float = 0.0
    """Weight of the k3 estimate of KL(policy || reference). >= 0; needs `ref_logps`."""
    kl_clamp: float | None = None
    """The k3 estimate of a token is at most this, with no gradient above. > 0; verl's form is 10.
    None: no bound, so that a token far from the reference is pulled back."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus. >= 0."""
    cpl_coef: float = 0.01
    """Weight of the contrastive perception loss. >= 0; acts where perturbed views are given."""
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
    cpl_reduction: str = "token"
    """"token": mean over the selected tokens (the authors' code). "sequence": mean over
    completions of their token mean, independent of how a batch is cut into micro-batches."""

    def __post_init__(self) -> None:
        self._take_plain()
        self._number("temperature", "tau", above=0, below=math.inf)
        self._number("clip_low", "fraction", at_least=0, at_most=1)
        self._number("clip_high", "kl_coef", "entropy_coef", "cpl_coef", at_least=0, below=math.inf)
        if self.dual_clip is not None:
            self._number("dual_clip", above=1, below=math.inf)
        if self.kl_clamp is not None:
            self._number("kl_clamp", above=0, below=math.inf)
        if self.max_length is not None:
            self._integer("max_length", at_least=1)
        self._one_of("importance", IMPORTANCE)
        self._one_of("reduction", REDUCTIONS)
        self._one_of("divergence", DIVERGENCES)
        self._one_of("cpl_reduction", CPL_REDUCTIONS)
        self._boolean("gating", "detach_anchor")
        # Made here, and not where torch.compile would trace it.
        self._set("text", " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self)))


@dataclass(frozen=True)
class LoraConfig(_Checked):
    """Low-rank adapters through peft; with them the reference policy is the model without."""

    r: int = 16
    """Rank."""
    alpha: int = 32
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """In [0, 1). Above 0 the update is not on-policy to the last bit. The model's own dropout is
    off in training whatever its config says, because its completions are sampled without it."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the layers that get adapters, a layer's last names being enough ("q_proj"). One
    text: a regular expression for the whole name. "all-linear": every one but the LM head."""

    def __post_init__(self) -> None:
        self._take_plain()
        self._integer("r", "alpha", at_least=1)
        self._number("dropout", at_least=0, below=1)
        targets = self.target_modules
        names = (targets,) if isinstance(targets, str) else targets
        is_named = isinstance(names, tuple) and len(names) > 0
        if not is_named or not all(isinstance(name, str) and name for name in names):
            self._fail("target_modules", "'all-linear', a regular expression or names of layers")
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                self._fail("target_modules", f"a regular expression that can be read ({error})")


@dataclass(frozen=True)
class CPPOConfig(_Checked):
    """Options of `CPPOTrainer`. One step = one rollout and the update on it."""

    output_dir: str = "runs/cppo"
    """Checkpoints, metrics.jsonl, sample completions and the report go here. A path, kept as
    text."""
    seed: int = 0
    """Of the question order, the sampling, the perturbations and the adapters' start."""

    # The rollout
    max_steps: int = 100
    """Rollouts, each followed by its update."""
    batch_size: int = 64
    """Completions of one step over all processes: those that the update runs on when
    `dynamic_allocation`, else those that are sampled."""
    group_size: int = 8
    """Completions per question (G). >= 2: a single one has nothing to be compared with."""
    prune_rate: float = 0.0
    """Share of each question's completions that is dropped before the update. In [0, 1)."""
    dynamic_allocation: bool = True
    """Draw so many more questions that the kept completions fill `batch_size`."""
    prune_scope: str = "group"
    """"group": per question (the paper). "batch": over all completions of the step (its code)."""
    prune: str = "smallest"
    """The side that is dropped by |advantage|: "smallest", "largest" or "random" (ablations)."""
    drop_zero_variance: bool = False
    """Also drop completions with A = 0: whole groups of equal reward."""
    max_refills: int = 3
    """With `drop_zero_variance` and `dynamic_allocation`: times that more questions are drawn in a
    step for the groups that were dropped, so that the batch stays full. 0: it shrinks."""
    scale_rewards: str = "group"
    """Advantages are divided by the std of their "group", of the whole "batch" over all processes,
    or "none"."""
    max_prompt_tokens: int | None = None
    """Questions with a longer prompt are skipped with a warning. None: no limit."""
    max_completion_tokens: int = 256
    """Generation stops here."""
    generation_batch_size: int = 256
    """Completions that are generated at once, in rollouts and evaluations."""
    mask_overlong: bool = False
    """Completions cut at `max_completion_tokens` take part in advantages but not in the loss."""
    reward_weights: tuple[float, ...] | None = None
    """One weight per reward function, not all 0; one of weight 0 is logged only. None: all 1."""
    reward_timeout: float | None = None
    """Seconds that a reward function may take for the completions of a step, before the run ends
    with an error that names it. None: no limit."""
    reward_retries: int = 0
    """Times that a reward function which raises is called again, after 1, 2, 4, ... seconds, before
    the run ends: for a judge on a network. Anything it logged before is forgotten."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Arguments of the chat template beside the messages, as {"enable_thinking": false}."""
    skip_bad_questions: bool = False
    """Leave out training questions that cannot be read or encoded (a broken image, one that the
    image processor refuses), and count them in `questions/skipped`. False: the run ends there."""

    # The update
    loss: LossConfig = field(default_factory=lambda: LossConfig(cpl_reduction="sequence"))
    """Coefficients of the loss. In CPPOConfig the contrastive mean is per completion by default,
    so that micro-batches and processes do not change the gradient."""
    num_iterations: int = 1
    """Passes over each rollout."""
    optimizer_steps: int = 1
    """Optimizer steps per pass; the kept completions are dealt evenly to them, so that there are no
    more steps than completions."""
    max_tokens_per_microbatch: int = 16384
    """Prompt and response tokens of one forward and backward pass; gradients accumulate."""
    positive_views: tuple[Any, ...] = ("color_jitter", "perspective", "rotation")
    """Information-preserving perturbations, one is drawn per image (names: `cppo.views`)."""
    negative_views: tuple[Any, ...] = ("noise_patches", "zoom_crop")
    """Information-removing perturbations, one is drawn per image."""

    # The optimizer
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: not at all."""
    lr_scheduler: str = "constant_with_warmup"
    """A schedule of transformers: "constant", "constant_with_warmup", "linear", "cosine",
    "cosine_with_restarts", "polynomial" or "inverse_sqrt"."""
    warmup_steps: int = 0
    """Optimizer steps until the learning rate reaches its peak; a shorter run says so."""

    # The model
    precision: str = "fp32"
    """"fp32": everything in fp32. "bf16": autocast; what is trained is held and stepped in fp32,
    AdamW's state too, whatever dtype the model came in (twice the memory of bf16 weights). Frozen
    linear and convolution layers are held in bf16, as autocast would cast them in every call."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the model."""
    freeze_vision_tower: bool = False
    """Do not train the vision encoder; of a vision-language model only."""
    attention: str = "auto"
    """Attention of the packed forward: "flash_attention_2" (CUDA, flash-attn installed), "varlen"
    (CUDA, PyTorch's own) or "sdpa". "auto": the first of them that runs."""
    balance_processes: bool = True
    """With several processes: before the update, kept completions move between them, question by
    question, until all have about as many tokens."""
    process_timeout: float = 600.0
    """Seconds that a process waits for the others before the run ends: longer than the longest
    difference between two processes' rollouts, rewards or a checkpoint's writing."""
    share_prompts: bool = False
    """Run a question's prompt once for all its kept completions. The numbers are the same; it is
    faster where prompts are long beside their completions (README: shared prompts)."""

    # What is written
    eval_every: int = 0
    """Evaluate the held-out set every so many steps, besides before and after. 0: only those."""
    eval_samples: int = 1
    """Sampled completions per held-out question (avg@N)."""
    eval_greedy: bool = True
    """Also evaluate the greedy completion."""
    save_every: int = 0
    """Write a checkpoint every so many steps, besides at the end, when an evaluation is the best so
    far, and by time. 0: only those."""
    save_minutes: float = 30.0
    """Write a checkpoint when the last one is so old, after the step that is running. 0: never."""
    keep_checkpoints: int = 2
    """The newest so many checkpoints stay, and the best."""
    best_metric: str | None = None
    """Evaluation metric that "best" maximises, "sampled/<reward>" or "greedy/<reward>". None: the
    first sampled one."""
    log_every: int = 1
    """Steps between rows of the console table and the trackers."""
    log_completions: int = 4
    """Sample completions written to completions.jsonl every `log_every` steps."""
    resume_with_changes: bool = False
    """Go on from a checkpoint although data, rewards or chat template are not what it was trained
    on, a repaired reward for example; what differs is said. Options must still be the same."""
    trackers: tuple[str, ...] = ()
    """Trackers of accelerate: "tensorboard", "trackio", "wandb", ..."""

    def __post_init__(self) -> None:
        self._take_plain()
        self._path("output_dir")
        self._integer(
            "max_steps",
            "batch_size",
            "max_completion_tokens",
            "num_iterations",
            "optimizer_steps",
            "max_tokens_per_microbatch",
            "eval_samples",
            "generation_batch_size",
            "keep_checkpoints",
            "log_every",
            at_least=1,
        )
        self._integer("group_size", at_least=2)
        self._integer("seed", "warmup_steps", "eval_every", "save_every", at_least=0)
        self._integer("max_refills", "reward_retries", at_least=0)
        self._integer("log_completions", at_least=0)
        if self.max_prompt_tokens is not None:
            self._integer("max_prompt_tokens", at_least=1)
        if self.reward_timeout is not None:
            self._number("reward_timeout", above=0, at_most=LONGEST_WAIT)
        kwargs = self.chat_template_kwargs
        if kwargs is not None:
            if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
                self._fail("chat_template_kwargs", "a dict with text as its keys, or None")
        self._number("process_timeout", above=0, at_most=LONGEST_WAIT)
        self._number("prune_rate", at_least=0, below=1)
        self._number("learning_rate", above=0, below=math.inf)
        self._number("weight_decay", "max_grad_norm", "save_minutes", at_least=0, below=math.inf)
        self._one_of("prune_scope", SCOPES)
        self._one_of("prune", PRUNES)
        self._one_of("scale_rewards", SCALES)
        self._one_of("precision", PRECISIONS)
        self._one_of("lr_scheduler", SCHEDULES)
        if self.warmup_steps and self.lr_scheduler == "constant":
            self._fail("warmup_steps", "0 with lr_scheduler = 'constant', which has no warm-up")
        self._one_of("attention", ATTENTIONS)
        self._boolean(
            "dynamic_allocation",
            "drop_zero_variance",
            "mask_overlong",
            "gradient_checkpointing",
            "freeze_vision_tower",
            "share_prompts",
            "balance_processes",
            "skip_bad_questions",
            "resume_with_changes",
            "eval_greedy",
        )
        if not isinstance(self.loss, LossConfig):
            self._fail("loss", "a LossConfig")
        if self.lora is not None and not isinstance(self.lora, LoraConfig):
            self._fail("lora", "a LoraConfig or None")
        is_pair = isinstance(self.betas, tuple) and len(self.betas) == 2
        if not is_pair or not all(_is_number(beta) and 0 <= beta < 1 for beta in self.betas):
            self._fail("betas", "two numbers in [0, 1)")
        weights = self.reward_weights
        if weights is not None and not (
            isinstance(weights, tuple) and all(_is_number(weight) for weight in weights)
        ):
            self._fail("reward_weights", "finite numbers, one per reward function")
        if weights is not None and not any(weights):
            self._fail("reward_weights", "not all 0: nothing would be learned")
        for name in ("positive_views", "negative_views", "trackers"):
            if not isinstance(getattr(self, name), tuple):
                self._fail(name, "a tuple or list")
        if self.loss.reduction == "dr_grpo" and self.loss.max_length is None:
            # Micro-batches must not divide by their own longest completion.
            whole = replace(self.loss, max_length=self.max_completion_tokens)
            object.__setattr__(self, "loss", whole)
        if not self.dynamic_allocation and self.batch_size % self.group_size:
            self._fail("batch_size", f"a multiple of group_size = {self.group_size}")
        if self.optimizer_steps > 1 and self.optimizer_steps > self.completions_kept():
            self._fail("optimizer_steps", f"<= {self.completions_kept()}, the completions kept")
        self._check_best_metric()

    def completions_kept(self) -> int:
        """Completions of a step that the update runs on, at most, over all processes."""
        from cppo.reference import kept_per_unit  # torch, which reading a file does not need

        each = kept_per_unit(self.group_size, self.prune_rate)
        questions = self.batch_size // self.group_size
        if self.dynamic_allocation:
            questions = -(-self.batch_size // each)
        kept = questions * each
        if self.prune_scope == "batch":
            kept = kept_per_unit(questions * self.group_size, self.prune_rate)
        return min(kept, self.batch_size)

    def _path(self, name: str) -> None:
        """A path, as text. An empty one would be the working directory."""
        value = getattr(self, name)
        text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            self._fail(name, "the path of a folder")
        self._set(name, text)

    def _check_best_metric(self) -> None:
        if self.best_metric is None:
            return
        modes = MODES if self.eval_greedy else MODES[:1]
        metric = self.best_metric
        parts = metric.split("/", 1) if isinstance(metric, str) else []
        if len(parts) != 2 or parts[0] not in modes or not parts[1]:
            forms = " or ".join(f"'{mode}/<reward>'" for mode in modes)
            hint = "" if self.eval_greedy else " with eval_greedy = False"
            self._fail("best_metric", f"{forms}{hint}, or None")
