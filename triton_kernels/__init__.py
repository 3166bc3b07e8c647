"""Triton kernels, one file per primitive: mathematics in the docstring, helpers, kernel, launcher.

The folder lies at the top of the repository and installs as `cppo.triton_kernels`. A top-level
package of the name `triton_kernels` belongs to Triton's own project, so this one refuses to be
imported as that: it happens where the repository root is on `sys.path` (`python -m ...` there).
"""

from collections.abc import Callable
from typing import Any

if __name__ != "cppo.triton_kernels":
    raise ImportError(
        f"this is cppo.triton_kernels, imported as {__name__!r}: the root of the cppo repository "
        "is on sys.path and its folder shadows the package of that name; run from another "
        "directory, or with PYTHONSAFEPATH=1"
    )

from cppo.triton_kernels.advantages_and_prune import (
    LONGEST_UNIT,
    advantages_and_prune,
    group_advantages,
    prune_completions,
)
from cppo.triton_kernels.contrast import contrast
from cppo.triton_kernels.contrast_backward import contrast_backward, contrast_backward_
from cppo.triton_kernels.launch import on_its_device
from cppo.triton_kernels.loss_terms import loss_terms
from cppo.triton_kernels.perception_mask import perception_mask
from cppo.triton_kernels.token_stats import token_stats
from cppo.triton_kernels.token_stats_backward import token_stats_backward, token_stats_backward_


def _by_name(*launchers: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {launcher.__name__: on_its_device(launcher) for launcher in launchers}


# {name of a schema of `cppo.fused.schema`: its launcher}
PRIMITIVES = _by_name(
    *(token_stats, token_stats_backward, token_stats_backward_, perception_mask),
    *(contrast, contrast_backward, contrast_backward_, loss_terms),
)
# {name of a schema of `cppo.fused.prune`: its launcher}
PRUNE = _by_name(group_advantages, prune_completions, advantages_and_prune)

__all__ = ["LONGEST_UNIT", "PRIMITIVES", "PRUNE"]
