"""Completion pruning and contrastive perception in verl >= 0.9, which loads this module itself.

verl imports every entry point of the group "verl.plugins" in each of its processes, and so this
module. It imports nothing of verl and copies none of its code. When verl imports one of the modules
below, and the functions used there still have the parameters known here, this is added:

    trainer.ppo.core_algos                  policy loss "cppo", advantage estimator "cppo"
    workers.engine.fsdp.transformer_impl    around the forward step of the FSDP engine: contrastive
                                            perception, if the policy loss is "cppo" and the model
                                            sees images
    models.transformers.monkey_patch,       model.use_fused_kernels with
    utils.experimental.torch_functional       model.fused_kernel_options.impl_backend=cppo:
                                            `cppo.linear_token_stats`
    trainer.ppo.v1.trainer_sync             trainer "cppo": the synchronous one, which prunes

`check()` says what of the installed verl fits. Options are those of `PolicyLossConfig` and
`Pruning`; docs/verl.md shows a command line with all of them.
"""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

from torch import Tensor

import cppo
from cppo import reference
from cppo.integrations.after_import import AfterImport, Hook
from cppo.integrations.fit import AnyTrainer, Fit, installed
from cppo.integrations.verl_loss import contrasts, group_advantages, loss_with_contrast, policy_loss
from cppo.integrations.verl_options import Options, Pruning, check_run

OLDEST = (0, 9)


# Registered or wrapped


def _register_loss(core_algos: Any) -> None:
    core_algos.register_policy_loss("cppo")(policy_loss)
    core_algos.register_adv_est("cppo")(group_advantages)


def _wrap_forward_step(transformer_impl: Any) -> None:
    engine_class = transformer_impl.FSDPEngineWithLMHead
    plain = engine_class.forward_step

    @wraps(plain)
    def forward_step(
        engine: Any, micro_batch: Any, loss_function: Any, forward_only: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        if forward_only or not contrasts(engine, loss_function):
            return plain(engine, micro_batch, loss_function, forward_only)
        from verl.utils.tensordict_utils import get_non_tensor_data

        micro_batch = micro_batch.copy()
        asked = get_non_tensor_data(micro_batch, "calculate_entropy", False)
        micro_batch.set_non_tensor("calculate_entropy", True)
        with_contrast = partial(loss_with_contrast, engine, loss_function, asked)
        return plain(engine, micro_batch, with_contrast, forward_only)

    engine_class.forward_step = forward_step


# Fused statistics behind verl's switch


def _accept_backend(monkey_patch: Any) -> None:
    plain = monkey_patch.patch_forward_with_backends

    @wraps(plain)
    def patch_forward_with_backends(
        model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        ours = fused_kernels_backend == "cppo"
        plain(model, use_fused_kernels, "torch" if ours else fused_kernels_backend)
        if ours:
            model._verl_fused_kernels_backend = "cppo"

    monkey_patch.patch_forward_with_backends = patch_forward_with_backends


def _fuse_statistics(torch_functional: Any) -> None:
    class FusedLinearForPPO(torch_functional.FusedLinearForPPO):
        def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
            super().__init__(chunk_size, "torch" if impl_backend == "cppo" else impl_backend)
            self.impl_backend = impl_backend

        def forward(
            self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature=1.0
        ) -> tuple[Tensor, Tensor]:
            if self.impl_backend != "cppo":
                return super().forward(hidden_states, vocab_weights, input_ids, temperature)
            return cppo.linear_token_stats(
                hidden_states, vocab_weights, input_ids, temperature=temperature
            )

    torch_functional.FusedLinearForPPO = FusedLinearForPPO


# The trainer that prunes


class CompletionPruning(AnyTrainer):
    """Goes before verl's `PPOTrainerSync`: drops completions before the old and reference forwards.

    verl balances a step's completions over the ranks, computes old and reference log-probabilities,
    then advantages, and updates. Here the advantages come first, and only kept completions go on.
    Options: trainer.v1.cppo, see `Pruning`.
    """

    def __init__(self, config: Any) -> None:
        self.pruning = Pruning(**dict(config.trainer.v1.get("cppo", None) or {}))
        if self.pruning.prune_rate:
            check_run(config)
        # Other parts of verl compare the mode with the names they know.
        config.trainer.v1.trainer_mode = "sync"
        super().__init__(config)

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> Any:
        self._dropped: Any = None
        batch = super()._step_once(metrics, timing_raw, sample_batch_size)
        if self._dropped is None:
            return batch
        # Metrics are of all completions, and all are taken out of the queue.
        keys, tags = batch.keys + self._dropped.keys, batch.tags + self._dropped.tags
        return type(batch)(keys, tags, batch.partition_id, extra_info=batch.extra_info)

    def _balance_batch(self, batch: Any, metrics: dict, *args: Any, **kwargs: Any) -> Any:
        if self.pruning.prune_rate:
            with _with(self.config.algorithm, rollout_correction=None):
                super()._compute_advantage(batch, metrics)
            batch = self._prune(batch, metrics)
        with self._kept_per_question():
            return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _prune(self, batch: Any, metrics: dict) -> Any:
        import transfer_queue as tq

        rows = tq.kv_batch_get(batch.keys, batch.partition_id, select_fields=["advantages"])
        # A key is QUESTION_COMPLETION_OUTPUT: an agent's completion may have several outputs.
        completions = [key.rsplit("_", 1)[0] for key in batch.keys]
        sizes: dict[str, float] = defaultdict(float)
        for completion, advantages in zip(completions, rows["advantages"].unbind(), strict=True):
            sizes[completion] = max(sizes[completion], float(advantages.abs().max()))
        kept = self.pruning.kept(sizes, seed=self.global_steps)
        parts: dict[bool, list[str]] = {True: [], False: []}
        for key, completion in zip(batch.keys, completions, strict=True):
            parts[completion in kept].append(key)
        self._dropped = batch.select_keys(parts[False])
        metrics["cppo/completions"], metrics["cppo/kept_completions"] = len(sizes), len(kept)
        return batch.select_keys(parts[True])

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        if not self.pruning.prune_rate:
            return super()._compute_advantage(batch, metrics)
        import transfer_queue as tq

        pairs = zip(batch.keys, batch.tags, strict=True)
        keys = [key for key, tag in pairs if not tag.get("is_padding", False)]
        where: dict[str, Any] = dict(keys=keys, partition_id=batch.partition_id)
        whole = tq.kv_batch_get(**where, select_fields=["advantages", "returns"])
        # verl's own call does the rollout correction and handles the rows that balancing added. It
        # also computes advantages of the pruned groups; those of the whole groups replace them.
        batch = super()._compute_advantage(batch, metrics)
        tq.kv_batch_put(**where, fields=whole)
        return batch

    def _update_actor(self, batch: Any, metrics: dict) -> Any:
        with self._kept_per_question():
            return super()._update_actor(batch, metrics)

    def _kept_per_question(self) -> Any:
        """Sets rollout.n, by which verl multiplies mini-batches of questions, to what is kept."""
        rollout = self.config.actor_rollout_ref.rollout
        return _with(rollout, n=reference.kept_per_unit(rollout.n, self.pruning.prune_rate))


@contextmanager
def _with(config: Any, **values: Any) -> Iterator[None]:
    before = {name: config[name] for name in values}
    config.update(values)
    try:
        yield
    finally:
        config.update(before)


def _register_trainer(trainer_sync: Any) -> None:
    from verl.trainer.ppo.v1.trainer_base import register_trainer

    bases = (CompletionPruning, trainer_sync.PPOTrainerSync)
    register_trainer("cppo")(type("CPPOTrainerSync", bases, {"__module__": __name__}))


# Where it hooks in: the module of verl, what is used of it, and what is done

_ENGINE = "FSDPEngineWithLMHead"
HOOKS = [
    Hook(
        "policy loss and advantages",
        "verl.trainer.ppo.core_algos",
        {
            "register_policy_loss": "name",
            "register_adv_est": "name_or_enum",
            "agg_loss": "loss_mat loss_mask loss_agg_mode",
        },
        _register_loss,
    ),
    Hook(
        "contrastive perception",
        "verl.workers.engine.fsdp.transformer_impl",
        {
            f"{_ENGINE}.forward_step": "self micro_batch loss_function forward_only",
            f"{_ENGINE}.prepare_model_inputs": "self micro_batch",
            f"{_ENGINE}.prepare_model_outputs": "self output output_args micro_batch",
        },
        _wrap_forward_step,
    ),
    Hook(
        "fused statistics: the switch",
        "verl.models.transformers.monkey_patch",
        {"patch_forward_with_backends": "model use_fused_kernels fused_kernels_backend"},
        _accept_backend,
    ),
    Hook(
        "fused statistics: the function",
        "verl.utils.experimental.torch_functional",
        {
            "FusedLinearForPPO.__init__": "self chunk_size impl_backend",
            "FusedLinearForPPO.forward": "self hidden_states vocab_weights input_ids temperature",
        },
        _fuse_statistics,
    ),
    Hook(
        "pruning trainer",
        "verl.trainer.ppo.v1.trainer_sync",
        {
            "PPOTrainerSync.__init__": "self config",
            "PPOTrainerSync._step_once": "self metrics timing_raw sample_batch_size",
            "PPOTrainerSync._balance_batch": "self batch metrics",
            "PPOTrainerSync._compute_advantage": "self batch metrics",
            "PPOTrainerSync._update_actor": "self batch metrics",
        },
        _register_trainer,
    ),
]


_version, _numbers = installed("verl")
_after_import = AfterImport(HOOKS) if _numbers >= OLDEST else None


def check() -> list[Fit]:
    """Return what of the installed verl fits and what does not, in words.

    Imports the modules of verl that are hooked into. `print(*check(), sep="\\n")` reads well.
    """
    if _after_import is None:
        why = f"{_version} is older than 0.9" if _version else "pip install 'verl[verl-core]>=0.9'"
        return [Fit("verl", False, why)]
    names = [point.name for point in importlib.metadata.entry_points(group="verl.plugins")]
    why = "loads this plugin" if "cppo" in names else "does not see this plugin: reinstall cppo"
    return [Fit(f"verl {_version}", "cppo" in names, why), *_after_import.check()]


def __getattr__(name: str) -> Any:
    if name != "PolicyLossConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from verl.workers.config import PolicyLossConfig as Base

    # Made when Hydra asks for it (policy_loss._target_): its base class is verl's.
    made = type(name, (Options, Base), {"__module__": __name__, "__doc__": Options.__doc__})
    globals()[name] = dataclass(made)
    return globals()[name]
