"""What surrounds one update: the other processes, the optimizer, the clock and the journal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cppo.model.image_views import views_need_pictures
from cppo.records import LossOutput, NumItems
from cppo.train.balance import balanced
from cppo.train.batch import Batch
from cppo.train.journal import Journal
from cppo.train.metrics import Metric, over_processes, update_metrics
from cppo.train.mismatch import LARGEST, engine_differs
from cppo.train.perception import compared, to_compare
from cppo.train.policy import Policy
from cppo.train.processes import Processes
from cppo.train.progress import PhaseTimer
from cppo.train.views import token_logps

# What a micro-batch counts without the device.
_COUNTS = ("computed_tokens", "gated_tokens", "completions", "views")


class Update:
    """One update in progress, for `cppo.train.algorithm.cppo_update`.

    Args:
        policy: is trained.
        step: steps of the run that are finished.
        journal: remembers the pieces of the update that are done.
        report: is called with the batch that was selected.
        say: prints a line.
    """

    def __init__(
        self,
        policy: Policy,
        step: int,
        processes: Processes,
        journal: Journal,
        timer: PhaseTimer,
        *,
        report: Callable[[Batch], None] = lambda batch: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.policy, self.step, self.processes = policy, step, processes
        self._journal, self._timer = journal, timer
        self._report, self._say = report, say
        self._found: list[dict[str, Any]] = []
        self._grad_norms: list[float] = []
        self._learning_rate = 0.0
        self._of_comparison: dict[str, Metric] = {}
        self._views_before = 0

    def prepared(self, batch: Batch) -> Batch:
        """The batch with what its losses need beside it, shared evenly over the processes.

        These are old log-probabilities if the policy moves within the update, those of the
        reference policy if the loss has a KL term, and what VPPO and PAPO take from the removing
        view.
        """
        self._report(batch)
        policy, config = self.policy, self.policy.config
        if config.balance_processes and self.processes.size > 1:
            with self._timer("balance"):
                has_views = bool(config.loss.perturbed_views)
                looks = has_views and views_need_pictures(policy.processor)
                batch = balanced(batch, self.processes, pictures=looks)
        per_token = dict(batch.per_token)
        once = self._journal.once_breakable
        policy.model.eval()
        if engine_differs(config) and batch.rollouts.sampling_logps is not None:
            per_token["sampling_logps"] = batch.rollouts.sampling_logps
        # "bypass" takes the engine's.
        moves = config.num_iterations * config.optimizer_steps > 1
        if moves and config.loss.importance_correction != "bypass":
            with self._timer("old_logps"), policy.autocast():
                per_token["old_logps"] = token_logps(policy.model, batch, config, once)
        if config.loss.kl_coef > 0:
            with self._timer("ref_logps"), policy.autocast(), policy.as_reference() as reference:
                per_token["ref_logps"] = token_logps(reference, batch, config, once)
        if config.loss.compares_removed:
            self._views_before = len(to_compare(batch, config.loss))
            given = per_token.get("old_logps"), once, self.processes
            with self._timer("removed_logps"), policy.autocast():
                found, self._of_comparison = compared(policy, batch, *given)
            if "token_weights" in per_token and "token_weights" in found:
                # A weight of chance (prune="unbiased") and one of the image.
                found["token_weights"] = found["token_weights"] * per_token["token_weights"]
            per_token |= found
        policy.model.train()
        return dataclasses.replace(batch, per_token=per_token)

    def optimizer_steps(self, batch: Batch) -> Iterator[tuple[Tensor, NumItems]]:
        """The completions of each optimizer step, and their number over all processes.

        The optimizer steps when the caller asks for the next completions.
        """
        policy, config, once = self.policy, self.policy.config, self._journal.once
        for _ in range(config.num_iterations):
            for completions in batch.dealt(config.optimizer_steps):
                num_items = NumItems(*map(int, self.processes.sum(batch.counts(completions))))
                self._learning_rate = once(lambda: policy.optimizer.param_groups[0]["lr"])
                if num_items.completions == 0:
                    words = "no completion is left, nothing to learn"
                    self._say(f"step {self.step + 1}: {words}")
                    once(policy.skip_step)
                    continue
                yield completions, num_items
                with self._timer("optimizer"):
                    self._grad_norms.append(once(self._optimizer_step))

    def add_gradient(
        self, loss: Callable[..., LossOutput], batch: Batch, part: Tensor, num_items: NumItems
    ) -> None:
        """Adds the gradient of a micro-batch's loss, and its metrics.

        Args:
            loss: `cppo.train.algorithm.microbatch_loss`.
        """
        policy, config = self.policy, self.policy.config

        def run() -> dict[str, Any]:
            with self._timer("forward"), policy.autocast():
                output = loss(policy.model, batch, part, num_items, config, policy.processor)
            with self._timer("backward"):
                output.loss.backward()
            # Of the loss what is still on the device: nobody waits for it before the step ends.
            of_loss = {**output.metrics, "loss": output.loss.detach()}
            return {
                "names": list(of_loss),
                "values": torch.stack([value.double() for value in of_loss.values()]),
                "computed_tokens": batch.computed_tokens(part),
                "gated_tokens": batch.counts(batch.gated(part, config.loss))[1],
                "completions": len(part),
                "views": batch.views_run(part, config.loss),
            }

        self._found.append(self._journal.once(run))

    def metrics(self) -> dict[str, float]:
        """The loss's metrics, over all optimizer steps and processes. Collective."""
        steps = len(self._grad_norms)
        metrics = update_metrics(self._totals(), steps, self.policy.config, self.processes)
        metrics |= over_processes(self._of_comparison, self.processes)
        metrics["grad_norm"] = sum(self._grad_norms) / max(steps, 1)
        return metrics | {"learning_rate": self._learning_rate}

    def _totals(self) -> dict[str, float]:
        """What the micro-batches add up to; the values of all of them are read at once."""
        if not self._found:
            return {}
        device = self._found[-1]["values"].device  # earlier ones may come from a checkpoint
        values = iter(torch.cat([own["values"].to(device) for own in self._found]).tolist())
        totals: dict[str, float] = {"microbatches": len(self._found), "views": self._views_before}
        for own in self._found:
            counts = {name: own[name] for name in _COUNTS}
            for name, value in {**{name: next(values) for name in own["names"]}, **counts}.items():
                if name in LARGEST:
                    totals[name] = max(totals.get(name, value), value)
                else:
                    totals[name] = totals.get(name, 0.0) + value
        return totals

    def _optimizer_step(self) -> float:
        self.processes.sum_gradients(self.policy.parameters)
        return self.policy.optimizer_step(self.step)
