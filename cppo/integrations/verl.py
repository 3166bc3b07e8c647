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
    workers.engine.base                     no other engine runs an update whose views it would drop
    trainer.ppo.v1.trainer_sync,            trainers "cppo", "cppo_colocate_async" and
    trainer_colocate_async, _separate_async   "cppo_separate_async": verl's, which prune

`check()` says what of the installed verl fits. Options are those of `PolicyLossConfig` and
`Pruning`; docs/verl.md shows a command line with all of them.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

from torch import Tensor

import cppo
from cppo.integrations.after_import import AfterImport, Hook
from cppo.integrations.fit import Fit, installed
from cppo.integrations.verl_loss import contrasts, group_advantages, loss_with_contrast, policy_loss
from cppo.integrations.verl_options import Options, Pruning
from cppo.integrations.verl_trainer import CompletionPruning, register

__all__ = ["CompletionPruning", "Options", "Pruning", "check"]

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

    forward_step.runs_views = True  # type: ignore[attr-defined]
    engine_class.forward_step = forward_step


def _refuse_without_views(base: Any) -> None:
    plain = base.BaseEngine.train_batch

    @wraps(plain)
    def train_batch(engine: Any, data: Any, loss_function: Any) -> Any:
        runs_views = hasattr(type(engine).forward_step, "runs_views")
        if not runs_views and contrasts(engine, loss_function):
            raise ValueError(
                f"cppo.integrations.verl: policy_loss.cpl_coef > 0: the perturbed views run in "
                f"verl's FSDP engines only, got {type(engine).__name__}; use actor.strategy=fsdp2, "
                f"or cpl_coef=0 of cppo.integrations.verl.PolicyLossConfig (papo_coef=0 with PAPO)"
            )
        return plain(engine, data, loss_function)

    base.BaseEngine.train_batch = train_batch


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


# Where it hooks in: the module of verl, what is used of it, and what is done

_ENGINE = "FSDPEngineWithLMHead"
_TRAINERS = {
    "sync": ("PPOTrainerSync", "cppo"),
    "colocate_async": ("PPOTrainerColocateAsync", "cppo_colocate_async"),
    "separate_async": ("PPOTrainerSeparateAsync", "cppo_separate_async"),
}


def _trainer_hook(mode: str) -> Hook:
    base, name = _TRAINERS[mode]
    used = {
        "__init__": "self config",
        "_step_once": "self metrics timing_raw sample_batch_size",
        "_balance_batch": "self batch metrics",
        "_get_required_batch_multiple": "self dp_size",
        "_compute_old_log_prob": "self batch metrics",
        "_compute_ref_log_prob": "self batch metrics",
        "_compute_advantage": "self batch metrics",
        "_update_actor": "self batch metrics",
    }
    expected = {f"{base}.{method}": parameters for method, parameters in used.items()}

    def install(module: Any) -> None:
        register(getattr(module, base), name)

    return Hook(
        f"pruning trainer, {mode}", f"verl.trainer.ppo.v1.trainer_{mode}", expected, install
    )


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
        "contrastive perception: other engines",
        "verl.workers.engine.base",
        {"BaseEngine.train_batch": "self data loss_function"},
        _refuse_without_views,
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
    *map(_trainer_hook, _TRAINERS),
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
