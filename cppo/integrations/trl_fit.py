"""Whether `cppo.integrations.trl` fits the installed TRL; and TRL's kernel replaced by ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor

import cppo
from cppo.extras import vllm_build
from cppo.integrations.fit import Fit, installed, mismatch, parameters

METHODS = {
    "_generate_and_score_completions": "self inputs",
    "_generate": "self prompts",
    "_get_per_token_logps_and_entropies": "self model input_ids attention_mask logits_to_keep "
    "batch_size",
    "_compute_loss": "self model inputs",
}
HELPERS = ("split_pixel_values_by_grid", "unsplit_pixel_values_by_grid", "use_adapter")
KERNEL = (
    "hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs"
)
HAS_KERNEL = "patch_trl"
OPTIONAL = ("vllm", HAS_KERNEL, "_generate")  # only those need it that use it
# TRL's first two numbers: the oldest and newest vLLM that it names, or that was run with it.
VLLM = {(1, 7): ((0, 14), (0, 23)), (1, 16): ((0, 22), (0, 32))}


def check() -> list[Fit]:
    """Return what of the installed TRL fits and what does not, in words.

    `print(*cppo.integrations.trl.check(), sep="\\n")` reads well.
    """
    version, numbers = installed("trl")
    if not version:
        return [Fit("trl", False, "not installed: pip install 'trl>=1.7'")]
    known = (1, 7) <= numbers < (2, 0)
    fits = [Fit("trl", known, f"version {version}; 1.7 to 1.x are known")]
    from trl import GRPOTrainer
    from trl.trainer import utils

    for name, wanted in METHODS.items():
        why = mismatch(getattr(GRPOTrainer, name, None), wanted)
        fits.append(Fit(name, not why, why or "called as expected"))
    missing = [name for name in HELPERS if not hasattr(utils, name)]
    why = f"missing: {', '.join(missing)}" if missing else "has all helpers"
    fits.append(Fit("trl.trainer.utils", not missing, why))
    kernel: Any = getattr(utils, "_ChunkedLogProbFunction", None)
    found = parameters(getattr(getattr(kernel, "original", kernel), "forward", None))[1:]
    as_wanted = found == KERNEL.split()
    why = "the kernel of the fused LM head"
    if not as_wanted:
        why = f"expected a kernel of ({KERNEL}), found ({' '.join(found)})"
    if numbers < (1, 15):
        why = "trl 1.15 brought the kernel that it replaces"
    return [*fits, _vllm_fit(version, numbers), Fit(HAS_KERNEL, as_wanted, why)]


def _vllm_fit(trl: str, numbers: tuple[int, ...]) -> Fit:
    """Whether the installed vLLM fits the installed TRL."""
    build = vllm_build()
    if build is None:
        return Fit("vllm", True, "not installed: only use_vllm=True needs it")
    version, found = installed(build[0])
    if numbers not in VLLM:
        return Fit("vllm", True, f"version {version}; not tried with trl {trl}")
    low, high = VLLM[numbers]
    why = f"version {version}; trl {trl} goes with {low[0]}.{low[1]} to {high[0]}.{high[1]}"
    return Fit("vllm", low <= found <= high, why)


def patch_trl(backend: str = "auto") -> Callable[[], None]:
    """Replace the kernel of TRL's fused LM head by `cppo.linear_token_stats`.

    TRL looks its kernel up in one global at every call, so this reaches GRPO, RLOO, DPO, KTO and
    SFT alike. TRL's own kernel still computes statistics other than log-probability and entropy,
    and takes a DeepSpeed ZeRO-3 weight whose dtype is not that of the hidden states.
    Args: backend: of `cppo.linear_token_stats`.
    Returns: a function that puts TRL's kernel back.
    Raises: RuntimeError if the installed TRL has no such kernel, or one that is called otherwise.
    """
    fit = check()[-1]
    if not fit.fits:
        raise RuntimeError(f"cppo.patch_trl: {fit}")
    from trl.trainer import utils

    kernels: Any = utils
    original = kernels._ChunkedLogProbFunction
    original = getattr(original, "original", original)

    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> tuple[Tensor | None, ...]:
        ours = {*outputs} <= {"log_probs", "entropy"}
        if not ours or (hasattr(weight, "ds_id") and weight.dtype != hidden.dtype):
            rest = (temperature, chunk_size, softcapping, logit_scale, outputs)
            return original.apply(hidden, weight, bias, targets, *rest)
        stats = cppo.linear_token_stats(
            hidden,
            weight.to(hidden.dtype),
            targets,
            bias=None if bias is None else bias.to(hidden.dtype),
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcapping,
            backend=backend,
        )
        return stats.logps, stats.entropy if "entropy" in outputs else None, None, None, None

    kernels._ChunkedLogProbFunction = SimpleNamespace(apply=apply, original=original)
    return partial(setattr, kernels, "_ChunkedLogProbFunction", original)
