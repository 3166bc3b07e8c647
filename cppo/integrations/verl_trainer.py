"""The trainers of verl that prune: `CompletionPruning` before any of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cppo.integrations.fit import AnyTrainer
from cppo.integrations.verl_options import Pruning, check_run


class CompletionPruning(AnyTrainer):
    """Goes before a trainer of verl: drops completions before the old and reference forwards.

    verl balances a step's completions over the ranks, computes old and reference log-probabilities,
    then advantages, and updates. Here the advantages come first, and only kept completions go on,
    in as many mini-batches as verl would have made of all. Options: trainer.v1.cppo, see `Pruning`.
    """

    def __init__(self, config: Any) -> None:
        self.pruning = Pruning(**dict(config.trainer.v1.get("cppo", None) or {}))
        if self.pruning.prune_rate:
            check_run(config)
        # Other parts of verl compare the mode with the names they know.
        config.trainer.v1.trainer_mode = _mode(self)
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
            role = self.config.actor_rollout_ref
            self._mini_batches = math.ceil(
                len(batch) / (role.actor.ppo_mini_batch_size * role.rollout.n)
            )
            batch = self._prune(batch, metrics)
            self._kept_rows = len(batch)
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _prune(self, batch: Any, metrics: dict) -> Any:
        import transfer_queue as tq

        rows = tq.kv_batch_get(batch.keys, batch.partition_id, select_fields=["advantages"])
        # A key is QUESTION_COMPLETION_OUTPUT: an agent's completion may have several outputs.
        completions = [key.rsplit("_", 1)[0] for key in batch.keys]
        sizes: dict[str, float] = defaultdict(float)
        for completion, advantages in zip(completions, rows["advantages"].unbind(), strict=True):
            sizes[completion] = max(sizes[completion], float(advantages.abs().max()))
        seed = self.global_steps * self.parameter_sync_step + self.local_trigger_step
        kept = self.pruning.kept(sizes, seed)
        parts: dict[bool, list[str]] = {True: [], False: []}
        for key, completion in zip(batch.keys, completions, strict=True):
            parts[completion in kept].append(key)
        self._dropped = batch.select_keys(parts[False])
        metrics["cppo/completions"], metrics["cppo/kept_completions"] = len(sizes), len(kept)
        return batch.select_keys(parts[True])

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        if not self.pruning.prune_rate:
            return super()._get_required_batch_multiple(dp_size)
        # What every rank gets the same number of. verl fills the last mini-batch with empty rows.
        actor, self._ranks = self.config.actor_rollout_ref.actor, dp_size
        rows = math.ceil(self._kept_rows / self._mini_batches / dp_size)
        # verl wants micro-batches of equal size, unless it cuts them by tokens.
        most = None if actor.use_dynamic_bsz else actor.ppo_micro_batch_size_per_gpu
        parts = math.ceil(rows / (most or rows))
        self._micro_batch_rows = math.ceil(rows / parts)
        self._mini_batch_rows = dp_size * parts * self._micro_batch_rows
        return self._mini_batch_rows

    def _compute_old_log_prob(self, batch: Any, metrics: dict) -> Any:
        self._cut(batch, self.config.actor_rollout_ref.rollout)
        return super()._compute_old_log_prob(batch, metrics)

    def _compute_ref_log_prob(self, batch: Any, metrics: dict) -> Any:
        role = self.config.actor_rollout_ref
        self._cut(batch, role.rollout if self.ref_in_actor else role.ref)
        return super()._compute_ref_log_prob(batch, metrics)

    def _cut(self, batch: Any, role: Any) -> None:
        """Have the log-probabilities of a pruned batch computed in micro-batches of equal size."""
        most = role.log_prob_micro_batch_size_per_gpu
        if self.pruning.prune_rate and most:
            rows = len(batch) // self._ranks
            sizes = range(min(most, rows), 0, -1)
            size = next(size for size in sizes if rows % size == 0)
            batch.extra_info["micro_batch_size_per_gpu"] = size

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
        # Not every estimator takes a group of one; "grpo" does.
        with _with(self.config.algorithm, adv_estimator="grpo"):
            batch = super()._compute_advantage(batch, metrics)
        tq.kv_batch_put(**where, fields=whole)
        return batch

    def _update_actor(self, batch: Any, metrics: dict) -> Any:
        if not self.pruning.prune_rate:
            return super()._update_actor(batch, metrics)
        workers, rows = self.actor_rollout_wg, self._mini_batch_rows
        update = workers.update_actor

        def update_actor(batch: Any) -> Any:
            # A mean over completions is over those kept, without the empty rows.
            batch.extra_info["global_batch_size"] = self._kept_rows * rows / len(batch)
            batch.extra_info["micro_batch_size_per_gpu"] = self._micro_batch_rows
            return update(batch)

        workers.update_actor = update_actor
        role = self.config.actor_rollout_ref
        try:
            # verl multiplies these two.
            with _with(role.actor, ppo_mini_batch_size=rows), _with(role.rollout, n=1):
                return super()._update_actor(batch, metrics)
        finally:
            workers.update_actor = update


def _mode(trainer: Any) -> str:
    """The name under which verl knows the trainer that `CompletionPruning` goes before."""
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    return next(
        name
        for name, known in TRAINER_REGISTRY.items()
        if isinstance(trainer, known) and not issubclass(known, CompletionPruning)
    )


@contextmanager
def _with(config: Any, **values: Any) -> Iterator[None]:
    before = {name: config[name] for name in values}
    config.update(values)
    try:
        yield
    finally:
        config.update(before)


def register(base: type, name: str) -> None:
    """Register a trainer of verl with pruning under a name of ours."""
    from verl.trainer.ppo.v1.trainer_base import register_trainer

    made = type(f"C{base.__name__}", (CompletionPruning, base), {"__module__": __name__})
    register_trainer(name)(made)
