"""Triton kernels, one file per op: mathematics in the docstring, helpers, kernels, launchers.

The folder lies at the top of the repository and installs as `cppo.triton_kernels`. A top-level
package of the name `triton_kernels` belongs to Triton's own project, so this one refuses to be
imported as that: it happens where the repository root is on `sys.path` (`python -m ...` there).
"""

if __name__ != "cppo.triton_kernels":
    raise ImportError(
        f"this is cppo.triton_kernels, imported as {__name__!r}: the root of the cppo repository "
        "is on sys.path and its folder shadows the package of that name; run from another "
        "directory, or with PYTHONSAFEPATH=1"
    )

import functools
from collections.abc import Callable
from typing import Any

import torch

from cppo.ops import library
from cppo.ops.linear_library import LinearBackend
from cppo.ops.sizes import checked
from cppo.triton_kernels import cppo_loss as _loss
from cppo.triton_kernels import loss_terms as _terms
from cppo.triton_kernels import perception_mask as _selection
from cppo.triton_kernels import token_stats as _statistics
from cppo.triton_kernels.advantages_and_prune import (
    advantages_and_prune,
    group_advantages,
    prune_completions,
)


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Launches where the tensors are: Triton itself launches on the current GPU."""

    @functools.wraps(launch)
    def launch_there(*arguments: Any) -> Any:
        tensor = next(a for a in arguments if isinstance(a, torch.Tensor))
        if not tensor.is_cuda:
            return launch(*arguments)
        with torch.cuda.device(tensor.device):
            return launch(*arguments)

    return launch_there


# The launchers, by the names of the schemas of `cppo.ops.library`.
ops = {
    "token_stats": _statistics.token_stats,
    "token_stats_backward": _statistics.token_stats_backward,
    "token_stats_backward_": _statistics.token_stats_backward_,
    "perception_mask": _selection.perception_mask,
    "cppo_loss": _loss.cppo_loss,
    "cppo_loss_backward": _loss.cppo_loss_backward,
    "cppo_loss_backward_": _loss.cppo_loss_backward_,
}
ops = {
    name: _on_its_device(checked(name, library.SCHEMAS[name], launch))
    for name, launch in ops.items()
}
_on_logits = library.Backend("cppo_triton", ops)
torch.library.define("cppo_triton::loss_terms", library.LOSS_TERMS)
_loss_terms = _on_its_device(checked("loss_terms", library.LOSS_TERMS, _terms.loss_terms))
torch.library.impl("cppo_triton::loss_terms", ("cpu", "cuda"), _loss_terms)
# Tiles of logits by vendor GEMMs, with the ops on logits as epilogue.
_on_hidden = LinearBackend("cppo_triton")
# They take the place of the modules of the same names, which import as cppo.triton_kernels.<op>.
token_stats = _on_logits.token_stats
perception_mask = _on_logits.perception_mask
cppo_loss = _on_logits.cppo_loss
linear_token_stats = _on_hidden.linear_token_stats
linear_cppo_loss = _on_hidden.linear_cppo_loss

__all__ = [
    "advantages_and_prune",
    "cppo_loss",
    "group_advantages",
    "linear_cppo_loss",
    "linear_token_stats",
    "perception_mask",
    "prune_completions",
    "token_stats",
]
