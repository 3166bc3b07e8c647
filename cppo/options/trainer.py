"""Every option of the trainer, once: `CPPOConfig`. Options of the losses, of the adapters and of
vLLM have files of their own beside this one.

All are frozen dataclasses, and each field has its documentation below it. An invalid value raises
ValueError naming the field, the value and what is allowed.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import Any

from cppo.options.lora import LoraConfig as LoraConfig
from cppo.options.loss import CORRECTIONS
from cppo.options.loss import LossConfig as LossConfig
from cppo.options.values import CheckedFields, is_finite_number
from cppo.options.vllm import ENGINES, LOWEST_TEMPERATURE
from cppo.options.vllm import VLLMConfig as VLLMConfig

SCALES = ("group", "none", "batch")
SCOPES = ("group", "batch")
PRUNES = ("smallest", "largest", "random", "variance", "shortest", "efficiency", "unbiased")
BY_ADVANTAGE = PRUNES[:3]  # those that need nothing else
ADVANTAGES_OF = ("sampled", "kept")
PRECISIONS = ("fp32", "bf16")
SCHEDULES = (
    *("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts"),
    *("polynomial", "inverse_sqrt"),
)
ATTENTIONS = ("auto", "sdpa", "varlen", "flash_attention_2")
MODES = ("sampled", "greedy")  # of an evaluation; its metrics are "<mode>/<reward>"
DEFAULT_STEPS = 100  # of a run that is not told how long it is
LONGEST_WAIT = 1e9  # seconds, 31 years: what timers of Python and torch can still count
MOST_EPOCHS = 1e6  # of any data set they are steps that can be counted


def kept_per_unit(unit_size: int, prune_rate: float) -> int:
    """Completions that stay of a unit of `unit_size`: n - floor(round(n * rate, 6)), at least 1."""
    return max(1, unit_size - math.floor(round(unit_size * prune_rate, 6)))


# The loss of the trainer and of the adapters, until a user asks for contrastive perception.
PLAIN_LOSS = LossConfig(cpl_coef=0.0)
# The first line of a config.yaml that a run has written into its folder.
WRITTEN_BY_A_RUN = "# All options of this run, as `cppo train` took them."


# What the fields of CPPOConfig may be: integers with their smallest value, choices, booleans.
_INTEGERS = {
    **dict.fromkeys(("batch_size", "max_completion_tokens"), 1),
    **dict.fromkeys(("generation_batch_size", "num_iterations", "optimizer_steps"), 1),
    **dict.fromkeys(("max_tokens_per_microbatch", "eval_samples"), 1),
    **dict.fromkeys(("keep_checkpoints", "log_every"), 1),
    **dict.fromkeys(("seed", "warmup_steps", "eval_every", "save_every", "log_completions"), 0),
    **dict.fromkeys(("max_refills", "reward_retries", "ahead", "report_every"), 0),
    "group_size": 2,
}
_INTEGERS_OR_NONE = ("max_steps", "max_prompt_tokens")  # >= 1
_CHOICES = {
    "prune_scope": SCOPES,
    "prune": PRUNES,
    "advantages_of": ADVANTAGES_OF,
    "scale_rewards": SCALES,
    "precision": PRECISIONS,
    "lr_scheduler": SCHEDULES,
    "attention": ATTENTIONS,
    "engine": ENGINES,
}
_BOOLEANS = (
    *("dynamic_allocation", "drop_zero_variance", "mask_overlong", "skip_bad_questions"),
    *("gradient_checkpointing", "freeze_vision_tower", "share_prompts", "balance_processes"),
    *("resume_with_changes", "eval_greedy"),
)


@dataclass(frozen=True)
class CPPOConfig(CheckedFields):
    """Options of `CPPOTrainer`. One step = one rollout and the update on it."""

    output_dir: str = "runs/cppo"
    """Checkpoints, metrics.jsonl, sample completions and report.html go here. A path, kept as
    text."""
    seed: int = 0
    """Seed of the question order, the sampling, the perturbations and the adapters."""

    # The rollout
    max_steps: int | None = None
    """Rollouts, each followed by its update. None: as many as `num_epochs` asks for, or 100 where
    that is None too."""
    num_epochs: float | None = None
    """In place of `max_steps`: how often the run goes through the training questions. It has
    ceil(num_epochs * questions / questions of a step) steps. Questions that are left out and
    refills (`max_refills`) come on top: with them the run reaches the end of the questions a
    little sooner."""
    batch_size: int = 64
    """Completions per step over all processes. With `dynamic_allocation` these are the completions
    that the update runs on, without it those that are sampled."""
    group_size: int = 8
    """Completions per question (G). >= 2, because rewards are compared within a question."""
    prune_rate: float = 0.0
    """Share of each question's completions that is dropped before the update. In [0, 1)."""
    dynamic_allocation: bool = True
    """Sample extra questions, so that `batch_size` completions remain after pruning."""
    prune_scope: str = "group"
    """"group": per question (the paper). "batch": over all completions of the step (its code)."""
    prune: str = "smallest"
    """Which completions are dropped: those with the "smallest" |advantage|, or the "largest" or
    "random" ones (ablations). Or which stay: those with the largest reward "variance", the
    "shortest", those with the best "efficiency" (reward per token), or a random choice whose
    weights keep the gradient "unbiased" (`cppo.prune_completions`, docs/methods.md)."""
    advantages_of: str = "sampled"
    """Mean and std of the advantages are those of all "sampled" completions of a question, or only
    of the "kept" ones."""
    drop_zero_variance: bool = False
    """Also drop completions with A = 0: whole groups of equal reward."""
    group_top_p: float | None = None
    """Keep the fewest groups whose reward variances sum up to this share of all, in (0, 1]
    (`cppo.select_groups`); the others are dropped after pruning. None: all groups."""
    max_refills: int = 3
    """With `drop_zero_variance` or `group_top_p`, and `dynamic_allocation`: how often a step may
    draw more questions to replace the groups that were dropped. 0: the batch shrinks instead."""
    scale_rewards: str = "group"
    """Advantages are divided by the std of their "group", of the whole "batch" over all processes,
    or "none"."""
    max_prompt_tokens: int | None = None
    """Questions with a longer prompt are skipped with a warning. None: no limit."""
    max_completion_tokens: int = 256
    """Generation stops here."""
    generation_batch_size: int = 1024
    """At most this many completions are generated at once, in rollouts and evaluations; fewer where
    memory is short, but always all those of a question."""
    engine: str = "builtin"
    """What samples: "builtin", the loop of this package; "vllm", in this process; "vllm_server", a
    `vllm serve`, on other GPUs for example (docs/rollouts.md)."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """Options of vLLM."""
    importance_correction: str | None = None
    """How the loss corrects for an engine whose numbers differ from the trainer's: a value of
    `LossConfig.importance_correction`, which it overrides. The formulas are there, and the bounds
    are in `loss`. None: that of `loss`, but with vLLM "token_truncate" in place of "none".
    `loss.importance_correction` holds the result."""
    ahead: int = 0
    """1: completions of the next step are sampled while this one trains, from the weights before
    it. They are one step off-policy, which `importance_correction` corrects for. Only with
    "vllm_server", for a server with GPUs of its own."""
    mask_overlong: bool = False
    """Completions cut at `max_completion_tokens` take part in advantages but not in the loss."""
    reward_weights: tuple[float, ...] | None = None
    """One weight per reward function, not all 0; a weight of 0 only logs it. None: all 1."""
    reward_timeout: float | None = None
    """Seconds a reward function may take for the completions of a step. A slower one ends the run
    with an error that names it. None: no limit."""
    reward_retries: int = 0
    """How often a reward function that raises is called again, after 1, 2, 4, ... seconds, before
    the run ends (a judge on a network, for example). What it logged before is discarded."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further arguments of the chat template, for example {"enable_thinking": false}."""
    skip_bad_questions: bool = False
    """Skip training questions that cannot be read or encoded (a broken image, an image that the
    processor refuses), and count them in `questions/skipped`. False: such a question ends the
    run."""

    # The update
    loss: LossConfig = field(default_factory=lambda: PLAIN_LOSS)
    """Coefficients of the loss. By default it does not contrast images (docs/methods.md)."""
    num_iterations: int = 1
    """Passes over each rollout."""
    optimizer_steps: int = 1
    """Optimizer steps per pass. The kept completions are dealt to them evenly, so there cannot be
    more steps than completions."""
    max_tokens_per_microbatch: int = 16384
    """Prompt and response tokens of one forward and backward pass; gradients accumulate. A longer
    completion has a pass to itself."""
    positive_views: tuple[Any, ...] = ("color_jitter", "perspective", "rotation")
    """Information-preserving perturbations; one is drawn per image (names: `cppo.views`)."""
    negative_views: tuple[Any, ...] = ("noise_patches", "zoom_crop")
    """Information-removing perturbations; one is drawn per image."""

    # The optimizer
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm. 0: no clipping."""
    lr_scheduler: str = "constant_with_warmup"
    """A schedule of transformers: "constant", "constant_with_warmup", "linear", "cosine",
    "cosine_with_restarts", "polynomial" or "inverse_sqrt"."""
    warmup_steps: int = 0
    """Optimizer steps until the learning rate peaks. A run that ends earlier says so."""

    # The model
    precision: str = "fp32"
    """"fp32": everything in fp32. "bf16": autocast. Trained weights and AdamW's state are then held
    in fp32, whatever dtype the model came in (twice the memory of bf16 weights); frozen linear and
    convolution layers are held in bf16, which saves autocast's casts in every call."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the model."""
    freeze_vision_tower: bool = False
    """Do not train the vision encoder. For vision-language models only."""
    attention: str = "auto"
    """Attention of the packed forward: "flash_attention_2" (CUDA, flash-attn installed), "varlen"
    (CUDA, PyTorch's own) or "sdpa". "auto": the first of them that runs."""
    balance_processes: bool = True
    """With several processes: before the update, move kept completions between them, question by
    question, until all processes have about the same number of tokens."""
    process_timeout: float = 600.0
    """Seconds a process waits for the others before the run ends. It must exceed the largest
    difference between two processes' rollouts or rewards, and the time to write a checkpoint."""
    share_prompts: bool = False
    """Run a question's prompt once for all its kept completions. The numbers are the same; it is
    faster where prompts are much longer than their completions (docs/packing.md)."""

    # What is written
    eval_every: int = 0
    """Evaluate the held-out set every `eval_every` steps, in addition to before and after training.
    0: only before and after."""
    eval_samples: int = 1
    """Sampled completions per held-out question (avg@N)."""
    eval_greedy: bool = True
    """Also evaluate the greedy completion."""
    save_every: int = 0
    """Write a checkpoint every `save_every` steps, in addition to those at the end, after the best
    evaluation so far, and by time. 0: only those."""
    save_minutes: float = 30.0
    """Write a checkpoint after a step if the last one is at least this old. 0: never."""
    keep_checkpoints: int = 2
    """Keep this many recent checkpoints, plus the best one."""
    best_metric: str | None = None
    """Evaluation metric that the best checkpoint maximises, "sampled/<reward>" or
    "greedy/<reward>". None: the first sampled one."""
    log_every: int = 1
    """Steps between rows of the console table and the trackers."""
    log_completions: int = 4
    """Sample completions written to completions.jsonl every `log_every` steps, and held-out
    questions whose completions each evaluation writes to held_out.jsonl."""
    report_every: int = 20
    """Steps between two versions of report.html (docs/report.md), which is also written when the
    run ends, however it ends. 0: only then."""
    resume_with_changes: bool = False
    """Resume even if the data, the rewards or the chat template differ from the checkpoint's (after
    repairing a reward, for example). The differences are printed. Options must still match."""
    trackers: tuple[str, ...] = ()
    """Trackers of accelerate: "tensorboard", "trackio", "wandb", ..."""

    def __post_init__(self) -> None:
        self._take_plain()
        self._path("output_dir")
        for name, least in _INTEGERS.items():
            self._integer(name, at_least=least)
        for name in _INTEGERS_OR_NONE:
            if getattr(self, name) is not None:
                self._integer(name, at_least=1)
        for name, choices in _CHOICES.items():
            self._one_of(name, choices)
        self._boolean(*_BOOLEANS)
        self._number("prune_rate", at_least=0, below=1)
        if self.group_top_p is not None:
            self._number("group_top_p", above=0, at_most=1)
        self._number("learning_rate", above=0, below=math.inf)
        self._number("weight_decay", "max_grad_norm", "save_minutes", at_least=0, below=math.inf)
        self._number("process_timeout", above=0, at_most=LONGEST_WAIT)
        if self.reward_timeout is not None:
            self._number("reward_timeout", above=0, at_most=LONGEST_WAIT)
        self._check_collections()
        self._check_together()
        self._check_best_metric()

    def _check_collections(self) -> None:
        kwargs = self.chat_template_kwargs
        if kwargs is not None and not (
            isinstance(kwargs, dict) and all(isinstance(name, str) for name in kwargs)
        ):
            self._fail("chat_template_kwargs", "a dict with text as its keys, or None")
        if not isinstance(self.loss, LossConfig):
            self._fail("loss", "a LossConfig")
        if not isinstance(self.vllm, VLLMConfig):
            self._fail("vllm", "a VLLMConfig")
        if self.lora is not None and not isinstance(self.lora, LoraConfig):
            self._fail("lora", "a LoraConfig or None")
        is_pair = isinstance(self.betas, tuple) and len(self.betas) == 2
        if not is_pair or not all(is_finite_number(b) and 0 <= b < 1 for b in self.betas):
            self._fail("betas", "two numbers in [0, 1)")
        weights = self.reward_weights
        if weights is not None:
            if not isinstance(weights, tuple) or not all(map(is_finite_number, weights)):
                self._fail("reward_weights", "finite numbers, one per reward function")
            if not any(weights):
                self._fail("reward_weights", "not all 0: nothing would be learned")
        for name in ("positive_views", "negative_views", "trackers"):
            if not isinstance(getattr(self, name), tuple):
                self._fail(name, "a tuple or list")

    def _check_together(self) -> None:
        """Options that depend on each other."""
        if self.num_epochs is not None:
            self._number("num_epochs", above=0, at_most=MOST_EPOCHS)
            if self.max_steps is not None:
                self._fail("max_steps", f"left out (None) with num_epochs = {self.num_epochs:g}")
        self._set_correction()
        self._check_engine()
        self._check_advantages()
        if self.warmup_steps and self.lr_scheduler == "constant":
            self._fail("warmup_steps", "0 with lr_scheduler = 'constant', which has no warm-up")
        if self.loss.reduction == "dr_grpo" and self.loss.max_length is None:
            # Micro-batches must not divide by their own longest completion.
            self._set("loss", replace(self.loss, max_length=self.max_completion_tokens))
        if not self.dynamic_allocation and self.batch_size % self.group_size:
            self._fail("batch_size", f"a multiple of group_size = {self.group_size}")
        if self.optimizer_steps > 1 and self.optimizer_steps > self.completions_kept():
            self._fail("optimizer_steps", f"<= {self.completions_kept()}, the completions kept")

    def _check_advantages(self) -> None:
        if self.advantages_of == "sampled":
            return
        if self.prune == "unbiased":
            self._fail("advantages_of", "'sampled' with prune = 'unbiased', which it would bias")
        if self.prune_scope == "group" and kept_per_unit(self.group_size, self.prune_rate) == 1:
            self._fail("advantages_of", "'sampled' where one completion of a question is kept")

    def _check_engine(self) -> None:
        if self.engine != "builtin" and self.loss.temperature < LOWEST_TEMPERATURE:
            self._fail("engine", f"'builtin' with loss.temperature < {LOWEST_TEMPERATURE:g}")
        if self.ahead > 1:
            self._fail("ahead", "0 or 1")
        if self.ahead and (self.engine != "vllm_server" or self.vllm.sleep):
            self._fail("ahead", "0 without a server that is always there (engine, vllm.sleep)")
        if self.ahead and self.loss.importance_correction == "none":
            self._fail("importance_correction", "another one with ahead = 1, which is off-policy")

    def _set_correction(self) -> None:
        """Sets that of the loss. This one stays None: a copy may have another engine."""
        own = self.importance_correction
        if own is not None:
            self._one_of("importance_correction", CORRECTIONS)
        elif self.engine != "builtin" and self.loss.importance_correction == "none":
            own = "token_truncate"
        if own is not None:
            self._set("loss", replace(self.loss, importance_correction=own))

    def steps(self, rows: int | None = None, processes: int = 1) -> int:
        """Steps of a run on so many training questions.

        Raises: ValueError for `num_epochs` without their number.
        """
        if self.num_epochs is None:
            return DEFAULT_STEPS if self.max_steps is None else self.max_steps
        if rows is None:
            raise ValueError("CPPOConfig.num_epochs needs the number of training questions")
        exact = self.num_epochs * rows / self.questions_per_step(processes)
        return max(1, math.ceil(round(exact, 6)))

    def questions_per_step(self, processes: int = 1) -> int:
        """Questions that a step begins with, over all processes, each of which has as many."""
        if not self.dynamic_allocation:
            return self.batch_size // self.group_size
        needed = -(-self.batch_size // kept_per_unit(self.group_size, self.prune_rate))
        return -(-needed // processes) * processes

    def completions_kept(self) -> int:
        """Completions of a step that the update runs on, at most, over all processes."""
        each = kept_per_unit(self.group_size, self.prune_rate)
        questions = self.questions_per_step()
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
