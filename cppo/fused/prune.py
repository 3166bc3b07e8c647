"""Advantages and pruning of a backend: three ops, and the rules around them once.

B completions in blocks of `group_size` (a question) and of `unit_size` (what is pruned together: a
question, or all of them); `keep` completions of each unit stay. Kernels know no rate, no scope and
no zeros to drop: this file does. They know five rules: by |A|, "smallest" or "largest"; by a
"score" (B,) that is given, which is how "random", "shortest" and "efficiency" come to them; of the
largest "variance" of that score; and "unbiased", with the score's first entry of each unit as the
number that decides by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cppo import reference
from cppo.options.trainer import kept_per_unit

SCHEMAS = {
    "group_advantages": "(Tensor rewards, int group_size, str scale, float eps) -> Tensor",
    "prune_completions": "(Tensor advantages, int unit_size, int keep, str prune, Tensor? score) "
    "-> Tensor",
    "advantages_and_prune": "(Tensor rewards, int group_size, int unit_size, int keep, str scale, "
    "float eps, str prune, Tensor? score) -> (Tensor, Tensor)",
}


class Pruning(NamedTuple):
    """How to prune; arguments of `cppo.reference.prune_completions`."""

    group_size: int
    prune_rate: float
    scope: str = "group"
    prune: str = "smallest"
    drop_zero: bool = False
    noise: Tensor | None = None
    rewards: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def rule(self) -> tuple[str, Tensor | None]:
        """The rule as the kernels know it, and its score."""
        score = reference.prune_score(self.prune, self.noise, self.rewards, self.lengths)
        by_score = self.prune in ("random", "shortest", "efficiency")
        return "score" if by_score else self.prune, score

    def unit(self, total: int) -> tuple[int, int]:
        """The size of a unit of so many completions, and how many of it stay."""
        size = total if self.scope == "batch" and total else self.group_size
        return size, kept_per_unit(size, self.prune_rate)

    def without_zeros(self, kept: Tensor, advantages: Tensor) -> Tensor:
        return kept[advantages[kept] != 0] if self.drop_zero else kept


class PruneBackend:
    """The functions of a backend, called like those of `cppo.reference`.

    Args:
        namespace: of the `torch.library` ops.
        kernels: {name: function} of `SCHEMAS` where Python implements them; None where the
            compiled extension has defined and implemented them already.
        longest_unit: the kernels take no longer units; plain PyTorch does.
    """

    def __init__(
        self,
        namespace: str,
        kernels: Mapping[str, Callable[..., Any]] | None = None,
        longest_unit: float = float("inf"),
    ) -> None:
        self._ops, self._longest = getattr(torch.ops, namespace), longest_unit
        for op, schema in SCHEMAS.items():
            if kernels is not None:
                torch.library.define(f"{namespace}::{op}", schema)
                torch.library.impl(f"{namespace}::{op}", ("cpu", "cuda"), kernels[op])
            torch.library.register_fake(f"{namespace}::{op}", _FAKES[op])

    def group_advantages(
        self, rewards: Tensor, group_size: int, scale: str = "group", eps: float = 1e-4
    ) -> Tensor:
        fits = group_size <= self._longest
        return (self._ops if fits else reference).group_advantages(rewards, group_size, scale, eps)

    def prune_completions(self, advantages: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """`arguments` and `named` are those of a `Pruning`."""
        pruning = Pruning(*arguments, **named)
        unit_size, keep = pruning.unit(len(advantages))
        if unit_size > self._longest:
            return reference.prune_completions(advantages, **pruning._asdict())
        kept = self._ops.prune_completions(advantages, unit_size, keep, *pruning.rule)
        return pruning.without_zeros(kept, advantages)

    def advantages_and_prune(
        self,
        rewards: Tensor,
        group_size: int,
        prune_rate: float,
        scale: str = "group",
        eps: float = 1e-4,
        *arguments: Any,
        advantages_of: str = "sampled",
        **named: Any,
    ) -> tuple[Tensor, Tensor]:
        """`arguments` and `named` are those of a `Pruning` behind its rate."""
        pruning = Pruning(group_size, prune_rate, *arguments, **named)._replace(rewards=rewards)
        unit_size, keep = pruning.unit(len(rewards))
        if unit_size > self._longest:
            advantages = self.group_advantages(rewards, group_size, scale, eps)
            kept = self.prune_completions(advantages, *pruning._replace(drop_zero=False))
        else:
            advantages, kept = self._ops.advantages_and_prune(
                rewards, group_size, unit_size, keep, scale, eps, *pruning.rule
            )
        if advantages_of == "kept":
            advantages = reference.advantages_of_kept(rewards, kept, group_size, scale, eps)
        return advantages, pruning.without_zeros(kept, advantages)


# What torch.compile and opcheck are told about shapes and dtypes.


def _fake_advantages(rewards: Tensor, *_: Any) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=torch.float32)


def _fake_kept(advantages: Tensor, unit_size: int, keep: int, *_: Any) -> Tensor:
    return advantages.new_empty(advantages.shape[0] // unit_size * keep, dtype=torch.int64)


def _fake_both(
    rewards: Tensor, group_size: int, unit_size: int, keep: int, *_: Any
) -> tuple[Tensor, Tensor]:
    return _fake_advantages(rewards), _fake_kept(rewards, unit_size, keep)


_FAKES: dict[str, Callable[..., Any]] = {
    "group_advantages": _fake_advantages,
    "prune_completions": _fake_kept,
    "advantages_and_prune": _fake_both,
}
