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

from cppo.triton_kernels.advantages_and_prune import (
    advantages_and_prune,
    group_advantages,
    prune_completions,
)

__all__ = ["advantages_and_prune", "group_advantages", "prune_completions"]
